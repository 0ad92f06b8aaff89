"""A study: train matched variants side by side, over seeds, and write what each token taught them."""

import fcntl
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trivium.config import UserError, config_hash, to_dict, to_yaml
from trivium.ops.dispatch import check_present
from trivium.registry import nearest
from trivium.report.folder import read_json, read_result
from trivium.report.storage import make_folders, naming, write_whole
from trivium.report.study import write_study_page
from trivium.study.jobs import TRAIN, Event, Failure, Job, Plan, Workers, available_cores, check_jobs, plan
from trivium.study.recipe import CompareConfig, Recipe
from trivium.study.results import SCHEMA, Entry, collect
from trivium.study.variants import Variant, expand, folder_name, nearly_equal, prefixed
from trivium.train.distributed import world_of_environment
from trivium.train.precision import choose_device
from trivium.train.prepare import prepare
from trivium.train.run import read_config

SECONDS_FOR_ORPHANS = 90.0

_log = logging.getLogger("trivium")


def compare(
    recipe: Recipe,
    runs_dir: str | Path = "runs",
    *,
    jobs: int | None = None,
    only: Sequence[str] = (),
    on_progress: Callable[[Event], None] | None = None,
    command: Sequence[str] | None = None,
    target: str = TRAIN,
) -> dict[str, Any]:
    """Train every variant of `recipe` with every seed and return the content of results.json.

    The folder `runs_dir`/<recipe>-<hash> gets results.json and report.html above the runs' folders. Runs that an
    earlier session finished are kept and interrupted ones continue. A run that fails is listed under "failed" and
    the others go on; "status" is then "failed". On Ctrl-C or SIGTERM each run writes its checkpoint, results.json
    says "interrupted", and KeyboardInterrupt goes on to the caller.

    `only` names the variants to train now; what earlier sessions finished of the others is reported too, and variants
    without a finished run are listed under "not_run" ("status" is then "partial"). `jobs` runs go side by side
    (default: as many as the machine serves well); `command` is what reproduces the study (default: this process's own
    command line); `target` names the function that trains.
    """
    if world_of_environment().size > 1:
        raise UserError("compare: starts processes of its own, so start it without torchrun; that is for trivium train")
    check_jobs(jobs)
    variants = expand(recipe)
    assert recipe.compare is not None
    for name in only:
        if name not in recipe.compare.variants:
            raise UserError(f"only: no variant {name!r}; {nearest(name, list(recipe.compare.variants))}")
    choose_device(recipe.train.device)
    for variant in variants:
        if not only or variant.name in only:
            with prefixed(f"compare.variants.{variant.name}: "):
                check_present(getattr(variant.config.model, "backends", {}))
    checked: list[Any] = []
    for variant in variants:
        for where, config in (("", variant.config), ("pretrain: ", variant.pretraining)):
            if config is not None and config.task not in checked:
                with prefixed(where):
                    prepare(config)  # what is wrong shows before the first of many runs
                checked.append(config.task)
    folder = Path(runs_dir) / recipe.folder_name
    on_event = on_progress or (lambda event: None)
    with _hold(folder) as lock:
        number = _count_runs(recipe.compare, len(only) or len(variants))
        using = _plan(recipe, variants, folder, number, jobs)
        study = _Study(recipe, variants, folder, using, on_event, command or sys.argv, only)
        with Workers(using, folder / "workers.log", keep_open=[lock], target=target) as workers:
            try:
                study.pretrain(workers)
                study.tune(workers)
                study.train(workers)
            except KeyboardInterrupt:
                study.write("interrupted")
                raise KeyboardInterrupt(f"stopped; the same command continues {folder}") from None
        return study.write()


