"""Fits one layer's predictor with torch. Only whoever trains imports this file.

scores = fc2 · relu(fc1 · x), trained to tell the firing neurons by a balanced loss: binary cross-entropy in which
firing and silent neurons weigh the same in all, and a firing one by the root of its energy among the token's. Its
gradient is written out: the neurons' weights come from a table of what a byte of two levels means.

The start is not random. Whether a neuron fires is, but for the scale of the norm, the sign of W x, with W the first
matrix of the FFN times the norm's weights. Its best approximation of rank k on the tokens' residual streams is A B
(reduced-rank regression: the singular vectors of W C^1/2, C the second moments of x). fc1 begins as B and fc2 as A,
each direction turned so that it is positive more often than not; the last hidden unit looks along the mean of x, so
that every neuron has something like a bias to learn. Where ranks are left over, the strongest directions get a second
unit, which looks the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from thermocline.activity.capture import LayerData
from thermocline.activity.fit_state import Arrays, FitState
from thermocline.activity.training_device import TrainingDevice
from thermocline.config import TrainSettings
from thermocline.errors import NumericalError

Floats = npt.NDArray[np.float32]

RUN: Final = 16
"""Neighbouring tokens that are read together: on a disk, single ones would cost a seek each."""
MOMENT_TOKENS: Final = 1 << 14
"""Tokens from which moments are taken."""
MOMENT_ROWS: Final = 2048
"""Of which so many are widened at once."""
FAN_IN: Final = 256
"""Inputs up to which the learning rate is as it is set; more inputs move an output more, and have a smaller one."""
WARM_UP: Final = 0.1
"""Share of the steps in which the learning rate rises."""
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""What the optimizer knows of a matrix, beside the number of steps."""
SILENT: Final = -1.0
"""The sign of a silent neuron's weight."""
SPREAD: Final = 2.0
"""Standard deviation of the scores at the start: what a cross-entropy tells apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A layer's matrices, float32: `fc1` (rank, n_embd), `fc2` (n_ff, rank)."""

    fc1: Floats
    fc2: Floats


