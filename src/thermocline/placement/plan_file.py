"""Plans as files: readable JSON with one layer a line, a checksum, and nothing taken on trust."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from thermocline.errors import ModelFormatError, PlanError, UsageError, printable
from thermocline.files.atomic import atomic_write, begins, require_kind
from thermocline.files.mapped import open_regular
from thermocline.files.strict_json import parse_object
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import LARGEST_CLUSTER, FfnMode
from thermocline.placement.ledger import Purpose
from thermocline.placement.plan import VERSION, LayerPlan, Plan, Predicted
from thermocline.placement.solver import Method
from thermocline.placement.workload import Workload

FORMAT = "thermocline-plan"
LARGEST_FILE = 4 << 20
LARGEST_NUMBER = 1 << 60
FINGERPRINT_DIGITS = range(16, 129)

Check = Callable[[Any], bool]


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write a plan; the file appears whole or not at all.

    Raises:
        UsageError: what is there is no plan.
        OutputError: it could not be written.
    """
    require_kind(path, "plan", _is_plan)
    content = plan_text(plan).encode()
    with atomic_write(path, size=len(content)) as file:
        file.write(content)


def _is_plan(path: Path) -> bool:
    return begins(path, f'{{\n  "format": "{FORMAT}"'.encode())


def load_plan(path: Path | str) -> Plan:
    """Read a plan.

    Raises:
        PlanError: the file cannot be read, is damaged, of another version, or says something impossible.
    """
    try:
        with os.fdopen(open_regular(Path(path)), "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except ModelFormatError as error:
        raise PlanError(path, "file", f"cannot be read: {_words(error, path)}") from error
    except OSError as error:
        raise PlanError(path, "file", f"cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST_FILE:
        raise PlanError(path, "file", f"is larger than the {LARGEST_FILE:,} bytes of any plan")
    return parse_plan(raw, path)


def plan_text(plan: Plan) -> str:
    """The plan as JSON: fields in a fixed order, every layer on a line of its own, so that plans can be compared."""
    document = _document(plan)
    document["checksum"] = _checksum(document)
    lines = []
    for key, value in document.items():
        if key in ("layers", "bytes", "notes"):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n  ]" if rows else "[]"
        else:
            text = json.dumps(value)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse_plan(raw: bytes, source: Path | str = "plan") -> Plan:
    """The plan that `plan_text` wrote.

    Raises:
        PlanError: the text is damaged or says something impossible.
    """
    try:
        document = parse_object(raw, source, "json")
    except ModelFormatError as error:
        raise PlanError(source, "json", _words(error, source)) from error
    fields_ = _Fields(document, source)
    if fields_.text("format") != FORMAT or fields_.number("version", 0) != VERSION:
        raise PlanError(source, "version", f"is not {FORMAT} {VERSION}")
    stated = fields_.text("checksum")
    actual = _checksum({key: value for key, value in document.items() if key != "checksum"})
    if stated != actual:
        raise PlanError(source, "checksum", f"is {printable(stated, 16)}, the content's is {actual[:16]}")
    try:
        return _plan(fields_)
    except UsageError as error:
        raise PlanError(source, "workload", str(error)) from error


def _words(error: ModelFormatError, source: Path | str) -> str:
    """What an error says beside the file and the field, which the plan's error names too."""
    return str(error).removeprefix(f"{printable(str(source))}: {error.field}").lstrip(": ")


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": plan.model_name, "fingerprint": plan.model},
        "activity": plan.activity,
        "machine": {"name": plan.machine_name, "fingerprint": plan.machine},
        "mode": plan.mode,
        "cluster": plan.cluster,
        "n_ff": plan.n_ff,
        "workload": asdict(plan.workload),
        "budgets": dict(plan.budgets),
        "embedding": plan.embedding,
        "head": plan.head,
        "layers": [asdict(layer) for layer in plan.layers],
        "bytes": [{"tier": t, "purpose": p, "bytes": n} for t, p, n in plan.demands],
        "predicted": asdict(plan.predicted),
        "method": plan.method,
        "notes": list(plan.notes),
    }


