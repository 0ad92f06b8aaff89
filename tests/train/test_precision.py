import pytest
import torch

from trivium.config import UserError
from trivium.train import precision
from trivium.train.precision import choose_device, choose_precision


def test_auto_takes_bfloat16_exactly_where_the_processor_has_it_and_says_why(monkeypatch):
    for capabilities, name in (({"avx2": True}, "float32"), ({"amx_bf16": True}, "bfloat16")):
        monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda found=capabilities: found)
        chosen = choose_precision("auto", torch.device("cpu"))
        assert chosen.name == name
        assert "bf" in chosen.reason


def test_the_model_runs_in_the_precision_asked_for():
    layer = torch.nn.Linear(4, 4)
    for name in ("float32", "bfloat16", "float16"):
        with choose_precision(name, torch.device("cpu")).autocast():
            assert layer(torch.ones(1, 4)).dtype == getattr(torch, name)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu!"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=r"train\.device"):
        choose_device(device)
