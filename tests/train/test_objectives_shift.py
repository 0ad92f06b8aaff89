"""Targets further ahead, and the decoder that goes with them."""

import itertools

import numpy as np
import pytest
import torch

from trivium.config import UserError, from_dict
from trivium.evaluate.answers import evaluate
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.lengths import scores_by_length
from trivium.generate.engine import generate
from trivium.model.base import Decoding, LanguageModel, ModelContext
from trivium.model.decoder import DecoderConfig
from trivium.model.folder import load_model, save_model
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.multiplication import MultiplicationConfig
from trivium.tasks.subtraction import SubtractionConfig
from trivium.train.config import RunConfig
from trivium.train.loop import train
from trivium.train.objectives import make_objective
from trivium.train.prepare import prepare


def run_config(**sections) -> RunConfig:
    return from_dict(RunConfig, sections)


class Rows(list):
    """The tokens that each row has read, as a state."""

    def select(self, rows):
        return Rows(list(self[row]) for row in rows.tolist())


class Knowing(LanguageModel):
    """Answers every prompt of a task by its `decoding`, from a look-up of whole texts.

    `passes` counts those that may answer; beginnings that prompts share may be read before.
    """

    def __init__(self, task, decoding: Decoding, count: int = 40):
        super().__init__()
        self.config = DecoderConfig()
        self.context = ModelContext(len(task.alphabet), 100)
        self.decoding = decoding
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.examples = task.examples("test", task.distinct("test", count))
        self.texts = [task.alphabet.encode(example.prompt + example.answer) for example in self.examples]
        self.shortest = min(len(task.alphabet.encode(example.prompt)) for example in self.examples)
        self.passes = 0

    def init_state(self, batch, max_length=None, device=None, dtype=None):
        return Rows([] for _ in range(batch))

    def forward(self, tokens_BT, state=None, *, lengths_B=None, **options):
        rows = state if state is not None else [[] for _ in tokens_BT]
        counts = [tokens_BT.shape[1]] * len(rows) if lengths_B is None else lengths_B.tolist()
        logits_BTV = torch.zeros(*tokens_BT.shape, self.context.vocab_size)
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            for t in range(count):
                row.append(int(tokens_BT[b, t]))
                known = [text for text in self.texts if text[: len(row)] == row]
                place = len(row) + self.decoding.shift
                if known and place < len(known[0]):
                    # With free lengths several texts may go on: the right one is known once the prompt is read.
                    logits_BTV[b, t, known[0][place]] = 9.0
        self.passes += min(map(len, rows)) >= self.shortest
        return logits_BTV, state


@pytest.mark.parametrize(("shift", "passes"), [(1, 3), (2, 2), (3, 2)])
def test_a_pass_gives_a_token_more_for_each_place_of_the_shift(shift, passes):
    task = AdditionConfig(format="delimited", min_digits=3).build()
    model = Knowing(task, Decoding(shift))
    prompts = [task.alphabet.encode(example.prompt) for example in model.examples]
    found = generate(model, prompts, end_id=task.alphabet.end_id, max_new_tokens=20, batch=50)
    assert [task.alphabet.decode(one.tokens) for one in found] == [example.answer for example in model.examples]
    assert all(one.finished for one in found)
    assert model.passes == passes


def test_the_worked_example_reads_its_answer_where_the_prompt_still_goes_on():
    # 21 + 378 = 399: place 6 gives 9, place 7 gives 9, the next pass gives 3 and the sign that ends it.
    task = AdditionConfig(format="delimited", min_digits=2).build()
    batch = task.collate([task.example_of([21, 378])]).shifted(1)
    scored = np.flatnonzero(batch.weights_BT[0])
    assert task.alphabet.decode(batch.tokens_BT[0]) == "+12+873+99"
    assert scored.tolist() == [6, 7, 8, 9]
    assert task.alphabet.decode(batch.targets_BT[0, scored]) == "993+"


