import dataclasses

import pytest
import torch

from trivium.config import UserError, from_dict, to_dict
from trivium.model.base import ModelConfig, ModelContext
from trivium.model.decoder import DecoderConfig
from trivium.ops import dispatch

CONTEXT = ModelContext(vocab_size=14, max_length=13, digit_ids=tuple(range(10)))


def tokens(rows: int = 4, length: int = 13) -> torch.Tensor:
    return torch.randint(14, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("preset", "shape", "millions"),
    [
        ("small", (256, 4, 4, 512), 2.1),
        ("medium", (512, 8, 6, 1024), 12.6),
        ("large", (512, 8, 8, 2048), 25.2),
        ("gpt2_6m", (256, 4, 8, 1024), 6.3),
    ],
)
def test_presets_have_the_published_sizes(preset, shape, millions):
    config = DecoderConfig(preset=preset)
    assert (config.width, config.heads, len(config.mixers), config.hidden_width) == shape
    assert config.num_params(CONTEXT) / 1e6 == pytest.approx(millions, abs=0.05)


def test_what_a_recipe_names_wins_over_the_preset():
    config = from_dict(ModelConfig, {"preset": "small", "width": 128, "layers": "attention*2"})
    assert isinstance(config, DecoderConfig)
    assert (config.width, config.heads, config.layers, config.ff_width) == (128, 4, "attention*2", 512)


def test_a_head_over_many_symbols_that_pytorch_computes_is_not_on_record_as_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trivium.model.decoder.LARGE", 14)
    for backends in ({}, {"linear": "reference"}):
        dispatch.forget()
        DecoderConfig(width=16, heads=2, layers="attention*1", backends=backends).build(CONTEXT)(tokens(40))
        assert ("by name" in str(dispatch.chosen())) == bool(backends), dispatch.chosen()


def test_the_default_is_the_size_of_the_quickstart():
    assert DecoderConfig().num_params(CONTEXT) == pytest.approx(1e5, rel=0.02)


def test_a_resolved_config_comes_back_equal():
    for config in (DecoderConfig(), *DecoderConfig.examples(), DecoderConfig(preset="gpt2_6m", ff_width=700)):
        assert from_dict(ModelConfig, to_dict(config)) == config
        assert hash(config) == hash(from_dict(ModelConfig, to_dict(config)))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"width": 0}, "model.width: 0 is not allowed; allowed: 1 or more"),
        ({"heads": 0}, "model.heads: 0 is not allowed"),
        ({"width": 64, "heads": 5}, "model.heads: 5 heads do not divide the width 64"),
        ({"layers": ""}, "model.layers: the pattern is empty"),
        ({"layers": "attention*2 + simplical"}, "model.layers: unknown mixer 'simplical'"),
        ({"positions": "rotory"}, "model.positions: 'rotory' is not allowed; did you mean 'rotary'"),
        ({"feedforward": "relu"}, "model.feedforward: 'relu' is not allowed"),
        ({"norm": "batch"}, "model.norm: 'batch' is not allowed"),
        ({"ff_width": 0}, "model.ff_width: 0 is not allowed"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not allowed"),
        ({"dropout": -0.1}, "model.dropout: -0.1 is not allowed"),
        ({"max_length": 0}, "model.max_length: 0 is not allowed"),
        ({"preset": "tiny"}, "model.preset: 'tiny' is not allowed"),
        ({"block_offset": 3}, "model.block_offset: 3 is not allowed"),
        ({"block_offset": -1, "positions": "block"}, "model.block_offset: -1 is not allowed"),
        ({"widht": 3}, "model.widht: unknown key; did you mean 'width'"),
        ({"backends": {"attention": 3}}, "model.backends.attention: expected text"),
        ({"backends": {"simplical": "torch"}}, "model.backends: unknown operator 'simplical'; did you"),
        ({"backends": {"simplicial": "refrence"}}, "model.backends.simplicial: 'refrence' is not allowed; did"),
    ],
)
def test_bad_values_are_refused(values, problem):
    with pytest.raises(UserError) as caught:
        from_dict(ModelConfig, values, "model")
    assert str(caught.value).startswith(problem)


def test_a_mixer_that_does_not_fit_the_width_is_refused_by_name():
    with pytest.raises(UserError, match=r"model.layers: attention: kv_heads"):
        DecoderConfig(layers="attention(kv_heads=3)").build(CONTEXT)


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for checkpoint_activations in (False, True):
        torch.manual_seed(0)
        config = DecoderConfig(width=24, heads=2, dropout=0.2, checkpoint_activations=checkpoint_activations)
        model = config.build(CONTEXT).train()
        model(tokens())[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputing_activations_keeps_fewer_of_them():
    kept = []
    for checkpoint_activations in (False, True):
        model = DecoderConfig(checkpoint_activations=checkpoint_activations).build(CONTEXT)
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens())
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2


def test_dropout_acts_in_training_alone():
    model = DecoderConfig(width=24, heads=2, dropout=0.5).build(CONTEXT)
    assert not torch.equal(model(tokens())[0], model(tokens())[0])
    model.eval()
    assert torch.equal(model(tokens())[0], model(tokens())[0])


