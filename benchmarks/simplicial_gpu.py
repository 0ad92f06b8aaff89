"""Time 2-simplicial attention on a GPU at the shapes of the field's public kernels, each backend checked first.

    python benchmarks/simplicial_gpu.py benchmarks/results/simplicial_gpu.json

A backend is checked on a shorter sequence of the same heads, width and windows against the windowed PyTorch backend in
float32; a relative error above 1e-2 stops the benchmark. FLOPs: 4 D for each allowed (query head, j, k) forward, 2.5
times that backward. Rates stand beside the 8192^3 matrix product of the same run. Medians, milliseconds.
"""

import json
import sys
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from trivium.ops import simplicial_attention
from trivium.ops.pairs import allowed_pairs
from trivium.train.environment import describe_environment

# batch, tokens, query heads, key/value heads, head width, window1, window2
SHAPES = [
    (4, 4096, 64, 1, 128, 512, 32),
    (4, 8192, 128, 1, 128, 512, 32),
    (4, 8192, 128, 1, 128, 1024, 32),
    (1, 2048, 64, 1, 128, 512, 32),
    (8, 1024, 8, 8, 64, 512, 32),
    (16, 1024, 12, 12, 64, 128, 16),
    (64, 128, 8, 8, 32, 128, 16),
]
BACKWARD_TOKENS = 4096  # a longer backward is not asked for
TOLERANCE = 1e-2


def draw(batch, tokens, heads, kv_heads, width):
    """Return q, k1, k2, v1, v2 in bfloat16, with gradients."""
    sizes = [heads] + [kv_heads] * 4
    return [
        torch.randn(batch, tokens, size, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for size in sizes
    ]


def check(shape, backend):
    """Return the largest relative error of output and gradients; raise RuntimeError above the tolerance."""
    batch, tokens, heads, kv_heads, width, window1, window2 = shape
    inputs = draw(min(batch, 2), min(tokens, 700), heads, kv_heads, width)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])
    results = []
    for tensors, name in ((inputs, backend), (wide, "torch")):
        o = simplicial_attention(*tensors, window1=window1, window2=window2, backend=name)
        results.append([o, *torch.autograd.grad(o, tensors, grad.to(o.dtype))])
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(f"{backend} at {shape}: relative errors {errors}: nothing is timed")
    return max(errors)


def main(path):
    """Check, time and write every shape."""
    torch.manual_seed(0)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9
    rows = []
    for shape in SHAPES:
        batch, tokens, heads, kv_heads, width, window1, window2 = shape
        flops = 4 * width * batch * heads * allowed_pairs(tokens, window1, window2)
        inputs = draw(batch, tokens, heads, kv_heads, width)
        for backend in ("triton", "hopper"):
            error = check(shape, backend)

            def forward(inputs=inputs, backend=backend, windows=(window1, window2)):
                return simplicial_attention(*inputs, window1=windows[0], window2=windows[1], backend=backend)

            with torch.no_grad():
                seconds = do_bench(forward, return_mode="median")
            row = {"shape": shape, "backend": backend, "relative_error": error, "forward_ms": seconds}
            row |= {"forward_tflops": flops / seconds / 1e9, "forward_share": flops / seconds / 1e9 / matmul}
            if tokens <= BACKWARD_TOKENS:
                o = forward()
                grad = torch.randn_like(o)
                run = lambda o=o, inputs=inputs, grad=grad: torch.autograd.grad(o, inputs, grad, retain_graph=True)  # noqa: E731
                seconds = do_bench(run, return_mode="median")
                row |= {"backward_ms": seconds, "backward_tflops": 2.5 * flops / seconds / 1e9}
                row |= {"backward_share": row["backward_tflops"] / matmul}
                del o, grad, run
            rows.append(row)
            print(json.dumps(row), flush=True)
    results = {
        "benchmark": "simplicial_gpu",
        "environment": {**describe_environment(torch.device("cuda")), "triton": triton.__version__},
        "matmul_8192_tflops": matmul,
        "rows": rows,
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
