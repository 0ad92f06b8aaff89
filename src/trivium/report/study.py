"""The page of a study, from its results.json alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.config import UserError, to_yaml
from trivium.registry import nearest
from trivium.report.figures import (
    intervals,
    learning_curves,
    length_curves,
    length_map,
    save,
)
from trivium.report.folder import read_json
from trivium.report.html import Picture, Section, samples_of, write_page
from trivium.report.style import Row, Series, Style, styles
from trivium.report.tables import (
    cost_table,
    errors_table,
    fairness_table,
    learning_table,
    length_tables,
    percent,
    pretraining_table,
    record_table,
    solution_tables,
    tag_tables,
    threshold,
    tuning_table,
)
from trivium.report.words import describe_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
SAMPLES = 5


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a results.json; raise UserError when it is not one that this version can read."""
    results = read_json(path)
    if results is None:
        raise UserError(f"{path}: no such file")
    if results.get("schema") != SCHEMA or "variants" not in results:
        raise UserError(f"{path}: not a study's results of schema {SCHEMA} (it says {results.get('schema')!r})")
    return results


def write_study_page(results: Mapping[str, Any], path: Path) -> Path:
    """Write report.html of `results` to `path` and return that."""
    recipe = results["recipe"]
    task = recipe["task"]
    details = ", ".join(f"{key} {task[key]}" for key in ("format", "base", "max_digits") if key in task)
    subtitle = f"{task['kind']}{': ' + details if details else ''}. {_count_runs(results)}."
    return write_page(path, title=f"Trivium study: {recipe['name']}", subtitle=subtitle, sections=_sections(results))


