"""A recipe: one run, and the question that a study of several such runs answers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from trivium.config import UserError, config_hash, from_dict, knob, load_yaml, set_path
from trivium.evaluate.config import EvaluateConfig
from trivium.model.base import of_kind
from trivium.model.context import model_context
from trivium.registry import nearest
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import Task, TaskConfig
from trivium.train.config import RunConfig, TrainConfig

# A variant's name becomes part of a folder's name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
_VARIANTS = "compare.variants."


@dataclass(frozen=True)
class CompareConfig:
    """Which variants a study compares, and what is held equal."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of each variant, and the dotted keys that it changes; `match` and `to` may stand among them."""
    match: Literal["parameters", "flops", "none"] = "parameters"
    """What is matched within 1 % by solving the feed-forward width: parameters, or FLOPs per token; none leaves each
    variant at its own size, where sizes are what is compared."""
    to: str | None = None
    """Variant that the others are matched to and measured against (default: the first)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that every variant is trained and reported with."""
    learning_rates: tuple[float, ...] = ()
    """Grid on which every variant is tuned alike, each taking its best; empty: all use train.learning_rate."""
    tuning_seeds: tuple[int, ...] = (1000,)
    """Seeds of the tuning runs; none may be a reporting seed."""
    tuning_examples: int | None = knob(None, affects_results="unless_default")
    """Test problems that tuning runs are scored on; the choice is by validation, so few do (default: as the others)."""
    thresholds: tuple[float, ...] = knob((0.9, 0.99), affects_results=False)
    """Exact-match rates to which the tokens are counted."""

    def __post_init__(self):
        if not self.variants:
            raise UserError("variants: give at least one, as NAME: {model.layers: ...}")
        for name in self.variants:
            if not _NAME.fullmatch(name):
                raise UserError(f"variants.{name}: a name is made of letters, digits, _, + and -, got {name!r}")
        if self.to is not None and self.to not in self.variants:
            raise UserError(f"to: no variant {self.to!r}; {nearest(self.to, list(self.variants))}")
        if not self.seeds:
            raise UserError("seeds: give at least one")
        for key in ("seeds", "learning_rates", "tuning_seeds", "thresholds"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise UserError(f"{key}: a value stands twice in {list(values)}")
        for key in ("seeds", "tuning_seeds"):
            if min(getattr(self, key), default=0) < 0:
                raise UserError(f"{key}: seeds are whole numbers from 0 on, got {list(getattr(self, key))}")
        if self.tuning_examples is not None and self.tuning_examples < 1:
            raise UserError(f"tuning_examples: expected 1 or more, got {self.tuning_examples}")
        if any(rate <= 0 for rate in self.learning_rates):
            raise UserError(f"learning_rates: expected positive numbers, got {list(self.learning_rates)}")
        if any(not 0 < threshold <= 1 for threshold in self.thresholds):
            raise UserError(f"thresholds: expected rates above 0 and up to 1, got {list(self.thresholds)}")
        if self.tunes:
            if not self.tuning_seeds:
                raise UserError("tuning_seeds: a grid of learning_rates needs at least one")
            if shared := sorted(set(self.seeds) & set(self.tuning_seeds)):
                raise UserError(f"tuning_seeds: {shared} also stand in seeds; tune on others than those you report")

    @property
    def tunes(self) -> bool:
        """Whether there is a choice of learning rates to make."""
        return len(self.learning_rates) > 1

    @property
    def baseline(self) -> str:
        """Name of the variant that the others are matched to and measured against."""
        return self.to or next(iter(self.variants))


@dataclass(frozen=True)
class PretrainConfig:
    """What a model learns before the recipe's own task: a run of its own, with whose weights the recipe's begins.

    In a study every variant has one such run, which its seeds share.
    """

    task: TaskConfig
    """What is learned first; its vocabulary is that of the recipe's task."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained; its device and threads are the recipe's where they are left out."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How it is scored when this training ends."""


@dataclass(frozen=True)
class Recipe(RunConfig):
    """A run's sections, with `pretrain` one that comes before it, and with `compare` a study of variants of it."""

    pretrain: PretrainConfig | None = knob(None, affects_results="unless_default")
    """What the model is trained on first."""
    compare: CompareConfig | None = None
    """The variants of a study."""
    name: str = knob("", affects_results=False)
    """Name of the study, which begins the name of its folder (default: the recipe's file name)."""

    def __post_init__(self):
        if self.name and not _NAME.fullmatch(self.name):
            raise UserError(f"name: a name is made of letters, digits, _, + and -, got {self.name!r}")
        if self.pretrain is not None and self.train.init_from is not None:
            raise UserError(
                "train.init_from: given beside pretrain, with whose weights the run begins; those that pretraining "
                "begins with are pretrain.train.init_from"
            )

    @property
    def run(self) -> RunConfig:
        """The recipe's own run, without the study."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(RunConfig)})

    def pretraining(
        self, run: RunConfig, build: Callable[[TaskConfig], Task] = lambda task: task.build()
    ) -> RunConfig | None:
        """Return the run that comes before `run`, one of this recipe's; None without `pretrain`.

        Raises UserError when the two differ in their vocabulary, or in the sizes of their weights.
        """
        first = self.pretrain
        if first is None:
            return None
        train = first.train
        if train.device == "auto":
            train = replace(train, device=run.train.device)
        train = replace(train, threads=train.threads or run.train.threads)
        theirs, ours = (build(task).alphabet for task in (first.task, run.task))
        if theirs != ours:
            raise UserError(
                f"pretrain.task: its vocabulary of {len(theirs)} symbols is not that of task, of {len(ours)}; one "
                "model learns both, so give both the same tokenizer"
            )
        made = RunConfig(first.task, run.model, train, first.evaluate, run.track)
        if getattr(run.model, "max_length", None) is None:
            # Else what the first run learned would be found unfit when it has ended.
            contexts = [model_context(build(each.task), each.model, each.evaluate.longest) for each in (made, run)]
            if len({run.model.num_params(context) for context in contexts}) > 1:
                before, after = (context.max_length for context in contexts)
                raise UserError(
                    "model.max_length: the weights of this model depend on it, and pretrain's problems are of "
                    f"{before} tokens, the recipe's own of {after}; allowed: {max(before, after)} or more"
                )
        return made

    @property
    def folder_name(self) -> str:
        """Name of the study's folder: the recipe's name and the hash of what changes its results."""
        return f"{self.name or 'recipe'}-{config_hash(self)}"


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read the recipe at `path` and apply `overrides` (dotted key -> value, as given on a command line).

    ``compare.variants.NAME.model.layers`` overrides one key of one variant. Raises UserError that names the file and
    the key, or the override.
    """
    path = Path(path)
    data = load_yaml(path)
    try:
        recipe = _recipe(path, data)
    except UserError as error:
        # An override may be what mends the file, such as a length given in tokens beside one in steps.
        if not overrides:
            raise UserError(f"{path}: {error}") from None
        recipe = None
    if not overrides:
        assert recipe is not None
        return recipe
    try:
        # A kind first: it decides which other keys its section has.
        for key in sorted(overrides, key=lambda key: not key.endswith(".kind")):
            override(data, key, overrides[key])
        return _recipe(path, data)
    except UserError as error:
        source = f"{path}, with the overrides {', '.join(overrides)}" if recipe is not None else str(path)
        raise UserError(f"{source}: {error}") from None


def _recipe(path: Path, data: dict[str, Any]) -> Recipe:
    stem = re.sub(r"[^A-Za-z0-9_+-]+", "-", path.stem).lstrip("_+-")
    return from_dict(Recipe, {**data, "name": data.get("name") or stem or "recipe"})


def override(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in a recipe's plain `data`.

    Another kind of task drops the other kind's keys; another kind of model keeps those that mean the same in both.
    """
    if key.startswith(_VARIANTS):
        name, _, rest = key.removeprefix(_VARIANTS).partition(".")
        if rest:
            set_path(data, _VARIANTS + name, {**_section(data, "compare", "variants", name), rest: value})
            return
    section, _, rest = key.partition(".")
    if section == "task" and rest and not data.get("task"):
        data["task"] = {"kind": AdditionConfig.kind}
    if key == "model.kind" and isinstance(data.get(section), Mapping):
        data[section] = of_kind(data[section], value)
    elif rest == "kind" and isinstance(data.get(section), Mapping) and data[section].get("kind") != value:
        data[section] = {}
    if rest and data.get(section) is None:
        data.pop(section, None)
    set_path(data, key, value)


def _section(data: Any, *names: str) -> dict[str, Any]:
    for name in names:
        data = data.get(name) if isinstance(data, Mapping) else None
    return dict(data) if isinstance(data, Mapping) else {}
