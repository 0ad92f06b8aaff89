"""Time our training beside transformers' Trainer: the same model, data, optimizer, threads and machine.

Both train a GPT-2 on the same addition problems with answers scored alone, through the front door that users take:
ours is `trivium.train.loop.train`, theirs is `Trainer.train()`. Before any timing, both models get the same weights
and must give the same loss. Rates are those between an early and the last step; evaluation and saving are not in them.
"""

import contextlib
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from trivium.bench.gates import WrongResult
from trivium.bench.threads import processor_threads
from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.evaluate.config import EvaluateConfig
from trivium.model.base import LanguageModel
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import Batch
from trivium.train.config import RunConfig, TrainConfig
from trivium.train.environment import describe_environment
from trivium.train.loop import train
from trivium.train.objectives import NextToken
from trivium.train.precision import choose_device, choose_precision, has_bfloat16

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

FIRST = 10  # the step after which the clock starts, of ours on a GPU ten times that
IGNORED = -100  # the label that transformers leaves out of the loss
TOLERANCE = 1e-5  # relative, of the first loss in float32


@dataclass(frozen=True)
class Shape:
    """A model and a batch to time."""

    name: str
    width: int
    layers: int
    heads: int
    ff_width: int
    batch: int
    task: AdditionConfig
    steps: int
    device: str = "cpu"

    @property
    def first(self) -> int:
        """The step after which our clock starts: on a GPU that of a later row, for reading losses waits for it."""
        return FIRST if self.device == "cpu" else 10 * FIRST

    def model(self) -> DecoderConfig:
        """Return the GPT-2 of this shape: learned positions, biases, GELU in its tanh form, tied head."""
        return DecoderConfig(
            width=self.width,
            heads=self.heads,
            layers=f"attention(bias=true)*{self.layers}",
            ff_width=self.ff_width,
            positions="learned",
            feedforward="gelu_new",
        )


# Zero-padded numbers make all problems of one length: three of 7 digits are 32 tokens, two of 3 digits are 12 (and
# the one that is only predicted makes the 13 of the quickstart's longest problems), two of 5 digits 18.
SHAPES = {
    "2.1M": Shape("2.1M", 256, 4, 4, 512, 64, AdditionConfig(operands=3, max_digits=7, zero_pad=True), 60),
    "0.1M": Shape("0.1M", 64, 2, 4, 256, 256, AdditionConfig(max_digits=3, zero_pad=True), 210),
    "6.3M": Shape("6.3M", 256, 8, 4, 1024, 1024, AdditionConfig(max_digits=5, zero_pad=True), 600, "cuda"),
}


@dataclass
class Cell:
    """Steps per second of one program with one shape and precision, over the repeats."""

    program: str
    shape: str
    precision: str
    steps_per_second: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.steps_per_second)


