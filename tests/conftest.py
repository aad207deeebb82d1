"""A tiny random model with a byte tokenizer, for tests that need a whole file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from thermocline.activity.predictor import Predictor, save_predictor
from thermocline.files.companion import companion
from thermocline.files.formats import F32, Q8_0
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.metadata import Metadata
from thermocline.files.open import open_model
from thermocline.files.powerinfer import PredictorLayer
from thermocline.files.quantize import from_float, to_float
from thermocline.files.sidecar import SidecarKind
from thermocline.files.weight import Weight
from thermocline.model.families import family_of
from thermocline.model.header import gguf_header
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import expected_tensors
from thermocline.ops.contract import Activation, FfnKind
from thermocline.text.tokenizer import CHARACTER_OF_BYTE


def quicken_interpreter() -> None:
    """Let Triton's interpreter put its own functions into the language once for a launch.

    It does so again for each call of a function within, which takes a third of the time, and looks each element
    type up in a table that it makes for that.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._get_np_dtype
    known = cache(plain)
    patch, language = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    inside = SimpleNamespace(restore=lambda: None)
    launches: list[Any] = []

    def once(_: Any) -> Any:
        if launches:
            return inside
        launches.append(patch(language))
        return SimpleNamespace(restore=lambda: launches.pop().restore())

    interpreter._patch_lang = once
    interpreter._get_np_dtype = lambda kind: (known if type(kind.scalar) is tl.dtype else plain)(kind.scalar)


if "CUDA_VISIBLE_DEVICES" not in os.environ and not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    # Without a GPU its kernels run in Triton's interpreter, which must be chosen before they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken_interpreter()

ON_DEVICE = {f"test_{name}.py" for name in ("captured", "gpu_kernels", "gpu_memory", "hybrid_gpu", "movable_gpu")}
"""Files that are about the GPU's kernels: with a GPU they run on it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a GPU is, `-m gpu` takes all that can run on it; where none is, what needs one is skipped."""
    real = os.environ.get("TRITON_INTERPRET") != "1"
    for item in items:
        if real and (item.path.name in ON_DEVICE or "gpu" in item.name.partition("[")[2].rstrip("]").split("-")):
            item.add_marker(pytest.mark.gpu)
        if not real and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


LAYERS, WIDTH, NEURONS, HEADS, KV_HEADS, CONTEXT = 2, 64, 96, 4, 2, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [CHARACTER_OF_BYTE[b] for b in range(256)] + ["he", *SPECIAL]
END = PIECES.index("<|endoftext|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny(
    path: Path, *, architecture: str = "arcee", chat: bool = True, n_ctx: int = CONTEXT, heads: int = HEADS
) -> Path:
    """A random network (ReLU² without gate, or SwiGLU for `llama`) whose tokens are bytes, as GGUF."""
    random = np.random.default_rng(5)
    gated = architecture == "llama"

    def weight(name: str, rows: int, columns: int) -> Weight:
        if rows == 1:
            return from_float(name, np.ones((1, columns), np.float32), F32)
        return from_float(name, random.normal(0, 0.3, (rows, columns)).astype(np.float32), Q8_0)

    head, kv_heads = WIDTH // heads, heads * KV_HEADS // HEADS
    weights = [weight("token_embd.weight", len(PIECES), WIDTH)]
    for i in range(LAYERS):
        shapes = {
            "attn_norm": (1, WIDTH), "attn_q": (WIDTH, WIDTH), "attn_k": (kv_heads * head, WIDTH),
            "attn_v": (kv_heads * head, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (1, WIDTH),
            **({"ffn_gate": (NEURONS, WIDTH)} if gated else {}),
            "ffn_up": (NEURONS, WIDTH), "ffn_down": (WIDTH, NEURONS),
        }  # fmt: skip
        weights += [weight(f"blk.{i}.{name}.weight", *shape) for name, shape in shapes.items()]
    weights += [weight("output_norm.weight", 1, WIDTH), weight("output.weight", len(PIECES), WIDTH)]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": "tiny",
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.feed_forward_length": NEURONS,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": head,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.context_length": n_ctx,
        f"{architecture}.vocab_size": len(PIECES),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": np.array([3 if p in SPECIAL else 1 for p in PIECES], np.int32),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": np.uint32(END),
        "tokenizer.ggml.bos_token_id": np.uint32(END),
        "tokenizer.ggml.add_bos_token": False,
    }
    if chat:
        metadata["tokenizer.chat_template"] = TEMPLATE
    write_gguf(path, metadata, weights)
    return path


