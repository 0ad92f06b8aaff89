"""How trivium eval shows what it scores beside exact match: other rules, comparisons, perplexity, the harness."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.2%} ({rate['low']:.2%} – {rate['high']:.2%}), {rate['successes']} of {rate['n']}"


def show_readings(console: Console, scores: Mapping[str, Any]) -> None:
    """Print the rates under other rules, the constant answer's, those with a calculator, and paired comparisons."""
    for name, rate in (scores.get("readings") or {}).items():
        unread = f"; {rate['unread']} unread" if rate["unread"] else ""
        judged = ", ".join(f"{count} by {judge}" for judge, count in (rate.get("judged") or {}).items())
        console.print(f"{name}: {_rate(rate)}{unread}{f'; judged {judged}' if judged else ''}", markup=False)
    constant = scores.get("constant")
    if constant is not None:
        console.print(f"always {constant['answer']!r}: {_rate(constant)}", markup=False)
    assisted = scores.get("calculator_assisted")
    if assisted is not None:
        console.print(f"calculator-assisted, exact match: {_rate(assisted['exact_match'])}")
        for name, rate in assisted["readings"].items():
            console.print(f"calculator-assisted, {name}: {_rate(rate)}")
    for name, test in (scores.get("against") or {}).items():
        console.print(
            f"{name}, against the other: right here alone {test['first_only']}, there alone {test['second_only']}, "
            f"both {test['both']}, neither {test['neither']}; McNemar p = {test['p']:.3g}"
        )


def show_text(found: Mapping[str, Any]) -> None:
    """Print the perplexity of a text."""
    console = Console()
    form = found["form"]
    if form == "strided":
        form = f"strided by {found['stride']}"
    console.print(
        f"{found['text']} ({found['split']}): {found['tokens']:,} tokens of {found['texts']:,} texts, all scored; "
        f"{form}, window {found['window']}",
        soft_wrap=True,
    )
    console.print(f"perplexity per token: {found['per_token']:.4f} ({found['loss']:.4f} nats)")
    if found["per_word"] is not None:
        console.print(f"perplexity per word: {found['per_word']:.4f} ({found['words']:,} words)")
    if found["bits_per_byte"] is not None:
        console.print(f"bits per byte: {found['bits_per_byte']:.4f}")


def show_harness(results: Mapping[str, Any]) -> None:
    """Print the harness's metrics by task, a line for each."""
    console = Console()
    console.print(f"lm-evaluation-harness {results['version']}")
    for name, task in results["tasks"].items():
        problems = f"{task['problems']:,} problems" if task["problems"] is not None else "a group"
        for metric, value in task["metrics"].items():
            error = task["errors"].get(metric)
            told = "" if error is None else f", standard error {error:.4f}"
            console.print(f"{name}, {metric}: {value:.4f} ({problems}{told})", markup=False, soft_wrap=True)
    if results["cut"]:
        console.print(f"{results['cut']:,} requests were longer than the model reads, and were cut")
