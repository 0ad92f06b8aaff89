import math

import numpy as np
import pytest
import torch

from tests.scripted import ScriptedModel
from trivium.config import UserError
from trivium.generate.engine import Generator, generate
from trivium.generate.sampling import sample, uniforms
from trivium.model.base import ModelContext
from trivium.model.decoder import DecoderConfig

END = 0
LENGTHS = np.array([3, 8, 8])


def countdown(history):
    """The next token is one less than the last; 1 is followed by the end."""
    return max(history[-1] - 1, END)


def model_of(script, vocab_size=12, max_length=40):
    return ScriptedModel(script, vocab_size, max_length)


def scattered(history):
    """Logits that depend on every token so far and differ from history to history."""
    generator = torch.Generator().manual_seed(hash(history) % 2**31)
    return torch.randn(12, generator=generator)


def reread(model, prompt, max_new_tokens):
    """Greedy decoding the slow way: the whole sequence through the parallel form for each token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens and tokens[-1:] != [END]:
        logits_BTV, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits_BTV[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_each_row_ends_at_its_end_token_or_at_the_limit():
    results = generate(model_of(countdown), [[3], [9, 1], [8], [2, 6]], end_id=END, max_new_tokens=4)
    assert [result.tokens for result in results] == [[2, 1, 0], [0], [7, 6, 5, 4], [5, 4, 3, 2]]
    assert [result.finished for result in results] == [True, True, False, False]
    assert all(result.probabilities is None for result in results)


def test_the_end_token_at_the_very_limit_counts_as_finished():
    (result,) = generate(model_of(countdown), [[3]], end_id=END, max_new_tokens=3)
    assert (result.tokens, result.finished) == ([2, 1, 0], True)
    (result,) = generate(model_of(countdown), [[3]], end_id=END, max_new_tokens=2)
    assert (result.tokens, result.finished) == ([2, 1], False)


def test_unequal_prompts_in_batches_of_any_size_give_what_each_gives_alone():
    prompts = [[int(token) for token in np.random.default_rng(i).integers(1, 12, size=1 + i % 7)] for i in range(23)]
    model = model_of(scattered)
    alone = [reread(model, prompt, 15) for prompt in prompts]
    assert len({len(tokens) for tokens in alone}) > 4, "the rows should end at different times"
    for batch in (1, 4, 23, 100):
        results = generate(model, prompts, end_id=END, max_new_tokens=15, batch=batch)
        assert [result.tokens for result in results] == alone


@pytest.mark.parametrize("at_once", [False, True])
def test_arrays_are_filled_up_with_end_tokens_and_count_what_each_row_got(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trivium.generate.engine.served_at_once", lambda device: at_once)
    config = DecoderConfig(width=8, heads=2, layers="attention")
    torch.manual_seed(0)
    model = config.build(ModelContext(vocab_size=6, max_length=12)).eval()
    with torch.inference_mode():
        end_id = int(model(torch.tensor([[1, 2, 3]]))[0][0, -1].argmax())
    # The first ends at once; the others may have five tokens, since the model reads no further than 12.
    tokens_BT = torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0], [5, 4, 2, 1, 3, 5, 2, 4], [2, 2, 5, 4, 1, 3, 0, 5]])
    found = [Generator(model, end_id=end_id, max_new_tokens=9, batch=b).arrays(tokens_BT, LENGTHS) for b in (2, 9)]
    for tokens_BN, counts_B, finished_B, shares_BN in found:
        assert shares_BN is None
        assert counts_B[0] == 1
        for row, (count, finished) in enumerate(zip(counts_B, finished_B, strict=True)):
            assert (tokens_BN[row, count:] == end_id).all()
            assert (tokens_BN[row, : count - 1] != end_id).all()
            assert finished == (tokens_BN[row, count - 1] == end_id)
            assert count <= min(9, 13 - LENGTHS[row])
    assert all((one == other).all() for one, other in zip(*(each[:3] for each in found), strict=True))


def test_the_prefix_is_read_once():
    model = model_of(countdown)
    generate(model, [[9, 9, 9, 9, 9, 9, 9, 9, 4]], end_id=END, max_new_tokens=20)
    assert model.tokens_read == 9 + 3


def test_finished_rows_are_read_no_more():
    model = model_of(countdown)
    generate(model, [[1], [2], [9]], end_id=END, max_new_tokens=20)
    assert model.rows_read == [3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_generation_stops_where_the_model_can_read_no_further():
    model = model_of(lambda history: 5, max_length=6)
    short, full = generate(model, [[1, 1], [1] * 6], end_id=END, max_new_tokens=100)
    assert (len(short.tokens), len(full.tokens)) == (5, 1)
    assert not short.finished
    with pytest.raises(UserError, match=r"too long for the model: 7 tokens, the model reads at most 6"):
        generate(model, [[1], [1] * 7], end_id=END, max_new_tokens=1)


def test_nothing_to_continue_is_nothing_generated():
    assert generate(model_of(countdown), [], end_id=END, max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"batch": 0}, "batch 0"),
        ({"prompts": [[1], []]}, "empty prompt"),
    ],
)
def test_impossible_requests_are_refused_in_words(change, message):
    request = {"prompts": [[1]], "end_id": END, "max_new_tokens": 3} | change
    with pytest.raises(UserError, match=message):
        generate(model_of(countdown), request.pop("prompts"), **request)


def test_probabilities_are_those_of_the_tokens_chosen():
    logits = torch.tensor([0.0, 1.0, 3.0, -1.0])
    model = model_of(lambda history: logits, vocab_size=4)
    (result,) = generate(model, [[1]], end_id=END, max_new_tokens=3, probabilities=True)
    assert result.tokens == [2, 2, 2]
    assert result.probabilities == pytest.approx([float(logits.softmax(0)[2])] * 3)
    (result,) = generate(model, [[1]], end_id=END, max_new_tokens=9, probabilities=True, temperature=50.0)
    assert result.probabilities == pytest.approx([float(logits.softmax(0)[token]) for token in result.tokens])


def test_a_sample_depends_on_the_seed_and_its_row_and_not_on_its_neighbours():
    model = model_of(scattered)
    prompts = [[1 + i % 5] * (1 + i % 3) for i in range(20)]
    settings = {"end_id": END, "max_new_tokens": 12, "temperature": 1.0}
    results = generate(model, prompts, seed=3, **settings)
    assert results == generate(model, prompts, seed=3, batch=3, **settings)
    assert results[:7] == generate(model, prompts[:7], seed=3, **settings)
    assert results != generate(model, prompts, seed=4, **settings)
    same = generate(model, [[1]] * 20, seed=3, **settings)
    assert len({tuple(result.tokens) for result in same}) > 10, "rows of one prompt should differ"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_their_temperature(temperature):
    logits = torch.tensor([-1.0, 0.0, 0.5, 1.0, -math.inf, 2.0])
    model = model_of(lambda history: logits, vocab_size=6)
    results = generate(model, [[1]] * 5000, end_id=4, max_new_tokens=2, temperature=temperature, seed=1, batch=5000)
    expected = (logits / temperature).softmax(0).double().numpy()
    for place in (0, 1):
        counts = np.bincount([result.tokens[place] for result in results], minlength=6)
        assert counts[4] == 0
        likely = expected > 0
        chi_square = ((counts - 5000 * expected)[likely] ** 2 / (5000 * expected[likely])).sum()
        assert chi_square < 18.5, "beyond the 99.9 % point of chi-square with 4 degrees of freedom"
    pairs = np.array([result.tokens for result in results])
    both = np.mean((pairs == 5).all(1))
    assert both == pytest.approx(expected[5] ** 2, abs=0.03), "successive tokens should be independent"


def test_a_tiny_temperature_is_greedy_and_finite():
    logits_BV = torch.tensor([[1.0, 2.0, 1.9], [5.0, -3.0, 4.0]])
    assert sample(logits_BV, 1e-30, torch.tensor([0.999999, 0.0]).double()).tolist() == [1, 0]


def test_the_uniform_numbers_fill_their_range_without_pattern():
    numbers = uniforms(7, np.arange(2000), 20).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, bins=16, range=(0, 1))[0] / 2500 - 1).max() < 0.1
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02
    assert not np.array_equal(uniforms(8, np.arange(9), 5), uniforms(7, np.arange(9), 5))


def test_the_mode_of_every_module_is_put_back():
    model = model_of(countdown)
    model.add_module("frozen", torch.nn.Dropout().eval())
    model.train()
    model.frozen.eval()
    generate(model, [[3]], end_id=END, max_new_tokens=3)
    assert model.training
    assert not model.frozen.training


@pytest.mark.parametrize("config", DecoderConfig.examples(), ids=lambda config: f"{config.layers}-{config.positions}")
def test_a_decoder_streams_what_rereading_gives_in_unequal_batches(config):
    context = ModelContext(vocab_size=12, max_length=24, digit_ids=tuple(range(1, 9)), closing_ids=(9,))
    torch.manual_seed(1)
    model = config.build(context).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # decided enough that greedy choices differ from row to row
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, 12, size=1 + i % 6).tolist() for i in range(14)]
    with torch.no_grad():
        alone = [reread(model, prompt, 12) for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 4
    for batch in (3, 14):
        results = generate(model, prompts, end_id=END, max_new_tokens=12, batch=batch, probabilities=True)
        assert [result.tokens for result in results] == alone
    longest = max(results, key=lambda result: len(result.tokens))
    prompt = prompts[results.index(longest)]
    with torch.no_grad():
        logits_BTV, _ = model(torch.tensor([prompt + longest.tokens[:-1]]))
    wanted = logits_BTV[0, len(prompt) - 1 :].softmax(-1).max(-1).values
    assert longest.probabilities == pytest.approx(wanted.tolist(), abs=1e-10)


def test_a_model_that_has_generated_can_still_be_trained():
    context = ModelContext(vocab_size=12, max_length=24, digit_ids=tuple(range(1, 9)), closing_ids=(9,))
    for config in DecoderConfig.examples():
        model = config.build(context).train()
        generate(model, [[1, 2], [3]], end_id=END, max_new_tokens=5)
        logits_BTV, _ = model(torch.randint(0, 12, (2, 9)))
        logits_BTV.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
