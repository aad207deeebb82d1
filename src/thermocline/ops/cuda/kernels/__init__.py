"""The Triton kernels, tuned for one token at a time. Every one is in `KERNELS`, by its name."""

from thermocline.ops.cuda.kernels import attending, neurons, rows, vectors
from thermocline.ops.cuda.kernels.registry import KERNELS

__all__ = ["KERNELS", "attending", "neurons", "rows", "vectors"]
