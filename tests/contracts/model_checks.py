"""What every language model promises, as plain functions that raise AssertionError. Shapes: B rows, T tokens."""

import copy
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trivium.mixers.base import Mixer
from trivium.mixers.routing import Switched
from trivium.model.base import LanguageModel, ModelContext
from trivium.model.folder import load_model, save_model
from trivium.tasks.base import TaskConfig

ROWS, LENGTH = 4, 11


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """1e-10 in float64, 1e-4 relative in float32; never more."""
    if expected.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


def assert_unchanged(model: torch.nn.Module, actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for a mixture of experts: a token may change the rows of a product, and so their rounding."""
    if any(isinstance(module, Switched) for module in model.modules()):
        assert_equal(actual, expected)
    else:
        assert torch.equal(actual, expected)


def random_tokens(context: ModelContext, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(context.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_pieces(length: int, seed: int) -> list[int]:
    generator, pieces = torch.Generator().manual_seed(seed), []
    while sum(pieces) < length:
        pieces.append(min(length - sum(pieces), int(torch.randint(1, 5, (), generator=generator))))
    return pieces


def stream(model: LanguageModel, tokens_BT: Tensor, pieces: list[int]) -> Tensor:
    state = model.init_state(len(tokens_BT))
    outputs = []
    for piece_BT in tokens_BT.split(pieces, dim=1):
        logits, state = model(piece_BT, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def check_streaming(model: LanguageModel, context: ModelContext) -> None:
    """Token by token and in random pieces give what the whole gives."""
    tokens_BT = random_tokens(context)
    whole, nothing = model(tokens_BT)
    assert nothing is None
    assert whole.shape == (ROWS, LENGTH, context.vocab_size)
    assert_equal(stream(model, tokens_BT, [1] * LENGTH), whole)
    for seed in range(2):
        assert_equal(stream(model, tokens_BT, random_pieces(LENGTH, seed)), whole)
    assert_equal(stream(model, tokens_BT, [LENGTH]), whole)


@torch.no_grad()
def check_ragged(model: LanguageModel, context: ModelContext) -> None:
    """Rows of different lengths, fed different numbers of tokens at a time (0 too), equal each row alone."""
    lengths = [LENGTH, 1, 6, context.max_length]
    rows = [random_tokens(context, 1, length, seed=length)[0] for length in lengths]
    alone = [model(row[None])[0][0] for row in rows]
    generator = torch.Generator().manual_seed(5)
    done = torch.zeros(len(rows), dtype=torch.int64)
    outputs: list[list[Tensor]] = [[] for _ in rows]
    state = model.init_state(len(rows))
    while int(done.sum()) < sum(lengths):
        left = torch.tensor(lengths) - done
        added_B = torch.minimum(left, torch.randint(0, 5, (len(rows),), generator=generator))
        tokens = max(1, int(added_B.max()))
        # What lies behind a row's tokens is garbage on purpose.
        piece_BT = torch.randint(context.vocab_size, (len(rows), tokens), generator=generator)
        for b, row in enumerate(rows):
            piece_BT[b, : added_B[b]] = row[done[b] : done[b] + added_B[b]]
        logits, state = model(piece_BT, state, lengths_B=added_B)
        for b in range(len(rows)):
            outputs[b].append(logits[b, : added_B[b]])
        done += added_B
    for mine, expected in zip(outputs, alone, strict=True):
        assert_equal(torch.cat(mine), expected)
    padded_BT = random_tokens(context, len(rows), context.max_length, seed=9)
    for b, row in enumerate(rows):
        padded_BT[b, : len(row)] = row
    whole, _ = model(padded_BT, lengths_B=torch.tensor(lengths))
    for b, expected in enumerate(alone):
        assert_equal(whole[b, : lengths[b]], expected)


@torch.no_grad()
def check_causal(model: LanguageModel, context: ModelContext) -> None:
    """A later token never changes an earlier logit, and each token does change its own."""
    tokens_BT = random_tokens(context)
    before, _ = model(tokens_BT)
    for place in (1, LENGTH // 2, LENGTH - 1):
        changed_BT = tokens_BT.clone()
        changed_BT[:, place] = (changed_BT[:, place] + 1) % context.vocab_size
        after, _ = model(changed_BT)
        assert_unchanged(model, after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@torch.no_grad()
def check_wanted(model: LanguageModel, context: ModelContext) -> None:
    """Logits asked for alone equal the same places of all logits, in the parallel form and when streaming."""
    tokens_BT = random_tokens(context)
    wanted_N = torch.tensor([0, 3, LENGTH, 2 * LENGTH + 5, ROWS * LENGTH - 1])
    for state in (None, model.init_state(ROWS)):
        alone_NV, _ = model(tokens_BT, state, wanted_N=wanted_N)
        assert_equal(alone_NV, model(tokens_BT)[0].flatten(0, 1)[wanted_N])


@torch.no_grad()
def check_documents(model: LanguageModel, context: ModelContext) -> None:
    """Packed documents give what each gives alone; each begins where the model allows one to begin."""
    tokens_BT = random_tokens(context)
    for wanted in ([4], [1, 6]):
        multiple = model.config.document_multiple
        cuts = sorted({-(-cut // multiple) * multiple for cut in wanted})
        starts = [0, *(cut for cut in cuts if cut < LENGTH), LENGTH]
        pieces = [end - start for start, end in pairwise(starts)]
        ids = torch.cat([torch.full((size,), 3 * index + 1) for index, size in enumerate(pieces)])
        packed, _ = model(tokens_BT, documents_BT=ids.expand(ROWS, -1))
        alone = [model(document)[0] for document in tokens_BT.split(pieces, dim=1)]
        assert_equal(packed, torch.cat(alone, dim=1))


def check_functional(model: LanguageModel, context: ModelContext) -> None:
    """Under grad the old state stays as it was, and gradients through the states equal those of the whole."""
    tokens_BT = random_tokens(context)
    weights = torch.randn(ROWS, LENGTH, context.vocab_size, dtype=next(model.parameters()).dtype)

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))

    expected = gradients(model(tokens_BT)[0])
    state = model.init_state(ROWS)
    first, second = tokens_BT.split([5, LENGTH - 5], dim=1)
    start, middle = model(first, state)
    kept = [tensor.clone() for tensor in middle.tensors()]
    end, _ = model(second, middle)
    assert all(tensor.count_nonzero() == 0 for tensor in state.tensors())
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(middle.tensors(), kept, strict=True))
    for mine, wanted in zip(gradients(torch.cat([start, end], dim=1)), expected, strict=True):
        assert_equal(mine, wanted)


@torch.no_grad()
def check_in_place(model: LanguageModel, context: ModelContext) -> None:
    """Under no_grad a step of one token keeps every tensor where it is, so that it can be captured in a CUDA graph."""
    tokens_BT = random_tokens(context)
    state = model.init_state(ROWS)
    addresses = [tensor.data_ptr() for tensor in state.tensors()]
    for place in range(3):
        _, state = model(tokens_BT[:, place : place + 1], state)
    assert [tensor.data_ptr() for tensor in state.tensors()] == addresses


@torch.no_grad()
def check_never_waits(config: Any, context: ModelContext) -> None:
    """A step of one token never looks at a value on a device: meta tensors, which have none, pass through it."""
    # The one thing that meta tensors cannot do is to switch autocast off.
    with torch.device("meta"), mock.patch("torch.autocast", return_value=nullcontext()):
        model = config.build(context).eval()
        state = model.init_state(ROWS)
        for _ in range(2):
            added_B = torch.ones(ROWS, dtype=torch.int64)
            _, state = model(torch.zeros(ROWS, 1, dtype=torch.int64), state, lengths_B=added_B)


@torch.no_grad()
def check_select_and_reset(model: LanguageModel, context: ModelContext) -> None:
    """Selected rows go on as their originals do; a reset row starts anew and the others don't notice."""
    tokens_BT = random_tokens(context)
    whole, _ = model(tokens_BT)
    _, state = model(tokens_BT[:, :6], model.init_state(ROWS))
    rows = torch.tensor([2, 0, 2])
    picked, _ = model(tokens_BT[rows, 6:], state.select(rows))
    assert_equal(picked, whole[rows, 6:])
    state = state.reset(torch.tensor([1]))
    continued_BT = tokens_BT[:, 6:].clone()
    continued_BT[1] = tokens_BT[1, : LENGTH - 6]
    logits, _ = model(continued_BT, state)
    expected = whole[:, 6:].clone()
    expected[1] = whole[1, : LENGTH - 6]
    assert_equal(logits, expected)


def check_counts(config: Any, context: ModelContext) -> None:
    """Counted parameters, FLOPs and state bytes are the real ones."""
    model = config.build(context)
    assert config.num_params(context) == sum(parameter.numel() for parameter in model.parameters())
    for length in (1, 7, context.max_length):
        for dtype in (torch.float32, torch.bfloat16):
            real = model.init_state(3, length, dtype=dtype).num_bytes()
            assert 3 * config.state_bytes(context, length, dtype) == real
        # The counter knows matrix products only, and not which pairs are allowed: the mixers answer for their own.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(random_tokens(context, 1, length))
        counts = counter.get_flop_counts()
        inside = [name for name, module in model.named_modules() if isinstance(module, Mixer)]
        real = sum(counts["Global"].values())
        real -= sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in inside)
        mixers = config.mixer_flops_per_token(context, length)
        torch.testing.assert_close(length * (config.flops_per_token(context, length) - mixers), float(real))


@torch.no_grad()
def check_save_and_load(model: LanguageModel, task_config: TaskConfig, folder: Path) -> None:
    """A saved model comes back with the same config, tensors and logits, bit for bit."""
    save_model(folder, model, task_config)
    loaded, _, task = load_model(folder)
    assert loaded.config == model.config
    assert task.config == task_config
    theirs = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    tokens_BT = random_tokens(model.context)
    assert torch.equal(loaded(tokens_BT)[0], copy.deepcopy(model).eval()(tokens_BT)[0])
