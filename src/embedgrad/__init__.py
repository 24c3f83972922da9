"""Refine a text prompt by moving the embeddings of its own words a little.

EmbedGrad (https://arxiv.org/abs/2508.03533) as software: the words of a prompt are looked up in a
frozen language model's embedding table; those rows, and nothing else, follow the gradient of
labelled examples, inside a trust region that keeps their meaning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedgrad.artifact import save
    from embedgrad.comparing import compare
    from embedgrad.decoding import Decoding
    from embedgrad.deployed import load
    from embedgrad.deployment import export, verify
    from embedgrad.errors import (
        ArtifactError,
        DataError,
        DivergenceError,
        EmbedgradError,
        EngineError,
        ExportError,
        ModelError,
        RecipeError,
        RunError,
        TemplateError,
    )
    from embedgrad.evaluation import Comparison, Evaluation, Evaluator, evaluate
    from embedgrad.examples import Example
    from embedgrad.generate import replies
    from embedgrad.language_model import LanguageModel, load_model
    from embedgrad.optimization import optimize
    from embedgrad.planning import plan
    from embedgrad.prompt import PromptEmbedding, TrustRegion
    from embedgrad.recipe import Recipe
    from embedgrad.runs import run
    from embedgrad.sequence import Target
    from embedgrad.splits import Splits, read_splits
    from embedgrad.template import Template
    from embedgrad.training import Parts, Refinement, Training

__all__ = [
    "ArtifactError",
    "Comparison",
    "DataError",
    "Decoding",
    "DivergenceError",
    "EmbedgradError",
    "EngineError",
    "Evaluation",
    "Evaluator",
    "Example",
    "ExportError",
    "LanguageModel",
    "ModelError",
    "Parts",
    "PromptEmbedding",
    "Recipe",
    "RecipeError",
    "Refinement",
    "RunError",
    "Splits",
    "Target",
    "Template",
    "TemplateError",
    "Training",
    "TrustRegion",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_model",
    "optimize",
    "plan",
    "read_splits",
    "replies",
    "run",
    "save",
    "verify",
]

# Where each public name lives; looked up when first used, so that importing embedgrad is quick.
_HOMES = {
    "artifact": ("save",),
    "comparing": ("compare",),
    "decoding": ("Decoding",),
    "deployed": ("load",),
    "deployment": ("export", "verify"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "evaluation": ("Comparison", "Evaluation", "Evaluator", "evaluate"),
    "examples": ("Example",),
    "generate": ("replies",),
    "language_model": ("LanguageModel", "load_model"),
    "optimization": ("optimize",),
    "planning": ("plan",),
    "prompt": ("PromptEmbedding", "TrustRegion"),
    "recipe": ("Recipe",),
    "runs": ("run",),
    "sequence": ("Target",),
    "splits": ("Splits", "read_splits"),
    "template": ("Template",),
    "training": ("Parts", "Refinement", "Training"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'embedgrad' has no attribute {name!r}")
    module = importlib.import_module(f"embedgrad.{_HOME_OF[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
