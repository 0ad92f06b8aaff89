from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trivium.generate import fixed
from trivium.generate.captured import DecodeSteps
from trivium.generate.engine import Generator, generate
from trivium.generate.fixed import FixedAnswers
from trivium.generate.sampling import Generation, computing_in
from trivium.mixers.base import MIXERS
from trivium.mixers.cache import autocast_dtype
from trivium.model.base import Decoding, ModelConfig, ModelContext
from trivium.model.decoder import DecoderConfig
from trivium.model.layers import format_layers
from trivium.model.prefix_scan import PrefixScan, PrefixScanConfig

CONTEXT = ModelContext(vocab_size=11, max_length=48, digit_ids=(1, 2, 3))
ROWS = 5
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")

CONFIGS: dict[str, ModelConfig] = {
    f"{name} {index}": DecoderConfig(width=24, heads=2, layers=format_layers((mixer,)), positions="rotary")
    for name in MIXERS.names()
    for index, mixer in enumerate(MIXERS.get(name).examples())
}
CONFIGS["block positions"] = DecoderConfig(width=24, heads=2, positions="block")
CONFIGS["learned positions"] = DecoderConfig(width=24, heads=2)
WINDOWED = DecoderConfig(width=24, heads=2, layers="attention(window=3)*2", backends={"cached_step": "torch"})
CONFIGS["a step by PyTorch"] = DecoderConfig(width=24, heads=2, backends={"cached_step": "torch"})
CONFIGS |= {
    f"prefix_scan {index}": config for index, config in enumerate(PrefixScanConfig.examples()) if config.chunk < 8
}


