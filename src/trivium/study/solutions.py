"""What a study says of solutions to word problems beyond exact match: other rules, likelihoods, steps, paired tests."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.config import UserError
from trivium.evaluate.compare import compare_with, read_answers
from trivium.study.intervals import difference_of, interval
from trivium.train.run import ANSWERS

_log = logging.getLogger("trivium")


def solution_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one run by name, from the evaluation in its result.json; none where no rule reads answers.

    "loss" (chain and answer) and "answer_loss" are nats a token, teacher-forced; "steps_true" is of the steps that the
    run wrote, "steps_wanted" of those of the right chains; the rest are the rates of the task's rules.
    """
    readings = evaluation.get("readings") or {}
    if not readings:
        return {}
    scores = {name: found["rate"] for name, found in readings.items()}
    scores |= {name: evaluation[name] for name in ("loss", "answer_loss") if evaluation.get(name) is not None}
    for name in ("steps_true", "steps_wanted"):
        found = (evaluation.get("chain") or {}).get(name)
        if found and found["n"]:
            scores[name] = found["rate"]
    return scores


def over_seeds(seeds: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return for each score its interval over finished seeds, and "difference": less the baseline's, paired by seed."""
    found = {seed: values["solutions"] for seed, values in seeds.items() if values.get("solutions")}
    names = dict.fromkeys(name for scores in found.values() for name in scores)
    scores: dict[str, Any] = {}
    for name in names:
        mine = {seed: values[name] for seed, values in found.items() if name in values}
        scores[name] = interval(list(mine.values()))
        if baseline is not None:
            theirs = {seed: (values.get("solutions") or {}).get(name) for seed, values in baseline.items()}
            scores[name]["difference"] = difference_of(mine, theirs)
    return scores


def paired_tests(folders: Mapping[int, Path], baseline: Mapping[int, Path]) -> dict[str, Any]:
    """Return McNemar's tests against the baseline's run of the same seed, by seed, where both kept their answers.

    "first" is the variant's run, "second" the baseline's; see `evaluate.compare.compare_with`. Answers that cannot be
    read or compared give {"error": what is wrong with which file} in place of a seed's tests: the rest of a study says
    no less for it.
    """
    pairs = {
        str(seed): (folder / ANSWERS, baseline[seed] / ANSWERS) for seed, folder in folders.items() if seed in baseline
    }
    return {seed: _tests(ours, theirs) for seed, (ours, theirs) in pairs.items() if ours.is_file() and theirs.is_file()}


def _tests(ours: Path, theirs: Path) -> dict[str, Any]:
    try:
        mine, others = read_answers(ours), read_answers(theirs)
        try:
            return compare_with(mine, others)
        except UserError as error:
            raise UserError(f"{ours} and {theirs}: {str(error).removeprefix('--against: ')}") from None
    except UserError as error:
        _log.warning("no paired test: %s", error)
        return {"error": str(error)}
