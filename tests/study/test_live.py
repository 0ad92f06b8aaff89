from io import StringIO

from rich.console import Console

from trivium.study.jobs import Event
from trivium.study.live import LiveProgress

PROGRESS = {
    "step": 40,
    "steps": 600,
    "tokens": 88_500,
    "loss": 1.2345,
    "exact_match": None,
    "tokens_per_second": 45_000.0,
    "seconds_left": 75.2,
}


def shown(events, *, terminal, seconds=0.0):
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with LiveProgress(3, console, seconds) as live:
        for event in events:
            live(event)
    return stream.getvalue()


def test_without_a_terminal_each_run_gets_plain_lines():
    events = [
        Event("kept", "a-s0"),
        Event("started", "b-s0"),
        Event("progress", "b-s0", PROGRESS),
        Event("progress", "b-s0", {**PROGRESS, "step": 600, "exact_match": 0.998, "seconds_left": 0.0}),
        Event("finished", "b-s0"),
        Event("failed", "c-s0", message="it [broke]"),
    ]
    lines = shown(events, terminal=False).splitlines()
    assert lines[0] == "[1/3] a-s0  finished earlier"
    assert "b-s0  40/600  88.5 k  1.234  –  45 k  1:15" in lines
    assert "[2/3] b-s0  finished  88.5 k  1.234  99.8 %" in lines
    assert lines[-1] == "[3/3] c-s0  failed: it [broke]"
    assert "\x1b" not in "".join(lines)


def test_plain_lines_come_only_now_and_then():
    events = [Event("started", "b-s0")] + [Event("progress", "b-s0", {**PROGRESS, "step": n}) for n in range(50)]
    assert shown(events, terminal=False, seconds=1000).splitlines() == []


def test_on_a_terminal_each_running_run_has_a_live_line():
    text = shown(
        [Event("started", "a-s0"), Event("progress", "a-s0", PROGRESS), Event("started", "b-s0")], terminal=True
    )
    for word in ("step", "tokens", "loss", "exact match", "tokens/s", "left", "40/600", "1:15", "0 of 3 runs finished"):
        assert word in text


def test_a_stopped_run_does_not_count_as_done():
    assert (
        shown([Event("stopped", "a-s0", message="SIGTERM")], terminal=False).strip() == "[0/3] a-s0  stopped: SIGTERM"
    )
