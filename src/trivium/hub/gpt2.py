"""GPT-2's weights in a Trivium decoder, from a folder in transformers' layout or from the Hugging Face hub.

GPT-2 stores its linear maps as Conv1D, [in, out]; queries, keys and values are one of them, [d, 3d]; the head is the
embedding and absent from the file. Layer i goes to block i; blocks may be fewer. What a block has no counterpart for,
such as another mixer, stays as it starts.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trivium.config import unreadable
from trivium.mixers.attention import AttentionConfig
from trivium.model.base import ModelConfig, ModelContext
from trivium.model.decoder import Decoder, DecoderConfig
from trivium.model.folder import CONFIG_FILE, WEIGHTS_FILE
from trivium.registry import UserError
from trivium.tasks.download import hub_file, names_repository

PREFIX = "transformer."
HEAD_WIDTH = 64  # in all sizes that were published; a folder without config.json is read so
_KNOWN = re.compile(
    r"wte\.weight|wpe\.weight|(ln_f|h\.(\d+)\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))\.(weight|bias)"
)
_IGNORED = re.compile(r"(h\.\d+\.attn\.(masked_)?bias)|lm_head\.weight")
# Ours and GPT-2's names of a block's parts; the last says whether the weight is a Conv1D.
_SHARED = (
    ("norm1", "ln_1", False),
    ("norm2", "ln_2", False),
    ("feedforward.input", "mlp.c_fc", True),
    ("feedforward.output", "mlp.c_proj", True),
)
_ATTENTION = (("mixer.qkv", "attn.c_attn", True), ("mixer.out", "attn.c_proj", True))

_log = logging.getLogger("trivium")


@dataclass(frozen=True)
class Gpt2:
    """A file of GPT-2's weights: where it lies, its sizes, and its name for each tensor without the prefix."""

    path: Path
    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    names: dict[str, str]