def test_one_pass_over_the_prompt_gives_the_whole_answer():
    task = AdditionConfig(format="reversed", max_digits=3, zero_pad=True).build()
    config = run_config(
        task={"kind": "addition", "format": "reversed", "max_digits": 3, "zero_pad": True},
        train={"objective": "label_shift", "shift": 3},
    )
    objective = make_objective(config.train, task, config.model)
    assert objective.decoding == Decoding(3, 4)
    batch = objective.decoding.view(task.collate([task.example_of([99, 21])]), task.alphabet.pad_id)
    assert task.alphabet.decode(batch.tokens_BT[0]) == "990+120="
    assert task.alphabet.decode(batch.targets_BT[0][batch.weights_BT[0] > 0]) == "0210"
    model = Knowing(task, objective.decoding)
    prompts = [task.alphabet.encode(example.prompt) for example in model.examples]
    found = generate(model, prompts, end_id=task.alphabet.end_id, max_new_tokens=20, batch=50)
    assert [task.alphabet.decode(one.tokens) for one in found] == [example.answer for example in model.examples]
    assert model.passes == 1
    cut = generate(model, prompts[:1], end_id=task.alphabet.end_id, max_new_tokens=2)
    assert (len(cut[0].tokens), cut[0].finished) == (2, False)


@pytest.mark.parametrize(
    ("task", "allowed", "refused"),
    [
        (AdditionConfig(min_digits=2, max_digits=4), 2, 3),
        (AdditionConfig(max_digits=4), 1, 2),
        (AdditionConfig(max_digits=4, zero_pad=True), 4, 5),
        (AdditionConfig(format="plain", min_digits=3), 1, 2),
        (MultiplicationConfig(min_length=3, max_length=3), 3, 4),
        (MultiplicationConfig(chain=True), 1, 2),
        (SubtractionConfig(zero_pad=True, max_length=3), 3, 4),
        (SubtractionConfig(min_length=3), 1, 2),
    ],
)
def test_a_shift_that_asks_for_what_is_not_read_yet_is_refused_with_the_reason(task, allowed, refused):
    config = RunConfig(task=task)
    for shift in (allowed, refused):
        options = from_dict(type(config.train), {"objective": "label_shift", "shift": shift})
        if shift == allowed:
            assert make_objective(options, task.build(), config.model).decoding.shift == shift
        else:
            with pytest.raises(UserError, match=rf"train.shift: {shift} is not feasible: .* allowed: 1 to {allowed}"):
                make_objective(options, task.build(), config.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "label_shift"}, "shift: 0 is not allowed with objective label_shift; allowed: 1 or more"),
        ({"shift": 2}, "shift: 2 is not allowed with objective next_token"),
        ({"objective": "rollout", "rollout": {"temperature": 0}}, "temperature: expected a number above 0, got 0"),
        (
            {"objective": "rollout", "rollout": {"final_temperature": -1}},
            "final_temperature: expected a number above 0",
        ),
        ({"rollout": {"temperature": 2.0}}, "rollout: given with objective next_token"),
        ({"objective": "guess"}, "'guess' is not allowed"),
        ({"chain_removal": {"tokens": -1}}, "tokens: expected 0 or more"),
        ({"chain_removal": {"advance_at": 1.5}}, "advance_at"),
        (
            {"chain_removal": {"tokens": 2, "most_evaluations": 0}},
            "most_evaluations: expected 1 or more, or null, got 0",
        ),
        ({"chain_removal": {"tokens": 2, "smoothing": -1.0}}, "smoothing: expected 0"),
        ({"chain_removal": {"smoothing": 4.0}}, "smoothing: given without tokens or stages"),
        ({"chain_removal": {"reset_optimizer": True}}, "reset_optimizer: given without tokens or stages"),
        ({"chain_removal": {"warmup": 5}}, "warmup: given without tokens or stages"),
        ({"chain_removal": {"keep_brackets": True}}, "keep_brackets: given without tokens or stages"),
        ({"chain_removal": {"order": "sums_backwards"}}, "order: given without tokens or stages"),
        ({"chain_removal": {"tokens": 2, "order": "upwards"}}, "'upwards' is not allowed"),
        ({"chain_removal": {"tokens": 2, "warmup": -5}}, "warmup: expected 0 or more steps"),
        ({"chain_removal": {"tokens": 2, "stages": [3]}}, "stages: given beside tokens 2"),
        ({"chain_removal": {"stages": [3, 3]}}, "stages: expected ascending numbers of tokens"),
        ({"chain_removal": {"stages": [0, 3]}}, "stages: expected ascending numbers of tokens"),
    ],
)
def test_wrong_objectives_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        run_config(train=options)


