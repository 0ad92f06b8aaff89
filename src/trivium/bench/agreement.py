"""How far a backend of gated linear attention or the gated delta rule is from the float64 recurrence, case by case.

For kernels that compile for minutes: each case is told and written as it ends, and cases may run in processes beside
one another. Run with ``python -m trivium.bench.agreement --help``; it ends with 1 where a case is off.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trivium.ops import dispatch, gated_delta_rule, gated_linear_attention
from trivium.registry import UserError
from trivium.report.storage import reserve, write_whole
from trivium.train.environment import describe_environment
from trivium.train.precision import choose_device

OPERATORS = {"gated_linear_attention": gated_linear_attention, "gated_delta_rule": gated_delta_rule}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Allowed distance, relative to the norm of what is right; bfloat16 rounds inputs and outputs to 8 bits."""


def draw(operator: str, tokens: int, width: int = 64, rows: int = 2, heads: int = 2) -> dict[str, Tensor]:
    """Return the operator's arguments in float64, an initial state included: q, k, v (B, T, H, K), gates, state."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = (rows, tokens, heads)
    arguments = {"q": normal(*places, width), "k": functional.normalize(normal(*places, width), dim=-1)}
    arguments["v"] = normal(*places, width)
    if operator == "gated_delta_rule":
        arguments["beta"] = 2 * normal(*places).sigmoid()
        arguments["log_decay"] = -0.1 * normal(*places).abs()
    else:
        arguments["log_decay"] = -0.1 * normal(*places, width).abs()
    return arguments | {"state": normal(rows, heads, width, width)}


def documents_of(tokens: int, rows: int = 2) -> Tensor:
    """Return the document ids (B, T) of rows that are packed unlike one another."""
    place_T = torch.arange(tokens)
    return torch.stack([(place_T + 5 * row) // (7 + 30 * row) for row in range(rows)])


def refusal(operator: str, dtype: torch.dtype, backend: str, device: str) -> str | None:
    """Say why the backend cannot serve a call that wants gradients, or return None; raise UserError if it is missing or
    serves no call.
    """
    kind = torch.device(device).type
    facts = (("dtype", dtype), ("device", kind))
    dispatch.choose(operator, backend, kind, (*facts, ("gradients", False)))
    try:
        dispatch.choose(operator, backend, kind, (*facts, ("gradients", True)))
    except UserError as error:
        return str(error)
    return None


def distances(
    operator: str, tokens: int, dtype: torch.dtype, packed: bool, backend: str, device: str, gradients: bool
) -> dict[str, float]:
    """Return the distance of output, state and every gradient, by name, and of what comes without gradients.

    With `gradients` False the latter alone.
    """
    arguments = {
        name: tensor.to(device, dtype if name in ("q", "k", "v") else torch.float32)
        for name, tensor in draw(operator, tokens).items()
    }
    options: dict[str, Any] = {"documents": documents_of(tokens).to(device) if packed else None}
    wide = {name: tensor.double() for name, tensor in arguments.items()}
    names = ("output", "state", *(f"gradient of {name}" for name in arguments))
    right = dict(zip(names, _results(operator, wide, **options, backend="reference"), strict=True))
    found = {}
    if gradients:
        found = dict(zip(names, _results(operator, arguments, **options, backend=backend), strict=True))
    with torch.no_grad():  # a few tokens may take another kernel
        alone = OPERATORS[operator](**arguments, **options, backend=backend)
    far = {name: _distance(tensor, right[name]) for name, tensor in found.items()}
    return far | {
        f"{name} alone": _distance(tensor, right[name]) for name, tensor in zip(names[:2], alone, strict=True)
    }


def _results(operator: str, arguments: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return output, final state and all gradients; what the outputs are weighted with is drawn on the CPU."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in arguments.items()}
    outputs = OPERATORS[operator](**leaves, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in outputs]
    loss = sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, list(leaves.values()))]


def _distance(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def one_configuration() -> None:
    """Let Triton's autotuner take one configuration of each kernel, of most warps: to agree, nothing has to be tuned.

    The more warps, the fewer instructions a thread has, and those of exact float32 products take minutes to compile.
    """
    from triton.runtime import autotuner

    first = autotuner.Autotuner.__init__

    def fewer(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **more: Any) -> None:
        most = max((config.num_warps for config in configs or []), default=0)
        chosen = [config for config in configs or [] if config.num_warps == most]
        first(self, fn, arg_names, chosen[:1], *rest, **more)

    autotuner.Autotuner.__init__ = fewer


@dataclass(frozen=True)
class Case:
    """One comparison: an operator at a length, in a dtype, with packed documents or without."""

    operator: str
    tokens: int
    dtype: str
    packed: bool

    def compare(self, backend: str, device: str) -> dict[str, Any]:
        """Return the case with what was found; an exception of the backend's is told, not raised."""
        begun, dtype = time.perf_counter(), DTYPES[self.dtype]
        found: dict[str, Any] = {}
        try:
            why = refusal(self.operator, dtype, backend, device)
            found["gradients"] = why or "compared"
            far = distances(self.operator, self.tokens, dtype, self.packed, backend, device, why is None)
            found |= {"agrees": all(distance <= TOLERANCE[dtype] for distance in far.values()), "distances": far}
        except UserError:
            raise
        except Exception as error:  # a compiler's or a kernel's
            found |= {"agrees": False, "error": f"{type(error).__name__}: {error}"[:500]}
        return asdict(self) | found | {"seconds": time.perf_counter() - begun}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every case that is asked for and write what was found after each; return 1 where one is off, 2 where the
    backend is missing.
    """
    program = "python -m trivium.bench.agreement"
    parser = argparse.ArgumentParser(prog=program, description="Compare a backend with the float64 recurrence.")
    parser.add_argument("--op", choices=list(OPERATORS), nargs="+", default=list(OPERATORS))
    parser.add_argument("--backend", default="fla")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 100, 333])
    parser.add_argument("--dtypes", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--packed", choices=["no", "yes"], nargs="+", default=["no", "yes"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside one another")
    parser.add_argument("--untuned", action="store_true", help="take one configuration of each Triton kernel")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    asked = parser.parse_args(argv)
    if min(*asked.tokens, asked.jobs) < 1:
        parser.error("--tokens, --jobs: give numbers of 1 or more")
    try:
        device = choose_device(asked.device)
        for operator, name in itertools.product(asked.op, asked.dtypes):
            refusal(operator, DTYPES[name], asked.backend, str(device))
        if asked.out:
            reserve(asked.out)  # cases may take minutes: what cannot be written shows before them
    except (UserError, OSError) as error:
        parser.error(str(error))
    cases = [
        Case(operator, tokens, dtype, packed == "yes")
        for tokens, operator, dtype, packed in itertools.product(asked.tokens, asked.op, asked.dtypes, asked.packed)
    ]
    given = sys.argv[1:] if argv is None else argv
    environment = describe_environment(device) | {"command": f"{program} {shlex.join(given)}"}
    rows: list[dict[str, Any]] = []
    prepare = one_configuration if asked.untuned else None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(asked.jobs, len(cases)), mp_context=context, initializer=prepare) as pool:
        for done in as_completed([pool.submit(case.compare, asked.backend, str(device)) for case in cases]):
            row = done.result()
            rows.append(row)
            print(told(row), flush=True)
            if asked.out:
                settings = {"backend": asked.backend, "untuned": asked.untuned}
                allowed = {name: TOLERANCE[dtype] for name, dtype in DTYPES.items()}
                found = {"benchmark": "agreement", "tolerance": allowed, **settings, "environment": environment}
                write_whole(asked.out, json.dumps({**found, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["agrees"] for row in rows) else 1


def told(row: dict[str, Any]) -> str:
    """Return a compared case in a line: whether it agrees, and which result is furthest off."""
    case = f"{row['operator']} {row['tokens']} {row['dtype']}{' packed' if row['packed'] else ''}"
    if "error" in row:
        return f"{case}: {row['error']}"
    far = row["distances"]
    worst = max(far, key=lambda name: (math.isnan(far[name]), far[name]))
    said = "agrees" if row["agrees"] else "OFF"
    return f"{case}: {said}, {worst} by {far[worst]:.2e}, {row['seconds']:.0f} s"


if __name__ == "__main__":
    raise SystemExit(main())
