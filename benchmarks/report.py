"""Makes the README's tables and the roofline picture from the results that are kept.

    python -m benchmarks.report

Only what is under benchmarks/results goes in: nothing is measured here.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_tiers
from benchmarks.side_by_side import LLAMA, READING, READING_ROWS, rates, ratios, shares
from benchmarks.tables import RESULTS
from thermocline.files.atomic import atomic_write

README = RESULTS.parent.parent / "README.md"
PICTURE = RESULTS / "roofline.svg"
BEGIN, END = "<!-- measured: made by python -m benchmarks.report -->", "<!-- /measured -->"
ORDER = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
MODES = ("dense", "exact", "predicted")
Result = dict[str, Any]


def read(pattern: str, place: Path | None = None) -> list[Result]:
    """The results in `place` whose files match, in the order of their formats."""
    found = [json.loads(path.read_text()) for path in sorted((place or RESULTS).glob(pattern))]
    return sorted(found, key=lambda r: ORDER.index(form(r)) if form(r) in ORDER else len(ORDER))


def form(result: Result) -> str:
    """The format in a model's name: synthetic-1.3b.q8_0 is q8_0."""
    return str(result.get("model", "")).rpartition(".")[2]


def stem(result: Result) -> str:
    """A model's name without its format."""
    return str(result["model"]).rpartition(".")[0] or str(result["model"])


def block() -> str:
    """What stands between the marks in the README."""
    makers = (_machine, _decode, _prefill, _context, _ops, _attention, _start, _agreement, _perplexity, _audit, _pool)
    parts = []
    for place in _places():
        parts += [*(maker(place) for maker in makers), _gpu(place), *_placement(place)]
    return "\n\n".join([BEGIN, *filter(None, parts), END]) + "\n"


def _places() -> list[Path]:
    """Where results are kept: those of the first machine, and the folders of others (`--into`)."""
    own = {"ops", "side_by_side"}
    return [RESULTS, *sorted(path for path in RESULTS.glob("*/") if path.is_dir() and path.name not in own)]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is words, the others are figures."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _placement(place: Path) -> list[str]:
    """The disk tier, drift, and published figures beside predicted ones."""
    parts = [report_tiers.disk(r) for r in read("disk_tier.json", place)]
    parts += [report_tiers.drift(r) for r in (*read("drift.json", place), *read("drift_disk.json", place))]
    parts += [report_tiers.paper(r, table) for r in read("placement_paper.json", place)]
    return parts + [report_tiers.powerinfer(r, table) for r in read("placement_powerinfer.json", place)]


def _gpu(place: Path) -> str:
    path = place / "gpu.json"
    return gpu_part(json.loads(path.read_text())) if path.exists() else ""


def gpu_part(result: Result) -> str:
    """A GPU's models at every budget, ours beside splits by whole layers; of what `benchmarks.gpu` kept so far."""
    cases: dict[tuple[str, str, str], dict[str, Result]] = {}
    for row in result.get("models", ()):
        if "tok/s" in row:
            cases.setdefault((row["model"], row["budget"], row["mode"]), {})[row["placement"]] = row
    rows = []
    for (model, budget, mode), found in sorted(cases.items(), key=lambda item: (len(item[0][0]), item[0])):
        ours, split = found.get("ours"), found.get("layer split")
        if ours is None:
            continue
        dense = found.get("layer split, dense")
        times, more = (f"{ours['tok/s'] / one['tok/s']:.2f}" if one else "-" for one in (split, dense))
        held = f"{ours['held GB']:.1f} of {ours['budget GB']:.1f}" if "held GB" in ours else "-"
        rates = [f"{ours['tok/s']:.1f}", f"{ours['predicted']:.1f}", f"{split['tok/s']:.1f}" if split else "-"]
        rows.append([f"{model}, {mode}, {budget}", *rates, times, more, f"{ours['prompt tok/s']:.0f}", held])
    if not rows:
        return ""
    speeds = ("tok/s", "predicted", "layer split", "×", "× dense", "prompt tok/s")
    heads = ("model, mode, share of VRAM", *speeds, "GB held")
    copies = f"; copies on the device reach {result['copy GB/s']:.0f} GB/s" if "copy GB/s" in result else ""
    said = (
        f"On {result['device']}, synthetic ReGLU models in F16 whose neurons fire 12 % of the time; budgets are shares "
        f"of what the whole model takes{copies}. A layer split has the same kernels; a dense one computes all neurons, "
        "as other engines do."
    )
    return f"{said}\n\n{table(heads, rows)}"


