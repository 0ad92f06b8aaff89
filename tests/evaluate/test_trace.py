"""Traced weights are those with which the model computes."""

import numpy as np
import pytest
import torch

from trivium import cli
from trivium.config import UserError
from trivium.evaluate import trace as module
from trivium.evaluate.trace import trace
from trivium.mixers.base import MIXERS
from trivium.model.base import MODELS, Decoding
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.model.layers import format_layers
from trivium.ops import dispatch
from trivium.ops.packed_attention import packed_attention
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.group_words import GroupWordsConfig

TASK = AdditionConfig(format="reversed").build()


def built(layers: str, task=TASK, **options):
    config = DecoderConfig(width=24, heads=2, layers=layers, **options)
    torch.manual_seed(0)
    return config.build(model_context(task, config)).double()


@pytest.mark.parametrize("name", MIXERS.names())
def test_every_mixer_has_maps_that_read_nothing_ahead(name):
    for config in MIXERS.get(name).examples():
        try:
            model = built(format_layers((config,)))
        except UserError:
            continue  # a head width that this model has not
        found = trace(model, TASK, TASK.parse("101+22"))
        tokens = len(found.tokens) - 1
        assert [panel.layer for panel in found.panels] == ["layer 1", "whole model"]
        for panel in found.panels:
            assert panel.weights_HTT.shape[1:] == (tokens, tokens)
            assert np.isfinite(panel.weights_HTT).all()
            assert not np.triu(panel.weights_HTT, 1).any()
            assert np.abs(panel.weights_HTT).sum() > 0


