"""trivium compare: a recipe's variants side by side, a table, and report.html."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from trivium.commands import fail
from trivium.commands.console import announce
from trivium.commands.recipes import read_recipe
from trivium.report.tables import cost_table, learning_table, pretraining_table, solution_tables, to_rich
from trivium.study.compare import compare as compare_variants
from trivium.study.live import LiveProgress


@dataclass(frozen=True)
class CompareOptions:
    recipe: tyro.conf.Positional[Path]
    """Recipe with a section `compare`, a YAML file; every value in it can be given as a flag too."""
    runs: Path = Path("runs")
    """Folder that holds the study's folder."""
    jobs: int | None = None
    """Runs to train side by side (default: as many as the machine serves well)."""
    only: tuple[str, ...] = ()
    """Variants to train now; a later session without it trains the rest (default: all)."""
    json: bool = False
    """Print the content of results.json on standard output."""


def compare(arguments: Sequence[str]) -> int:
    """Train what is not trained yet, then print the tables and where the report is."""
    options, recipe = read_recipe(
        CompareOptions, arguments, "trivium compare", "Train a recipe's variants at matched size and compare them."
    )
    announce()
    compared = recipe.compare
    tuning = len(compared.learning_rates) * len(compared.tuning_seeds) if compared and compared.tunes else 0
    variants = len(options.only or compared.variants) if compared else 0
    runs = variants * (len(compared.seeds) + tuning + (recipe.pretrain is not None)) if compared else None
    with LiveProgress(runs) as live:
        results = compare_variants(
            recipe,
            options.runs,
            jobs=options.jobs,
            only=options.only,
            on_progress=live,
            command=["trivium", "compare", *arguments],
        )
    folder = options.runs / recipe.folder_name
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        show(results, folder)
    if results["failed"]:
        first = results["failed"][0]
        more = f" (and {len(results['failed']) - 1} more)" if len(results["failed"]) > 1 else ""
        return fail(f"{first['run']} failed{more}: {first['error']}")
    return 0


def show(results: dict[str, Any], folder: Path) -> None:
    """Print the study's tables, where its report is, and what to try next."""
    console = Console()
    drawn = (learning_table(results), *solution_tables(results), pretraining_table(results), cost_table(results))
    for table in drawn:
        if table is not None:
            console.print(to_rich(table))
    # Where several learned it all, the one that needed the fewest tokens.
    level = f"{max(results['thresholds'], default=0):g}"
    finished = [variant for variant in results["variants"].values() if variant["exact_match"]["mean"] is not None]
    best = max(
        finished,
        key=lambda each: (each["exact_match"]["mean"], -(each["tokens_to"].get(level, {}).get("mean") or math.inf)),
        default=None,
    )
    if results["not_run"]:
        print(f"not run: {', '.join(results['not_run'])}")
    print(f"report:  {folder / 'report.html'}  (open it in a browser; it needs no network)")
    if best is not None:
        run = folder / next(seed["run"] for seed in best["seeds"].values() if seed["status"] == "finished")
        print(f"try it:  trivium chat {run}")
        print(f"score:   trivium eval {run} --examples 5000")
        print("change:  trivium compare RECIPE --help lists every field that a flag can change")
