"""`thermocline doctor`: say what this machine has and which kernels will run."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import thermocline
from thermocline.cli.flags import JsonFlag
from thermocline.cli.output import write_json
from thermocline.cli.tables import facts, print_tables, size_of

if TYPE_CHECKING:
    from thermocline.api import Survey


def doctor(
    *,
    as_json: JsonFlag = False,
) -> int:
    """Say what this machine has, which kernels will run on it, and how fast it reads memory (measured now).

    For example:

      thermocline doctor

      thermocline doctor --json
    """
    survey = thermocline.examine(measure=True)
    if as_json:
        write_json(survey.as_dict() | {"thermocline": thermocline.__version__, "python": platform.python_version()})
    else:
        print_tables(facts(_rows(survey)))
    return 0


def _rows(survey: Survey) -> list[tuple[str, str]]:
    cores, memory, bandwidth = survey.cores, survey.memory, survey.bandwidth
    quota = f", limited to the time of {cores.quota:g}" if cores.quota is not None else ""
    limit = f", limited to {size_of(memory.limit)}" if memory.limit is not None else ""
    rows = [
        ("thermocline", f"{thermocline.__version__}, Python {platform.python_version()}"),
        ("system", survey.system),
        ("processor", cores.model),
        ("cores", f"{cores.physical} physical; {len(cores.allowed)} of {cores.logical} processors allowed{quota}"),
        ("threads", f"{cores.threads} by default"),
        ("kernels", f"{survey.isa[-1]} (this CPU runs {', '.join(survey.isa)}; choose with --isa)"),
        ("caches", ", ".join(f"{c.name} {size_of(c.size)} for {c.shared_by}" for c in survey.caches) or "unknown"),
        ("memory", f"{size_of(memory.total)}, {size_of(memory.available)} free{limit}"),
        ("pages", f"{size_of(memory.page)}, transparent huge pages: {memory.huge_pages}"),
    ]
    if bandwidth is not None:
        rows.append(
            ("reading", f"{bandwidth.single:.1f} GB/s with 1 thread, {bandwidth.all:.1f} with {bandwidth.threads}")
        )
    rows.append(("GPU", "not used: this version computes on the CPU"))
    return rows
