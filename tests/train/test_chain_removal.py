"""Chains of thought shortened stage by stage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from trivium.config import from_dict
from trivium.evaluate.teacher import teacher_forced
from trivium.model.base import Decoding
from trivium.model.context import model_context
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT
from trivium.tasks.jsonl import JsonlConfig
from trivium.tasks.multiplication import MultiplicationConfig
from trivium.tasks.shortened import without_chain
from trivium.train import loop
from trivium.train.checkpoint import read_checkpoint
from trivium.train.config import ChainRemovalConfig, CurriculumConfig, RunConfig, TrainConfig
from trivium.train.curriculum import Curriculum
from trivium.train.loop import train
from trivium.train.objectives import has_chain
from trivium.train.optim import build_optimizer, set_learning_rates
from trivium.train.prepare import prepare
from trivium.train.run import load
from trivium.train.state import Position

COLUMN = AdditionConfig(format="column").build()


def texts(task, batch) -> list[str]:
    rows = []
    for b in range(len(batch)):
        ids = [*batch.tokens_BT[b, : batch.lengths_B[b]], batch.targets_BT[b, batch.lengths_B[b] - 1]]
        rows.append(task.alphabet.decode(ids))
    return rows


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "12+34=<think>2+4=6 1+3=4</think>46<end>"),
        (1, "12+34=<think>+4=6 1+3=4</think>46<end>"),
        (6, "12+34=<think>1+3=4</think>46<end>"),
        (10, "12+34=<think>4</think>46<end>"),
        (11, "12+34=46<end>"),
        (99, "12+34=46<end>"),
    ],
)
def test_a_chain_loses_its_first_tokens_and_its_brackets_with_the_last(count, text):
    batch = COLUMN.collate([COLUMN.example_of([12, 34])])
    assert texts(COLUMN, without_chain(batch, count, COLUMN.alphabet.pad_id)) == [text]


@pytest.mark.parametrize("task", [COLUMN, MultiplicationConfig(chain=True).build()])
@pytest.mark.parametrize("count", [3, 8, 20, 200])
def test_a_shortened_batch_is_that_of_shortened_texts(task, count):
    whole = task.batch("train", 0, 40)
    short = without_chain(whole, count, task.alphabet.pad_id)
    for b, example in enumerate(task.examples("train", np.arange(40))):
        chain, closing, answer = example.answer.partition("</think>")
        chain_ids = task.alphabet.encode(chain.removeprefix("<think>"))[count:] if closing else []
        written = f"<think>{task.alphabet.decode(chain_ids)}</think>" if chain_ids else ""
        text = example.prompt + written + (answer if closing else example.answer)
        ids = task.alphabet.encode(text)
        length = short.lengths_B[b]
        assert texts(task, short)[b] == text
        assert short.tokens_BT[b, :length].tolist() == ids[:-1]
        assert (short.tokens_BT[b, length:] == task.alphabet.pad_id).all()
        regions = short.regions_BT[b]
        prompt, brackets = len(task.alphabet.encode(example.prompt)), 2 * bool(chain_ids)
        assert (regions == PROMPT).sum() == prompt - 1
        assert (regions == CHAIN).sum() == len(chain_ids) + brackets
        assert (regions[length:] == PAD).all()
        assert (short.weights_BT[b] > 0).sum() == ((regions == CHAIN) | (regions == ANSWER)).sum()
    assert short.tokens_BT.shape == short.targets_BT.shape == short.weights_BT.shape == short.regions_BT.shape


def test_a_run_takes_more_away_at_each_good_evaluation_until_no_chain_is_left(tmp_path, monkeypatch):
    rates, asked = iter([0.2, 0.95, 0.9, 0.5, 1.0, 1.0]), []

    def scores(model, *arguments, **options):
        asked.append(model.decoding.chain_removed)
        return {"loss": 1.0, "token_accuracy": 0.5, "exact_match": next(rates), "count": 5}

    monkeypatch.setattr(loop, "teacher_forced", scores)
    config = from_dict(
        RunConfig,
        {
            "task": {"kind": "addition", "format": "column", "max_digits": 2},
            "model": {"width": 16, "heads": 2, "positions": "block", "layers": "attention*1"},
            "train": {"steps": 12, "batch": 8, "eval_every": 2, "threads": 1, "chain_removal": {"tokens": 12}},
            "evaluate": {"examples": 5},
        },
    )
    train(config, tmp_path / "run")
    assert load(tmp_path / "run")[0].decoding.chain_removed == 36
    shutil.rmtree(tmp_path / "run" / "model")
    assert load(tmp_path / "run")[0].decoding.chain_removed == 36  # from the last checkpoint
    assert asked == [0, 0, 12, 24, 24, 36]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["chain_removed"] for row in rows if row["split"] == "validation"] == asked
    tokens = [row["tokens"] for row in rows if row["split"] == "validation"]
    # Eight sums and no chain at all: at most 2 + 1 + 2 + 1 + 3 tokens each are read in a step.
    assert tokens[-1] - tokens[-2] <= 2 * 8 * 9
    assert tokens[0] > 2 * 8 * 12


def test_nothing_more_is_taken_once_no_chain_can_be_left():
    curriculum = Curriculum(CurriculumConfig(), COLUMN, 5, ChainRemovalConfig(tokens=COLUMN.max_length))
    at = Position(validation={"exact_match": 1.0})
    for _ in range(3):
        curriculum.shorten_chains(at)
    assert at.chain_removed == COLUMN.max_length
    staged = Position(stage=2, validation={"exact_match": 1.0})
    curriculum.shorten_chains(staged)
    assert staged.chain_removed == 0


def test_a_stage_that_is_never_good_enough_ends_after_the_most_evaluations():
    removal = ChainRemovalConfig(tokens=4, most_evaluations=3)
    curriculum = Curriculum(CurriculumConfig(), COLUMN, 5, removal)
    rates = [0.5, 0.5, 0.5, 0.5, 0.95, 0.5, 0.5, 0.5]
    at, removed = Position(), []
    for rate in rates:
        at.validation = {"exact_match": rate}
        assert curriculum.shorten_chains(at) == (at.chain_removed > sum(removed[-1:]))
        removed.append(at.chain_removed)
    assert removed == [0, 0, 4, 4, 8, 8, 8, 12]


def test_stages_say_how_many_tokens_chains_lack_and_the_last_one_stays():
    curriculum = Curriculum(CurriculumConfig(), COLUMN, 5, ChainRemovalConfig(stages=(3, 5, 9), most_evaluations=2))
    at, seen = Position(), []
    for rate in (0.5, 0.95, 0.95, 0.5, 0.5, 0.95, 0.95):
        at.step += 10
        at.validation = {"exact_match": rate}
        curriculum.shorten_chains(at)
        seen.append((at.chain_removed, at.shortened_at))
    assert seen == [(0, 0), (3, 20), (5, 30), (5, 30), (9, 50), (9, 50), (9, 50)]


def test_the_rate_is_warmed_up_again_where_chains_were_shortened():
    removal = ChainRemovalConfig(stages=(3,), warmup=4)
    options = TrainConfig(learning_rate=0.1, schedule="constant", warmup=0, chain_removal=removal)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), options)
    rates = [set_learning_rates(optimizer, options, step, step / 20, 6) for step in (6, 7, 8, 9, 10, 15)]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert set_learning_rates(optimizer, options, 0, 0.0) == pytest.approx(0.1)  # nothing was taken away yet


def test_smoothing_takes_n_more_tokens_from_a_share_that_falls_exponentially_and_always_from_the_same_problems():
    curriculum = Curriculum(CurriculumConfig(), COLUMN, 5, ChainRemovalConfig(tokens=4, smoothing=1.5))
    indices = np.arange(50_000) + (np.int64(3) << 40)
    more = curriculum.more_removed(indices)
    assert more.dtype == np.int64
    assert more.min() == 0
    shares = np.bincount(more)[:4] / len(more)
    np.testing.assert_allclose(shares, (1 - np.exp(-1.5)) * np.exp(-1.5 * np.arange(4)), atol=0.006)
    np.testing.assert_array_equal(curriculum.more_removed(indices[::-1]), more[::-1])
    assert abs(np.corrcoef(more[:-1], more[1:])[0, 1]) < 0.02


def test_rows_may_lack_different_numbers_of_tokens():
    task = COLUMN
    whole = task.collate([task.example_of(pair) for pair in ([12, 34], [12, 34], [3, 5], [99, 21])])
    short = without_chain(whole, np.array([0, 6, 0, 11]), task.alphabet.pad_id)
    assert texts(task, short) == [
        "12+34=<think>2+4=6 1+3=4</think>46<end>",
        "12+34=<think>1+3=4</think>46<end>",
        "3+5=8<end>",
        "99+21=<think>1=12</think>120<end>",
    ]
    viewed = Decoding(chain_removed=6).view(whole, task.alphabet.pad_id, np.array([0, 4, 0, 5]))
    same = without_chain(whole, np.array([6, 10, 6, 11]), task.alphabet.pad_id)
    np.testing.assert_array_equal(viewed.tokens_BT, same.tokens_BT)


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (3, ["<think>+086(058)+0043</think>", "<think>00(82)+0012</think>", "<think>043</think>"]),
        (8, ["<think>058)+0043</think>", "<think>)+0012</think>", ""]),
        (9, ["<think>05)+0043</think>", "<think>+0012</think>", ""]),
        (11, ["<think>)+0043</think>", "<think>012</think>", ""]),
        (13, ["<think>0043</think>", "<think>2</think>", ""]),
        (20, ["", "", ""]),
    ],
)
def test_a_sum_may_go_from_its_last_digit_on(count, written):
    config = MultiplicationConfig(chain=True, max_length=3, last_sum=False)
    removal = ChainRemovalConfig(tokens=1, order="sums_backwards")
    run = RunConfig(task=config, train=TrainConfig(chain_removal=removal))
    task, objective = config.build(), prepare(run).objective
    prompts, answers = ("43*521=", "7*403=", "43*21="), ("0524<end>", "8212<end>", "804<end>")
    whole = task.collate([task.example_of(task.alphabet.encode(prompt)) for prompt in prompts])
    assert texts(task, whole)[0] == "43*521=<think>071+086(058)+0043</think>0524<end>"
    viewed = replace(objective.decoding, chain_removed=count).view(whole, task.alphabet.pad_id)
    assert texts(task, viewed) == ["".join(parts) for parts in zip(prompts, written, answers, strict=True)]


@pytest.mark.parametrize(("count", "left"), [(0, "2+4=6 1+3=4"), (10, "4"), (11, ""), (99, "")])
def test_the_brackets_of_a_chain_may_stay_around_nothing(count, left):
    whole = COLUMN.collate([COLUMN.example_of([12, 34]), COLUMN.example_of([3, 5])])
    viewed = Decoding(chain_removed=count, keep_brackets=True).view(whole, COLUMN.alphabet.pad_id)
    one, other = texts(COLUMN, viewed)
    assert one == f"12+34=<think>{left}</think>46<end>"
    assert other == "3+5=8<end>"  # never had one
    assert COLUMN.verify(COLUMN.example_of([12, 34]), "<think></think>46<end>").correct


def test_the_optimizer_begins_anew_whenever_chains_are_shortened(tmp_path, monkeypatch):
    def scores(model, *arguments, **options):
        return {"loss": 1.0, "token_accuracy": 0.5, "exact_match": 1.0, "count": 5}

    monkeypatch.setattr(loop, "teacher_forced", scores)

    def seen(reset: bool) -> float:
        removal = {"tokens": 4, "smoothing": 1.0, "reset_optimizer": reset}
        sections = {
            "task": {"kind": "addition", "format": "column", "max_digits": 2},
            "model": {"width": 16, "heads": 2, "positions": "block", "layers": "attention*1"},
            "train": {"steps": 5, "batch": 8, "eval_every": 3, "threads": 1, "chain_removal": removal},
            "evaluate": {"examples": 5},
        }
        folder = tmp_path / str(reset)
        train(from_dict(RunConfig, sections), folder)
        (checkpoint,) = (folder / "checkpoints").iterdir()
        tensors, scalars = read_checkpoint(checkpoint)
        assert scalars["chain_removed"] == 4  # by the evaluation at 3 steps; the last one takes nothing away
        return max(float(value) for name, value in tensors.items() if name.startswith("optimizer.step."))

    assert seen(reset=False) == 5
    assert seen(reset=True) == 2


def test_a_file_of_few_problems_is_looked_through_for_a_chain(tmp_path):
    config = JsonlConfig.examples(tmp_path)[0]
    assert isinstance(config, JsonlConfig)
    for length in (1, 5):
        config.train.write_text("".join(config.train.read_text().splitlines(keepends=True)[:length]))
        assert has_chain(config.build())


def test_a_model_without_chains_is_scored_on_problems_without_them(tmp_path):
    config = from_dict(
        RunConfig,
        {
            "task": {"kind": "addition", "format": "column", "max_digits": 2, "min_digits": 2},
            "model": {"width": 16, "heads": 2, "layers": "attention*1"},
        },
    )
    task = config.task.build()
    model = config.model.build(model_context(task, config.model))
    read = []
    model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape[1]))
    indices = np.arange(8)
    for removed, longest in ((0, task.max_length - 1), (task.max_length, len("12+34=123"))):
        model.decoding = Decoding(chain_removed=removed)
        read.clear()
        teacher_forced(model, task, "test", indices)
        assert read[0] <= longest
        assert removed or read[0] > len("12+34=123")
