"""Freed memory stays with the process."""

import resource

import pytest
import torch

from trivium.train.memory import keep_freed_memory, reset_peak


def test_memory_that_is_freed_and_taken_again_costs_no_page_faults():
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")
    size = 8 << 20

    def take() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(size // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    take()
    assert take() < 20 * size // 4096 // 10


def test_a_process_that_has_asked_a_gpu_for_nothing_is_given_its_counts_before_they_are_reset(monkeypatch):
    asked: list[str] = []
    for name in ("init", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: asked.append(name))
    reset_peak(torch.device("cpu"))
    assert not asked
    reset_peak(torch.device("cuda"))
    assert asked == ["init", "empty_cache", "reset_peak_memory_stats"]
