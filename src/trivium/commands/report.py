"""trivium report: draw pages again from what runs and studies left in their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import tyro

from trivium.commands.console import announce
from trivium.commands.flags import parse
from trivium.registry import UserError
from trivium.report.attention import save_panels, write_attention_page
from trivium.report.run import write_report
from trivium.report.storage import check_figure
from trivium.report.study import figure_for_readme, read_results


@dataclass(frozen=True)
class ReportOptions:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, study folders or results.json files."""
    expression: str | None = None
    """Problem, such as 101+1002, that the model of one run answers; a page shows what each of its layers looked at."""
    panels: Path | None = None
    """With --expression: folder for every map of that page as PNG and SVG."""
    figure: Path | None = None
    """File (.svg or .png) for one picture of a study alone; give one study with it."""
    picture: str | None = None
    """With --figure: which picture, such as exact_match, exact_match_by_length or map_VARIANT."""


def report(arguments: Sequence[str]) -> None:
    """Write report.html beside each and say where it is; one that has none to write keeps no other from its own."""
    options = parse(ReportOptions, arguments, "trivium report", "Draw report.html from run or study folders.")
    if not options.paths:
        raise UserError("give at least one run folder, study folder or results.json")
    if options.figure is not None and len(options.paths) != 1:
        raise UserError(f"--figure: give one study with it, not {len(options.paths)} paths")
    check_figure(options.figure)
    if options.picture is not None and options.figure is None:
        raise UserError("--picture: give --figure with it")
    if options.expression is not None:
        if len(options.paths) != 1:
            raise UserError(f"--expression: give one run with it, not {len(options.paths)} paths")
        show_expression(options.paths[0], options.expression, options.panels)
        return
    if options.panels is not None:
        raise UserError("--panels: give --expression with it")
    if options.figure is not None and (options.paths[0] / "config.yaml").is_file():
        raise UserError(f"--figure: {options.paths[0]} is a run's folder; give a study's")
    problems = []
    for path in options.paths:
        try:
            print(write_report(path))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    if options.figure is not None:
        (path,) = options.paths
        results = read_results(path if path.is_file() else path / "results.json")
        print(figure_for_readme(results, options.figure, options.picture))


def show_expression(run: Path, expression: str, panels: Path | None) -> None:
    """Write the page of one problem into the run's folder, and its maps into `panels`, and say where they are."""
    from trivium.evaluate.trace import trace
    from trivium.train.run import load

    announce()
    model, _, task = load(run)
    found = trace(model, task, task.parse(expression))
    if panels is not None:
        try:
            panels.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--panels: {panels}: {error.strerror}") from None
    described, arrays = found.described(), found.arrays()
    verdict = {True: "right", False: "wrong", None: "not checked"}[found.correct]
    layers = len(found.panels) - 1  # the last shows the whole model
    name = quote(expression, safe="").replace("%", "_")[:120]
    page = write_attention_page(
        run / f"attention-{name}.html",
        title="".join(found.tokens),
        subtitle=f"{run.name}: the answer is {verdict}; {layers} layer{'s' if layers != 1 else ''}, {task.config.kind}",
        described=described,
        arrays=arrays,
    )
    print(page)
    if panels is not None:
        for path in save_panels(panels, described=described, arrays=arrays):
            print(path)
