"""Mixtures: exact shares in every block, whole epochs of finite sources, and weights that change at an index."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.config import UserError, from_dict, to_dict
from trivium.tasks.base import TaskConfig
from trivium.tasks.mixture import BLOCK, Mixture

SEED = 1 << 40


def mixture(weights: dict[str, float], **sources: dict[str, Any]) -> Mixture:
    given = {name: sources.get(name, {"kind": "addition", "max_digits": 2}) for name in weights}
    tasks = {name: {"task": given[name], "weight": weight} for name, weight in weights.items()}
    task = from_dict(TaskConfig, {"kind": "mixture", "sources": tasks}).build()
    assert isinstance(task, Mixture)
    return task


def finite(count: int, seed: int = 0) -> dict[str, Any]:
    return {"kind": "arithmetic_problems", "train_examples": count, "held_out": 12, "seed": seed}


def sources(task: Mixture, start: int, count: int) -> Counter[str]:
    return Counter(task.place(index)[0] for index in range(start, start + count))


def test_every_block_holds_each_share_to_one_problem_and_the_mean_is_exact():
    task = mixture({"a": 5, "b": 2.5, "c": 0.01, "none": 0})
    shares = {"a": 5 / 7.51, "b": 2.5 / 7.51, "c": 0.01 / 7.51, "none": 0}
    total: Counter[str] = Counter()
    blocks = 40
    for block in range(blocks):
        found = sources(task, block * BLOCK, BLOCK)
        total += found
        assert all(abs(found[name] - share * BLOCK) < 1 for name, share in shares.items())
    assert total["none"] == 0
    assert total["c"] == pytest.approx(shares["c"] * BLOCK * blocks, abs=8)
    assert sum(total.values()) == blocks * BLOCK


def test_sources_are_mixed_within_a_block():
    task = mixture({"a": 1, "b": 1})
    names = "".join(task.place(index)[0] for index in range(BLOCK))
    assert max(map(len, names.replace("a", " ").split())) < 20
    assert names != "".join(task.place(index)[0] for index in range(BLOCK, 2 * BLOCK))


def test_a_finite_source_is_read_in_whole_epochs_of_new_orders():
    task = mixture({"one": 3, "two": 1}, one=finite(30), two=finite(20, seed=1))
    seen = [place for index in range(600) if (found := task.place(index))[0] == "two" for place in [found[1]]]
    epochs = [seen[start : start + 20] for start in range(0, len(seen) - 19, 20)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_source_without_end_is_read_once_from_where_the_seed_begins():
    task = mixture({"a": 1, "b": 1})
    for seed in (0, 3):
        places = [task.place(seed * SEED + index) for index in range(500)]
        for name in "ab":
            mine = [place for source, place in places if source == name]
            assert mine == list(range(seed * SEED, seed * SEED + len(mine)))


def test_other_weights_from_an_index_on_leave_what_came_before_and_repeat_nothing():
    task = mixture({"a": 1, "b": 0})
    start = 3 * BLOCK + 17  # in the middle of a block
    changed = task.reweighted([(0, {"a": 1, "b": 0}), (start, {"a": 1, "b": 3})])
    assert [changed.place(i) for i in range(start)] == [task.place(i) for i in range(start)]
    found = [changed.place(i) for i in range(start, start + BLOCK)]
    assert Counter(name for name, _ in found) == {"a": BLOCK // 4, "b": 3 * BLOCK // 4}
    assert [place for name, place in found if name == "a"] == list(range(start, start + BLOCK // 4))
    again = task.reweighted([(0, {"a": 1, "b": 0}), (start, {"a": 1, "b": 3}), (start + 5, {"a": 0, "b": 1})])
    assert [again.place(i) for i in range(start + 5)] == [changed.place(i) for i in range(start + 5)]
    assert sources(again, start + 5, BLOCK) == {"b": BLOCK}
    assert task.reweighted([(0, {"a": 1, "b": 0})]) is task


@pytest.mark.parametrize("starts", [[], [5], [0, 7, 7], [0, 9, 3]])
def test_segments_that_do_not_ascend_from_0_are_refused(starts: list[int]):
    with pytest.raises(ValueError, match="ascending starts from 0"):
        mixture({"a": 1}).reweighted([(start, {"a": 1.0}) for start in starts])


def test_far_indices_are_found_without_counting_from_the_beginning():
    task = mixture({"a": 1, "b": 2})
    name, place = task.place(5_000 * BLOCK + 3)
    assert place == pytest.approx(5_000 * BLOCK * (1 if name == "a" else 2) / 3, rel=1e-3)


def test_a_batch_holds_rows_of_all_sources_in_the_order_of_the_indices():
    task = mixture({"a": 1, "b": 1}, b={"kind": "addition", "max_digits": 4})
    indices = np.arange(40)
    batch = task.gather("train", indices)
    for row, index in enumerate(indices):
        example = task.example("train", int(index))
        tokens, _, _ = task.encode(example)
        assert batch.tokens_BT[row, : batch.lengths_B[row]].tolist() == tokens
    assert {task.example("train", int(i)).tags["source"] for i in indices} == {"a", "b"}


def test_the_main_source_is_scored():
    task = mixture({"a": 1, "b": 1}, b={"kind": "addition", "max_digits": 3})
    assert task.main == "a"
    named = to_dict(task.config) | {"main": "b"}
    other = from_dict(TaskConfig, named).build()
    assert other.example("test", 3).prompt == task.sources["b"].example("test", 3).prompt
    assert other.example("test", 3).tags["source"] == "b"
    assert other.parse("1+2").tags["source"] == "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, "sources: expected one task or more"),
        ({"main": "c"}, "main: there is no source 'c'; allowed: a, b"),
        ({"sources": {"a": {"weight": 0, "task": {"kind": "addition"}}}}, "every weight is 0"),
        ({"sources": {"a": {"weight": -1, "task": {"kind": "addition"}}}}, r"sources\.a\.weight: expected 0 or more"),
        ({"sources": {"a": {"task": {"kind": "adition"}}}}, r"sources\.a\.task: unknown task 'adition'"),
        ({"sources": {"a": {}}}, r"sources\.a\.task: missing"),
        (
            {"sources": {"a": {"task": {"kind": "mixture", "sources": {"b": {"task": {"kind": "addition"}}}}}}},
            "a mixture cannot hold a mixture",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(change: dict[str, Any], message: str):
    good = {"kind": "mixture", "sources": {name: {"task": {"kind": "addition"}} for name in "ab"}}
    with pytest.raises(UserError, match=message):
        from_dict(TaskConfig, good | change, "task").build()


def test_sources_that_write_differently_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"sources\.b: its vocabulary is not that of a"):
        mixture({"a": 1, "b": 1}, b={"kind": "addition", "format": "column"})
    with pytest.raises(UserError, match=r"sources\.b\.task\..*no such file"):
        mixture({"a": 1, "b": 1}, b={"kind": "jsonl", "train": str(tmp_path / "missing.jsonl")})
