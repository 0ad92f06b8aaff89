import numpy as np
import torch

from trivium.tasks.base import ANSWER, CHAIN, PAD, PROMPT, Batch
from trivium.train.objectives import NextToken

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