class _Study:
    """What a study knows while it runs."""

    def __init__(
        self,
        recipe: Recipe,
        variants: Sequence[Variant],
        folder: Path,
        using: Plan,
        on_event: Callable[[Event], None],
        command: Sequence[str],
        only: Sequence[str],
    ):
        assert recipe.compare is not None
        self.recipe = recipe
        self.compare: CompareConfig = recipe.compare
        self.folder = folder
        self.using = using
        self.on_event = on_event
        self.command = _command(command)
        self.only = set(only) or {variant.name for variant in variants}
        self.entries = [Entry(variant, variant.config.train.learning_rate) for variant in variants]
        self.early_failures: list[dict[str, Any]] = []  # of runs before those that are reported
        self.notes = nearly_equal(variants)
        for note in self.notes:
            _log.warning("%s", note)

    def pretrain(self, workers: Workers) -> None:
        """Train what comes before the runs of each variant; a variant whose pretraining fails has no runs."""
        jobs: dict[str, Entry] = {}
        order: list[Job] = []
        for entry in self.entries:
            run = entry.variant.pretraining
            if run is None:
                continue
            job = Job(run, self.folder / folder_name(entry.variant.name, run, pretraining=True))
            if self._wants(entry, job):
                jobs[job.name] = entry
                order.append(job)
        # One a device: such runs fill it, and their tokens/s are then those of a run alone.
        for name, failure in self._run(workers, order, side_by_side=len(self.using.devices) or None).items():
            entry = jobs[name]
            if failure is None:
                entry.pretraining = self.folder / name
            else:
                self.early_failures.append(
                    {"run": name, "variant": entry.variant.name, "seed": None, "error": failure.message}
                )

    def tune(self, workers: Workers) -> None:
        """Try the grid of learning rates with the tuning seeds, and let each variant take its best."""
        if not self.compare.tunes:
            return
        plans = [
            (entry, rate, [self._job(entry, seed, rate, tuning=True) for seed in self.compare.tuning_seeds])
            for entry in self._ready()
            for rate in self.compare.learning_rates
        ]
        outcomes = self._run(workers, [job for entry, _, jobs in plans for job in jobs if self._wants(entry, job)])
        for entry, rate, jobs in plans:
            if any(job.name not in outcomes for job in jobs):
                continue
            errors = {job.name: outcomes[job.name] for job in jobs if outcomes[job.name] is not None}
            entry.tuning.append(_tuned(rate, jobs, errors))
            # A rate at which training diverges is what a grid is there to find; other failures are not.
            self.early_failures += [
                {"run": name, "variant": entry.variant.name, "seed": None, "error": failure.message}
                for name, failure in errors.items()
                if failure is not None and not failure.diverged
            ]
        for entry in self.entries:
            usable = [row for row in entry.tuning if row["exact_match"] is not None]
            if usable and len(entry.tuning) == len(self.compare.learning_rates):
                best = max(usable, key=lambda row: (row["exact_match"], -row["loss"]))
                best["chosen"] = True
                entry.learning_rate = best["learning_rate"]

    def train(self, workers: Workers) -> None:
        """Train every variant with every reporting seed."""
        jobs: dict[str, tuple[Entry, int]] = {}
        order: list[Job] = []
        # Seed by seed, so that an interrupted study has all variants of its first seeds.
        for seed in self.compare.seeds:
            for entry in self._ready():
                if self.compare.tunes and not any(row["chosen"] for row in entry.tuning):
                    continue
                job = self._job(entry, seed, entry.learning_rate)
                if not self._wants(entry, job):
                    continue
                entry.folders[seed] = job.folder
                jobs[job.name] = (entry, seed)
                order.append(job)
        for name, failure in self._run(workers, order).items():
            if failure is not None:
                entry, seed = jobs[name]
                entry.errors[seed] = failure.message

    def write(self, status: str | None = None) -> dict[str, Any]:
        """Write results.json and report.html of what is there, and return the results."""
        length = self.recipe.task.build().max_length
        results = collect(self.recipe, self.entries, length=length)
        failed = self.early_failures + results.pop("failed")
        ended = "failed" if failed else "partial" if results["not_run"] else "finished"
        content = {
            "schema": SCHEMA,
            "status": status or ended,
            "study": self.folder.name,
            "command": self.command,
            "recipe": to_dict(self.recipe),
            "environment": self._environment(),
            "jobs": self.using.jobs,
            "threads": self.using.threads,
            "notes": self.notes,
            **results,
            "failed": failed,
        }
        write_whole(self.folder / "results.json", json.dumps(content, indent=1, allow_nan=False))
        write_study_page(content, self.folder / "report.html")
        return content

    def _ready(self) -> list[Entry]:
        """Return the entries whose runs can be trained: all, or where the recipe pretrains those that were."""
        return [entry for entry in self.entries if (entry.variant.pretraining is None) == (entry.pretraining is None)]

    def _wants(self, entry: Entry, job: Job) -> bool:
        """Say whether a run is trained now, or was by an earlier session."""
        return entry.variant.name in self.only or _is_finished(job)

    def _job(self, entry: Entry, seed: int, learning_rate: float, tuning: bool = False) -> Job:
        run = entry.variant.run(seed, learning_rate)
        if tuning and self.compare.tuning_examples is not None:
            run = replace(run, evaluate=replace(run.evaluate, examples=self.compare.tuning_examples))
        if entry.pretraining is not None:
            run = replace(run, train=replace(run.train, init_from=entry.pretraining))
        return Job(run, self.folder / entry.variant.folder_name(run))

    def _run(self, workers: Workers, jobs: Sequence[Job], side_by_side: int | None = None) -> dict[str, Failure | None]:
        outcomes: dict[str, Failure | None] = {}
        waiting = []
        for job in jobs:
            if _is_finished(job):
                outcomes[job.name] = None
                self.on_event(Event("kept", job.name))
            else:
                waiting.append(job)
        return outcomes | workers.run(waiting, self.on_event, side_by_side)

    def _environment(self) -> dict[str, Any]:
        """Return the first run's environment, with "differs": what later runs recorded otherwise."""
        records = [
            record
            for entry in self.entries
            for folder in entry.folders.values()
            if (record := read_json(folder / "environment.json")) is not None
        ]
        if not records:
            return {}
        first = records[0]
        ignored = {"command", "operators", "continued", "seed"}
        differs = {
            key: sorted({str(record.get(key)) for record in records})
            for key in first
            if key not in ignored and any(record.get(key) != first.get(key) for record in records)
        }
        operators: dict[str, Any] = {}
        for record in records:
            operators |= record.get("operators") or {}
        return {**first, "operators": operators, "cores": available_cores(), "differs": differs}


