"""Stages follow one another when their criterion holds, and a resumed run goes on where it was."""

import logging

import pytest

from tests.train.tiny import rows, tiny_config, weights
from trivium.config import UserError, from_dict, to_dict
from trivium.tasks.group_words import GroupWordsConfig
from trivium.tasks.jsonl import JsonlConfig
from trivium.train import loop
from trivium.train.config import CurriculumConfig, RunConfig
from trivium.train.curriculum import Curriculum
from trivium.train.loop import train
from trivium.train.state import Position, TrainingState

TASK = GroupWordsConfig(group="S3", max_length=12).build()


def scored(value, asked=None):
    """Return a score function that gives `value` to every metric and notes which stages it was asked for."""

    def score(indices, stage):
        if asked is not None:
            asked.append((len(indices), stage))
        return {"loss": value, "token_accuracy": value, "exact_match": value, "count": len(indices)}

    return score


def test_stages_follow_one_another_and_then_the_whole_task():
    curriculum = Curriculum(CurriculumConfig(lengths=(4, 8), advance_at=0.7), TASK, 10)
    at, asked = Position(stage=curriculum.first), []
    assert at.stage == 4
    row = curriculum.advance(at, scored(0.69, asked))
    assert (at.stage, at.stage_evaluations, row["stage"], row["advanced"]) == (4, 1, 4, False)
    row = curriculum.advance(at, scored(0.7, asked))
    assert (at.stage, at.stage_evaluations, row["stage"], row["advanced"]) == (8, 0, 4, True)
    curriculum.advance(at, scored(1.0, asked))
    assert at.stage == 0
    assert curriculum.advance(at, scored(1.0, asked)) is None
    assert asked == [(10, 4), (10, 4), (10, 8)]


def test_a_loss_has_to_fall_and_an_accuracy_to_rise():
    at = Position(stage=4)
    curriculum = Curriculum(CurriculumConfig(lengths=(4,), metric="loss", advance_at=0.2), TASK, 10)
    curriculum.advance(at, scored(0.21))
    assert at.stage == 4
    curriculum.advance(at, scored(0.2))
    assert at.stage == 0


def test_a_curriculum_that_does_not_advance_warns_once(caplog):
    curriculum = Curriculum(CurriculumConfig(lengths=(4, 8), warn_after=3), TASK, 10)
    at = Position(step=60, stage=4)
    with caplog.at_level(logging.WARNING, "trivium"):
        for _ in range(2):
            curriculum.advance(at, scored(0.25))
        assert not caplog.messages
        for _ in range(4):
            curriculum.advance(at, scored(0.25))
    assert caplog.messages == [
        "step 60: the curriculum has not gone on from length 4 in 3 evaluations: exact_match is 0.25, to go on to "
        "length 8 it has to be at least 0.9"
    ]


def test_a_stage_is_left_after_its_most_evaluations_whatever_its_score():
    curriculum = Curriculum(CurriculumConfig(lengths=(4, 8), most_evaluations=2), TASK, 10)
    at = Position(stage=4)
    seen = []
    for _ in range(4):
        row = curriculum.advance(at, scored(0.25))
        seen.append((row["stage"], row["advanced"], row["held"]))
    assert seen == [(4, False, False), (4, True, False), (8, False, False), (8, True, False)]
    assert at.stage == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(config_of(), folder)


def config_of(dropout=0.1, **curriculum):
    data = to_dict(tiny_config({"positions": "none", "dropout": dropout}))
    data["task"] = {"kind": "group_words", "group": "S3", "max_length": 9}
    data["train"] |= {"curriculum": {"lengths": [4, 6], "metric": "loss", "advance_at": 100.0, **curriculum}}
    data["evaluate"] |= {"lengths": [9, 20]}
    return from_dict(RunConfig, data)


class StoppedError(Exception):
    pass


def stopping_at(last, save):
    """Return a `save` that ends the run once the checkpoint of step `last` is written."""

    def stops(folder, step, *arguments, **named):
        path = save(folder, step, *arguments, **named)
        if step == last:
            raise StoppedError
        return path

    return stops


def test_a_run_trains_on_the_lengths_of_its_stage(finished):
    folder, result = finished
    stages = [(row["step"], row["stage"]) for row in rows(folder, "train")]
    # Evaluations stand at steps 4 and 8: the rows at those steps are of the stage that ends there.
    assert stages == [(2, 4), (4, 4), (6, 6), (8, 6), (10, 0), (12, 0)]
    assert [(row["step"], row["stage"], row["advanced"]) for row in rows(folder, "stage")] == [
        (4, 4, True),
        (8, 6, True),
    ]
    assert [row["step"] for row in rows(folder, "validation")] == [4, 8, 12]
    assert result["stage"] == 0
    tokens = [row["tokens"] for row in rows(folder, "train")]
    assert tokens[1] <= 4 * 16 * 4
    assert list(result["evaluation"]["by_length"]) == ["9", "20"]


def test_a_continued_run_ends_as_an_unbroken_one(finished, tmp_path, monkeypatch):
    whole = finished[0]
    saved = loop.save_checkpoint
    for last in (3, 6, 9):
        folder = tmp_path / str(last)
        monkeypatch.setattr(loop, "save_checkpoint", stopping_at(last, saved))
        with pytest.raises(StoppedError):
            train(config_of(), folder)
        monkeypatch.setattr(loop, "save_checkpoint", saved)
        train(config_of(), folder)
        assert rows(folder) == rows(whole)
        assert weights(folder) == weights(whole)


def test_a_stage_that_is_not_kept_is_caught(finished, tmp_path, monkeypatch):
    """Twin of the test above: a checkpoint that forgets its stage gives another run."""
    scalars = TrainingState.scalars
    monkeypatch.setattr(TrainingState, "scalars", lambda self: scalars(self) | {"stage": 4})
    saved = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", stopping_at(9, saved))
    with pytest.raises(StoppedError):
        train(config_of(), tmp_path / "run")
    monkeypatch.setattr(loop, "save_checkpoint", saved)
    train(config_of(), tmp_path / "run")
    assert rows(tmp_path / "run") != rows(finished[0])


def test_without_lengths_nothing_is_said_of_stages(tmp_path):
    result = train(tiny_config(steps=4, save_every=4), tmp_path / "run")
    assert "stage" not in result
    assert all("stage" not in row for row in rows(tmp_path / "run"))


@pytest.mark.parametrize(
    ("curriculum", "says"),
    [
        ({"lengths": [6, 4]}, "ascending"),
        ({"lengths": [9]}, r"train.curriculum.lengths: 9: .*whole task"),
        ({"lengths": [4], "metric": "exact_match", "advance_at": 1.5}, "advance_at"),
        ({"warn_after": 0}, "warn_after"),
        ({"metric": "speed"}, "metric"),
    ],
)
def test_wrong_curricula_are_refused_before_the_folder_is_touched(curriculum, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train(config_of(**curriculum), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_without_lengths_has_no_curriculum(tmp_path):
    task = JsonlConfig.examples(tmp_path)[0].build()
    with pytest.raises(UserError, match=r"lengths: 3: the problems of task 'jsonl' have no length"):
        Curriculum(CurriculumConfig(lengths=(3,)), task, 5)
