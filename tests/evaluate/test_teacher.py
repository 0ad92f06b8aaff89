import math

import numpy as np
import pytest
import torch

from tests.scripted import ScriptedModel, solver
from trivium.evaluate import teacher
from trivium.evaluate.answers import evaluate
from trivium.evaluate.config import EvaluateConfig
from trivium.evaluate.teacher import loss_weights, teacher_forced
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import CHAIN, PROMPT

FORMATS = ("plain", "reversed", "delimited", "column", "reversed_chain")


def sometimes_wrong(example, written):
    """The right answer, but for every third sum one wrong digit in it."""
    answer = example.answer
    number = sum(map(ord, example.prompt))
    if number % 3:
        return answer
    places = [place for place, symbol in enumerate(answer) if symbol.isdigit()]
    place = places[number % len(places)]
    return answer[:place] + str((int(answer[place]) + 1) % 10) + answer[place + 1 :]


def trained_looking_decoder(task, **settings):
    config = DecoderConfig(width=16, heads=2, positions="block", **settings)
    torch.manual_seed(0)
    model = config.build(model_context(task, config)).double()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that a mistake shows
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_a_perfect_model_scores_perfectly(format):
    task = AdditionConfig(format=format).build()
    scores = teacher_forced(solver(task, lambda example, _: example.answer), task, "test", range(30))
    nothing = pytest.approx(0, abs=1e-6)
    assert scores == {"loss": nothing, "answer_loss": nothing, "token_accuracy": 1, "exact_match": 1, "count": 30}


@pytest.mark.parametrize("format", ["plain", "reversed", "delimited"])
def test_exact_match_equals_that_of_greedy_generation(format):
    task = AdditionConfig(format=format).build()
    model = solver(task, sometimes_wrong)
    indices = task.distinct("test", 60)
    forced = teacher_forced(model, task, "test", indices, batch=17)
    generated = evaluate(model, task, EvaluateConfig(examples=60))
    assert forced["exact_match"] == generated["exact_match"]["rate"]
    assert 0.4 < forced["exact_match"] < 0.9
    assert forced["exact_match"] < forced["token_accuracy"] < 1
    assert generated["token_accuracy"] == forced["token_accuracy"]


def test_the_size_of_the_batch_changes_nothing():
    task = AdditionConfig(format="column", max_digits=4).build()
    model = trained_looking_decoder(task)
    whole = teacher_forced(model, task, "validation", range(40), batch=40, prompt_loss=True)
    for batch in (1, 7, 39):
        part = teacher_forced(model, task, "validation", range(40), batch=batch, prompt_loss=True)
        assert part == pytest.approx(whole, rel=1e-6)  # losses are float32
        assert part["token_accuracy"] == whole["token_accuracy"]
    assert 0 < whole["token_accuracy"] < 1


def test_the_loss_is_the_mean_over_scored_tokens():
    task = AdditionConfig(format="reversed").build()
    uniform = ScriptedModel(lambda history: torch.zeros(len(task.alphabet)), len(task.alphabet), task.max_length)
    assert teacher_forced(uniform, task, "test", range(9))["loss"] == pytest.approx(math.log(len(task.alphabet)))

    batch = task.batch("test", 0, 9)
    model = trained_looking_decoder(task)
    log_BTV = model(torch.from_numpy(batch.tokens_BT))[0].log_softmax(-1).detach().numpy()
    scored = [(b, t) for b in range(9) for t in range(batch.prompt_lengths_B[b] - 1, batch.lengths_B[b])]
    expected = -np.mean([log_BTV[b, t, batch.targets_BT[b, t]] for b, t in scored])
    right = np.mean([log_BTV[b, t].argmax() == batch.targets_BT[b, t] for b, t in scored])
    scores = teacher_forced(model, task, "test", range(9))
    assert scores["loss"] == pytest.approx(expected, rel=1e-6)
    assert scores["token_accuracy"] == pytest.approx(right)


def test_a_masked_chain_counts_for_nothing():
    task = AdditionConfig(format="column", min_digits=2).build()

    def wrong_chain(example, written):
        head, answer = example.answer.split("</think>")
        return head.replace("=", "+") + "</think>" + answer

    model = solver(task, wrong_chain)
    with_chain = teacher_forced(model, task, "test", range(20))
    without = teacher_forced(model, task, "test", range(20), chain_loss=False)
    assert (with_chain["exact_match"], without["exact_match"]) == (0, 1)
    assert with_chain["loss"] > 1 > without["loss"]
    assert with_chain["token_accuracy"] < 1 == without["token_accuracy"]


def test_a_scored_prompt_counts_for_the_loss_alone():
    task = AdditionConfig(format="reversed").build()
    model = solver(task, lambda example, _: example.answer)  # cannot guess the prompt
    scores = teacher_forced(model, task, "test", range(20), prompt_loss=True)
    assert scores["loss"] > 1
    assert (scores["token_accuracy"], scores["exact_match"]) == (1, 1)


def test_weights_follow_the_regions():
    task = AdditionConfig(format="column").build()
    batch = task.batch("test", 0, 20)
    plain, masked = loss_weights(batch), loss_weights(batch, chain_loss=False)
    prompted = loss_weights(batch, prompt_loss=True)
    assert np.array_equal(plain, batch.weights_BT)
    assert np.array_equal(plain != masked, batch.regions_BT == CHAIN)
    assert np.array_equal(plain != prompted, batch.regions_BT == PROMPT)
    assert all(weights.dtype == np.float32 for weights in (plain, masked, prompted))


def test_scores_are_taken_in_eval_mode_which_is_then_left():
    task = AdditionConfig().build()
    model = trained_looking_decoder(task, dropout=0.5).train()
    scores = [teacher_forced(model, task, "test", range(20)) for _ in range(2)]
    assert scores[0] == scores[1]
    assert all(module.training for module in model.modules())


def test_autocast_is_entered_around_the_model():
    task = AdditionConfig().build()
    model = trained_looking_decoder(task).float()
    plain = teacher_forced(model, task, "test", range(50))
    cast = teacher_forced(model, task, "test", range(50), autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    assert cast["loss"] != plain["loss"]
    assert cast["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_no_problems_is_an_error():
    task = AdditionConfig().build()
    with pytest.raises(ValueError, match="no problem"):
        teacher_forced(solver(task, sometimes_wrong), task, "test", [])


def test_a_vocabulary_whose_logits_do_not_fit_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch):
    task = AdditionConfig(max_digits=2).build()
    model = DecoderConfig(width=16, heads=2).build(model_context(task, DecoderConfig()))
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    whole = teacher_forced(model, task, "test", np.arange(10))
    tokens = task.batch("test", 0, 10).tokens_BT.shape[1]
    monkeypatch.setattr(teacher, "LOGITS", 3 * tokens * len(task.alphabet))
    parts = teacher_forced(model, task, "test", np.arange(10))
    assert rows == [10, 3, 3, 3, 1]
    assert parts == pytest.approx(whole)
