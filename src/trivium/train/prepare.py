"""What a run needs beside its model: everything here can be wrong in a recipe, and nothing here touches a file."""

from dataclasses import dataclass

import numpy as np

from trivium.config import UserError
from trivium.data.stream import TrainStream
from trivium.evaluate.lengths import sized_by_pair
from trivium.evaluate.published import check_published
from trivium.model.base import ModelContext
from trivium.model.context import model_context
from trivium.ops import dispatch
from trivium.tasks.base import Task
from trivium.train.config import RunConfig
from trivium.train.curriculum import Curriculum
from trivium.train.groups import check_groups
from trivium.train.objectives import NextToken, make_objective
from trivium.train.plateau import Plateau
from trivium.train.pretrained import gpt2_weights
from trivium.train.run import weights_of
from trivium.train.schedule import Length, run_length
from trivium.train.track import load_extras


@dataclass(frozen=True)
class Prepared:
    """The task, what the model must know of it, the training problems, the run's end, what is validated on, stages,
    what a plateau does, and what is minimised."""

    task: Task
    context: ModelContext
    stream: TrainStream
    length: Length
    validation_indices: np.ndarray
    curriculum: Curriculum
    plateau: Plateau
    objective: NextToken


def prepare(config: RunConfig, processes: int = 1) -> Prepared:
    """Return what a run of `config` on `processes` devices needs; raise UserError for what cannot be.

    A study asks this before it starts a single run, so that a mistake ends it at once.
    """
    options = config.train
    # One that training never calls would be missed when it is over.
    dispatch.check_present(getattr(config.model, "backends", {}))
    task = config.task.build()
    context = model_context(task, config.model, config.evaluate.longest)
    batch = options.batch_examples(task.max_length - 1)
    if batch < processes:
        raise UserError(f"train.batch: {batch} examples cannot be shared by {processes} processes")
    stream = TrainStream(task, batch, options.seed, batch_tokens=options.batch_tokens)
    length = run_length(options, batch, stream.examples_in_epoch)
    validation_indices = task.distinct("validation", options.eval_examples)
    gpt2_weights(config, context)
    task.distinct("test", 1)  # what is missing would else be noticed after training
    check_published(task, config.evaluate.published, context.max_length)
    load_extras(config.track)
    if options.init_from is not None:
        weights_of(options.init_from)
    check_groups(options, config.model, context)
    curriculum = Curriculum(options.curriculum, task, options.eval_examples, options.chain_removal)
    objective = make_objective(options, task, config.model, processes, config.evaluate.longest)
    for _, sized in sized_by_pair(task, config.evaluate.pairs, objective.decoding, context.max_length):
        sized.example("test", 0)
    plateau = Plateau(options.plateau, task, batch)
    return Prepared(task, context, stream, length, validation_indices, curriculum, plateau, objective)
