"""Problems that a test has must not be trained on: which of a training file's are, once both are written in one way."""

import re
from collections.abc import Sequence
from pathlib import Path

from trivium.data.documents import files_in, rows_of
from trivium.registry import UserError

FIELDS = ("problem", "question")  # that a problem's text may stand in
# What writes the same formula in another way: blanks, dollar signs, sizes of brackets and fractions, thin spaces.
_NOTHING = re.compile(r"\s+|\$|\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ()\[\]]")
_FRACTION = re.compile(r"\\[dtc]frac")


def signature(problem: str) -> str:
    """Return a problem in one way of writing, without blanks and capitals: "1 2" and "12" are the same in it."""
    return _FRACTION.sub(r"\\frac", _NOTHING.sub("", problem)).casefold()


def problems_in(places: Sequence[Path]) -> set[str]:
    """Return the signatures of the problems in files, or folders of files, of JSON lines or Parquet rows.

    Raises UserError for a file that cannot be read and for a row that has none of FIELDS.
    """
    found: set[str] = set()
    for path in (path for place in places for path in files_in(place)):
        for where, row in rows_of(path):
            texts = [row[name] for name in FIELDS if isinstance(row.get(name), str)]
            if not texts:
                raise UserError(f"{where}: has neither {' nor '.join(FIELDS)}; it has {', '.join(row) or 'nothing'}")
            found.add(signature(texts[0]))
    return found
