"""What a model folder promises to users of transformers, as plain functions that raise AssertionError."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.generate.engine import generate
from trivium.model.base import LanguageModel
from trivium.model.folder import load_model

NEW = 5  # tokens to generate


def random_rows(model: LanguageModel, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(model.context.vocab_size, (length,), generator=generator) for length in lengths]


def left_padded(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, mask); what stands in the padding is not zero, so that reading it shows."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat((torch.full((longest - len(row),), pad), row)) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


@lru_cache(maxsize=1)
def loaded(folder: Path) -> Any:
    """Return the model as transformers loads it: the checks of one folder read the same."""
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def check_logits(model: LanguageModel, folder: Path) -> None:
    """Logits are equal to 1e-5, also after transformers has written the folder anew."""
    theirs = loaded(folder)
    assert not theirs.training
    (tokens,) = random_rows(model, [9])
    wanted, _ = model(tokens[None])
    torch.testing.assert_close(theirs(tokens[None]).logits, wanted, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(folder / "again")
    assert {path.suffix for path in (folder / "again").iterdir()} == {".json", ".md", ".safetensors"}
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    torch.testing.assert_close(again(tokens[None]).logits, wanted, rtol=1e-5, atol=1e-5)
    ours, _, _ = load_model(folder / "again")
    assert torch.equal(ours(tokens[None])[0], wanted)
    assert (ours.config, ours.context, ours.decoding) == (model.config, model.context, model.decoding)


@torch.no_grad()
def check_padding(model: LanguageModel, folder: Path) -> None:
    """A left-padded row has the logits that it has alone, whole, in pieces, and where only the last are asked for."""
    theirs = loaded(folder)
    rows = random_rows(model, [7, 3, 5])
    tokens, mask = left_padded(rows, pad=1)
    whole = theirs(tokens, attention_mask=mask).logits
    last = theirs(tokens, attention_mask=mask, logits_to_keep=2).logits
    first = theirs(tokens[:, :4], attention_mask=mask[:, :4], use_cache=True)
    rest = theirs(tokens[:, 4:], attention_mask=mask, past_key_values=first.past_key_values).logits
    for b, row in enumerate(rows):
        alone = model(row[None])[0][0]
        for name, found in (("whole", whole[b]), ("pieces", torch.cat((first.logits[b], rest[b])))):
            torch.testing.assert_close(
                found[-len(row) :], alone, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(last[b], alone[-2:], rtol=1e-4, atol=1e-4)


def check_generation(model: LanguageModel, folder: Path) -> None:
    """Greedy rows of a left-padded batch are those of our own engine and of each row alone; a cache changes nothing,
    neither in greedy, in sampled nor in beam search."""
    theirs = loaded(folder)
    rows = random_rows(model, [6, 2, 4])
    tokens, mask = left_padded(rows, pad=1)
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    found = theirs.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :]
    end = int(found[0, 2])  # a token that comes
    engine = generate(model, [row.tolist() for row in rows], end_id=end, max_new_tokens=NEW)
    for each, row in zip(engine, found.tolist(), strict=True):
        assert each.tokens == row[: len(each.tokens)]
        assert len(each.tokens) == (row.index(end) + 1 if end in row else NEW) or each.tokens == row[: row.index(end)]
    for b, row in enumerate(rows):
        alone = theirs.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)
        assert alone[0, len(row) :].tolist() == found[b].tolist()
    theirs.double()  # beams that nearly tie would be told apart by the rounding of float32
    for more in ({}, {"do_sample": True, "temperature": 0.9}, {"num_beams": 3}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(
                theirs.generate(tokens, attention_mask=mask, use_cache=use_cache, **options, **more).tolist()
            )
        assert results[0] == results[1], more
    theirs.float()
