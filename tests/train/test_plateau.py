"""More of one source when validation stops improving: when, by how much, up to where, and alike when continued."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import rows, tiny_config
from trivium.config import UserError, from_dict, to_dict
from trivium.tasks.base import TaskConfig
from trivium.tasks.mixture import Mixture
from trivium.train.config import PlateauConfig, RunConfig
from trivium.train.plateau import Plateau
from trivium.train.prepare import prepare
from trivium.train.state import Position

SOURCES = {
    "sums": {"weight": 4, "task": {"kind": "addition", "max_digits": 2}},
    "other": {"weight": 1, "task": {"kind": "addition", "max_digits": 3}},
    "more": {"weight": 0, "task": {"kind": "addition", "max_digits": 1}},
}
TASK: Any = {"kind": "mixture", "sources": SOURCES}


def plateau(**options: Any) -> Plateau:
    config = from_dict(PlateauConfig, {"source": "more", "patience": 2, "raise_by": 0.2, "largest": 0.5} | options)
    return Plateau(config, from_dict(TaskConfig, TASK).build(), 10)


def watch(handler: Plateau, values: list[float], at: Position, metric: str = "loss") -> list[Any]:
    found = []
    for value in values:
        at.step += 3
        at.validation = {metric: value}
        found.append(handler.watch(at))
    return found


def test_a_plateau_raises_the_share_and_the_others_give_it_up_in_proportion():
    handler, at = plateau(), Position()
    assert watch(handler, [2.0, 1.5, 1.0, 0.9995], at) == [None] * 4
    (row,) = watch(handler, [1.2], at)
    assert row == {
        "split": "mixture",
        "share.sums": pytest.approx(0.64),
        "share.other": pytest.approx(0.16),
        "share.more": 0.2,
    }
    task = handler.mixed(at)
    assert isinstance(task, Mixture)
    assert task.segments[0] == (0, (4, 1, 0))
    assert task.segments[1][0] == 15 * 10  # the first problem of the step that follows


def test_an_improvement_begins_the_count_anew_and_the_bound_is_kept():
    handler, at = plateau(), Position()
    assert watch(handler, [2.0, 2.0, 1.0, 1.0], at) == [None] * 4
    shares = [row and row["share.more"] for row in watch(handler, [1.0] * 8, at)]
    assert shares == [pytest.approx(0.2), None, pytest.approx(0.4), None, pytest.approx(0.5), None, None, None]
    assert len(at.mixture) == 4


def test_a_score_that_should_grow_is_watched_the_other_way():
    handler, at = plateau(metric="exact_match", min_improvement=0.0), Position()
    assert watch(handler, [0.1, 0.2, 0.3], at, "exact_match") == [None] * 3
    assert watch(handler, [0.3, 0.3], at, "exact_match")[-1] is not None


def test_without_a_source_nothing_is_watched():
    handler, at = plateau(source=None), Position()
    assert watch(handler, [1.0] * 9, at) == [None] * 9
    assert handler.mixed(at) is handler.task


OPTIONS = {"source": "more", "patience": 1, "min_improvement": 5.0, "raise_by": 0.3, "largest": 0.7}


@pytest.mark.parametrize("broken", [5, 7, 9])
def test_a_run_whose_mixture_changes_continues_exactly(broken: int, continued: Callable[[RunConfig, int], Path]):
    config = from_dict(RunConfig, {**to_dict(tiny_config(plateau=OPTIONS, eval_every=2)), "task": TASK})
    changes = rows(continued(config, broken), "mixture")
    assert [row["step"] for row in changes] == [4, 6, 8]
    assert [row["share.more"] for row in changes] == pytest.approx([0.3, 0.6, 0.7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "none"}, "the mixture has no 'none'; .*allowed: sums, other, more"),
        ({"source": "sums", "largest": 0.5}, "0.5 is no more than the share of 0.8 that sums begins with"),
        ({"patience": 0}, "patience: expected 1 or more"),
        ({"largest": 1.0}, "largest: expected a share between 0 and 1"),
        ({"raise_by": 0}, "raise_by: expected a share between 0 and 1"),
        ({"min_improvement": -1}, "min_improvement: expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        plateau(**options)


def test_a_task_without_sources_is_refused_before_training():
    with pytest.raises(UserError, match="the task is no mixture"):
        prepare(tiny_config(plateau={"source": "more"}))
