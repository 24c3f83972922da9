"""Comparison methods (baselines), all scored the same way."""

from embedgrad.experiments.baselines.base import (
    Answers,
    Method,
    Task,
    Trained,
    why_not_one_span,
)
from embedgrad.experiments.baselines.calibration import BatchCalibration, Threshold
from embedgrad.experiments.baselines.embedgrad import (
    EmbedGrad,
    random_rows,
    why_not_reward,
    with_random_rewards,
    without_region,
)
from embedgrad.experiments.baselines.knn import NearestNeighbors
from embedgrad.experiments.baselines.linear_probe import LinearProbe
from embedgrad.experiments.baselines.lora import Lora
from embedgrad.experiments.baselines.no_template import NoTemplate
from embedgrad.experiments.baselines.prompt_tuning import CPT, PromptTuning
from embedgrad.experiments.baselines.prompting import BestOfN, FewShot, Text

# In the table's order; `recipe.settings.COMPARED` has the same names.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Text("text"),
        NoTemplate("no-template"),
        BestOfN("best-of-n"),
        FewShot("few-shot"),
        BatchCalibration("batch-calibration"),
        Threshold("threshold"),
        LinearProbe("linear-probe"),
        NearestNeighbors("knn"),
        EmbedGrad("embedgrad"),
        EmbedGrad("embedgrad-no-region", parts=without_region),
        EmbedGrad("random-init", start=random_rows, why_not=why_not_one_span),
        EmbedGrad("random-reward", parts=with_random_rewards, why_not=why_not_reward),
        PromptTuning("peft-prompt-tuning-text", from_text=True),
        PromptTuning("peft-prompt-tuning-random", from_text=False),
        CPT("peft-cpt"),
        Lora("peft-lora"),
    )
}

__all__ = ["METHODS", "Answers", "Method", "Task", "Trained"]
