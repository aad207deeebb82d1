"""Which family a model is of: a registry by GGUF architecture and by Hugging Face `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from thermocline.errors import UnsupportedModelError, printable
from thermocline.model.families.arcee import Arcee
from thermocline.model.families.bamboo import Bamboo
from thermocline.model.families.base import Family
from thermocline.model.families.falcon import Falcon
from thermocline.model.families.llama import Llama
from thermocline.model.families.mistral import Mistral
from thermocline.model.families.opt import Opt
from thermocline.model.families.qwen2 import Qwen2
from thermocline.model.families.qwen3 import Qwen3
from thermocline.model.source import NetworkSource

BY_ARCHITECTURE: Mapping[str, Family] = {
    f.architecture: f for f in (Llama(), Bamboo(), Qwen2(), Qwen3(), Arcee(), Opt(), Falcon())
}
"""Families by `general.architecture` of a GGUF file."""

BY_MODEL_TYPE: Mapping[str, Family] = {
    "llama": Llama(),
    "sparsellama": Llama(),
    "mistral": Mistral(),
    "bamboo": Bamboo(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "arcee": Arcee(),
    "opt": Opt(),
    "falcon": Falcon(),
}
"""Families by `model_type` of a config.json."""


def family_of(source: NetworkSource) -> Family:
    """The family of a model.

    Raises:
        ModelFormatError: the source does not say.
        UnsupportedModelError: the family is not implemented; the message lists those that are.
    """
    gguf = source.kind == "gguf"
    known = BY_ARCHITECTURE if gguf else BY_MODEL_TYPE
    name = source.metadata.text("general.architecture" if gguf else "model_type", limit=100)
    if name not in known:
        raise UnsupportedModelError(
            f"{printable(str(source.path))}: family {printable(name)} is not implemented; known are {', '.join(known)}"
        )
    return known[name]
