"""Train epilimnion on the token arrays that `training.data` wrote.

    python -m training.train --run build/epilimnion --deadline 06:20   # or --minutes 90, or --steps 4000

Learning rates warm up, stay, and in the second half of the budget fall linearly to zero
(warmup-stable-decay, Hu et al., "MiniCPM", 2024). The budget may be wall-clock time: a run on a busy
machine sees fewer tokens, but always ends annealed. A run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.network import Network, Shape
from training.optimizer import optimisers


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    micro_windows: int = 4  # windows of the full context in one forward pass
    micro_batches: int = 3  # forward passes in one step
    short: int = 512  # sequence length until the decay begins, then the full context
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.1
    warmup: int = 30  # steps
    decay: float = 0.5  # share of the budget
    first_density: float = 0.5  # share of neurons allowed to fire at the start,
    density: float = 0.085  # and from `settled` of the budget on
    settled: float = 0.35
    penalty: float = 0.01  # first weight of the mean activation
    checkpoint_every: float = 240.0  # seconds
    validate_every: int = 100  # steps

    def rate(self, step: int, progress: float) -> float:
        """Share of the full learning rate."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, 1.0 - progress) / self.decay)

    def target(self, progress: float) -> float:
        """Share of neurons that should fire, falling geometrically."""
        part = min(1.0, progress / self.settled)
        ratio: float = (self.density / self.first_density) ** part
        return self.first_density * ratio