def bench_train(
    shapes: tuple[str, ...] = tuple(SHAPES), *, repeats: int = 3, threads: int | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Time both programs and return {"rows", "gates", "environment", ...}; raise UserError without transformers.

    Repeats of the two programs alternate, so that a machine that gets slower does so for both; a cell is the median.
    """
    _require_transformers()
    graphics = torch.cuda.is_available()
    timed = [SHAPES[name] for name in shapes if graphics or SHAPES[name].device == "cpu"]
    if not timed:
        raise UserError(f"shape: {shapes[0]} is timed on a CUDA device, and torch sees none")
    first = max(shape.first for shape in timed)
    if repeats < 1 or (steps is not None and steps <= first):
        raise UserError(f"repeats: expected 1 or more, and steps more than {first}; got {repeats} and {steps}")
    with processor_threads(threads) as used:
        rows, gates = [], {}
        for name in shapes:
            shape = SHAPES[name]
            if shape not in timed:
                rows.append(_untimed(shape, "both bfloat16", "torch sees no CUDA device"))
                continue
            gates[name] = check_first_loss(shape)
            if shape.device == "cuda":
                from trivium.bench.train_gpu import time_on_gpu

                rows.append(time_on_gpu(shape, repeats, used, steps or shape.steps))
                continue
            cells = _time(shape, repeats, used, steps or shape.steps)
            rows += _rows(shape, cells)
    return {
        "benchmark": "train",
        "environment": {
            **describe_environment(torch.device(timed[-1].device)),
            "transformers": version("transformers"),
        },
        "threads": used,
        "repeats": repeats,
        "unit": "steps/s, median of the repeats",
        "gates": gates,
        "rows": rows,
    }


def _require_transformers() -> None:
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"bench train: transformers' Trainer is not installed ({error}); pip install 'trivium[hf]' brings it"
        ) from None


def check_first_loss(shape: Shape) -> dict[str, float]:
    """Return both losses on the first batch, from the same weights; raise WrongResult if they differ."""
    task = shape.task.build()
    config, device = shape.model(), torch.device(shape.device)
    torch.manual_seed(0)
    ours = config.build(model_context(task, config)).eval()
    theirs = cast(nn.Module, gpt2_like(ours, shape)).eval()
    ours, theirs = ours.to(device), theirs.to(device)
    batch = TrainStream(task, shape.batch, 0).batch(0)
    objective = NextToken()
    weights_BT = torch.from_numpy(objective.weights(batch)).to(shape.device)
    tokens_BT, targets_BT = (torch.from_numpy(x).to(shape.device) for x in (batch.tokens_BT, batch.targets_BT))
    given = {name: tensor.to(shape.device) for name, tensor in features(batch).items()}
    with torch.no_grad():
        logits_BTV, _ = ours(tokens_BT)
        loss_sum = objective.loss_sum(logits_BTV.flatten(0, 1), targets_BT.flatten(), weights_BT.flatten())
        our_loss = float(loss_sum / weights_BT.sum())
        their_loss = float(theirs(**given).loss)
    if not abs(our_loss - their_loss) <= TOLERANCE * abs(their_loss):
        raise WrongResult(f"{shape.name}: the first losses differ, {our_loss} and {their_loss}: nothing is timed")
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    return {"trivium": our_loss, "trainer": their_loss, "parameters": parameters, "tokens": batch.tokens_BT.shape[1]}


def gpt2_like(ours: LanguageModel, shape: Shape) -> "GPT2LMHeadModel":
    """Return transformers' GPT-2 with the weights of `ours`; its Conv1D layers store matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=ours.context.vocab_size,
        n_positions=ours.context.max_length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.ff_width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    theirs = GPT2LMHeadModel(config)
    source = ours.state_dict()
    names = {"norm1": "ln_1", "norm2": "ln_2", "mixer.qkv": "attn.c_attn", "mixer.out": "attn.c_proj"}
    names |= {"feedforward.input": "mlp.c_fc", "feedforward.output": "mlp.c_proj"}
    tensors: dict[str, Tensor] = {
        "transformer.wte.weight": source["embedding.weight"],
        "lm_head.weight": source["embedding.weight"],
        "transformer.ln_f.weight": source["norm.weight"],
        "transformer.ln_f.bias": source["norm.bias"],
    }
    (table,) = (tensor for name, tensor in source.items() if name.startswith("positions."))
    tensors["transformer.wpe.weight"] = table
    for layer in range(shape.layers):
        for mine, name in names.items():
            for part in ("weight", "bias"):
                tensor = source[f"blocks.{layer}.{mine}.{part}"]
                tensors[f"transformer.h.{layer}.{name}.{part}"] = tensor.T if tensor.dim() == 2 else tensor
    with torch.no_grad():
        for name, parameter in theirs.state_dict(keep_vars=True).items():
            parameter.copy_(tensors.pop(name))
    assert not tensors
    return theirs


def features(batch: Batch) -> dict[str, Tensor]:
    """Return a batch as GPT-2 takes it; with `shift_labels`, targets in place, both programs read equal tokens."""
    labels_BT = torch.from_numpy(batch.targets_BT).masked_fill(torch.from_numpy(batch.weights_BT) == 0, IGNORED)
    return {"input_ids": torch.from_numpy(batch.tokens_BT), "labels": labels_BT, "shift_labels": labels_BT}


def _time(shape: Shape, repeats: int, threads: int, steps: int) -> dict[tuple[str, str], Cell]:
    # Without bfloat16 instructions a processor emulates them: some 40 times slower, and nobody's training.
    precisions = ("float32", "bfloat16") if has_bfloat16(torch.device("cpu"))[0] else ("float32",)
    cells = {
        (program, precision): Cell(program, shape.name, precision)
        for precision in precisions
        for program in ("trivium", "trainer")
    }
    for repeat in range(repeats):
        # Who goes first alternates too.
        for program, precision in list(cells)[:: 1 if repeat % 2 == 0 else -1]:
            run = run_trivium if program == "trivium" else run_trainer
            cells[program, precision].steps_per_second.append(run(shape, precision, threads, steps))
    return cells


def training(shape: Shape, precision: str, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch=shape.batch,
        precision=precision,  # pyright: ignore[reportArgumentType]
        device=shape.device,
        compile=shape.device == "cuda",
        warmup=5,
        eval_every=steps,
        eval_examples=1,
        log_every=shape.first,
        save_every=steps,
    )


def run_trivium(shape: Shape, precision: str, threads: int, steps: int) -> float:
    """Train with our loop and return its steps per second, read from metrics.jsonl."""
    config = RunConfig(
        task=shape.task,
        model=shape.model(),
        train=training(shape, precision, steps),
        evaluate=EvaluateConfig(examples=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", threads=threads)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["seconds"] for row in rows if row["split"] == "train"}
    return (steps - shape.first) / (seconds[steps] - seconds[shape.first])


def run_trainer(shape: Shape, precision: str, threads: int, steps: int, *, torch_compile: bool = False) -> float:
    """Train with transformers' Trainer and return its steps per second."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        times: dict[int, float] = {}  # noqa: RUF012  # one clock a run: the class is made anew

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.times[state.global_step] = time.perf_counter()

    ours = training(shape, precision, steps)
    task = shape.task.build()
    config = shape.model()
    torch.manual_seed(0)
    model = gpt2_like(config.build(model_context(task, config)), shape)
    stream = TrainStream(task, shape.batch, ours.seed)
    problems = [
        dict(zip(given, row, strict=True))
        for given in (features(stream.batch(step)) for step in range(steps))
        for row in zip(*given.values(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.batch,
            max_steps=steps,
            learning_rate=ours.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=ours.warmup,
            weight_decay=ours.weight_decay,
            adam_beta1=ours.beta1,
            adam_beta2=ours.beta2,
            max_grad_norm=1.0,
            logging_steps=FIRST,
            save_strategy="no",
            report_to=[],
            use_cpu=shape.device == "cpu",
            bf16=precision == "bfloat16",
            remove_unused_columns=False,
            dataloader_pin_memory=shape.device != "cpu",
            disable_tqdm=True,
            torch_compile=torch_compile,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=problems, callbacks=[Clock()])  # pyright: ignore[reportArgumentType]
        torch.set_num_threads(threads)
        trainer.train()
        times = next(each.times for each in trainer.callback_handler.callbacks if isinstance(each, Clock))
    return (steps - FIRST) / (times[steps] - times[FIRST])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Trainer's progress, which it prints, out of our standard output."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)


def _untimed(shape: Shape, row: str, reason: str) -> dict[str, Any]:
    return {"model": shape.name, "batch": shape.batch, "row": row, "note": f"not timed: {reason}"}


def _rows(shape: Shape, cells: dict[tuple[str, str], Cell]) -> list[dict[str, Any]]:
    """Return the rows: one a precision, and each program's own default, which are cells of the rows above."""
    reason = has_bfloat16(torch.device("cpu"))[1]
    automatic = choose_precision("auto", choose_device("cpu")).name
    pairs = [
        ("both float32", "float32", "float32", ""),
        ("both bfloat16", "bfloat16", "bfloat16", ""),
        ("own defaults", automatic, "float32", f"trivium picks {automatic} ({reason}), Trainer float32"),
    ]
    rows = []
    for name, our_precision, their_precision, note in pairs:
        if ("trivium", our_precision) not in cells:
            rows.append(_untimed(shape, name, reason))
            continue
        ours, theirs = cells["trivium", our_precision], cells["trainer", their_precision]
        rows.append(
            {
                "model": shape.name,
                "batch": shape.batch,
                "row": name,
                "trivium": ours.median,
                "trainer": theirs.median,
                "ratio": ours.median / theirs.median,
                "trivium_repeats": ours.steps_per_second,
                "trainer_repeats": theirs.steps_per_second,
                "note": note,
            }
        )
    return rows
