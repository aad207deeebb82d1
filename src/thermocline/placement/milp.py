"""The same choice as a mixed-integer linear programme, for HiGHS.

One binary a part and option, and the flow of homes along the chain: each part takes one option, the option's home
is where the flow passes, a flow from one home to another pays the crossing, and the two budgets are two rows. It
is the tight formulation of a knapsack with multiple choices: its linear relaxation is the priced bound.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thermocline.errors import UsageError
from thermocline.placement.choices import Choices
from thermocline.placement.prices import Open, Path, path_of

Ints = npt.NDArray[np.int64]


def solve_milp(choices: Choices, parts: list[Open], *, seconds: float, gap: float) -> tuple[Path | None, float | None]:
    """The optimum over the given options and HiGHS's bound (Huangfu and Hall 2018), by `scipy.optimize.milp`.

    Stops after `seconds` or at a relative `gap`. No path: nothing fits, or nothing was found in time. No
    bound: the time did not suffice for one.

    Raises:
        UsageError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise UsageError("the solver milp needs scipy: pip install scipy, or use --solver greedy") from error
    homes, n = len(choices.homes), len(parts)
    sizes = [len(p.home) for p in parts]
    first = np.concatenate([[0], np.cumsum(sizes)])
    options, flows = int(first[-1]), (n - 1) * homes * homes
    cost = np.concatenate([*(p.cost for p in parts), np.tile(choices.edge.ravel(), n - 1)])

    row: list[Ints] = []
    column: list[Ints] = []
    value: list[npt.NDArray[np.float64]] = []

    def entries(rows: Ints, columns: Ints, values: float) -> None:
        row.append(rows)
        column.append(columns)
        value.append(np.full(len(rows), values))

    lower, count = [], 0
    for i, part in enumerate(parts):  # one option each
        entries(np.full(sizes[i], count), np.arange(first[i], first[i + 1]), 1.0)
        lower.append(1.0)
        count += 1
        for step, fixed in ((i - 1, 1), (i, 0)):  # flow into and out of each home
            if not 0 <= step < n - 1:
                continue
            for h in range(homes):
                mine = np.flatnonzero(part.home == h)
                entries(np.full(len(mine), count), first[i] + mine, 1.0)
                pairs = np.array([(g, h) if fixed else (h, g) for g in range(homes)])
                flow = options + step * homes * homes + pairs[:, 0] * homes + pairs[:, 1]
                entries(np.full(homes, count), flow, -1.0)
                lower.append(0.0)
                count += 1
    upper = list(lower)
    for name, limit in zip(("vram", "ram"), choices.limits, strict=True):
        amounts = np.concatenate([getattr(p, name) for p in parts])
        scale = max(1.0, float(amounts.max()))
        used = np.flatnonzero(amounts)
        row.append(np.full(len(used), count))
        column.append(used)
        value.append(amounts[used] / scale)
        lower.append(-np.inf)
        # Scaled rows are met within 1e-7 or so: what HiGHS returns is held to whole bytes afterwards.
        upper.append(limit / scale)
        count += 1
    matrix = csr_array(
        (np.concatenate(value), (np.concatenate(row), np.concatenate(column))), shape=(count, options + flows)
    )
    # HiGHS stops at absolute tolerances too: times are given to it in thousandths of the sum of the cheapest options.
    unit = max(sum(float(p.cost.min()) for p in parts), 1e-12) / 1000
    result = milp(
        cost / unit,
        constraints=LinearConstraint(matrix, lower, upper),
        bounds=Bounds(0, 1),
        integrality=np.append(np.ones(options), np.zeros(flows)),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    bound = None if result.mip_dual_bound is None else float(result.mip_dual_bound) * unit
    if result.x is None:
        return None, bound
    picks = [int(result.x[first[i] : first[i + 1]].argmax()) for i in range(n)]
    at = [(int(p.home[k]), int(p.option[k])) for p, k in zip(parts, picks, strict=True)]
    path = path_of(choices, np.array([h for h, _ in at], np.int64), np.array([o for _, o in at], np.int64))
    fits = path.vram <= choices.limits[0] and path.ram <= choices.limits[1]
    return (path if fits else None), bound
