"""What a model looked at: one problem's tokens, their probabilities, and each layer's weights from token to token.

Softmax and linear attention weigh the values that they read: these weights come from the operator itself, called with
values that name their own places. Of a mixer without such an operator, and of a whole model, the effective attention is
the size of a derivative. Shapes: T tokens, H heads, D width, V vocabulary; t is the token that reads, s the one read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from trivium.config import UserError
from trivium.data.positions import block_ids
from trivium.generate.engine import check_length, evaluating, generate, longest_input
from trivium.generate.sampling import device_of
from trivium.mixers.base import Mixer
from trivium.model.base import LanguageModel
from trivium.ops import dispatch
from trivium.ops.simplicial.reference import allowed, pair_weights
from trivium.report.storage import write_whole
from trivium.tasks.base import Example, Task

ALTERNATIVES = 3
LARGEST = 256 * 2**20  # bytes of arrays; a page of more opens in no browser


@dataclass(frozen=True)
class Panel:
    """The weights of one layer: `weights_HTT` [head, reader, read], and of 2-simplicial heads `pairs_HTTT` too.

    `kind` is "weights" (each row of a softmax sums to 1), "signed" (linear attention, whose weights have signs) or
    "derivative".
    """

    layer: str
    mixer: str
    kind: str
    weights_HTT: np.ndarray
    pairs_HTTT: np.ndarray | None = None
    second_HTT: np.ndarray | None = None


@dataclass(frozen=True)
class Trace:
    """One problem as the model saw it. `prompt` counts the tokens that were given; the rest was generated.

    What place t tells is token t + 1 + `shift`, or, with `labels`, the label of its own token.
    """

    tokens: list[str]
    prompt: int
    significance: list[int]
    correct: bool | None
    labels: bool
    probabilities: list[float | None]
    alternatives: list[list[tuple[str, float]]]
    shift: int = 0
    panels: list[Panel] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every array by the name under which it is stored."""
        named: dict[str, np.ndarray] = {}
        for index, panel in enumerate(self.panels):
            for name in ("weights_HTT", "pairs_HTTT", "second_HTT"):
                array = getattr(panel, name)
                if array is not None:
                    named[f"panel{index}.{name}"] = array
        return named

    def described(self) -> dict[str, Any]:
        """Return everything but the arrays as plain data."""
        return {
            "tokens": self.tokens,
            "prompt": self.prompt,
            "significance": self.significance,
            "correct": self.correct,
            "labels": self.labels,
            "shift": self.shift,
            "probabilities": self.probabilities,
            "alternatives": self.alternatives,
            "panels": [{"layer": panel.layer, "mixer": panel.mixer, "kind": panel.kind} for panel in self.panels],
        }


