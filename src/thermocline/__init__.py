"""Thermocline runs large language models by computing only the neurons that fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "LLM", "LoadSettings", "SamplingSettings", "ThermoclineError", "__version__", "describe", "examine",
    "merge_activities", "order", "perplexity", "probe_machine", "profile", "read_activity", "report", "shipped_model",
]  # fmt: skip

if TYPE_CHECKING:
    from thermocline.api import (
        LLM,
        describe,
        examine,
        merge_activities,
        order,
        perplexity,
        probe_machine,
        profile,
        read_activity,
        report,
        shipped_model,
    )
    from thermocline.config import LoadSettings, SamplingSettings
    from thermocline.errors import ThermoclineError

_HOMES = {
    "LLM": "thermocline.api",
    "describe": "thermocline.api",
    "examine": "thermocline.api",
    "merge_activities": "thermocline.api",
    "order": "thermocline.api",
    "perplexity": "thermocline.api",
    "probe_machine": "thermocline.api",
    "profile": "thermocline.api",
    "read_activity": "thermocline.api",
    "report": "thermocline.api",
    "shipped_model": "thermocline.api",
    "LoadSettings": "thermocline.config",
    "SamplingSettings": "thermocline.config",
    "ThermoclineError": "thermocline.errors",
}


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import thermocline` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'thermocline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
