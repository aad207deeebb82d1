"""`thermocline plan`: decide what lives where, predict the speed, and compare plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.table import Table

import thermocline
from thermocline.cli.flags import JsonFlag, ModelFlag, count, device_name, flag, mode_flag
from thermocline.cli.output import status, write_json
from thermocline.cli.tables import facts, print_tables, size_of
from thermocline.config import LoadSettings, Mode
from thermocline.errors import UsageError, printable

if TYPE_CHECKING:
    from thermocline.api import Planned, PlanTable

HELP = """Decide what of a model lives in which memory, and predict how fast it runs.

For example:

  thermocline plan -m model.gguf --ram-budget 4GiB -o plan.json

  thermocline plan -m model.gguf --machine rtx-4090+i9-13900k --vram-budget 8GiB --explain

  thermocline plan diff plan.json other.json

  thermocline plan --list-machines"""

plan = App(name="plan", help=HELP, help_format="plaintext", result_action="return_value")

BUDGET = (
    "of VRAM that may be used: 8GiB, 80% (of an emulated device: of the weights), auto (what is free), or a bare "
    "number of GiB."
)
ACTIVITY = "What `profile` or `order` wrote; without, what lies beside the model or is inside it."
MACHINE = "auto (this one), or parts of the catalogue joined by +, such as rtx-4090+i9-13900k+ddr5-6000+32gib."
DEVICE = (
    "cpu: plan without a GPU; emulated: with a second device that uses half of the threads and part of the RAM as "
    "VRAM; cuda, or cuda:1: with the GPU, or that of a number; auto: with the GPU where there is one."
)
GPU = "Which GPU, where there are several: its number, its UUID or a part of its name; without, the first."
RATIO = "Prompt to output, such as 4:1, of the tokens that --prompt-tokens and --output-tokens make together."
LATENCY = "Milliseconds to the first token that the placement should meet."
METHOD = "greedy (a second), or milp (HiGHS: slower, with its own bound)."
IMPORT = "PowerInfer's GPU index (MODEL.generated.gpuidx) to make the plan of; needs -o, beside which its order goes."


@plan.default
def make(
    *,
    model: ModelFlag = None,
    activity: Annotated[str | None, flag("--activity", "-a", help=ACTIVITY)] = None,
    vram_budget: Annotated[str, flag("--vram-budget", hyphen=True, help=f"Bytes {BUDGET}")] = "auto",
    ram_budget: Annotated[str, flag("--ram-budget", hyphen=True, help="The same of RAM.")] = "auto",
    ctx_size: Annotated[int, count("--ctx-size", "-c", help="Context in tokens; 0: the model's, up to 4096.")] = 0,
    machine: Annotated[str, flag("--machine", help=MACHINE)] = "auto",
    device: Annotated[str, Parameter(name="--device", help=DEVICE, converter=device_name, n_tokens=1)] = "auto",
    gpu: Annotated[str | None, flag("--gpu", help=GPU)] = None,
    prompt_tokens: Annotated[int, count("--prompt-tokens", help="Tokens of a prompt.")] = 256,
    output_tokens: Annotated[int, count("--output-tokens", help="Tokens of an answer.")] = 256,
    ratio: Annotated[str | None, flag("--ratio", help=RATIO)] = None,
    batch: Annotated[int, count("--parallel", "-np", help="Sequences at once.")] = 1,
    ubatch: Annotated[int, count("--ubatch-size", "-ub", help="Most prompt tokens of one pass.")] = 512,
    latency_target: Annotated[float | None, flag("--latency-target", hyphen=True, help=LATENCY)] = None,
    mode: Annotated[Mode, mode_flag("How the FFN is computed.")] = Mode.AUTO,
    predictor: Annotated[str | None, flag("--predictor", help="Predictor; without, the model's own.")] = None,
    method: Annotated[str, flag("--method", help=METHOD)] = "greedy",
    gpu_index: Annotated[str | None, flag("--import-gpuidx", help=IMPORT)] = None,
    export: Annotated[str | None, flag("--export-gpuidx", help="PowerInfer's GPU index to write.")] = None,
    output: Annotated[str | None, flag("--output", "-o", help="Plan to write, such as plan.json.")] = None,
    explain: Annotated[bool, flag("--explain", help="Say also what binds, and what would help.")] = False,
    list_machines: Annotated[bool, flag("--list-machines", help="Print the catalogue of machines.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Decide what of a model lives in which memory, and predict how fast it runs.

    For example:

      thermocline plan -m model.gguf --ram-budget 4GiB -o plan.json
    """
    if list_machines:
        return _list(as_json)
    if gpu_index is not None and output is None:
        raise UsageError("--import-gpuidx makes a new order of the neurons, which a plan needs beside it; add -o PLAN")
    prompt, answer = _shared(ratio, prompt_tokens, output_tokens)
    planned = thermocline.plan(
        model,
        load=LoadSettings(ctx_size=ctx_size, ubatch=ubatch, mode=mode, predictor=predictor),
        activity=activity,
        gpu_index=gpu_index,
        tell=lambda line: status(f"{line} ..."),
        machine=machine,
        device=device,
        gpu=gpu,
        vram_budget=vram_budget,
        ram_budget=ram_budget,
        prompt=prompt,
        output=answer,
        batch=batch,
        latency_target=latency_target,
        method=method,
    )
    written = _write(planned, output, export, imported=gpu_index is not None)
    tables = thermocline.explain(planned, what_helps=explain or as_json)
    if as_json:
        write_json(planned.as_dict() | {"written": written, "gains": [list(row) for row in tables[-1].rows]})
        return 0
    print_tables(_header(planned), *(plan_table(table) for table in tables))
    for line in (*planned.notices, *planned.plan.notes):
        print(f"note: {printable(line, 500)}")
    for path in written:
        print(f"written: {path}")
    return 0