def trace(model: LanguageModel, task: Task, example: Example) -> Trace:
    """Let `model` answer `example` greedily, and return what it read on the way.

    Of a model that gives several tokens a pass, each token's probability is that which the place told that gave it.
    Raises UserError for a problem that is longer than the model reads, and a trace of more than 256 MiB, with its size.
    """
    alphabet, ahead = task.alphabet, 1 + model.decoding.shift
    prompt = alphabet.encode(example.prompt)
    check_length(len(prompt), longest_input(model), 0 if task.labels else len(alphabet.encode(example.answer)))
    _check_size(model, len(prompt))  # before minutes of generating what is too long to trace
    ids = list(prompt)
    correct = None
    if not task.labels:
        (found,) = generate(
            model, [prompt], end_id=alphabet.end_id, max_new_tokens=longest_input(model) + 1 - len(prompt)
        )
        # Where one pass gives whole answers, their end is known and not told.
        ids += found.tokens[: model.decoding.answer_tokens]
        if example.answer:
            correct = task.verify(example, alphabet.decode(found.tokens)).correct
    read = ids if task.labels else ids[:-ahead]  # what the last pass generates is read by nobody
    _check_size(model, len(read))
    with evaluating(model):
        logits_TV, panels = _observe(model, read)
        # What each place tells: a token behind it, or, where places are labelled, its best guess.
        told = logits_TV.argmax(-1).tolist()
        if not task.labels:
            told = ids[ahead:]
        panels.append(_whole_model(model, read, told))
    shares_TV = logits_TV.double().softmax(-1).cpu()
    probabilities: list[float | None] = [] if task.labels else [None] * ahead
    alternatives: list[list[tuple[str, float]]] = [] if task.labels else [[] for _ in range(ahead)]
    for share_V, token in zip(shares_TV, told, strict=True):
        best = share_V.topk(min(ALTERNATIVES, len(share_V)))
        probabilities.append(float(share_V[token]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        alternatives.append([(alphabet.symbols[index], share) for index, share in pairs])
    return Trace(
        tokens=[alphabet.symbols[token] for token in ids],
        prompt=len(prompt),
        significance=block_ids(np.array(ids), alphabet.digit_ids).tolist(),
        correct=correct,
        labels=task.labels,
        probabilities=probabilities,
        alternatives=alternatives,
        shift=model.decoding.shift,
        panels=panels,
    )


def _check_size(model: LanguageModel, tokens: int) -> None:
    mixers = getattr(model.config, "mixers", ())
    layers = len(mixers) * getattr(model.config, "loops", 1)
    pairs = sum(getattr(mixer, "form", None) in ("trilinear", "determinant") for mixer in mixers)
    size = 4 * tokens**2 * model.config.heads * (layers + 1 + pairs * getattr(model.config, "loops", 1) * tokens)
    if size > LARGEST:
        raise UserError(
            f"a trace of {tokens} tokens would hold {size / 2**20:,.0f} MiB, more than {LARGEST / 2**20:,.0f} MiB: "
            "give a shorter expression"
        )


def _observe(model: LanguageModel, ids: Sequence[int]) -> tuple[Tensor, list[Panel]]:
    """Return the logits (T, V) of the whole text and a panel of each layer, in the order in which layers run."""
    calls: list[list[tuple[str, tuple[Any, ...], dict[str, Any]]]] = []
    entered: list[tuple[Mixer, Tensor, dict[str, Any]]] = []

    def enter(mixer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(mixer, Mixer)
        entered.append((mixer, arguments[0].detach(), keywords))
        calls.append([])

    def called(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if calls:
            calls[-1].append((operator, arguments, keywords))

    # Chunks of a prefix-scan model are no places of the text: of that model only the whole is shown.
    mixers = [block.mixer for block in getattr(model, "blocks", ())]
    hooks = [mixer.register_forward_pre_hook(enter, with_kwargs=True) for mixer in mixers]
    try:
        with torch.no_grad(), dispatch.observing(called):
            logits_BTV, _ = model(torch.tensor([list(ids)], device=device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    panels = []
    for index, ((mixer, x_BTD, keywords), made) in enumerate(zip(entered, calls, strict=True)):
        panels.append(_panel(f"layer {index + 1}", mixer, x_BTD, keywords, made))
    return logits_BTV[0], panels


def _panel(
    layer: str,
    mixer: Mixer,
    x_BTD: Tensor,
    keywords: dict[str, Any],
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]],
) -> Panel:
    name = type(mixer).__name__
    tokens = x_BTD.shape[1]
    # A packed call is shown as the attention that it is, whether or not it made that call itself.
    known = {"attention", "simplicial", "gated_linear_attention", "gated_delta_rule"}
    packed = [_unpacked(call) for call in made if call[0] == "packed_attention"]
    made = [call for call in made if call[0] in known] or packed
    if len(made) != 1:
        return Panel(layer, name, "derivative", _derivatives(mixer, x_BTD, keywords)[None])
    operator, arguments, options = made[0]
    with torch.no_grad():
        if operator == "simplicial" and options["form"] != "factorized":
            joint_HTTT = _pairs(*arguments[:3], **options)
            first, second = joint_HTTT.sum(3), joint_HTTT.sum(2)
            return Panel(layer, name, "weights", _array(first), _array(joint_HTTT), _array(second))
        weights_HTT = _weights(operator, arguments, options, tokens)
    # The product of two softmaxes sums to no more than 1, and what a memory holds has signs.
    kind = "weights" if operator in ("attention", "simplicial") else "signed"
    return Panel(layer, name, kind, _array(weights_HTT))


def _unpacked(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    x_BTND, kv_heads, window, _ = call[1]
    tokens, packed = x_BTND.shape[1:3]
    reads_BTS = allowed(tokens, window or tokens, None, x_BTND.device)
    return "attention", (*x_BTND.split((packed - 2 * kv_heads, kv_heads, kv_heads), dim=2), reads_BTS), {}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _places(like_BTHK: Tensor, tokens: int) -> Tensor:
    """Return values (B, S, H, T) that name the token that they are of, several steps of one token alike."""
    steps = like_BTHK.shape[1] // tokens
    one_hot_ST = torch.eye(tokens, device=like_BTHK.device, dtype=like_BTHK.dtype).repeat_interleave(steps, dim=0)
    return one_hot_ST[None, :, None].expand(like_BTHK.shape[0], -1, like_BTHK.shape[2], -1)


def _weights(operator: str, arguments: tuple[Any, ...], options: dict[str, Any], tokens: int) -> Tensor:
    """Return (H, T, T): the operator's own output for values that name their places is what it weighs them with."""
    function = dispatch.load(operator, "reference", "cpu" if operator == "attention" else arguments[0].device.type)
    if operator == "attention":
        q, k, v, allowed_BTS = arguments
        return function(q, k, _places(v, tokens), allowed_BTS)[0].transpose(0, 1)
    if operator == "simplicial":
        q, k1, k2, v1, _ = arguments
        return function(q, k1, k2, _places(v1, tokens), None, **options)[0].transpose(0, 1)
    q, k, v, *gates = arguments
    values = _places(v, tokens)
    state = torch.zeros(*options["state"].shape[:3], tokens, dtype=options["state"].dtype, device=q.device)
    o_BSHT, _ = function(q, k, values, *gates, **{**options, "state": state})
    steps = q.shape[1] // tokens  # of several steps of a token the last is read
    return o_BSHT[0, steps - 1 :: steps].transpose(0, 1)


def _pairs(q: Tensor, k1: Tensor, k2: Tensor, **options: Any) -> Tensor:
    """Return S (H, i, j, k) of 2-simplicial attention."""
    groups, tokens = q.shape[2] // k1.shape[2], q.shape[1]
    q, k1, k2 = q.float(), *(x.float().repeat_interleave(groups, dim=2) for x in (k1, k2))
    if options["bias"] is not None:
        k2 = k2 + options["bias"][0].float().repeat_interleave(groups, dim=0)
    reads = [allowed(tokens, options[name], None, q.device)[:, None] for name in ("window1", "window2")]
    return pair_weights(q, k1, k2, *reads, scale=options["scale"], form=options["form"])[0]


def _derivatives(mixer: Mixer, x_BTD: Tensor, keywords: dict[str, Any]) -> np.ndarray:
    """Return (T, T): the Frobenius norms of d output_t / d input_s."""
    tokens, width = x_BTD.shape[1:]
    # One copy of the text for each output channel: one backward pass then gives all derivatives of one token.
    x_DTD = x_BTD.expand(width, -1, -1).clone().requires_grad_()
    positions = keywords.get("positions_BT")
    keywords = {**keywords, "positions_BT": None if positions is None else positions.expand(width, -1)}
    with torch.enable_grad():
        y_DTD, _ = mixer(x_DTD, **keywords)
        channel_D = torch.arange(width, device=x_BTD.device)
        rows = []
        for place in range(tokens):
            (found_DTD,) = torch.autograd.grad(y_DTD[channel_D, place, channel_D].sum(), x_DTD, retain_graph=True)
            rows.append(found_DTD.square().sum((0, 2)).sqrt())
    return torch.stack(rows).cpu().numpy()


def _whole_model(model: LanguageModel, read: Sequence[int], told: Sequence[int]) -> Panel:
    """Return the lengths of d log p(what place t tells) / d embedding_s, through all layers."""
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    moved: list[Tensor] = []

    def move(module: nn.Module, arguments: tuple[Any, ...], embedded_BTD: Tensor) -> Tensor:
        moved.append(embedded_BTD.detach().requires_grad_())
        return moved[-1]

    hook = embedding.register_forward_hook(move)
    try:
        with torch.enable_grad():
            logits_BTV, _ = model(torch.tensor([list(read)], device=device_of(model)))
            log_shares_TV = logits_BTV[0].float().log_softmax(-1)
    finally:
        hook.remove()
    rows = []
    for place, token in enumerate(told):
        (found_BTD,) = torch.autograd.grad(log_shares_TV[place, token], moved[0], retain_graph=True)
        rows.append(found_BTD[0].norm(dim=-1))
    return Panel("whole model", type(model).__name__, "derivative", _array(torch.stack(rows))[None])


def save_trace(found: Trace, stem: Path) -> tuple[Path, Path]:
    """Write a trace beside `stem`: arrays as .safetensors, the rest as .json, each of them whole; return both."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    write_whole(files[0], save({name: np.ascontiguousarray(array) for name, array in found.arrays().items()}))
    write_whole(files[1], json.dumps(found.described(), indent=1))
    return files
