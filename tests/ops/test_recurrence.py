"""Gated linear attention and the gated delta rule: references against their formulas, backends against references."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.model_checks import assert_equal
from tests.ops.recurrence_cases import OPERATORS, assert_all_equal, draw, every_operator, packed, results
from trivium.ops import dispatch, gated_delta_rule, recurrence
from trivium.ops.delta_rule import chunked as delta_chunked
from trivium.ops.delta_rule.step import gated_delta_rule_step_
from trivium.ops.linear_attention import chunked as linear_chunked
from trivium.ops.linear_attention.step import gated_linear_attention_step_


def check_backends(name: str, tokens: int, decay: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    arguments = draw(name, tokens, decay=decay, dtype=dtype)
    expected = results(name, arguments, backend="reference", **options)
    assert all(bool(tensor.isfinite().all()) for tensor in expected)
    available = [backend for backend, missing in dispatch.backends(name).items() if missing is None]
    for backend in (backend for backend in available if backend not in ("reference", "fla")):
        assert_all_equal(results(name, arguments, backend=backend, **options), expected)


@torch.no_grad()
@every_operator
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_reference_is_what_its_formula_says(name: str, scale: float | None):
    a = draw(name, 6)
    o, state = OPERATORS[name](**a, scale=scale, backend="reference")
    for b in range(2):
        for h in range(2):
            memory = a["state"][b, h]
            for t in range(6):
                k, v, g = (a[key][b, t, h] for key in ("k", "v", "log_decay"))
                if name == "gated_delta_rule":
                    beta = a["beta"][b, t, h]
                    memory = g.exp() * (torch.eye(3) - beta * torch.outer(k, k)) @ memory + beta * torch.outer(k, v)
                else:
                    memory = torch.diag(g.exp()) @ memory + torch.outer(k, v)
                assert_equal(o[b, t, h], (1 / math.sqrt(3) if scale is None else scale) * a["q"][b, t, h] @ memory)
            assert_equal(state[b, h], memory)


@every_operator
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_equal_finite_differences_the_first_state_s_too(name: str, backend: str):
    arguments = draw(name, 5, rows=1)
    documents = torch.tensor([[1, 1, 1, 2, 2]])
    for ids in (None, documents):
        assert torch.autograd.gradcheck(
            lambda *tensors, ids=ids: OPERATORS[name](
                **dict(zip(arguments, tensors, strict=True)), documents=ids, backend=backend
            ),
            tuple(arguments.values()),
        )


@every_operator
@pytest.mark.parametrize("decay", ["mild", "strong", "strongest"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7, 63, 100])
def test_every_backend_equals_the_reference_in_output_state_and_gradients(name: str, tokens: int, decay: str):
    check_backends(name, tokens, decay)
    check_backends(name, tokens, decay, torch.float32)
    check_backends(name, tokens, decay, documents=packed(tokens))


@every_operator
def test_the_backend_check_catches_documents_that_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in (linear_chunked, delta_chunked):
        monkeypatch.setattr(module, "forget_between", lambda log_decay, documents: log_decay)
    check_backends(name, 40, "mild")
    with pytest.raises(AssertionError):
        check_backends(name, 40, "mild", documents=packed(40))


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_backend_check_catches_decays_shifted_by_a_token(shift: int, monkeypatch: pytest.MonkeyPatch):
    honest = linear_chunked.by_chunk

    def by_chunk(x: Tensor, size: int) -> Tensor:
        return honest(x.roll(shift, 1) if bool((x <= 0).all()) else x, size)

    monkeypatch.setattr(linear_chunked, "by_chunk", by_chunk)
    with pytest.raises(AssertionError):
        check_backends("gated_linear_attention", 20, "mild")


@every_operator
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_sequence_in_pieces_equals_the_whole_and_no_state_is_changed(name: str, backend: str):
    arguments = draw(name, 50)
    whole = OPERATORS[name](**arguments, backend=backend)
    state, outputs = arguments.pop("state"), []
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        kept = state.detach().clone()
        piece = {key: tensor[:, start:stop] for key, tensor in arguments.items()}
        o, after = OPERATORS[name](**piece, state=state, backend=backend)
        assert torch.equal(state, kept)
        outputs.append(o)
        state = after
    assert_all_equal([torch.cat(outputs, dim=1), state], list(whole))


@torch.no_grad()
@every_operator
def test_packed_documents_equal_each_alone_and_the_state_belongs_to_the_first(name: str):
    arguments = draw(name, 40, rows=1)
    o, state = OPERATORS[name](**arguments, documents=torch.tensor([[4] * 9 + [2] * 20 + [4] * 11]))
    first = arguments.pop("state")
    for start, stop, begin in ((0, 9, first), (9, 29, None), (29, 40, None)):
        alone = {key: tensor[:, start:stop] for key, tensor in arguments.items()}
        mine, last = OPERATORS[name](**alone, state=begin)
        assert_equal(o[:, start:stop], mine)
    assert_equal(state, last)


@torch.no_grad()
def test_a_strength_of_two_turns_the_memory_over_at_every_token():
    k = torch.zeros(1, 40, 1, 4, dtype=torch.float64)
    k[..., 1] = 1
    zero = torch.zeros(1, 40, 1, dtype=torch.float64)
    start = torch.ones(1, 1, 4, 1, dtype=torch.float64)
    o, state = gated_delta_rule(k, k, torch.zeros_like(k)[..., :1], zero + 2, zero, scale=1.0, state=start)
    assert_equal(o.flatten(), torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(20))
    assert_equal(state, start)


@torch.no_grad()
@every_operator
def test_bfloat16_inputs_are_summed_in_float32(name: str):
    arguments = draw(name, 30, dtype=torch.bfloat16)
    o, state = OPERATORS[name](**arguments)
    exact = {key: tensor.double() for key, tensor in arguments.items()}
    wanted_o, wanted_state = OPERATORS[name](**exact)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.double(), wanted_o, rtol=0.01, atol=0.01)
    assert_equal(state, wanted_state.float())


@every_operator
def test_a_backward_pass_under_autocast_stays_in_float32(name: str):
    arguments = draw(name, 40, dtype=torch.float32)
    expected = results(name, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_all_equal(results(name, arguments), expected)


@every_operator
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_the_chunked_form_compiles_without_a_graph_break(name: str):
    torch._dynamo.reset()
    arguments = draw(name, 40)
    compiled = torch.compile(OPERATORS[name], fullgraph=True, backend="aot_eager")
    assert_all_equal(list(compiled(**arguments)), list(OPERATORS[name](**arguments)))


@every_operator
def test_no_tokens_give_no_output_and_leave_the_state(name: str):
    arguments = draw(name, 4)
    nothing = {key: tensor if key == "state" else tensor[:, :0] for key, tensor in arguments.items()}
    o, state = OPERATORS[name](**nothing)
    assert o.shape == (2, 0, 2, 5)
    assert torch.equal(state, arguments["state"])


@every_operator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q: shape \(2, 3, 4\)"),
        ({"k": torch.zeros(2, 4, 2, 4)}, r"k: shape \(2, 4, 2, 4\); with q \(2, 4, 2, 3\) it must be \(2, 4, 2, 3\)"),
        ({"v": torch.zeros(2, 4, 1, 5)}, r"v: shape \(2, 4, 1, 5\).*must be \(2, 4, 2, 5\)"),
        ({"log_decay": torch.zeros(2, 4)}, r"log_decay: shape \(2, 4\)"),
        ({"state": torch.zeros(2, 2, 5, 3)}, r"state: shape \(2, 2, 5, 3\).*must be \(2, 2, 3, 5\)"),
        ({"k": torch.zeros(2, 4, 2, 3)}, "k: torch.float32, but q is torch.float64"),
        ({"log_decay": None}, "log_decay: torch.int64 is not allowed"),
        ({"documents": torch.zeros(2, 5, dtype=torch.int64)}, r"documents: torch.int64 of shape \(2, 5\); give"),
        ({"documents": torch.zeros(2, 4)}, "documents: torch.float32"),
        ({"backend": "tritn"}, "no backend 'tritn' on this machine"),
    ],
)
def test_arguments_that_disagree_are_refused_by_name(name: str, change: dict[str, Any], message: str):
    arguments = draw(name, 4)
    if change == {"log_decay": None}:
        change = {"log_decay": arguments["log_decay"].detach().long()}
    with pytest.raises(ValueError, match=message):
        OPERATORS[name](**arguments | change)


@every_operator
def test_training_may_follow_generation_of_the_same_length(name: str):
    arguments = draw(name, 29, width=4)
    with torch.inference_mode():
        OPERATORS[name](**arguments, backend="torch")
    results(name, arguments, backend="torch")


@every_operator
@torch.no_grad()
@pytest.mark.parametrize("decay", ["mild", "strongest"])
def test_a_step_in_place_gives_what_the_operator_gives(name: str, decay: str):
    found, expected = draw(name, 5, decay=decay), draw(name, 5, decay=decay)
    state = found.pop("state")
    place = state.data_ptr()
    for t in range(5):
        token = {key: tensor[:, t] for key, tensor in found.items()}
        q, k, v, log_decay = (token[key] for key in ("q", "k", "v", "log_decay"))
        if name == "gated_delta_rule":  # its step takes several corrections a token, laid out before the heads
            k, v, beta = (x[:, None] for x in (k, v, token["beta"]))
            o = gated_delta_rule_step_(q, k, v, beta, log_decay, state, scale=0.7)
        else:
            o = gated_linear_attention_step_(q, k, v, log_decay, state, scale=0.7)
        one = {key: tensor[:, t : t + 1] for key, tensor in expected.items() if key != "state"}
        wanted, expected["state"] = OPERATORS[name](**one, state=expected["state"], scale=0.7, backend="reference")
        assert_equal(o, wanted[:, 0])
        assert_equal(state, expected["state"])
    assert state.data_ptr() == place


def test_documents_bounds_cover_every_row_on_its_own():
    bounds, first, last = recurrence.document_bounds(torch.tensor([[1, 1, 2, 2], [2, 2, 2, 2], [0, 1, 0, 0]]))
    assert bounds.tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert first.tolist() == [0, 2, 3]
    assert last.tolist() == [1, 2, 5]
