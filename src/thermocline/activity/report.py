"""A page about an activity, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Final

from thermocline.activity.drawing import NAMESPACE, percent
from thermocline.activity.inside import predictor_inside
from thermocline.activity.pictures import Picture, activity_pictures, predictor_pictures
from thermocline.activity.statistics import Activity
from thermocline.activity.store import find_activity, is_gguf
from thermocline.errors import FingerprintError, OutputError, ThermoclineError, UsageError, printable
from thermocline.files.atomic import atomic_write, begins, require_kind
from thermocline.files.companion import companion
from thermocline.files.gguf import GgufFile
from thermocline.files.sidecar import SidecarKind, named, read_sidecar

STYLE: Final = """
:root { color-scheme: light; }
body { margin: 0; background: #eef2f6; color: #1f2a37; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Helvetica, Arial, sans-serif; }
header { padding: 2.4rem 2rem 4.6rem; color: #fff;
  background: linear-gradient(165deg, #b5263a 0%, #e0703f 22%, #3fa0ad 55%, #143f73 80%, #0b1f3f 100%); }
header h1 { margin: 0; font-size: 1.9rem; font-weight: 650; }
header p { margin: .3rem 0 0; opacity: .92; }
header > div, main { max-width: 1420px; margin: 0 auto; }
main { padding: 0 2rem 3rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem;
  margin-top: -3rem; }
.fact, figure, section { background: #fff; border-radius: 10px; box-shadow: 0 1px 3px rgba(16, 32, 56, .14); }
.fact { padding: 1rem 1.2rem; }
.fact b { display: block; font-size: 1.65rem; font-weight: 650; color: #12335e; }
.fact span { color: #66727f; font-size: .9rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(560px, 100%), 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; padding: .6rem .8rem 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { padding: 0 .8rem; color: #4a5663; font-size: .92rem; }
section { margin-top: 1rem; padding: 1rem 1.4rem 1.4rem; overflow-x: auto; }
h2 { font-size: 1.1rem; margin: .2rem 0 .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; min-width: 50%; }
th, td { padding: .28rem .9rem; text-align: right; border-bottom: 1px solid #e4e9ef; }
th { color: #66727f; font-weight: 600; }
td:first-child, th:first-child { text-align: left; }
footer { color: #66727f; font-size: .85rem; margin-top: 1.2rem; overflow-wrap: anywhere; }
"""
_DOCTYPE: Final = "<!doctype html>"
_QUALITIES: Final = {"predictor", "predictor_audit"}
Info = Mapping[str, Any]
COLUMNS: Final = {
    "active_share": "active",
    "median_active_share": "median",
    "p99_active_share": "99th percentile",
    "neurons_for_80_percent": "give 80 %",
    "never_fired": "never fired",
    "token_overlap": "token to token",
    "layer_overlap": "layer to layer",
    "chance_overlap": "by chance",
}
MAX_ROWS: Final = 400
"""Lines of the table of a predictor's info; what is longer is cut, and says so."""


def write_report(
    path: Path | str,
    output: Path | str | None,
    *,
    predictor: Path | str | None = None,
    pictures: Path | str | None = None,
    more: Callable[[Activity], Sequence[Picture]] | None = None,
    notice: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw the activity in `path` as a page `output` and as single files in the folder `pictures`; what was written.

    `predictor` is drawn too; without, the one that lies beside, or `notice` hears why not. `more` draws further
    pictures of the activity, shown after its own.

    Raises:
        ModelFormatError: a file is not what it should be.
        FingerprintError: the predictor belongs to another model.
        UsageError: what is there in the place of the page or of a picture is none.
        OutputError: something could not be written.
    """
    activity = find_activity(path)
    info = _beside(Path(path), activity, notice) if predictor is None else _predictor(Path(predictor), activity)
    drawn = [*activity_pictures(activity), *(() if more is None else more(activity))]
    predicted = [] if info is None else predictor_pictures(info)
    if info is not None and notice is not None and not _QUALITIES & {picture.name for picture in predicted}:
        notice("how well the predictor does is not drawn, as nothing tells of it: `thermocline audit` measures it")
    folder = None if pictures is None else Path(pictures)
    singles = {} if folder is None else {folder / f"{picture.name}.svg": picture for picture in [*drawn, *predicted]}
    if output is not None:
        require_kind(output, "page of HTML", partial(begins, words=_DOCTYPE.encode()))
    for file in singles:
        require_kind(file, "picture in SVG", partial(begins, words=b"<svg"), "--pictures")
    written = []
    if output is not None:
        written.append(_write(Path(output), page(activity, drawn, info, predicted)))
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{printable(str(folder))}: cannot be made: {error.strerror}") from error
        written += [_write(file, picture.svg + "\n") for file, picture in singles.items()]
    return written


def _predictor(path: Path, activity: Activity) -> Info:
    """What is known of a predictor: of a sidecar its info, of one inside a model what its matrices and audit tell."""
    if not is_gguf(path):
        return _info(path, SidecarKind.PREDICTOR, activity)
    found = _inside(path, activity)
    if found is None:
        raise UsageError(f"{printable(str(path))} has no predictor inside")
    return found


def _info(path: Path, kind: SidecarKind, activity: Activity) -> Info:
    sidecar = read_sidecar(path, kind, verify=False)
    sidecar.require_model(activity.model_fingerprint, activity.model_name)
    return sidecar.info


def _inside(path: Path, activity: Activity) -> Info | None:
    with GgufFile.open(path) as file:
        found = predictor_inside(file)
        if found is None:
            return None
        if file.fingerprint != activity.model_fingerprint:
            belongs = named(file.metadata.text("general.name", ""), file.fingerprint)
            given = named(activity.model_name, activity.model_fingerprint)
            raise FingerprintError(path, belongs, given, "give the predictor of the model that was profiled")
        layers = [{"rank": rank} for rank in found.ranks]
    audit = companion(path, SidecarKind.AUDIT)
    return {"layers": layers, **(_info(audit, SidecarKind.AUDIT, activity) if audit.is_file() else {})}


def _beside(path: Path, activity: Activity, notice: Callable[[str], None] | None) -> Info | None:
    """What is known of the predictor that lies beside an activity or its model, or inside that, if it is of use."""
    model = path.with_name(path.name.removesuffix(f".{SidecarKind.ACTIVITY}.safetensors"))
    beside = companion(model, SidecarKind.PREDICTOR)
    try:
        if beside.is_file():
            return _predictor(beside, activity)
        return _inside(path, activity) if is_gguf(path) else None
    except ThermoclineError as error:
        if notice is not None:
            notice(f"no predictor is drawn: {error}")
        return None


def page(activity: Activity, drawn: Sequence[Picture], predictor: Info | None, predicted: Sequence[Picture]) -> str:
    """The page as HTML; `predictor` is what is known of one."""
    summary = activity.summary()
    name = printable(activity.model_name or activity.model_fingerprint[:16], 80)
    least = "" if activity.tokens_known else "at least "
    sequences = f" in {_counted(activity.sequences, 'sequence')}" if activity.sequences else ""
    body = [
        _DOCTYPE,
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>Activity of {escape(name)}</title><style>{STYLE}</style></head><body>",
        f"<header><div><h1>Which neurons of {escape(name)} fire</h1>",
        f"<p>{activity.n_layer} layers of {activity.n_ff:,} neurons, watched over {least}{activity.tokens:,} tokens"
        f"{sequences}</p></div></header><main>",
        _facts(summary),
        _figures(drawn),
    ]
    if predictor is not None:
        body += [_figures(predicted), _predictor_table(predictor)]
    body += [_layers_table(summary), _footer(activity), "</main></body></html>"]
    return "\n".join(body)


def _facts(summary: Mapping[str, Any]) -> str:
    least, most = ("", "") if summary["tokens_known"] else ("at least ", "at most ")
    facts = [
        (most + _percent(summary["active_share"]), "of the neurons are active for a token"),
        (_percent(summary["neurons_for_80_percent"]), "of the neurons give 80 % of all activations"),
        (_percent(summary["token_overlap"]), "of an active set was active at the token before"),
        (_percent(summary["layer_overlap"]), "of it is foreseen by the layer below"),
        (f"{least}{summary['tokens']:,}", "tokens were read"),
    ]
    boxes = "".join(f'<div class="fact"><b>{escape(value)}</b><span>{text}</span></div>' for value, text in facts)
    return f'<div class="facts">{boxes}</div>'


def _figures(pictures: Iterable[Picture]) -> str:
    figures = "".join(
        f'<figure id="{picture.name}">{picture.svg.replace(NAMESPACE + " ", "")}'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return f'<div class="pictures">{figures}</div>' if figures else ""


def _layers_table(summary: Mapping[str, Any]) -> str:
    rows = [[str(number), *(_percent(layer[key]) for key in COLUMNS)] for number, layer in enumerate(summary["layers"])]
    return _section("Layer by layer", ["layer", *COLUMNS.values()], rows)


def _predictor_table(info: Info) -> str:
    """All single values of a predictor's info, whatever its maker wrote down; lists are drawn, not printed."""
    rows = [[name, value] for name, value in _flat(info)]
    if len(rows) > MAX_ROWS:
        rows = [*rows[:MAX_ROWS], ["…", f"{len(rows) - MAX_ROWS} more"]]
    return _section("Predictor", ["figure", "value"], rows) if rows else ""


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = f"{before}{printable(key, 60)}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        elif isinstance(value, str | int | bool):
            yield name, printable(str(value), 120)


def _section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def _footer(activity: Activity) -> str:
    threshold = f" of a magnitude above {activity.threshold:g}" if activity.threshold else " other than zero"
    return (
        f"<footer>A neuron fires if its activation is{threshold}. Counted in {_counted(len(activity.runs), 'run')}. "
        f"Model {activity.model_fingerprint}.</footer>"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(value: float | None) -> str:
    return "–" if value is None else percent(value).replace(" ", "\u00a0")


def _write(path: Path, text: str) -> Path:
    content = text.encode("utf-8", "replace")
    with atomic_write(path, size=len(content)) as file:
        file.write(content)
    return path