def _machine(place: Path) -> str:
    results = read("side_by_side/*.json", place)
    if not results:
        return ""
    machine, peers = results[0]["machine"], {r["peer"]["version"] for r in results if r["peer"]}
    every = [row[name]["bandwidth"] for r in results for row in _rounds(r) for name in row]
    low, _, high = statistics.quantiles(every, n=4)
    caches = ", ".join(machine["caches"][-2:])
    models = {stem(r): f"{stem(r)} ({r['parameters'] / 1e9:.2f} B parameters; {r['description']})" for r in results}
    return (
        f"On {machine['processor']}, {machine['threads']} threads, {machine['kernels']}, {caches}, with "
        f"{' and '.join(sorted(peers))} built for this processor, on {', '.join(models.values())}. llama.cpp has no "
        "ReGLU and computes SiLU in its place, which takes as long. Engines take turns, and figures are medians of "
        "rounds; × is the rate over llama.cpp's in the same round, with the smallest and the largest. The machine is "
        f"shared: reading memory alone reached {low:.0f} to {high:.0f} GB/s (middle half of the probes between turns), "
        "and shares of the bandwidth are of the probes beside each turn."
    )


def _rounds(result: Result) -> list[dict[str, Any]]:
    if "rounds" in result:
        return list(result["rounds"])
    return [row for part in result["depths"] for row in part["rounds"]]


def _rate(rounds: list[dict[str, Any]], name: str) -> str:
    rate = f"{statistics.median(rates(rounds, name)):.1f}"
    ratio = ratios(rounds, name)
    if name == LLAMA or not ratio:
        return rate
    return f"{rate} ({statistics.median(ratio):.2f}×, {min(ratio):.2f} to {max(ratio):.2f})"


def _decode(place: Path) -> str:
    results = read("side_by_side/*-decode.json", place)
    if not results:
        return ""
    rows = []
    for result in results:
        rounds = result["rounds"]
        cells = [_rate(rounds, name) if name in rounds[0] else "" for name in (LLAMA, *MODES)]
        of_reading = [_over(rounds, "dense", READING), _over(rounds, "predicted", READING_ROWS)]
        rows.append([form(result).upper(), *cells, f"{statistics.median(shares(rounds, 'dense')):.0%}", *of_reading])
    heads = ["decode, tokens/s", LLAMA, *MODES, "dense, of the bandwidth", "dense, of only reading"]
    if any(row[-1] for row in rows):
        heads.append("predicted, of only reading")
    return table(heads, [row[: len(heads)] for row in rows])


def _over(rounds: list[Result], name: str, other: str) -> str:
    """One rate over another of the same round; nothing where one was not measured."""
    if name not in rounds[0] or other not in rounds[0]:
        return ""
    pairs = zip(rates(rounds, name), rates(rounds, other), strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.0%}"


def _prefill(place: Path) -> str:
    rows = []
    for result in read("side_by_side/*-prefill.json", place) + read("side_by_side/*-prompt.json", place):
        rounds = result["rounds"]
        speed = statistics.median(rates(rounds, "thermocline")) * result["operations_per_token"] / 1e9
        cells = [_rate(rounds, name) if name in rounds[0] else "" for name in (LLAMA, "thermocline")]
        rows.append([f"{form(result).upper()}, {result['count']:,} tokens", *cells, f"{speed:.0f}"])
    return table(["prompt, tokens/s", LLAMA, "thermocline", "GOP/s"], rows) if rows else ""


def _context(place: Path) -> str:
    rows = []
    for result in read("side_by_side/*-context.json", place):
        start = {part["cache"]: part for part in result["depths"] if part["depth"] == 0}
        for part in result["depths"]:
            rounds = part["rounds"]
            name = f"{form(result).upper()}, cache {part['cache'].upper()}, {part['depth']:,} tokens"
            first = start.get(part["cache"])
            rows.append(
                [name, _milliseconds(rounds), _bound(part, first), _rate(rounds, LLAMA) if LLAMA in rounds[0] else ""]
            )
    heads = ["decode at depth", "ms a token", "at 0, plus the cache at the bandwidth", "llama.cpp, tokens/s"]
    return table(heads, rows) if rows else ""


