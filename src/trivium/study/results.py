"""From the folders of finished runs to the numbers of a study: curves, intervals, tokens to a threshold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from trivium.config import to_dict
from trivium.report.folder import read_metrics, read_result
from trivium.study.intervals import interval
from trivium.study.recipe import Recipe
from trivium.study.solutions import over_seeds, paired_tests, solution_scores
from trivium.study.variants import Variant

SCHEMA = 1
CURVE = ("step", "tokens", "generated_tokens", "loss", "token_accuracy", "exact_match")
TOKENS_RULE = (
    "Tokens to a threshold: the validation exact match, read as straight lines between evaluations, first meets it; "
    "a run that is at or above it at its first evaluation counts that evaluation's tokens."
)

GENERATED_RULE = " Tokens are those of chains and answers, as the budget of each run is; prompts are not counted."


@dataclass
class Entry:
    """What a study knows of one variant while it runs: its folders by seed, its tuning, and what failed."""

    variant: Variant
    learning_rate: float
    folders: dict[int, Path] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    pretraining: Path | None = None


def collect(recipe: Recipe, entries: Sequence[Entry], *, length: int) -> dict[str, Any]:
    """Return the part of results.json that comes from the runs: every variant's numbers, and which runs failed."""
    compare = recipe.compare
    assert compare is not None
    thresholds = compare.thresholds
    generated = recipe.train.generated_tokens is not None
    counted = "generated_tokens" if generated else "tokens"
    variants = {entry.variant.name: _variant(entry, thresholds, counted) for entry in entries}
    baseline = variants[compare.baseline]
    folders = {entry.variant.name: entry.folders for entry in entries}
    for name, results in variants.items():
        other = None if name == compare.baseline else baseline["seeds"]
        if solutions := over_seeds(results["seeds"], other):
            results["solutions"] = solutions
            results["paired"] = {} if other is None else paired_tests(folders[name], folders[compare.baseline])
        sizes, reference = results["sizes"], baseline["sizes"]
        results["relative"] = {key: sizes[key] / reference[key] for key in ("parameters", "flops_per_token")}
        if name != compare.baseline:
            results["difference"] = difference(results["seeds"], baseline["seeds"])
            results["token_ratio"] = {
                _key(level): token_ratio(results["seeds"], baseline["seeds"], _key(level)) for level in thresholds
            }
    failed = [
        {"run": entry.folders[seed].name, "variant": entry.variant.name, "seed": seed, "error": message}
        for entry in entries
        for seed, message in entry.errors.items()
    ]
    return {
        "matched": {"by": compare.match, "to": compare.baseline, "within": 0.01},
        "baseline": compare.baseline,
        "length": length,
        "thresholds": list(thresholds),
        "tokens_rule": TOKENS_RULE + (GENERATED_RULE if generated else ""),
        "variants": variants,
        "not_run": [name for name, results in variants.items() if not _any_finished(results["seeds"])],
        "failed": failed,
    }


def _variant(entry: Entry, thresholds: Sequence[float], counted: str) -> dict[str, Any]:
    variant = entry.variant
    seeds = {
        str(seed): _seed(folder, entry.errors.get(seed), thresholds, counted) for seed, folder in entry.folders.items()
    }
    done = [seed for seed in seeds.values() if seed["status"] == "finished"]
    first = done[0] if done else None
    train = variant.run(0, entry.learning_rate).train
    sizes = dict(variant.sizes)
    return {
        "mixer": variant.mixer,
        "changes": {key: to_dict(value) for key, value in variant.overrides.items()},
        "match": {"by": variant.match, "to": variant.to},
        "model": to_dict(variant.config.model),
        "sizes": {**sizes, "length": variant.length, "state_bytes_per_token": sizes["state_bytes"] / variant.length},
        "learning_rate": entry.learning_rate,
        "optimizer": {
            "name": "AdamW",
            **{key: getattr(train, key) for key in ("beta1", "beta2", "weight_decay", "clip", "schedule", "warmup")},
        },
        "precision": first["precision"] if first else None,
        "threads": first["threads"] if first else None,
        "seeds": seeds,
        "exact_match": interval([seed["exact_match"]["rate"] for seed in done]),
        "tokens_to": {_key(level): _tokens_to(list(seeds.values()), _key(level)) for level in thresholds},
        "tokens_per_second": median(seed["tokens_per_second"] for seed in done) if done else None,
        "by_tag": _by_tag([seed["by_tag"] for seed in done]),
        "by_length": _by_length([seed["by_length"] for seed in done]),
        "by_pair": _by_pair([seed["by_pair"] for seed in done]),
        "generated_tokens_per_problem": interval([seed["generated_tokens_per_problem"] for seed in done]),
        "samples": first["samples"] if first else {"right": [], "wrong": []},
        "peak_bytes": max((seed["peak_bytes"] for seed in done if seed.get("peak_bytes")), default=None),
        **({} if variant.pretraining is None else {"pretraining": _pretraining(entry.pretraining)}),
        "tuning": entry.tuning,
    }


def _pretraining(folder: Path | None) -> dict[str, Any] | None:
    """Return what the run before a variant's own ones came to, None while there is none that finished."""
    result = None if folder is None else read_result(folder)
    if folder is None or result is None:
        return None
    rows = [row for row in read_metrics(folder) if row.get("split") == "validation"]
    evaluation = result["evaluation"]
    return {
        "run": folder.name,
        "curve": {key: [_finite(row.get(key)) for row in rows] for key in ("step", "tokens", "loss")},
        **{key: evaluation.get(key) for key in ("loss", "perplexity", "token_accuracy", "exact_match")},
        **{key: result.get(key) for key in ("tokens", "seconds", "tokens_per_second", "peak_bytes", "precision")},
    }


