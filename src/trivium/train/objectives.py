"""What is minimised. Shapes: B rows, T tokens, V vocabulary."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from trivium.evaluate.teacher import loss_weights
from trivium.tasks.base import Batch


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, each target weighted by the task and by the region it lies in."""

    chain_loss: bool = True
    prompt_loss: bool = False

    def weights(self, batch: Batch) -> np.ndarray:
        """Return weights_BT (float32): the chain's are 0 without `chain_loss`, the prompt's 1 with `prompt_loss`."""
        return loss_weights(batch, chain_loss=self.chain_loss, prompt_loss=self.prompt_loss)

    def loss_sum(self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        """Return, for N tokens, the weighted sum (not the mean) of the cross-entropies, in nats, in float32.

        The caller divides by the weight of the whole batch, over all its parts and devices, so that accumulation
        and several processes give the loss and gradients of one pass.
        """
        losses = cross_entropy(logits_NV.float(), targets_N, reduction="none")
        return (losses * weights_N).sum()  # not a dot product, which autocast would round
