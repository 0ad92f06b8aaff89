"""Training on the model's own roll-out."""

import json

import numpy as np
import pytest
import torch

from trivium.config import from_dict
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.jsonl import JsonlConfig
from trivium.train import loop
from trivium.train.config import RunConfig
from trivium.train.loop import train
from trivium.train.objectives import NextToken, Rollout
from trivium.train.reads import Read

TASK = AdditionConfig(format="column", max_digits=2).build()
DEVICE = torch.device("cpu")


def small_model(layers: str = "attention*2", **options):
    torch.manual_seed(0)
    config = DecoderConfig(width=16, heads=2, positions="block", layers=layers, **options)
    return config.build(model_context(TASK, config)).double()


def tensors(read: Read) -> Read:
    return read.each(torch.from_numpy)


def drawn(objective: NextToken, count: int = 6, micro_batch: int | None = None) -> list[Read]:
    batch = TASK.batch("train", 0, count)
    return [
        tensors(read) for read in objective.reads(batch, objective.weights(batch), micro_batch, longest=None, pad_id=0)
    ]


def test_prompts_and_answers_are_taken_apart():
    objective = Rollout()
    prompts_BP, lengths_B, targets_BA, weights_BA = drawn(objective)[0][:4]
    for b, example in enumerate(TASK.examples("train", np.arange(6))):
        assert TASK.alphabet.decode(prompts_BP[b, : lengths_B[b]].tolist()) == example.prompt
        assert TASK.alphabet.decode(targets_BA[b, weights_BA[b] > 0].tolist()) == example.answer
    masked = drawn(Rollout(chain_loss=False))[0]
    for b, example in enumerate(TASK.examples("train", np.arange(6))):
        wanted = example.answer.partition("</think>")[2] or example.answer
        assert TASK.alphabet.decode(masked.targets_N[b, masked.weights_N[b] > 0].tolist()) == wanted


@pytest.mark.parametrize(
    "layers", ["attention*2", "attention + simplicial(window1=6, window2=3)", "gla", "gated_deltanet"]
)
def test_a_model_that_is_sure_of_the_right_answer_reads_it_as_if_it_were_given(layers):
    """At a low temperature the roll-out of right tokens has the logits, and the loss, of next-token training."""
    model, objective = small_model(layers), Rollout()
    read = drawn(objective)[0]
    answers = iter(read.targets_N.T)

    def right(logits_BV):
        next_B = next(answers)
        return torch.nn.functional.one_hot(next_B, logits_BV.shape[-1]).to(logits_BV), next_B

    object.__setattr__(objective, "sample", right)
    rolled = objective.loss_sum(*objective.predict(model, read))
    plain = NextToken()
    batch = TASK.batch("train", 0, 6)
    weights = plain.weights(batch)
    given = tensors(plain.reads(batch, weights, None, longest=None, pad_id=0)[0])
    forced = plain.loss_sum(*plain.predict(model, given))
    torch.testing.assert_close(rolled, forced, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (rolled, forced))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_soft_symbol_has_the_scale_of_a_hard_one():
    model = small_model()
    tokens_BT = torch.randint(len(TASK.alphabet), (3, 7), generator=torch.Generator().manual_seed(1))
    one_hot_BTV = torch.nn.functional.one_hot(tokens_BT, len(TASK.alphabet)).double()
    torch.testing.assert_close(model(tokens_BT, soft_BTV=one_hot_BTV)[0], model(tokens_BT)[0])
    state = model.init_state(3)
    torch.testing.assert_close(model(tokens_BT, state, soft_BTV=one_hot_BTV)[0], model(tokens_BT)[0])


def test_gradients_flow_through_what_is_read():
    """The first prediction's parameters get a gradient from a later token's loss."""
    model, objective = small_model(), Rollout()
    objective.begin_step(0.0, DEVICE)
    read = drawn(objective)[0]
    logits_NV, targets_N, weights_N = objective.predict(model, read)
    weights_BA = weights_N.view_as(read.targets_N).clone()
    weights_BA[:, 0] = 0
    # The answer's first token is predicted from the prompt alone: only what was read of it links it to the rest.
    first_BV = torch.zeros(len(weights_BA), logits_NV.shape[-1], dtype=torch.float64, requires_grad=True)
    seen = []

    def sample(logits_BV):
        soft_BV, chosen_B = Rollout.sample(objective, logits_BV + first_BV if not seen else logits_BV)
        seen.append(soft_BV)
        return soft_BV, chosen_B

    object.__setattr__(objective, "sample", sample)
    logits_NV, targets_N, _ = objective.predict(model, read)
    loss = objective.loss_sum(logits_NV, targets_N, weights_BA.flatten())
    (gradient,) = torch.autograd.grad(loss, first_BV)
    assert float(gradient.abs().max()) > 1e-8


