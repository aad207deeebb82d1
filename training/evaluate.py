"""Measure a checkpoint on the held-out files: bits per byte beside xz, sparsity, completions.

python -m training.evaluate --run build/epilimnion
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from thermocline.files.formats import Q8_0
from thermocline.files.quantize import dequantize, quantize
from training.data import collect, end_of_text, is_held_out, list_digest, standard_library
from training.network import Network, Shape

# None ends in white space: the pre-tokenizer joins a line break to the indentation that follows it, so a
# prompt that stops between the two is unlike anything seen in training.
PROMPTS = (
    "def read_lines(path):",
    "def is_prime(n):",
    "class TestQueue(unittest.TestCase):",
    'def parse_header(line):\n    """',
    "import os\nimport sys\n\ndef main(",
    "    def __repr__(self):\n        return",
)


def load(checkpoint: Path, device: str = "cpu") -> tuple[Network, dict[str, Any]]:
    """The network of a checkpoint in float32, and the checkpoint's other entries."""
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    network = Network(Shape(**state["shape"])).to(device)
    network.load_state_dict(state.pop("network"))
    state.pop("optimisers")
    return network.eval(), state


@torch.no_grad()
def quantise(network: Network) -> None:
    """Replace every matrix by its Q8_0 rounding, so that the shipped precision is what is measured."""
    for parameter in network.parameters():
        if parameter.ndim == 2:
            packed = quantize(parameter.cpu().numpy(), Q8_0)
            parameter.copy_(torch.from_numpy(dequantize(packed, Q8_0, parameter.shape[1])))


@torch.no_grad()
def measure(network: Network, tokens: np.ndarray, stride: int, batch: int = 8) -> tuple[float, Tensor]:
    """Nats of the whole stream, and each neuron's number of firings at the tokens scored.

    Windows of the full context advance by `stride`; each scores only the targets that are new to it,
    so all but the first have at least context - stride tokens before them.
    """
    shape = network.shape
    device = network.norm.weight.device
    stream = torch.from_numpy(tokens.astype(np.int64))
    fired = torch.zeros(shape.layers, shape.neurons, dtype=torch.float64, device=device)
    nats, scored = 0.0, 0  # targets 1..scored are done
    last = len(stream) - 1
    starts = list(range(0, max(1, last - shape.context + stride), stride))
    for first in range(0, len(starts), batch):
        windows = [min(start, last - shape.context) for start in starts[first : first + batch]]
        rows = torch.stack([stream[start : start + shape.context + 1] for start in windows]).to(device)
        logits, activations = network(rows[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(windows), -1)
        for row, start in enumerate(windows):
            new = slice(scored - start, shape.context)
            nats += losses[row, new].double().sum().item()
            for layer, activation in enumerate(activations):
                fired[layer] += (activation[row, new] > 0).sum(dim=0)
            scored = start + shape.context
    assert scored == last
    return nats, fired.cpu()


def sparsity(fired: Tensor, tokens: int) -> dict[str, Any]:
    """Share of silent neurons by layer, and how unevenly the firings are spread."""
    hottest = fired.sort(dim=1, descending=True).values.cumsum(dim=1) / fired.sum(dim=1, keepdim=True)
    fifth = fired.shape[1] // 5
    return {
        "inactive_share": 1 - (fired.mean() / tokens).item(),
        "inactive_share_by_layer": (1 - fired.mean(dim=1) / tokens).tolist(),
        "never_fired_by_layer": (fired == 0).sum(dim=1).tolist(),
        "firings_of_the_hottest_fifth_by_layer": hottest[:, fifth - 1].tolist(),
        "temperature_percentiles_by_layer": {
            str(p): torch.quantile(fired / tokens, p / 100, dim=1).tolist() for p in (1, 10, 50, 90, 99)
        },
    }


@torch.no_grad()
def complete(network: Network, tokenizer: Tokenizer, prompt: str, length: int, temperature: float) -> str:
    """Sampled continuation (greedy at temperature 0), every step computed afresh."""
    generator = torch.Generator().manual_seed(0)
    end = end_of_text(tokenizer)
    ids = [end, *tokenizer.encode(prompt).ids]
    opened = len(ids)
    for _ in range(length):
        logits = network(torch.tensor([ids[-network.shape.context :]]))[0][0, -1]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == end:
            break
    return str(tokenizer.decode(ids[opened:]))


def held_out_bytes(run: Path, root: Path) -> bytes:
    """The held-out files one after the other; refused when they are not those of the run."""
    sources = [source for source in collect(root) if is_held_out(source.path)]
    if list_digest(sources) != json.loads((run / "data.json").read_text())["held_out"]["digest"]:
        raise SystemExit(f"the held-out files below {root} are not those this run was prepared with")
    return b"".join(source.text.encode() for source in sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=standard_library())
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--as-trained", action="store_true", help="float32 weights instead of Q8_0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run: Path = arguments.run
    network, state = load(run / "checkpoint.pt")
    if not arguments.as_trained:
        quantise(network)
    text = held_out_bytes(run, arguments.root)
    tokens = np.load(run / "held_out.npy")
    nats, fired = measure(network, tokens, arguments.stride)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    ours = nats / math.log(2) / len(text)
    report = {
        "weights": "float32" if arguments.as_trained else "Q8_0",
        "step": state["step"],
        "held_out": {"bytes": len(text), "tokens": len(tokens)},
        "nats_per_token": nats / (len(tokens) - 1),
        "bits_per_byte": ours,
        "bits_per_byte_xz": xz,
        "below_xz": 1 - ours / xz,
        "sparsity": sparsity(fired, len(tokens) - 1),
        "completions": [
            {"prompt": p, "temperature": t, "text": complete(network, tokenizer, p, 96, t)}
            for p in PROMPTS
            for t in (0.0, 0.7)
        ],
    }
    name = "evaluation_as_trained.json" if arguments.as_trained else "evaluation.json"
    (run / name).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
