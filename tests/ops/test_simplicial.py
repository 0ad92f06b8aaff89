"""2-simplicial attention: the reference against its formulas, every backend against the reference, and old mistakes."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.model_checks import assert_equal
from trivium.ops import dispatch, simplicial_attention
from trivium.ops.simplicial import FORMS, windowed
from trivium.ops.simplicial.masked import masked_simplicial
from trivium.ops.simplicial.reference import allowed
from trivium.registry import UserError

# Kernels have tests of their own, with the dtypes that they take, on a device or interpreted.
AVAILABLE = [name for name in dispatch.backends("simplicial") if name not in ("triton", "hopper")]
BACKENDS = [name for name in AVAILABLE if name != "reference"]
every_form = pytest.mark.parametrize("form", FORMS)
every_backend = pytest.mark.parametrize("backend", AVAILABLE)


def draw(
    tokens: int,
    *,
    rows: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 5,
    form: str = "trilinear",
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Return arguments of the operator; v2 is None in the factorized form, and bias has the seventh and eighth draw."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    arguments: dict[str, Any] = {"q": normal(rows, tokens, heads, width)}
    arguments |= {name: normal(rows, tokens, kv_heads, width) for name in ("k1", "k2", "v1", "v2")}
    if form == "factorized":
        arguments["v2"] = None
    pair = (normal(kv_heads, width), normal(kv_heads, width)) if bias else None
    return arguments | {"form": form, "bias": pair}


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    tensors = [arguments[name] for name in ("q", "k1", "k2", "v1", "v2") if arguments[name] is not None]
    return tensors + list(arguments["bias"] or ())


def output_and_gradients(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    o = simplicial_attention(**arguments, **options)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves(arguments), weights)]


def assert_all_equal(mine: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, wanted in zip(mine, expected, strict=True):
        assert tensor.dtype == wanted.dtype
        assert_equal(tensor, wanted)


def by_hand(arguments: dict[str, Any], window1: int, window2: int) -> Tensor:
    """Follow SPEC section 1 number by number, in Python floats."""
    q, k1, k2, v1, v2 = (None if arguments[n] is None else arguments[n].tolist() for n in ("q", "k1", "k2", "v1", "v2"))
    rows, tokens, heads, width = arguments["q"].shape
    group = heads // arguments["k1"].shape[2]
    o = torch.zeros(rows, tokens, heads, width, dtype=torch.float64)
    for b, i, h in itertools.product(range(rows), range(tokens), range(heads)):
        g = h // group
        first, second = range(max(0, i - window1 + 1), i + 1), range(max(0, i - window2 + 1), i + 1)
        if arguments["form"] == "factorized":
            shares = []
            for keys, reach in ((k1, first), (k2, second)):
                logits = {j: sum(x * y for x, y in zip(q[b][i][h], keys[b][j][g], strict=True)) for j in reach}
                powers = {j: math.exp(logit / math.sqrt(width)) for j, logit in logits.items()}
                shares.append({j: power / sum(powers.values()) for j, power in powers.items()})
            for j, d in itertools.product(set(first) & set(second), range(width)):
                o[b, i, h, d] += shares[0][j] * shares[1][j] * v1[b][j][g][d]
            continue
        weights = {}
        for j, k in itertools.product(first, second):
            x, y, z = q[b][i][h], k1[b][j][g], k2[b][k][g]
            whole = width // 3 * 3 if arguments["form"] == "determinant" else 0
            logit = sum(x[d] * y[d] * z[d] for d in range(whole, width))
            for d in range(0, whole, 3):
                logit += float(torch.linalg.det(torch.tensor([x[d : d + 3], y[d : d + 3], z[d : d + 3]]).double()))
            weights[j, k] = math.exp(logit / math.sqrt(width))
        for (j, k), d in itertools.product(weights, range(width)):
            o[b, i, h, d] += weights[j, k] / sum(weights.values()) * v1[b][j][g][d] * v2[b][k][g][d]
    return o


@every_form
@every_backend
def test_the_output_is_what_the_formulas_give_number_by_number(form: str, backend: str):
    arguments = draw(6, form=form)
    for window1, window2 in ((4, 2), (2, 3), (1, 1), (9, 9)):
        o = simplicial_attention(**arguments, window1=window1, window2=window2, backend=backend)
        torch.testing.assert_close(o.detach(), by_hand(arguments, window1, window2), rtol=1e-6, atol=1e-6)


@every_form
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "windows"), [(1, (3, 2)), (7, (4, 2)), (63, (33, 5)), (63, (3, 40)), (100, (100, 7)), (100, (16, 16))]
)
def test_a_backend_equals_the_reference_in_value_and_every_gradient(
    form: str, backend: str, tokens: int, windows: tuple[int, int]
):
    options = {"window1": windows[0], "window2": windows[1]}
    runs = itertools.product((5, 8), (False, True), (False, True)) if tokens < 20 else [(5, True, True)]
    for width, bias, packed in runs:
        arguments = draw(tokens, form=form, width=width, bias=bias and form != "factorized")
        ids = torch.stack([torch.arange(tokens) // 3, torch.arange(tokens) // 5 % 2]) if packed else None
        expected = output_and_gradients(arguments, documents=ids, backend="reference", **options)
        assert_all_equal(output_and_gradients(arguments, documents=ids, backend=backend, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (3, 3)])
def test_a_backend_equals_the_reference_for_any_grouping_in_float32(backend: str, heads: int, kv_heads: int):
    arguments = draw(29, rows=3, heads=heads, kv_heads=kv_heads, width=4, bias=True, dtype=torch.float32)
    expected = output_and_gradients(arguments, window1=11, window2=4, backend="reference")
    assert_all_equal(output_and_gradients(arguments, window1=11, window2=4, backend=backend), expected)


@pytest.mark.parametrize("budget", [1, 3000])
def test_tiles_of_any_size_give_the_same(budget: int, monkeypatch: pytest.MonkeyPatch):
    arguments = draw(41, rows=3, bias=True)
    ids = (torch.arange(41) // 9).expand(3, -1)
    expected = output_and_gradients(arguments, window1=17, window2=3, documents=ids, backend="reference")
    monkeypatch.setitem(windowed.TILE, "cpu", budget)
    assert_all_equal(output_and_gradients(arguments, window1=17, window2=3, documents=ids, backend="torch"), expected)


@every_form
@every_backend
def test_gradients_equal_finite_differences(form: str, backend: str):
    arguments = draw(5, rows=2, heads=2, kv_heads=1, width=4, form=form, bias=form != "factorized")
    inputs = leaves(arguments)

    def function(*tensors: Tensor) -> Tensor:
        values = dict(zip(("q", "k1", "k2", "v1", "v2"), tensors, strict=False))
        values["v2"] = None if form == "factorized" else tensors[4]
        pair = None if form == "factorized" else (tensors[5], tensors[6])
        return simplicial_attention(**values, form=form, bias=pair, window1=4, window2=2, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_comes_out_as_near_as_its_rounding(backend: str):
    arguments = draw(40, dtype=torch.bfloat16)
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    o = simplicial_attention(**arguments, window1=20, window2=4, backend=backend)
    assert o.dtype == torch.bfloat16
    expected = simplicial_attention(**wide, window1=20, window2=4, backend="reference")
    # Sums stay wide, so that only the last rounding shows: 2^-9 of each number.
    torch.testing.assert_close(o.float(), expected, rtol=2**-8, atol=1e-6)


@every_backend
def test_autocast_does_not_narrow_the_softmax(backend: str):
    arguments = draw(20, dtype=torch.float32)
    o = simplicial_attention(**arguments, window1=9, window2=4, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(simplicial_attention(**arguments, window1=9, window2=4, backend=backend), o)


def test_a_backward_pass_inside_autocast_stays_wide_in_the_torch_backend():
    arguments = draw(20, dtype=torch.float32)
    expected = output_and_gradients(arguments, window1=9, window2=4, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_all_equal(output_and_gradients(arguments, window1=9, window2=4, backend="torch"), expected)


@every_backend
@every_form
def test_swapping_the_pairs_is_exact_and_turns_the_sign_of_determinants(backend: str, form: str):
    arguments = draw(20, width=6, form=form)
    o = simplicial_attention(**arguments, window1=7, window2=3, backend=backend)
    swapped = arguments | {"k1": arguments["k2"], "k2": arguments["k1"]}
    if form != "factorized":
        swapped |= {"v1": arguments["v2"], "v2": arguments["v1"]}
    if form == "determinant":
        swapped["q"] = -arguments["q"]
    assert_equal(simplicial_attention(**swapped, window1=3, window2=7, backend=backend), o)


@every_backend
def test_one_rotation_of_all_three_leaves_the_determinant_form_alone(backend: str):
    arguments = draw(12, width=6, form="determinant")
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    rotation = rotation * torch.linalg.det(rotation).sign()
    turned = {n: (arguments[n].unflatten(-1, (2, 3)) @ rotation).flatten(-2) for n in ("q", "k1", "k2")}
    o = simplicial_attention(**arguments, window1=7, window2=3, backend=backend)
    assert_equal(simplicial_attention(**(arguments | turned), window1=7, window2=3, backend=backend), o)
    trilinear = {"form": "trilinear"}
    o = simplicial_attention(**(arguments | trilinear), window1=7, window2=3, backend=backend)
    other = simplicial_attention(**(arguments | turned | trilinear), window1=7, window2=3, backend=backend)
    assert not torch.allclose(o, other)


@every_backend
def test_the_scale_is_used_and_defaults_to_the_root_of_the_head_width(backend: str):
    arguments = draw(9, width=7, form="determinant")
    o = simplicial_attention(**arguments, window1=5, window2=3, backend=backend)
    given = simplicial_attention(**arguments, window1=5, window2=3, scale=7**-0.5, backend=backend)
    other = simplicial_attention(**arguments, window1=5, window2=3, scale=0.9, backend=backend)
    assert_equal(given, o)
    assert not torch.allclose(other, o)


@every_backend
@every_form
def test_large_logits_do_not_overflow(backend: str, form: str):
    arguments = draw(9, form=form, dtype=torch.float32)
    arguments["q"] = (arguments["q"] * 1e4).detach().requires_grad_()
    outputs = output_and_gradients(arguments, window1=5, window2=3, backend=backend)
    assert all(tensor.isfinite().all() for tensor in outputs)


@every_backend
@every_form
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows_or_no_tokens_give_an_empty_output(backend: str, form: str, shape: tuple[int, int]):
    arguments = draw(shape[1], rows=shape[0], form=form)
    o = simplicial_attention(**arguments, window1=5, window2=3, backend=backend)
    assert o.shape == arguments["q"].shape
    given = leaves(arguments)
    for tensor, gradient in zip(given, torch.autograd.grad(o.sum(), given), strict=True):
        assert gradient.shape == tensor.shape


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_streaming_over_masked_keys_equals_the_reference_in_chunks_and_gradients(
    form: str, monkeypatch: pytest.MonkeyPatch
):
    arguments = draw(11, form=form)
    q, k1, k2, v1, v2 = leaves(arguments)
    reads = [allowed(11, window, None, q.device).expand(2, -1, -1) for window in (3, 5)]
    expected = output_and_gradients(arguments, window1=3, window2=5, backend="reference")
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for budget in (1, 2**20):
        monkeypatch.setitem(windowed.TILE, "cpu", budget)
        o = masked_simplicial(q, k1, k2, v1, v2, *reads, scale=5**-0.5, form=form)
        assert_all_equal([o.detach(), *torch.autograd.grad(o, leaves(arguments), weights)], expected)


# ---- Mistakes that published implementations make (SPEC section 7).


@every_backend
@every_form
def test_a_window_counts_the_query_itself_and_ends_where_it_says(backend: str, form: str):
    """Window off by one: token j reaches exactly the queries j .. j + window - 1 on either side."""
    windows = {"k1": 4, "k2": 2}
    for name, window in windows.items():
        arguments = draw(12, rows=1, form=form)
        before = simplicial_attention(**arguments, window1=4, window2=2, backend=backend)
        changed = arguments[name].detach().clone()
        changed[:, 5] += 1
        after = simplicial_attention(**(arguments | {name: changed}), window1=4, window2=2, backend=backend)
        reached = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-9
        assert reached.nonzero().flatten().tolist() == list(range(5, 5 + window))


@every_backend
@every_form
def test_each_group_of_query_heads_reads_its_own_key_head(backend: str, form: str):
    """Grouped keys read only from head 0."""
    arguments = draw(8, heads=6, kv_heads=3, form=form)
    o = simplicial_attention(**arguments, window1=4, window2=3, backend=backend)
    for head in range(6):
        alone = {n: arguments[n][:, :, [head // 2]] for n in ("k1", "k2", "v1", "v2") if arguments[n] is not None}
        one = arguments | alone | {"q": arguments["q"][:, :, [head]]}
        assert_equal(simplicial_attention(**one, window1=4, window2=3, backend=backend), o[:, :, [head]])


@every_backend
def test_a_bias_is_added_and_has_gradients(backend: str):
    """Bias accepted and ignored."""
    arguments = draw(9, bias=True)
    b_k, b_v = arguments["bias"]
    added = arguments | {"k2": arguments["k2"] + b_k, "v2": arguments["v2"] + b_v, "bias": None}
    o = simplicial_attention(**arguments, window1=4, window2=3, backend=backend)
    assert_equal(o, simplicial_attention(**added, window1=4, window2=3, backend=backend))
    assert all(gradient.abs().min() > 0 for gradient in torch.autograd.grad(o.square().sum(), [b_k, b_v]))


@every_backend
@every_form
def test_each_row_of_a_batch_is_computed_from_its_own_tensors(backend: str, form: str):
    """An offset that uses another tensor's batch stride: wrong for B >= 2, and where strides differ."""
    arguments = draw(9, rows=3, form=form)
    whole = output_and_gradients(arguments, window1=4, window2=3, backend=backend)
    strided = dict(arguments)
    for index, name in enumerate(n for n in ("q", "k1", "k2", "v1", "v2") if arguments[n] is not None):
        padded = torch.full((5 + index, 9, *arguments[name].shape[2:]), torch.nan, dtype=torch.float64)
        padded[::2][:3] = arguments[name].detach()
        if index >= 1:  # every tensor gets a batch stride, and here a time stride, of its own
            padded = padded.repeat_interleave(index + 2, dim=1)[:, :: index + 2]
        strided[name] = padded[::2][:3].detach().requires_grad_()
    assert len({strided[n].stride() for n in ("q", "k1", "k2", "v1")}) == 4
    assert_all_equal(output_and_gradients(strided, window1=4, window2=3, backend=backend), whole)
    for row in range(3):
        one = {n: v[[row]] if isinstance(v, Tensor) else v for n, v in arguments.items()}
        o = simplicial_attention(**one, window1=4, window2=3, backend=backend)
        assert_equal(o.detach(), whole[0][[row]])