@pytest.mark.parametrize(
    "layers", ["attention", "attention(window=3, kv_heads=1)", "gla", "gated_deltanet(householder=3)"]
)
def test_weights_times_values_are_what_the_operator_gives(layers):
    model = built(layers)
    found = trace(model, TASK, TASK.parse("101+22"))
    ids = torch.tensor([TASK.alphabet.encode("".join(found.tokens))[:-1]])
    calls = []
    with torch.no_grad(), dispatch.observing(lambda *call: calls.append(call)):
        model(ids)
    mixing = [call for call in calls if call[0] not in ("norm_linear", "linear_add")]
    by_parts = [call for call in mixing if call[0] != "packed_attention"]
    operator, arguments, options = by_parts[0] if by_parts else module._unpacked(mixing[0])
    outputs = dispatch.load(operator, "reference", "cpu")(*arguments, **options)
    o_TSHK = outputs[0] if isinstance(outputs, tuple) else outputs
    v_SHK = arguments[2][0]
    steps = v_SHK.shape[0] // ids.shape[1]
    if steps > 1:
        return  # a token's steps share one column: their sum is shown
    weights_HTT = torch.from_numpy(found.panels[0].weights_HTT).double()
    v_SHK = v_SHK.repeat_interleave(weights_HTT.shape[0] // v_SHK.shape[1], dim=1)
    torch.testing.assert_close(torch.einsum("hts,shk->thk", weights_HTT, v_SHK), o_TSHK[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_packed_call_is_shown_as_the_attention_that_it_is(window):
    x_BTND = torch.randn(1, 7, 4 + 2 * 2, 6, generator=torch.Generator().manual_seed(0))
    seen = []
    with dispatch.observing(lambda *call: seen.append(call)):
        packed_attention(x_BTND, 2, window, backend="torch")
    packed, inner = seen
    operator, arguments, options = module._unpacked(packed)
    assert operator == inner[0] == "attention"
    shown = module._weights(operator, arguments, options, 7)
    torch.testing.assert_close(shown, module._weights(inner[0], inner[1], inner[2], 7))


def test_pairs_of_a_simplicial_head_sum_to_both_marginals_and_to_one():
    for form in ("trilinear", "determinant"):
        model = built(f"simplicial(window1=6, window2=3, form={form})")
        panel = trace(model, TASK, TASK.parse("101+22")).panels[0]
        assert panel.pairs_HTTT is not None
        assert panel.second_HTT is not None
        np.testing.assert_allclose(panel.pairs_HTTT.sum((2, 3)), 1, rtol=1e-5)
        np.testing.assert_allclose(panel.pairs_HTTT.sum(3), panel.weights_HTT, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(panel.pairs_HTTT.sum(2), panel.second_HTT, rtol=1e-5, atol=1e-7)
        assert not panel.second_HTT[:, 8, :6].any()  # windows of 6 and 3
        assert panel.weights_HTT[:, 8, 3:6].all()


def test_derivatives_are_those_of_finite_differences():
    model = built("gru")
    block = model.blocks[0]
    x_BTD = torch.randn(1, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found_TT = module._derivatives(block.mixer, x_BTD, {})
    step, columns = 1e-6, []
    with torch.no_grad():
        y = block.mixer(x_BTD)[0]
        for channel in range(24):
            moved = x_BTD.clone()
            moved[0, 1, channel] += step
            columns.append((block.mixer(moved)[0] - y)[0] / step)
    expected_T = torch.stack(columns).square().sum((0, 2)).sqrt()
    np.testing.assert_allclose(found_TT[:, 1], expected_T.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS.names())
def test_probabilities_are_those_of_the_text(kind):
    config = MODELS.get(kind).examples()[0]
    torch.manual_seed(0)
    model = config.build(model_context(TASK, config))
    found = trace(model, TASK, TASK.parse("101+22"))
    ids = TASK.alphabet.encode("".join(found.tokens))
    with torch.no_grad():
        shares = model.eval()(torch.tensor([ids[:-1]]))[0][0].double().softmax(-1)
    expected = [float(shares[place, token]) for place, token in enumerate(ids[1:])]
    assert found.probabilities[0] is None
    assert found.probabilities[1:] == pytest.approx(expected, rel=1e-4)
    assert found.significance[:7] == [1, 2, 3, 0, 1, 2, 0]
    assert found.tokens[: found.prompt] == list("101+22=")
    assert found.alternatives[-1][0][1] == max(share for _, share in found.alternatives[-1])


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_that_come_several_a_pass_have_the_probability_of_the_place_that_told_them(whole):
    task = AdditionConfig(format="reversed", max_digits=3, zero_pad=True).build()
    model = built("attention*2", task)
    model.decoding = Decoding(3, task.answer_tokens) if whole else Decoding(2)
    shift = model.decoding.shift
    found = trace(model, task, task.parse("101+22"))
    ids = task.alphabet.encode("".join(found.tokens))
    with torch.no_grad():
        shares = model.eval()(torch.tensor([ids[: -1 - shift]]))[0][0].double().softmax(-1)
    expected = [float(shares[place, token]) for place, token in enumerate(ids[1 + shift :])]
    assert found.probabilities[: 1 + shift] == [None] * (1 + shift)
    assert found.probabilities[1 + shift :] == pytest.approx(expected, rel=1e-4)
    # Greedy: every written token is the most probable that its place told.
    assert [best[0][0] for best in found.alternatives[found.prompt :]] == found.tokens[found.prompt :]
    read = found.panels[0].weights_HTT.shape[1]
    assert read == len(ids) - 1 - shift == (found.prompt if whole else read)
    assert len(found.alternatives) == len(found.tokens)
    assert found.described()["shift"] == shift


def test_labels_are_traced_where_they_are_read():
    task = GroupWordsConfig(group="S3", max_length=6).build()
    found = trace(built("attention", task), task, task.example("test", 0))
    assert len(found.probabilities) == len(found.tokens) == found.prompt == found.panels[0].weights_HTT.shape[1]
    assert found.labels


def test_loops_are_shown_pass_by_pass():
    found = trace(built("attention*2", loops=2), TASK, TASK.parse("1+2"))
    assert [panel.layer for panel in found.panels] == ["layer 1", "layer 2", "layer 3", "layer 4", "whole model"]


def test_what_cannot_be_traced_is_refused(monkeypatch):
    model = built("simplicial(window1=4, window2=4)")
    with pytest.raises(UserError, match="expression too long"):
        trace(model, TASK, TASK.parse("1001001001001+2002002002002"))
    long = f"{'1' * (TASK.max_length - 4)}+2"  # the prompt fits, its answer does not
    with pytest.raises(UserError, match=r"tokens and \d+ of its answer"):
        trace(model, TASK, TASK.parse(long))
    monkeypatch.setattr(module, "LARGEST", 1000)
    monkeypatch.setattr(module, "generate", None)  # it is refused before anything is generated
    with pytest.raises(UserError, match=r"would hold 0 MiB, more than 0 MiB: give a shorter expression"):
        trace(model, TASK, TASK.parse("1+2"))


def test_the_commands_write_pages_maps_and_arrays(tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "task: {kind: addition, max_digits: 2}\nmodel: {width: 16, heads: 2, layers: attention*1}\n"
        "train: {steps: 2, batch: 8, threads: 1}\nevaluate: {examples: 5}\n"
    )
    assert cli.main(["train", str(recipe), "--runs", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").glob("*/*")
    capsys.readouterr()
    panels = tmp_path / "maps"
    assert cli.main(["report", str(run), "--expression", "12+34", "--panels", str(panels)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == str(run / "attention-12_2B34.html")
    assert (run / "attention-12_2B34.html").is_file()
    assert len(list(panels.iterdir())) == len(printed) - 1 == 6
    assert cli.main(["eval", str(run), "--trace", "--examples", "3", "--json"]) == 0
    assert len(list((run / "traces").glob("*.safetensors"))) == len(list((run / "traces").glob("*.json"))) == 3
    capsys.readouterr()
    no_folder = ["--expression", "5+6", "--panels", str(recipe)]
    for words in (
        ["report", str(run), "--panels", "x"],
        ["report", str(run), "--expression", "1?2"],
        ["report", str(run), *no_folder],
    ):
        assert cli.main(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) <= 2
    assert not (run / "attention-5_6.html").exists()
