"""What is minimised: the next token, a token further ahead, or the model's own roll-out; and what of a chain is read.

Shapes: B rows, T tokens, N scored tokens, P tokens of the longest prompt, A of the longest answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from trivium.config import UserError
from trivium.evaluate.teacher import loss_weights
from trivium.model.base import Decoding, ModelConfig
from trivium.ops.vocabulary_loss import LARGE, vocabulary_loss
from trivium.tasks.base import ANSWER, CHAIN, Batch, Task
from trivium.tasks.shortened import Backwards
from trivium.train.config import TrainConfig
from trivium.train.reads import Read, reads, room

LOOKED_AT = 256  # problems that are looked through for a chain of thought


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, each target weighted by the task and by the region it lies in.

    With a shift in `decoding`, of the token so many places behind it, which makes that many more a pass. Where one pass
    then gives the whole answer, only the prompt is read, and no end symbol is asked for. `large` says that the
    vocabulary is, and that the loss is made from hidden states, without keeping logits.
    """

    chain_loss: bool = True
    prompt_loss: bool = False
    decoding: Decoding = field(default_factory=Decoding)
    large: bool = False

    def weights(self, batch: Batch) -> np.ndarray:
        """Return weights_BT (float32): the chain's are 0 without `chain_loss`, the prompt's 1 with `prompt_loss`."""
        return loss_weights(batch, chain_loss=self.chain_loss, prompt_loss=self.prompt_loss)

    def reads(
        self, batch: Batch, weights_BT: np.ndarray, micro_batch: int | None, *, longest: int | None, pad_id: int
    ) -> list[Read]:
        """Return what each forward pass of a step reads, see `train.reads`."""
        return reads(batch, weights_BT, micro_batch, longest=longest, pad_id=pad_id)

    def begin_step(self, fraction: float, device: torch.device) -> None:
        """Prepare for the step that begins when `fraction` of the run is done."""

    def read_loss(self, forward: nn.Module, read: Read) -> Tensor:
        """Return the weighted sum of the losses of one forward pass, which runs under the caller's autocast."""
        if not self.large:
            return self.loss_sum(*self.predict(forward, read))
        # Where every place is scored they are in order: there is nothing to pick.
        wanted_N = None if len(read.wanted_N) == read.tokens_BT.numel() else read.wanted_N
        x, weight_VD = forward(read.tokens_BT, wanted_N=wanted_N, hidden=True, **read.given())
        return vocabulary_loss(x.view(-1, x.shape[-1]), weight_VD, read.targets_N, read.weights_N)

    def predict(self, forward: nn.Module, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits_NV, targets_N, weights_N) of one forward pass."""
        logits_NV, _ = forward(read.tokens_BT, wanted_N=read.wanted_N, **read.given())
        return logits_NV, read.targets_N, read.weights_N

    def loss_sum(self, logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        """Return, for N tokens, the weighted sum (not the mean) of the cross-entropies, in nats, in float32.

        The caller divides by the weight of the whole batch, over all its parts and devices, so that accumulation
        and several processes give the loss and gradients of one pass.
        """
        losses = cross_entropy(logits_NV.float(), targets_N, reduction="none")
        return (losses * weights_N).sum()  # not a dot product, which autocast would round


@dataclass(frozen=True)
class Rollout(NextToken):
    """Cross-entropy on a free-running roll-out: behind the prompt the model reads what it predicted itself, as a
    Gumbel-softmax sample at a temperature, so that gradients flow through what it reads (arXiv 1611.01144).

    The roll-out goes through the functional streaming state, a token a step. With `straight_through` the sample that
    is read is one symbol, and its gradient that of the soft one.
    """

    start: float = 1.0
    end: float = 1.0
    straight_through: bool = False
    # Kept on the device, so that a captured step sees it change.
    _temperature: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def begin_step(self, fraction: float, device: torch.device) -> None:
        if not self._temperature:
            self._temperature.append(torch.zeros((), device=device))
        self._temperature[0].fill_(self.start * (self.end / self.start) ** min(max(fraction, 0.0), 1.0))

    def reads(
        self, batch: Batch, weights_BT: np.ndarray, micro_batch: int | None, *, longest: int | None, pad_id: int
    ) -> list[Read]:
        """Return for each pass a Read of (prompts_BP, their lengths (B,), answers_BA, weights_BA)."""
        prompts_B = batch.prompt_lengths_B
        rows, places = batch.tokens_BT.shape
        answers = int((batch.lengths_B - prompts_B).max(initial=0)) + 1
        width = int(prompts_B.max(initial=1))
        if longest is not None:
            width, answers = min(room(width), longest), room(answers)
        prompts_BP = np.full((rows, width), pad_id, dtype=np.int64)
        shared = min(width, places)
        prompts_BP[:, :shared] = batch.tokens_BT[:, :shared]
        prompts_BP[np.arange(width) >= prompts_B[:, None]] = pad_id
        # The target at place t is token t + 1: the answer's first is that of the prompt's last place.
        from_BA = prompts_B[:, None] - 1 + np.arange(answers)
        inside_BA = from_BA < places
        from_BA = np.minimum(from_BA, places - 1)
        targets_BA = np.take_along_axis(batch.targets_BT, from_BA, axis=1)
        answer_BT = np.isin(batch.regions_BT, (CHAIN, ANSWER))
        chosen_BT = np.where(answer_BT, weights_BT, np.float32(0))
        weights_BA = np.where(inside_BA, np.take_along_axis(chosen_BT, from_BA, axis=1), np.float32(0))
        part = micro_batch or rows
        return [
            Read(*(array[start : start + part] for array in (prompts_BP, prompts_B, targets_BA, weights_BA)))
            for start in range(0, rows, part)
        ]

    def predict(self, forward: nn.Module, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        prompts_BP, lengths_B, targets_BA, weights_BA = read[:4]
        model: Any = forward
        rows, answers = targets_BA.shape
        state = model.init_state(rows, max_length=prompts_BP.shape[1] + answers)
        logits_BPV, state = model(prompts_BP, state, lengths_B=lengths_B)
        logits_BV = logits_BPV[torch.arange(rows, device=prompts_BP.device), lengths_B - 1]
        predicted = [logits_BV]
        # Rows end with what is scored of them: beyond that a long prompt would run out of positions.
        left_BA = weights_BA.flip(1).cumsum(1).flip(1) > 0
        for place in range(1, answers):
            soft_BV, chosen_B = self.sample(logits_BV)
            logits_B1V, state = model(
                chosen_B[:, None], state, lengths_B=left_BA[:, place].long(), soft_BTV=soft_BV[:, None]
            )
            logits_BV = logits_B1V[:, 0]
            predicted.append(logits_BV)
        return torch.stack(predicted, dim=1).flatten(0, 1), targets_BA.flatten(), weights_BA.flatten()

    def sample(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Return distributions (B, V) over the symbols, softmax((logits + noise) / temperature), and their modes."""
        logits_BV = logits_BV.float()
        noise_BV = -torch.empty_like(logits_BV).exponential_().clamp_min(1e-20).log()
        soft_BV = ((logits_BV + noise_BV) / self._temperature[0]).softmax(-1)
        chosen_B = soft_BV.argmax(-1)
        if self.straight_through:
            soft_BV = one_hot(chosen_B, soft_BV.shape[-1]).to(soft_BV) - soft_BV.detach() + soft_BV
        return soft_BV, chosen_B