def rounding_bound(layers: int, width: int, *, integers: bool) -> float:
    """How far logits of two devices may be apart, as a share of their norm.

    A layer has seven products whose inputs one side may round and the other not (q, k, v, output, gate, up, down), the
    head is one more. Their errors are independent, so squares add. Where weights are integers the CPU rounds blocks of
    32 activations to steps of a 127th of the largest, here 4 standard deviations (a normal number is beyond once in
    16,000), which is off by a step's 12th root; else sums of `width` terms are off by eps a term.
    """
    one = 4 / 127 / 12**0.5 if integers else width * 2.0**-24
    return float((7 * layers + 1) ** 0.5 * one)


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """`agree(got, wanted, layers, width, integers)`: two devices computed the same, but for rounding."""

    def check(got: np.ndarray, wanted: np.ndarray, layers: int, width: int, *, integers: bool) -> None:
        off = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        assert off <= rounding_bound(layers, width, integers=integers)

    return check


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLU² model with a chat template."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 32 elements, a whole block of Q8_0."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "wide.gguf", heads=2)


@pytest.fixture(scope="session")
def tiny_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "plain.gguf", chat=False)


@pytest.fixture(scope="session")
def tiny_silu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SwiGLU model, no neuron of which is ever zero."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "silu.gguf", architecture="llama")


def oracle_predictor(source: Any, threshold: float = 1e-20, shares: float | None = None, **info: Any) -> Predictor:
    """The predictor of a model that is always right: of twice as many hidden units as neurons.

    A neuron fires where the product g of its first row (gate or up) with the normed residual stream is positive. The
    norm only scales, so that the sign is that of the row times the norm's weights; and g = relu(g) - relu(-g).
    """
    family = family_of(source)
    spec = family.spec(source)
    weights = family.weights(source, spec)
    first, layers = "ffn_gate" if spec.ffn.gated else "ffn_up", []
    for i in range(spec.n_layer):
        rows = to_float(weights[f"blk.{i}.{first}.weight"]) * to_float(weights[f"blk.{i}.ffn_norm.weight"])
        identity = np.eye(spec.n_ff, dtype=np.float32)
        fc1 = from_float("fc1", np.concatenate([rows, -rows]), F32)
        layers.append(PredictorLayer(fc1, from_float("fc2", np.concatenate([identity, -identity], axis=1), F32)))
    measured = None if shares is None else (shares,) * spec.n_layer
    return Predictor(tuple(layers), (threshold,) * spec.n_layer, measured, info)


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Predictor]:
    """`oracle(source, threshold, shares, **info)`: the predictor of a model that is always right."""
    return oracle_predictor


@pytest.fixture
def with_predictor(tmp_path: Path) -> Callable[..., Path]:
    """`with_predictor(model, threshold, shares, **info)`: a copy of a model with its predictor beside it."""

    def make(model: Path, threshold: float = 1e-20, shares: float | None = None, **info: Any) -> Path:
        copy = tmp_path / model.name
        shutil.copy(model, copy)
        with open_model(copy) as source:
            predictor = oracle_predictor(source, threshold, shares, **info)
            path = companion(copy, SidecarKind.PREDICTOR)
            save_predictor(predictor, path, source.fingerprint, model_name="tiny")
        return copy

    return make


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """`broken(model, tensor)`: a copy of a model in which a tensor's first value, or block's scale, is NaN."""

    def make(model: Path, tensor: str = "blk.0.attn_q.weight") -> Path:
        copy = tmp_path / "broken" / model.name
        copy.parent.mkdir()
        with GgufFile.open(model) as file:
            kept = {name: t.data.copy() for name, t in file.tensors.items()}
            first = kept[tensor].reshape(-1)
            first[:4] = 0xFF  # NaN as F16, BF16 and F32
            tensors = [NewTensor(t.name, t.format, t.shape, lambda n=n: kept[n]) for n, t in file.tensors.items()]
            write_gguf(copy, file.typed_metadata(), tensors)
        return copy

    return make


