"""Tables with the same rows for the terminal and for a page, and the way in which numbers are written."""

import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from trivium.report.axes import short_count

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"
UNITS = {"parameters": "parameters", "flops": "FLOPs per token"}


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns; the first column is a name, the others are numbers unless `text`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: bool = False


def to_rich(table: Table) -> "RichTable":
    """Return `table` for a rich console."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rich = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    rich.box = box.SIMPLE_HEAD
    rich.title_style, rich.caption_style = "bold", "dim"
    for number, column in enumerate(table.columns):
        # Where room is short, a heading breaks and then a name, but never a number.
        heading = column if table.text else "\n".join(wrap(column, 11))
        justify = "left" if table.text or number == 0 else "right"
        fixed = number > 0 and not table.text
        rich.add_column(Text(heading), justify=justify, no_wrap=fixed, overflow="fold")
    for row in table.rows:
        # Text, since a name or an answer may hold what rich would read as markup.
        rich.add_row(*(Text(cell) for cell in row))
    return rich


def learning_table(results: Mapping[str, Any]) -> Table:
    """Return what each variant learned: final exact match, its difference to the baseline, tokens to thresholds."""
    levels = [f"{level:g}" for level in results["thresholds"]]
    rows = []
    for name, variant in results["variants"].items():
        match = write_interval(variant["exact_match"]) + _share(len(variant["exact_match"]["values"]), variant["seeds"])
        row = [name, match, _difference(name, variant, results["baseline"])]
        rows.append(row + [_tokens(variant["tokens_to"][level]) for level in levels])
    columns = ["variant", "exact match", f"against {results['baseline']}"]
    columns += [f"tokens to {threshold(float(level))}" for level in levels]
    note = "Means over seeds, with Student's t intervals at 95 %; differences are paired by seed, in points."
    if any(re.search(r"\(\d+/\d+\)", cell) for row in rows for cell in row):
        note += " (2/3): only 2 of 3 seeds finished, or reached it, and the mean is theirs."
    return Table("What each token taught", columns, rows, note)


_SOLUTIONS = {
    "loss": "nats a token",
    "answer_loss": "nats a token of answers",
    "steps_true": "own steps true",
    "steps_wanted": "right steps written",
}


def solution_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return what is scored of solutions beside exact match, over seeds: by the task's rules, and their likelihood and
    steps; nothing where no variant has any."""
    found = {name: variant["solutions"] for name, variant in results["variants"].items() if variant.get("solutions")}
    if not found:
        return []
    # Each task has rules of its own; the first is the one that tests are shown of.
    rules = list(dict.fromkeys(key for scores in found.values() for key in scores if key not in _SOLUTIONS))
    rows, broken = [], []
    for name, scores in found.items():
        paired = (results["variants"][name].get("paired") or {}).items()
        values = ", ".join(f"{test[rules[0]]['p']:.2g}" for _, test in paired if rules[0] in test)
        rows.append([name, *(write_interval(scores[key], 2) if key in scores else MISSING for key in rules)])
        rows[-1].append(values or MISSING)
        broken += [f" No test of {name}, seed {seed}: {test['error']}." for seed, test in paired if "error" in test]
    seeds = [seed for variant in results["variants"].values() for seed in variant["seeds"].values()]
    constant = next((seed["constant"] for seed in seeds if seed.get("constant")), None)
    always = "" if constant is None else f" Always {constant['answer']!r}: {percent(constant['rate'], 2)}."
    note = (
        f"Test problems right by each rule.{always} p: McNemar's test of {rules[0]} against {results['baseline']}, a "
        f"value a seed.{''.join(broken)}"
    )
    by_rule = Table("Answers", ["variant", *rules, "p"], rows, note)
    keys = [key for key in _SOLUTIONS if any(key in scores for scores in found.values())]
    rows = []
    for name, scores in found.items():
        cells = [
            (_nats if "loss" in key else write_interval)(scores[key]) if key in scores else MISSING for key in keys
        ]
        rows.append([name, *cells])
    note = "Test problems; nats are teacher-forced, over whole solutions and over the numbers that answer them alone."
    return [by_rule, Table("Solutions", ["variant", *(_SOLUTIONS[key] for key in keys)], rows, note)]


def _nats(values: Mapping[str, Any]) -> str:
    if values["low"] is None:
        return f"{values['mean']:.4f} (one seed)"
    return f"{values['mean']:.4f} ± {values['high'] - values['mean']:.4f}"


