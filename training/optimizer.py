"""Muon for the hidden matrices, AdamW for the embedding and the gains.

Muon is Keller Jordan's optimiser (https://kellerjordan.github.io/posts/muon/, 2024): momentum whose
direction is replaced by the nearest semi-orthogonal matrix, approached with five quintic
Newton-Schulz steps. The decoupled weight decay follows Liu et al., "Muon is Scalable for LLM
Training" (2025). Matrices of one shape are stacked, so each step is a few batched products.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a stack of matrices towards one."""
    a, b, c = QUINTIC
    x: Tensor = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                stacks[parameter.shape].append(parameter)
            for shape, parameters in stacks.items():
                directions = orthogonalise(torch.stack([self.direction(p, group) for p in parameters]))
                stretch = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * stretch)

    def direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov momentum of the gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum"], group["momentum"])


def optimisers(network: nn.Module, muon_lr: float, adam_lr: float, decay: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in network.named_parameters() if "embed" in n]
    gains = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": embedding, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, fused=True)
    return [Muon(matrices, muon_lr, weight_decay=decay), adam]
