import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.data import positions as shown
from trivium.model.base import ModelContext
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.model.positions import Positions, block_ids, document_positions, document_starts
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.alphabet import Alphabet
from trivium.tasks.multiplication import MultiplicationConfig
from trivium.tasks.sorting import SortingConfig

HEX = Alphabet((*"0123456789ABCDEF", "+", "<end>"), digits=tuple("0123456789ABCDEF"))
CONTEXT = ModelContext(vocab_size=len(HEX), max_length=8, digit_ids=HEX.digit_ids)


def digits_of(text: str) -> torch.Tensor:
    return torch.tensor([[index in HEX.digit_ids for index in HEX.encode(text)]])


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("+1342+879+2221+", [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0]),
        ("+F3+", [0, 1, 2, 0]),
        ("77", [1, 2]),
        ("+", [0]),
    ],
)
def test_block_ids_count_inside_each_run_of_digits(text: str, ids: list[int]):
    assert block_ids(digits_of(text)).tolist() == [ids]


@given(st.text("0F+", min_size=1, max_size=20), st.integers(0, 20))
def test_a_run_of_digits_goes_on_from_the_state(text: str, place: int):
    whole = block_ids(digits_of(text))
    digits = digits_of(text)
    first, second = digits[:, :place], digits[:, place:]
    run_B = block_ids(first)[:, -1] if first.shape[1] else torch.zeros(1, dtype=torch.int64)
    assert torch.cat([block_ids(first), block_ids(second, run_B)], dim=1).tolist() == whole.tolist()


@given(st.lists(st.text("0F+", min_size=1, max_size=6), min_size=1, max_size=4))
def test_ids_start_anew_at_each_packed_document(texts: list[str]):
    documents = torch.tensor([[index for index, text in enumerate(texts) for _ in text]])
    starts_BT = document_starts(documents)
    alone = [block_ids(digits_of(text)) for text in texts]
    assert block_ids(digits_of("".join(texts)), starts_BT=starts_BT).tolist() == torch.cat(alone, dim=1).tolist()
    assert document_positions(starts_BT).tolist() == [[place for text in texts for place in range(len(text))]]


@given(st.lists(st.integers(0, len(HEX) - 1), min_size=1, max_size=7))
def test_the_ids_that_are_shown_number_the_ends_of_numbers_as_the_model_does(tokens: list[int]):
    positions = Positions("coupled", 4, 8, CLOSING, std=1.0, closing=True).eval()
    found = shown.block_ids(np.array([tokens]), HEX.digit_ids, CLOSING.closing_ids)
    assert numbered(positions, "".join(HEX.symbols[token] for token in tokens)) == found[0].tolist()


@given(st.lists(st.integers(0, len(HEX) - 1), min_size=1, max_size=30))
def test_the_ids_that_are_shown_are_the_ids_that_the_model_uses(tokens: list[int]):
    digit_V = Positions("block", 4, 40, CONTEXT, std=1.0).digit_V
    ids = block_ids(digit_V[torch.tensor([tokens])])
    assert ids[0].tolist() == shown.block_ids(np.array(tokens), HEX.digit_ids).tolist()


def decoder(positions: str, **options):
    torch.manual_seed(0)
    return DecoderConfig(width=8, heads=2, positions=positions, **options).build(CONTEXT)  # pyright: ignore[reportArgumentType]


def test_block_ids_are_refused_without_digits():
    with pytest.raises(UserError, match=r"model.positions: block .* no digits; allowed: learned"):
        DecoderConfig(positions="block").build(ModelContext(vocab_size=5, max_length=8))