class Windows:
    """The training tokens as shuffled windows; the order is a function of seed and position alone."""

    def __init__(self, path: Path, length: int, seed: int) -> None:
        self.tokens: np.ndarray = np.load(path, mmap_mode="r")
        self.length, self.seed = length, seed
        self.per_epoch = (len(self.tokens) - 1) // length - 1  # one spare: each epoch starts at another offset
        self.epoch = -1
        self.starts = np.empty(0, dtype=np.int64)

    def take(self, position: int, count: int) -> Tensor:
        """Windows position..position+count, each with one token more for the last target."""
        rows = []
        for index in range(position, position + count):
            epoch, place = divmod(index, self.per_epoch)
            if epoch != self.epoch:
                generator = np.random.default_rng((self.seed, epoch))
                offset = generator.integers(self.length)
                self.starts = generator.permutation(self.per_epoch) * self.length + offset
                self.epoch = epoch
            start = self.starts[place]
            rows.append(self.tokens[start : start + self.length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


class Clock:
    """How much of the budget is used: of steps, or of seconds spent training."""

    def __init__(self, arguments: argparse.Namespace, elapsed: float) -> None:
        self.steps: int | None = arguments.steps
        self.begun = time.monotonic() - elapsed
        self.budget = math.inf
        if arguments.minutes:
            self.budget = arguments.minutes * 60
        elif arguments.deadline:
            now = datetime.now().astimezone()
            hour, minute = map(int, arguments.deadline.split(":"))
            until = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            until += timedelta(days=1) if until <= now else timedelta()
            self.budget = elapsed + (until - now).total_seconds()

    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def progress(self, step: int) -> float:
        return step / self.steps if self.steps else self.elapsed() / self.budget


class Thermostat:
    """A proportional-integral controller for each layer's penalty, on the logarithm of its firing share."""

    integral_gain, proportional_gain = 0.05, 2.0
    low, high = 0.01, 20.0

    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.error = torch.zeros_like(base)

    def penalty(self) -> Tensor:
        """Weight of each layer's mean activation in the loss."""
        return self.base * (self.proportional_gain * self.error).exp()

    def observe(self, firing: Tensor, target: float) -> None:
        """Turn up the layers in which too many neurons fire, turn down the others."""
        self.error = (firing.clamp(min=1e-6) / target).log().clamp(-1, 1)
        self.base = (self.base * (self.integral_gain * self.error).exp()).clamp(self.low, self.high)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@torch.no_grad()
def validate(network: Network, path: Path, device: str, count: int = 16) -> float:
    """Cross entropy on evenly spaced held-out windows; a quick look, `training.evaluate` is the measure."""
    tokens = np.load(path)
    length = network.shape.context
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    total = 0.0
    for start in starts:
        row = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None].to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            total += network.losses(row[:, :-1], row[:, 1:])[0].item()
    return total / count


class Trainer:
    def __init__(self, arguments: argparse.Namespace, shape: Shape, recipe: Recipe) -> None:
        self.run: Path = arguments.run
        self.device: str = arguments.device
        self.recipe = recipe
        self.network = Network(shape, recipe.seed).to(self.device)
        self.optimisers = optimisers(self.network, recipe.muon_lr, recipe.adam_lr, recipe.weight_decay)
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimisers]
        self.windows = Windows(self.run / "train.npy", shape.context, recipe.seed)
        self.losses = torch.compile(self.network.losses, dynamic=False)
        self.thermostat = Thermostat(torch.full((shape.layers,), recipe.penalty, device=self.device))
        self.step, self.position, self.elapsed = 0, 0, 0.0
        self.checkpoint = self.run / "checkpoint.pt"
        self.log = self.run / "log.jsonl"

    def resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.thermostat.base = state["penalty"]
        self.step, self.position, self.elapsed = state["step"], state["position"], state["elapsed"]
        lines = [line for line in self.log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
        self.log.write_text("".join(line + "\n" for line in lines))

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "penalty": self.thermostat.base,
            "step": self.step,
            "position": self.position,
            "elapsed": self.elapsed,
            "shape": self.network.shape.as_dict(),
            "recipe": asdict(self.recipe),
            "device": self.device,
        }
        write_checkpoint(self.checkpoint, state)

    def describe(self, clock: Clock) -> None:
        """What was asked for at each start, beside the log of what happened."""
        path = self.run / "run.json"
        starts = json.loads(path.read_text())["starts"] if self.step else []
        start = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "budget": {"steps": clock.steps} if clock.steps else {"seconds": round(clock.budget, 1)},
            "device": self.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        facts = {
            "shape": self.network.shape.as_dict(),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "starts": [*starts, start],
        }
        path.write_text(json.dumps(facts, indent=2) + "\n")

    def one_step(self, progress: float) -> dict[str, Any]:
        recipe = self.recipe
        rate, target, penalty = recipe.rate(self.step, progress), recipe.target(progress), self.thermostat.penalty()
        length = recipe.short if progress < 1 - recipe.decay else self.network.shape.context
        sums: list[Tensor] = []
        for _ in range(recipe.micro_batches):
            rows = self.windows.take(self.position, recipe.micro_windows).to(self.device)
            self.position += recipe.micro_windows
            tokens, targets = rows[:, :-1].reshape(-1, length), rows[:, 1:].reshape(-1, length)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss, activity, firing = self.losses(tokens, targets)
            total = (loss + (penalty * activity).mean()) / recipe.micro_batches
            torch.autograd.backward(total)
            sums.append(torch.cat((loss.detach()[None], activity.detach(), firing)) / recipe.micro_batches)
        loss, activity, firing = torch.split(torch.stack(sums).sum(0), [1, *2 * [len(penalty)]])
        for optimiser, bases in zip(self.optimisers, self.base_rates, strict=True):
            for group, base in zip(optimiser.param_groups, bases, strict=True):
                group["lr"] = base * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.thermostat.observe(firing, target)
        self.step += 1
        return {
            "loss": loss.item(),
            "rate": rate,
            "length": length,
            "target": target,
            "firing": firing.tolist(),
            "activity": activity.tolist(),
            "penalty": penalty.tolist(),
        }

    def train(self, clock: Clock) -> None:
        self.describe(clock)
        saved = time.monotonic()
        while (progress := clock.progress(self.step)) < 1:
            entry = self.one_step(progress)
            if not math.isfinite(entry["loss"]):
                raise SystemExit(f"the loss is not finite at step {self.step}: resume with a lower rate")
            self.elapsed = clock.elapsed()
            entry |= {"step": self.step, "progress": progress, "seconds": self.elapsed}
            entry["tokens"] = self.position * self.windows.length
            if self.step % self.recipe.validate_every == 0:
                entry["held_out_loss"] = validate(self.network, self.run / "held_out.npy", self.device)
            with self.log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if time.monotonic() - saved > self.recipe.checkpoint_every:
                self.save()
                saved = time.monotonic()
        self.save()


def parse() -> tuple[argparse.Namespace, Shape, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that training.data prepared")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int)
    budget.add_argument("--minutes", type=float)
    budget.add_argument("--deadline", help="HH:MM, local time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    for group in (Shape, Recipe):
        for field in fields(group):
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    values = vars(arguments)
    shape = Shape(**{field.name: values[field.name] for field in fields(Shape)})
    return arguments, shape, Recipe(**{field.name: values[field.name] for field in fields(Recipe)})


def main() -> None:
    arguments, shape, recipe = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe.seed)  # nothing draws from it today; the data order has its own generator
    trainer = Trainer(arguments, shape, recipe)
    if trainer.checkpoint.exists() and not arguments.fresh:
        trainer.resume()
    else:
        trainer.log.write_text("")
    trainer.train(Clock(arguments, trainer.elapsed))


if __name__ == "__main__":
    main()
