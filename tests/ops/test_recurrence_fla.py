"""fla behind gated linear attention and the gated delta rule: when it is asked, and the adapters to its kernels."""

import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.ops.recurrence_cases import OPERATORS, assert_all_equal, draw, every_operator, packed, results
from trivium.ops import dispatch, recurrence
from trivium.ops.delta_rule import fla as delta_fla
from trivium.ops.delta_rule.reference import reference as recurrence_itself
from trivium.registry import UserError


@every_operator
def test_a_missing_fla_is_an_error_that_tells_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_choices", {})

    def not_there(package: str) -> str:
        raise PackageNotFoundError(package)

    command = r"pip install 'flash-linear-attention\[cuda\]>=0.6'"
    monkeypatch.setattr(recurrence, "version", not_there)
    with pytest.raises(UserError, match=f"'fla' is missing: flash-linear-attention is not installed: {command}"):
        OPERATORS[name](**draw(name, 4), backend="fla")
    monkeypatch.setattr(recurrence, "version", lambda package: "0.5.1")
    assert "0.5.1 is too old" in str(dispatch.backends(name)["fla"])
    monkeypatch.setattr(recurrence, "version", lambda package: "0.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in str(dispatch.backends(name)["fla"])


@every_operator
def test_float64_and_other_devices_are_not_for_fla(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(recurrence, "version", lambda package: "0.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="'fla' cannot: it computes on CUDA devices, the inputs are on cpu"):
        OPERATORS[name](**draw(name, 4), backend="fla")
    wide = (("dtype", torch.float64), ("device", "cuda"))
    with pytest.raises(UserError, match="'fla' cannot: it computes in float32 or less, the inputs are float64"):
        dispatch.choose(name, "fla", "cuda", wide)
    assert dispatch.choose(name, "auto", "cuda", wide) == "torch"
    assert "fla cannot: it computes in float32 or less" in dispatch.chosen()[name]["reason"]
    assert dispatch.choose(name, "auto", "cuda", (("dtype", torch.float32), ("device", "cuda"))) == "fla"


def test_fla_may_load_with_the_two_warnings_that_it_brings_and_no_other_is_hushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = "`torch.jit.script_method` is deprecated. Please switch to `torch.compile` or `torch.export`."
    for module, message in (("fla_of_now", said), ("fla_of_then", "`torch.jit.script` is deprecated.")):
        text = "import warnings\nwarnings.warn('Flash Attention is not installed.', ImportWarning)\n"
        text += f"warnings.warn({message!r}, DeprecationWarning)\n"
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert recurrence.import_fla("fla_of_now") is sys.modules["fla_of_now"]
    with pytest.raises(DeprecationWarning, match="script`"):
        recurrence.import_fla("fla_of_then")
    monkeypatch.delitem(sys.modules, "fla_of_now")


@pytest.mark.parametrize(
    ("triton", "hopper", "gradients", "refused"),
    [
        ("3.6.0", True, True, True),
        ("3.6.0", True, False, False),
        ("3.6.0", False, True, False),
        ("3.7.1", True, True, False),
        ("3.8.0rc1", True, True, False),
        ("3.3.1+gitabc", True, True, False),
    ],
)
def test_fla_is_not_asked_for_a_gradient_that_triton_compiles_wrongly(
    monkeypatch: pytest.MonkeyPatch, triton: str, hopper: bool, gradients: bool, refused: bool
):
    monkeypatch.setattr(recurrence, "version", {"triton": triton, "flash-linear-attention": "0.6.0"}.__getitem__)
    monkeypatch.setattr(recurrence, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9 if hopper else 8, 0))
    facts = {"dtype": torch.bfloat16, "device": "cuda", "gradients": gradients}
    why = recurrence.fla_backward_refuses(facts)
    assert (why is not None) == refused
    assert why is None or "Triton 3.6.0" in why
    assert why is None or "install triton 3.7.1" in why
    assert recurrence.fla_refuses(facts) is None  # gated linear attention has another backward pass


@pytest.mark.parametrize(
    ("triton", "settings", "nvcc", "float32", "bfloat16"),
    [
        ("3.6.0", {}, True, "tilelang.*rounds products of float32.*set FLA_TILELANG=0", None),
        ("3.6.0", {}, False, "Triton 3.6.0, which compiles them wrongly", "Triton 3.6.0"),
        ("3.6.0", {"FLA_TILELANG": "0"}, True, "Triton 3.6.0", "Triton 3.6.0"),
        ("3.6.0", {"FLA_DISABLE_BACKEND_DISPATCH": "1"}, True, "Triton 3.6.0", "Triton 3.6.0"),
        ("3.6.0", {"TRITON_F32_DEFAULT": "tf32"}, True, None, None),
        ("3.7.1", {}, True, "tilelang", None),  # fla asks it first whatever Triton is
        ("3.7.1", {"FLA_TILELANG": "0"}, True, None, None),
    ],
)
def test_tilelang_gives_gradients_on_a_hopper_gpu_but_no_exact_float32(
    monkeypatch: pytest.MonkeyPatch,
    triton: str,
    settings: dict[str, str],
    nvcc: bool,
    float32: str | None,
    bfloat16: str | None,
):
    found = ModuleType("fla.utils")
    found.__dict__["has_usable_nvcc"] = lambda: nvcc
    monkeypatch.setitem(sys.modules, "fla.utils", found)
    monkeypatch.setattr(recurrence, "version", {"triton": triton}.__getitem__)
    monkeypatch.setattr(recurrence, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("FLA_TILELANG", "FLA_DISABLE_BACKEND_DISPATCH", "TRITON_F32_DEFAULT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for dtype, pattern in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        why = recurrence.fla_backward_refuses({"dtype": dtype, "device": "cuda", "gradients": True})
        assert why is None if pattern is None else re.search(pattern, str(why))


def test_a_tilelang_that_cannot_be_imported_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recurrence, "version", {"triton": "3.6.0"}.__getitem__)
    monkeypatch.setattr(recurrence, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def broken(name: str) -> ModuleType:
        raise ImportError(f"{name}: libtvm.so: cannot open shared object file")

    monkeypatch.setattr(recurrence, "import_fla", broken)
    assert "install triton 3.7.1" in str(recurrence.fla_backward_lacks())


def test_auto_leaves_gradients_in_exact_float32_to_the_chunked_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    found = {"triton": "3.7.1", "flash-linear-attention": "0.6.0"}
    monkeypatch.setattr(recurrence, "version", found.__getitem__)
    monkeypatch.setattr(recurrence, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)

    def choice(dtype: torch.dtype, gradients: bool) -> str:
        facts = (("dtype", dtype), ("device", "cuda"), ("gradients", gradients))
        return dispatch.choose("gated_delta_rule", "auto", "cuda", facts)

    assert choice(torch.float32, True) == "torch"
    assert "fla is slower: its gradients of exact float32" in dispatch.chosen()["gated_delta_rule"]["reason"]
    assert [choice(torch.float32, False), choice(torch.bfloat16, True)] == ["fla", "fla"]
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert choice(torch.float32, True) == "fla"


def test_what_a_hopper_gpu_lacks_for_flas_gradients_is_said_by_the_doctor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recurrence, "version", {"triton": "3.6.0", "flash-linear-attention": "0.6.0"}.__getitem__)
    monkeypatch.setattr(recurrence, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert dispatch.abilities("gated_linear_attention")["fla"] == "available"
    said = dispatch.abilities("gated_delta_rule")["fla"]
    assert said.startswith("available; no gradients on a Hopper GPU by Triton 3.6.0")
    assert "install triton 3.7.1" in said


def test_float32_by_fla_is_not_rounded_further_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch):
    def asked(precision: str, before: str | None) -> str | None:
        monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
        if before is not None:
            monkeypatch.setenv("TRITON_F32_DEFAULT", before)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        recurrence.exact_float32()
        return os.environ.get("TRITON_F32_DEFAULT")

    assert [asked("highest", None), asked("highest", "tf32"), asked("high", None)] == ["ieee", "tf32", None]


# ---- The adapters to fla, with a stand-in for its kernels that has fla's argument names and its packed rows.


def stand_in(name: str, decay_argument: str) -> Any:
    """Return a function with the call of fla 0.6, for rows of equal length or for one packed row with bounds."""

    def kernel(q, k, v, *, scale, initial_state, output_final_state, cu_seqlens, **gates):
        assert output_final_state
        assert initial_state.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in (q, k, v, initial_state, *gates.values()))
        gates = {"log_decay" if key == decay_argument else key: gate for key, gate in gates.items()}
        tensors = {"q": q, "k": k, "v": v, **gates}
        if cu_seqlens is None:
            return OPERATORS[name](**tensors, state=initial_state, scale=scale, backend="reference")
        assert q.shape[0] == 1
        parts = []
        for n, (start, stop) in enumerate(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)):
            piece = {key: tensor[:, start:stop] for key, tensor in tensors.items()}
            parts.append(OPERATORS[name](**piece, state=initial_state[n : n + 1], scale=scale, backend="reference"))
        outputs, states = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return kernel


class Constant(str):
    """Stands in for Triton's constexpr."""


@pytest.fixture
def fake_fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Put a stand-in in fla's place; the module is that of the delta rule's forward pass."""
    gla, rule = ModuleType("fla.ops.gla"), ModuleType("fla.ops.gated_delta_rule")
    solve = ModuleType("fla.ops.gated_delta_rule.chunk_fwd")
    solve.__dict__[delta_fla.ROUNDING] = Constant("tf32")
    gla.__dict__["chunk_gla"] = stand_in("gated_linear_attention", "g")
    gla.__dict__["fused_recurrent_gla"] = stand_in("gated_linear_attention", "gk")
    for function in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        rule.__dict__[function] = stand_in("gated_delta_rule", "g")
    for module in (ModuleType("fla"), ModuleType("fla.ops"), gla, rule, solve):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    delta_fla.load_rule.cache_clear()
    yield solve
    delta_fla.load_rule.cache_clear()


@pytest.mark.parametrize(
    ("precision", "user", "rounding"),
    [("highest", None, "ieee"), ("highest", "ieee", "ieee"), ("highest", "tf32", "tf32"), ("high", None, "tf32")],
)
def test_flas_triangular_solve_is_as_exact_as_its_products(
    fake_fla: ModuleType, monkeypatch: pytest.MonkeyPatch, precision: str, user: str | None, rounding: str
):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    if user is not None:
        monkeypatch.setenv("TRITON_F32_DEFAULT", user)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    delta_fla.load_rule()
    found = getattr(fake_fla, delta_fla.ROUNDING)
    assert (found, type(found)) == (rounding, Constant)


@pytest.mark.usefixtures("fake_fla")
@every_operator
@pytest.mark.parametrize("tokens", [9, 40])
def test_the_adapter_to_fla_equals_the_reference(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch):
    adapter = dispatch.Backend(dispatch._registered[name]["fla"].load, suits=lambda device_type: "the adapter")
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setitem(dispatch._registered[name], "fla", adapter)
    arguments = draw(name, tokens, dtype=torch.float32)
    for options in ({}, {"documents": packed(tokens)}, {"scale": 0.2}):
        expected = results(name, arguments, backend="reference", **options)
        assert_all_equal(results(name, arguments, **options), expected)
        with torch.no_grad():
            assert_all_equal(list(OPERATORS[name](**arguments, **options)), expected[:2])


@pytest.mark.usefixtures("fake_fla")
@pytest.mark.parametrize("documents", [None, packed(7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_that_fla_rounds_does_not_reach_the_gradient_of_few_tokens(
    dtype: torch.dtype, documents: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
):
    rule = sys.modules["fla.ops.gated_delta_rule"]
    exact = rule.__dict__["chunk_gated_delta_rule"]

    def rounds(*tensors: torch.Tensor, g: torch.Tensor, initial_state: torch.Tensor, cu_seqlens: Any, **more: Any):
        begun_N = initial_state.flatten(1).any(1)  # from zero there is nothing to round
        if cu_seqlens is None:
            off = begun_N[:, None, None] * torch.tensor([0.25, -0.5])
        else:
            off = begun_N.repeat_interleave(cu_seqlens.diff())[None, :, None] * torch.tensor([0.25, -0.5])
        decays = g.view_as(g)
        decays.register_hook(lambda gradient: gradient + off)
        return exact(*tensors, g=decays, initial_state=initial_state, cu_seqlens=cu_seqlens, **more)

    monkeypatch.setitem(rule.__dict__, "chunk_gated_delta_rule", rounds)
    drawn = draw("gated_delta_rule", 7, dtype=torch.float32)
    arguments = {
        key: tensor.detach().to(dtype if key in "qkv" else torch.float32).requires_grad_()
        for key, tensor in drawn.items()
    }

    def gradient_by(function: Any) -> torch.Tensor:
        o, state = function(**arguments, scale=0.5, documents=documents)
        return torch.autograd.grad(o.float().square().sum() + state.square().sum(), arguments["log_decay"])[0]

    right = gradient_by(recurrence_itself)
    torch.testing.assert_close(gradient_by(delta_fla.by_fla), right, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(delta_fla, "ANCHORED", 0)  # the stand-in is off indeed
    assert (gradient_by(delta_fla.by_fla) - right).abs().max() > 0.2
