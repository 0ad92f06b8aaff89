"""What a run is: the recipe's sections that change its results, and those that do not."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trivium.config import UserError, knob
from trivium.evaluate.config import EvaluateConfig
from trivium.model.base import ModelConfig
from trivium.model.decoder import DecoderConfig
from trivium.tasks.addition import AdditionConfig
from trivium.tasks.base import TaskConfig


@dataclass(frozen=True)
class CurriculumConfig:
    """Short problems first: the stages of a run before the whole task, and when one is left for the next.

    After every evaluation at which the criterion holds, on validation problems of the stage, the next stage begins,
    and after `most_evaluations` in any case; the whole task follows the last. Without lengths there is no curriculum.
    """

    lengths: tuple[int, ...] = ()
    """Longest problems of each stage, in the task's unit of length, ascending; the whole task comes after them."""
    metric: Literal["exact_match", "token_accuracy", "loss"] = "exact_match"
    """Score of the stage's validation problems that the criterion is about."""
    advance_at: float = 0.9
    """Go on when the score is at least this, or, for the loss, at most."""
    warn_after: int = 20
    """Evaluations without going on after which a warning says so."""
    most_evaluations: int | None = None
    """Evaluations after which a stage is left even so, that every variant sees the whole task; null: never."""

    def __post_init__(self):
        if min(self.lengths, default=1) < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"lengths: expected ascending lengths of 1 or more, got {list(self.lengths)}")
        if not 0 < self.advance_at < math.inf or (self.metric != "loss" and self.advance_at > 1):
            allowed = "a number above 0" if self.metric == "loss" else "a rate above 0, up to 1"
            raise UserError(f"advance_at: expected {allowed}, got {self.advance_at}")
        for name in ("warn_after", "most_evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected 1 or more evaluations, got {value}")


@dataclass(frozen=True)
class RolloutConfig:
    """Training on the model's own roll-out: it reads Gumbel-softmax samples of what it predicted."""

    temperature: float = 1.0
    """Temperature of the samples at the beginning of the run."""
    final_temperature: float | None = None
    """Temperature at its end, approached geometrically; null keeps the first."""
    straight_through: bool = False
    """Read one symbol, with the gradient of the soft sample."""

    def __post_init__(self):
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class ChainRemovalConfig:
    """A chain of thought shortened stage by stage until none is left (implicit chain of thought, arXiv 2405.14838).

    After every evaluation at which the validation problems, with their chains as short as in training, are answered
    well enough, more tokens are taken away from the beginning of each chain; its brackets go with the last.
    """

    tokens: int = 0
    """Tokens taken away at each stage; 0 never shortens a chain, without stages. It is counted on past the end of the
    longest chain, up to the longest sequence: such stages change nothing but what reset_optimizer and warmup do."""
    stages: tuple[int, ...] = knob((), affects_results="unless_default")
    """Tokens that the chains lack from stage to stage, in place of `tokens` at each. Cut between the numbers of a chain
    they leave none begun: the middle of a number is harder to write without its beginning than the whole. The last
    one stays: no chain is left where it is as long as the longest."""
    advance_at: float = 0.9
    """Take away more when the teacher-forced exact match is at least this."""
    most_evaluations: int | None = knob(None, affects_results="unless_default")
    """Take away more after this many evaluations of a stage in any case; null waits for the criterion."""
    smoothing: float = knob(0.0, affects_results="unless_default")
    """Each training problem lacks n more tokens with a probability in proportion to exp(-smoothing * n); 0 never."""
    reset_optimizer: bool = knob(False, affects_results="unless_default")
    """Forget the optimizer's moments whenever more is taken away."""
    warmup: int = knob(0, affects_results="unless_default")
    """Steps of linear warm-up of the learning rate whenever more was taken away."""
    order: Literal["written", "sums_backwards"] = knob("written", affects_results="unless_default")
    """Which tokens go first: as they are written, or with a number in round brackets going from its last digit on, so
    that what is left of it is written as before."""
    keep_brackets: bool = knob(False, affects_results="unless_default")
    """Leave the two brackets of a chain around nothing in the end, in place of taking them with its last token."""

    @property
    def shortens(self) -> bool:
        """Whether chains are shortened at all."""
        return bool(self.tokens or self.stages)

    def following(self, removed: int) -> int | None:
        """Return how many tokens the chains lack in the stage after that in which they lack `removed`; None after the
        last of `stages`."""
        if self.stages:
            return next((count for count in self.stages if count > removed), None)
        return removed + self.tokens

    def __post_init__(self):
        if self.tokens < 0:
            raise UserError(f"tokens: expected 0 or more, got {self.tokens}")
        if min(self.stages, default=1) < 1 or list(self.stages) != sorted(set(self.stages)):
            raise UserError(f"stages: expected ascending numbers of tokens, 1 or more, got {list(self.stages)}")
        if self.tokens and self.stages:
            raise UserError(f"stages: given beside tokens {self.tokens}; give only one of tokens, stages")
        if self.warmup < 0:
            raise UserError(f"warmup: expected 0 or more steps, got {self.warmup}")
        if self.most_evaluations is not None and self.most_evaluations < 1:
            raise UserError(f"most_evaluations: expected 1 or more, or null, got {self.most_evaluations}")
        if not self.smoothing >= 0:
            raise UserError(f"smoothing: expected 0 (none) or more, got {self.smoothing}")
        for name in ("most_evaluations", "smoothing", "reset_optimizer", "warmup", "order", "keep_brackets"):
            if getattr(self, name) not in (None, 0, "written") and not self.shortens:
                raise UserError(f"{name}: given without tokens or stages: no chain is ever shortened")
        if not 0 < self.advance_at <= 1:
            raise UserError(f"advance_at: expected a rate above 0, up to 1, got {self.advance_at}")


