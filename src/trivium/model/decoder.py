"""The decoder-only language model: embedding, blocks that each have their own mixer, and a head.

Shapes: B rows, T tokens, D width of the residual stream, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trivium.config import UserError, knob
from trivium.mixers.base import MixerConfig, MixerContext, State
from trivium.model import feedforward
from trivium.model.alike import Alike, find_alike
from trivium.model.base import (
    MODELS,
    LanguageModel,
    ModelConfig,
    ModelContext,
    chooses_rounded,
    float_logits,
    last_places,
)
from trivium.model.block import (
    Block,
    Norm,
    block_params,
    check_backends,
    check_choices,
    check_numbers,
    initial_std,
    make_blocks,
    make_norm,
    norm_params,
)
from trivium.model.examples import decoders
from trivium.model.experts import check_experts, mixture_flops, mixture_params
from trivium.model.feedforward import FeedForwardKind
from trivium.model.layers import parse_layers
from trivium.model.positions import (
    POSITION_BASE,
    RUNS,
    PositionKind,
    Positions,
    RunTable,
    check_position_base,
    check_run_ids,
    embed,
    table_rows,
)
from trivium.model.presets import DEFAULTS, PRESETS
from trivium.ops.embed_positions import embed_positions
from trivium.ops.fused_linear import is_fused, norm_linear
from trivium.ops.linear import linear
from trivium.ops.repeat_rows import repeat_rows
from trivium.ops.vocabulary_loss import LARGE


@MODELS.register("decoder")
@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A decoder-only transformer whose blocks may mix tokens in different ways."""

    reads_distributions: ClassVar[bool] = True
    gives_hidden: ClassVar[bool] = True

    preset: Literal["small", "medium", "large", "gpt2", "gpt2_6m"] | None = None
    """A published size that fills width, heads, layers, ff_width and feedforward where they are left out."""
    width: int = knob(None)
    """Width of the residual stream (64 when no preset gives it)."""
    heads: int = knob(None)
    """Heads of each mixer; they divide the width (4 when no preset gives it)."""
    layers: str = knob(None)
    """Mixer of each layer: name(option=value, ...)*count + ... (attention*2 when no preset gives it)."""
    positions: PositionKind = "learned"
    """How tokens know their place; block numbers the digits of each run (Abacus), coupled does so where digits of
    equal significance then share an id, and its random offset moves all tokens (position coupling)."""
    block_offset: int = 0
    """Largest random offset that training adds to the block or coupled ids of a sequence."""
    run_table: RunTable = "learned"
    """Vectors of block and coupled ids: learned, or fixed sinusoids, which have no parameters and no end; or rotary,
    which turns queries and keys by the ids and adds nothing."""
    closing: bool = False
    """Number a symbol that ends a number of the prompt, such as +, on as its next digit, so that the end has an id."""
    read_offset: int = 0
    """Offset of the block or coupled ids outside training; the lowest ids are rare among random offsets."""
    position_base: float = POSITION_BASE
    """Ratio of the longest to the shortest wave of sinusoids and of rotary; small ones suit few channels."""
    feedforward: FeedForwardKind = knob(None)
    """Feed-forward of each block: gelu, gelu_new (GPT-2's tanh form) or swiglu (gelu when no preset gives it)."""
    loops: int = 1
    """Passes through the layers with the same weights, each with a state of its own (looped transformer)."""
    input_injection: bool = False
    """Add the embeddings to the input of each layer in each pass, the first of the first aside."""
    ff_width: int | None = None
    """Hidden width of the feed-forward; null is 4 times the width, 8/3 with swiglu."""
    experts: int = 1
    """Feed-forwards that a block's mixture has; 1 is no mixture (arXiv 1701.06538)."""
    experts_per_token: int = 2
    """Experts of a mixture that a token goes to; none is ever dropped."""
    experts_in: tuple[int, ...] = ()
    """Blocks, from 0, whose feed-forward is a mixture; all when there is none in the list."""
    norm: Norm = "layernorm"
    """Normalisation before each mixer, each feed-forward and the head."""
    tied: bool = True
    """Use the embedding as the head's weight."""
    identity: tuple[int, ...] = ()
    """Blocks, from 0, that begin as the identity: both of their maps into the residual stream are zero at first."""
    dropout: float = 0.0
    """Chance of dropping an activation in training."""
    checkpoint_activations: bool = knob(False, affects_results=False)
    """Recompute each block in the backward pass: less memory, a third more work."""
    max_length: int | None = None
    """Longest sequence in tokens (default: the task's longest)."""
    init_from: str | None = None
    """GPT-2 weights that training begins with: a folder with model.safetensors, or a hub repository such as gpt2."""
    backends: dict[str, str] = field(default_factory=dict, hash=False)
    """Backend of an operator by its name, such as {simplicial: reference}; auto where left out."""

    def __post_init__(self):
        for name, default in {**DEFAULTS, **PRESETS.get(self.preset or "", {})}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(f"preset: {self.preset!r} is not allowed; allowed: {', '.join(PRESETS)}")
        check_numbers(self, ("width", "heads", "loops", "ff_width", "max_length"))
        check_run_ids(self.positions, self.run_table, self.closing, self.block_offset, self.read_offset)
        check_position_base(self.positions, self.run_table, self.position_base)
        check_choices(
            self,
            {
                "run_table": RunTable.__args__,
                "positions": PositionKind.__args__,
                "feedforward": FeedForwardKind.__args__,
                "norm": Norm.__args__,
            },
        )
        check_backends(self.backends)
        assert self.mixers
        for name in ("identity", "experts_in"):
            for index in getattr(self, name):
                if not 0 <= index < len(self.mixers):
                    raise UserError(f"{name}: there is no block {index}; allowed: 0 to {len(self.mixers) - 1}")
        check_experts(self.experts, self.experts_per_token)

    @cached_property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer."""
        return parse_layers(self.layers)

    @property
    def hidden_width(self) -> int:
        """The feed-forward's width, the default filled in."""
        return self.ff_width or feedforward.default_width(self.feedforward, self.width)

    @property
    def mixtures(self) -> dict[int, tuple[int, int]]:
        """The blocks whose feed-forward is a mixture, with its experts and those of a token."""
        blocks = self.experts_in or range(len(self.mixers))
        return dict.fromkeys(blocks, (self.experts, self.experts_per_token)) if self.experts > 1 else {}

    def mixer_context(self, context: ModelContext) -> MixerContext:
        """Return what the blocks tell their mixers."""
        return MixerContext(
            width=self.width,
            heads=self.heads,
            max_length=self.max_length or context.max_length,
            positions="rotary" if self.run_table == "rotary" else self.positions,
            rotary_base=self.position_base,
            backends={**context.backends, **self.backends},
        )

    def build(self, context: ModelContext) -> "Decoder":
        return Decoder(self, context)

    def num_params(self, context: ModelContext) -> int:
        mixer_context = self.mixer_context(context)
        mixers = sum(mixer.num_params(mixer_context) for mixer in self.mixers)
        rows = table_rows(self.positions, mixer_context.max_length, self.block_offset, self.run_table)
        rows += context.vocab_size * (1 if self.tied else 2)
        blocks = mixers + len(self.mixers) * block_params(self)
        shape = (self.feedforward, self.width, self.hidden_width)
        blocks += sum(mixture_params(*shape, n) - feedforward.num_params(*shape) for n, _ in self.mixtures.values())
        return rows * self.width + blocks + norm_params(self.norm, self.width)

    def mixer_flops_per_token(self, context: ModelContext, length: int) -> float:
        mixer_context = self.mixer_context(context)
        return self.loops * sum(mixer.flops_per_token(mixer_context, length) for mixer in self.mixers)

    def flops_per_token(self, context: ModelContext, length: int) -> float:
        shape = (self.feedforward, self.width, self.hidden_width)
        block = feedforward.flops_per_token(*shape)
        blocks = len(self.mixers) * block + sum(
            mixture_flops(*shape, *sizes) - block for sizes in self.mixtures.values()
        )
        rest = self.loops * blocks + 2 * self.width * context.vocab_size
        return self.mixer_flops_per_token(context, length) + rest

    def state_bytes(self, context: ModelContext, length: int, dtype: torch.dtype) -> int:
        mixer_context = self.mixer_context(context)
        counters = 8 * (2 if self.positions in RUNS else 1)
        return counters + self.loops * sum(mixer.state_bytes(mixer_context, length, dtype) for mixer in self.mixers)

    def equals_at(self, other: ModelConfig, length: int) -> bool:
        """Say whether both compute the same on every sequence of up to `length` tokens, given equal weights."""
        if not isinstance(other, DecoderConfig) or len(self.mixers) != len(other.mixers):
            return False
        aside = {"preset", "layers", "ff_width", "checkpoint_activations", "max_length", "backends"}
        names = [item.name for item in dataclasses.fields(self) if item.name not in aside]
        return (
            all(getattr(self, name) == getattr(other, name) for name in names)
            and self.hidden_width == other.hidden_width
            and all(
                mine.equals_at(theirs, length) or theirs.equals_at(mine, length)
                for mine, theirs in zip(self.mixers, other.mixers, strict=True)
            )
        )

    @classmethod
    def examples(cls) -> Sequence["DecoderConfig"]:
        """Return one decoder for each mixer, a hybrid of them all, and one for each option of the model."""
        return [cls(**{"width": 24, "heads": 2, **variant}) for variant in decoders()]