def make_objective(
    options: TrainConfig, task: Task, model: ModelConfig, processes: int = 1, lengths: Sequence[int] = ()
) -> NextToken:
    """Return what a run minimises; raise UserError for what its task or model, or a problem of `lengths`, cannot do."""
    large = len(task.alphabet) >= LARGE and model.gives_hidden
    scored: dict[str, Any] = {"chain_loss": options.chain_loss, "prompt_loss": options.prompt_loss}
    if options.chain_removal.shortens and not has_chain(task):
        raise UserError("train.chain_removal: the problems of this task have no chain of thought to shorten")
    if options.objective == "label_shift":
        decoding = decoding_of(options, task)
        if options.chain_removal.shortens:
            raise UserError("train.chain_removal: a chain is shortened for next tokens only, not with label_shift")
        for stage in options.curriculum.lengths:
            check_shift(decoding, task.staged(stage), f"train.shift: with train.curriculum.lengths of {stage}: ")
        for length in lengths:
            check_shift(decoding, task.at_length(length), f"train.shift: with evaluate.lengths of {length}: ")
        return NextToken(**scored, decoding=decoding, large=large)
    if options.objective == "rollout":
        if task.labels:
            raise UserError("train.objective: rollout continues a prompt, and this task labels the prompt's own places")
        if not model.reads_distributions:
            raise UserError(f"train.objective: rollout needs a model that reads distributions; {model.kind!r} does not")
        if options.prompt_loss:
            raise UserError("train.prompt_loss: a roll-out begins behind the prompt, whose tokens it does not predict")
        if processes > 1:
            raise UserError(f"train.objective: rollout trains in one process, not in {processes}")
        if options.compile:
            raise UserError("train.compile: a roll-out streams, and its steps are not compiled; allowed: false")
        if getattr(model, "block_offset", 0):
            raise UserError("model.block_offset: a roll-out streams, and offsets are of whole texts; allowed: 0")
        if getattr(model, "checkpoint_activations", False):
            raise UserError("model.checkpoint_activations: a roll-out streams and keeps them; allowed: false")
        rollout = options.rollout
        return Rollout(
            **scored,
            decoding=decoding_of(options, task),
            start=rollout.temperature,
            end=rollout.final_temperature or rollout.temperature,
            straight_through=rollout.straight_through,
        )
    return NextToken(**scored, decoding=decoding_of(options, task), large=large)


def has_chain(task: Task) -> bool:
    """Say whether problems of the task have a chain of thought."""
    size = task.size("train")
    return bool((task.batch("train", 0, LOOKED_AT if size is None else min(size, LOOKED_AT)).regions_BT == CHAIN).any())


def decoding_of(options: TrainConfig, task: Task) -> Decoding:
    """Return how a model trained with `options` is read; raise UserError for a shift that the task makes infeasible."""
    if options.objective != "label_shift":
        removal = options.chain_removal
        backwards = _sums_backwards(task) if removal.order == "sums_backwards" else None
        return Decoding(backwards=backwards, keep_brackets=removal.keep_brackets)
    whole = task.answer_tokens is not None and options.shift + 1 >= task.answer_tokens
    decoding = Decoding(options.shift, task.answer_tokens if whole else None)
    check_shift(decoding, task, "train.shift: ")
    return decoding


def _sums_backwards(task: Task) -> Backwards:
    """Return that the numbers in round brackets go from their last digit on; UserError for a task without brackets."""
    alphabet = task.alphabet
    try:
        opening, closing = (alphabet.id_of(symbol) for symbol in "()")
    except KeyError:
        raise UserError(
            "train.chain_removal.order: sums_backwards needs sums in round brackets, and this task writes none; "
            "allowed: written"
        ) from None
    return Backwards(opening, closing, alphabet.digit_ids)


def check_shift(decoding: Decoding, task: Task, where: str) -> None:
    """Raise UserError, with `where` in front, unless problems of `task` can be answered so many tokens a pass."""
    try:
        decoding.check(task)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