def build(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    return CONFIGS[name].build(CONTEXT).to(device, dtype).eval()


def prompts(lengths: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONTEXT.vocab_size, (len(lengths), max(lengths)), generator=generator)


def check_steps(model: Any, mode: Any, steps: int = 24) -> None:
    """Rows that begin at different places and finish at different times get what streaming gives them."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    mine, theirs = (DecodeSteps(model, model.init_state(ROWS), np.zeros(ROWS), m) for m in (mode, "eager"))
    for lengths in ([7, 1, 3, 6, 2], [4, 4, 4, 4, 4]):  # the second time the graphs are there
        first_BT = prompts(lengths).to(device)
        expected = theirs.refill(first_BT, lengths)
        torch.testing.assert_close(mine.refill(first_BT, lengths), expected, rtol=0, atol=1e-10)
        left_B = torch.randint(1, steps, (ROWS,), generator=generator).to(device)
        left_B[0] = steps
        for step in range(steps):
            tokens_B = torch.randint(CONTEXT.vocab_size, (ROWS,), generator=generator).to(device)
            active_B = left_B > step
            found, expected = (each.step(tokens_B, active_B) for each in (mine, theirs))
            torch.testing.assert_close(found[active_B], expected[active_B], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_fixed_shape_give_what_streaming_gives_and_keep_their_tensors(name: str):
    model = build(name)
    check_steps(model, "fixed")
    steps = DecodeSteps(model, model.init_state(ROWS), np.zeros(ROWS), "fixed")
    places = [tensor.data_ptr() for tensor in steps.state.tensors()]
    steps.refill(prompts([3] * ROWS), [3] * ROWS)
    for _ in range(9):
        steps.step(torch.zeros(ROWS, dtype=torch.int64))
    assert [tensor.data_ptr() for tensor in steps.state.tensors()] == places


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_captured_steps_give_what_streaming_gives(name: str):
    check_steps(build(name, device="cuda"), "graph")


class Forgetful(PrefixScan):
    """A model whose boundaries are never settled: what the checks above must notice."""

    def settling(self, lengths: Any) -> int | None:
        return None


@torch.no_grad()
def test_a_boundary_that_is_not_settled_is_noticed():
    model = Forgetful(PrefixScanConfig(chunk=3, width=24, heads=2), CONTEXT).double()
    with pytest.raises(AssertionError):
        check_steps(model, "fixed")


@torch.no_grad()
def test_a_boundary_merges_as_many_trees_as_the_row_with_the_most():
    model = build("prefix_scan 0")
    assert model.settling([1, 2, 4]) is None
    assert model.settling([0, 3, 4]) == 0
    assert model.settling([6, 12, 5]) == 2
    pairs: list[int] = []
    model.aggregator.register_forward_pre_hook(lambda module, inputs: pairs.append(len(inputs[0])))
    steps = DecodeSteps(model, model.init_state(2), np.zeros(2), "fixed")
    for _ in range(24):
        steps.step(torch.zeros(2, dtype=torch.int64))
    # One merge a level that the busiest row completes, and one fold, each of both rows.
    assert pairs == [2] * sum(1 + merges for merges in (0, 1, 0, 2, 0, 1, 0, 3))


def end_early(model: Any) -> int:
    """Return a token that some rows generate before others."""
    with torch.inference_mode():
        return int(model(torch.tensor([[1, 2, 3, 4, 5]], device=next(model.parameters()).device))[0][0, -1].argmax())


def check_generation(model: Any, mode: str, monkeypatch: pytest.MonkeyPatch, close: float = 1e-10) -> None:
    """Batches share the steps' rows, some left unfilled; rows end at different times; samples don't change."""
    asked = [prompts([length], seed=length)[0].tolist() for length in (3, 9, 1, 4, 4, 20, 2)]
    end_id = end_early(model)

    def answers(mode: str, **options: Any) -> list[Generation]:
        with monkeypatch.context() as patch:
            patch.setattr("trivium.generate.engine.served_at_once", lambda device: mode != "eager")
            return generate(model, asked, end_id=end_id, max_new_tokens=30, batch=3, **options)

    for options in ({}, {"temperature": 0.8, "seed": 3, "probabilities": True}):
        expected, found = answers("eager", **options), answers(mode, **options)
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.finished for one in found] == [one.finished for one in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.probabilities == pytest.approx(theirs.probabilities, abs=close)
    assert len({len(one.tokens) for one in expected}) > 2


@pytest.mark.parametrize("name", ["attention 0", "prefix_scan 0"])
def test_generation_by_fixed_steps_equals_generation_by_streaming(name: str, monkeypatch: pytest.MonkeyPatch):
    check_generation(build(name), "fixed", monkeypatch)


def check_leftovers(model: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call leaves in a state, NaN even, never reaches the next, whether its passes share a graph or not."""
    monkeypatch.setattr("trivium.generate.engine.served_at_once", lambda device: True)
    for most, shift in ((5, 0), (30, 0), (9, 1)):
        asked = [prompts([length], seed=length)[0].tolist() for length in (3, 1 + shift, 4, 2)]
        model.decoding = Decoding(shift=shift)
        wanted = {"end_id": end_early(model), "probabilities": most != 5}
        generator = Generator(model, max_new_tokens=most, batch=4, **wanted)
        found = [generator(asked)]
        (kept,) = generator._kept.values()
        assert kept.mode == mode
        counters = {tensor.data_ptr() for tensor in kept.state.counters()}
        with torch.inference_mode():
            for tensor in kept.state.tensors():
                if tensor.data_ptr() not in counters:
                    tensor.fill_(torch.nan)
        found.append(generator(asked))
        assert found[0] == found[1]  # with their probabilities, which a NaN would not leave equal


@pytest.mark.parametrize("name", ["attention 1", "a step by PyTorch", "gru 0", "prefix_scan 0", None])
def test_what_a_call_leaves_behind_never_reaches_the_next(name: str | None, monkeypatch: pytest.MonkeyPatch):
    model = build(name) if name else WINDOWED.build(CONTEXT).double().eval()
    check_leftovers(model, "fixed", monkeypatch)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["attention 0", "learned positions", "a step by PyTorch", "simplicial 1"])