def _checksum(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plan(top: _Fields) -> Plan:
    model, machine = top.inner("model"), top.inner("machine")
    budgets, n_ff = top.inner("budgets"), top.number("n_ff", 1, 1 << 20)
    activity = None if top.values.get("activity") is None else top.fingerprint("activity")
    plan = Plan(
        model_name=model.text("name"),
        model=model.fingerprint("fingerprint"),
        activity=activity,
        machine_name=machine.text("name"),
        machine=machine.fingerprint("fingerprint"),
        mode=top.member("mode", FfnMode),
        cluster=top.number("cluster", 1, LARGEST_CLUSTER),
        n_ff=n_ff,
        workload=_workload(top.inner("workload")),
        budgets={tier: budgets.number(tier, 0) for tier in (Tier.RAM, Tier.VRAM) if tier in budgets.values},
        embedding=top.member("embedding", Tier),
        head=top.member("head", Tier),
        layers=tuple(_layer(row, n_ff) for row in top.rows("layers", 512)),
        demands=tuple(
            (row.member("tier", Tier, _MEMORIES), row.member("purpose", Purpose), row.number("bytes", 1))
            for row in top.rows("bytes", 64, ("tier", "purpose", "bytes"))
        ),
        predicted=_times(top.inner("predicted"), Predicted),
        method=top.member("method", Method),
        notes=tuple(_note(top, note) for note in top.items("notes", 64)),
    )
    top.only({"format", "version", "checksum", *_document(plan)})
    for part, names in ((model, ("name", "fingerprint")), (machine, ("name", "fingerprint")), (budgets, _MEMORIES)):
        part.only(set(names))
    _consistent(plan, top)
    return plan


_MEMORIES = (Tier.VRAM, Tier.RAM)


def _consistent(plan: Plan, top: _Fields) -> None:
    """What every field alone allows, but not all of them together."""
    if not plan.layers:
        raise top.wrong("layers", [], "one entry for each layer")
    if plan.predicted.token_ms <= 0 or plan.predicted.bound_ms > plan.predicted.token_ms:
        raise top.wrong("predicted", plan.predicted.token_ms, "a positive time, not below its bound")
    seen = [(tier, purpose) for tier, purpose, _ in plan.demands]
    if len(set(seen)) < len(seen):
        raise top.wrong("bytes", seen, "every tier and purpose once")
    taken = {(tier, purpose): size for tier, purpose, size in plan.demands}
    for tier in _MEMORIES:
        held = sum((stop - start) * layer.record_bytes for layer, (start, stop) in
                   zip(plan.layers, plan.depths(tier), strict=True))  # fmt: skip
        if held != taken.get((tier, Purpose.FFN), 0):
            raise top.wrong("bytes", taken.get((tier, Purpose.FFN), 0), f"{held}, the records that the depths hold")
        if plan.bytes_of(tier) > plan.budgets.get(tier, 0):
            raise top.wrong("bytes", plan.bytes_of(tier), f"at most the budget of {tier}")


def _workload(part: _Fields) -> Workload:
    part.only({f.name for f in fields(Workload)})
    target = part.values.get("first_token_ms")
    return Workload(
        **{f.name: part.number(f.name, 0) for f in fields(Workload) if f.type == "int"},
        first_token_ms=None if target is None else part.real("first_token_ms"),
    )


def _layer(part: _Fields, n_ff: int) -> LayerPlan:
    part.only({f.name for f in fields(LayerPlan)})
    hot = part.number("hot", 0, n_ff)
    return LayerPlan(
        home=part.member("home", Tier),
        predictor=None if part.values.get("predictor") is None else part.member("predictor", Tier, _MEMORIES),
        hot=hot,
        warm=part.number("warm", hot, n_ff),
        record_bytes=part.number("record_bytes", 0),
        hot_share=part.real("hot_share", 1.0),
        streamed=part.boolean("streamed"),
        read_run=part.number("read_run", 0, n_ff),
        binds=part.text("binds"),
        **{f.name: part.real(f.name) for f in fields(LayerPlan) if f.name.endswith("_ms")},
    )


def _times(part: _Fields, kind: type[Predicted]) -> Predicted:
    part.only({f.name for f in fields(kind)})
    return kind(**{f.name: part.real(f.name) for f in fields(kind)})


def _note(top: _Fields, note: object) -> str:
    if not isinstance(note, str) or len(note) > 1000:
        raise top.wrong("notes", note, "short texts")
    return note


class _Fields:
    """An object of the file, whose values are checked as they are taken."""

    def __init__(self, values: dict[str, Any], source: Path | str, name: str = "") -> None:
        self.values = values
        self.source = source
        self.name = name

    def wrong(self, key: str, value: object, wanted: str) -> PlanError:
        return PlanError(self.source, self.name + key, f"is {printable(repr(value), 60)}; wanted is {wanted}")

    def only(self, known: set[str]) -> None:
        for key in self.values:
            if key not in known:
                raise self.wrong(printable(key, 40), "unknown", f"one of {', '.join(sorted(known))}")

    def take(self, key: str, ok: Check, wanted: str) -> Any:
        value = self.values.get(key)
        if not ok(value):
            raise self.wrong(key, value, wanted)
        return value

    def number(self, key: str, low: int, high: int = LARGEST_NUMBER) -> int:
        found: int = self.take(key, lambda v: type(v) is int and low <= v <= high, f"a whole number {low} to {high}")
        return found

    def real(self, key: str, high: float = 1e15) -> float:
        value = self.take(key, lambda v: type(v) in (int, float) and 0 <= v <= high, f"a number 0 to {high:g}")
        return float(value)

    def text(self, key: str) -> str:
        found: str = self.take(key, lambda v: isinstance(v, str) and len(v) <= 1000, "a short text")
        return found

    def boolean(self, key: str) -> bool:
        found: bool = self.take(key, lambda v: isinstance(v, bool), "true or false")
        return found

    def fingerprint(self, key: str) -> str:
        def ok(value: Any) -> bool:
            return isinstance(value, str) and len(value) in FINGERPRINT_DIGITS and set(value) <= set("0123456789abcdef")

        found: str = self.take(key, ok, "a fingerprint of hex digits")
        return found

    def member(self, key: str, kind: Any, allowed: tuple[Any, ...] | None = None) -> Any:
        names = [str(m) for m in allowed or tuple(kind)]
        return kind(self.take(key, lambda v: isinstance(v, str) and v in names, " or ".join(names)))

    def inner(self, key: str) -> _Fields:
        return _Fields(self.take(key, lambda v: isinstance(v, dict), "an object"), self.source, f"{self.name}{key}.")

    def items(self, key: str, most: int) -> list[Any]:
        found: list[Any] = self.take(key, lambda v: isinstance(v, list) and len(v) <= most, f"a list of up to {most}")
        return found

    def rows(self, key: str, most: int, known: tuple[str, ...] = ()) -> list[_Fields]:
        rows = []
        for i, row in enumerate(self.items(key, most)):
            if not isinstance(row, dict):
                raise self.wrong(f"{key}[{i}]", row, "an object")
            rows.append(_Fields(row, self.source, f"{key}[{i}]."))
            if known:
                rows[-1].only(set(known))
        return rows