def _seed(folder: Path, error: str | None, thresholds: Sequence[float], counted: str) -> dict[str, Any]:
    result = read_result(folder)
    rows = read_metrics(folder)
    validation = [row for row in rows if row.get("split") == "validation"]
    training = [row for row in rows if row.get("split") == "train"]
    shortened = ("chain_removed",) if any("chain_removed" in row for row in validation) else ()
    curve = {key: [_finite(row.get(key)) for row in validation] for key in (*CURVE, *shortened)}
    head = {
        "run": folder.name,
        "status": "finished" if result else ("failed" if error else "unfinished"),
        "error": None if result else error,
        "curve": curve,
        "training": {key: [_finite(row.get(key)) for row in training] for key in ("tokens", "loss")},
        "tokens_to": {_key(level): tokens_to(curve[counted], curve["exact_match"], level) for level in thresholds},
    }
    if result is None:
        return head
    evaluation = result["evaluation"]
    return {
        **head,
        "exact_match": evaluation["exact_match"],
        "by_tag": evaluation.get("by_tag") or {},
        "errors": evaluation.get("errors"),
        "by_length": evaluation.get("by_length") or {},
        "by_pair": evaluation.get("by_pair") or {},
        "published": evaluation.get("published") or {},
        "solutions": solution_scores(evaluation),
        "constant": evaluation.get("constant"),
        "generated_tokens_per_problem": evaluation["generated_tokens_per_problem"],
        "samples": evaluation.get("samples") or {"right": [], "wrong": []},
        **{
            key: result.get(key)
            for key in (
                "tokens",
                "generated_tokens",
                "seconds",
                "tokens_per_second",
                "peak_bytes",
                "precision",
                "threads",
                "device",
            )
        },
    }


def tokens_to(tokens: Sequence[float], exact_match: Sequence[float | None], threshold: float) -> float | None:
    """Return the tokens at which `exact_match` first meets `threshold` (see TOKENS_RULE); None if it never does."""
    before: tuple[float, float] | None = None
    for count, rate in zip(tokens, exact_match, strict=True):
        if rate is None:
            continue
        if rate >= threshold:
            if before is None:
                return count
            return before[0] + (count - before[0]) * (threshold - before[1]) / (rate - before[1])
        before = (count, rate)
    return None


def difference(seeds: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the interval of the final exact match less the baseline's, paired by seed."""
    shared = [seed for seed in seeds if _finished(seeds, seed) and _finished(baseline, seed)]
    pairs = [(seeds[seed]["exact_match"]["rate"], baseline[seed]["exact_match"]["rate"]) for seed in shared]
    return interval([mine - theirs for mine, theirs in pairs])


def token_ratio(seeds: Mapping[str, Any], baseline: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return tokens to the threshold `key` as a multiple of the baseline's: geometric mean paired by seed.

    Its interval is Student's t of the logarithms. Seeds that did not both reach the threshold are left out and
    "all" is then false.
    """
    pairs = [
        (seeds[seed]["tokens_to"][key], baseline[seed]["tokens_to"][key])
        for seed in seeds
        if _finished(seeds, seed) and _finished(baseline, seed)
    ]
    reached = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
    logs = interval([math.log(mine / theirs) for mine, theirs in reached])
    mean, low, high = (None if logs[end] is None else math.exp(logs[end]) for end in ("mean", "low", "high"))
    values = [math.exp(value) for value in logs["values"]]
    return {"mean": mean, "low": low, "high": high, "values": values, "all": len(reached) == len(seeds)}


def _finished(seeds: Mapping[str, Any], seed: str) -> bool:
    return seed in seeds and seeds[seed]["status"] == "finished"


def _any_finished(seeds: Mapping[str, Any]) -> bool:
    return any(_finished(seeds, seed) for seed in seeds)


def _tokens_to(seeds: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return the interval over the finished seeds that reached it; a failed run counts among those that did not."""
    ended = [seed for seed in seeds if seed["status"] != "unfinished"]
    found = (seed["tokens_to"][key] for seed in ended if seed["status"] == "finished")
    values = [tokens for tokens in found if tokens is not None]
    return {**interval(values), "reached": len(values), "seeds": len(ended)}


def _by_tag(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Average each slice's rate over seeds; they were all asked the same problems."""
    tags: dict[str, dict[str, Any]] = {}
    for tag, slices in (scores[0] if scores else {}).items():
        tags[tag] = {}
        for value, first in slices.items():
            rates = [score[tag][value]["rate"] for score in scores if value in score.get(tag, {})]
            tags[tag][value] = {"rate": sum(rates) / len(rates), "n": first["n"]}
    return tags


def _by_length(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each length that every seed was read at, the intervals over seeds of both its scores."""
    shared = [length for length in (scores[0] if scores else {}) if all(length in score for score in scores)]
    return {
        length: {
            key: interval([score[length][key]["rate"] for score in scores]) for key in ("exact_match", "token_error")
        }
        for length in shared
    }


def _by_pair(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Average the exact match at each pair of lengths, `AxB`, over seeds; they were all asked the same problems."""
    return {
        pair: {"rate": math.fsum(score[pair]["rate"] for score in scores) / len(scores), "n": first["n"]}
        for pair, first in (scores[0] if scores else {}).items()
        if all(pair in score for score in scores)
    }


def _key(threshold: float) -> str:
    return f"{threshold:g}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