@dataclass(frozen=True)
class PlateauConfig:
    """More of one source when validation stops improving: what is looked at, and by how much its share grows.

    A plateau is `patience` evaluations one after another that do not better the best score by `min_improvement`.
    """

    source: str | None = None
    """Source of the task's mixture whose share is raised; null: none is."""
    metric: Literal["loss", "exact_match", "token_accuracy"] = "loss"
    """Validation score that is watched."""
    patience: int = 4
    """Evaluations without improvement that make a plateau."""
    min_improvement: float = 0.002
    """What counts as improvement of the score, in its own unit."""
    raise_by: float = 0.05
    """What each plateau adds to the share; the other sources give it up in proportion."""
    largest: float = 0.4
    """Largest share that the source may reach."""

    def __post_init__(self):
        if self.patience < 1:
            raise UserError(f"patience: expected 1 or more evaluations, got {self.patience}")
        if not 0 <= self.min_improvement < math.inf:
            raise UserError(f"min_improvement: expected 0 or more, got {self.min_improvement}")
        for name in ("raise_by", "largest"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class GroupConfig:
    """How the parameters of one pattern of names are trained, where that differs from the others."""

    learning_rate: float | None = None
    """Peak learning rate; null is that of the run."""
    weight_decay: float | None = None
    """Weight decay of its matrices; null is that of the run."""
    freeze: bool = False
    """Never train it: no gradient, no moments."""
    begins_at: int = 0
    """Step before which it is frozen; a warm-up of its own begins there (gradual unfreezing, arXiv 1801.06146)."""

    def __post_init__(self):
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(
                f"learning_rate: expected a number above 0, got {self.learning_rate}; freeze stops training"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if self.begins_at < 0:
            raise UserError(f"begins_at: expected 0 or more steps, got {self.begins_at}")
        if self.freeze and (self.learning_rate, self.weight_decay, self.begins_at) != (None, None, 0):
            raise UserError(
                "freeze: true leaves nothing to learning_rate, weight_decay or begins_at; give one or others"
            )


_PRETRAINING = re.compile(r".*-pretraining-s\d+-[0-9a-f]{8}")


def _named_pretraining(folder: Path | None) -> Path | None:
    """Return the folder of a recipe's pretraining as the default --runs spells it: its name has the hash of all that it
    depends on, so that it is the same wherever it lies. Any other folder stays as it is given.
    """
    if folder is None or _PRETRAINING.fullmatch(folder.name) is None:
        return folder
    return Path("runs", folder.parent.name, folder.name)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Its length is given by exactly one of steps, epochs and tokens.

    The batch never depends on the number of devices: under torchrun each process takes its share of it, and the
    losses agree with those of one process to float tolerance. Dropout is the exception, because each process draws
    its own masks.
    """

    steps: int | None = None
    """Length in optimizer steps (1000 when epochs and both lengths in tokens are left out too)."""
    epochs: float | None = None
    """Length in passes over a finite training set."""
    tokens: int | None = None
    """Length in training tokens, padding not counted."""
    generated_tokens: int | None = None
    """Length in tokens of answers and chains of thought, which a model would generate; prompts are not counted."""
    batch: int | None = None
    """Examples a step, over all devices together (256 when batch_tokens is left out too)."""
    batch_tokens: int | None = None
    """Tokens a step, over all devices together: the examples that fit at the longest length of task, or of a stage."""
    micro_batch: int | None = None
    """Examples a forward pass; a step accumulates as many passes as its batch needs (default: all at once)."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after warm-up."""
    warmup: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Weight decay of matrices; embeddings, biases and norms have none."""
    groups: dict[str, GroupConfig] = field(default_factory=dict, hash=False)
    """Parameters trained differently, by patterns of their names such as {"blocks.[0-3].*": {freeze: true}}; the first
    pattern that fits a name counts."""
    experts_from: int = 0
    """Step before which a mixture of experts computes what its first expert does; the others then start as copies."""
    balance: float = 0.01
    """Weight of the loss that keeps the load of a mixture's experts even (arXiv 2101.03961)."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.98
    """Decay of AdamW's second moment."""
    clip: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    objective: Literal["next_token", "label_shift", "rollout"] = "next_token"
    """What is minimised: cross-entropy of the next token, of one `shift` places behind it (several tokens a pass),
    or on the model's own roll-out after the prompt."""
    shift: int = 0
    """With label_shift: places that targets lie behind the next token; shift + 1 tokens then come from a pass."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """With rollout: how what was predicted is read."""
    chain_removal: ChainRemovalConfig = field(default_factory=ChainRemovalConfig)
    """Shorten chains of thought stage by stage."""
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    """More of one source of a mixture when validation stops improving."""
    chain_loss: bool = True
    """Score the tokens of the chain of thought; false masks them from the loss."""
    prompt_loss: bool = False
    """Score the prompt's tokens too."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Short problems first, and when to go on to longer ones."""
    init_from: Path | None = knob(None, hashed_as=_named_pretraining)
    """Run or model folder whose weights the run begins with; its task may be another, its model may not."""
    seed: int = 0
    """Seed of initialisation, dropout and the order of the training problems."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the forward and backward pass; auto is bfloat16 where the processor has it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    capture: Literal["auto", "yes", "no"] = knob("auto", affects_results=False)
    """Make a CUDA graph of the whole training step; auto does so where it can be done, yes insists."""
    device: str = knob("auto", affects_results=False)
    """Device to train on: auto, cpu, cuda, cuda:1 ..."""
    threads: int | None = knob(None, affects_results=False)
    """Processor threads (default: what the machine has, shared among jobs); recorded, and reused on resume."""
    eval_every: int = 50
    """Steps between evaluations on the validation split."""
    eval_examples: int = 512
    """Distinct validation problems of each such evaluation."""
    log_every: int = knob(10, affects_results=False)
    """Steps between rows of metrics.jsonl."""
    save_every: int = knob(200, affects_results=False)
    """Steps between checkpoints."""
    keep: int = knob(2, affects_results=False)
    """Newest checkpoints to keep."""

    def __post_init__(self):
        for names in (("steps", "epochs", "tokens", "generated_tokens"), ("batch", "batch_tokens")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise UserError(f"{given[1]}: given beside {given[0]}; give only one of {', '.join(names)}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: expected a number above 0, got {value}")
        for name in ("min_learning_rate", "warmup", "weight_decay", "experts_from", "balance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"min_learning_rate: {self.min_learning_rate} is above learning_rate, which is {self.learning_rate}"
            )
        for pattern, group in self.groups.items():
            if group.learning_rate is not None and group.learning_rate < self.min_learning_rate:
                raise UserError(
                    f"groups.{pattern}.learning_rate: {group.learning_rate} is below min_learning_rate, which is "
                    f"{self.min_learning_rate}"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}")
        if (self.shift > 0) != (self.objective == "label_shift"):
            allowed = "1 or more" if self.objective == "label_shift" else "0, or objective label_shift"
            raise UserError(f"shift: {self.shift} is not allowed with objective {self.objective}; allowed: {allowed}")
        if self.shift < 0:
            raise UserError(f"shift: expected 1 or more, got {self.shift}")
        if self.objective != "rollout" and self.rollout != RolloutConfig():
            raise UserError(f"rollout: given with objective {self.objective}; allowed with objective rollout")
        if not 0 <= self.seed < 2**23:  # the stream of problems keeps 40 bits of a 64-bit index for each seed
            raise UserError(f"seed: expected a whole number from 0 to {2**23 - 1}, got {self.seed}")

    def batch_examples(self, longest: int) -> int:
        """Return the examples of one step, over all devices together; `longest` is an example's most input tokens."""
        if self.batch_tokens is None:
            return self.batch or 256
        if self.batch_tokens < longest:
            raise UserError(f"train.batch_tokens: {self.batch_tokens} is less than the {longest} tokens of one example")
        return self.batch_tokens // longest


_POSITIVE = (
    "steps",
    "epochs",
    "tokens",
    "generated_tokens",
    "batch",
    "batch_tokens",
    "micro_batch",
    "learning_rate",
    "clip",
    "threads",
    "eval_every",
    "eval_examples",
    "log_every",
    "save_every",
    "keep",
)


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics go beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run folder (extra: track)."""
    wandb: str | None = None
    """Weights & Biases project to log to; WANDB_MODE=offline works without network (extra: track)."""
    trackio: str | None = None
    """Trackio project to log to (extra: track)."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a task, a model, how it is trained, evaluated and tracked."""

    task: TaskConfig = field(default_factory=AdditionConfig)
    """What is learned."""
    model: ModelConfig = field(default_factory=DecoderConfig)
    """What learns it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How it is scored when training ends."""
    track: TrackConfig = knob(factory=TrackConfig, affects_results=False)
    """Where metrics go beside metrics.jsonl."""
