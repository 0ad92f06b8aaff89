"""Which arithmetic the forward and backward pass use, and why; weights and moments stay in float32."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from trivium.config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a run on a device, with the reason for it."""

    name: str
    reason: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model runs."""
        if self.name == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


def has_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Say whether the processor computes in bfloat16 itself, and what tells so; emulation is slower than float32."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, _ = torch.cuda.get_device_capability(device)
        # is_bf16_supported() also says yes where bfloat16 is only emulated.
        return (major >= 8 or torch.version.hip is not None), f"{name}, compute capability {major}.x"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for feature in ("amx_bf16", "avx512_bf16", "bf16"):  # the last is the name on ARM
            if capabilities.get(feature):
                return True, f"the processor has {feature}"
        return False, "the processor has no bfloat16 arithmetic"
    return False, f"unknown for device {device.type}"


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Return the arithmetic for `requested` (auto, float32, bfloat16, float16) on `device`, and why."""
    if requested != "auto":
        if requested not in DTYPES:
            raise UserError(f"train.precision: {requested!r} is not allowed; auto, float32, bfloat16 or float16")
        return Precision(requested, "asked for", device.type)
    native, reason = has_bfloat16(device)
    return Precision("bfloat16" if native else "float32", f"auto: {reason}", device.type)


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """Return the device for `requested` (auto, cpu, cuda, cuda:1); raise UserError when it is not there."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise UserError(f"train.device: {requested!r} is not a device; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"train.device: {requested!r} is not supported; allowed: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise UserError(f"train.device: {requested!r} was asked for, this machine has {count} CUDA devices")
    return torch.device("cuda", index)
