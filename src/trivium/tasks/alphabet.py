"""The symbols a task writes with: token ids, digits, and the specials that end and pad."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from trivium.registry import UserError

LARGE = 200  # symbols of an alphabet that is read by looking symbols up
SHOWN = 100  # symbols that an error lists


@dataclass(frozen=True)
class Alphabet:
    """Symbols whose token id is their index; multi-character ones such as ``<end>`` are single tokens.

    `digits` lists the symbols that position schemes and traces treat as digits, least value first.
    `pad` may equal `end`.
    """

    symbols: tuple[str, ...]
    digits: tuple[str, ...] = ()
    end: str = "<end>"
    pad: str = "<end>"
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError(f"a symbol stands twice in the alphabet {self.symbols}")
        missing = [symbol for symbol in (*self.digits, self.end, self.pad) if symbol not in self.symbols]
        if missing:
            raise ValueError(f"symbols named but not in the alphabet: {missing}")
        object.__setattr__(self, "_ids", {symbol: index for index, symbol in enumerate(self.symbols)})

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.symbols, key=len, reverse=True)
        return re.compile("|".join(re.escape(symbol) for symbol in longest_first))

    @property
    def end_id(self) -> int:
        return self._ids[self.end]

    @property
    def pad_id(self) -> int:
        return self._ids[self.pad]

    @property
    def digit_ids(self) -> tuple[int, ...]:
        return tuple(self._ids[digit] for digit in self.digits)

    def id_of(self, symbol: str) -> int:
        """Return the token id of one symbol; KeyError if it is not in the alphabet."""
        return self._ids[symbol]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, the longest symbol first at each place.

        Raises UserError naming the first character that is outside the alphabet.
        """
        ids, place = [], 0
        while place < len(text):
            symbol = self._symbol_at(text, place)
            if symbol is None:
                known = ["space" if symbol == " " else symbol for symbol in self.symbols[:SHOWN]]
                more = [f"... {len(self.symbols)} symbols"] if len(self.symbols) > SHOWN else []
                raise UserError(
                    f"character {text[place]!r} at place {place + 1} of {text!r} is not in the alphabet: "
                    + " ".join(known + more)
                )
            ids.append(self._ids[symbol])
            place += len(symbol)
        return ids

    def _symbol_at(self, text: str, place: int) -> str | None:
        """Return the longest symbol that `text` has at `place`."""
        if len(self.symbols) <= LARGE:
            match = self._pattern.match(text, place)
            return None if match is None else match.group()
        # A pattern tries its alternatives one by one, which thousands of them make slow.
        return next(
            (text[place : place + size] for size in self._sizes if text[place : place + size] in self._ids), None
        )

    @cached_property
    def _sizes(self) -> list[int]:
        return sorted({len(symbol) for symbol in self.symbols}, reverse=True)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of token ids, specials written out."""
        return "".join(self.symbols[int(index)] for index in ids)
