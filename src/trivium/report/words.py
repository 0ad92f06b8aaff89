"""What a study's numbers show and do not show, in plain words."""

from collections.abc import Mapping
from typing import Any

from trivium.report.tables import UNITS, percent, threshold, write_points


def describe_study(results: Mapping[str, Any]) -> list[str]:
    """Return paragraphs about `results`: what was compared, who needed fewer tokens, who ended better, and limits."""
    variants: Mapping[str, Any] = results["variants"]
    baseline = results["baseline"]
    words = [_setting(results)]
    if results["status"] == "interrupted":
        words.append("The study was interrupted: the numbers below are those of the runs that had finished.")
    if results.get("not_run"):
        words.append(f"Not run: {', '.join(results['not_run'])}.")
    for failure in results["failed"]:
        words.append(f"The run {failure['run']} failed and is left out: {failure['error']}.")
    words += results.get("notes", [])
    others = [name for name, variant in variants.items() if name != baseline and _finished(variant)]
    if not others and not _finished(variants[baseline]):
        words.append("No run has finished, so there is nothing to conclude yet.")
    elif not _finished(variants[baseline]):
        words.append(f"No run of {baseline} has finished, so there is nothing to compare the others with.")
    elif others:
        words += [_tokens(results)] if results["thresholds"] else []
        words += [_final(results), *_likelihood(results)]
    elif len(variants) > 1:
        words.append(f"No run but those of {baseline} has finished, so there is nothing to compare it with.")
    words.append(_limits(results))
    return words


def _setting(results: Mapping[str, Any]) -> str:
    variants = results["variants"]
    seeds = [_finished(variant) for variant in variants.values()]
    number = f"{seeds[0]}" if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    text = f"{_count(len(variants), 'variant')}, {_count_text(number, 'finished seed')} each, "
    if results["matched"]["by"] == "none":
        return f"{text}each at a size of its own: sizes are what is compared."
    others = [
        f"{name} is matched to nothing"
        if variant["match"]["by"] == "none"
        else f"{name} is matched in {UNITS[variant['match']['by']]} to {variant['match']['to']}"
        for name, variant in variants.items()
        if variant["match"]["by"] and (variant["match"]["by"], variant["match"]["to"]) != _common(results)
    ]
    text += f"matched within 1 % in {UNITS[results['matched']['by']]} to {results['baseline']}"
    return f"{text}; {', '.join(others)}." if others else f"{text}."


def _tokens(results: Mapping[str, Any]) -> str:
    """Compare tokens to the highest threshold that the baseline and at least one other reached in every seed."""
    variants, baseline = results["variants"], results["baseline"]
    for level in sorted(results["thresholds"], reverse=True):
        key = f"{level:g}"
        ratios = {
            name: variant["token_ratio"][key]
            for name, variant in variants.items()
            if name != baseline and variant["token_ratio"][key]["all"] and variant["token_ratio"][key]["mean"]
        }
        if not ratios:
            continue
        parts, undecided = [], []
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1]["mean"]):
            text = f"{name} {ratio['mean']:.2f} times as many"
            if ratio["low"] is not None:
                text += f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
                if ratio["low"] <= 1 <= ratio["high"]:
                    undecided.append(name)
            parts.append(text)
        mean = variants[baseline]["tokens_to"][key]["mean"]
        text = f"To reach {threshold(level)} exact match, {baseline} needed {mean:,.0f} tokens; {', '.join(parts)}."
        single = all(ratio["low"] is None for ratio in ratios.values())
        if single:
            return f"{text} One seed cannot say how much of that is chance."
        decided = [name for name in ratios if name not in undecided]
        if undecided:
            one = len(undecided) == 1
            text += (
                f" The {'interval' if one else 'intervals'} of {_list(undecided)} {'includes' if one else 'include'}"
            )
            text += f" 1: these seeds do not tell {'it' if one else 'them'} from {baseline}."
        if decided:
            fewer = [name for name in decided if ratios[name]["mean"] < 1]
            more = [name for name in decided if ratios[name]["mean"] > 1]
            text += f" {_list(fewer)} needed fewer tokens than {baseline} by more than the interval." if fewer else ""
            text += f" {_list(more)} needed more tokens than {baseline} by more than the interval." if more else ""
        missing = [name for name in variants if name != baseline and name not in ratios]
        if missing:
            text += f" Not every seed of {_list(missing)} reached it."
        return text
    levels = " or ".join(threshold(level) for level in sorted(results["thresholds"]))
    return (
        f"No variant can be compared with {baseline} in tokens: not every seed of both finished and reached {levels}."
    )


