"""elsteer: Energy Landscape Steering (arXiv 2510.08646).

Fewer false refusals from open-weight chat models, at unchanged safety, with no weight changed:

    model, tokenizer = elsteer.load("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    landscape = elsteer.fit(model, tokenizer, prompts, run_dir="runs/qwen")
    with landscape.attach(model, strength=1.0):
        model.generate(**inputs)
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsteer.comparison.compare import compare
    from elsteer.errors import ElsteerError
    from elsteer.evaluation.evaluate import Evaluation, evaluate
    from elsteer.fitting import fit
    from elsteer.landscape import Landscape
    from elsteer.models import load
    from elsteer.prompts import Prompt, load_starter, load_suite, read_prompts
    from elsteer.settings import FitSettings
    from elsteer.steering import Steering

__all__ = [
    "ElsteerError",
    "Evaluation",
    "FitSettings",
    "Landscape",
    "Prompt",
    "Steering",
    "compare",
    "evaluate",
    "fit",
    "load",
    "load_starter",
    "load_suite",
    "read_prompts",
]

try:
    __version__ = version("elsteer")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

_HOMES = {
    "ElsteerError": "elsteer.errors",
    "Evaluation": "elsteer.evaluation.evaluate",
    "FitSettings": "elsteer.settings",
    "Landscape": "elsteer.landscape",
    "Prompt": "elsteer.prompts",
    "Steering": "elsteer.steering",
    "compare": "elsteer.comparison.compare",
    "evaluate": "elsteer.evaluation.evaluate",
    "fit": "elsteer.fitting",
    "load": "elsteer.models",
    "load_starter": "elsteer.prompts",
    "load_suite": "elsteer.prompts",
    "read_prompts": "elsteer.prompts",
}


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that `elsteer --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'elsteer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
