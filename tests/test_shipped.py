"""The model that comes with the package, and a synthetic one beside it, over a thousand tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.synthetic import Generator, packed
from benchmarks.synthetic_families import SHAPES, metadata
from thermocline import LLM, SamplingSettings, describe, shipped_model
from thermocline.files.companion import companion
from thermocline.files.formats import Q8_0
from thermocline.files.gguf_writer import write_gguf
from thermocline.files.sidecar import SidecarKind, read_sidecar

TOKENS = 1000
GREEDY = SamplingSettings(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPT = "def quicksort(items):\n"


@pytest.fixture(scope="module", params=["shipped", "synthetic"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "shipped":
        return shipped_model()
    path = tmp_path_factory.mktemp("synthetic") / "synthetic-tiny.q8_0.gguf"
    shape = SHAPES["tiny"]
    weights = [packed(name, value, Q8_0, records=False) for name, value in Generator(shape, 0.12, seed=1).tensors()]
    write_gguf(path, metadata(path.stem, shape, 0.12), weights)
    return path


def generate(model: Path, **settings: object) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    with LLM.load(model, ctx_size=1024, **settings) as llm:
        prompt = PROMPT if model == shipped_model() else [1, 300, 400, 500]
        generation = llm.generate(prompt, GREEDY)
        return generation.tokens, generation.logprobs, generation.report.active_share


def test_a_thousand_greedy_tokens_are_the_same_dense_and_exact(model: Path) -> None:
    tokens, logprobs, active = generate(model, mode="exact", threads=1)
    assert len(tokens) == TOKENS
    assert generate(model, mode="dense", threads=1) == (tokens, logprobs, active)
    assert 0.01 < active < 0.2


def test_the_shipped_predictor_is_what_the_recipe_makes() -> None:
    pytest.importorskip("matplotlib")
    from training.predict import options

    recipe = options().parse_args(["--run", "x", "--gguf", str(shipped_model())])
    info = read_sidecar(companion(shipped_model(), SidecarKind.PREDICTOR)).info
    made = (recipe.train_tokens, recipe.epochs, recipe.energy_recall, recipe.profile_tokens, recipe.audit_tokens)
    names = ("tokens", "epochs", "energy_recall", "activity")
    assert made == (*(info["training"][name] for name in names), info["audit"]["tokens"])


def test_the_shipped_model_is_small_and_whole() -> None:
    info = describe()
    assert info.problems == () == info.warnings
    assert info.spec is not None
    assert info.spec.ffn.sparse
    assert sum(file.stat().st_size for file in shipped_model().parent.iterdir()) < 24_000_000
