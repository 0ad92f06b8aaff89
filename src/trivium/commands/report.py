"""trivium report: draw pages again from what runs and studies left in their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from trivium.commands.flags import parse
from trivium.registry import UserError
from trivium.report.run import write_report
from trivium.report.study import figure_for_readme, read_results


@dataclass(frozen=True)
class ReportOptions:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, study folders or results.json files."""
    figure: Path | None = None
    """File (.svg or .png) for the learning curves of a study alone; give one study with it."""


def report(arguments: Sequence[str]) -> None:
    """Write report.html beside each and say where it is; one that has none to write keeps no other from its own."""
    options = parse(ReportOptions, arguments, "trivium report", "Draw report.html from run or study folders.")
    if not options.paths:
        raise UserError("give at least one run folder, study folder or results.json")
    if options.figure is not None and len(options.paths) != 1:
        raise UserError(f"--figure: give one study with it, not {len(options.paths)} paths")
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
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        print(figure_for_readme(results, options.figure))