def _final(results: Mapping[str, Any]) -> str:
    variants, baseline = results["variants"], results["baseline"]
    known = {name: variant for name, variant in variants.items() if variant["exact_match"]["mean"] is not None}
    highest = max(variant["exact_match"]["mean"] for variant in known.values())
    best = [name for name, variant in known.items() if variant["exact_match"]["mean"] == highest]
    if len(best) == len(known):
        return f"At the end all were right equally often, on {percent(highest)} of new problems."
    text = f"At the end {_list(best)} had the highest exact match, {percent(highest)} of new problems."
    parts, apart, alone = [], [], []
    for name, variant in known.items():
        if name == baseline or variant["difference"]["mean"] is None:
            continue
        parts.append(f"{name} {write_points(variant['difference'])}")
        low, high = variant["difference"]["low"], variant["difference"]["high"]
        if low is None:
            alone.append(name)
        elif not low <= 0 <= high:
            apart.append(name)
    if not parts:
        return text
    text += f" Against {baseline}, in percentage points: {', '.join(parts)}."
    if len(alone) == len(parts):
        return text
    if len(apart) == len(parts):
        return f"{text} No interval includes zero."
    if apart:
        return f"{text} Of these intervals only that of {_list(apart)} excludes zero."
    return f"{text} No interval excludes zero: by their final score these runs do not tell the variants apart."


def _likelihood(results: Mapping[str, Any]) -> list[str]:
    """Compare the likelihood of whole solutions, which tells variants apart where few answers are right."""
    variants, baseline = results["variants"], results["baseline"]
    losses = {name: variant["solutions"]["loss"] for name, variant in variants.items() if variant.get("solutions")}
    parts = []
    for name, loss in losses.items():
        difference = loss.get("difference") or {"mean": None}
        if difference["mean"] is None:
            continue
        parts.append(f"{name} {difference['mean']:+.4f}")
        if difference["low"] is not None:
            parts[-1] += f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
    if not parts:
        return []
    return [
        f"Whole solutions of new problems cost {baseline} {losses[baseline]['mean']:.4f} nats a token; the others "
        f"beyond that, paired by seed: {', '.join(parts)}."
    ]


def _limits(results: Mapping[str, Any]) -> str:
    variants = results["variants"]
    seeds = max((_finished(variant) for variant in variants.values()), default=0)
    rates = {variant["learning_rate"] for variant in variants.values()}
    tuned = [len(variant["tuning"]) for variant in variants.values()]
    text = "The intervals are 95 %, over seeds alone, and each comparison stands by itself: among many, one in twenty "
    text += "stands out by chance."
    if seeds == 1:
        text = "One seed gives no interval: what differs here may be chance."
    elif seeds < 5:
        text += f" {seeds} seeds make wide intervals."
    if any(variant.get("pretraining") for variant in variants.values()):
        text += " Each variant was pretrained once: what another pretraining would change is in no interval."
    if any(tuned):
        text += f" Each variant took the best of the same {max(tuned)} learning rates, on seeds that are not reported."
    elif len(rates) == 1:
        text += f" No variant was tuned: all used the learning rate {next(iter(rates)):g}, which may suit some better."
    return text + " One task at one size says nothing about others."


def _common(results: Mapping[str, Any]) -> tuple[str, str]:
    return results["matched"]["by"], results["matched"]["to"]


def _finished(variant: Mapping[str, Any]) -> int:
    return sum(seed["status"] == "finished" for seed in variant["seeds"].values())


def _count(number: int, noun: str) -> str:
    return _count_text(str(number), noun)


def _count_text(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
