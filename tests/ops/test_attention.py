import math

import pytest
import torch

from trivium.ops import dispatch
from trivium.ops.attention import attention
from trivium.registry import UserError


def inputs(batch: int = 2, tokens: int = 5, keys: int = 5, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, heads, 3), (batch, keys, kv_heads, 3), (batch, keys, kv_heads, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_query_reads_what_is_allowed_with_the_keys_of_its_group(backend: str):
    q, k, v = inputs(tokens=3, keys=5)
    allowed = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[:, :, 0] = True
    o = attention(q, k, v, allowed, backend=backend)
    for b in range(2):
        for t in range(3):
            for h in range(4):
                read = allowed[b, t]
                weights = (k[b, read, h // 2] @ q[b, t, h] / math.sqrt(3)).softmax(0)
                torch.testing.assert_close(o[b, t, h], weights @ v[b, read, h // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_a_mask_each_query_reads_up_to_itself(backend: str):
    tensors = inputs()
    causal = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    expected = attention(*tensors, causal, backend="reference")
    torch.testing.assert_close(attention(*tensors, backend=backend), expected, rtol=0, atol=1e-12)


def test_the_backend_is_recorded_and_one_that_is_not_there_is_refused():
    dispatch.forget()
    attention(*inputs())
    assert dispatch.chosen()["attention"]["backend"] == "torch"
    assert "scaled_dot_product_attention" in dispatch.chosen()["attention"]["reason"]
    with pytest.raises(UserError, match="operator attention: no backend 'triton' on this machine"):
        attention(*inputs(), backend="triton")
