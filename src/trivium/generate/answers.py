"""Answers of the rows of a batch: read the prompts, then choose and read R tokens a pass until every row has ended.

A model whose logits at place t are those of token t + R gives R tokens a pass: behind a prompt of P tokens the first is
read at place P - R, while the prompt is still being read. With R = 1 this is ordinary decoding.

`EagerAnswers` reads what prompts have in common once, and drops rows that have ended once they are half of those held.
`FixedAnswers` keeps all tensors and, on a CUDA device, replays a graph of each pass with its choice: rows that have
ended stand still in it. How many have is seen late, when the device happens to have said so, never by waiting for it;
once it is half of them and much may be left to do, the others move to tensors of half the rows.

Shapes: B rows, A rows still held, T tokens of the longest prompt, R tokens of a pass, N tokens of an answer, V symbols.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.generate.captured import capture, no_waiting
from trivium.generate.sampling import device_of, sample, uniforms
from trivium.mixers.cache import fixed_shapes, known_empty
from trivium.model.base import LanguageModel
from trivium.ops.take_greedy import take_greedy

LOOK_EVERY = 4  # passes between questions whether every row has ended
AHEAD = 4  # such questions that may be open
# Rows and passes left from which half of the rows are worth a graph of their own.
NARROWEST, WORTHWHILE = 64, 64
# What reading a prompt in pieces costs, in tokens read: another pass, and for each row the copying of its state.
STOP, COPY = 16, 0.5

_log = logging.getLogger("trivium")


@dataclass(frozen=True)
class Wanted:
    """What is asked of every row of a batch: the token that ends it, how it is drawn, whether shares are wanted."""

    end_id: int
    temperature: float = 0.0
    seed: int = 0
    probabilities: bool = False


@dataclass(frozen=True)
class Prompts:
    """Left-aligned prompts: tokens (B, T), their lengths, the tokens each may get, and each row's place in the call."""

    tokens_BT: Tensor
    lengths_B: np.ndarray
    budgets_B: np.ndarray
    rows_B: np.ndarray

    @property
    def ragged(self) -> bool:
        return bool((self.lengths_B != self.tokens_BT.shape[1]).any())

    def filled(self, rows: int, pad_id: int) -> "Prompts":
        """Return these and empty ones, `rows` together; an empty one may get no token."""
        more = rows - len(self.lengths_B)
        if not more:
            return self
        tokens_BT = torch.nn.functional.pad(self.tokens_BT, (0, 0, 0, more), value=pad_id)
        return Prompts(tokens_BT, *(np.pad(x, (0, more)) for x in (self.lengths_B, self.budgets_B, self.rows_B)))


Found = tuple[Tensor, Tensor | None]  # tokens (B, N) and, if wanted, the model's own probability of each