PADDED = {"task": {"kind": "addition", "max_digits": 3, "zero_pad": True}}
SHIFT_3 = {"objective": "label_shift", "shift": 3}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"kind": "group_words"}, "train": {"objective": "rollout"}}, "labels the prompt's own places"),
        ({"task": {"kind": "group_words"}, "train": {"objective": "label_shift", "shift": 1}}, "is not feasible"),
        ({"model": {"kind": "prefix_scan"}, "train": {"objective": "rollout"}}, "'prefix_scan' does not"),
        ({"train": {"objective": "rollout", "prompt_loss": True}}, "prompt_loss"),
        ({"train": {"objective": "rollout", "compile": True}}, "compile"),
        ({"train": {"chain_removal": {"tokens": 2}}}, "have no chain"),
        (
            {
                "task": {"kind": "addition", "format": "column"},
                "train": {"chain_removal": {"tokens": 2, "order": "sums_backwards"}},
            },
            "chain_removal.order: sums_backwards needs sums in round brackets",
        ),
        ({"train": {"objective": "rollout"}, "model": {"positions": "block", "block_offset": 3}}, "block_offset"),
        ({"train": {"objective": "rollout"}, "model": {"checkpoint_activations": True}}, "checkpoint_activations"),
        (
            {**PADDED, "train": {**SHIFT_3, "curriculum": {"lengths": [2]}}},
            "lengths of 2: 3 is not feasible",
        ),
        ({**PADDED, "train": SHIFT_3, "evaluate": {"lengths": [2]}}, "evaluate.lengths of 2: 3 is not feasible"),
        (
            {**PADDED, "train": SHIFT_3, "evaluate": {"lengths": [4]}},
            "evaluate.lengths of 4: 3 gives whole answers of 4 tokens, these have 5",
        ),
    ],
)
def test_what_a_task_or_model_cannot_do_is_refused_before_training(sections, message):
    with pytest.raises(UserError, match=message):
        prepare(run_config(**sections))


def test_a_model_trained_on_shifted_labels_learns_and_says_how_it_is_read(tmp_path):
    config = run_config(
        task={"kind": "addition", "format": "reversed", "max_digits": 1, "min_digits": 1, "base": 4, "zero_pad": True,
              "test_fraction": 0.15, "validation_fraction": 0.15},
        model={"width": 32, "heads": 2, "positions": "learned", "layers": "attention*2"},
        train={"objective": "label_shift", "shift": 1, "steps": 120, "batch": 32, "learning_rate": 1e-2,
               "eval_every": 120, "threads": 1},
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    first, last = (
        [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"][place]["loss"] for place in (0, -1)
    )
    assert last < 0.3 * first
    model, _, task = load_model(tmp_path / "run" / "model")
    assert model.decoding == Decoding(1, 2)
    again = evaluate(model, task, EvaluateConfig())
    assert again["exact_match"] == result["evaluation"]["exact_match"]
    assert again["token_accuracy"] == result["evaluation"]["token_accuracy"]
    copy = tmp_path / "copy"
    save_model(copy, model, config.task)
    assert load_model(copy)[0].decoding == model.decoding


def read_metrics(folder) -> list[dict]:
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sampling_does_not_depend_on_the_rows_beside():
    task = AdditionConfig(format="delimited", min_digits=2, max_digits=3).build()
    torch.manual_seed(0)
    model = DecoderConfig(width=16, heads=2, positions="block").build(
        ModelContext(len(task.alphabet), 30, tuple(range(10)))
    )
    model.decoding = Decoding(2)
    prompts = [task.alphabet.encode(example.prompt) for example in task.examples("test", np.arange(7))]
    options = {"end_id": task.alphabet.end_id, "max_new_tokens": 9, "temperature": 1.3, "seed": 4}
    together = generate(model, prompts, **options)
    for batch in (1, 3):
        for one, other in itertools.zip_longest(together, generate(model, prompts, batch=batch, **options)):
            assert one.tokens == other.tokens
            assert len(one.tokens) <= 9
    with pytest.raises(UserError, match="3 or more before it answers"):
        generate(model, [[1, 2]], **options)


def test_scores_by_length_ask_for_the_tokens_that_a_place_tells():
    task = AdditionConfig(format="delimited", min_digits=3).build()
    model = Knowing(task, Decoding(2))
    sums = scores_by_length(model, task, EvaluateConfig(examples=40, lengths=(3,)))["3"]
    assert sums["exact_match"]["rate"] == 1.0
    assert sums["token_error"]["rate"] == 0.0
    with pytest.raises(UserError, match=r"evaluate\.lengths: 1: 2 is not feasible"):
        scores_by_length(model, task, EvaluateConfig(examples=40, lengths=(1,)))
