"""From a recipe to runs of matched size: each variant is the recipe's model with one thing changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import Any

from trivium.config import UserError, config_hash, from_dict, set_path, to_dict
from trivium.model.base import ModelConfig, ModelContext, of_kind
from trivium.model.context import model_context
from trivium.model.layers import parse_layers
from trivium.model.sizing import describe, match
from trivium.registry import nearest
from trivium.study.recipe import CompareConfig, Recipe
from trivium.tasks.base import Task, TaskConfig
from trivium.train.config import ChainRemovalConfig, RolloutConfig, RunConfig
from trivium.train.objectives import has_chain

MATCHES = ("parameters", "flops", "none")
TOLERANCE = 0.01

# Beyond the model, a variant may change how the problems are written (the task's `written_by`) and what is minimised.
# Anything else of a run (its length, batch, optimizer, precision, seed ...) is held equal, or the comparison would not
# be of these.
_TRAIN_KEYS = (
    "train.chain_loss",
    "train.prompt_loss",
    "train.objective",
    "train.shift",
    *(f"train.rollout.{item.name}" for item in fields(RolloutConfig)),
    *(f"train.chain_removal.{item.name}" for item in fields(ChainRemovalConfig)),
)


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: its sized run, what that costs at `length` tokens, the longest of its task, and what it
    was matched to, and the run that comes before it if the recipe has one."""

    name: str
    config: RunConfig
    sizes: Mapping[str, float]
    mixer: str
    length: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    match: str | None = None
    to: str | None = None
    pretraining: RunConfig | None = None

    def run(self, seed: int, learning_rate: float | None = None) -> RunConfig:
        """Return the run of this variant with `seed`, and with `learning_rate` if it is given."""
        train = replace(self.config.train, seed=seed)
        if learning_rate is not None:
            train = replace(train, learning_rate=learning_rate)
        return replace(self.config, train=train)

    def folder_name(self, run: RunConfig) -> str:
        """Return the name of the folder of `run`."""
        return folder_name(self.name, run)


def folder_name(name: str, run: RunConfig, *, pretraining: bool = False) -> str:
    """Return the name of the folder of a run of the variant `name`, or of the run that comes before it."""
    return f"{name}{'-pretraining' if pretraining else ''}-s{run.train.seed}-{config_hash(run)}"


def expand(recipe: Recipe) -> list[Variant]:
    """Return the variants of `recipe` in its order, sized to match within 1 %.

    Raises UserError when a variant changes what must be equal, cannot be matched, or equals another one.
    """
    compare = recipe.compare
    if compare is None:
        raise UserError("compare: the recipe has no such section; give its variants")
    base = recipe.run
    if len(compare.learning_rates) == 1:
        base = replace(base, train=replace(base.train, learning_rate=compare.learning_rates[0]))
    written = base.task.written_by
    plans = {name: _plan(name, overrides, compare, written) for name, overrides in compare.variants.items()}
    sized: dict[str, Variant] = {}
    build = _Tasks()
    for name in _order(plans):
        plan = plans[name]
        config = _resolve(base, plan)
        with prefixed(f"compare.variants.{name}: "):
            task = build(config.task)
            length = task.max_length
            context = model_context(task, config.model, config.evaluate.longest)
            if plan.to is not None:
                config = replace(config, model=_match(config.model, context, plan, sized[plan.to], length))
            sizes = describe(config.model, context, length)
            first = recipe.pretraining(config, build)
        sized[name] = replace(
            plan, config=config, sizes=sizes, mixer=_mixer(config.model), length=length, pretraining=first
        )
    variants = [sized[name] for name in plans]
    for one, other in combinations(variants, 2):
        length = one.length
        if _equal(one, other, has_chain(build(one.config.task))):
            raise UserError(
                f"compare.variants: {one.name!r} and {other.name!r} are the same at this task's {length} tokens, so "
                "one is no control for the other; change its window, its mixer or its match"
            )
    return variants


class _Tasks:
    """Builds each task once: those of files read and tokenise all of them."""

    def __init__(self):
        self._built: list[tuple[TaskConfig, Task]] = []

    def __call__(self, config: TaskConfig) -> Task:
        for known, task in self._built:
            if known == config:
                return task
        self._built.append((config, config.build()))
        return self._built[-1][1]


def nearly_equal(variants: Sequence[Variant]) -> list[str]:
    """Return a sentence for each variant that, on its task, is another one but for a little feed-forward width.

    Such a control is allowed, since it was asked for, but it says little that the other does not. Two variants that are
    each within the match's tolerance of a third differ by up to twice that: so much counts as hardly.
    """
    sentences = []
    for one, other in combinations(variants, 2):
        if not _equal(_without_width(one), _without_width(other), chains=True):
            continue
        more = {key: other.sizes[key] / one.sizes[key] - 1 for key in ("flops_per_token", "parameters")}
        if max(map(abs, more.values())) <= 2 * TOLERANCE:
            flops, parameters = (f"{100 * share:+.1f} %" for share in more.values())
            sentences.append(
                f"{other.name} is {one.name} but for the width of its feed-forward: {flops} FLOPs per token, "
                f"{parameters} parameters. As a control it says little that {one.name} does not."
            )
    return sentences


