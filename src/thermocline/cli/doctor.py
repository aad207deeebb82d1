"""`thermocline doctor`: say what this machine has and what it can do."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table

import thermocline
from thermocline.cli.flags import JsonFlag, flag
from thermocline.cli.output import status, write_json
from thermocline.cli.tables import facts, print_tables, size_of

if TYPE_CHECKING:
    from thermocline.api import Probe, Survey

DISK_HELP = "File (such as a model) or folder whose disk to measure; without, that of the user's cache folder."


def doctor(
    *,
    refresh: Annotated[bool, flag("--refresh", help="Measure again what was measured before.")] = False,
    disk: Annotated[str | None, flag("--disk", help=DISK_HELP)] = None,
    as_json: JsonFlag = False,
) -> int:
    """Say what this machine has, which kernels will run on it, and how fast its memory and its disk are.

    Measuring takes some seconds, once; the results are kept in the user's cache folder, for `plan` too.

    For example:

      thermocline doctor

      thermocline doctor --refresh --disk model.gguf

      thermocline doctor --json
    """
    survey, probe = thermocline.probe_machine(
        refresh=refresh, disk=None if disk is None else Path(disk), tell=lambda line: status(f"{line} ...")
    )
    if as_json:
        found = {key: value for key, value in survey.as_dict().items() if key != "bandwidth"}
        versions = {"thermocline": thermocline.__version__, "python": platform.python_version()}
        write_json(found | {"probe": probe.as_dict()} | versions)
    else:
        print_tables(facts(_rows(survey, probe)), *_both_at_once(probe), *_disk_tables(probe))
    return 0


def _rows(survey: Survey, probe: Probe) -> list[tuple[str, str]]:
    cores, memory = survey.cores, survey.memory
    quota = f", limited to the time of {cores.quota:g}" if cores.quota is not None else ""
    limit = f", limited to {size_of(memory.limit)}" if memory.limit is not None else ""
    speeds = ", ".join(f"{rate / 1e9:.1f} GB/s with {_threads(n)}" for n, rate in probe.memory.by_threads)
    return [
        ("thermocline", f"{thermocline.__version__}, Python {platform.python_version()}"),
        ("system", survey.system),
        ("processor", cores.model),
        ("cores", f"{cores.physical} physical; {len(cores.allowed)} of {cores.logical} processors allowed{quota}"),
        ("threads", f"{cores.threads} by default"),
        ("kernels", f"{survey.kernels} (this CPU runs {', '.join(survey.isa)}; choose with --isa)"),
        ("caches", ", ".join(f"{c.name} {size_of(c.size)} for {c.shared_by}" for c in survey.caches) or "unknown"),
        ("memory", f"{size_of(memory.total)}, {size_of(memory.available)} free{limit}"),
        ("pages", f"{size_of(memory.page)}, transparent huge pages: {memory.huge_pages}"),
        ("reading memory", speeds),
        ("packed weights", f"{probe.memory.unpacking[-1][1] / 1e9:.1f} billion numbers/s of Q4_0, for one token"),
        ("rows apart", f"{probe.memory.sparse:.0%} of that bandwidth, where a tenth of the neurons fires"),
        ("in batches", f"{probe.memory.sparse_batch:.0%} of what rows reach that are neighbours"),
        ("beside a device", f"{probe.memory.beside_device / 1e9:.1f} GB/s for half of the threads while others read"),
        ("products", f"{probe.flops / 1e9:.0f} billion operations/s over many tokens (F16 weights)"),
        ("launch", f"{probe.launch * 1e6:.1f} µs to start an op on all threads"),
        ("hand-over", f"{probe.handover * 1e6:.1f} µs to wake another thread"),
        *_step_rows(probe),
        *_gpu_rows(probe),
        *(("GPU lacks", lack) for lack in survey.gpu_lacks),
        *_disk_rows(probe),
        *(("not measured", reason) for reason in probe.unmeasured),
        *((("in doubt", f"{probe.doubt}; measure again when the machine is idle"),) if probe.doubt else ()),
        ("measured", time.strftime("%Y-%m-%d %H:%M", time.localtime(probe.measured)) + "; again with --refresh"),
    ]


def _step_rows(probe: Probe) -> list[tuple[str, str]]:
    """What a step takes beside what it reads."""
    steps = probe.steps
    if steps is None:
        return []
    calls, between = steps.host, steps.between
    layer = calls.attention + calls.predictor + calls.ffn
    return [
        (
            "a step's calls",
            f"{layer * 1e6:.0f} µs a layer, and {(calls.head + between) * 1e6:.0f} µs beside the layers",
        ),
        ("emulated device", f"{steps.crossing * 1e6:.0f} µs a crossing, {steps.meeting * 1e6:.0f} µs where both work"),
    ]


def _gpu_rows(probe: Probe) -> list[tuple[str, str]]:
    if not probe.gpus:
        return [("GPU", "none found; --device emulated runs the same code with part of the RAM")]
    rows = []
    for gpu, speed in zip(probe.gpus, probe.gpu_speeds, strict=True):
        link = f"PCIe {gpu.pcie} x{gpu.lanes}" if gpu.pcie and gpu.lanes else "link unknown"
        rows.append(("GPU", f"{gpu.name}, {size_of(gpu.total)} of VRAM, {link}, driver {gpu.driver}"))
        if speed is not None:
            rows += [
                ("VRAM", f"{speed.vram / 1e9:.0f} GB/s; products {speed.flops / 1e12:.1f} tera-operations/s"),
                ("rows apart", f"{speed.sparse:.0%} of that, where they are copied"),
                ("link", f"{speed.link / 1e9:.1f} GB/s from pinned memory"),
                ("GPU costs", f"{speed.launch * 1e6:.1f} µs a launch, {speed.crossing * 1e6:.1f} µs a crossing"),
            ]
    return rows


def _disk_rows(probe: Probe) -> list[tuple[str, str]]:
    rows = []
    for disk in probe.disks:
        way = "direct reads" if disk.direct else "no direct reads here: these went through the page cache"
        rows.append((f"disk {disk.name}", f"{disk.filesystem}, {way}; {disk.sequential / 1e6:.0f} MB/s in sequence"))
    return rows


def _both_at_once(probe: Probe) -> list[Table]:
    """What is left of each of two bandwidths while the other is used too."""
    ram, pairs = ("RAM", probe.memory.best), []
    for gpu, speed in zip(probe.gpus, probe.gpu_speeds, strict=True):
        if speed is not None:
            vram, link = (f"VRAM of {gpu.name}", speed.vram), (f"link to {gpu.name}", speed.link)
            pairs += [
                (ram, speed.ram_beside_vram, vram, speed.vram_beside_ram),
                (ram, speed.ram_beside_link, link, speed.link_beside_ram),
                (vram, speed.vram_beside_link, link, speed.link_beside_vram),
            ]
    for disk in probe.disks:
        if disk.beside_ram and disk.ram_beside:
            reads = (f"{disk.name}, reads of 64 KiB", disk.disk.curve.bandwidth(64 << 10))
            pairs.append((ram, disk.ram_beside, reads, disk.beside_ram))
    table = Table("of", "alone", "while using", "is left", title="two at once")
    for (one, alone), left, (other, apart), right in pairs:
        table.add_row(one, _rate(alone), other, _rate(left))
        table.add_row(other, _rate(apart), one, _rate(right))
    return [table] if pairs else []


def _disk_tables(probe: Probe) -> list[Table]:
    """Of every disk how fast random reads are, by their size and by how many are in flight."""
    tables = []
    for disk in probe.disks:
        depths = sorted({depth for _, depth, _ in disk.random})
        table = Table("random reads of", *(f"{depth} in flight" for depth in depths), title=f"{disk.name}, MB/s")
        for column in table.columns[1:]:
            column.justify = "right"
        rates = {(size, depth): rate for size, depth, rate in disk.random}
        for size in sorted({size for size, _, _ in disk.random}):
            table.add_row(size_of(size), *(f"{rates[size, depth] / 1e6:.0f}" for depth in depths))
        tables.append(table)
    return tables


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