def test_what_a_call_leaves_behind_never_reaches_the_next_graph(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    check_leftovers(build(name, dtype, "cuda"), "graph", monkeypatch)


@pytest.mark.parametrize("served", [False, True])
def test_a_model_that_has_moved_answers_from_where_it_is(served: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trivium.generate.engine.served_at_once", lambda device: served)
    model, asked = build("attention 0"), prompts([6] * 3).tolist()
    options: dict[str, Any] = {"end_id": end_early(model), "max_new_tokens": 9}
    expected, weights = generate(model, asked, **options), model.state_dict()
    generator = Generator(model.to("meta"), **options)
    model.to_empty(device="cpu").load_state_dict(weights)
    assert generator(asked) == generator(asked) == expected
    kept = [*generator._kept.values()]
    for parameter in model.parameters():  # as after a device and back
        parameter.data = parameter.data.clone()
    assert generator(asked) == expected
    assert len(kept) == len(generator._kept) == served
    assert all(new is not old for new, old in zip(generator._kept.values(), kept, strict=True))


@on_gpu
def test_a_model_that_was_on_a_device_and_is_there_again_answers_as_before():
    model, asked = build("attention 0", device="cuda"), prompts([6] * 3).tolist()
    generator = Generator(model, end_id=end_early(model), max_new_tokens=9)
    expected, places = generator(asked), [parameter.data_ptr() for parameter in model.parameters()]
    assert generator(asked) == expected
    model.cpu()
    assert generator(asked) == expected
    held = [torch.full((1 << 16,), torch.nan, device="cuda") for _ in range(8)]  # what was the model's is another's
    model.cuda()
    assert generator(asked) == generator(asked) == expected
    assert held
    assert places != [parameter.data_ptr() for parameter in model.parameters()]


HALVED = ["attention 0", "simplicial 1", "gated_deltanet 0", "gru 0", "block positions"]


def check_halving(name: str, mode: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Rows that go on move to fewer rows, again and again, and get what they would have got."""
    made: list[int] = []

    class Counted(FixedAnswers):
        def __init__(self, model: Any, wanted: Any, rows: int, *sizes: Any):
            made.append(rows)
            super().__init__(model, wanted, rows, *sizes)

    monkeypatch.setattr("trivium.generate.engine.FixedAnswers", Counted)
    monkeypatch.setattr(fixed, "FixedAnswers", Counted)
    for constant in ("NARROWEST", "WORTHWHILE", "LOOK_EVERY"):
        monkeypatch.setattr(fixed, constant, 1)
    model = build(name, device=device)
    end_id = end_early(model)
    # Some rows end at once, the others when they may read no more, so that few go on for long.
    asked = [row[: 3 + 5 * (place % 2)] for place, row in enumerate(prompts([8] * 13, seed=2).tolist())]
    for options in ({}, {"temperature": 1.0, "seed": 3, "probabilities": True}):
        found = []
        for kind in ("eager", mode):
            monkeypatch.setattr("trivium.generate.engine.served_at_once", lambda device, kind=kind: kind != "eager")
            generator = Generator(model, end_id=end_id, max_new_tokens=40, batch=8, **options)
            found.append([generator(asked), generator(asked[::-1])[::-1] if not options else None])
        (eager, again), (mine, mine_again) = found
        assert [one.tokens for one in mine] == [one.tokens for one in eager]
        assert not options or mine[0].probabilities == pytest.approx(eager[0].probabilities, abs=1e-10)
        assert options or [one.tokens for one in mine_again] == [one.tokens for one in again]
        halves = [kept._half for kept in generator._kept.values() if kept._half]
        assert halves
        assert all(half._given.host is None for half in halves), "nothing is sent to rows that only go on"
    assert {8, 4} <= set(made), made
    assert len(made) <= 8, "what was made is used again"


@pytest.mark.parametrize("name", HALVED)
def test_rows_that_go_on_move_together_and_get_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    check_halving(name, "fixed", monkeypatch)


@pytest.mark.parametrize(
    ("device", "served"),
    [("cpu", -1), ("cpu", 3), pytest.param("cuda", 1, marks=on_gpu)],
    ids=["at once", "after some passes", "while a graph is made of them"],
)
def test_rows_stay_together_and_it_is_said_where_half_of_them_find_no_memory(
    device: str, served: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    passes = 0

    class NoMemory(FixedAnswers):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.serve()

        def serve(self) -> None:
            if passes > served:
                raise torch.OutOfMemoryError("no memory")

        def _passes(self, count: int) -> None:
            nonlocal passes
            super()._passes(count)
            passes += 1
            self.serve()

    for constant, value in (("NARROWEST", 4), ("WORTHWHILE", 1), ("LOOK_EVERY", 1)):
        monkeypatch.setattr(fixed, constant, value)
    model, found = build("attention 0", device=device), []
    for kind in ("eager", "fixed"):
        monkeypatch.setattr("trivium.generate.engine.served_at_once", lambda device, kind=kind: kind != "eager")
        monkeypatch.setattr(fixed, "FixedAnswers", NoMemory)
        asked = [row[: 3 + 5 * (place % 2)] for place, row in enumerate(prompts([8] * 13, seed=2).tolist())]
        found.append(Generator(model, end_id=end_early(model), max_new_tokens=40, batch=8)(asked))
    assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]
    assert passes == served + 1
    assert [record.message for record in caplog.records] == [
        "rows that go on stay among all 8: no memory for half of them"
    ]


@on_gpu
@pytest.mark.parametrize("name", HALVED)
def test_captured_steps_of_rows_that_go_on_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    check_halving(name, "graph", monkeypatch, "cuda")


@on_gpu
@pytest.mark.parametrize("name", ["attention 0", "gated_deltanet 0", "prefix_scan 0"])
def test_generation_by_captured_steps_equals_generation_by_streaming(name: str, monkeypatch: pytest.MonkeyPatch):
    check_generation(build(name, device="cuda"), "graph", monkeypatch)


@pytest.mark.parametrize("layers", ["attention*2", "attention + simplicial(window1=6, window2=3)", "gla*2"])
def test_in_bfloat16_fixed_steps_stream_what_is_trained_and_keep_what_it_keeps(
    layers: str, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model = DecoderConfig(width=24, heads=2, layers=layers, positions="learned").build(CONTEXT).eval()
    cpu, tokens_BT = torch.device("cpu"), prompts([12, 12], seed=1)
    with computing_in(cpu, torch.bfloat16), torch.no_grad():
        wanted_BTV, _ = model(tokens_BT)
        first_BTV, state = model(tokens_BT[:, :5], model.init_state(2))
        parts = [first_BTV]
        for place in range(5, 12):
            logits_B1V, state = model.step(tokens_BT[:, place : place + 1], state, None)
            parts.append(logits_B1V)
        assert all(part.dtype == torch.float32 for part in parts), "rounded, the best two symbols would be equal"
        found_BTV = torch.cat(parts, 1)
        assert float((found_BTV - wanted_BTV.float()).norm() / wanted_BTV.float().norm()) < 1e-2
        kept = {tensor.dtype for tensor in state.tensors()} - {torch.int64}
        assert kept == ({torch.float32} if layers == "gla*2" else {torch.bfloat16})
        check_generation(model, "fixed", monkeypatch, close=1e-5)
    assert autocast_dtype(cpu) is None


def test_in_bfloat16_a_prefix_scan_chooses_among_logits_that_are_not_rounded(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = PrefixScanConfig(chunk=3, width=24, heads=2).build(CONTEXT).eval()
    tokens_BT = prompts([12, 12], seed=1)
    with computing_in(torch.device("cpu"), torch.bfloat16), torch.no_grad():
        wanted_BTV, _ = model(tokens_BT)
        first_BTV, state = model(tokens_BT[:, :5], model.init_state(2))
        next_B1V, _ = model.step(tokens_BT[:, 5:6], state, None)
        for found, wanted in ((first_BTV, wanted_BTV[:, :5]), (next_B1V, wanted_BTV[:, 5:6])):
            assert found.dtype == torch.float32
            assert float((found - wanted.float()).norm() / wanted.float().norm()) < 2e-2
        check_generation(model, "fixed", monkeypatch, close=1e-5)


def test_captured_steps_are_refused_without_a_gpu_and_their_rows_stay():
    model = build("attention 0")
    with pytest.raises(ValueError, match="graph needs a CUDA device, the state is on cpu"):
        DecodeSteps(model, model.init_state(1), [0], "graph")
    with pytest.raises(ValueError, match="mode fixed: the rows of captured steps stay"):
        DecodeSteps(model, model.init_state(2), [0, 0], "fixed").select(torch.tensor([1]))
    assert DecodeSteps(model, model.init_state(1), [0]).mode == "eager"
