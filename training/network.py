"""The network: a llama-like decoder whose FFN is down(relu(up(x))^2), known elsewhere as `arcee`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 4096
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_width: int = 64
    neurons: int = 2048
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, for the half-split pairing of Hugging Face's llama."""
    steps = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float64), shape.rope_theta**-steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return x * scale * self.weight


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, shape.heads * shape.head_width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = self.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, length, count, shape.head_width).transpose(1, 2)

        v = heads(self.v_proj(x), shape.kv_heads)
        q = rotate(heads(self.q_proj(x), shape.heads), cos, sin).to(v.dtype)
        k = rotate(heads(self.k_proj(x), shape.kv_heads), cos, sin).to(v.dtype)
        repeat = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up_proj = nn.Linear(shape.width, shape.neurons, bias=False)
        self.down_proj = nn.Linear(shape.neurons, shape.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the neurons' activations (zero where a neuron is silent)."""
        activation = F.relu(self.up_proj(x))
        return self.down_proj(activation.square()), activation


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, activation = self.mlp(self.post_attention_layernorm(x))
        return x + y, activation


class Network(nn.Module):
    """Parameter names are those of `ArceeForCausalLM` without the `model.` prefix."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Every block starts as the identity: what it writes to the residual stream is zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif name == "embed_tokens.weight":
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The normed residual stream after the last layer, and every layer's activations."""
        x = self.embed_tokens(tokens)
        length = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        activations = []
        for layer in self.layers:
            x, activation = layer(x, cos, sin)
            activations.append(activation)
        return self.norm(x), activations

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, activations = self.hidden(tokens)
        return F.linear(x, self.embed_tokens.weight), activations

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross entropy; mean activation of each layer; share of firing neurons of each layer."""
        logits, activations = self(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        mean = torch.stack([a.float().mean() for a in activations])
        firing = torch.stack([(a > 0).float().mean() for a in activations]).detach()
        return loss, mean, firing
