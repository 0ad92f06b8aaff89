"""What every mixer promises, as plain functions that raise AssertionError. Shapes: B rows, T tokens, D width."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.model_checks import assert_equal, assert_unchanged, random_pieces
from trivium.mixers.base import Mixer, MixerConfig, MixerContext, State
from trivium.ops import dispatch

ROWS, LENGTH, ROOM = 3, 12, 14


def build(config: MixerConfig, context: MixerContext, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    mixer = config.build(context).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():  # norms and biases at 1 and 0 would hide a mistake with them
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def width_and_dtype(mixer: Any) -> tuple[int, torch.dtype]:
    weight = next(module.weight for module in mixer.modules() if isinstance(module, nn.Linear))
    return weight.shape[1], weight.dtype


def random_input(mixer: Any, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    width, dtype = width_and_dtype(mixer)
    return torch.randn(rows, length, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def empty_state(mixer: Any, rows: int = ROWS, room: int = ROOM) -> Any:
    return mixer.init_state(rows, room, "cpu", width_and_dtype(mixer)[1])


def stream(mixer: Any, x_BTD: Tensor, pieces: list[int]) -> Tensor:
    state, outputs = empty_state(mixer, len(x_BTD)), []
    for piece_BTD in x_BTD.split(pieces, dim=1):
        y_BTD, state = mixer(piece_BTD, state)
        outputs.append(y_BTD)
    return torch.cat(outputs, dim=1)


def check_streaming(mixer: Any) -> None:
    """Token by token and in random pieces give what the whole gives, in place and functionally."""
    x_BTD = random_input(mixer)
    whole, nothing = mixer(x_BTD)
    assert nothing is None
    assert whole.shape == x_BTD.shape
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for pieces in ([1] * LENGTH, random_pieces(LENGTH, 0), random_pieces(LENGTH, 1), [2, LENGTH - 2], [LENGTH]):
                assert_equal(stream(mixer, x_BTD, pieces), whole)


@torch.no_grad()
def check_ragged(mixer: Any) -> None:
    """Rows fed different numbers of tokens at a time (0 too), with NaN behind them, equal each row alone."""
    lengths = [LENGTH, 1, 7, ROOM]
    rows = [random_input(mixer, 1, length, seed=length)[0] for length in lengths]
    alone = [mixer(row[None])[0][0] for row in rows]
    for longest in (1, 5):
        generator = torch.Generator().manual_seed(longest)
        done = torch.zeros(len(rows), dtype=torch.int64)
        outputs: list[list[Tensor]] = [[] for _ in rows]
        state = empty_state(mixer, len(rows))
        while int(done.sum()) < sum(lengths):
            offered_B = torch.randint(0, longest + 1, (len(rows),), generator=generator)
            added_B = torch.minimum(torch.tensor(lengths) - done, offered_B)
            tokens = max(1, int(added_B.max()))
            piece_BTD = torch.full((len(rows), tokens, rows[0].shape[1]), torch.nan, dtype=rows[0].dtype)
            for b, row in enumerate(rows):
                piece_BTD[b, : added_B[b]] = row[done[b] : done[b] + added_B[b]]
            y_BTD, state = mixer(piece_BTD, state, lengths_B=added_B)
            for b in range(len(rows)):
                outputs[b].append(y_BTD[b, : added_B[b]])
            done += added_B
        for mine, expected in zip(outputs, alone, strict=True):
            assert_equal(torch.cat(mine), expected)
    padded_BTD = torch.full((len(rows), ROOM, rows[0].shape[1]), torch.nan, dtype=rows[0].dtype)
    for b, row in enumerate(rows):
        padded_BTD[b, : len(row)] = row
    for state in (None, empty_state(mixer, len(rows))):
        whole, _ = mixer(padded_BTD, state, lengths_B=torch.tensor(lengths))
        for b, expected in enumerate(alone):
            assert_equal(whole[b, : lengths[b]], expected)


@torch.no_grad()
def check_causal(mixer: Any) -> None:
    """A later token never changes an earlier output, and each token does change its own."""
    x_BTD = random_input(mixer)
    before, _ = mixer(x_BTD)
    for place in range(1, LENGTH):
        changed_BTD = x_BTD.clone()
        changed_BTD[:, place] += 1
        after, _ = mixer(changed_BTD)
        assert_unchanged(mixer, after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


def check_wanted(mixer: Any) -> None:
    """What is asked for at some places alone is what the whole has there, with its gradients; ragged rows too."""
    x_BTD = random_input(mixer).requires_grad_()
    wanted_N = torch.tensor([0, 3, LENGTH, 2 * LENGTH + 5, ROWS * LENGTH - 1])
    leaves = [x_BTD, *mixer.parameters()]
    for lengths_B in (None, torch.tensor([LENGTH, 1, LENGTH])):
        whole_BTD, _ = mixer(x_BTD, lengths_B=lengths_B)
        y_ND = mixer.at(x_BTD, wanted_N, lengths_B=lengths_B)
        expected_ND = whole_BTD.flatten(0, 1)[wanted_N]
        assert_equal(y_ND, expected_ND)
        weights_ND = torch.randn(y_ND.shape, dtype=y_ND.dtype, generator=torch.Generator().manual_seed(4))
        mine, theirs = (torch.autograd.grad((y * weights_ND).sum(), leaves) for y in (y_ND, expected_ND))
        for gradient, expected in zip(mine, theirs, strict=True):
            assert_equal(gradient, expected)
    ids_BT = torch.arange(LENGTH).div(5, rounding_mode="floor").expand(ROWS, LENGTH)
    packed_BTD, _ = mixer(x_BTD, documents_BT=ids_BT)
    assert_equal(mixer.at(x_BTD, wanted_N, documents_BT=ids_BT), packed_BTD.flatten(0, 1)[wanted_N])


@torch.no_grad()
def check_documents(mixer: Any) -> None:
    """Packed documents give what each gives alone, whatever their ids and however they differ between rows."""
    x_BTD = random_input(mixer)
    layouts = ([4, LENGTH - 4], [1, 5, LENGTH - 6], [LENGTH])
    ids_BT = torch.stack(
        [torch.repeat_interleave(torch.arange(len(sizes)) * 3 + 1, torch.tensor(sizes)) for sizes in layouts]
    )
    packed, _ = mixer(x_BTD, documents_BT=ids_BT)
    for b, sizes in enumerate(layouts):
        alone = [mixer(document)[0] for document in x_BTD[b : b + 1].split(sizes, dim=1)]
        assert_equal(packed[b : b + 1], torch.cat(alone, dim=1))


def check_functional(mixer: Any) -> None:
    """Under grad the old state stays as it was, and gradients through the states equal those of the whole."""
    x_BTD = random_input(mixer).requires_grad_()
    weights = random_input(mixer, seed=1)
    leaves = [x_BTD, *mixer.parameters()]
    expected = torch.autograd.grad((mixer(x_BTD)[0] * weights).sum(), leaves)
    for sizes in ([5, LENGTH - 5], [4, 1, LENGTH - 5], [1] * LENGTH):
        state, outputs = empty_state(mixer), []
        for piece_BTD in x_BTD.split(sizes, dim=1):
            kept = [tensor.clone() for tensor in state.tensors()]
            y_BTD, after = mixer(piece_BTD, state)
            assert all(torch.equal(tensor, copied) for tensor, copied in zip(state.tensors(), kept, strict=True))
            outputs.append(y_BTD)
            state = after
        mine = torch.autograd.grad((torch.cat(outputs, dim=1) * weights).sum(), leaves)
        for gradient, wanted in zip(mine, expected, strict=True):
            assert_equal(gradient, wanted)


@torch.no_grad()
def check_in_place(mixer: Any) -> None:
    """Under no_grad a step keeps every tensor of the state where it is, so that it can be captured in a CUDA graph."""
    x_BTD = random_input(mixer)
    state = empty_state(mixer)
    places = [tensor.data_ptr() for tensor in state.tensors()]
    for piece_BTD in x_BTD.split([3, 1, 1, 4, 3], dim=1):
        _, state = mixer(piece_BTD, state, lengths_B=torch.full((ROWS,), piece_BTD.shape[1]))
        assert [tensor.data_ptr() for tensor in state.tensors()] == places


@torch.no_grad()
def check_select_and_reset(mixer: Any) -> None:
    """Selected rows continue as their originals do; a reset row starts anew; a finished row stays as it is."""
    x_BTD, fresh_BTD = random_input(mixer), random_input(mixer, seed=2)
    whole, fresh = mixer(x_BTD)[0], mixer(fresh_BTD)[0]
    _, state = mixer(x_BTD[:, :7], empty_state(mixer))
    rows = torch.tensor([2, 0, 2, 1])
    continued, _ = mixer(x_BTD[rows, 7:], state.select(rows))
    assert_equal(continued, whole[rows, 7:])
    state = state.reset(torch.tensor([1]))
    mixed_BTD = torch.stack([x_BTD[0, 7:], fresh_BTD[1, : LENGTH - 7], x_BTD[2, 7:]])
    y_BTD, state = mixer(mixed_BTD, state)
    assert_equal(y_BTD, torch.stack([whole[0, 7:], fresh[1, : LENGTH - 7], whole[2, 7:]]))
    kept = [tensor.clone() for tensor in state.tensors()]
    for tokens in (1, 3):
        _, state = mixer(
            torch.full_like(x_BTD[:, :tokens], torch.nan), state, lengths_B=torch.zeros(ROWS, dtype=torch.int64)
        )
        assert all(torch.equal(tensor, copied) for tensor, copied in zip(state.tensors(), kept, strict=True))
    _, state = mixer(x_BTD[:, :2], state.reset(torch.arange(ROWS)))
    y_BTD, _ = mixer(x_BTD[:, 2:], state)
    assert_equal(y_BTD, whole[:, 2:])


@torch.no_grad()
def check_output(mixer: Any) -> None:
    """`out` is the last map: what it gives is all that the mixer gives, so that scaling it scales that."""
    x_BTD = random_input(mixer)
    before, _ = mixer(x_BTD)
    for parameter in mixer.out.parameters():
        parameter.mul_(0.5)
    after, _ = mixer(x_BTD)
    assert_equal(after, before / 2)


def check_bfloat16(mixer: Any) -> None:
    """Under autocast both forms run, and stay near the float32 result."""
    x_BTD = random_input(mixer)
    expected, _ = mixer(x_BTD)
    largest = float(expected.detach().abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y_BTD in (mixer(x_BTD)[0], stream(mixer, x_BTD, [5, 1, LENGTH - 6])):
            torch.testing.assert_close(y_BTD.float(), expected, rtol=0.05, atol=0.05 * largest)


def check_counts(config: MixerConfig, context: MixerContext) -> None:
    """Parameters and state bytes equal the real ones; FLOPs hold every projection, and mixing costs something."""
    mixer = config.build(context)
    assert config.num_params(context) == sum(parameter.numel() for parameter in mixer.parameters())
    for room in (1, 5, context.max_length):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            state: State = mixer.init_state(2, room, "cpu", dtype)
            assert all(tensor.shape[0] == 2 and not tensor.any() for tensor in state.tensors())
            assert 2 * config.state_bytes(context, room, dtype) == state.num_bytes()
    projections = 0
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            with FlopCounterMode(display=False) as counter:
                module(torch.zeros(1, module.in_features))
            projections += counter.get_total_flops()
    mixing = [length * (config.flops_per_token(context, length) - projections) for length in range(1, ROOM)]
    assert mixing[0] > 0
    assert all(longer > shorter for shorter, longer in pairwise(mixing))


def check_backends(config: MixerConfig, context: MixerContext) -> None:
    """Each available backend of each operator that the mixer asks for gives output and gradients of the reference."""
    for length in (1, 7, 33):
        with asked() as operators:
            _output_and_gradients(config, context, {}, length)
        for operator in sorted(operators):
            expected = _output_and_gradients(config, context, {operator: "reference"}, length)
            for name, missing in dispatch.backends(operator).items():
                if missing is None and name != "reference":
                    mine = _output_and_gradients(config, context, {operator: name}, length)
                    for tensor, wanted in zip(mine, expected, strict=True):
                        assert_equal(tensor, wanted)


@contextmanager
def asked() -> Iterator[set[str]]:
    """Gather the names of the operators for which a backend is chosen within."""
    operators: set[str] = set()
    choose = dispatch.choose

    def choosing(operator: str, *arguments: Any) -> str:
        operators.add(operator)
        return choose(operator, *arguments)

    with mock.patch.object(dispatch, "choose", choosing):
        yield operators


def _output_and_gradients(
    config: MixerConfig, context: MixerContext, backends: dict[str, str], length: int
) -> list[Tensor]:
    mixer: Mixer = build(config, MixerContext(**{**vars(context), "backends": backends}))
    x_BTD = random_input(mixer, length=length).requires_grad_()
    y_BTD, _ = mixer(x_BTD)
    gradients = torch.autograd.grad(
        (y_BTD * random_input(mixer, length=length, seed=3)).sum(), [x_BTD, *mixer.parameters()]
    )
    return [y_BTD, *gradients]
