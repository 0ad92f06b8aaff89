import pytest

from trivium.registry import UserError
from trivium.report.figures import to_svg
from trivium.report.kernels import kernel_figure


def row(kind: str, heads: int, tokens: int, tflops: float, **more) -> dict:
    return {"pass": kind, "heads": heads, "tokens": tokens, "tflops": tflops, "peer": False, "sweep": True} | more


def results(*rows: dict) -> dict:
    return {"rows": list(rows), "matmul_tflops": 700.0, "matrix": 8192, "environment": {"device_name": "NVIDIA H200"}}


def test_a_curve_is_the_fastest_of_our_backends_and_nothing_else_of_the_results():
    rows = [
        *(row("forward", 32, tokens, tflops) for tokens, tflops in ((1024, 100.0), (512, 50.0), (1024, 300.0))),
        row("backward", 8, 512, 70.0),
        row("forward", 32, 512, 999.0, peer=True),
        row("forward", 32, 512, 999.0, sweep=False),
        {"pass": "forward", "heads": 32, "tokens": 2048, "not_run": "why", "peer": False, "sweep": True},
    ]
    figure = kernel_figure(results(*rows))
    (axes,) = figure.axes
    curves = [line.get_ydata().tolist() for line in axes.lines if line.get_transform() == axes.transData]
    assert [50.0, 300.0] in curves
    assert [70.0] in curves
    assert not any(999.0 in curve for curve in curves)
    text = to_svg(figure)
    assert "forward, 32 heads" in text
    assert "8192³ matrix product" in text


def test_replays_are_drawn_in_place_of_calls_that_waited_for_the_host_and_the_axis_says_so():
    figure = kernel_figure(results(row("forward", 8, 512, 60.0, graph_tflops=300.0)))
    (axes,) = figure.axes
    curves = [line.get_ydata().tolist() for line in axes.lines if line.get_transform() == axes.transData]
    assert [300.0] in curves
    assert [60.0] not in curves
    assert "NVIDIA H200, replayed" in to_svg(figure)
    assert "replayed" not in to_svg(kernel_figure(results(row("forward", 8, 512, 60.0))))


def test_results_without_a_sweep_are_refused_with_the_command_that_makes_one():
    with pytest.raises(UserError, match="trivium bench ops --sweep --out FILE"):
        kernel_figure(results(row("forward", 32, 512, 1.0, sweep=False)))