def cost_table(results: Mapping[str, Any]) -> Table:
    """Return what each variant costs: parameters, FLOPs and state bytes per token, tokens/s, and where variants write
    problems in different ways the tokens that an answer takes."""
    lengths = sorted({variant["sizes"].get("length", results["length"]) for variant in results["variants"].values()})
    differs = len(lengths) > 1
    variants = results["variants"].values()
    measured = any(variant.get("peak_bytes") for variant in variants)
    rows = []
    for name, variant in results["variants"].items():
        sizes, relative = variant["sizes"], variant["relative"]
        rows.append(
            [
                name,
                _relative(f"{sizes['parameters']:,}", relative["parameters"]),
                _relative(f"{sizes['flops_per_token']:,.0f}", relative["flops_per_token"]),
                f"{sizes['state_bytes_per_token']:,.0f}",
                f"{variant['tokens_per_second']:,.0f}" if variant["tokens_per_second"] else MISSING,
                *([_gigabytes(variant.get("peak_bytes"))] if measured else []),
                *([_generated(variant)] if differs else []),
            ]
        )
    shown = (
        f"at {lengths[0]} tokens"
        if not differs
        else f"at the longest problem of each, {lengths[0]}–{lengths[-1]} tokens"
    )
    note = (
        f"× is against {results['baseline']}. Forward FLOPs and decoding-state bytes {shown}; "
        f"training tokens/s is the median over seeds, with {results['jobs']} runs side by side."
    )
    columns = ["variant", "parameters", "FLOPs/token", "state bytes/token", "tokens/s"]
    columns += ["peak GB"] if measured else []
    columns += ["generated tokens/problem"] if differs else []
    return Table("What each variant costs", columns, rows, note)


def pretraining_table(results: Mapping[str, Any]) -> Table | None:
    """Return what each variant learned before its own runs, and at what cost; None where none was pretrained."""
    found = {
        name: variant["pretraining"] for name, variant in results["variants"].items() if variant.get("pretraining")
    }
    if not found:
        return None
    rows = [
        [
            name,
            f"{first['tokens']:,}",
            MISSING if first["loss"] is None else f"{first['loss']:.4f}",
            f"{first['perplexity']:.2f}" if first.get("perplexity") else MISSING,
            f"{first['tokens_per_second']:,.0f}",
            _gigabytes(first["peak_bytes"]),
        ]
        for name, first in found.items()
    ]
    note = (
        "One run a variant, whose weights all its seeds begin with; scored on its own test problems, or rows of text."
    )
    return Table("Pretraining", ["variant", "tokens", "nats/token", "perplexity", "tokens/s", "peak GB"], rows, note)


def _gigabytes(count: float | None) -> str:
    return MISSING if not count else f"{count / 1e9:.1f}"


def fairness_table(results: Mapping[str, Any]) -> Table:
    """Return what is held equal and what differs: changes, matching, tokens, seeds, precision, threads, optimizer."""
    rows = []
    for name, variant in results["variants"].items():
        changes = ", ".join(f"{key}: {value}" for key, value in variant["changes"].items()) or "the recipe's own"
        match = variant["match"]
        optimizer = variant["optimizer"]
        done = [seed for seed in variant["seeds"].values() if seed["status"] == "finished"]
        tokens = sorted({seed["tokens"] for seed in done})
        rows.append(
            [
                name,
                changes,
                _matched(match),
                " to ".join(f"{count:,}" for count in (tokens[:1] + tokens[1:][-1:])) or MISSING,
                ", ".join(variant["seeds"]),
                str(variant["precision"] or MISSING),
                str(variant["threads"] or MISSING),
                f"{optimizer['name']}, {optimizer['schedule']}",
                f"{variant['learning_rate']:g}",
                _budget(variant["tuning"]),
            ]
        )
    columns = ["variant", "changes", "matched to", "tokens", "seeds", "precision", "threads", "optimizer"]
    return Table("What is equal, and what is not", [*columns, "learning rate", "tuning"], rows, text=True)


def tuning_table(results: Mapping[str, Any]) -> Table | None:
    """Return the outcome of the learning-rate grid, None when there was none."""
    rows = [
        [
            name,
            f"{row['learning_rate']:g}",
            percent(row["exact_match"]),
            MISSING if row["loss"] is None else f"{row['loss']:.4f}",
            "chosen" if row["chosen"] else "; ".join(row["errors"].values()),
        ]
        for name, variant in results["variants"].items()
        for row in variant["tuning"]
    ]
    if not rows:
        return None
    note = "Mean over the tuning seeds at the end of training, on the validation split; best exact match, then loss."
    return Table("Tuning", ["variant", "learning rate", "exact match", "loss", ""], rows, note)


def errors_table(results: Mapping[str, Any]) -> Table | None:
    """Return the errors of each run and a bound on their rate; None where no run is as good as to need it."""
    rows = []
    rare = False
    for name, variant in results["variants"].items():
        for seed, run in variant["seeds"].items():
            if not (found := run.get("errors")):
                continue
            rare |= found["errors"] <= found["n"] / 100
            bound = f"{found['upper']:.2g}" if found["upper"] is not None else MISSING
            rows.append([f"{name}, seed {seed}", f"{found['errors']:,}", f"{found['n']:,}", bound])
            for title, scores in (run.get("published") or {}).items():
                match = scores["exact_match"]
                wrong = match["n"] - match["successes"]
                rows.append([f"{name}, seed {seed}: {title}", f"{wrong:,}", f"{match['n']:,}", MISSING])
    if not rare:
        return None
    note = "With 95 % confidence the rate of errors is at most this (Clopper and Pearson's one-sided bound)."
    return Table("Errors", ["run", "errors", "problems", "rate at most"], rows, note)