@dataclass
class DecoderState(State):
    """The mixers' states (of every pass), the tokens that each row has seen, and the digits that it ended with (block
    ids)."""

    mixers: list[State]
    lengths_B: Tensor
    run_B: Tensor | None


class Decoder(LanguageModel):
    """A decoder-only transformer; see DecoderConfig for what can be chosen and LanguageModel for the call."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, context: ModelContext):
        super().__init__()
        self.config = config
        self.context = context
        self.max_length = config.max_length or context.max_length
        std = initial_std(config.width)
        self.embedding = nn.Embedding(context.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=std)
        self.positions = Positions(
            config.positions,
            config.width,
            self.max_length,
            context,
            std,
            block_offset=config.block_offset,
            run_table=config.run_table,
            position_base=config.position_base,
            closing=config.closing,
            read_offset=config.read_offset,
        )
        self.blocks = make_blocks(config, config.mixers, config.mixer_context(context), std, config.mixtures)
        for index in config.identity:
            cast(Block, self.blocks[index]).start_as_identity()
        self.norm = make_norm(config.norm, config.width)
        self.head_backend = config.mixer_context(context).backend("norm_linear")
        self.linear_backend = config.mixer_context(context).backend("linear")
        self.embed_backend = config.mixer_context(context).backend("embed_positions")
        self.head = None if config.tied else nn.Linear(config.width, context.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=std)

    def init_state(
        self,
        batch: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecoderState:
        weight = self.embedding.weight
        room = self.max_length if max_length is None else max_length
        device = weight.device if device is None else device
        dtype = weight.dtype if dtype is None else dtype
        counter_B = torch.zeros(batch, dtype=torch.int64, device=device)
        return DecoderState(
            mixers=[block.mixer.init_state(batch, room, device, dtype) for block in self._passes()],
            lengths_B=counter_B,
            run_B=counter_B.clone() if self.config.positions in RUNS else None,
        )

    def forward(
        self,
        tokens_BT: Tensor,
        state: DecoderState | None = None,
        *,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
        wanted_N: Tensor | None = None,
        soft_BTV: Tensor | None = None,
        hidden: bool = False,
    ) -> tuple[Tensor, Any]:
        """Return (logits_BTV, state), or logits_NV with `wanted_N`.

        With `hidden`, of the parallel form alone, what the head reads comes back in place of the logits, and the head's
        weight (V, D) in place of the state: a loss over a large vocabulary needs no logits.

        With `soft_BTV`, a distribution over the symbols for each place, the mean of their embeddings is read, at the
        scale of any other; position ids are still those of `tokens_BT`.
        Raises ValueError when a sequence does not fit the state or a position table.
        """
        if state is not None and documents_BT is not None:
            raise ValueError("documents_BT is given with a state: packed documents have only the parallel form")
        past_B, run_B = (None, None) if state is None else (state.lengths_B, state.run_B)
        dtype = self.embedding.weight.dtype
        one = past_B is not None and is_fused(past_B) and soft_BTV is None and not self._is_watched()
        table = self.positions.places() if one else None
        added, positions_BT = None, None
        if table is None:
            added, positions_BT, run_B = self.positions(tokens_BT, past_B, run_B, lengths_B, documents_BT, dtype)
        plain = state is None and lengths_B is None and documents_BT is None and soft_BTV is None
        alike = self._alike(tokens_BT, added) if plain else None
        if alike is not None:
            x_BTD = repeat_rows(*alike)
        elif table is not None and past_B is not None:
            tables = self.embedding.weight, table
            x_BTD = embed_positions(tokens_BT, *tables, past_B, lengths_B, backend=self.embed_backend)
        else:
            x_BTD = embed(self.embedding, tokens_BT, soft_BTV)
            x_BTD = x_BTD if added is None else x_BTD + added
        if self.config.dropout:
            x_BTD = functional.dropout(x_BTD, self.config.dropout, self.training)
        recompute = self.config.checkpoint_activations and state is None and torch.is_grad_enabled()
        mixer_states: list[Any] = []
        embedded_BTD, passes = x_BTD, self._passes()
        for index, block in enumerate(passes):
            if self.config.input_injection and index:
                x_BTD = x_BTD + embedded_BTD
            mixer_state = None if state is None else state.mixers[index]
            # Where no logits are wanted nothing reads what the last block's second half would add.
            wanted = wanted_N if index == len(passes) - 1 else None
            rest = (lengths_B, documents_BT, positions_BT, None, wanted, None if index else alike)
            arguments = (x_BTD, mixer_state, *rest)
            if recompute:
                # The state of a generator cannot be read while a step is captured; without dropout nobody needs it.
                random = self.config.dropout > 0
                x_BTD, mixer_state = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=random)
            else:
                x_BTD, mixer_state = block(*arguments)
            mixer_states.append(mixer_state)
        head = self.embedding if self.head is None else self.head
        if hidden:
            return self.norm(x_BTD), head.weight
        if chooses_rounded(state, x_BTD.device):
            logits_BTV = float_logits(self.norm(x_BTD), head.weight)
        elif is_fused(x_BTD):
            logits_BTV = norm_linear(x_BTD, self.norm, head.weight, backend=self.head_backend)
        else:
            x_BTD, named = self.norm(x_BTD), self.linear_backend != "auto"
            if named or self.context.vocab_size < LARGE:
                logits_BTV = linear(x_BTD, head.weight, backend=self.linear_backend)
            else:  # other backends copy the weight first
                logits_BTV = functional.linear(x_BTD, head.weight)
        if state is None:
            return logits_BTV, None
        return logits_BTV, self._advance(state, mixer_states, tokens_BT.shape[1], lengths_B, run_B)

    def _alike(self, tokens_BT: Tensor, added: Tensor | None) -> Alike | None:
        """Return what the first block reads without what recurs in it, or None where nothing is to be gained."""
        more = self.config.dropout or self.config.checkpoint_activations or len(self._passes()) == 1
        if more or self._is_watched() or tokens_BT.device.type != "cpu" or (added is not None and added.ndim != 2):
            return None
        return find_alike(self.embedding.weight, added, tokens_BT)

    def _is_watched(self) -> bool:
        return bool(self.embedding._forward_hooks or self.embedding._forward_pre_hooks)

    def last(self, tokens_BT: Tensor, state: Any, lengths_B: Tensor | None, count: int = 1) -> tuple[Tensor, Any]:
        wanted_BR = last_places(tokens_BT, lengths_B, count)
        logits_NV, state = self(tokens_BT, state, lengths_B=lengths_B, wanted_N=wanted_BR.flatten())
        return logits_NV.unflatten(0, wanted_BR.shape), state

    def _advance(
        self, state: DecoderState, mixer_states: list[Any], count: int, lengths_B: Tensor | None, run_B: Tensor | None
    ) -> DecoderState:
        new = count if lengths_B is None else lengths_B
        if torch.is_grad_enabled():
            return DecoderState(mixer_states, state.lengths_B + new, run_B)
        state.mixers = mixer_states
        state.lengths_B.add_(new)
        if state.run_B is not None and run_B is not None:
            state.run_B.copy_(run_B)
        return state

    def _passes(self) -> list[Block]:
        """Return the blocks in the order in which a token meets them, each as often as it does."""
        return cast("list[Block]", list(self.blocks) * self.config.loops)
