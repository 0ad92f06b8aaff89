"""The page of one run, from its folder alone; and the right page for whatever folder or file is given."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.config import UserError, load_yaml
from trivium.report.figures import learning_curves
from trivium.report.folder import read_json, read_metrics, read_result
from trivium.report.html import Picture, Section, samples_of, write_page
from trivium.report.study import read_results, write_study_page
from trivium.report.style import PLAIN, Series, styles
from trivium.report.tables import Table, length_tables, percent, record_table, tag_tables

SAMPLES = 10


def write_report(path: str | Path) -> Path:
    """Write report.html for a study's folder, its results.json, or a run's folder; return the page's path.

    Raises UserError when `path` is none of these, or holds nothing to show yet.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return write_study_page(read_results(path), path.with_name("report.html"))
    if (path / "results.json").is_file():
        return write_study_page(read_results(path / "results.json"), path / "report.html")
    if (path / "config.yaml").is_file():
        return write_run_page(path)
    if (path / "study.json").is_file():
        raise UserError(f"{path}: this study has no results.json yet; the command that began it continues it")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    raise UserError(f"{path}: neither a run's folder (config.yaml), nor a study's folder or its results.json")


def write_run_page(folder: Path) -> Path:
    """Write report.html of the run in `folder`, finished or not, and return the page's path."""
    config = load_yaml(folder / "config.yaml")
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: this run has no metrics yet")
    result = read_result(folder)
    environment = read_json(folder / "environment.json") or {}
    look = styles({"run": _mixer(config)})["run"]
    sections = [_numbers(result, rows), Section("Learning curves", pictures=_pictures(rows, look))]
    if result is not None:
        evaluation = result["evaluation"]
        slices = tag_tables({"exact match": evaluation.get("by_tag") or {}})
        if slices:
            sections.append(Section("Scores by slice", tables=slices))
        lengths = length_tables({"this run": evaluation.get("by_length") or {}})
        if lengths:
            sections.append(Section("Scores by length", tables=lengths))
        answers = samples_of(evaluation.get("samples") or {}, SAMPLES)
        sections.append(Section("Right and wrong answers", samples=[(folder.name, look.colour, answers)]))
    sections.append(Section("Environment", tables=[record_table("Environment", environment)]))
    recipe = (folder / "config.yaml").read_text(encoding="utf-8")
    command = environment.get("command", "")
    sections.append(Section("Reproduce", code=command, folded=("The configuration, every field resolved", recipe)))
    status = "finished" if result is not None else f"not finished, {rows[-1]['step']:,} steps so far"
    subtitle = f"{config.get('task', {}).get('kind', 'task')}; {status}."
    return write_page(folder / "report.html", title=f"Trivium run: {folder.name}", subtitle=subtitle, sections=sections)


def _numbers(result: Mapping[str, Any] | None, rows: list[dict[str, Any]]) -> Section:
    if result is None:
        last = {row["split"]: row for row in rows}
        facts = [(f"{split} {key}", f"{row[key]:.6g}") for split, row in last.items() for key in _known(row)]
        return Section("Where it stands", tables=[Table("Where it stands", ["", ""], facts, text=True)])
    evaluation = result["evaluation"]
    match = evaluation["exact_match"]
    facts = [
        (
            f"exact match on {match['n']:,} {evaluation['split']} problems",
            f"{percent(match['rate'])} ({100 * match['low']:.1f} to {100 * match['high']:.1f})",
        ),
        *([("perplexity of the text", f"{evaluation['perplexity']:.4g}")] if "perplexity" in evaluation else []),
        ("token accuracy, given the right answer so far", percent(evaluation["token_accuracy"])),
        ("generated tokens a problem", f"{evaluation['generated_tokens_per_problem']:.3g}"),
        ("training tokens", f"{result['tokens']:,}"),
        ("training examples", f"{result['examples']:,}"),
        ("training loss, nats per token", f"{result['train_loss']:.4g}"),
        ("parameters", f"{result['parameters']:,}"),
        ("FLOPs per token, forward", f"{result['flops_per_token']:,.0f}"),
        ("state bytes of a sequence", f"{result['state_bytes']:,}"),
        ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
        ("precision, threads, device", f"{result['precision']}, {result['threads']}, {result['device']}"),
    ]
    note = "The interval of a rate is Wilson's at 95 %."
    return Section("The numbers", tables=[Table("The numbers", ["", ""], facts, note, text=True)])


def _known(row: Mapping[str, Any]) -> list[str]:
    return [key for key in ("step", "tokens", "loss", "exact_match", "tokens_per_second") if row.get(key) is not None]


def _pictures(rows: list[dict[str, Any]], look: Any) -> list[Picture]:
    def series(name: str, split: str, key: str) -> list[Series]:
        points = [(row["tokens"], row[key]) for row in rows if row["split"] == split and row.get(key) is not None]
        return [Series(name, look, *map(list, zip(*points, strict=True)))] if points else []

    exact = series("exact match", "validation", "exact_match")
    pictures = []
    if exact:
        figure = learning_curves(exact, label="Exact match on validation problems", percent=True)
        pictures.append(Picture(figure, f"Exact match against tokens, {percent(exact[0].values[-1])} at the end."))
    training = series("training", "train", "loss")
    validation = series("validation", "validation", "loss")
    losses = [Series(curve.name, PLAIN, curve.tokens, curve.values) for curve in training] + validation
    if losses:
        figure = learning_curves(losses, label="Loss, nats per token")
        pictures.append(Picture(figure, f"Loss against tokens, {losses[0].values[-1]:.4g} at the end."))
    return pictures


def _mixer(config: Mapping[str, Any]) -> str:
    """Name the mixer to colour by, read from the layer pattern as the study does."""
    model = config.get("model", {})
    if model.get("kind", "decoder") != "decoder":
        return str(model["kind"])
    layers = str(model.get("layers", "attention"))
    kinds = re.findall(r"(?:^|\+)\s*(\w+)", layers)
    special = [kind for kind in kinds if kind != "attention"]
    return special[0] if special else ("local" if "window=" in layers else "attention")
