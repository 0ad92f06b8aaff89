"""The training loop, from a recipe to result.json: read it from top to bottom."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from trivium.config import UserError, to_dict
from trivium.evaluate.teacher import teacher_forced
from trivium.ops.dispatch import chosen, forget
from trivium.tasks.base import ANSWER, CHAIN
from trivium.train.capture import CapturedSteps, EagerSteps, choose_capture
from trivium.train.checkpoint import CheckpointError, newest_good, remove_leftovers, save_checkpoint
from trivium.train.config import RunConfig
from trivium.train.distributed import from_first, join, parallel, sum_over_processes, world_of_environment
from trivium.train.environment import describe_environment, tell_changes
from trivium.train.finish import finish
from trivium.train.groups import grouped, num_weights, set_training
from trivium.train.memory import keep_freed_memory, peak_bytes, reset_peak
from trivium.train.mixtures import mixtures_of
from trivium.train.optim import build_optimizer, forget_moments, set_learning_rates
from trivium.train.precision import choose_device, choose_precision
from trivium.train.prepare import prepare
from trivium.train.pretrained import begin_with_gpt2
from trivium.train.run import Run, begin_from
from trivium.train.state import Position, TrainingState
from trivium.train.step import Step
from trivium.train.stop import Interrupted, StorageFailed, TrainingDiverged, listening
from trivium.train.track import Tracker

PROGRESS_SECONDS = 0.25
_BY_VALIDATION = ("stage", "stage_evaluations", "chain_removed", "shortened_at", "mixture")

_log = logging.getLogger("trivium")


@dataclass(frozen=True)
class Progress:
    """What a progress line shows. `steps` and `seconds_left` are estimates when the length is given in tokens."""

    step: int
    steps: int
    tokens: int
    loss: float
    exact_match: float | None
    tokens_per_second: float
    seconds_left: float


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train `config` in the run folder `folder` and return the content of its result.json.

    A folder with a checkpoint of the same configuration is continued, a finished one is returned as it is.
    `on_progress` is called at most every quarter of a second; `threads` is used when the recipe names no number and
    the folder has no record of one. Under torchrun every process calls this and the first one writes.

    Raises UserError for wrong input, and TrainingStopped (Interrupted, TrainingDiverged, StorageFailed) for a run
    that ended early.
    """
    # Everything that a wrong recipe can trip over comes before the folder is touched.
    options = config.train
    world = world_of_environment()
    device = choose_device(options.device, world.local_rank)
    precision = choose_precision(options.precision, device)
    made = prepare(config, world.size)
    task, stream, length, curriculum, objective = made.task, made.stream, made.length, made.curriculum, made.objective
    capture = choose_capture(options.capture, device, world, precision)

    join(world, device)
    with listening() as request, ExitStack() as held:
        run = Run(folder, config)
        held.callback(run.close)
        from_first(world, run.open)
        finished = from_first(world, run.result)
        if finished is not None:
            return finished

        # A continued run computes as its first start did: other threads or precision would give other values.
        num_threads = options.threads or threads or torch.get_num_threads()
        record = from_first(world, run.environment)
        if record is not None and record["world_size"] == world.size:
            num_threads = record["threads"]
            if record["device"] == str(device):
                precision = choose_precision(record["precision"]["name"], device)
        held.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        keep_freed_memory()

        forget()  # what an earlier run of this process chose
        reset_peak(device)
        torch.manual_seed(options.seed)
        model = config.model.build(made.context).to(device).train()
        backends: dict[str, str] = getattr(config.model, "backends", {})
        optimizer = build_optimizer(model, options, backends.get("adamw", "auto"))
        named = grouped(model, options)
        mixtures = mixtures_of(model, options)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "float16")
        at = Position(stage=curriculum.first)
        state = TrainingState(model, optimizer, scaler, at, options.seed, world, device, mixtures)
        state.seed_dropout()
        from_first(world, lambda: remove_leftovers(run.checkpoints))
        checkpoint: Path | None = from_first(world, lambda: newest_good(run.checkpoints, rename_damaged=True))
        if checkpoint is not None:
            state.load(checkpoint)
        elif options.init_from is not None:
            begin_from(model, options.init_from)
        else:
            begin_with_gpt2(config, model)
        at = state.at
        model.decoding = replace(objective.decoding, chain_removed=at.chain_removed)
        stream.task = made.plateau.mixed(at)
        set_training(named, at.step)
        mixtures.resume(at.step)

        compiled = cast(nn.Module, torch.compile(model)) if options.compile else model

        def make_step() -> Step:
            forward = parallel(compiled, world, device)  # made for the parameters that train now
            return Step(forward, objective, optimizer, scaler, parameters, options.clip, precision, world, mixtures)

        step, required = make_step(), options.capture == "yes"
        steps = CapturedSteps(step, device, capture, required) if capture.captured else EagerSteps(step, device)
        held.enter_context(steps.running())
        # On a GPU each shape costs a graph: batches are filled up to a few.
        longest = task.max_length - 1 if device.type == "cuda" else None

        here = {**describe_environment(device), "capture": capture.record()}
        if record is None:
            record = {
                **here,
                "seed": options.seed,
                "threads": torch.get_num_threads(),
                "world_size": world.size,
                "precision": {"name": precision.name, "reason": precision.reason},
                "parameters": num_weights(named),
                "continued": [],
            }
        else:
            record["continued"].append({"step": at.step, **here})
        started = record["continued"][-1] if record["continued"] else record
        tracker: Tracker | None = None
        if world.first:
            sizes = num_weights(named)
            _log.info("parameters: %s, of which %s train", *(f"{sizes[key]:,}" for key in ("parameters", "trained")))
            run.write_environment(record)
            tracker = Tracker(run.metrics, config.track, to_dict(config), at.step)
            held.callback(tracker.close)

        # Losses and gradient norms stay on the device until someone looks, so that a GPU never waits for Python.
        unread: list[tuple[int, Tensor, Tensor]] = []
        loss_value, norm_value = at.train_loss or math.nan, math.nan
        shown = 0.0
        saved = at.step if checkpoint is not None else None

        def read_losses() -> None:
            nonlocal loss_value, norm_value
            values = torch.stack([torch.stack((loss, norm)) for _, loss, norm in unread]).tolist() if unread else []
            numbers = [number for number, _, _ in unread]
            unread.clear()
            for number, (loss_value, norm_value) in zip(numbers, values, strict=True):
                for name, value in (("loss", loss_value), ("gradient norm", norm_value)):
                    overflowed = name == "gradient norm" and scaler.is_enabled()  # such a step is skipped, not lost
                    if not math.isfinite(value) and not overflowed:
                        indices = stream.indices(number, at.stage).tolist()
                        message = f"step {number + 1}: the {name} is {value} on training indices {_spans(indices)}"
                        raise TrainingDiverged(message, number, checkpoint, indices)
                at.row_loss += loss_value

        def write_row(row: dict[str, Any]) -> None:
            assert tracker is not None
            try:
                counts = {"tokens": at.tokens, "examples": at.examples, "generated_tokens": at.generated}
                tracker.log({"step": at.step, **counts, **row})
            except OSError as error:
                raise StorageFailed(f"step {at.step}: {run.metrics}: {error.strerror}", at.step, checkpoint) from error

        def save() -> None:
            nonlocal checkpoint, saved
            tensors = state.tensors()

            def write() -> Path:
                assert tracker is not None
                try:
                    tracker.sync()
                    return save_checkpoint(run.checkpoints, at.step, tensors, state.scalars(), keep=options.keep)
                except (OSError, CheckpointError) as error:
                    why = getattr(error, "strerror", None) or error
                    message = f"step {at.step}: no checkpoint could be written in {run.checkpoints}: {why}"
                    raise StorageFailed(message, at.step, checkpoint) from error

            checkpoint, saved = from_first(world, write), at.step

        def score(indices: np.ndarray, stage: int) -> dict[str, Any]:
            return teacher_forced(
                model,
                task,
                "validation",
                indices,
                chain_loss=options.chain_loss,
                prompt_loss=options.prompt_loss,
                autocast=precision.autocast(),
                stage=stage,
            )

        def validate() -> dict[str, Any]:
            at.validation = score(made.validation_indices, 0)
            shortened = {"chain_removed": at.chain_removed} if options.chain_removal.shortens else {}
            write_row({"split": "validation", **at.validation, **shortened})
            stage_row = curriculum.advance(at, score)
            if stage_row is not None:
                write_row(stage_row)
            if not ended:
                curriculum.shorten_chains(at)
            plateau_row = made.plateau.watch(at)
            if plateau_row is not None:
                write_row(plateau_row)
            return {name: getattr(at, name) for name in _BY_VALIDATION}

        def spent() -> int:
            return at.tokens if options.generated_tokens is None else at.generated

        clock = time.perf_counter()
        while length.fraction(at.step, spent()) < 1:
            batch = stream.batch(at.step, world.rank, world.size, at.stage)
            more_B: np.ndarray | int = 0
            if options.chain_removal.smoothing:
                more_B = curriculum.more_removed(stream.indices_of(at.step, world.rank, world.size, at.stage))
            batch = model.decoding.view(batch, task.alphabet.pad_id, more_B)
            weights = objective.weights(batch)
            heard = request.signal is not None
            counts = [
                float(weights.sum(dtype="float64")),
                float(batch.lengths_B.sum()),
                float(len(batch)),
                float(np.isin(batch.regions_BT, (CHAIN, ANSWER)).sum()),
                float(heard),
            ]
            weight, tokens, examples, generated, stop = sum_over_processes(counts, world, device)
            if stop:
                read_losses()
                save()
                name = request.signal or "a signal"
                raise Interrupted(f"interrupted by {name} after step {at.step}", at.step, checkpoint)
            if weight == 0:
                raise UserError(f"train: nothing in the batch of step {at.step + 1} is scored; see chain_loss")

            switched = mixtures.advance(at.step, optimizer)
            if set_training(named, at.step) or switched:
                steps.renew(make_step())
            shortened = at.shortened_at if at.chain_removed else None
            rate = set_learning_rates(optimizer, options, at.step, length.fraction(at.step, spent()), shortened)
            objective.begin_step(length.fraction(at.step, spent()), device)
            pad_id = task.alphabet.pad_id
            passes = objective.reads(batch, weights, options.micro_batch, longest=longest, pad_id=pad_id)
            unread.append((at.step, *steps(passes, weight)))
            at.step += 1
            at.tokens += int(tokens)
            at.examples += int(examples)
            at.generated += int(generated)
            at.row_steps += 1
            at.row_tokens += int(tokens)
            ended = length.fraction(at.step, spent()) >= 1
            log_due = ended or at.step % options.log_every == 0
            eval_due = ended or at.step % options.eval_every == 0
            save_due = ended or at.step % options.save_every == 0
            if device.type == "cpu" or log_due or eval_due or save_due:
                read_losses()
            now = time.perf_counter()
            at.seconds += now - clock
            at.row_seconds += now - clock
            clock = now

            if log_due:
                at.train_loss = at.row_loss / at.row_steps
                row = {
                    "split": "train",
                    **({"stage": at.stage} if options.curriculum.lengths else {}),
                    "loss": at.train_loss,
                    "learning_rate": rate,
                    "gradient_norm": norm_value if math.isfinite(norm_value) else None,
                    **mixtures.take_load(),
                    "seconds": at.seconds,
                    "tokens_per_second": at.row_tokens / at.row_seconds,
                }
                from_first(world, partial(write_row, row))
                at.row_steps, at.row_tokens, at.row_seconds, at.row_loss = 0, 0, 0.0, 0.0
            if eval_due:
                removed = at.chain_removed
                for name, value in from_first(world, validate).items():
                    setattr(at, name, value)
                if options.chain_removal.reset_optimizer and at.chain_removed > removed:
                    forget_moments(optimizer)
                stream.task = made.plateau.mixed(at)
                model.decoding = replace(model.decoding, chain_removed=at.chain_removed)
            if save_due:
                save()
            if eval_due or save_due:
                clock = time.perf_counter()
            operators = {**started["operators"], **chosen()}
            if world.first and (operators != started["operators"] or started["capture"] != capture.record()):
                # Known once the model has run; of code that an earlier run compiled, once it is evaluated.
                new = {name: operators[name] for name in operators.keys() - started["operators"].keys()}
                tell_changes(record["operators"], new)
                started["operators"], started["capture"] = operators, capture.record()
                record["operators"] = {**operators, **record["operators"]}
                run.write_environment(record)
            if on_progress is not None and world.first and (ended or now - shown >= PROGRESS_SECONDS):
                shown = now
                done = length.fraction(at.step, spent())
                newest = tokens if options.generated_tokens is None else generated
                on_progress(
                    Progress(
                        step=at.step,
                        steps=length.expected_steps(at.step, spent(), newest),
                        tokens=at.tokens,
                        loss=loss_value,
                        exact_match=at.validation["exact_match"] if at.validation else None,
                        tokens_per_second=at.tokens / at.seconds,
                        seconds_left=at.seconds * (1 - done) / done,
                    )
                )

        # All that is left can be done again from the last checkpoint: a signal stops it where it strikes.
        assert saved == at.step
        request.at_once = lambda name: Interrupted(f"interrupted by {name} after the last step", at.step, checkpoint)
        if request.signal is not None:
            raise request.at_once(request.signal)

        mixtures.spread()  # a model that never got so far computes the same with them
        peak = peak_bytes(device)
        return from_first(world, lambda: finish(run, model, task, made.context, at, precision, peak))


def _spans(indices: list[int]) -> str:
    """Return indices in few words: a range if they follow one another, else the first eight and their number."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return f"{indices[0]}..{indices[-1]}"
    shown = ", ".join(str(index) for index in indices[:8])
    return shown if len(indices) <= 8 else f"{shown} ... ({len(indices)} of them)"
