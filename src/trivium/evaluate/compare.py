"""Two models on the same problems: which of them is right where the other is not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.config import UserError, unreadable
from trivium.evaluate.statistics import mcnemar


def compare_with(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return McNemar's test of two runs for "exact_match" and for each reading that both have; see `mcnemar`.

    "first" is `ours`, "second" is `theirs`. Raises UserError unless both are answers to the same problems.
    """
    if not ours:
        raise UserError("--against: this task's problems are not answered, so that there is nothing to compare")
    if len(ours) != len(theirs):
        raise UserError(f"--against: {len(theirs)} answers, of {len(ours)} problems here; score both on the same ones")
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        if our["prompt"] != their["prompt"]:
            raise UserError(
                f"--against: problem {number} is {their['prompt']!r} there and {our['prompt']!r} here; score both on "
                "the same ones"
            )
    tests = {"exact_match": mcnemar([row["correct"] for row in ours], [row["correct"] for row in theirs])}
    for name in ours[0]["readings"].keys() & theirs[0]["readings"].keys():
        tests[name] = mcnemar([row["readings"][name] for row in ours], [row["readings"][name] for row in theirs])
    return {name: tests[name] for name in ("exact_match", *sorted(tests.keys() - {"exact_match"}))}


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `trivium eval --answers` wrote; UserError with the line of one that is not."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            sound = isinstance(row["prompt"], str) and isinstance(row["correct"], bool)
            sound = sound and all(isinstance(value, bool) for value in row["readings"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            sound, row = False, {}
        if not sound:
            raise UserError(f"{path}:{number}: not a row that trivium eval --answers wrote")
        rows.append(row)
    return rows