def _tuned(rate: float, jobs: Sequence[Job], errors: dict[str, Failure | None]) -> dict[str, Any]:
    results = [result for job in jobs if (result := read_result(job.folder)) is not None]
    row: dict[str, Any] = {
        "learning_rate": rate,
        "runs": [job.name for job in jobs],
        "errors": {name: failure.message for name, failure in errors.items() if failure is not None},
        "exact_match": None,
        "loss": None,
        "chosen": False,
    }
    # A rate at which a seed fails is not better than one at which all finish.
    if len(results) == len(jobs):
        for key in ("exact_match", "loss"):
            row[key] = math.fsum(result["validation"][key] for result in results) / len(results)
    return row


def _is_finished(job: Job) -> bool:
    """Say whether an earlier session finished `job`; raise UserError if its folder is another run's."""
    if read_result(job.folder) is None:
        return False
    if config_hash(read_config(job.folder)) != config_hash(job.config):
        raise UserError(f"{job.folder}: holds a run of another configuration; move it away")
    return True


def _count_runs(compare: CompareConfig, variants: int) -> int:
    tuning = len(compare.learning_rates) * len(compare.tuning_seeds) if compare.tunes else 0
    return variants * max(len(compare.seeds), tuning)


def _plan(recipe: Recipe, variants: Sequence[Variant], folder: Path, runs: int, jobs: int | None) -> Plan:
    """Plan the study's use of the machine; a continued study keeps its threads, which change a sum's last bits."""
    largest = max(variant.sizes["parameters"] for variant in variants)
    stored = read_json(folder / "study.json")
    threads = recipe.train.threads or (stored["threads"] if stored else None)
    if stored is not None and threads != stored["threads"]:
        raise UserError(
            f"train.threads: {folder} was begun with {stored['threads']} threads a run, and {threads} are asked for; "
            "leave it out to continue, or move that folder away"
        )
    using = plan(runs, parameters=largest, device=recipe.train.device, jobs=jobs, threads=threads)
    if stored is None:
        write_whole(folder / "recipe.yaml", to_yaml(recipe))
        write_whole(folder / "study.json", json.dumps({"schema": SCHEMA, "threads": using.threads}))
    return using


@contextmanager
def _hold(folder: Path) -> Iterator[int]:
    """Make the study's folder and keep other processes out of it; workers of a killed study are waited for."""
    make_folders(folder)
    lock = os.open(folder / "study.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + SECONDS_FOR_ORPHANS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = os.pread(lock, 32, 0).decode().strip()
                if time.monotonic() > deadline or (owner.isdigit() and _is_alive(int(owner))):
                    raise UserError(f"{folder}: another process (id {owner}) is running this study") from None
                time.sleep(0.2)
        with naming(folder / "study.lock"):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _command(command: Sequence[str]) -> str:
    """Return a command line to copy: the program by its name, not by where this machine keeps it."""
    name, *rest = command or ["trivium"]
    program = Path(name).name
    return shlex.join(["trivium" if program in ("__main__.py", "cli.py") else program, *rest])
