import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from trivium.config import UserError, config_hash, from_dict, results_only, to_dict
from trivium.mixers import cache
from trivium.model import aggregator
from trivium.model.base import ModelConfig, ModelContext
from trivium.model.prefix_scan import PrefixScanConfig
from trivium.model.sizing import match
from trivium.ops import OnlineScan
from trivium.ops.scan import num_combines, prefixes

CONTEXT = ModelContext(vocab_size=14, max_length=64)


def build(chunk: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = PrefixScanConfig(**{"chunk": chunk, "width": 16, "heads": 2, "ff_width": 16, **options})
    model = config.build(CONTEXT).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(14, (rows, length), generator=torch.Generator().manual_seed(length))


def one_chunk_after_another(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The model by its definition: an online scan, and the predictor on each chunk alone."""
    online, outputs = OnlineScan(model.aggregator, None), []
    for x_BTD in model.encoder(tokens_BT).split(model.config.chunk, dim=1):
        outputs.append(model.predictor(online.prefix(), x_BTD))
        if x_BTD.shape[1] == model.config.chunk:
            online.push(x_BTD)
    head = model.encoder.embedding if model.head is None else model.head
    return functional.linear(torch.cat(outputs, dim=1), head.weight)


def in_pieces(model: Any, tokens_BT: torch.Tensor, size: int) -> torch.Tensor:
    state, outputs = model.init_state(len(tokens_BT)), []
    for piece_BT in tokens_BT.split(size, dim=1):
        logits, state = model(piece_BT, state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["chunk", "absolute"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_whole_sequential_and_streaming_agree_at_every_length_and_number_of_chunks(chunk: int, positions: str):
    model = build(chunk, positions=positions)
    for length in [*range(1, 2 * chunk + 2), 3 * chunk, 7 * chunk - 1, 53]:
        tokens_BT = tokens(2, length)
        whole, _ = model(tokens_BT)
        assert whole.shape == (2, length, 14)
        torch.testing.assert_close(one_chunk_after_another(model, tokens_BT), whole, rtol=0, atol=1e-10)
        for size in (1, 7, length):
            torch.testing.assert_close(in_pieces(model, tokens_BT, size), whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_float32_agrees_to_a_ten_thousandth(chunk: int):
    model = build(chunk, torch.float32, aggregator_layers=2)
    whole, _ = model(tokens(3, 53))
    for other in (one_chunk_after_another(model, tokens(3, 53)), in_pieces(model, tokens(3, 53), 5)):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, combine, identity: prefixes(x, lambda a, b: combine(b, a), identity),
        lambda x, combine, identity: torch.cat(
            (x[:1] * 0, combine(torch.zeros_like(x), prefixes(x, combine, identity)[1:]))
        ),
        lambda x, combine, identity: torch.cat((x[:1] * 0, x)),
    ],
    ids=["operands swapped", "zeros aggregated as if they were the identity", "the chunk before alone"],
)
def test_a_wrong_scan_is_caught(mistake: Any):
    model = build(2)
    expected = one_chunk_after_another(model, tokens(2, 13))
    torch.testing.assert_close(model(tokens(2, 13))[0], expected, rtol=0, atol=1e-10)
    model.scan = mistake
    assert not torch.allclose(model(tokens(2, 13))[0], expected, atol=1e-6)


def places_read(model: Any) -> torch.Tensor:
    """Return (c, 2 c) bool: which places of the pair each place of the aggregate depends on."""
    chunk = model.config.chunk
    a, b = (torch.randn(1, chunk, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = model.aggregator(a, b)[0]
    rows = []
    for place in range(chunk):
        # The sum over a normalised vector is constant: weigh its channels differently.
        loss = (out[place] * torch.linspace(-1, 2, 16, dtype=torch.float64) ** 3).sum()
        gradients = torch.autograd.grad(loss, (a, b), retain_graph=True)
        rows.append(torch.cat(gradients, dim=1)[0].abs().amax(dim=-1) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [1, 2])
def test_every_place_of_the_aggregator_reads_the_later_places_too(layers: int, monkeypatch: pytest.MonkeyPatch):
    model = build(4, aggregator_layers=layers)
    assert places_read(model).all()
    attend = functional.scaled_dot_product_attention

    def masked(q: Any, k: Any, v: Any, is_causal: bool = False) -> Any:
        queries, keys = q.shape[-2], k.shape[-2]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return attend(q, k, v, attn_mask=mask)

    monkeypatch.setattr(aggregator, "scaled_dot_product_attention", masked)
    assert not places_read(model).all(), "a causal aggregator must be seen"


@torch.no_grad()
def test_the_aggregator_keeps_its_operands_apart():
    model = build(1)
    a, b = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    assert not torch.allclose(model.aggregator(a, b), model.aggregator(b, a), atol=1e-3)


@torch.no_grad()
def test_the_last_place_of_a_chunk_predicts_from_all_before_it_what_begins_the_next():
    model = build(4)
    before, _ = model(tokens(1, 13))
    assert before.shape[1] == 13, "every token is predicted, the first of every chunk too"
    for changed in range(12):
        changed_BT = tokens(1, 13)
        changed_BT[:, changed] = (changed_BT[:, changed] + 1) % 14
        after, _ = model(changed_BT)
        assert (after[0, 11] - before[0, 11]).abs().max() > 1e-9


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_streaming_reads_each_token_once_and_combines_two_pairs_a_chunk(chunk: int):
    model = build(chunk)
    pairs, fed = [], []
    model.aggregator.register_forward_pre_hook(lambda module, pair: pairs.append(len(pair[0])))
    model.predictor.blocks[0].register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].shape[1]))
    state = model.init_state(1)
    for length in range(1, 65):
        _, state = model(tokens(1, 64)[:, length - 1 : length], state)
        assert sum(pairs) == num_combines(length // chunk) <= 2 * (length // chunk)
        assert sum(fed) == length + chunk * (length // chunk)


@torch.no_grad()
def test_a_masked_merge_gives_what_a_merge_of_the_rows_at_their_boundary_gives():
    model = build(3)
    rows, generator = 5, torch.Generator().manual_seed(3)
    looked, masked = model.init_state(rows), model.init_state(rows)
    for _ in range(20):
        size = int(torch.randint(1, 5, (), generator=generator))
        piece_BT = torch.randint(14, (rows, size), generator=generator)
        added_B = torch.randint(0, size + 1, (rows,), generator=generator)
        expected, looked = model(piece_BT, looked, lengths_B=added_B)
        with cache.fixed_shapes():
            logits, masked = model(piece_BT, masked, lengths_B=added_B)
        for b in range(rows):
            torch.testing.assert_close(logits[b, : added_B[b]], expected[b, : added_B[b]], rtol=0, atol=1e-10)
    for mine, theirs in zip(masked.counter.tensors(), looked.counter.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_scan_restarts_with_each_packed_document():
    model = build(3)
    tokens_BT = tokens(2, 29)
    cuts = [[0, 3, 18, 24, 27, 29], [0, 15, 29]]
    documents_BT = torch.stack(
        [torch.cat([torch.full((end - start,), 7 * n) for n, (start, end) in enumerate(pairwise(row))]) for row in cuts]
    )
    packed, _ = model(tokens_BT, documents_BT=documents_BT)
    for b, row in enumerate(cuts):
        for start, end in pairwise(row):
            alone, _ = model(tokens_BT[b : b + 1, start:end])
            torch.testing.assert_close(packed[b : b + 1, start:end], alone, rtol=0, atol=1e-10)
    one, _ = model(tokens_BT, documents_BT=torch.zeros_like(tokens_BT))
    torch.testing.assert_close(one, model(tokens_BT)[0], rtol=0, atol=1e-10)


def test_a_document_that_begins_inside_a_chunk_is_refused():
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="begins at token 4, inside a chunk; allowed: multiples of 3"):
        build(3)(tokens(2, 6), documents_BT=documents_BT)


def test_packed_documents_have_no_streaming_form():
    model = build(3)
    with pytest.raises(ValueError, match="documents_BT is given with a state"):
        model(tokens(1, 3), model.init_state(1), documents_BT=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("length", [1, 3, 6, 7, 12])
def test_every_weight_has_a_gradient_at_every_length(length: int):
    model = build(3).train()
    model(tokens(2, length))[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_state_grows_with_the_logarithm_of_the_length():
    config = PrefixScanConfig(chunk=32)
    short, long = (config.state_bytes(CONTEXT, length, torch.float32) for length in (1_000, 40_000))
    assert long < 2 * short
    assert PrefixScanConfig(chunk=32).build(CONTEXT).init_state(2, 40_000).num_bytes() == 2 * long


@torch.no_grad()
def test_a_sequence_longer_than_its_state_or_its_table_is_refused():
    model = build(4)
    with pytest.raises(ValueError, match="sequence of 6 tokens does not fit the state's room of 5"):
        model(tokens(1, 6), model.init_state(1, 5))
    model(tokens(1, 100))
    with pytest.raises(ValueError, match="100 tokens given, but the learned position table of this model allows"):
        build(4, positions="absolute")(tokens(1, 100))


def test_a_model_of_chunk_positions_reads_words_longer_than_its_context():
    model = build(4)
    with torch.no_grad():
        whole, _ = model(tokens(1, 150))
        state = model.init_state(1, 150)
        pieces = [model(piece_BT, state)[0] for piece_BT in tokens(1, 150).split(31, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_the_whole_form_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = build(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(2, 13))[0], model(tokens(2, 13))[0])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"chunk": 0}, "model.chunk: 0 is not allowed; allowed: 1 or more"),
        ({"aggregator_layers": 0}, "model.aggregator_layers: 0 is not allowed"),
        ({"heads": 5}, "model.heads: 5 heads do not divide the width 64"),
        ({"layers": "atention"}, "model.layers: unknown mixer 'atention'"),
        ({"positions": "rotary"}, "model.positions: 'rotary' is not allowed; allowed: chunk, absolute"),
        ({"dropout": 1.0}, "model.dropout: 1.0 is not allowed"),
        ({"chunks": 3}, "model.chunks: unknown key; did you mean 'chunk'"),
        ({"backends": {"simplical": "torch"}}, "model.backends: unknown operator 'simplical'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], problem: str):
    with pytest.raises(UserError) as caught:
        from_dict(ModelConfig, {"kind": "prefix_scan", **values}, "model")
    assert str(caught.value).startswith(problem)


def test_a_mixer_that_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match=r"model.layers: attention: kv_heads"):
        PrefixScanConfig(layers="attention(kv_heads=3)").build(CONTEXT)


def test_a_resolved_config_comes_back_equal():
    for config in PrefixScanConfig.examples():
        assert from_dict(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("change", "length", "equal"),
    [
        ({}, 64, True),
        ({"chunk": 4}, 64, False),
        ({"chunk": 32}, 16, True),
        ({"chunk": 32}, 17, False),
        ({"aggregator_layers": 2}, 16, True),
        ({"aggregator_layers": 2}, 17, False),
        ({"positions": "absolute"}, 17, False),
        ({"layers": "attention(window=32)"}, 64, True),
        ({"layers": "attention(window=31)"}, 64, False),
        ({"layers": "attention*2"}, 64, False),
        ({"ff_width": 256, "max_length": 99}, 64, True),
        ({"ff_width": 255}, 64, False),
    ],
)
def test_models_are_equal_when_they_compute_the_same(change: dict[str, Any], length: int, equal: bool):
    base = PrefixScanConfig()
    other = dataclasses.replace(base, **change)
    assert base.equals_at(other, length) is equal
    assert other.equals_at(base, length) is equal


def test_the_feed_forward_width_brings_the_model_to_a_wanted_size():
    config = PrefixScanConfig(chunk=4)
    by_parameters = match(config, CONTEXT, parameters=150_000, length=30)
    assert by_parameters.num_params(CONTEXT) == pytest.approx(150_000, rel=0.01)
    target = 1.5 * config.flops_per_token(CONTEXT, 30)
    by_flops = match(config, CONTEXT, flops=target, length=30)
    assert by_flops.flops_per_token(CONTEXT, 30) == pytest.approx(target, rel=0.01)


def test_runs_from_before_encoded_tokens_could_be_normalised_keep_their_names():
    assert "normed" not in results_only(PrefixScanConfig(chunk=2))
    assert config_hash(PrefixScanConfig(normed=True)) != config_hash(PrefixScanConfig())


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_what_is_encoded_may_be_normalised_as_summaries_are(norm: str):
    torch.manual_seed(0)
    plain, normed = (
        PrefixScanConfig(chunk=2, width=16, heads=2, norm=norm, normed=value).build(CONTEXT) for value in (False, True)
    )
    normed.load_state_dict(plain.state_dict(), strict=False)
    tokens_BT = tokens(2, 10)
    left_BTD, right_BTD = (model.encoder(tokens_BT) for model in (plain, normed))
    assert torch.equal(right_BTD, normed.encoder.norm(left_BTD))
    summaries = normed.aggregator(right_BTD[:, :2], right_BTD[:, 2:4])
    sizes = [x.square().mean(dim=-1).sqrt() for x in (right_BTD, summaries, left_BTD)]
    assert torch.allclose(sizes[0], torch.ones(2, 10), atol=1e-2)
    assert torch.allclose(sizes[1], torch.ones(2, 2), atol=1e-2)
    assert sizes[2].max() < 0.5
