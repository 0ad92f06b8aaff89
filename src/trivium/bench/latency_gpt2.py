"""GPT-2 of transformers by the same clock, with the cache that its own generation uses (transformers is extra `hf`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trivium.bench.latency import WARM, Clock, ClockKind, spread
from trivium.bench.latency_models import VOCABULARY
from trivium.bench.memory import memory_now, memory_peak, wait
from trivium.bench.threads import processor_threads
from trivium.registry import UserError

PIECE = 1024


def bench_gpt2(
    marks: Sequence[int],
    *,
    width: int,
    heads: int,
    layers: int,
    steps: int,
    batch: int,
    device: str,
    dtype: torch.dtype,
    clock: ClockKind = "wall",
    threads: int | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return a row like those of `bench_latency`: GPT2LMHeadModel with random weights, scaled_dot_product_attention and
    a DynamicCache, launched kernel by kernel, as `generate` does. Raises UserError without transformers.
    """
    try:
        from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("--transformers: transformers is not installed: pip install 'trivium[hf]'") from None
    resident = memory_now(device)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=max(marks) + steps + WARM,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    model: Any = GPT2LMHeadModel(config)
    model = model.to(torch.device(device), dtype).eval()
    cache: Any = DynamicCache()
    points = []
    with processor_threads(threads), torch.inference_mode():

        def read(tokens_BT: torch.Tensor) -> torch.Tensor:
            found = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return found.logits[:, -1].argmax(-1)[:, None]

        chosen_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        for mark in sorted(marks):
            on_progress(f"GPT-2 of transformers: {mark} tokens")
            while (left := mark - WARM - cache.get_seq_length()) > 0:
                chosen_B1 = read(torch.randint(VOCABULARY, (batch, min(PIECE, left)), device=device))
            for _ in range(WARM):
                chosen_B1 = read(chosen_B1)
            wait(device)
            marked = Clock(torch.device(device), clock)
            marked.mark()
            for _ in range(steps):
                chosen_B1 = read(chosen_B1)
                marked.mark()
            points.append(
                {
                    "position": mark,
                    "milliseconds": spread(marked.milliseconds()),
                    "boundary": None,
                    "state_bytes": 2 * batch * layers * width * mark * dtype.itemsize,
                }
            )
    first, last = points[0]["milliseconds"], points[-1]["milliseconds"]
    return {
        "name": "GPT-2 of transformers",
        "mixer": "transformers",
        "weights": "random",
        "layers": layers,
        "chunk": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": memory_peak(device) - resident,
        "points": points,
        "ratio": last["median"] / first["median"],
        "worst": None,
        "operators": {},
    }