def _milliseconds(rounds: list[dict[str, Any]]) -> str:
    return f"{1e3 / statistics.median(rates(rounds, 'thermocline')):.1f}"


def _bound(part: dict[str, Any], first: dict[str, Any] | None) -> str:
    """The time at depth 0, and that of reading the cache once."""
    if first is None:
        return ""
    bandwidth = statistics.median(row["thermocline"]["bandwidth"] for row in part["rounds"])
    base = 1e3 / statistics.median(rates(first["rounds"], "thermocline"))
    return f"{base + part['cache_bytes'] / bandwidth / 1e6:.1f}"


def _ops(place: Path) -> str:
    every = [op for result in read("ops/*.json", place) for op in result["ops"] if op["share"]]
    formats = [
        f for f in ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0") if any(o["format"] == f for o in every)
    ]
    rows = []
    for name in dict.fromkeys(op["op"] for op in every if not op["op"].startswith("attention")):
        by = {op["format"]: op for op in every if op["op"] == name}
        rows.append([name, *(f"{by[f]['share']:.0%}" if f in by else "" for f in formats)])
    if not rows:
        return ""
    peaks = next((r["peaks"] for r in read("ops/gemm.json", place)), None)
    note = (
        "Shares of the machine's best, of a layer of that model: of the bandwidth probe for decode, for gemm of "
        f"{peaks['int8']:.0f} (int8) or {peaks['bf16']:.0f} GOP/s (BF16, with AMX for all formats), the best of "
        f"{peaks['source']}."
        if peaks
        else "Shares of the bandwidth probe, of a layer of that model."
    )
    probes = sorted(op["peak"] for op in every if op["op"] == "rows 20%")
    if probes:
        note += f" The probe gave {probes[0]:.0f} to {probes[-1]:.0f} GB/s beside the FFN."
    note += " Rows: a program that only reads the rows that such an FFN reads."
    drawn = place == RESULTS and PICTURE.is_file()
    picture = f"![roofline]({PICTURE.relative_to(README.parent)})\n\n" if drawn else ""
    return f"{picture}{note}\n\n" + table(["op", *formats], rows)


def _attention(place: Path) -> str:
    """Of the decode path, for each kind of cache, by how many keys there are."""
    ops = [op for r in read("ops/attention.json", place) for op in r["ops"] if op["op"] == "attention"]
    by: dict[str, dict[str, str]] = {}
    for op in ops:
        heads, _, keys = op["size"].partition(", ")
        by.setdefault(f"{heads}, {op['format']}", {})[keys] = f"{op['share']:.0%}"
    if not by:
        return ""
    sizes = list(dict.fromkeys(keys for row in by.values() for keys in row))
    heads_row = [f"{int(size.split()[0]):,} keys" for size in sizes]
    rows = [[name, *(row.get(size, "") for size in sizes)] for name, row in by.items()]
    return table(["decode attention, of the bandwidth: heads/of keys, cache", *heads_row], rows)


def _start(place: Path) -> str:
    rows = [(what, f"{wait:.2f}") for r in read("start.json", place) for what, wait in r["seconds"].items()]
    return table(["from nothing, files cached", "seconds"], rows) if rows else ""


def _agreement(place: Path) -> str:
    return "\n\n".join(
        f"{r['model']} against llama.cpp on the same file, {r['tokens']:,} held-out tokens: same likeliest token "
        f"{min(v['top1'] for v in _compared(r)):.1%}, mean KL divergence {max(v['kl_mean'] for v in _compared(r)):.1e} "
        "(the worst of dense and exact, prefill and decode)."
        for r in read("agreement.json", place)
    )


def _perplexity(place: Path) -> str:
    parts = []
    for r in read("perplexity.json", place):
        measured = r["measured"]
        said = [f"{name} {v['perplexity']:.4f} ± {v['error']:.4f}" for name, v in measured.items()]
        if {"dense", "predicted"} <= measured.keys():
            said[-1] += f" ({measured['predicted']['perplexity'] / measured['dense']['perplexity']:.4f} of dense)"
        tokens = measured[LLAMA]["tokens"]
        parts.append(
            f"Perplexity of {r['model']} on its held-out text, {r['chunks']} chunks of {r['n_ctx']} tokens of which "
            f"the second halves count ({tokens:,} tokens): {', '.join(said)}."
        )
    return "\n\n".join(parts)