def study_figures(results: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Return the figures of a study by name: exact_match, loss, tokens_to_N for each threshold, final."""
    looks = styles({name: variant["mixer"] for name, variant in results["variants"].items()})
    thresholds = results["thresholds"]
    figures = {
        "exact_match": learning_curves(
            _series(results, looks, "exact_match"),
            label="Exact match on validation problems",
            percent=True,
            thresholds=thresholds,
        ),
        "loss": learning_curves(_series(results, looks, "loss"), label="Validation loss, nats per token"),
    }
    generated = results["recipe"]["train"].get("generated_tokens") is not None
    counted = " of chains and answers" if generated else ""
    for level in thresholds:
        rows = []
        for name, variant in results["variants"].items():
            values = variant["tokens_to"][f"{level:g}"]
            note = f"{values['reached']} of {values['seeds']} seeds reached it"
            shown = note if values["reached"] < values["seeds"] else ""
            ends = (values["mean"], values["low"], values["high"])
            rows.append(Row(name, looks[name], *ends, values["values"], shown))
        figures[f"tokens_to_{100 * level:g}"] = intervals(rows, label=f"Training tokens{counted} to {threshold(level)}")
    rows = []
    for name, variant in results["variants"].items():
        values = variant["exact_match"]
        rows.append(Row(name, looks[name], values["mean"], values["low"], values["high"], values["values"]))
    figures["final"] = intervals(rows, label="Exact match on test problems", percent=True)
    if generated:
        figures["exact_match_by_generated"] = learning_curves(
            _series(results, looks, "exact_match", "generated_tokens"),
            label="Exact match on validation problems",
            percent=True,
            thresholds=thresholds,
            axis=f"training tokens{counted}",
        )
    task = results["recipe"]["task"]
    trained = task.get("max_length") or task.get("max_digits")
    unit = "digits" if "max_digits" in task else "length"
    for key, label in (("token_error", "Token error on test problems"), ("exact_match", "Whole problems right")):
        if curves := _by_length(results, looks, key):
            figures[f"{key}_by_length"] = length_curves(curves, label=label, trained=trained)
    for name, variant in results["variants"].items():
        if pairs := variant.get("by_pair"):
            rates = {_pair(text): rate["rate"] for text, rate in pairs.items()}
            axes = (f"{unit} of the first number", f"{unit} of the second")
            label = f"{name}: whole answers right, %"
            figures[f"map_{name}"] = length_map(rates, label=label, names=axes, trained=trained)
    return figures


def figure_for_readme(results: Mapping[str, Any], path: Path, name: str | None = None) -> Path:
    """Write one of the study's pictures to `path` (.svg or .png).

    `name` is one of `study_figures`; without it the token error by length or, where the study has none, the learning
    curves. Raises UserError for a name that it does not have.
    """
    figures = study_figures(results)
    if name is None:
        name = next(
            key for key in ("token_error_by_length", "exact_match_by_generated", "exact_match") if key in figures
        )
    if name not in figures:
        raise UserError(f"--picture: this study has no {name!r}; {nearest(name, list(figures))}")
    return save(figures[name], path)


def _sections(results: Mapping[str, Any]) -> list[Section]:
    figures = study_figures(results)
    looks = styles({name: variant["mixer"] for name, variant in results["variants"].items()})
    tuning = tuning_table(results)
    levels = [f"tokens_to_{100 * level:g}" for level in results["thresholds"]]
    variants = results["variants"]
    tokens_to = Section(
        "Tokens to a threshold",
        words=[results["tokens_rule"], "Dots are seeds; the band is the 95 % interval of the mean."],
        pictures=[Picture(figures[level], _in_words(results)) for level in levels],
    )
    sections = [
        Section("What the numbers show", words=describe_study(results), tables=[learning_table(results)]),
        Section(
            "Learning curves",
            words=["Mean over seeds; the band reaches from the lowest seed to the highest."],
            pictures=[
                Picture(figures["exact_match"], _in_words(results)),
                Picture(figures["loss"], "Validation loss against training tokens, one curve a variant."),
            ],
        ),
        *([tokens_to] if levels else []),
        Section(
            "Final exact match",
            words=["Dots are seeds; the band is the 95 % interval of the mean, cut at 0 and 100 %."],
            pictures=[Picture(figures["final"], _in_words(results))],
        ),
        *(
            Section(table.title, tables=[table])
            for table in (*solution_tables(results), pretraining_table(results))
            if table is not None
        ),
        Section("What each variant costs", tables=[cost_table(results)]),
        Section("What is equal, and what is not", tables=[fairness_table(results)]),
    ]
    if tuning is not None:
        sections.append(Section("Tuning", tables=[tuning]))
    errors = errors_table(results)
    if errors is not None:
        sections.append(Section("How rare errors are", tables=[errors]))
    slices = tag_tables({name: variant["by_tag"] for name, variant in variants.items()})
    if slices:
        sections.append(Section("Scores by slice", words=["Exact match on test problems."], tables=slices))
    lengths = length_tables({name: variant.get("by_length") or {} for name, variant in variants.items()})
    if lengths:
        words = ["Read at one length at a time: means over seeds, with Student's t intervals at 95 % (the bands)."]
        pictures = [
            Picture(figures[key], "The table below, one curve a variant.")
            for key in ("token_error_by_length", "exact_match_by_length")
            if key in figures
        ]
        sections.append(Section("Scores by length", words=words, pictures=pictures, tables=lengths))
    maps = [Picture(figures[key], "Rates are rounded down.") for key in figures if key.startswith("map_")]
    if maps:
        sections.append(Section("Scores by both lengths", words=["Means over seeds."], pictures=maps))
    sections.append(
        Section(
            "Right and wrong answers",
            words=["From the first seed of each variant, what it wrote after the prompt."],
            samples=[
                (name, looks[name].colour, samples_of(variant["samples"], SAMPLES))
                for name, variant in variants.items()
            ],
        )
    )
    environment = {**results["environment"], "jobs side by side": results["jobs"], "threads a run": results["threads"]}
    sections.append(Section("Environment", tables=[record_table("Environment", environment)]))
    recipe = to_yaml(results["recipe"])
    sections.append(Section("Reproduce", code=results["command"], folded=("The recipe, every field resolved", recipe)))
    return sections


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def _series(results: Mapping[str, Any], looks: Mapping[str, Style], key: str, against: str = "tokens") -> list[Series]:
    series = []
    for name, variant in results["variants"].items():
        curves = [seed["curve"] for seed in variant["seeds"].values() if seed["status"] == "finished"]
        tokens, values = [], []
        # Seeds see the same steps with slightly different numbers of tokens, so points are joined by step.
        for step in sorted({step for curve in curves for step in curve["step"]}):
            places = [(curve, curve["step"].index(step)) for curve in curves if step in curve["step"]]
            found = [curve[key][place] for curve, place in places if curve[key][place] is not None]
            if len(places) == len(curves) and len(found) == len(curves):
                tokens.append(_mean([curve[against][place] for curve, place in places]))
                values.append(found)
        if tokens:
            means, lows, highs = ([end(found) for found in values] for end in (_mean, min, max))
            series.append(Series(name, looks[name], tokens, means, lows, highs))
    return series


def _by_length(results: Mapping[str, Any], looks: Mapping[str, Style], key: str) -> list[Series]:
    """Return a curve of means over seeds for each variant that was read at several lengths, its t interval as band."""
    series = []
    for name, variant in results["variants"].items():
        scores = variant.get("by_length") or {}
        cells = [(int(length), scores[length][key]) for length in sorted(scores, key=int)]
        if not cells:
            continue
        means = [cell["mean"] for _, cell in cells]
        lows = [cell["mean"] if cell["low"] is None else max(0.0, cell["low"]) for _, cell in cells]
        highs = [cell["mean"] if cell["high"] is None else min(1.0, cell["high"]) for _, cell in cells]
        series.append(Series(name, looks[name], [length for length, _ in cells], means, lows, highs))
    return series


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _in_words(results: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {percent(variant['exact_match']['mean'])} exact match at the end, "
        + ", ".join(
            f"{threshold(level)} {_after(variant['tokens_to'][f'{level:g}'])}" for level in results["thresholds"]
        )
        for name, variant in results["variants"].items()
    )


def _after(tokens: Mapping[str, Any]) -> str:
    if not tokens["reached"]:
        return "not reached"
    some = "" if tokens["reached"] == tokens["seeds"] else f" in {tokens['reached']} of {tokens['seeds']} seeds"
    return f"after {tokens['mean']:,.0f} tokens{some}"


def _count_runs(results: Mapping[str, Any]) -> str:
    runs = [seed for variant in results["variants"].values() for seed in variant["seeds"].values()]
    done = sum(run["status"] == "finished" for run in runs)
    return f"{done} of {len(runs)} runs finished" if done < len(runs) else f"{done} runs"
