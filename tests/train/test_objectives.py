import numpy as np
import pytest
import torch

from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, Batch
from trivium.train import objectives
from trivium.train.config import TrainConfig
from trivium.train.objectives import NextToken, make_objective

REGIONS = np.array([[PROMPT, CHAIN, ANSWER, PAD]], dtype=np.uint8)
BATCH = Batch(
    tokens_BT=np.array([[0, 1, 2, 3]]),
    targets_BT=np.array([[1, 2, 3, 3]]),
    weights_BT=np.array([[0, 1, 1, 0]], dtype=np.float32),
    regions_BT=REGIONS,
    lengths_B=np.array([3]),
    prompt_lengths_B=np.array([2]),
)


def test_regions_are_scored_or_masked_by_option():
    assert NextToken().weights(BATCH).tolist() == [[0, 1, 1, 0]]
    assert NextToken(chain_loss=False).weights(BATCH).tolist() == [[0, 0, 1, 0]]
    assert NextToken(prompt_loss=True).weights(BATCH).tolist() == [[1, 1, 1, 0]]


def test_the_loss_is_the_weighted_sum_of_negative_log_probabilities():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets, weights = torch.from_numpy(BATCH.targets_BT).flatten(), torch.tensor([0.0, 0.5, 2.0, 0.0])
    log_p = logits.log_softmax(-1)
    expected = -0.5 * log_p[1, 2] - 2.0 * log_p[2, 3]
    loss = NextToken().loss_sum(logits, targets, weights)
    assert torch.allclose(loss, expected)
    halves = NextToken().loss_sum(logits.bfloat16(), targets, weights)
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("prompt_loss", [False, True], ids=["some places", "every place"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_is_trained_without_logits_and_with_the_same_gradients(prompt_loss: bool, tied: bool):
    task = AdditionConfig(max_digits=2, zero_pad=True).build()
    config = DecoderConfig(width=16, heads=2, tied=tied)
    torch.manual_seed(0)
    model = config.build(model_context(task, config)).double()
    batch = task.batch("train", 0, 8)
    gradients = []
    for large in (False, True):
        objective = NextToken(prompt_loss=prompt_loss, large=large)
        (read,) = objective.reads(batch, objective.weights(batch), None, longest=None, pad_id=task.alphabet.pad_id)
        loss = objective.read_loss(model, read.each(torch.from_numpy))
        gradients.append([loss.detach().double(), *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)


def test_a_vocabulary_counts_as_large_by_its_symbols(monkeypatch: pytest.MonkeyPatch):
    task = AdditionConfig(max_digits=2).build()
    assert not make_objective(TrainConfig(), task, DecoderConfig()).large
    monkeypatch.setattr(objectives, "LARGE", 10)
    assert make_objective(TrainConfig(), task, DecoderConfig()).large
    assert not make_objective(TrainConfig(), task, PrefixScanConfig()).large  # its forward has no hidden states to give