def test_a_seed_names_the_initial_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return DecoderConfig(width=24, heads=2).build(CONTEXT).state_dict()

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_an_untrained_model_guesses_about_uniformly_and_stays_calm_with_depth():
    for layers in (2, 24):
        torch.manual_seed(0)
        model = DecoderConfig(width=64, layers=f"attention*{layers}").build(CONTEXT)
        logits, _ = model(tokens(64))
        assert logits.std() < 1
        assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(64).roll(3, 0).flatten()) < 3.2


def test_a_tied_head_is_the_embedding():
    tied, untied = (DecoderConfig(width=24, heads=2, tied=tied).build(CONTEXT) for tied in (True, False))
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (14, 24)


def test_packed_documents_have_no_streaming_form():
    model = DecoderConfig(width=24, heads=2).build(CONTEXT)
    with pytest.raises(ValueError, match="documents_BT is given with a state"):
        model(tokens(), model.init_state(4), documents_BT=torch.zeros(4, 13, dtype=torch.int64))


def test_the_state_has_room_for_what_was_asked():
    model = DecoderConfig(width=24, heads=2, positions="none").build(CONTEXT)
    with torch.no_grad(), pytest.raises(ValueError, match="room"):
        model(tokens(4, 6), model.init_state(4, max_length=5))


@pytest.mark.parametrize(
    ("change", "length", "equal"),
    [
        ({}, 13, True),
        ({"layers": "attention + attention(window=13)"}, 13, True),
        ({"layers": "attention + attention(window=12)"}, 13, False),
        ({"layers": "attention + attention(window=12)"}, 12, True),
        ({"layers": "attention*3"}, 13, False),
        ({"ff_width": 256}, 13, True),
        ({"ff_width": 255}, 13, False),
        ({"checkpoint_activations": True}, 13, True),
        ({"max_length": 99}, 13, True),
        ({"dropout": 0.1}, 13, False),
        ({"tied": False}, 13, False),
    ],
)
def test_models_are_equal_when_they_compute_the_same(change, length, equal):
    base = DecoderConfig()
    other = dataclasses.replace(base, **change)
    assert base.equals_at(other, length) is equal
    assert other.equals_at(base, length) is equal


def test_backends_of_the_recipe_reach_the_mixers():
    config = DecoderConfig(backends={"simplicial": "reference"})
    context = ModelContext(14, 13, (), backends={"simplicial": "torch", "scan": "torch"})
    assert config.mixer_context(context).backends == {"simplicial": "reference", "scan": "torch"}


# torch's own compiler instantiates each autograd.Function, which torch warns of.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layers", ["attention*2", "attention + simplicial(window1=6, window2=3)"])
def test_the_whole_form_compiles_without_a_graph_break(layers):
    torch._dynamo.reset()
    model = DecoderConfig(width=24, heads=2, positions="block", layers=layers).build(CONTEXT).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens())[0], model(tokens())[0])


def test_loops_run_the_same_blocks_again_with_the_embeddings_added():
    config = DecoderConfig(width=24, heads=2, positions="block", layers="attention*2", loops=2, input_injection=True)
    torch.manual_seed(0)
    model = config.build(CONTEXT).eval()
    first, second = model.blocks
    # What the model adds up before its blocks: a model without any layer's effect.
    with torch.no_grad():
        added, _, _ = model.positions(tokens(), None, None, None, None, torch.float32)
        x_BTD = embedded = model.embedding(tokens()) + added
        for index, block in enumerate((first, second, first, second)):
            x_BTD = block(x_BTD + embedded if index else x_BTD, None, None, None, None, None, None)[0]
        expected = model.norm(x_BTD) @ model.embedding.weight.T
        torch.testing.assert_close(model(tokens())[0], expected)
    once = dataclasses.replace(config, loops=1)
    assert config.num_params(CONTEXT) == once.num_params(CONTEXT)
    rest = 2 * config.width * CONTEXT.vocab_size
    twice = 2 * (once.flops_per_token(CONTEXT, 13) - rest) + rest
    assert config.flops_per_token(CONTEXT, 13) == pytest.approx(twice)
    assert not config.equals_at(once, 13)


def test_blocks_that_begin_as_the_identity_leave_the_layers_before_them():
    hybrid = DecoderConfig(
        width=24,
        heads=2,
        layers="attention(bias=true)*2 + simplicial(bias=true, window1=5, window2=3)*2",
        identity=(2, 3),
    )
    short = dataclasses.replace(hybrid, layers="attention(bias=true)*2", identity=())
    torch.manual_seed(0)
    whole = hybrid.build(CONTEXT).double()
    first = short.build(CONTEXT).double()
    # The new blocks are what the short model lacks; everything else is copied.
    first.load_state_dict({name: whole.state_dict()[name] for name in first.state_dict()})
    tokens_BT = torch.randint(14, (3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(tokens_BT)[0], first(tokens_BT)[0])
    whole(tokens_BT)[0].logsumexp(-1).sum().backward()
    for block in whole.blocks[2:]:  # they learn from the first step on
        assert all(part.weight.grad.norm() > 0 for part in (block.mixer.out, block.feedforward.output))


def test_a_block_that_is_not_there_cannot_begin_as_the_identity():
    with pytest.raises(UserError, match=r"identity: there is no block 2; allowed: 0 to 1"):
        DecoderConfig(layers="attention*2", identity=(0, 2))
