"""Time our generation beside transformers' generate: the same weights, prompts, precision and machine.

A GPT-2 answers sums greedily. Its weights are random, but so large that every token depends on all before it: what
comes is no sum, and a mistake of either program changes it. Before any timing both must give the same tokens in
float32, and at the precision that is timed none that float32 finds far from the best.

Shapes: B rows, T tokens of a prompt, N tokens of an answer, V symbols.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.bench.gates import WrongResult
from trivium.bench.memory import wait
from trivium.bench.threads import processor_threads
from trivium.bench.train import SHAPES, Shape, gpt2_like
from trivium.config import UserError
from trivium.generate.engine import Generator
from trivium.model.base import LanguageModel
from trivium.model.context import model_context
from trivium.ops import dispatch
from trivium.tasks.addition import AdditionConfig
from trivium.train.environment import describe_environment

PROBLEMS = 10_000
CHECKED = {"cpu": 100, "cuda": 1000}  # prompts whose answers both programs must agree on
# Where two answers part, float32 must find the two tokens this close, in standard deviations of the logits.
TIES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
OURS_AT_ONCE = 1024  # rows that we hold at a time on a processor, whatever a call asks for


@dataclass(frozen=True)
class Setting:
    """One model on a device, the same in both programs, and the prompts."""

    ours: LanguageModel
    theirs: Any
    prompts_BT: Tensor
    end_id: int
    new_tokens: int
    device: torch.device

    def to(self, dtype: torch.dtype) -> "Setting":
        return replace(self, ours=self.ours.to(dtype), theirs=self.theirs.to(dtype))


@dataclass
class Cell:
    """Tokens per second of one program at one batch, over the repeats, and how many prompts each repeat answered."""

    tokens_per_second: list[float]
    prompts: int

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)


def bench_generate(
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    digits: int = 4,
    repeats: int = 3,
    seconds: float = 10.0,
    threads: int | None = None,
    shape: Shape = SHAPES["6.3M"],
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {"rows", "gates", "environment", ...}; a row is one number of prompts a call, with the backends of each
    operator that it took: reading prompts and going on may take others.

    A repeat answers PROBLEMS prompts, `batch` of them a call, or as many calls as begin within `seconds`. Repeats of
    the programs alternate. Raises UserError without transformers and for sizes that cannot be, WrongResult before any
    timing where the programs disagree.
    """
    for name, value, least in (("batches", min(batches, default=0), 1), ("repeats", repeats, 1), ("digits", digits, 1)):
        if value < least:
            raise UserError(f"{name}: expected {least} or more, got {value}")
    if max(batches) > PROBLEMS:
        raise UserError(f"batches: at most the {PROBLEMS:,} prompts that there are, got {max(batches)}")
    with processor_threads(threads) as used:
        setting = make_setting(replace(shape, task=AdditionConfig(max_digits=digits, zero_pad=True)), device, PROBLEMS)
        on_progress("checking that both give the same tokens")
        gates = check_tokens(setting, dtype)
        setting = setting.to(dtype)
        rows, operators = [], {}
        for batch in batches:
            on_progress(f"{batch} prompts a call")
            dispatch.forget()
            rows.append(_row(setting, batch, repeats, seconds) | {"operators": dispatch.taken()})
            operators |= dispatch.chosen()
    return {
        "benchmark": "generate",
        "model": shape.name,
        "parameters": sum(parameter.numel() for parameter in setting.ours.parameters()),
        "weights": "random",
        "precision": str(dtype).removeprefix("torch."),
        "digits": digits,
        "prompt_tokens": setting.prompts_BT.shape[1],
        "new_tokens": setting.new_tokens,
        "environment": {**describe_environment(device), "transformers": version("transformers")},
        "operators": operators,
        "threads": used,
        "repeats": repeats,
        "unit": "generated tokens/s, median of the repeats",
        "gates": gates,
        "best": compare_best(rows),
        "rows": rows,
    }


