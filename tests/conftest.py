"""What holds for every test: one thread a process, and no test that fails because the machine is busy."""

import gc

import pytest

from tests.warm import warm, warm_workers  # noqa: F401  (fixtures for every test)

# The files that take longest, by processor time: `--dist loadfile` gives each to one process, and begun late such a
# file would keep one process busy while the other has nothing left.
LONGEST = (
    "contracts/test_mixers",
    "study/test_compare",
    "ops/test_simplicial_triton",
    "contracts/test_models",
    "hub/test_hf",
    "commands/test_commands",
    "train/test_mixtures",
    "commands/test_refusals",
    "generate/test_captured",
    "contracts/test_tasks",
    "ops/test_recurrence",
    "model/test_prefix_scan",
    "train/test_loop",
    "train/test_track",
    "study/test_jobs",
    "train/test_distributed",
    "study/test_recipes",
    "train/test_resume",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare a process that runs tests; the one that hands them out to others has no use for torch."""
    if session.config.getoption("dist", "no") != "no":
        return
    import torch
    from hypothesis import settings

    # Two pytest processes on two cores must not fight over them, and sums must not depend on who else runs.
    torch.set_num_threads(1)
    settings.register_profile("trivium", deadline=None)
    settings.load_profile("trivium")
    gc.disable()  # what is imported stays: looking through all of it again and again takes seconds


def pytest_collection_finish() -> None:
    """Look for garbage only among what tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
