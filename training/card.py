"""Write the model card and its two pictures from what the run and its evaluation recorded.

python -m training.card --run build/epilimnion --out src/thermocline/shipped
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from thermocline.api import describe
from thermocline.hardware.cores import find_cores

Json = dict[str, Any]
BLUE, ORANGE, GREY = "#1f77b4", "#e6842a", "#888888"

CARD = """\
---
license: psf-2.0
library_name: thermocline
pipeline_tag: text-generation
tags: [code, python, relu-sparse, arcee, gguf]
---

# epilimnion

A small language model that writes Python, in which about {silent:.0%} of the FFN neurons are silent at
any token. It is shipped with Thermocline so that every part of it - profiling, prediction, placement,
sparse kernels - has a real network to work on, offline and within seconds. The epilimnion is a lake's
warm upper layer.

It was trained from scratch, on nothing but the standard library of Python {python}. It completes code
in that library's manner; it does not follow instructions and knows no other language.

| | |
|---|---|
| architecture | `arcee`: as Llama, but its FFN is `down(relu(up(x))^2)`, without a gate |
| size | {parameters:.1f} M parameters, {file_size:.1f} MB as Q8_0 |
| layers | {layers} of width {width}, {neurons} neurons each |
| heads | {heads} of {head_width}; {kv_heads} for keys and values |
| vocabulary, context | {vocabulary} (byte-level BPE, GPT-2's pre-tokenizer), {context} tokens |
| embeddings | tied |
| start and end of text | `<|endoftext|>` for both |

## Quality

Measured on the held-out files with the Q8_0 weights, windows of {context} tokens at a stride of 512:

| | bits per byte |
|---|---|
| **epilimnion** | **{bits:.3f}** ({nats:.3f} nats per token) |
| `xz -9` on the same files, concatenated | {xz:.3f} |

That is {below:.1%} below xz.

![Loss over the tokens seen](loss.png)

## Sparsity

Share of neurons whose ReLU is exactly zero, over all {held_tokens:,} held-out tokens: **{silent:.1%}**.

| layer | silent | fired at no held-out token | firings that fall on the hottest fifth |
|---|---|---|---|
{layer_rows}

![Sparsity and temperature by layer](sparsity.png)

## Activity and predictor

Beside the model lie its activity (`epilimnion.q8_0.activity.safetensors`: how often each neuron fires, from which
the plan of a split model is made) and a predictor (`epilimnion.q8_0.predictor.safetensors`, Q8_0, ranks {ranks};
{predictor_share:.1%} of the model's numbers). Its audit against exact computing of the same weights, on held-out text,
token by token, {verdict}: {audit}.

![Neurons by how often they fire](pictures/ranked.svg)
{curve}
## Data and licence

{train_files} files ({train_mb:.1f} MB, {train_tokens:.1f} M tokens) for training and {held_files}
({held_mb:.2f} MB) held out, chosen by a hash of the path. Left out: `site-packages`, the generated codec
tables in `encodings`, files that are not UTF-8, do not parse as Python 3, are shorter than 200 bytes or
repeat another. Held-out files have relatives among the training files (a test beside its module, one
test beside another), so the figures speak for code of this library, not for Python at large.

* digest of the training files: `{train_digest}`
* digest of the held-out files: `{held_digest}`

The sources are copyright (c) 2001 and later, Python Software Foundation, under the PSF License Agreement,
version 2. The weights are published under the same licence.

## Recipe

Muon for the hidden matrices (rate {muon_lr}), AdamW for embedding and gains (rate {adam_lr}), weight decay
{weight_decay}; {step_tokens} tokens a step; warm-up of {warmup} steps, constant rate, then linear to zero
over the last {decay:.0%} of the budget. Sequences of {short} tokens until the decay begins, {context} from
there on. Every layer's mean activation is penalised; a thermostat sets each layer's penalty so that the share
of firing neurons falls to {density:.1%} over the first {settled:.0%} of the budget and stays there.

{steps} steps, {seen:.1f} M tokens ({epochs:.1f} passes over the data), {minutes:.0f} minutes on {hardware},
which had other work to do at the same time.{restarts}

```
{commands}
```

The budget is wall-clock time, so a second run sees a different number of tokens; `--steps {steps}` fixes it.

## Completions

Temperature {temperature}; the prompt is in the first line or lines.

{completions}

## Limits

* It continues code that looks like the standard library's. It invents names and calls that do not exist,
  and what it writes seldom runs. It is a test object, not an assistant.
* It has seen {train_tokens:.1f} M distinct tokens of one project; anything else is far from what it knows.
* It may repeat passages of the standard library word for word.
* A prompt should not end in a line break or a space: the tokenizer joins them to what follows.
* Its context ends at {context} tokens.
"""

CURVE = """
What a larger share buys: predictors of one rank in all layers, trained on {trained:,} tokens and audited on {audited:,}
held-out ones. Each has its thresholds set for the same energy recall; a larger one reaches it with fewer neurons, and
leaves out more of those that hardly count.

| rank | share of the model's numbers | energy recall | recall | neurons selected | mean KL | top-1 |
|---:|---:|---:|---:|---:|---:|---:|
{rows}

![Share of the parameters against recall and loss](predictor_shares.png)
"""

COMMANDS = """\
python -m training.data --run build/epilimnion
python -m training.train --run build/epilimnion --minutes {minutes:.0f}
python -m training.evaluate --run build/epilimnion
python -m training.export --run build/epilimnion --gguf src/thermocline/shipped/epilimnion.q8_0.gguf
python -m training.predict --run build/epilimnion --gguf src/thermocline/shipped/epilimnion.q8_0.gguf
python -m training.predict --run build/epilimnion --gguf src/thermocline/shipped/epilimnion.q8_0.gguf --curve
python -m training.card --run build/epilimnion --out src/thermocline/shipped"""


def read_json(path: Path) -> Json:
    value: Json = json.loads(path.read_text())
    return value


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` entries, of the length that has them all."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def draw_loss(log: list[Json], path: Path) -> None:
    tokens = np.array([entry["tokens"] for entry in log]) / 1e6
    losses = np.array([entry["loss"] for entry in log])
    width = max(1, len(log) // 100)
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes.plot(tokens[width - 1 :], smooth(losses, width), color=BLUE, label=f"training, mean of {width} steps")
    held = [(e["tokens"] / 1e6, e["held_out_loss"]) for e in log if "held_out_loss" in e]
    axes.plot(*zip(*held, strict=True), color=ORANGE, marker=".", label="held out (16 windows)")
    decay = next((e["tokens"] / 1e6 for e in log[len(log) // 4 :] if e["rate"] < 1), None)
    if decay is not None:
        axes.axvline(decay, color=GREY, linestyle=":", label="the learning rate begins to fall")
    axes.set(xlabel="million tokens seen", ylabel="nats per token", ylim=(min(losses) - 0.2, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def draw_sparsity(log: list[Json], sparsity: Json, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=120, layout="constrained")
    silent = sparsity["inactive_share_by_layer"]
    layers = np.arange(len(silent))
    bars = left.bar(layers, np.array(silent) * 100, color=BLUE)
    left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set(xlabel="layer", ylabel="silent neurons per token, %", ylim=(0, 110), title="held-out text")
    for percentile, values in sparsity["temperature_percentiles_by_layer"].items():
        right.plot(layers, np.maximum(np.array(values) * 100, 1e-3), marker=".", label=f"{percentile} %")
    right.set(xlabel="layer", ylabel="tokens at which it fires, %", yscale="log", title="temperature")
    right.legend(title="percentile", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.set_xticks(layers)
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path)
    plt.close(figure)


def layer_rows(sparsity: Json) -> str:
    columns = zip(
        sparsity["inactive_share_by_layer"],
        sparsity["never_fired_by_layer"],
        sparsity["firings_of_the_hottest_fifth_by_layer"],
        strict=True,
    )
    return "\n".join(
        f"| {layer} | {silent:.1%} | {never} | {hot:.0%} |" for layer, (silent, never, hot) in enumerate(columns)
    )


def curve(run: Path) -> str:
    """What `training.predict --curve` found; nothing where it did not run."""
    file = run / "predictor_curve.json"
    if not file.exists():
        return ""
    points = json.loads(file.read_text())
    rows = "\n".join(
        f"| {p['rank']} | {p['share']:.1%} | {p['energy_recall']:.3f} | {p['recall']:.1%} | {p['selected']:.1%} "
        f"| {p['mean_kl']:.5f} | {p['top1']:.1%} |"
        for p in points
    )
    return CURVE.format(trained=points[0]["trained"], audited=points[0]["audited"], rows=rows)


def completions(evaluation: Json, temperature: float) -> str:
    shown = [entry for entry in evaluation["completions"] if entry["temperature"] == temperature]
    return "\n\n".join(f"```python\n{entry['prompt']}{entry['text'].rstrip()}\n```" for entry in shown)


def step_tokens(start: Json, shape: Json) -> int:
    recipe = start["recipe"]
    return int(recipe["micro_windows"] * recipe["micro_batches"] * shape["context"])


def restarts(starts: list[Json]) -> str:
    """A sentence for each time the run was taken up again, with the settings that were changed."""
    sentences = []
    for before, after in pairwise(starts):
        changed = [
            f"{key} {before['recipe'][key]} -> {value}"
            for key, value in after["recipe"].items()
            if before["recipe"].get(key) != value
        ]
        sentences.append(f" Resumed at step {after['step']}" + (f" with {', '.join(changed)}." if changed else "."))
    return "".join(sentences)


def this_processor() -> str:
    cores = find_cores()
    return f"{cores.physical} cores of {cores.model}"


def write_card(run: Path, out: Path, hardware: str, note: str) -> None:
    data, facts, evaluation = (read_json(run / f"{name}.json") for name in ("data", "run", "evaluation"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    starts, shape, sparsity, last = facts["starts"], facts["shape"], evaluation["sparsity"], log[-1]
    recipe = starts[0]["recipe"]
    train, held, temperature = data["train"], data["held_out"], 0.7
    minutes = last["seconds"] / 60
    predictor = describe(out / "epilimnion.q8_0.gguf").predictor
    if predictor is None:
        raise SystemExit(f"no predictor lies in {out}: run training.predict first")
    draw_loss(log, out / "loss.png")
    draw_sparsity(log, sparsity, out / "sparsity.png")
    text = CARD.format(
        **shape,
        **recipe,
        python=data["python"],
        parameters=facts["parameters"] / 1e6,
        file_size=(out / "epilimnion.q8_0.gguf").stat().st_size / 1e6,
        bits=evaluation["bits_per_byte"],
        nats=evaluation["nats_per_token"],
        xz=evaluation["bits_per_byte_xz"],
        below=evaluation["below_xz"],
        silent=sparsity["inactive_share"],
        held_tokens=evaluation["held_out"]["tokens"],
        layer_rows=layer_rows(sparsity),
        predictor_share=predictor.share,
        curve=curve(run),
        ranks=", ".join(map(str, predictor.ranks)),
        verdict="passed" if predictor.passed else "failed",
        audit=predictor.audit,
        train_files=train["files"],
        train_mb=train["bytes"] / 1e6,
        train_tokens=train["tokens"] / 1e6,
        train_digest=train["digest"],
        held_files=held["files"],
        held_mb=held["bytes"] / 1e6,
        held_digest=held["digest"],
        step_tokens=" to ".join(f"{size:,}" for size in sorted({step_tokens(start, shape) for start in starts})),
        restarts=restarts(starts) + (f" {note}" if note else ""),
        steps=last["step"],
        seen=last["tokens"] / 1e6,
        epochs=last["tokens"] / train["tokens"],
        minutes=minutes,
        hardware=hardware,
        commands=COMMANDS.format(minutes=minutes),
        temperature=temperature,
        completions=completions(evaluation, temperature),
    )
    (out / "MODEL_CARD.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of epilimnion.q8_0.gguf")
    parser.add_argument("--hardware", help="what it was trained on; without, this machine's processor")
    parser.add_argument("--note", default="", help="what else a reader must know about the run")
    arguments = parser.parse_args()
    write_card(arguments.run, arguments.out, arguments.hardware or this_processor(), arguments.note)


if __name__ == "__main__":
    main()