def make_setting(shape: Shape, device: torch.device, problems: int) -> Setting:
    """Return both programs' model with the same lively weights in float32, and prompts of one length."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"bench generate: transformers is not installed ({error}); pip install 'trivium[hf]' brings it"
        ) from None
    logging.set_verbosity_error()
    task, config = shape.task.build(), shape.model()
    torch.manual_seed(0)
    ours = config.build(model_context(task, config)).eval()
    with torch.no_grad():
        for block in getattr(ours, "blocks", ()):
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
    theirs: Any = gpt2_like(ours, shape)
    theirs.config._attn_implementation = "sdpa"
    stream = np.arange(problems)
    prompts = [task.alphabet.encode(example.prompt) for example in task.examples("train", stream)]
    answer = len(task.alphabet.encode(task.example("train", 0).answer))
    prompts_BT = torch.tensor(prompts)
    return Setting(ours.to(device), theirs.to(device).eval(), prompts_BT, task.alphabet.end_id, answer, device)


def their_answers(setting: Setting, prompts_BT: Tensor) -> np.ndarray:
    """Return the tokens (B, N) that transformers' generate gives, filled up with the end token."""
    ids = prompts_BT.to(setting.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = setting.theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            max_new_tokens=setting.new_tokens,
            eos_token_id=setting.end_id,
            pad_token_id=setting.end_id,
        )
    answers = found[:, prompts_BT.shape[1] :].cpu().numpy()
    return np.pad(answers, ((0, 0), (0, setting.new_tokens - answers.shape[1])), constant_values=setting.end_id)


def our_generator(setting: Setting, batch: int) -> Generator:
    rows = batch if setting.device.type == "cuda" else min(batch, OURS_AT_ONCE)
    return Generator(setting.ours, end_id=setting.end_id, max_new_tokens=setting.new_tokens, batch=rows)


def our_answers(setting: Setting, generator: Generator, prompts_BT: Tensor) -> np.ndarray:
    """Return our tokens (B, N), filled up with the end token."""
    tokens_BN, counts_B, *_ = generator.arrays(prompts_BT)
    missing = setting.new_tokens - tokens_BN.shape[1]
    if missing:
        tokens_BN = np.pad(tokens_BN, ((0, 0), (0, missing)))
    return np.where(np.arange(setting.new_tokens) < counts_B[:, None], tokens_BN, setting.end_id)


