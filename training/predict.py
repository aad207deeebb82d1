"""Make the model's activity and predictor with thermocline's own commands, audit it, and draw what it costs.

    python -m training.predict --run build/epilimnion --gguf src/thermocline/shipped/epilimnion.q8_0.gguf

Each command is printed before it runs. The texts are the run's own split: profile and train-predictor read training
files, audit reads held-out ones. With `--curve`, predictors of several sizes are trained and audited instead, on fewer
tokens, to show what a larger share of the model buys; the model card shows the result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from training.card import BLUE, GREY, ORANGE
from training.data import collect, is_held_out, list_digest, standard_library

Json = dict[str, Any]

RANKS = (32, 64, 96, 160)


def write_texts(root: Path, run: Path) -> tuple[Path, Path]:
    """The run's training files and held-out files, as they were trained on; refused when they are other ones."""
    sources = collect(root)
    facts = json.loads((run / "data.json").read_text())
    folders = []
    for name, held in (("train", False), ("held_out", True)):
        part = [source for source in sources if is_held_out(source.path) is held]
        if list_digest(part) != facts[name]["digest"]:
            raise SystemExit(f"the {name} files below {root} are not those this run was prepared with")
        folder = run / "texts" / name
        folder.mkdir(parents=True, exist_ok=True)
        for source in part:
            path = folder / source.path.replace("/", "__")
            if not path.exists():  # what profile and train-predictor resume is tied to when a file was written
                path.write_text(source.text)
        folders.append(folder)
    return folders[0], folders[1]


def command(*words: object, allowed: tuple[int, ...] = (0,)) -> str:
    """Run a command of thermocline; what it printed."""
    line = [str(word) for word in words]
    print("$ thermocline " + shlex.join(line), flush=True)
    done = subprocess.run([sys.executable, "-m", "thermocline", *line], stdout=subprocess.PIPE, text=True)
    print("" if "--json" in line else done.stdout, flush=True)
    if done.returncode not in allowed:
        raise SystemExit(f"that ended with exit code {done.returncode}")
    return done.stdout


def point(rank: int, model: Path, activity: Path, texts: tuple[Path, Path], run: Path, tokens: int) -> Json:
    """A predictor of `rank` in every layer, trained and audited on few tokens."""
    path = run / f"rank{rank}.predictor.safetensors"
    command(
        "train-predictor", "-m", model, "--activity", activity, "--text", texts[0], "-n", tokens, "--rank", rank,
        "--max-share", 0, "-o", path, "--overwrite", "--json",
    )  # fmt: skip
    audit = ("audit", "-m", model, "--predictor", path, "--text", texts[1], "-n", 2048, "--json")
    found: Json = json.loads(command(*audit, allowed=(0, 1)))
    layers = found["layers"]
    mean = {
        name: sum(layer[name] for layer in layers) / len(layers) for name in ("energy_recall", "recall", "selected")
    }
    print(f"rank {rank}: {found['summary']}", flush=True)
    return {
        "rank": rank, "share": found["share_of_parameters"], **mean, **found["predicted"], "passed": found["passed"],
        "trained": tokens, "audited": found["tokens"],
    }  # fmt: skip


def draw_curve(points: list[Json], path: Path) -> None:
    """What a larger predictor buys: fewer neurons selected, and less lost."""
    shares = [100 * p["share"] for p in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=120, layout="constrained")
    for name, colour, key in (("recall", ORANGE, "recall"), ("energy recall", BLUE, "energy_recall")):
        left.plot(shares, [100 * p[key] for p in points], color=colour, marker=".", label=name)
    left.plot(shares, [100 * p["selected"] for p in points], color=GREY, marker=".", label="neurons selected")
    left.set(xlabel="predictor, % of the parameters", ylabel="%", title="what is selected", ylim=(0, 103))
    right.plot(shares, [p["mean_kl"] for p in points], color=BLUE, marker=".", label="mean KL")
    right.axhline(0.01, color=GREY, linestyle=":", label="gate")
    right.set(xlabel="predictor, % of the parameters", ylabel="nats", yscale="log", title="what is lost")
    for axes in (left, right):
        axes.axvline(9, color=GREY, linestyle="--", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


def options() -> argparse.ArgumentParser:
    """What may be given; the defaults made the shipped predictor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--gguf", type=Path, required=True, help="the model; the files are written beside it")
    parser.add_argument("--root", type=Path, default=standard_library())
    parser.add_argument("--profile-tokens", type=int, default=200_000)
    parser.add_argument("--train-tokens", type=int, default=131_072)
    parser.add_argument("--audit-tokens", type=int, default=8192)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--energy-recall", type=float, default=0.99)
    parser.add_argument("--curve", action="store_true", help="train and audit predictors of several sizes instead")
    parser.add_argument("--curve-tokens", type=int, default=49_152)
    return parser


def main() -> None:
    arguments = options().parse_args()
    model, run = arguments.gguf, arguments.run
    base, out = model.name.removesuffix(".gguf"), model.parent
    activity, predictor = out / f"{base}.activity.safetensors", out / f"{base}.predictor.safetensors"
    texts = train, held_out = write_texts(arguments.root, run)
    if arguments.curve:
        points = []
        for rank in RANKS:
            points.append(point(rank, model, activity, texts, run, arguments.curve_tokens))
            (run / "predictor_curve.json").write_text(json.dumps(points, indent=2) + "\n")
        draw_curve(points, out / "predictor_shares.png")
        return
    command(
        "profile", "-m", model, "--text", train, "-n", arguments.profile_tokens, "-o", activity, "--overwrite"
    )  # fmt: skip
    command(
        "train-predictor", "-m", model, "--activity", activity, "--text", train, "-n", arguments.train_tokens,
        "--epochs", arguments.epochs, "--energy-recall", arguments.energy_recall, "-o", predictor, "--overwrite",
    )  # fmt: skip
    command("audit", "-m", model, "--text", held_out, "-n", arguments.audit_tokens, allowed=(0, 1))
    command("report", activity, "--predictor", predictor, "--pictures", out / "pictures")


if __name__ == "__main__":
    main()
