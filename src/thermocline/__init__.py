"""Thermocline runs large language models by computing only the neurons that fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "LLM", "LoadSettings", "SamplingSettings", "ThermoclineError", "TrainSettings", "__version__", "audit",
    "compare_plans", "convert", "describe", "examine", "explain", "export_activity", "export_gpu_index",
    "export_predictor", "import_activity", "import_predictor", "known_machines", "merge_activities", "order",
    "perplexity", "plan", "probe_machine", "profile", "quantize", "read_activity", "report", "save_order", "save_plan",
    "shipped_model", "train_predictor",
]  # fmt: skip

if TYPE_CHECKING:
    from thermocline.api import (
        LLM,
        audit,
        compare_plans,
        convert,
        describe,
        examine,
        explain,
        export_activity,
        export_gpu_index,
        export_predictor,
        import_activity,
        import_predictor,
        known_machines,
        merge_activities,
        order,
        perplexity,
        plan,
        probe_machine,
        profile,
        quantize,
        read_activity,
        report,
        save_order,
        save_plan,
        shipped_model,
        train_predictor,
    )
    from thermocline.config import LoadSettings, SamplingSettings, TrainSettings
    from thermocline.errors import ThermoclineError

_HOMES = {
    "LLM": "thermocline.api",
    "audit": "thermocline.api",
    "compare_plans": "thermocline.api",
    "convert": "thermocline.api",
    "describe": "thermocline.api",
    "examine": "thermocline.api",
    "explain": "thermocline.api",
    "export_activity": "thermocline.api",
    "export_gpu_index": "thermocline.api",
    "export_predictor": "thermocline.api",
    "import_activity": "thermocline.api",
    "import_predictor": "thermocline.api",
    "known_machines": "thermocline.api",
    "merge_activities": "thermocline.api",
    "order": "thermocline.api",
    "perplexity": "thermocline.api",
    "plan": "thermocline.api",
    "probe_machine": "thermocline.api",
    "profile": "thermocline.api",
    "quantize": "thermocline.api",
    "read_activity": "thermocline.api",
    "report": "thermocline.api",
    "save_order": "thermocline.api",
    "save_plan": "thermocline.api",
    "shipped_model": "thermocline.api",
    "train_predictor": "thermocline.api",
    "LoadSettings": "thermocline.config",
    "SamplingSettings": "thermocline.config",
    "TrainSettings": "thermocline.config",
    "ThermoclineError": "thermocline.errors",
}


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import thermocline` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'thermocline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
