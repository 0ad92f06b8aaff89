"""Answers from tensors of fixed shape: on a CUDA device a graph of each pass with its choice is replayed, or one of a
whole call where its passes are few.

Rows that have ended stand still in a pass. How many have is seen late, when the device happens to have said so, never
by waiting for it; once it is half of them and much may be left to do, the others move to tensors of half the rows.

Shapes: B rows, A rows still held, T tokens of the longest prompt, R tokens of a pass, N tokens of an answer, V symbols.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.generate.answers import Found, Prompts, Wanted, choose, shares_of, uniforms_of
from trivium.generate.captured import capture, no_waiting
from trivium.generate.sampling import device_of
from trivium.mixers.cache import fixed_shapes, known_empty
from trivium.model.base import LanguageModel
from trivium.ops.take_greedy import take_greedy

AT_ONCE = 8  # passes of an answer that share one graph: fewer than it takes to hear of an end
LOOK_EVERY = 4  # passes between questions whether every row has ended
AHEAD = 4  # such questions that may be open
# Rows and passes left from which half of the rows are worth a graph of their own.
NARROWEST, WORTHWHILE = 64, 64

_log = logging.getLogger("trivium")


class FixedAnswers:
    """Answers of `rows` rows from tensors of fixed shape, whose states have room for `room` tokens.

    Mode "graph" needs a CUDA device; "fixed" does the same work without graphs, on any. The model's weights may change
    between calls, not its tensors.
    """

    def __init__(
        self, model: LanguageModel, wanted: Wanted, rows: int, room: int, max_new_tokens: int, mode: str = "graph"
    ):
        self.model, self.wanted, self.rows, self.room, self.mode = model, wanted, rows, room, mode
        self.max_new_tokens = max_new_tokens
        device, self.per_pass = device_of(model), model.decoding.shift + 1
        self.device = device
        self.state = model.init_state(rows, max_length=room)
        columns = -(-max_new_tokens // self.per_pass) * self.per_pass

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        # Greedy decoding of one token a pass is one operator, which counts each row's place for itself.
        self._simple = self.per_pass == 1 and not wanted.temperature and not wanted.probabilities
        # What a call reads and gives travels in one piece each way.
        self._given = _Given(rows, room, device)
        self._budgets_B = self._given.budgets_B
        self._found = zeros(rows * (columns + self._simple))
        tokens_M, self._place_B = self._found.split((rows * columns, rows * self._simple))
        self._tokens_BN = tokens_M.view(rows, columns)
        self._place = zeros(1)
        self._shares_BN = zeros(rows, columns, dtype=torch.float64) if wanted.probabilities else None
        self._uniform_BN = zeros(rows, columns, dtype=torch.float64) if wanted.temperature else None
        self._offsets_R = torch.arange(self.per_pass, device=device)
        self._fed_BR, self._added_B, self._read_B = zeros(rows, self.per_pass), zeros(rows), zeros(rows)
        self._done_B, self._num_done = zeros(rows, dtype=torch.bool), zeros(1)
        self._half: FixedAnswers | None = None
        self._narrows = rows // 2 >= NARROWEST and self._streams_whole()
        self._graphs: dict[Hashable, Any] = {}
        self._waiting: set[Hashable] = set()  # what no graph can be made of
        self._pool: Any = torch.cuda.graph_pool_handle() if mode == "graph" else None

    def __call__(self, prompts: Prompts) -> Found:
        """Return what every row gets."""
        num_passes = -(-int(prompts.budgets_B.max()) // self.per_pass)
        uniform_BN = uniforms_of(self.wanted, prompts.rows_B, num_passes * self.per_pass, self.device)
        if self._uniform_BN is not None and uniform_BN is not None:
            self._uniform_BN[: len(uniform_BN), : uniform_BN.shape[1]] = uniform_BN
        self._given.send(prompts, self.wanted.end_id)
        self._read_prompts(prompts.tokens_BT.shape[1], prompts.ragged)
        self._go_on(prompts.lengths_B, num_passes)
        return self._take_out(len(prompts.lengths_B))

    def _take_out(self, count: int) -> Found:
        """Return what the first `count` rows have, on its way to where the next call does not write."""
        found = torch.empty(self._found.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        found.copy_(self._found, non_blocking=True)
        tokens_M, counts_B = found.split((self._tokens_BN.numel(), len(self._place_B)))
        shares_BN = None if self._shares_BN is None else self._shares_BN[:count].clone()
        return Found(
            tokens_M.view(self._tokens_BN.shape)[:count], shares_BN, counts_B[:count] if self._simple else None
        )

    def _go_on(self, lengths_B: np.ndarray, num_passes: int, made: int = 1) -> None:
        """Do what is left of `num_passes`, or until every row has ended."""
        finished, whole = _Finished(self.device), self._streams_whole()
        lengths_B = lengths_B if whole else np.pad(lengths_B, (0, self.rows - len(lengths_B)))
        # How many rows have ended is asked behind so many passes: until then one graph may hold them all.
        together = 1 if not whole else num_passes if num_passes <= AT_ONCE else LOOK_EVERY
        while made < num_passes and (ended := finished.heard_of()) < self.rows:
            few = self._narrows and ended >= self.rows - self.rows // 2 and num_passes - made >= WORTHWHILE
            if few and self._moved(made, num_passes):
                return
            count = min(together, num_passes - made)
            self._run(("passes", count), lambda count=count: self._passes(count))
            made += count
            work = None
            if not whole:
                lengths_B += self.per_pass * count
                work = self.model.settling(lengths_B)
            if work is not None:
                self._run(work, lambda work=work: self.model.settle(self.state, self._read_B, work))
            if made < num_passes and (made - 1) % LOOK_EVERY == 0:
                finished.look(torch.sum(self._done_B, dim=0, keepdim=True, out=self._num_done))

    def _moved(self, made: int, num_passes: int) -> bool:
        """Let answers of half the rows go on, and say whether they did: not where the device has no room for them.

        Until they are done they write nothing here, so that what they did of it can be done here again.
        """
        try:
            if self._half is None:
                sizes = (self.rows // 2, self.room, self.max_new_tokens)
                self._half = FixedAnswers(self.model, self.wanted, *sizes, self.mode)
            self._move_to(self._half, made, num_passes)
        except torch.OutOfMemoryError:
            self._half, self._narrows = None, False
            _log.warning("rows that go on stay among all %d: no memory for half of them", self.rows)
            return False
        return True

    def _move_to(self, half: "FixedAnswers", made: int, num_passes: int) -> None:
        """Let `half` go on with the rows that have not ended, and some that have; no value is waited for."""
        order_A = torch.argsort(self._done_B.long(), stable=True)[: half.rows]
        for theirs, mine in zip(half._held(), self._held(), strict=True):
            torch.index_select(mine, 0, order_A, out=theirs)
        half._place.copy_(self._place)
        # Where each row stands is asked for by models alone that are settled, and those stay together.
        half._go_on(np.zeros(half.rows, dtype=np.int64), num_passes, made)
        self._tokens_BN.index_copy_(0, order_A, half._tokens_BN)
        if self._simple:
            self._place_B.index_copy_(0, order_A, half._place_B)
        if self._shares_BN is not None and half._shares_BN is not None:
            self._shares_BN.index_copy_(0, order_A, half._shares_BN)

    def _held(self) -> list[Tensor]:
        """Return all that is kept of rows."""
        kept = (self._tokens_BN, self._shares_BN, self._uniform_BN, self._budgets_B)
        now = (self._fed_BR, self._added_B, self._read_B, self._done_B, self._place_B if self._simple else None)
        return [*self.state.tensors(), *(x for x in (*kept, *now) if x is not None)]

    def _read_prompts(self, tokens: int, ragged: bool) -> None:
        tokens_BT, whole = self._given.tokens(tokens), self._streams_whole()
        lengths_B = self._given.lengths_B if ragged else None

        def read() -> None:
            # Passes of several tokens multiply what lies behind a row by a weight of 0.
            kept = self.state.counters() if whole and self.per_pass == 1 else self.state.tensors()
            for tensors in _by_dtype(kept):
                torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]
            # A model that reads a prompt in pieces asks its state what the earlier ones left.
            with known_empty() if whole else nullcontext():
                logits_BRV, self.state = self.model.last(tokens_BT, self.state, lengths_B, self.per_pass)
            self._tokens_BN.fill_(self.wanted.end_id)
            (self._place_B if self._simple else self._place).zero_()
            torch.lt(self._budgets_B, 1, out=self._done_B)
            self._take(logits_BRV)

        if whole:
            self._run(("prompt", tokens, ragged), read, repeatable=True)
        else:
            read()

    def _streams_whole(self) -> bool:
        """Say whether no value decides what reading a prompt computes; where chunks are settled, lengths do."""
        return type(self.model).settling is LanguageModel.settling

    def _passes(self, count: int) -> None:
        for _ in range(count):
            self._pass()

    def _pass(self) -> None:
        read_B = self._added_B
        if not self._streams_whole():  # what it read is asked for again when it is settled
            read_B = self._read_B.copy_(self._added_B)
        if self.per_pass == 1:
            logits_BRV, self.state = self.model.step(self._fed_BR, self.state, read_B)
        else:
            logits_BRV, self.state = self.model(self._fed_BR, self.state, lengths_B=read_B)
        self._take(logits_BRV)

    def _take(self, logits_BRV: Tensor) -> None:
        """Choose the tokens of a pass, keep them, and say which rows read them."""
        if self._simple:
            kept = self._tokens_BN, self._place_B, self._budgets_B, self._done_B, self._fed_BR[:, 0], self._added_B
            take_greedy(logits_BRV[:, 0], *kept, self.wanted.end_id)
            return
        places_R = self._place + self._offsets_R
        uniform_BR = None if self._uniform_BN is None else self._uniform_BN.index_select(1, places_R)
        chosen_BR = choose(logits_BRV, self.wanted, uniform_BR)
        self._tokens_BN.index_copy_(1, places_R, chosen_BR)
        if self._shares_BN is not None:
            self._shares_BN.index_copy_(1, places_R, shares_of(logits_BRV, chosen_BR))
        self._place += self.per_pass
        self._done_B |= (chosen_BR == self.wanted.end_id).any(1)
        self._done_B |= self._budgets_B <= self._place
        self._fed_BR.copy_(chosen_BR)
        self._added_B.copy_(~self._done_B)
        if self.per_pass > 1:
            self._added_B *= self.per_pass

    def _run(self, key: Hashable, function: Callable[[], None], repeatable: bool = False) -> None:
        """Run `function`, or what was captured of it; what waits for the device is `repeatable`, or cannot serve."""
        if self.mode == "graph" and key in self._graphs:
            self._graphs[key].replay()
            return
        with fixed_shapes():
            # The first time counts too: libraries load and kernels compile, and a graph repeats it from then on.
            if self.mode == "graph" and key not in self._waiting and self._runs_through(key, function, repeatable):
                self._graphs[key] = capture(function, self._pool)
            elif self.mode == "fixed" or key in self._waiting:
                function()

    def _runs_through(self, key: Hashable, function: Callable[[], None], repeatable: bool) -> bool:
        """Run `function` and say whether it can be captured; announce it, and run it again, where it cannot."""
        if not repeatable:
            function()
            return True
        try:
            with no_waiting():
                function()
            return True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._waiting.add(key)
            _log.warning("prompts are read without a graph: %s", str(error).splitlines()[0])
            return False


class _Given:
    """Prompts of up to `room` tokens and what each row may get, where they lie on the device and where they leave from:
    they travel in one piece."""

    def __init__(self, rows: int, room: int, device: torch.device):
        self.rows = rows
        self.on_device = torch.zeros(rows * (room + 2), dtype=torch.int64, device=device)
        self.host: Tensor | None = None  # made when something is sent: half of the rows are given nothing
        self.budgets_B, self.lengths_B = self.on_device[:rows], self.on_device[rows : 2 * rows]
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def tokens(self, count: int) -> Tensor:
        """Return (B, T) as they lie on the device."""
        return self.on_device[2 * self.rows : (2 + count) * self.rows].view(self.rows, count)

    def send(self, prompts: Prompts, pad_id: int) -> None:
        """Begin to copy them, once the last ones have left; rows beside them may get no token."""
        if self._sent is not None:
            self._sent.synchronize()
        if self.host is None:
            self.host = torch.zeros(self.on_device.shape, dtype=torch.int64, pin_memory=self._sent is not None)
        (given, tokens), rows, host = prompts.tokens_BT.shape, self.rows, self.host.numpy()
        for place, values, other in ((0, prompts.budgets_B, 0), (1, prompts.lengths_B, tokens)):
            host[place * rows : place * rows + given] = values
            host[place * rows + given : (place + 1) * rows] = other
        numbers = host[2 * rows : (2 + tokens) * rows].reshape(rows, tokens)
        numbers[:given], numbers[given:] = prompts.tokens_BT.cpu().numpy(), pad_id
        self.on_device[: (2 + tokens) * rows].copy_(self.host[: (2 + tokens) * rows], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class _Finished:
    """How many rows have ended, asked of the device and heard when it has answered."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.asked: deque[tuple[Tensor, Any]] = deque()
        self.heard = 0

    def look(self, num_done: Tensor) -> None:
        if not self.cuda:
            self.heard = int(num_done)
            return
        answer = torch.empty(1, dtype=torch.int64, pin_memory=True).copy_(num_done, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.asked.append((answer, event))

    def heard_of(self) -> int:
        while self.asked and (len(self.asked) > AHEAD or self.asked[0][1].query()):
            answer, event = self.asked.popleft()
            event.synchronize()
            self.heard = max(self.heard, int(answer))
        return self.heard


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [[x for x in tensors if x.dtype == dtype] for dtype in {x.dtype for x in tensors}]