def find_gpt2(place: str) -> Gpt2:
    """Return the weights that `place` names, a folder or a hub repository such as gpt2, after reading its header.

    Raises UserError when they are missing, a pickle, damaged, or not GPT-2's.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        path, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        if not path.is_file():
            pickled = sorted(each.name for each in folder.glob("*.bin"))
            why = (
                f"{pickled[0]} is a pickle, which can run any code and is never loaded" if pickled else "has no weights"
            )
            raise UserError(f"model.init_from: {folder}: {why}; allowed: {WEIGHTS_FILE}, as save_pretrained writes it")
    elif folder.exists() or not names_repository(place):
        raise UserError(f"model.init_from: {place}: no such folder, nor the name of a hub repository such as gpt2")
    else:
        instead = f"without a network, give a folder that holds its {WEIGHTS_FILE} and {CONFIG_FILE}"
        path, config = (hub_file(place, name, instead) for name in (WEIGHTS_FILE, CONFIG_FILE))
    return _describe(path, _read_config(config) if config.is_file() else None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    kind = described.get("model_type") if isinstance(described, dict) else None
    if kind != "gpt2":
        raise UserError(f"model.init_from: {path}: model_type is {kind!r}; allowed: 'gpt2'")
    wanted = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for key, value in wanted.items():
        if described.get(key, value) != value:
            raise UserError(f"model.init_from: {path}: {key} is {described[key]!r}; allowed: {value!r}, as in GPT-2")
    return described


def _describe(path: Path, config: dict[str, Any] | None) -> Gpt2:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.init_from: {path}: damaged or not a safetensors file: {error}") from None
    names = {name.removeprefix(PREFIX): name for name in shapes}
    strangers = [name for name in names if not _KNOWN.fullmatch(name) and not _IGNORED.fullmatch(name)]
    missing = [name for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias") if name not in names]
    layers = 1 + max((int(found[2]) for found in map(_KNOWN.fullmatch, names) if found and found[2]), default=-1)
    for layer in range(layers):
        for _, part, _ in (*_SHARED, *_ATTENTION):
            kinds = (f"h.{layer}.{part}.{kind}" for kind in ("weight", "bias"))
            missing += [name for name in kinds if name not in names]
    if strangers or missing:
        what = f"has the unknown tensor {strangers[0]}" if strangers else f"lacks {missing[0]}"
        raise UserError(f"model.init_from: {path}: not GPT-2's weights: it {what}")
    (vocabulary, width), positions = shapes[names["wte.weight"]], shapes[names["wpe.weight"]][0]
    for key, size in (("n_embd", width), ("vocab_size", vocabulary), ("n_positions", positions)):
        if config is not None and config.get(key, size) != size:
            raise UserError(f"model.init_from: {path}: its tensors are of {key} {size}, config.json says {config[key]}")
    heads = int(config["n_head"]) if config is not None and "n_head" in config else max(width // HEAD_WIDTH, 1)
    return Gpt2(path, layers, width, heads, vocabulary, positions, names)


def check_gpt2(gpt2: Gpt2, model: ModelConfig, context: ModelContext) -> None:
    """Raise UserError unless `model`, built in `context`, can begin with these weights."""
    if not isinstance(model, DecoderConfig):
        raise UserError(f"model.init_from: a model of kind {model.kind} has no GPT-2 weights; allowed: decoder")
    length = model.max_length or context.max_length
    fixed: tuple[tuple[str, Any, Any], ...] = (
        ("width", model.width, gpt2.width),
        ("heads", model.heads, gpt2.heads),
        ("positions", model.positions, "learned"),
        ("norm", model.norm, "layernorm"),
        ("feedforward", model.feedforward, "gelu_new"),
        ("ff_width", model.hidden_width, 4 * gpt2.width),
    )
    for name, given, allowed in fixed:
        if given != allowed:
            raise UserError(f"model.{name}: {given} does not fit the weights of {gpt2.path}; allowed: {allowed}")
    if len(model.mixers) > gpt2.layers:
        raise UserError(
            f"model.layers: {len(model.mixers)} blocks, {gpt2.path} has {gpt2.layers}; allowed: so many or fewer"
        )
    if length > gpt2.positions:
        raise UserError(
            f"model.max_length: {length} is longer than the position table of {gpt2.path}; "
            f"allowed: up to {gpt2.positions}"
        )
    if context.vocab_size != gpt2.vocabulary:
        raise UserError(
            f"task: its vocabulary has {context.vocab_size} tokens, the weights of {gpt2.path} {gpt2.vocabulary}; "
            "give the task the tokenizer of these weights"
        )
    for index, mixer in enumerate(model.mixers):
        if isinstance(mixer, AttentionConfig) and not (_is_gpt2s(mixer, model.heads) or index in _fresh(model)):
            raise UserError(
                f"model.layers: the attention of block {index} cannot hold GPT-2's; allowed: attention(bias=true), "
                "with a window or not, without qk_norm and shared kv_heads"
            )


def _is_gpt2s(mixer: AttentionConfig, heads: int) -> bool:
    return mixer.bias and not mixer.qk_norm and mixer.kv_heads in (None, heads)


def _fresh(model: DecoderConfig) -> tuple[int, ...]:
    """Return the blocks that begin as the identity, which weights of GPT-2 would not be."""
    return tuple(getattr(model, "identity", ()))


def load_gpt2(gpt2: Gpt2, model: Decoder) -> list[str]:
    """Put the weights into `model`, in its precision and place; return the names of what stays as it starts.

    Raises UserError when `check_gpt2` does, or when the file is damaged.
    """
    check_gpt2(gpt2, model.config, model.context)
    targets = dict(model.named_parameters())
    filled = set()
    try:
        with safe_open(gpt2.path, framework="pt") as file, torch.no_grad():
            for target, source, transposed in _pairs(gpt2, model):
                value = cast(Tensor, file.get_tensor(gpt2.names[source]))
                value = value.T if transposed else value
                parameter = targets[target]
                if target == "positions.table.weight":
                    value = value[: len(parameter)]
                # Each expert of a mixture begins as GPT-2's one feed-forward.
                if parameter.shape[parameter.ndim - value.ndim :] != value.shape:
                    raise UserError(
                        f"model.init_from: {gpt2.path}: {source} is {tuple(value.shape)} where the model's {target} "
                        f"is {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)
                filled.add(target)
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.init_from: {gpt2.path}: damaged: {error}") from None
    own = [name for name in targets if name not in filled]
    blocks = sorted({".".join(name.split(".")[:3]) for name in own})
    _log.info("%s: took %d tensors; of their own start: %s", gpt2.path, len(filled), ", ".join(blocks) or "none")
    return own


def _pairs(gpt2: Gpt2, model: Decoder) -> Iterator[tuple[str, str, bool]]:
    """Yield (our parameter, GPT-2's tensor, whether to transpose it) of all that has a counterpart."""
    yield "embedding.weight", "wte.weight", False
    yield "positions.table.weight", "wpe.weight", False
    if isinstance(model.head, nn.Module):
        yield "head.weight", "lm_head.weight" if "lm_head.weight" in gpt2.names else "wte.weight", False
    yield from ((f"norm.{kind}", f"ln_f.{kind}", False) for kind in ("weight", "bias"))
    for index, mixer in enumerate(model.config.mixers):
        if index in _fresh(model.config):
            continue
        parts = (*_SHARED, *(_ATTENTION if isinstance(mixer, AttentionConfig) else ()))
        for ours, theirs, conv in parts:
            yield f"blocks.{index}.{ours}.weight", f"h.{index}.{theirs}.weight", conv
            yield f"blocks.{index}.{ours}.bias", f"h.{index}.{theirs}.bias", False