class EagerAnswers:
    """Answers by the ordinary streaming call, with as many rows as are left."""

    def __init__(self, model: LanguageModel, wanted: Wanted):
        self.model, self.wanted = model, wanted

    def __call__(self, prompts: Prompts) -> Found:
        """Return what every row gets; behind its end stands what the row was fed while it waited."""
        model, wanted, device = self.model, self.wanted, device_of(self.model)
        rows, per_pass = len(prompts.lengths_B), model.decoding.shift + 1
        num_passes = -(-int(prompts.budgets_B.max()) // per_pass)
        uniform_BN = _uniforms(wanted, prompts.rows_B, num_passes * per_pass, device)
        tokens_BN = torch.full((rows, num_passes * per_pass), wanted.end_id, dtype=torch.int64, device=device)
        shares_BN = torch.zeros(tokens_BN.shape, dtype=torch.float64, device=device) if wanted.probabilities else None
        slots_A, budgets_A = torch.arange(rows, device=device), torch.from_numpy(prompts.budgets_B).to(device)
        lengths_B = torch.from_numpy(prompts.lengths_B).to(device) if prompts.ragged else None
        room = room_needed(prompts.lengths_B, prompts.budgets_B, per_pass)
        logits_ARV, state = _read_shared(model, prompts, lengths_B, room, device)
        done_A = budgets_A < 1
        for start in range(0, num_passes * per_pass, per_pass):
            columns = slice(start, start + per_pass)
            uniform_AR = None if uniform_BN is None else uniform_BN[slots_A, columns]
            chosen_AR = _choose(logits_ARV, wanted, uniform_AR)
            tokens_BN[slots_A, columns] = chosen_AR
            if shares_BN is not None:
                shares_BN[slots_A, columns] = _shares(logits_ARV, chosen_AR)
            done_A = done_A | (chosen_AR == wanted.end_id).any(1) | (budgets_A <= columns.stop)
            num_done = int(done_A.sum())
            if num_done == len(done_A):
                break
            if 2 * num_done >= len(done_A):
                kept = (~done_A).nonzero()[:, 0]
                state = state.select(kept)
                slots_A, budgets_A, done_A, chosen_AR = slots_A[kept], budgets_A[kept], done_A[kept], chosen_AR[kept]
                num_done = 0
            added_A = (~done_A).long() * per_pass if num_done else None
            logits_ARV, state = model(chosen_AR, state, lengths_B=added_A)
        return tokens_BN, shares_BN


def _read_shared(
    model: LanguageModel, prompts: Prompts, lengths_B: Tensor | None, room: int, device: torch.device
) -> tuple[Tensor, Any]:
    """Return (logits_BRV, state) behind the prompts, whose common beginnings are read once and copied."""
    tokens_BT, per_pass = prompts.tokens_BT.to(device), model.decoding.shift + 1
    state, held_B, begin = None, None, 0
    for end in shared_cuts(prompts, per_pass):
        # The rows of the state are the distinct beginnings of `begin` tokens, `held_B` says which is whose.
        _, first_U, index_B = np.unique(
            prompts.tokens_BT[:, :end].cpu().numpy(), axis=0, return_index=True, return_inverse=True
        )
        state = _continued(model, state, held_B, torch.from_numpy(first_U).to(device), room)
        _, state = model(tokens_BT[first_U, begin:end], state)
        held_B, begin = torch.from_numpy(index_B.reshape(-1)).to(device), end
    state = _continued(model, state, held_B, torch.arange(len(tokens_BT), device=device), room)
    return model.last(tokens_BT[:, begin:], state, None if lengths_B is None else lengths_B - begin, per_pass)


def _continued(model: LanguageModel, state: Any, held_B: Tensor | None, rows_U: Tensor, room: int) -> Any:
    if state is None or held_B is None:
        return model.init_state(len(rows_U), max_length=room)
    return state.select(held_B[rows_U])


def shared_cuts(prompts: Prompts, per_pass: int) -> list[int]:
    """Return after how many tokens the reading of prompts is to stop and their distinct beginnings be counted again.

    Chosen are those places that leave the least to be done. The last R tokens of every row are read at once.
    """
    latest = int(prompts.lengths_B.min()) - per_pass
    if len(prompts.lengths_B) < 2 or latest < 1:
        return []
    tokens_BT = prompts.tokens_BT.cpu().numpy()
    distinct = [len(np.unique(tokens_BT[:, :end], axis=0)) for end in range(1, latest + 1)]
    # cheapest[end]: (tokens read for the first `end` places, the stops before it)
    cheapest: list[tuple[float, list[int]]] = [(0, [])]
    for end, rows in enumerate(distinct, 1):
        cheapest.append(
            min(
                (cost + (end - begin) * rows + (COPY * rows if begin else 0) + STOP, [*stops, end])
                for begin, (cost, stops) in enumerate(cheapest)
            )
        )
    rest = [
        cost + len(tokens_BT) * (tokens_BT.shape[1] - begin + (COPY if begin else 0))
        for begin, (cost, _) in enumerate(cheapest)
    ]
    return cheapest[int(np.argmin(rest))][1]


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

        self._tokens_BN, self._place, self._budgets_B = zeros(rows, columns), zeros(1), zeros(rows)
        self._shares_BN = zeros(rows, columns, dtype=torch.float64) if wanted.probabilities else None
        self._uniform_BN = zeros(rows, columns, dtype=torch.float64) if wanted.temperature else None
        # Greedy decoding of one token a pass is one operator, which counts each row's place for itself.
        self._simple = self.per_pass == 1 and not wanted.temperature and not wanted.probabilities
        self._place_B = zeros(rows if self._simple else 0)
        self._offsets_R = torch.arange(self.per_pass, device=device)
        self._fed_BR, self._added_B, self._read_B = zeros(rows, self.per_pass), zeros(rows), zeros(rows)
        self._done_B, self._num_done = zeros(rows, dtype=torch.bool), zeros(1)
        self._half: FixedAnswers | None = None
        self._narrows = rows // 2 >= NARROWEST and self._streams_whole()
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: dict[Hashable, Any] = {}
        self._waiting: set[Hashable] = set()  # what no graph can be made of
        self._pool: Any = torch.cuda.graph_pool_handle() if mode == "graph" else None

    def __call__(self, prompts: Prompts) -> Found:
        """Return what every row gets; behind its end stands what the row was fed while it waited."""
        given, per_pass = len(prompts.lengths_B), self.per_pass
        prompts = prompts.filled(self.rows, self.wanted.end_id)
        self._budgets_B.copy_(torch.from_numpy(prompts.budgets_B), non_blocking=True)
        num_passes = -(-int(prompts.budgets_B.max()) // per_pass)
        uniform_BN = _uniforms(self.wanted, prompts.rows_B, num_passes * per_pass, self.device)
        if self._uniform_BN is not None and uniform_BN is not None:
            self._uniform_BN[:, : uniform_BN.shape[1]] = uniform_BN
        self._read_prompts(prompts)
        self._go_on(prompts.lengths_B.copy(), 1, num_passes)
        # The next call writes where this one did.
        return tuple(None if x is None else x[:given].clone() for x in (self._tokens_BN, self._shares_BN))  # pyright: ignore[reportReturnType]

    def _go_on(self, lengths_B: np.ndarray, made: int, num_passes: int) -> None:
        """Do what is left of `num_passes`, or until every row has ended."""
        finished = _Finished(self.device)
        # How many rows have ended is asked behind so many passes: until then one graph may hold them all.
        together = LOOK_EVERY if self._streams_whole() else 1
        while made < num_passes and (ended := finished.heard_of()) < self.rows:
            few = self._narrows and ended >= self.rows - self.rows // 2 and num_passes - made >= WORTHWHILE
            if few and self._moved(made, num_passes):
                return
            count = min(together, num_passes - made)
            self._run(("passes", count), lambda count=count: self._passes(count))
            made += count
            lengths_B += self.per_pass * count
            work = self.model.settling(lengths_B)
            if work is not None:
                self._run(work, lambda work=work: self.model.settle(self.state, self._read_B, work))
            if (made - 1) % LOOK_EVERY == 0:
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
        half._go_on(np.zeros(half.rows, dtype=np.int64), made, num_passes)
        self._tokens_BN.index_copy_(0, order_A, half._tokens_BN)
        if self._shares_BN is not None and half._shares_BN is not None:
            self._shares_BN.index_copy_(0, order_A, half._shares_BN)

    def _held(self) -> list[Tensor]:
        """Return all that is kept of rows."""
        kept = (self._tokens_BN, self._shares_BN, self._uniform_BN, self._budgets_B)
        now = (self._fed_BR, self._added_B, self._read_B, self._done_B, self._place_B if self._simple else None)
        return [*self.state.tensors(), *(x for x in (*kept, *now) if x is not None)]

    def _read_prompts(self, prompts: Prompts) -> None:
        tokens = prompts.tokens_BT.shape[1]
        if tokens not in self._prompts:
            made = (torch.zeros(self.rows, tokens), torch.zeros(self.rows))
            self._prompts[tokens] = tuple(x.to(self.device, torch.int64) for x in made)  # pyright: ignore[reportArgumentType]
        tokens_BT, lengths_B = self._prompts[tokens]
        tokens_BT.copy_(prompts.tokens_BT, non_blocking=True)
        ragged = prompts.ragged
        if ragged:
            lengths_B.copy_(torch.from_numpy(prompts.lengths_B), non_blocking=True)

        def read() -> None:
            for tensors in _by_dtype(self.state.tensors()):
                torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage]
            # A model that reads a prompt in pieces asks its state what the earlier ones left.
            with known_empty() if self._streams_whole() else nullcontext():
                logits_BRV, self.state = self.model.last(
                    tokens_BT, self.state, lengths_B if ragged else None, self.per_pass
                )
            self._tokens_BN.fill_(self.wanted.end_id)
            (self._place_B if self._simple else self._place).zero_()
            torch.lt(self._budgets_B, 1, out=self._done_B)
            self._take(logits_BRV)

        if self._streams_whole():
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
        self._read_B.copy_(self._added_B)
        if self.per_pass == 1:
            logits_BRV, self.state = self.model.step(self._fed_BR, self.state, self._read_B)
        else:
            logits_BRV, self.state = self.model(self._fed_BR, self.state, lengths_B=self._read_B)
        self._take(logits_BRV)

    def _take(self, logits_BRV: Tensor) -> None:
        """Choose the tokens of a pass, keep them, and say which rows read them."""
        if self._simple:
            kept = self._tokens_BN, self._place_B, self._budgets_B, self._done_B, self._fed_BR[:, 0], self._added_B
            take_greedy(logits_BRV[:, 0], *kept, self.wanted.end_id)
            return
        places_R = self._place + self._offsets_R
        uniform_BR = None if self._uniform_BN is None else self._uniform_BN.index_select(1, places_R)
        chosen_BR = _choose(logits_BRV, self.wanted, uniform_BR)
        self._tokens_BN.index_copy_(1, places_R, chosen_BR)
        if self._shares_BN is not None:
            self._shares_BN.index_copy_(1, places_R, _shares(logits_BRV, chosen_BR))
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


def room_needed(lengths_B: np.ndarray, budgets_B: np.ndarray, per_pass: int) -> int:
    """Return the tokens that the longest row reads: the prompt, and all passes but the last."""
    passes_B = np.maximum(-(-budgets_B // per_pass), 1)
    return int((lengths_B + (passes_B - 1) * per_pass).max())


def _choose(logits_BRV: Tensor, wanted: Wanted, uniform_BR: Tensor | None) -> Tensor:
    if uniform_BR is None:
        return logits_BRV.argmax(-1)
    return sample(logits_BRV.flatten(0, 1), wanted.temperature, uniform_BR.flatten()).view(uniform_BR.shape)


def _shares(logits_BRV: Tensor, chosen_BR: Tensor) -> Tensor:
    return logits_BRV.double().softmax(-1).gather(2, chosen_BR[..., None])[..., 0]


def _uniforms(wanted: Wanted, rows_B: np.ndarray, count: int, device: torch.device) -> Tensor | None:
    return uniforms(wanted.seed, rows_B, count).to(device) if wanted.temperature > 0 else None


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [[x for x in tensors if x.dtype == dtype] for dtype in {x.dtype for x in tensors}]