@pytest.mark.parametrize("positions", ["learned", "block"])
def test_a_sequence_longer_than_the_table_is_refused_and_leaves_the_state_alone(positions: str):
    model = decoder(positions)
    tokens_BT = torch.ones(2, 12, dtype=torch.int64)  # digits, so that one run grows
    with pytest.raises(ValueError, match=r"12 .* at most 8"):
        model(tokens_BT)
    with torch.no_grad():
        state = model.init_state(2, max_length=12)
        _, state = model(tokens_BT[:, :8], state)
        before = [tensor.clone() for tensor in state.tensors()]
        with pytest.raises(ValueError, match=r"9 .* at most 8"):
            model(tokens_BT[:, 8:9], state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(state.tensors(), before, strict=True))


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "none"])
def test_schemes_without_a_table_have_no_longest_sequence(positions: str):
    logits, _ = decoder(positions)(torch.zeros(1, 50, dtype=torch.int64))
    assert logits.shape == (1, 50, CONTEXT.vocab_size)


def test_documents_longer_together_than_the_table_are_fine():
    documents = torch.tensor([[0] * 8 + [1] * 8])
    logits, _ = decoder("learned")(torch.zeros(1, 16, dtype=torch.int64), documents_BT=documents)
    torch.testing.assert_close(logits[:, 8:], logits[:, :8])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "block"])
def test_order_matters_with_positions(positions: str):
    model = decoder(positions).eval()
    one, other = torch.tensor([[1, 2, 3, 3]]), torch.tensor([[2, 1, 3, 3]])
    assert not torch.allclose(model(one)[0][:, -1], model(other)[0][:, -1], atol=1e-6)


def test_order_does_not_matter_without_positions_in_one_layer():
    model = decoder("none", layers="attention").eval()
    one, other = torch.tensor([[1, 2, 3, 3]]), torch.tensor([[2, 1, 3, 3]])
    torch.testing.assert_close(model(one)[0][:, -1], model(other)[0][:, -1])


def test_training_shifts_the_ids_of_a_sequence_together_and_evaluation_does_not():
    positions = Positions("block", 4, 8, CONTEXT, std=1.0, block_offset=5)
    with torch.no_grad():
        positions.table.weight.copy_(torch.arange(positions.rows)[:, None].expand(-1, 4))
    tokens_BT = torch.tensor([HEX.encode("+12+3")] * 200)
    plain = torch.tensor([0, 1, 2, 0, 1])

    def ids(**options):
        added, _, _ = positions(tokens_BT, None, None, None, options.get("documents_BT"), torch.float32)
        return added[..., 0].long()

    positions.eval()
    assert torch.equal(ids(), plain.expand(200, -1))
    positions.train()
    offsets = ids() - plain
    assert set(offsets[:, 1].tolist()) == set(range(6))
    assert torch.equal(offsets[:, [0, 3]], torch.zeros(200, 2, dtype=torch.int64))
    assert torch.equal(offsets[:, 1], offsets[:, 2])
    assert torch.equal(offsets[:, 1], offsets[:, 4])
    packed = ids(documents_BT=torch.tensor([[0, 0, 0, 1, 1]]).expand(200, -1)) - plain
    assert torch.equal(packed[:, 1], packed[:, 2])
    assert not torch.equal(packed[:, 1], packed[:, 4])


LEAST_FIRST = ModelContext(vocab_size=len(HEX), max_length=8, digit_ids=HEX.digit_ids, least_first=True)


def test_coupled_ids_are_those_of_runs_and_their_offset_moves_every_token():
    positions = Positions("coupled", 4, 8, LEAST_FIRST, std=1.0, block_offset=5)
    with torch.no_grad():
        positions.table.weight.copy_(torch.arange(positions.rows)[:, None].expand(-1, 4))
    tokens_BT = torch.tensor([HEX.encode("+12+3")] * 200)
    plain = torch.tensor([0, 1, 2, 0, 1])

    def ids():
        return positions(tokens_BT, None, None, None, None, torch.float32)[0][..., 0].long()

    offsets = ids() - plain
    assert torch.equal(offsets, offsets[:, :1].expand(-1, 5))
    assert set(offsets[:, 0].tolist()) == set(range(6))
    positions.eval()
    assert torch.equal(ids(), plain.expand(200, -1))


def test_coupled_ids_are_refused_where_numbers_begin_with_their_most_significant_digit():
    with pytest.raises(UserError, match=r"model.positions: coupled .* does not know how many follow"):
        DecoderConfig(positions="coupled").build(CONTEXT)
    with pytest.raises(UserError, match=r"model.positions: coupled .* no digits"):
        DecoderConfig(positions="coupled").build(ModelContext(vocab_size=5, max_length=8, least_first=True))