def _without_width(variant: Variant) -> Variant:
    model = variant.config.model
    if "ff_width" not in {item.name for item in fields(model)}:
        return variant
    return replace(variant, config=replace(variant.config, model=replace(model, ff_width=None)))


def _plan(name: str, overrides: Mapping[str, Any], compare: CompareConfig, fields_written: tuple[str, ...]) -> Variant:
    where = f"compare.variants.{name}"
    changes = dict(overrides)
    how, to = changes.pop("match", compare.match), changes.pop("to", compare.baseline)
    if how not in MATCHES:
        raise UserError(f"{where}.match: {how!r} is not allowed; {nearest(str(how), list(MATCHES))}")
    if to not in compare.variants:
        raise UserError(f"{where}.to: no variant {to!r}; {nearest(str(to), list(compare.variants))}")
    for key in changes:
        if key == "model.preset":
            raise UserError(f"{where}.{key}: a variant keeps the recipe's preset; change model.layers or another key")
        written = tuple(f"task.{field}" for field in fields_written)
        if not key.startswith("model.") and key not in (*_TRAIN_KEYS, *written):
            hint = " (a grid for all of them: compare.learning_rates)" if key == "train.learning_rate" else ""
            allowed = f"model.*, {', '.join((*written, *_TRAIN_KEYS))}, match, to"
            raise UserError(f"{where}.{key}: a variant may not change it, all share it{hint}; allowed: {allowed}")
    if how == "none":
        return Variant(name, RunConfig(), {}, "", 0, changes, how)
    reference = to == name
    if reference and name != compare.baseline:
        raise UserError(f"{where}.to: a variant cannot be matched to itself; name another")
    if not reference and changes.get("model.ff_width") is not None:
        raise UserError(f"{where}.model.ff_width: it is solved, to match {how} to {to!r}; leave it out")
    return Variant(name, RunConfig(), {}, "", 0, changes, None if reference else how, None if reference else str(to))


def _order(plans: Mapping[str, Variant]) -> list[str]:
    """Return the names so that each follows the variant that it is matched to."""
    ordered: list[str] = []
    waiting = list(plans)
    while waiting:
        ready = [name for name in waiting if plans[name].to is None or plans[name].to in ordered]
        if not ready:
            circle = ", ".join(waiting)
            raise UserError(
                f"compare.variants: {circle} are matched to one another in a circle; name one as compare.to"
            )
        ordered += ready
        waiting = [name for name in waiting if name not in ready]
    return ordered


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Put `where` before the words of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _resolve(base: RunConfig, plan: Variant) -> RunConfig:
    data = to_dict(base)
    if (kind := plan.overrides.get("model.kind")) is not None:
        data["model"] = of_kind(data["model"], kind)
    for key, value in plan.overrides.items():
        set_path(data, key, to_dict(value))
    return from_dict(RunConfig, data, f"compare.variants.{plan.name}")


def _match(model: ModelConfig, context: ModelContext, plan: Variant, reference: Variant, length: int) -> ModelConfig:
    flops = plan.match == "flops"
    key = "flops_per_token" if flops else "parameters"
    target = reference.sizes[key]
    targets: dict[str, Any] = {"flops": target} if flops else {"parameters": int(target)}
    matched = match(model, context, length=length, **targets)
    real = describe(matched, context, length)[key]
    if abs(real - target) > TOLERANCE * target:
        raise UserError(f"{key} {real:,.0f} cannot be matched within 1 % to the {target:,.0f} of {reference.name!r}")
    return matched


def _equal(one: Variant, other: Variant, chains: bool) -> bool:
    if one.config.task != other.config.task:
        return False
    trains = [one.config.train, other.config.train]
    if not chains:  # then it makes no difference whether the chain is scored
        trains = [replace(train, chain_loss=True) for train in trains]
    if trains[0] != trains[1]:
        return False
    equals_at = getattr(one.config.model, "equals_at", None)
    if equals_at is not None and type(one.config.model) is type(other.config.model):
        return bool(equals_at(other.config.model, one.length))
    return one.config.model == other.config.model


def _mixer(model: ModelConfig) -> str:
    """Name the mixer that sets a model apart: the first that is not full attention. Figures colour by it. A model that
    is no decoder is set apart by its kind.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, str) or model.kind != ModelConfig.default_kind:
        return model.kind
    mixers = parse_layers(layers)
    special = [mixer.kind for mixer in mixers if mixer.kind != "attention"]
    if special:
        return special[0]
    return "local" if any(getattr(mixer, "window", None) is not None for mixer in mixers) else "attention"
