"""What holds for every test: one thread a process, and no test that fails because the machine is busy."""

import torch
from hypothesis import settings

from tests.warm import warm  # noqa: F401  (a fixture for every test)

# Two pytest processes on two cores must not fight over them, and sums must not depend on who else runs.
torch.set_num_threads(1)

settings.register_profile("trivium", deadline=None)
settings.load_profile("trivium")
