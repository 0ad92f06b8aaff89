"""Ten CPU steps reproduce the losses stored here: a change that should not change numbers does not.

After a change that should, print the new ones with ``python -m tests.contracts.test_golden`` and say in the commit why.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import cross_entropy

from trivium.model import block
from trivium.model.base import ModelContext
from trivium.model.decoder import DecoderConfig

CONTEXT = ModelContext(vocab_size=14, max_length=13, digit_ids=tuple(range(10)), closing_ids=(10,))
GOLDEN: dict[str, list[float]] = {
    "attention*2": [
        2.7639582,
        2.7424901,
        2.7072313,
        2.6678562,
        2.6268585,
        2.5924494,
        2.5883732,
        2.5809889,
        2.7230053,
        2.5979617,
    ],
    "attention(window=3, kv_heads=2, qk_norm=true) + simplicial(window1=6, window2=3)": [
        2.8919933,
        2.7955945,
        2.6744006,
        2.6261013,
        2.6435006,
        2.5705988,
        2.5017459,
        2.4773641,
        2.6359761,
        2.4916129,
    ],
}


def train(layers: str, dtype: torch.dtype = torch.float32) -> list[float]:
    torch.manual_seed(0)
    model = DecoderConfig(width=32, heads=4, layers=layers, positions="block").build(CONTEXT).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(10):
        start_B1, stride_B1 = torch.randint(1, 14, (2, 16, 1), generator=generator)
        tokens_BT = (start_B1 + stride_B1 * torch.arange(13)) % 14
        logits, _ = model(tokens_BT[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layers", list(GOLDEN))
def test_ten_steps_reproduce_the_golden_losses(layers: str):
    assert train(layers) == pytest.approx(GOLDEN[layers], rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_a_norm_in_lower_precision_is_caught(monkeypatch: pytest.MonkeyPatch):
    layers = next(iter(GOLDEN))
    plain = block.add_norm

    def rounded(*arguments, **options):
        total, normed = plain(*arguments, **options)
        return total, normed.bfloat16().float()

    monkeypatch.setattr(block, "add_norm", rounded)
    assert train(layers) != pytest.approx(GOLDEN[layers], rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for golden in GOLDEN:
        print(f'    "{golden}": [{", ".join(f"{loss:.7f}" for loss in train(golden))}],')
