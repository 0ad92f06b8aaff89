import json
import logging
import resource

import pytest
import torch
from torch import nn

from trivium.config import UserError
from trivium.train import checkpoint
from trivium.train.checkpoint import (
    SCALARS,
    TENSORS,
    CheckpointError,
    list_checkpoints,
    load_model_tensors,
    model_tensors,
    newest_good,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
)


def tensors(value=1.0):
    return {"model.a": torch.full((50, 3), value), "rng.cpu.0": torch.arange(9, dtype=torch.uint8)}


def steps(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_a_checkpoint_comes_back_as_it_was_written_and_holds_no_pickle(tmp_path):
    path = save_checkpoint(tmp_path, 7, tensors(), {"tokens": 12, "seconds": 0.1 + 0.2}, keep=2)
    assert sorted(file.name for file in path.iterdir()) == [SCALARS, TENSORS]
    read, scalars = read_checkpoint(path)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors().items()
    )
    assert (scalars["step"], scalars["tokens"], scalars["seconds"]) == (7, 12, 0.1 + 0.2)


def test_only_the_newest_are_kept_in_the_order_of_their_numbers(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=2)
    assert steps(tmp_path) == ["step-10", "step-11"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]


def truncate(path):
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-20])


def flip_a_bit(path):
    content = bytearray((path / TENSORS).read_bytes())
    content[len(content) // 2] ^= 4
    (path / TENSORS).write_bytes(content)


def lose_the_tensors(path):
    (path / TENSORS).unlink()


def lose_the_scalars(path):
    (path / SCALARS).unlink()


def cut_the_scalars(path):
    (path / SCALARS).write_bytes((path / SCALARS).read_bytes()[:40])


def change_a_scalar(path):
    record = json.loads((path / SCALARS).read_text())
    (path / SCALARS).write_text(json.dumps(record | {"tokens": 999}))


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lose_the_tensors, lose_the_scalars, cut_the_scalars, change_a_scalar]
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, caplog, damage):
    good = save_checkpoint(tmp_path, 1, tensors(), {"tokens": 5}, keep=2)
    bad = save_checkpoint(tmp_path, 2, tensors(), {"tokens": 10}, keep=2)
    damage(bad)
    with caplog.at_level(logging.WARNING, "trivium"):
        assert newest_good(tmp_path) == good
    assert "step-2: damaged" in caplog.text
    with pytest.raises(CheckpointError):
        read_checkpoint(bad)


def test_a_damaged_checkpoint_is_written_again_and_never_counts_as_one_to_keep(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    truncate(tmp_path / "step-2")
    save_checkpoint(tmp_path, 2, tensors(), {}, keep=2)
    assert newest_good(tmp_path) == tmp_path / "step-2"
    truncate(tmp_path / "step-2")
    assert newest_good(tmp_path, rename_damaged=True) == tmp_path / "step-1"
    save_checkpoint(tmp_path, 3, tensors(), {}, keep=2)
    assert steps(tmp_path) == ["step-1", "step-3"]


def test_no_checkpoint_is_none(tmp_path):
    assert newest_good(tmp_path / "nowhere") is None


def test_a_full_disk_loses_no_earlier_checkpoint_and_leaves_nothing_half_written(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # the system refuses to write more, as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(tmp_path, 2, tensors(), {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    read_checkpoint(tmp_path / "step-1")


def test_a_disk_that_returns_other_bytes_is_noticed_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, tensors(), {}, keep=1)
    write = checkpoint.write_synced

    def flipping(path, content):
        write(path, content[:-1] + bytes([content[-1] ^ 1]) if path.name == TENSORS else content)

    monkeypatch.setattr(checkpoint, "write_synced", flipping)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        save_checkpoint(tmp_path, 2, tensors(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".step-3.abcd.tmp").mkdir()
    (tmp_path / ".step-3.abcd.tmp" / TENSORS).write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(2))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    model, other = Tied(), Tied()
    assert set(model_tensors(model)) == {"model.embedding.weight", "model.scale"}
    path = save_checkpoint(tmp_path, 1, model_tensors(model), {}, keep=1)
    load_model_tensors(other, read_checkpoint(path)[0], path)
    assert torch.equal(other.head.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path):
    stored = model_tensors(Tied(width=6))
    with pytest.raises(
        UserError, match=r"another model: embedding\.weight has the shape \(5, 6\), this model's is \(5, 4\)"
    ):
        load_model_tensors(Tied(), stored, tmp_path)
    with pytest.raises(UserError, match=r"it lacks embedding\.weight and 1 more"):
        load_model_tensors(Tied(), {}, tmp_path)
    with pytest.raises(UserError, match="it has the unknown bias"):
        load_model_tensors(Tied(), model_tensors(Tied()) | {"model.bias": torch.ones(1)}, tmp_path)
