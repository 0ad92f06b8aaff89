"""Read what a run left in its folder, without any part of the program that made it."""

import json
from pathlib import Path
from typing import Any

from trivium.config import UserError, unreadable


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a last line that a kill cut off is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(folder / "metrics.jsonl", error) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{folder / 'metrics.jsonl'}, line {number}: not JSON") from None
    return rows


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return a finished run's result.json, None when the run has not finished."""
    result = read_json(folder / "result.json")
    return result if result is not None and result.get("status") == "finished" else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object, got {type(data).__name__}")
    return data
