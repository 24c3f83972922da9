"""Refine a text prompt by moving the embeddings of its own words a little.

EmbedGrad (https://arxiv.org/abs/2508.03533) as software: the words of a prompt are looked up in a
frozen language model's embedding table; those rows, and nothing else, follow the gradient of
labelled examples, inside a trust region that keeps their meaning.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# Products of the MKL, PyTorch's on x86, have the same bits in any company and at any address, so
# that a resumed run is the same. With AVX2 prefixes are built up to 15 % slower, with AVX-512 no
# slower (benchmarks/LOG.md). Read at the first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    __version__: str

    from embedgrad.data.examples import Example
    from embedgrad.data.splits import Splits, read_splits
    from embedgrad.deploy.export import ExportResult, export, verify
    from embedgrad.deploy.hub import PushResult, push
    from embedgrad.deploy.verify.parity import CheckResult
    from embedgrad.errors import (
        ArtifactError,
        DataError,
        DivergenceError,
        EmbedgradError,
        EngineError,
        ExportError,
        InputError,
        ModelError,
        OptionError,
        RecipeError,
        RunError,
        TemplateError,
    )
    from embedgrad.evaluation.evaluator import Comparison, Evaluation, Evaluator, evaluate
    from embedgrad.events import quiet
    from embedgrad.experiments.clean import CleanResult, clean
    from embedgrad.experiments.compare.compare import compare
    from embedgrad.experiments.compare.results import CompareResult
    from embedgrad.experiments.continual import continue_run
    from embedgrad.experiments.estimators import PromptClassifier, PromptGenerator
    from embedgrad.experiments.finish import RunResult
    from embedgrad.experiments.plan import PlanResult, plan
    from embedgrad.experiments.run import run
    from embedgrad.experiments.tasks import run_tasks
    from embedgrad.inference.pool import load_policy
    from embedgrad.inference.refined_prompt import load
    from embedgrad.model.decoding import Decoding
    from embedgrad.model.generation import replies
    from embedgrad.model.language_model import LanguageModel, load_model
    from embedgrad.parts.scorers.function import scorer
    from embedgrad.prompt.artifact import save
    from embedgrad.prompt.embedding import PromptEmbedding
    from embedgrad.prompt.sequence import Target
    from embedgrad.prompt.template import Template
    from embedgrad.prompt.trust_region import TrustRegion
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.recipe.tasks import read_tasks
    from embedgrad.report.page.figure import figure
    from embedgrad.training.optimize import optimize, optimize_tasks
    from embedgrad.training.settings import Parts, Refinement, Training

__all__ = [
    "ArtifactError",
    "CheckResult",
    "CleanResult",
    "CompareResult",
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
    "ExportResult",
    "InputError",
    "LanguageModel",
    "ModelError",
    "OptionError",
    "Parts",
    "PlanResult",
    "PromptClassifier",
    "PromptEmbedding",
    "PromptGenerator",
    "PushResult",
    "Recipe",
    "RecipeError",
    "Refinement",
    "RunError",
    "RunResult",
    "Splits",
    "Target",
    "Template",
    "TemplateError",
    "Training",
    "TrustRegion",
    "clean",
    "compare",
    "continue_run",
    "evaluate",
    "export",
    "figure",
    "load",
    "load_model",
    "load_policy",
    "optimize",
    "optimize_tasks",
    "plan",
    "push",
    "quiet",
    "read_splits",
    "read_tasks",
    "replies",
    "run",
    "run_tasks",
    "save",
    "scorer",
    "verify",
]

# Where each public name lives; looked up when first used, so that importing embedgrad is quick.
_HOMES = {
    "data.examples": ("Example",),
    "data.splits": ("Splits", "read_splits"),
    "deploy.export": ("ExportResult", "export", "verify"),
    "deploy.hub": ("PushResult", "push"),
    "deploy.verify.parity": ("CheckResult",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "events": ("quiet",),
    "evaluation.evaluator": ("Comparison", "Evaluation", "Evaluator", "evaluate"),
    "experiments.clean": ("CleanResult", "clean"),
    "experiments.compare.compare": ("compare",),
    "experiments.compare.results": ("CompareResult",),
    "experiments.estimators": ("PromptClassifier", "PromptGenerator"),
    "experiments.plan": ("PlanResult", "plan"),
    "experiments.continual": ("continue_run",),
    "experiments.finish": ("RunResult",),
    "experiments.run": ("run",),
    "experiments.tasks": ("run_tasks",),
    "inference.pool": ("load_policy",),
    "inference.refined_prompt": ("load",),
    "model.decoding": ("Decoding",),
    "model.generation": ("replies",),
    "model.language_model": ("LanguageModel", "load_model"),
    "parts.scorers.function": ("scorer",),
    "prompt.artifact": ("save",),
    "prompt.embedding": ("PromptEmbedding",),
    "prompt.sequence": ("Target",),
    "prompt.template": ("Template",),
    "prompt.trust_region": ("TrustRegion",),
    "recipe.recipe": ("Recipe",),
    "recipe.tasks": ("read_tasks",),
    "report.page.figure": ("figure",),
    "training.optimize": ("optimize", "optimize_tasks"),
    "training.settings": ("Parts", "Refinement", "Training"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # not at the top, as it is slow to import

        return version("embedgrad")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'embedgrad' has no attribute {name!r}")
    module = importlib.import_module(f"embedgrad.{_HOME_OF[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