@every_backend
@pytest.mark.parametrize("width", [3, 64, 128, 130])
def test_no_head_width_is_pinned(backend: str, width: int):
    """Head width pinned: wrong at 128."""
    arguments = draw(6, rows=1, heads=2, kv_heads=1, width=width)
    o = simplicial_attention(**arguments, window1=4, window2=2, backend=backend)
    torch.testing.assert_close(o.detach(), by_hand(arguments, 4, 2), rtol=1e-6, atol=1e-6)


@every_backend
def test_the_sum_of_powers_is_not_rounded_to_bfloat16(backend: str):
    """The log-sum-exp rounded to bf16: constant values must come back as they are."""
    arguments = draw(64, dtype=torch.bfloat16)
    ones = {name: torch.ones_like(arguments[name]) for name in ("v1", "v2")}
    o = simplicial_attention(**(arguments | ones), window1=64, window2=8, backend=backend)
    assert torch.equal(o, torch.ones_like(o))


# ---- What is refused, and in which words.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window1": 0}, "window1: 0 is not allowed; give a whole number of at least 1"),
        ({"window2": -3}, "window2: -3 is not allowed"),
        ({"window2": 2.0}, r"window2: 2\.0 is not allowed"),
        ({"scale": math.nan}, "scale: nan is not allowed; give a finite number"),
        ({"scale": "half"}, "scale: 'half' is not allowed"),
        ({"q": torch.zeros(2, 6, 4, 0)}, "form: trilinear needs a head width of at least 1, q has 0"),
        ({"form": "trilinaer"}, "form: 'trilinaer' is not allowed; did you mean 'trilinear'"),
        ({"q": torch.zeros(2, 6, 3, 5)}, "q: 3 heads are not a multiple of the 2 key/value heads"),
        ({"q": torch.zeros(2, 6, 4)}, r"q: shape \(2, 6, 4\)"),
        ({"q": torch.zeros(2, 6, 4, 5, dtype=torch.int64)}, "q: torch.int64 is not allowed"),
        ({"k2": torch.zeros(2, 6, 2, 4)}, r"k2: shape \(2, 6, 2, 4\); .* must be \(2, 6, 2, 5\)"),
        ({"v1": torch.zeros(2, 7, 2, 5)}, "v1: shape"),
        ({"v2": torch.zeros(1, 6, 2, 5)}, "v2: shape"),
        ({"v2": None}, "v2: None is allowed in the factorized form alone"),
        ({"form": "factorized"}, "form: factorized reads one value"),
        ({"v1": torch.zeros(2, 6, 2, 5, dtype=torch.float64)}, "v1: torch.float64, but q is torch.float32"),
        ({"k1": torch.zeros(2, 6, 2, 5, device="meta")}, "k1: on meta, but q is on cpu"),
        ({"bias": (torch.zeros(2, 5), torch.zeros(4, 5))}, r"bias\[1\]: shape \(4, 5\); .* must be \(2, 5\)"),
        ({"bias": (torch.zeros(2, 5),)}, "bias: 1 tensors"),
        ({"bias": torch.zeros(2, 5)}, "bias: Tensor; give the pair"),
        ({"bias": (torch.zeros(2, 5), 1)}, r"bias\[1\]: 1 is not allowed; give a tensor"),
        ({"q": None}, "q: None is not allowed; give a tensor"),
        ({"k2": [1.0]}, "k2: list is not allowed; give a tensor"),
        ({"v2": 3}, "v2: 3 is not allowed; give a tensor"),
        ({"documents": [0, 6]}, "documents: list is not allowed; give a tensor"),
        ({"backend": None}, "no backend None on this machine; allowed: auto"),
        ({"documents": torch.zeros(2, 5, dtype=torch.int64)}, "documents: torch.int64 of shape"),
        ({"documents": torch.zeros(2, 6)}, "documents: torch.float32 of shape"),
    ],
)
def test_arguments_that_disagree_are_named(change: dict[str, Any], message: str):
    tensors = {"q": torch.zeros(2, 6, 4, 5)} | {name: torch.zeros(2, 6, 2, 5) for name in ("k1", "k2", "v1", "v2")}
    with pytest.raises(ValueError, match=message):
        simplicial_attention(**({**tensors, "window1": 3, "window2": 2} | change))


def test_a_determinant_needs_three_channels():
    tensors = [torch.zeros(1, 2, 1, 2)] * 5
    with pytest.raises(UserError, match="determinant needs a head width of at least 3, q has 2"):
        simplicial_attention(*tensors, window1=1, window2=1, form="determinant")