def tag_tables(slices: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return a table for each tag: the exact match of every name in `slices` (name -> tag -> value -> rate)."""
    tables = []
    tags = dict.fromkeys(tag for scores in slices.values() for tag in scores)
    for tag in tags:
        first = next(scores[tag] for scores in slices.values() if tag in scores)
        values = dict.fromkeys(value for scores in slices.values() for value in scores.get(tag, {}))
        rows = [
            [name, *(percent((scores.get(tag, {}).get(value) or {}).get("rate")) for value in values)]
            for name, scores in slices.items()
        ]
        rows.append(["problems", *(f"{(first.get(value) or {}).get('n', 0):,}" for value in values)])
        tables.append(Table(f"By {tag.replace('_', ' ')}", ["", *map(str, values)], rows))
    return tables


def length_tables(scores: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return two tables, exact match and token error, of every name in `scores` (name -> length -> key -> score).

    A score is a rate with its interval or, over seeds, a mean with its interval.
    """
    lengths = dict.fromkeys(length for found in scores.values() for length in found)
    if not lengths:
        return []
    titles = {"exact_match": "Whole answers right, by length", "token_error": "Tokens wrong, by length"}
    tables = []
    for key, title in titles.items():
        rows = []
        for name, found in scores.items():
            cells = [found[length][key] if length in found else {"mean": None} for length in lengths]
            rows.append([name, *(write_interval({"mean": cell.get("rate"), **cell}) for cell in cells)])
        tables.append(Table(title, ["", *lengths], rows))
    return tables


def record_table(title: str, record: Mapping[str, Any]) -> Table:
    """Return a table of names and values, nested mappings written as dotted names."""
    return Table(title, ["", ""], [[key, value] for key, value in _flat(record)], text=True)


def percent(rate: float | None, digits: int = 1) -> str:
    """Return a rate as a percentage; 100 % is written only for exactly that, 0 % only for exactly 0."""
    if rate is None:
        return MISSING
    while digits < 6 and round(100 * rate, digits) in (0, 100) and rate not in (0, 1):
        digits += 1
    return f"{100 * rate:.{digits}f} %"


def threshold(rate: float) -> str:
    """Return a threshold as it was given: 90 %, 99.5 %."""
    return f"{100 * rate:g} %"


def write_interval(values: Mapping[str, Any], digits: int = 1) -> str:
    """Return the mean of a rate and its interval, which is cut where rates end."""
    if values["mean"] is None:
        return MISSING
    if values["low"] is None:
        return f"{percent(values['mean'], digits)} (one seed)"
    low, high = (f"{100 * max(0.0, end):.{digits}f}" if end < 1 else "100" for end in (values["low"], values["high"]))
    return f"{percent(values['mean'], digits)} ({low}–{high})"


def write_points(values: Mapping[str, Any]) -> str:
    """Return a difference of rates in percentage points with its interval."""
    if values["mean"] is None:
        return MISSING
    if values["low"] is None:
        return f"{100 * values['mean']:+.1f} (one seed)"
    return f"{100 * values['mean']:+.1f} ± {100 * (values['high'] - values['mean']):.1f}"


def _difference(name: str, variant: Mapping[str, Any], baseline: str) -> str:
    return "baseline" if name == baseline else write_points(variant["difference"])


def _tokens(values: Mapping[str, Any]) -> str:
    if not values["reached"]:
        return "not reached" if values["seeds"] else MISSING
    return short_count(values["mean"]) + _share(values["reached"], range(values["seeds"]))


def _matched(match: Mapping[str, Any]) -> str:
    if match["by"] == "none":
        return "nothing, sizes differ"
    return f"{UNITS[match['by']]} of {match['to']}" if match["by"] else "the reference"


def _generated(variant: Mapping[str, Any]) -> str:
    mean = (variant.get("generated_tokens_per_problem") or {}).get("mean")
    return MISSING if mean is None else f"{mean:.1f}"


def _share(number: int, seeds: Sized) -> str:
    return f" ({number}/{len(seeds)})" if 0 < number < len(seeds) else ""


def _relative(text: str, ratio: float) -> str:
    # Within the tolerance of the match there is nothing to point at.
    return text if abs(ratio - 1) <= 0.01 else f"{text} ×{ratio:.2f}"


def _budget(tuning: Sequence[Mapping[str, Any]]) -> str:
    return f"best of {len(tuning)} rates" if tuning else "none"


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif value is not None and value != []:
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