@torch.inference_mode()
def check_tokens(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Return how many of the checked answers agree; raise WrongResult where they part at no tie.

    Leaves the models at `dtype`; the weights are of that precision from the start.
    """
    setting = setting.to(dtype).to(torch.float32)
    count = CHECKED[setting.device.type]
    prompts_BT = setting.prompts_BT[:count]
    theirs_BN = their_answers(setting, prompts_BT)
    whole_BT = torch.cat((prompts_BT, torch.from_numpy(theirs_BN)), 1)[:, :-1].to(setting.device)
    logits_BNV = setting.theirs(whole_BT).logits[:, prompts_BT.shape[1] - 1 :].double().cpu().numpy()
    gates: dict[str, Any] = {"prompts": count, "distinct_answers": len({tuple(row) for row in theirs_BN.tolist()})}
    found = {"trivium, float32": our_answers(setting, our_generator(setting, count), prompts_BT)}
    limits = {"trivium, float32": TIES[torch.float32]}
    if dtype != torch.float32:
        narrow, name = setting.to(dtype), str(dtype).removeprefix("torch.")
        found[f"trivium, {name}"] = our_answers(narrow, our_generator(narrow, count), prompts_BT)
        found[f"transformers, {name}"] = their_answers(narrow, prompts_BT)
        limits |= {f"trivium, {name}": TIES[dtype], f"transformers, {name}": np.inf}
    for name, tokens_BN in found.items():
        gates[name] = compare_answers(tokens_BN, theirs_BN, logits_BNV, setting.end_id)
        if gates[name]["largest_gap"] > limits[name]:
            raise WrongResult(
                f"{name}: a token lies {gates[name]['largest_gap']:.3g} standard deviations of the logits below the "
                f"best of transformers in float32, allowed are {limits[name]}: nothing is timed"
            )
    return gates


def compare_answers(
    found_BN: np.ndarray, wanted_BN: np.ndarray, logits_BNV: np.ndarray, end_id: int
) -> dict[str, float]:
    """Return the share of equal answers, and how far below the best token the first other one lies, at most.

    `logits_BNV` are those of `wanted_BN`; the distance is in standard deviations of all logits.
    """
    ended_BN = np.cumsum(wanted_BN == end_id, 1) - (wanted_BN == end_id) > 0  # behind the end
    other_BN = (found_BN != wanted_BN) & ~ended_BN
    rows = other_BN.any(1).nonzero()[0]
    places = other_BN[rows].argmax(1)
    at = logits_BNV[rows, places]
    gaps = np.take_along_axis(at, wanted_BN[rows, places][:, None], 1) - np.take_along_axis(
        at, found_BN[rows, places][:, None], 1
    )
    return {
        "equal": 1 - len(rows) / len(found_BN),
        "largest_gap": float(np.abs(gaps).max() / logits_BNV.std()) if len(rows) else 0.0,
    }


def _row(setting: Setting, batch: int, repeats: int, seconds: float) -> dict[str, Any]:
    generator = our_generator(setting, batch)
    programs: dict[str, Callable[[Tensor], np.ndarray]] = {
        "trivium": lambda prompts_BT: our_answers(setting, generator, prompts_BT),
        "transformers": lambda prompts_BT: their_answers(setting, prompts_BT),
    }
    cells = {name: Cell([], 0) for name in programs}
    on_gpu = setting.device.type == "cuda"
    for answer in programs.values():  # kernels compile, graphs are made
        for _ in range(3 if on_gpu else 1):
            answer(setting.prompts_BT[: batch if on_gpu else min(batch, 100)])
    for repeat in range(repeats):
        for name in list(programs)[:: 1 if repeat % 2 == 0 else -1]:
            _time(setting, programs[name], batch, seconds, cells[name])
    ours, theirs = cells["trivium"], cells["transformers"]
    return {
        "batch": batch,
        "trivium": ours.median,
        "transformers": theirs.median,
        "ratio": ours.median / theirs.median,
        "trivium_repeats": ours.tokens_per_second,
        "transformers_repeats": theirs.tokens_per_second,
        "trivium_prompts": ours.prompts,
        "transformers_prompts": theirs.prompts,
    }


def compare_best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return our best rate over transformers' called one prompt at a time, and over the best of its batched calls.

    A batch is each program's to choose: what somebody with all the prompts would compare. None where no row tells.
    """
    ours = max(rows, key=lambda row: row["trivium"])
    best: dict[str, Any] = {"trivium_batch": ours["batch"]}
    for name, others in (
        ("one_at_a_time", [row for row in rows if row["batch"] == 1]),
        ("batched", [row for row in rows if row["batch"] > 1]),
    ):
        theirs = max(others, key=lambda row: row["transformers"], default=None)
        best[name] = None if theirs is None else ours["trivium"] / theirs["transformers"]
        best[f"{name}_prompts"] = None if theirs is None else theirs["transformers_prompts"]
    return best


def _time(setting: Setting, answer: Callable[[Tensor], np.ndarray], batch: int, seconds: float, cell: Cell) -> None:
    tokens = prompts = 0
    wait(setting.device)
    began = time.perf_counter()
    for start in range(0, PROBLEMS - batch + 1, batch):
        answers_BN = answer(setting.prompts_BT[start : start + batch])
        prompts += batch
        ended_BN = answers_BN == setting.end_id
        tokens += int(np.where(ended_BN.any(1), ended_BN.argmax(1) + 1, setting.new_tokens).sum())
        if time.perf_counter() - began > seconds:
            break
    cell.tokens_per_second.append(tokens / (time.perf_counter() - began))
    cell.prompts = prompts
