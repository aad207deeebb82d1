"""Which device computes, and what is missing where none does."""

from __future__ import annotations

import torch

from thermocline.errors import HardwareError, UsageError
from thermocline.hardware.gpu_software import gpu_lacks
from thermocline.ops.factory import interpreted


def open_device(name: str) -> tuple[torch.device, str]:
    """The device called `name` (`auto` takes the GPU, or the interpreter where it is on), and a name for reports.

    Raises:
        UsageError: it is not the first, on which kernels are launched.
        HardwareError: there is none; the message names the remedy.
    """
    if name == "auto":
        name = "cpu" if interpreted() else "cuda"
    device = torch.device(name)
    if device.type == "meta":
        return device, "cuda/none"
    if device.index:
        raise UsageError(
            f"kernels run on the first GPU that this process sees, and not on {name}; set "
            f"CUDA_VISIBLE_DEVICES={device.index} (HIP_VISIBLE_DEVICES where it is AMD's) before the start"
        )
    if interpreted():
        if device.type == "cpu":
            return device, "cuda/interpreter"
        raise HardwareError(f"TRITON_INTERPRET=1 runs kernels on CPU tensors, not on {name}; unset it to use the GPU")
    if device.type == "cpu":
        raise HardwareError("kernels run on CPU tensors only with TRITON_INTERPRET=1 set before the start")
    if not torch.cuda.is_available():
        lacks = gpu_lacks() or (
            "torch finds no GPU; look at the driver, and at CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES",
        )
        raise HardwareError(". ".join(lacks))
    return device, f"cuda/{torch.cuda.get_device_name(device)}"
