"""Greedy and sampled decoding from the model's streaming state: each token is read once, a prefix never again.

Shapes: B rows of a batch, T tokens of the longest prompt, N tokens that may be generated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trivium.config import UserError
from trivium.generate.answers import Found, Prompts, Wanted, room_needed
from trivium.generate.eager import EagerAnswers
from trivium.generate.fixed import FixedAnswers
from trivium.generate.sampling import Generation, computing_in
from trivium.mixers.cache import autocast_dtype
from trivium.model.base import LanguageModel


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 256,
    probabilities: bool = False,
) -> list[Generation]:
    """Continue each of `prompts` (token ids, any lengths), `batch` side by side; results in the given order.

    A row ends with `end_id`, after `max_new_tokens`, or when the model can read no further. Temperature 0 takes the
    most probable token; above it, a row's sample depends on (seed, its index in `prompts`) and not on the rows beside
    it. A model with a shift (`LanguageModel.decoding`) gives several tokens a pass. Raises UserError for a negative
    temperature, an empty prompt and one longer than the model reads. Under autocast products are made in its dtype.
    """
    options = {"temperature": temperature, "seed": seed, "batch": batch, "probabilities": probabilities}
    return Generator(model, end_id=end_id, max_new_tokens=max_new_tokens, **options)(prompts)


class Generator:
    """`generate` for many calls: on a CUDA device it keeps states and graphs, which the next call finds again.

    The model's weights may change between calls, and the device that it lies on: what was kept is then made anew.
    Arguments and errors are those of `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        end_id: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 256,
        probabilities: bool = False,
    ):
        if not temperature >= 0 or temperature == float("inf"):
            raise UserError(f"temperature {temperature}: expected a finite number of at least 0 (0 is greedy)")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens}: expected a positive whole number")
        if batch < 1:
            raise UserError(f"batch {batch}: expected a positive whole number")
        # Where each pass gives several tokens, their shares come with them.
        self.wanted = Wanted(end_id, temperature, seed, probabilities or model.decoding.shift > 0)
        self.model, self.max_new_tokens, self.batch = model, max_new_tokens, batch
        self._kept: dict[tuple[int, torch.dtype | None], FixedAnswers] = {}  # by rows and autocast's dtype
        self._modules = tuple(model.modules())
        # One parameter tells where the model lies; to look for it at each call would take as long as 1 % of a call.
        self._told_by = next(
            ((owner, name) for owner in self._modules for name, _ in owner.named_parameters(recurse=False)), None
        )
        # As it lay at the last call; held, its address is given to no other, and to be met again means to have stayed.
        self._lay: torch.Tensor | None = None

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        """Continue each of `prompts`; results in the given order."""
        if not len(prompts):
            return []
        lengths_B = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self._check(lengths_B)  # before tokens are put into one tensor, where an empty prompt would have some
        tokens_BT = np.full((len(prompts), int(lengths_B.max())), self.wanted.end_id, dtype=np.int64)
        inside_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
        tokens_BT[inside_BT] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        tokens_BN, counts_B, finished_B, shares_BN = self.arrays(torch.from_numpy(tokens_BT), lengths_B)
        shares = [None] * len(tokens_BN) if shares_BN is None else shares_BN.tolist()
        columns = zip(tokens_BN.tolist(), counts_B.tolist(), finished_B.tolist(), shares, strict=True)
        return [
            Generation(tokens[:count], share[:count] if share else None, finished)
            for tokens, count, finished, share in columns
        ]

    def arrays(
        self, tokens_BT: Tensor, lengths_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Continue left-aligned prompts of `lengths_B` tokens (None: all T), `batch` side by side.

        Returns tokens (B, N) int64, filled up with end tokens, how many of them each row has (B,), whether its end
        token is the last of these (B,), and the model's own probabilities (B, N), if they are wanted.
        """
        model, whole, count, device = self.model, self.model.decoding.answer_tokens, len(tokens_BT), self._device()
        if lengths_B is None:
            lengths_B = np.array([tokens_BT.shape[1]])
        shortest, longest = self._check(lengths_B)
        if shortest == longest:  # what rows of one length may get is found once
            lengths_B = lengths_B[:1]
        budgets_B = self._budgets(lengths_B)
        room = room_needed(lengths_B, budgets_B, model.decoding.shift + 1)
        lengths_B, budgets_B = (x if len(x) == count else np.repeat(x, count) for x in (lengths_B, budgets_B))
        answers = self._answers(device, room, min(self.batch, count)) if served_at_once(device) else None
        answers = answers or EagerAnswers(model, self.wanted)
        found: list[Found] = []
        dtype, order_B = autocast_dtype(device) or torch.float32, np.arange(count)
        with evaluating(model, self._modules), torch.inference_mode(), computing_in(device, dtype):
            if count <= self.batch:
                found.append(answers(Prompts(tokens_BT[:, :longest], lengths_B, budgets_B, order_B)))
            else:
                # Rows of like length side by side need no padding and end together; like ones begin alike.
                order_B = np.lexsort((*tokens_BT.cpu().numpy().T[::-1], lengths_B))
                for start in range(0, count, self.batch):
                    rows = order_B[start : start + self.batch]
                    tokens = tokens_BT[torch.from_numpy(rows)][:, : int(lengths_B[rows].max())]
                    found.append(answers(Prompts(tokens, lengths_B[rows], budgets_B[rows], rows)))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what was found is on its way
        tokens_BN = _joined([each.tokens_BN for each in found], self.wanted.end_id, order_B)
        shares_BN = _joined([each.shares_BN for each in found], 0, order_B)
        counts_B = _joined([each.counts_B for each in found], 0, order_B)
        assert tokens_BN is not None
        if whole:
            return _with_end(tokens_BN, shares_BN, whole, self.max_new_tokens, self.wanted.end_id)
        if counts_B is None:
            ended_BN = tokens_BN == self.wanted.end_id
            # What a row holds behind its end is what it was fed while it waited for the others.
            counts_B = np.where(ended_BN.any(1), ended_BN.argmax(1) + 1, tokens_BN.shape[1])
            counts_B = np.minimum(counts_B, budgets_B)
            tokens_BN = np.where(np.arange(tokens_BN.shape[1]) < counts_B[:, None], tokens_BN, self.wanted.end_id)
        last_B = np.arange(0, tokens_BN.size, tokens_BN.shape[1]) + counts_B - 1
        finished_B = tokens_BN.ravel().take(last_B) == self.wanted.end_id
        return tokens_BN, counts_B, finished_B, shares_BN

    def _check(self, lengths_B: np.ndarray) -> tuple[int, int]:
        """Return the shortest and the longest length; raise UserError for prompts that the model cannot read."""
        room, least = longest_input(self.model), self.model.decoding.shift + 1
        lengths = int(lengths_B.min()), int(lengths_B.max())
        for length in lengths:
            check_length(length, room, least=least)
        return lengths

    def _budgets(self, lengths_B: np.ndarray) -> np.ndarray:
        """Return how many tokens each row may get: a pass fits when all that it reads does."""
        per_pass, whole = self.model.decoding.shift + 1, self.model.decoding.answer_tokens
        if whole:
            return np.full(len(lengths_B), min(self.max_new_tokens, per_pass), dtype=np.int64)
        passes_B = 1 + (longest_input(self.model) - lengths_B) // per_pass
        return np.minimum(self.max_new_tokens, passes_B * per_pass)

    def _device(self) -> torch.device:
        """Return where the model lies; what was kept of a model that has moved since reads memory that is another's."""
        if self._told_by is None:
            return torch.device("cpu")
        parameter, lay = getattr(*self._told_by), self._lay
        if lay is None or lay.data_ptr() != parameter.data_ptr() or lay.device != parameter.device:
            self._kept.clear()
            self._lay = parameter.detach()
        return parameter.device

    def _answers(self, device: torch.device, room: int, rows: int) -> FixedAnswers:
        """Return what answers prompts that take, with their answers, so much room, `rows` at a time."""
        dtype = autocast_dtype(device)
        fitting = sorted(
            held for (held, of), kept in self._kept.items() if held >= rows and of == dtype and kept.room >= room
        )
        kept = self._kept[fitting[0], dtype] if fitting else None
        if kept is None:
            mode = "graph" if device.type == "cuda" else "fixed"
            kept = FixedAnswers(self.model, self.wanted, rows, room, self.max_new_tokens, mode)
            self._kept[rows, dtype] = kept
        return kept


def served_at_once(device: torch.device) -> bool:
    """Say whether one state of fixed shape serves all batches of a call, as captured passes need it."""
    return device.type == "cuda"


def longest_input(model: LanguageModel) -> int:
    """Return the number of tokens that `model` can read in one sequence."""
    return getattr(model.config, "max_length", None) or model.context.max_length


def check_length(prompt: int, room: int, answer: int = 0, least: int = 1) -> None:
    """Raise UserError unless a model that reads `room` tokens can read the prompt and write the answer after it.

    Lengths are in tokens. The last token of an answer is predicted and never read. A model with a shift reads `least`
    tokens before it answers.
    """
    if prompt < 1:
        raise UserError("empty prompt: give the model at least one token to continue")
    if prompt < least:
        raise UserError(f"a prompt of {prompt} tokens: this model reads {least} or more before it answers")
    if prompt > room:
        raise UserError(f"expression too long for the model: {prompt} tokens, the model reads at most {room}")
    if answer and prompt + answer - 1 > room:
        raise UserError(
            f"expression too long for the model: {prompt} tokens and {answer} of its answer, "
            f"the model reads at most {room}"
        )


@contextmanager
def evaluating(model: nn.Module, modules: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Put every module of `model` into eval mode, and each back into its own afterwards.

    `modules` are all of them, where the caller has them: finding them takes longer than a small model's token.
    """
    training = [module for module in modules or model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _joined(parts: Sequence[Tensor | None], fill: int, order: np.ndarray) -> np.ndarray | None:
    """Return the rows of the parts, which lie in `order`, as they were given; narrower ones are filled up."""
    arrays = [part.cpu().numpy() for part in parts if part is not None]
    if not arrays:
        return None
    if len(arrays) == 1:
        return arrays[0].copy()  # what pinned memory there is goes back
    width = max(array.shape[-1] for array in arrays) if arrays[0].ndim == 2 else 0
    wide = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill) if width else x for x in arrays]
    return np.concatenate(wide)[np.argsort(order)]


def _with_end(
    tokens_BN: np.ndarray, shares_BN: np.ndarray | None, whole: int, most: int, end_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return whole answers of one pass, to which the end token is added, not generated."""
    rows, count, complete = len(tokens_BN), min(whole, most), whole < most
    tokens_BN = np.concatenate((tokens_BN[:, :count], np.full((rows, 1), end_id)), 1)
    if shares_BN is not None:
        shares_BN = np.concatenate((shares_BN[:, :count], np.ones((rows, 1))), 1)
    return tokens_BN, np.full(rows, count + complete), np.full(rows, complete), shares_BN