@pytest.mark.parametrize(
    ("config", "least_first"),
    [
        (AdditionConfig(format="reversed"), True),
        (AdditionConfig(format="delimited"), True),
        (AdditionConfig(format="plain"), False),
        (AdditionConfig(format="column"), False),
        (AdditionConfig(format="reversed_chain"), False),
        (MultiplicationConfig(), True),
        (MultiplicationConfig(reversed=False), False),
        (SortingConfig(), False),
    ],
)
def test_a_task_says_how_it_writes_numbers(config, least_first):
    assert model_context(config.build(), DecoderConfig()).least_first == least_first


CLOSING = ModelContext(
    vocab_size=len(HEX), max_length=8, digit_ids=HEX.digit_ids, least_first=True, closing_ids=(HEX.id_of("+"),)
)


def numbered(positions, text, **options):
    """The ids of `text`, read off a table that holds them."""
    with torch.no_grad():
        positions.table.weight.copy_(torch.arange(positions.rows)[:, None].expand(-1, positions.width))
    added, _, _ = positions(torch.tensor([HEX.encode(text)]), None, None, None, options.get("documents"), torch.float32)
    return added[0, :, 0].long().tolist()


def test_the_symbol_that_ends_a_number_has_the_id_of_its_next_digit():
    positions = Positions("coupled", 4, 8, CLOSING, std=1.0, closing=True).eval()
    assert numbered(positions, "12+345+") == [1, 2, 3, 1, 2, 3, 4]
    assert numbered(positions, "+1++2") == [0, 1, 2, 0, 1]
    # A document that begins with the symbol ends no number of the one before.
    assert numbered(positions, "12+3", documents=torch.tensor([[0, 0, 1, 1]])) == [1, 2, 0, 1]
    with pytest.raises(UserError, match=r"model.closing: this task says of no symbol"):
        DecoderConfig(positions="coupled", closing=True).build(LEAST_FIRST)


def test_ids_are_read_at_an_offset_of_their_own():
    positions = Positions("coupled", 4, 8, CLOSING, std=1.0, block_offset=5, read_offset=3).eval()
    assert numbered(positions, "12+3") == [4, 5, 3, 4]
    block = Positions("block", 4, 8, CLOSING, std=1.0, block_offset=5, read_offset=3).eval()
    assert numbered(block, "12+3") == [4, 5, 0, 4]
    with pytest.raises(UserError, match="read_offset: 6 is not allowed; allowed: 0 to block_offset"):
        DecoderConfig(positions="block", block_offset=5, read_offset=6)


def test_sinusoids_of_ids_have_no_parameters_and_no_end():
    options = {"positions": "coupled", "run_table": "sinusoidal", "position_base": 50.0}
    config = DecoderConfig(width=16, heads=2, **options)
    context = model_context(AdditionConfig(max_digits=3).build(), config, lengths=(30,))
    model = config.build(context).eval()
    assert config.num_params(context) == sum(parameter.numel() for parameter in model.parameters())
    ids_BT = torch.tensor([[1, 2, 70]])
    vectors = model.positions._sinusoid(ids_BT, torch.float64)[0]
    turned = model.positions._sinusoid(ids_BT + 11, torch.float64)[0]
    # How alike two places are depends on how far apart they are, not on where they stand.
    torch.testing.assert_close(vectors @ vectors.T, turned @ turned.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learned", "run_table": "sinusoidal"}, "run_table: given with learned positions"),
        ({"positions": "rotary", "closing": True}, "closing: given with rotary positions"),
        ({"positions": "block", "position_base": 50.0}, "position_base: 50.0 is not allowed"),
        ({"positions": "sinusoidal", "position_base": 1.0}, "position_base: 1.0 is not allowed"),
        ({"positions": "block", "run_table": "fixed"}, "run_table: 'fixed' is not allowed"),
    ],
)
def test_options_of_positions_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**options)
