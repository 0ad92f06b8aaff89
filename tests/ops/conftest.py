"""Where Triton runs when there is no GPU."""

from collections.abc import Iterator

import pytest

from tests.ops import triton_cases


@pytest.fixture(scope="session", autouse=True)
def _the_interpreter_ends() -> Iterator[None]:
    yield
    triton_cases.end_interpreter()