def _audit(place: Path) -> str:
    """What `benchmarks.audit` kept."""
    parts = []
    for r in read("audit.json", place):
        found, worst = r["predicted"], min(layer["energy_recall"] for layer in r["layers"])
        same = max(r[name]["max_kl"] for name in ("exact", "oracle"))
        parts.append(
            f"Audit of the exact low-rank predictor of {r['model']}, {r['tokens']:,} tokens: "
            f"{'passed' if r['passed'] else 'failed'}. Predicted against dense: mean KL divergence "
            f"{found['mean_kl']:.1e}, top-1 {found['top1']:.1%}, perplexity ratio {found['perplexity_ratio']:.4f}; "
            f"energy recall of the worst layer {worst:.3f}; exact and the oracle mask at most {same:.1g} from dense."
        )
    return "\n\n".join(parts)


def _pool(place: Path) -> str:
    """An engine at rest, two in one process, and one beside a busy program."""
    parts = []
    for r in read("pool.json", place):
        alone, turns, once, busy = (
            statistics.median(row[name] for row in r["rounds"])
            for name in ("alone", "in turns", "at once", "beside a busy program")
        )
        parts.append(
            f"At rest, from 50 ms after its last token, an engine of {r['model']} used "
            f"{r['idle_seconds'] * 1000:.1f} ms of processor time in a second. Two engines in one process, all threads "
            f"each: {turns / alone:.0%} of one's rate by turns, {once / alone:.0%} in sum at once. Beside a program "
            f"that keeps one of {r['machine']['cores']} cores busy: {busy / alone:.0%}."
        )
    return "\n\n".join(parts)


def _compared(result: Result) -> list[dict[str, float]]:
    return [value for value in result.values() if isinstance(value, dict) and "top1" in value]


def with_block(text: str, new: str) -> str:
    """`text` with what stands between the marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise SystemExit(f"{README.name} lacks the lines {BEGIN} and {END}")
    return before + new + after


def draw() -> None:
    """Every measured op as a point under the machine's roofs."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "thermocline"
    from matplotlib import pyplot as plt

    results = read("ops/*.json")
    ops = [op for r in results for op in r["ops"] if op["operations"] and op["moved"]]
    if not ops:
        return
    bandwidth = statistics.median(r["read_bandwidth"]["median"] for r in results)
    peaks: dict[str, Any] = next((r["peaks"] for r in results if r["peaks"]), {})
    figure, axes = plt.subplots(figsize=(8, 5))
    x = [0.3, 1e4]
    for name in ("int8", "bf16"):
        if name in peaks:
            knee = peaks[name] / bandwidth
            axes.plot([knee, x[1]], [peaks[name]] * 2, color="0.4", linewidth=1)
            axes.annotate(f"{name} {peaks[name]:.0f} GOP/s", (x[1], peaks[name]), ha="right", va="bottom", fontsize=8)
    top = max((peaks[n] for n in ("int8", "bf16") if n in peaks), default=bandwidth * x[1])
    axes.plot([x[0], top / bandwidth], [bandwidth * x[0], top], color="0.4", linewidth=1)
    axes.annotate(f"memory {bandwidth:.0f} GB/s", (1, bandwidth), rotation=38, va="bottom", ha="right", fontsize=8)
    markers = {"linear": "o", "ffn": "s", "predict": "^", "attention": "D", "gemm": "*"}
    formats = list(dict.fromkeys(op["format"] for op in ops))
    colours = plt.get_cmap("tab10")
    for op in ops:
        kind = op["op"].split()[0]
        axes.plot(
            op["operations"] / op["moved"], op["operations"] / op["microseconds"] / 1e3,
            markers[kind], color=colours(formats.index(op["format"])), markersize=5,
        )  # fmt: skip
    for kind, marker in markers.items():
        axes.plot([], [], marker, color="0.3", label=kind)
    for index, name in enumerate(formats):
        axes.plot([], [], "s", color=colours(index), label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10⁹ operations a second")
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    axes.set_title(f"Ops of the CPU, {results[0]['machine']['threads']} threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
    print(f"written: {PICTURE.relative_to(README.parent)}")


def main() -> None:
    draw()
    text = README.read_text()
    with atomic_write(README) as file:
        file.write(with_block(text, block()).encode())
    print(f"written: {README.name}")


if __name__ == "__main__":
    main()
