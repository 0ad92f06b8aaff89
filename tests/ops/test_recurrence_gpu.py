"""flash-linear-attention's own kernels against the float64 recurrence, on a CUDA device that has them."""

import pytest

from trivium.bench.agreement import DTYPES, OPERATORS, Case, told
from trivium.ops.recurrence import fla_missing

pytestmark = pytest.mark.skipif(fla_missing() is not None, reason=f"fla: {fla_missing()}")


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("tokens", [1, 7, 24, 63, 100, 300])
def test_output_state_and_every_gradient_equal_the_recurrence(name: str, tokens: int, dtype: str, documents: bool):
    row = Case(name, tokens, dtype, documents).compare("fla", "cuda")
    assert row["agrees"], told(row)
    if row["gradients"] != "compared":
        pytest.skip(f"output and state agree; {row['gradients']}")