class Fitter:
    """Fits predictors of one layer at any rank.

    Args:
        data: the layer's tokens.
        first: (n_ff, n_embd), rows of the first matrix times the norm's weights; None starts at random.
        n_ff: neurons.
        device: where torch computes; without, what the settings ask for.

    Raises:
        HardwareError: a GPU was asked for and there is none, or a memory does not do.
    """

    def __init__(
        self,
        data: LayerData,
        first: Floats | None,
        n_ff: int,
        settings: TrainSettings,
        device: TrainingDevice | None = None,
    ) -> None:
        self._data, self._n_ff, self._settings = data, n_ff, settings
        self._device = device or TrainingDevice(settings.train_on)
        self._scale, self._mean, self._start = self._device.run(lambda: self._looked_at(first))

    def _looked_at(self, first: Floats | None) -> tuple[float, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """What a fit begins with, from the tokens: their scale, and in it their mean and directions."""
        sample = self._tensor(_spread(self._data.x, MOMENT_TOKENS))
        scale = float(sample.square().mean().sqrt()) or 1.0
        sample /= scale
        return scale, sample.mean(0), None if first is None else self._directions(self._tensor(first), sample)

    def fit(
        self,
        rank: int,
        share: float = 1.0,
        tick: Callable[[int], None] | None = None,
        state: FitState | None = None,
    ) -> Fitted:
        """A predictor of `rank`, after `share` of all steps; `tick` is called with the tokens of each step.

        The same data, settings and rank give the same numbers on the same machine with the same threads, and also where
        a fit goes on from what is kept in `state`.

        Raises:
            NumericalError: the loss is not finite.
            HardwareError: a memory does not do.
            OutputError: the state could not be written.
        """
        return self._device.run(lambda: self._fit(rank, share, tick, state))

    def _fit(self, rank: int, share: float, tick: Callable[[int], None] | None, state: FitState | None) -> Fitted:
        random = np.random.default_rng([self._settings.seed, rank])
        fc1, fc2 = self._initial(rank, random)
        groups = [{"params": [matrix], "scale": min(FAN_IN / matrix.shape[1], 1.0)} for matrix in (fc1, fc2)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        batch = min(self._settings.batch, max(len(self._data.x), 1))
        steps = max(1, round(share * self._settings.epochs * len(self._data.x) / batch))
        done, kept = (0, {}) if state is None else state.begin(rank, steps)
        if done:
            _restore(optimizer, {"fc1": fc1, "fc2": fc2}, kept, done)
        for _ in range(done):
            self._starts(random, batch)  # what these steps drew
        for step in range(done, steps):
            rate = min((step + 1) / max(WARM_UP * steps, 1), 1.0) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * self._settings.learning_rate
            self._step(fc1, fc2, optimizer, *self._batch(random, batch))
            if state is not None:
                state.save(rank, steps, step + 1, lambda: _state(optimizer, {"fc1": fc1, "fc2": fc2}))
            if tick is not None:
                tick(batch)
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (fc1, fc2)):
            raise NumericalError("training diverged: the matrices are not finite; use a smaller --learning-rate")
        return Fitted((fc1 / self._scale).cpu().numpy(), fc2.cpu().numpy())

    @staticmethod
    def _step(
        fc1: torch.Tensor, fc2: torch.Tensor, optimizer: torch.optim.Optimizer, x: torch.Tensor, weights: torch.Tensor
    ) -> None:
        hidden = torch.relu(x @ fc1.T)
        error = torch.sigmoid_(hidden @ fc2.T).add_(weights > 0, alpha=-1.0).mul_(weights.abs())
        fc1.grad, fc2.grad = ((error @ fc2) * (hidden > 0)).T @ x, error.T @ hidden
        optimizer.step()

    def scores(self, fitted: Fitted, x: npt.NDArray[np.float16]) -> Floats:
        """Scores (T, n_ff) of residual streams.

        Raises:
            HardwareError: a memory does not do.
        """
        return self._device.run(lambda: self._scores(fitted, x))

    def _scores(self, fitted: Fitted, x: npt.NDArray[np.float16]) -> Floats:
        with torch.no_grad():
            hidden = torch.relu(self._tensor(x) @ self._tensor(fitted.fc1).T)
            scores: Floats = (hidden @ self._tensor(fitted.fc2).T).cpu().numpy()
        return scores

    def _starts(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Where the runs of a batch begin."""
        length = min(RUN, count)
        return random.integers(0, len(self._data.x) - length + 1, -(-count // length))

    def _batch(self, random: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (T, n_embd) and the neurons' weights (T, n_ff), those of silent ones below zero."""
        rows = (self._starts(random, count)[:, None] + np.arange(min(RUN, count))).reshape(-1)[:count]
        packed = torch.from_numpy(np.ascontiguousarray(self._data.level[rows]))
        meaning = _meaning(packed, self._n_ff).to(self._device.name)
        weights = torch.nn.functional.embedding(packed.to(self._device.name).int(), meaning).flatten(1)
        return self._tensor(self._data.x[rows]) / self._scale, weights[:, : self._n_ff]

    def _initial(self, rank: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        n_embd = self._data.x.shape[1]
        noise = random.standard_normal((rank, n_embd), np.float32) / np.float32(np.sqrt(n_embd))
        fc1, fc2 = self._tensor(noise), torch.zeros(self._n_ff, rank, device=self._device.name)
        energy = float(self._mean.square().sum())
        if energy > 0:
            fc1[-1] = (self._mean / energy).to(self._device.name)
        if self._start is None:
            fc2.copy_(self._tensor(random.standard_normal((self._n_ff, rank), np.float32)) / np.sqrt(rank))
            return fc1, fc2
        a, b = (half.to(self._device.name) for half in self._start)  # which may have been another's
        k = min(rank - 1, len(b))
        more = min(rank - 1 - k, len(b))
        fc1[:k], fc1[k : k + more] = b[:k], -b[:more]
        fc2[:, :k], fc2[:, k : k + more] = a[:, :k], -a[:, :more]
        return fc1, fc2

    def _directions(self, first: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n_ff, n_embd) and B (n_embd, n_embd), whose first k columns and rows are the best of rank k."""
        moments = _moments(sample)
        moments.diagonal().add_(1e-6 * moments.diagonal().mean())
        root = torch.linalg.cholesky(moments)
        product = first.double() @ root
        values, vectors = torch.linalg.eigh(product.T @ product)
        vectors = vectors.flip(1)  # the largest first
        a, b = product @ vectors, torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
        side = torch.where(sample.double().mean(0) @ b.T < 0, -1.0, 1.0)
        spread = float((values.clamp_min(0).sum() / len(first)).sqrt()) or 1.0
        return (a * side * (SPREAD / spread)).float(), (b * side[:, None]).float()

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device.name)


def _state(optimizer: torch.optim.Optimizer, matrices: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """All that the next step depends on."""
    arrays = {}
    for name, matrix in matrices.items():
        arrays[name] = matrix.cpu().numpy()
        for moment in MOMENTS:
            arrays[f"{name}.{moment}"] = optimizer.state[matrix][moment].cpu().numpy()
    return arrays


def _restore(optimizer: torch.optim.Optimizer, matrices: Mapping[str, torch.Tensor], kept: Arrays, steps: int) -> None:
    """Put back what `_state` gave after so many steps, into memory that torch itself gave, where it computes alike."""
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.copy_(torch.from_numpy(kept[name].copy()))
            moments = {m: torch.zeros_like(matrix).copy_(torch.from_numpy(kept[f"{name}.{m}"].copy())) for m in MOMENTS}
            optimizer.state[matrix] = {"step": torch.tensor(float(steps)), **moments}


def _moments(sample: torch.Tensor) -> torch.Tensor:
    """Second moments (n_embd, n_embd) of rows, in float64: where rows repeat themselves they fill few directions, and
    float32's rounding would make the others' negative.
    """
    total = torch.zeros(sample.shape[1], sample.shape[1], dtype=torch.float64, device=sample.device)
    for start in range(0, len(sample), MOMENT_ROWS):
        wide = sample[start : start + MOMENT_ROWS].double()
        total += wide.T @ wide
    return total / len(sample)


def _meaning(packed: torch.Tensor, n_ff: int) -> torch.Tensor:
    """What each byte says of its two neurons' weights (256, 2), where the levels are those of `packed` (T, bytes): in
    all, firing ones add up to a half, and silent ones to minus a half.
    """
    byte = torch.arange(256)
    level = torch.stack([byte & 15, byte >> 4], 1)
    weight = torch.where(level > 0, torch.exp2((level.double() - 15) / 2), SILENT)
    often = torch.bincount(packed.flatten(), minlength=256)[:, None]
    fired = (often * weight.clamp_min(0)).sum().clamp_min(1e-9)
    padding = len(packed) * (2 * packed.shape[1] - n_ff)
    silent = ((often * (level == 0)).sum() - padding).clamp_min(1)
    return (weight / torch.where(level > 0, fired, silent) / 2).float()


def _spread(x: npt.NDArray[np.float16], most: int) -> npt.NDArray[np.float16]:
    """At most `most` rows, evenly spread."""
    return x[:: max(1, -(-len(x) // most))]


def fitters(settings: TrainSettings, tell: Callable[[str], None] | None) -> Callable[..., Fitter]:
    """What makes the fitters of a run's layers, all on one device.

    Raises:
        HardwareError: a GPU was asked for and there is none that torch can use.
    """
    return partial(Fitter, device=TrainingDevice(settings.train_on, tell))