@plan.command
def diff(first: str, second: str, /, *, as_json: JsonFlag = False) -> int:
    """Show what differs between two plans of one model; the exit code is 0 either way.

    Args:
        first: a plan's file.
        second: another one.
        as_json: print one JSON object instead.

    For example:

      thermocline plan diff plan.json other.json
    """
    table = thermocline.compare_plans(first, second)
    if as_json:
        write_json({"differences": [dict(zip(table.columns, row, strict=True)) for row in table.rows]})
    elif table.rows:
        print_tables(plan_table(table))
    else:
        print("the plans are the same")
    return 0


def plan_table(table: PlanTable) -> Table:
    """A plan's table for the terminal: bytes, milliseconds and shares in few digits."""
    shown = Table(title=table.title, title_justify="left")
    for name in table.columns:
        left = name in ("attention", "predictor", "binds", "tier", "purpose", "what", "change", "first", "second")
        shown.add_column(name, justify="left" if left else "right")
    for row in table.rows:
        sizes = str(row[0]).startswith(("budget of ", "bytes of "))
        names = ["bytes" if sizes else name for name in table.columns]
        shown.add_row(*(_cell(name, value) for name, value in zip(names, row, strict=True)))
    return shown


def _cell(name: str, value: str | int | float) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return size_of(value)
    if name.endswith("share") and isinstance(value, float):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return printable(str(value), 80)


def _header(planned: Planned) -> Table:
    plan, machine = planned.plan, planned.problem.machine
    gpu = f" with {machine.gpu.name}" if machine.gpu is not None else ""
    disk = f"; disk {machine.disk.name}" if machine.disk is not None else ""
    w = plan.workload
    rows = [
        ("model", f"{printable(plan.model_name)}, mode {plan.mode}"),
        ("machine", f"{plan.machine_name}{gpu}{disk} ({machine.source})"),
        ("temperatures", "unknown" if planned.order is None else f"of {planned.order.tokens:,} tokens"),
        ("workload", f"{w.prompt} tokens in, {w.output} out, context {w.context}, {w.batch} at once"),
        ("budgets", ", ".join(f"{size_of(size)} of {tier.upper()}" for tier, size in plan.budgets.items())),
        ("predicted", f"{plan.predicted.tokens_per_second:.2f} tokens/s, found by {plan.method}, gap {plan.gap:.2%}"),
    ]
    return facts(rows)


def _write(planned: Planned, output: str | None, export: str | None, *, imported: bool) -> list[str]:
    if export is not None and planned.problem.machine.gpu is None:
        raise UsageError("a GPU index lists neurons on a GPU, and there is none; add --device emulated, or --machine")
    written = []
    if export is not None:  # first, as what is there in its place may refuse it
        thermocline.export_gpu_index(planned.plan, planned.order, export)
        written.append(export)
    if output is not None:
        thermocline.save_plan(planned.plan, output)
        written.append(output)
        if imported and planned.order is not None:
            order = f"{output.removesuffix('.json')}.order.safetensors"
            thermocline.save_order(planned.order, order)
            written.append(order)
    return written


def _shared(ratio: str | None, prompt: int, output: int) -> tuple[int, int]:
    """Prompt and output tokens, with their sum shared by a ratio such as 4:1."""
    if ratio is None:
        return prompt, output
    parts = ratio.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[1]):
        raise UsageError(f"--ratio is {printable(ratio)}; allowed: two whole numbers, such as 4:1 or 0:1")
    a, b = (int(part) for part in parts)
    total = prompt + output
    share = min(total - 1, round(total * a / (a + b)))
    return share, total - share


def _list(as_json: bool) -> int:
    names: dict[str, Any] = {kind: list(known) for kind, known in thermocline.known_machines().items()}
    if as_json:
        write_json(names)
    else:
        print_tables(facts([(kind, ", ".join(known)) for kind, known in names.items()]))
        print("join parts with +: rtx-4090+i9-13900k+ddr5-6000+32gib+nvme-gen4")
    return 0
