import pytest
import torch

from trivium import cli
from trivium.bench.threads import processor_threads


def test_torch_computes_with_the_threads_that_are_named_and_with_its_own_again_afterwards():
    before = torch.get_num_threads()
    with processor_threads(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with processor_threads(None) as used:
        assert used == before


@pytest.mark.parametrize("command", ["train", "generate", "latency"])
def test_a_count_of_threads_below_one_is_refused_in_a_line(command, capsys):
    assert cli.main(["bench", command, "--threads", "-1"]) == 2
    assert "threads: expected 1 or more, got -1" in capsys.readouterr().err
