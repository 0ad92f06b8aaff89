"""The prefix-scan model (arXiv 2506.10918): an encoder, an aggregator composed by a scan, and a causal predictor.

Chunk i is predicted from [s_i; x_i], its own encoding behind the summary s_i of all chunks before it. Training finds
all s_i by a level-batched scan; streaming keeps a counter of roots, so a row's state grows with the logarithm of its
length, and a chunk that is merged is never read again. The position of token t predicts token t + 1, the last one of
a chunk too: it predicts the first token of the next chunk.

Shapes: B rows, T tokens, c tokens of a chunk, m chunks, D width, V vocabulary, R roots, N chunks of any rows.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from trivium.config import knob
from trivium.mixers import cache
from trivium.mixers.base import MixerConfig, MixerContext, State
from trivium.model import aggregator, feedforward
from trivium.model.aggregator import Aggregator
from trivium.model.base import MODELS, LanguageModel, ModelConfig, ModelContext, chooses_rounded, float_logits
from trivium.model.block import (
    Norm,
    block_params,
    check_backends,
    check_choices,
    check_numbers,
    initial_std,
    norm_params,
)
from trivium.model.chunk_encoder import ChunkPositions, Encoder, num_places
from trivium.model.chunk_packing import in_order, pack_chunks
from trivium.model.chunk_predictor import Predictor, read_pieces
from trivium.model.examples import prefix_scans
from trivium.model.feedforward import FeedForwardKind
from trivium.model.layers import parse_layers
from trivium.model.root_counter import RootCounter, num_merges, num_roots, push
from trivium.ops.scan import num_combines, prefixes


@MODELS.register("prefix_scan")
@dataclass(frozen=True)
class PrefixScanConfig(ModelConfig):
    """A model that sums up the past by a learned operator, in logarithmic memory."""

    chunk: int = 16
    """Tokens of a chunk; a last chunk that is shorter needs no padding."""
    width: int = 64
    """Width of the residual stream."""
    heads: int = 4
    """Heads of the aggregator's attention and of each mixer; they divide the width."""
    aggregator_layers: int = 1
    """Blocks of the aggregator, which read a pair of chunks without a mask."""
    layers: str = "attention*1"
    """Mixer of each layer of the predictor: name(option=value, ...)*count + ..."""
    positions: ChunkPositions = "chunk"
    """Number tokens from the start of their chunk, which serves words of any length, or (absolute) of the sequence."""
    normed: bool = knob(False, affects_results="unless_default")
    """Normalise what a chunk's tokens become, as every summary is: the aggregator then reads like at every level."""
    feedforward: FeedForwardKind = "gelu"
    """Feed-forward of each block: gelu, gelu_new (GPT-2's tanh form) or swiglu."""
    ff_width: int | None = None
    """Hidden width of every feed-forward; null is 4 times the width, 8/3 with swiglu."""
    norm: Norm = "layernorm"
    """Normalisation before each mixer and each feed-forward, and behind aggregator and predictor."""
    tied: bool = True
    """Use the embedding as the head's weight."""
    dropout: float = 0.0
    """Chance of dropping an activation in training."""
    max_length: int | None = None
    """Longest sequence in tokens (default: the task's longest)."""
    backends: dict[str, str] = field(default_factory=dict, hash=False)
    """Backend of an operator by its name, such as {simplicial: reference}; auto where left out."""

    def __post_init__(self):
        check_numbers(self, ("chunk", "width", "heads", "aggregator_layers", "ff_width", "max_length"))
        kinds = {"positions": ChunkPositions.__args__, "feedforward": FeedForwardKind.__args__, "norm": Norm.__args__}
        check_choices(self, kinds)
        check_backends(self.backends)
        assert self.mixers

    @cached_property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer of the predictor."""
        return parse_layers(self.layers)

    @property
    def hidden_width(self) -> int:
        """The feed-forward's width, the default filled in."""
        return self.ff_width or feedforward.default_width(self.feedforward, self.width)

    @property
    def document_multiple(self) -> int:
        return self.chunk

    def mixer_context(self, context: ModelContext) -> MixerContext:
        """Return what the predictor's blocks tell their mixers: they never see more than a summary and a chunk."""
        return MixerContext(
            width=self.width,
            heads=self.heads,
            max_length=2 * self.chunk,
            backends={**context.backends, **self.backends},
        )

    def build(self, context: ModelContext) -> "PrefixScan":
        return PrefixScan(self, context)

    def num_params(self, context: ModelContext) -> int:
        mixer_context = self.mixer_context(context)
        encoder = num_places(self.positions, self.chunk, self.max_length or context.max_length)
        rows = context.vocab_size * (1 if self.tied else 2) + encoder + 2 * self.chunk
        blocks = sum(mixer.num_params(mixer_context) + block_params(self) for mixer in self.mixers)
        predictor = blocks + (2 if self.normed else 1) * norm_params(self.norm, self.width)
        return rows * self.width + predictor + aggregator.num_params(self, self.aggregator_layers, self.chunk)

    def mixer_flops_per_token(self, context: ModelContext, length: int) -> float:
        mixer_context = self.mixer_context(context)
        pieces = read_pieces(length, self.chunk)
        total = sum(
            count * places * mixer.flops_per_token(mixer_context, places)
            for mixer in self.mixers
            for count, places in pieces
        )
        return total / max(length, 1)

    def flops_per_token(self, context: ModelContext, length: int) -> float:
        """Return the FLOPs of the parallel form: the scan's calls of the aggregator, the predictor on each summary and
        its chunk, the last feed-forward and the head on the tokens alone.
        """
        calls = num_combines(max(-(-length // self.chunk) - 1, 0))
        places = sum(count * places for count, places in read_pieces(length, self.chunk))
        block = feedforward.flops_per_token(self.feedforward, self.width, self.hidden_width)
        total = calls * aggregator.flops(self, self.aggregator_layers, self.chunk)
        total += (places * (len(self.mixers) - 1) + length) * block + length * 2 * self.width * context.vocab_size
        return self.mixer_flops_per_token(context, length) + total / max(length, 1)

    def state_bytes(self, context: ModelContext, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of the counter, the chunk's tokens, log2 roots with their folds, and the mixers' states."""
        mixer_context = self.mixer_context(context)
        roots = num_roots(length, self.chunk)
        mixers = sum(mixer.state_bytes(mixer_context, 2 * self.chunk, dtype) for mixer in self.mixers)
        return torch.int64.itemsize * (1 + self.chunk) + 2 * roots * self.chunk * self.width * dtype.itemsize + mixers

    def equals_at(self, other: ModelConfig, length: int) -> bool:
        """Say whether both compute the same on every sequence of up to `length` tokens, given equal weights."""
        if not isinstance(other, PrefixScanConfig) or len(self.mixers) != len(other.mixers):
            return False
        aside = {"layers", "ff_width", "max_length", "backends"}
        whole = min(self.chunk, other.chunk) >= length
        if whole:  # nothing is ever aggregated, and a place in the chunk is one in the sequence
            aside |= {"chunk", "aggregator_layers", "positions"}
        names = [item.name for item in dataclasses.fields(self) if item.name not in aside]
        places = length if whole else min(2 * self.chunk, self.chunk + length)
        return (
            all(getattr(self, name) == getattr(other, name) for name in names)
            and self.hidden_width == other.hidden_width
            and all(
                mine.equals_at(theirs, places) or theirs.equals_at(mine, places)
                for mine, theirs in zip(self.mixers, other.mixers, strict=True)
            )
        )

    @classmethod
    def examples(cls) -> Sequence["PrefixScanConfig"]:
        return [cls(**{"width": 24, "heads": 2, **variant}) for variant in prefix_scans()]


@dataclass
class PrefixScanState(State):
    """Tokens seen, tokens of the current chunk, the scan of the chunks before it, and the mixers' states behind
    [s_i; x_i] so far.
    """

    lengths_B: Tensor
    chunk_Bc: Tensor
    counter: RootCounter
    mixers: list[State]
    room: int


class PrefixScan(LanguageModel):
    """The prefix-scan model; see PrefixScanConfig for what can be chosen and LanguageModel for the call."""

    config: PrefixScanConfig

    def __init__(self, config: PrefixScanConfig, context: ModelContext):
        super().__init__()
        self.config = config
        self.context = context
        self.max_length = config.max_length or context.max_length
        norm = config.norm if config.normed else None
        places = (config.positions, config.width, config.chunk, self.max_length)
        self.encoder = Encoder(*places, config.dropout, context, norm)
        self.aggregator = Aggregator(config, config.heads, config.aggregator_layers, config.chunk)
        self.predictor = Predictor(config, config.mixers, config.mixer_context(context), config.chunk)
        self.head = None if config.tied else nn.Linear(config.width, context.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=initial_std(config.width))
        self.scan: Callable[..., Tensor] = prefixes
        """How the parallel form finds all prefixes of (m, B, c, D); a benchmark may put another way in its place."""

    def init_state(
        self,
        batch: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PrefixScanState:
        weight = self.encoder.embedding.weight
        room = self.max_length if max_length is None else max_length
        device = weight.device if device is None else device
        dtype = weight.dtype if dtype is None else dtype
        chunk = self.config.chunk
        shape = (batch, num_roots(room, chunk), chunk, self.config.width)
        roots, folds = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return PrefixScanState(
            lengths_B=torch.zeros(batch, dtype=torch.int64, device=device),
            chunk_Bc=torch.zeros(batch, chunk, dtype=torch.int64, device=device),
            counter=RootCounter(roots, folds),
            mixers=self.predictor.init_states(batch, device, dtype),
            room=room,
        )

    def forward(
        self,
        tokens_BT: Tensor,
        state: PrefixScanState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        wanted_N: Tensor | None = None,
    ) -> tuple[Tensor, PrefixScanState | None]:
        """Return (logits_BTV, state), or logits_NV with `wanted_N`.

        Raises ValueError when a sequence does not fit the state or a position table, or a packed document
        begins inside a chunk.
        """
        if state is not None:
            if documents_BT is not None:
                raise ValueError("documents_BT is given with a state: packed documents have only the parallel form")
            y_BTD, state = self._continue(tokens_BT, state, lengths_B)
        elif documents_BT is not None:
            y_BTD = self._packed(self.encoder(tokens_BT, documents_BT=documents_BT), documents_BT)
        else:
            y_BTD = self._whole(self.encoder(tokens_BT))
        scans = state is None and documents_BT is None and tokens_BT.shape[1] > 2 * self.config.chunk
        if torch.is_grad_enabled() and not scans:
            y_BTD = y_BTD + self._no_pairs(y_BTD)
        if wanted_N is not None:
            y_BTD = y_BTD.flatten(0, 1).index_select(0, wanted_N)
        return self._logits(y_BTD, state), state

    def _logits(self, y_BTD: Tensor, state: PrefixScanState | None) -> Tensor:
        head = self.encoder.embedding if self.head is None else self.head
        if chooses_rounded(state, y_BTD.device):
            return float_logits(y_BTD, head.weight)
        return functional.linear(y_BTD, head.weight)

    # The parallel form.

    def _whole(self, x_BTD: Tensor) -> Tensor:
        """Predict every token; whole chunks lie chunk by chunk, as the scan wants them, until the end."""
        tokens, chunk = x_BTD.shape[1], self.config.chunk
        full, rest = divmod(tokens, chunk)
        if not full:
            return self.predictor(None, x_BTD)
        whole_BTD, *short_BtD = x_BTD.split((full * chunk, rest), dim=1) if rest else (x_BTD,)
        x_mBcD = whole_BTD.unflatten(1, (full, chunk)).transpose(0, 1)
        first_1BcD, *later_mBcD = x_mBcD.split((1, full - 1)) if full > 1 else (x_mBcD,)
        parts_mBcD = [self.predictor(None, first_1BcD[0])[None]]
        summed = full if rest else full - 1  # the last chunk, whole or short, is in no prefix
        summaries_mBcD = self._prefixes(x_mBcD.split((summed, full - summed))[0])[1:] if summed else x_mBcD[:0]
        for own_mBcD in later_mBcD:
            y_NcD = self.predictor(summaries_mBcD[: full - 1].flatten(0, 1), own_mBcD.flatten(0, 1))
            parts_mBcD.append(y_NcD.unflatten(0, own_mBcD.shape[:2]))
        y_BTD = torch.cat(parts_mBcD).transpose(0, 1).flatten(1, 2)
        return torch.cat((y_BTD, *(self.predictor(summaries_mBcD[-1], x_BtD) for x_BtD in short_BtD)), dim=1)

    def _packed(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """Lay the documents side by side, the scan restarting with each, and put the predictions back in place."""
        tokens, chunk = x_BTD.shape[1], self.config.chunk
        packing = pack_chunks(documents_BT, chunk)
        full = tokens // chunk
        chunks_BmcD = x_BTD[:, : full * chunk].unflatten(1, (full, chunk))
        summaries_mNcD = self._prefixes(packing.side_by_side(chunks_BmcD))

        parts_BTD = [packing.predict(self.predictor, summaries_mNcD, chunks_BmcD, 0)]
        if tokens > full * chunk:
            parts_BTD.append(packing.predict(self.predictor, summaries_mNcD, x_BTD[:, None, full * chunk :], full))
        return torch.cat(parts_BTD, dim=1)

    def _prefixes(self, chunks_mBcD: Tensor) -> Tensor:
        return self.scan(chunks_mBcD, self.aggregator, chunks_mBcD.new_zeros(()))

    def _no_pairs(self, x_BTD: Tensor) -> Tensor:
        """Return 0 from an aggregator of no pairs: short sequences call it nowhere else, and a weight without a
        gradient, were it 0, would stop DistributedDataParallel.
        """
        none = x_BTD.new_zeros(0, self.config.chunk, self.config.width)
        return self.aggregator(none, none).sum()

    # The streaming form.

    def step(
        self, tokens_B1: Tensor, state: PrefixScanState, lengths_B: Tensor | None
    ) -> tuple[Tensor, PrefixScanState]:
        y_B1D, state = self._feed(tokens_B1, state, lengths_B, merges=False)
        return self._logits(y_B1D, state), state

    def settling(self, lengths: Iterable[int]) -> int | None:
        """Return the most merges that rows of these lengths have to do; None where none is at a boundary."""
        counts = [divmod(int(length), self.config.chunk) for length in lengths]
        return max((num_merges(whole) for whole, rest in counts if whole and not rest), default=None)

    def settle(self, state: PrefixScanState, lengths_B: Tensor | None, work: int) -> None:
        reached_B = self._reached(state, lengths_B)
        if state.counter.roots_BRcD.shape[1]:
            self._merge(state, torch.arange(len(reached_B), device=reached_B.device), reached_B, work)

    def _reached(self, state: PrefixScanState, added_B: Tensor | None) -> Tensor:
        reached_B = (state.lengths_B % self.config.chunk == 0) & (state.lengths_B > 0)
        return reached_B if added_B is None else reached_B & (added_B > 0)

    def _continue(
        self, tokens_BT: Tensor, state: PrefixScanState, lengths_B: Tensor | None
    ) -> tuple[Tensor, PrefixScanState]:
        """Feed each row up to its next boundary, merge there, and so on: rows reach theirs at different times."""
        tokens, chunk = tokens_BT.shape[1], self.config.chunk
        cache.check_room(state.lengths_B, lengths_B, tokens, state.room, None)
        if torch.is_grad_enabled():
            state = dataclasses.replace(state)
        if tokens == 1:
            return self._feed(tokens_BT, state, lengths_B)
        offset_B = state.lengths_B % chunk
        added_B = torch.full_like(offset_B, tokens) if lengths_B is None else lengths_B
        done_B = torch.zeros_like(offset_B)
        width = min(tokens, chunk)
        index_T = torch.arange(tokens, device=tokens_BT.device)
        parts: list[Tensor] = []
        for _ in range(-(-(tokens + chunk - 1) // chunk)):
            take_B = torch.minimum(added_B - done_B, chunk - state.lengths_B % chunk)
            if parts and cache.may_look(take_B) and not bool(take_B.any()):
                break
            source_BT = (done_B[:, None] + index_T[:width]).clamp(max=tokens - 1)
            y_BTD, state = self._feed(tokens_BT.gather(1, source_BT), state, take_B)
            parts.append(y_BTD)
            done_B = done_B + take_B
        return in_order(parts, offset_B, tokens, chunk), state

    def _feed(
        self, tokens_BT: Tensor, state: PrefixScanState, added_B: Tensor | None, merges: bool = True
    ) -> tuple[Tensor, PrefixScanState]:
        """Read tokens that lie within each row's current chunk; merge the chunks that they complete."""
        tokens, chunk, past_B = tokens_BT.shape[1], self.config.chunk, state.lengths_B
        offset_B = past_B % chunk
        x_BTD = self.encoder(tokens_BT, past_B, added_B)
        y_BTD, state.mixers = self.predictor.step(x_BTD, offset_B, added_B, state.mixers)
        source_Bc = torch.arange(chunk, device=past_B.device) - offset_B[:, None]
        new_Bc = (source_Bc >= 0) & (source_Bc < (tokens if added_B is None else added_B[:, None]))
        fed_Bc = tokens_BT.gather(1, source_Bc.clamp(0, tokens - 1))
        chunk_Bc = torch.where(new_Bc, fed_Bc, state.chunk_Bc)
        state.chunk_Bc = chunk_Bc if torch.is_grad_enabled() else state.chunk_Bc.copy_(chunk_Bc)
        state.lengths_B = cache.advance(past_B, added_B, tokens)
        if not merges or not state.counter.roots_BRcD.shape[1]:
            return y_BTD, state
        reached_B = self._reached(state, added_B)
        if cache.may_look(reached_B):
            rows_N = reached_B.nonzero()[:, 0]
            if len(rows_N):
                self._merge(state, rows_N, None)
        else:
            self._merge(state, torch.arange(len(reached_B), device=reached_B.device), reached_B)
        return y_BTD, state

    def _merge(
        self,
        state: PrefixScanState,
        rows_N: Tensor,
        wanted_N: Tensor | None,
        most: int | None = None,
    ) -> None:
        """Push the finished chunk of each of `rows_N` and open the next with the new prefix.

        Where the values may be looked at, these are the rows that reached their boundary. Elsewhere they are all rows,
        which do all levels (up to `most`) and keep what is theirs by the mask, so that the step can be captured.
        """
        chunk = self.config.chunk
        past_N = (state.lengths_B[rows_N] - chunk).clamp(min=0)
        own_NcD = self.encoder(state.chunk_Bc[rows_N], past_N)
        state.counter, prefix_NcD = push(
            state.counter, self.aggregator, rows_N, own_NcD, past_N // chunk, wanted_N, most
        )
        dtype = state.counter.roots_BRcD.dtype
        state.mixers = self.predictor.begin(prefix_NcD, rows_N, wanted_N, state.mixers, dtype)