@pytest.mark.parametrize("straight_through", [False, True])
def test_samples_sharpen_with_the_temperature(straight_through):
    objective = Rollout(start=4.0, end=0.01, straight_through=straight_through)
    logits_BV = torch.randn(200, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    peaks = []
    for fraction in (0.0, 0.5, 1.0):
        objective.begin_step(fraction, DEVICE)
        soft_BV, chosen_B = objective.sample(logits_BV)
        torch.testing.assert_close(soft_BV.sum(-1), torch.ones(200))
        assert torch.equal(soft_BV.argmax(-1), chosen_B)
        peaks.append(float(soft_BV.detach().max(-1).values.mean()))
        if straight_through:
            assert soft_BV.detach().unique().abs().sub(0.5).abs().sub(0.5).abs().max() < 1e-6  # zeros and ones
        (gradient,) = torch.autograd.grad((soft_BV**2).sum(), logits_BV, retain_graph=True)
        assert bool((gradient != 0).any())
    assert straight_through or peaks == sorted(peaks)
    assert peaks[-1] > 0.95


def test_the_temperature_goes_geometrically():
    objective = Rollout(start=2.0, end=0.5)
    for fraction, expected in ((0.0, 2.0), (0.5, 1.0), (1.0, 0.5)):
        objective.begin_step(fraction, DEVICE)
        assert float(objective._temperature[0]) == pytest.approx(expected)


def test_noise_is_gumbels():
    """At temperature 0 sampling is drawing from the softmax: that is what Gumbel noise is for."""
    objective = Rollout(start=1e-3, end=1e-3)
    objective.begin_step(0.0, DEVICE)
    torch.manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    _, chosen_B = objective.sample(logits_V.expand(20_000, 3))
    shares = torch.bincount(chosen_B, minlength=3) / 20_000
    torch.testing.assert_close(shares, logits_V.softmax(-1), rtol=0, atol=0.015)


def test_a_rolled_out_model_learns_and_parts_of_a_batch_change_nothing(tmp_path):
    sections = {
        "task": {"kind": "addition", "format": "reversed", "max_digits": 1, "base": 4,
                 "test_fraction": 0.15, "validation_fraction": 0.15},
        "model": {"width": 32, "heads": 2, "positions": "block", "layers": "attention*1"},
        "train": {"objective": "rollout", "rollout": {"temperature": 1.0, "final_temperature": 0.1}, "steps": 80,
                  "batch": 32, "learning_rate": 1e-2, "eval_every": 80, "log_every": 1, "threads": 1},
    }  # fmt: skip
    train(from_dict(RunConfig, sections), tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    read, parts = drawn(Rollout(), 6), drawn(Rollout(), 6, micro_batch=2)
    assert len(parts) == 3
    assert all(torch.equal(torch.cat([part[i] for part in parts]), read[0][i]) for i in range(4))


def losses_of(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_killed_roll_out_resumes_to_the_same_losses(tmp_path, monkeypatch):
    def sections(steps_saved: int) -> RunConfig:
        return from_dict(
            RunConfig,
            {
                "task": {"kind": "addition", "max_digits": 1},
                "model": {"width": 16, "heads": 2, "layers": "attention*1"},
                "train": {"objective": "rollout", "rollout": {"temperature": 2.0, "final_temperature": 0.5}, "steps": 6,
                          "batch": 8, "log_every": 1, "save_every": steps_saved, "eval_every": 6, "threads": 1},
            },
        )  # fmt: skip

    train(sections(3), tmp_path / "whole")

    def stop(progress):
        if progress.step >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(sections(3), tmp_path / "cut", on_progress=stop)
    train(sections(3), tmp_path / "cut")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")


def test_a_long_prompt_beside_a_long_answer_needs_no_more_positions_than_each_text(tmp_path):
    for split in ("train", "validation", "test"):
        rows = [{"prompt": split[:2] * 10, "answer": "a"}, {"prompt": split[:2], "answer": "ab" * 9}]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonlConfig(*(tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test"))).build()
    config = DecoderConfig(width=16, heads=2, positions="learned")
    model, objective = config.build(model_context(task, config)), Rollout()
    objective.begin_step(0.0, DEVICE)
    batch = task.batch("train", 0, 2)
    weights = objective.weights(batch)
    (read,) = objective.reads(batch, weights, None, longest=None, pad_id=task.alphabet.pad_id)
    assert read.tokens_BT.shape[1] + read.targets_N.shape[1] > task.max_length
    loss = objective.loss_sum(*objective.predict(model, tensors(read)))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
