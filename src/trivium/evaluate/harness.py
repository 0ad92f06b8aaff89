"""Our models under EleutherAI's lm-evaluation-harness, so that scores compare with those that others report.

The package is lm-eval; its tasks come from the hub, or from YAML files whose data are local.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import UserError
from trivium.evaluate.perplexity import nats
from trivium.generate.engine import generate, longest_input
from trivium.model.base import LanguageModel
from trivium.tasks.base import Task
from trivium.tasks.byte_pairs import BytePairs

GENERATED = 256  # tokens of an answer where a task names no number
BOOTSTRAPS = 1000  # of standard errors that have no formula; a mean's has one

_log = logging.getLogger("trivium")


class Harnessed:
    """What lm-eval asks of a language model, answered by one of ours; `as_lm` makes an instance that it takes."""

    def __init__(self, model: LanguageModel, task: Task, batch: int):
        self.model, self.alphabet, self.batch = model, task.alphabet, batch
        self.room = longest_input(model)
        self.cut = 0
        self.asked = 0

    def _encode(self, text: str) -> list[int]:
        if isinstance(self.alphabet, BytePairs):
            return self.alphabet.encode_ordinary(text).tolist()
        return self.alphabet.encode(text)

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability in nats and whether it is the greedy one.

        Blanks that end a context belong to the continuation, as its tokens have them. Of what is longer than the model
        reads the end is kept.
        """
        rows: list[np.ndarray] = []
        scored: list[int] = []
        for context, continuation in pairs:
            kept = context.rstrip()
            whole = self._encode(context + continuation)
            start = len(self._encode(kept)) if kept else 0
            if start == 0:
                whole, start = [self.alphabet.end_id, *whole], 1
            elif continuation:  # a token may reach from the one into the other
                start = min(start, len(whole) - 1)
            if len(whole) > self.room + 1:
                self.cut += 1
            scored.append(min(len(whole) - start, self.room))
            rows.append(np.array(whole[-self.room - 1 :], dtype=np.int64))
        # Rows of like length side by side need little padding.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        read = nats(self.model, [rows[number] for number in order], last=[scored[number] for number in order])
        found = {order[place]: (-loss, likely) for place, loss, _, likely in read}
        return [found[number] for number in range(len(rows))]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability in nats of each whole text, every token of it scored once."""
        ids = [np.array([self.alphabet.end_id, *self._encode(text)], dtype=np.int64) for text in texts]
        totals = [0.0] * len(ids)
        for number, loss, _, _ in nats(self.model, ids):
            totals[number] -= loss
        return totals

    def continued(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return what is generated behind each context, up to the first of its `until` strings or the end symbol.

        A context that the model can read is kept whole, and its answer has what room is left, as in our own scoring. Of
        a longer one the end is kept that leaves room for the whole answer.
        """
        texts: dict[int, str] = {}
        by_options: dict[tuple[int, float], list[int]] = {}
        for number, (_, options) in enumerate(asked):
            count = int(options.get("max_gen_toks") or options.get("max_new_tokens") or GENERATED)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            by_options.setdefault((count, temperature), []).append(number)
        for (count, temperature), numbers in by_options.items():
            prompts = []
            for number in numbers:
                ids = self._encode(asked[number][0]) or [self.alphabet.end_id]
                if len(ids) > self.room:
                    self.cut += 1
                    ids = ids[-max(1, self.room - count + 1) :]
                prompts.append(ids)
            made = generate(
                self.model,
                prompts,
                end_id=self.alphabet.end_id,
                max_new_tokens=count,
                temperature=temperature,
                batch=self.batch,
            )
            for number, generation in zip(numbers, made, strict=True):
                ids = generation.tokens[:-1] if generation.finished else generation.tokens
                texts[number] = _until(self.alphabet.decode(ids), asked[number][1].get("until"))
        return [texts[number] for number in range(len(asked))]


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.partition(stop)[0]
    return text


def as_lm(ours: Harnessed) -> Any:
    """Return `ours` as an instance of lm-eval's LM."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class TriviumLM(LM):
        """Answers lm-eval's requests."""

        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            ours.asked += len(requests)
            return ours.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            ours.asked += len(requests)
            return ours.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            ours.asked += len(requests)
            return ours.continued([request.args for request in requests])

    return TriviumLM()


def run_harness(
    model: LanguageModel, task: Task, tasks: Sequence[str], *, batch: int = 256, limit: int | None = None
) -> dict[str, Any]:
    """Return {"version": lm-eval's, "tasks": {name: {"version", "metrics", "errors", "problems"}}, "cut", "limit"}.

    `tasks` are names that lm-eval knows, or paths of YAML files of its format. "cut" counts the requests that were
    longer than the model reads. Raises UserError when lm-eval is not installed, when it does not know a task or cannot
    get its data, and for a model whose outputs are not the next token.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness: needs lm-eval, which is not installed; pip install 'trivium[score]' brings it")
    if task.labels or model.decoding.shift:
        raise UserError("--harness: asks for the next token, and this model gives labels, or several tokens a pass")
    if limit is not None and limit < 1:
        raise UserError(f"--limit: expected 1 or more problems, got {limit}")
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    files = {name for name in tasks if name.endswith((".yaml", ".yml"))}
    for name in sorted(files):
        if not Path(name).is_file():
            raise UserError(f"--harness: {name}: no such file")
    # Its own tasks are ten thousand files, which are looked at where one of their names is given.
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    unknown = [name for name in tasks if name not in files and name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--harness: lm-eval {lm_eval.__version__} knows no task {unknown[0]!r}; give one of its names, or a YAML "
            "file's path"
        )
    ours = Harnessed(model, task, batch)
    try:
        found: Any = simple_evaluate(
            model=as_lm(ours),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except UserError as error:
        raise UserError(f"--harness: {error}") from None
    except Exception as error:
        if ours.asked:
            raise
        # Nothing was asked of the model yet: a task, or its data, cannot be had, for which each library has its errors.
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"--harness: {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {first}); without a network, "
            "give a YAML file whose dataset_kwargs.data_files are local"
        ) from None
    if ours.cut:
        _log.warning("%s requests were longer than the %s tokens that the model reads: cut", ours.cut, ours.room)
    return {
        "version": lm_eval.__version__,
        "tasks": {name: _metrics(found, name) for name in found["results"]},
        "cut": ours.cut,
        "limit": limit,
    }


def _metrics(found: Any, name: str) -> dict[str, Any]:
    values = {key: float(value) for key, value in found["results"][name].items() if isinstance(value, int | float)}
    is_error = {key: "_stderr," in key for key in values}
    return {
        "version": found["versions"].get(name),
        "metrics": {key: value for key, value in values.items() if not is_error[key] and "," in key},
        "errors": {key.replace("_stderr,", ","): value for key, value in values.items() if is_error[key]},
        "problems": found.get("n-samples", {}).get(name, {}).get("effective"),
    }