def measure_briefly(patch: pytest.MonkeyPatch) -> None:
    """What is measured of the machine is measured over little memory, and inexactly."""
    small = {"bandwidth.BUFFER": 1 << 20, "bandwidth.LARGE_CACHES": 0, "probe.SECONDS": 0.005}
    undoubted = {"probe.UNDISTURBED": 0.0, "probe.CONTRADICTION": 1e9}  # caches are quick, and tests run beside others
    for name, value in (small | undoubted).items():
        patch.setattr(f"thermocline.hardware.{name}", value)
    patch.setattr("thermocline.hardware.disk.SCRATCH", 2 << 20)


@pytest.fixture(scope="module")
def machine_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of the machine is not kept for the user; without a GPU, whose plans need it, it is rough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMOCLINE_HOME", str(tmp_path_factory.mktemp("home")))
        if os.environ.get("TRITON_INTERPRET") == "1":
            measure_briefly(patch)
        yield


@pytest.fixture
def worth_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made as for a memory some times as fast as RAM, so that small models too are placed there."""
    from thermocline.runtime import placing

    monkeypatch.setattr(placing, "make_plan", placing.stand_in)


@pytest.fixture
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same for one test, with rough measurements."""
    monkeypatch.setenv("THERMOCLINE_HOME", str(tmp_path / "home"))
    measure_briefly(monkeypatch)


def one_line(text: str) -> bool:
    """Whether `text` is a single line, as every error must be."""
    return re.fullmatch(r"[^\n]+\n?", text) is not None


@dataclass(frozen=True)
class DictSource:
    """A model in memory."""

    metadata: Metadata
    weights: Mapping[str, Weight]
    kind: str = "gguf"
    path: Path = Path("tiny")
    fingerprint: str = "0" * 64


@pytest.fixture
def make_opt() -> Callable[..., DictSource]:
    """Two layers of 96 neurons with learned positions and biases, the same numbers every time."""

    def make(*, records: bool = False, n_vocab: int = 50) -> DictSource:
        spec = ModelSpec(
            family="opt", name="tiny", n_layer=2, n_embd=64, n_head=2, n_head_kv=2, head_dim=32, n_ff=96,
            n_vocab=n_vocab, n_ctx_train=32, norm_eps=1e-5, rope=None, ffn=FfnKind(Activation.RELU, gated=False),
            windows=(0, 0), tied_embeddings=True, qkv_bias=True, out_bias=True, layer_norm=True, ffn_bias=True,
            position_offset=2,
        )  # fmt: skip
        rng = np.random.default_rng(11)
        weights = {
            name: from_float(name, rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2), F32)
            for name, shape in expected_tensors(spec, records=records).items()
        }
        header = {k: v.item() if isinstance(v, np.generic) else v for k, v in gguf_header(spec).items()}
        return DictSource(Metadata("tiny", header), weights)

    return make


@pytest.fixture
def tiny_opt(make_opt: Callable[..., DictSource], tiny_model: Path, tmp_path: Path) -> Path:
    """The same as a file with neuron records and a tokenizer, its neurons' biases being far apart."""
    with open_model(tiny_model) as other:
        names = {key: value for key, value in other.metadata.items() if key.startswith("tokenizer.")}
    source = make_opt(records=True, n_vocab=len(PIECES))
    biases = {f"blk.{i}.ffn_up.bias": np.roll(np.linspace(-2, 2, 96, dtype=np.float32), 37 * i) for i in range(2)}
    weights = {**source.weights, **{name: from_float(name, bias[None], F32) for name, bias in biases.items()}}
    write_gguf(tmp_path / "opt.gguf", {**source.metadata, **names}, list(weights.values()))
    return tmp_path / "opt.gguf"
