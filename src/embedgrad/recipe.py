"""A recipe: a TOML file -> checked settings -> built parts. Every problem is told at once."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from embedgrad.errors import EmbedgradError, RecipeError, nearest
from embedgrad.evaluation import Evaluation
from embedgrad.head_cache import budget_bytes
from embedgrad.optimizers import Schedule
from embedgrad.parts import build, build_part, part_values
from embedgrad.prompt import TrustRegion
from embedgrad.sequence import Target
from embedgrad.settings import DataSettings, HeadCacheSettings, ModelSettings, ReportSettings
from embedgrad.template import ROLES, Message, Template
from embedgrad.training import Parts, Training


@dataclass(frozen=True)
class Recipe:
    """Checked settings and built parts of one run."""

    model: ModelSettings
    data: DataSettings
    template: Template
    target: Target
    training: Training = Training()
    parts: Parts = Parts()
    evaluation: Evaluation = Evaluation()
    head_cache: HeadCacheSettings = HeadCacheSettings()
    report: ReportSettings = ReportSettings()
    merges: str = "report"

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML file; `overrides` are like "training.epochs=2". Raises `RecipeError`."""
        source = str(path)
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise RecipeError(
                source, [f"cannot be read ({error.strerror}); `embedgrad new` writes a recipe"]
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(source, [f"is not TOML: {error}"]) from error
        problems: list[str] = []
        for override in overrides:
            _override(values, override, problems)
        if problems:
            raise RecipeError("--set", problems)
        return cls.from_dict(values, source)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Check plain values and build the parts. Raises `RecipeError` with every problem."""
        problems: list[str] = []
        problems += [
            f"{name}: unknown section; {nearest(name, SECTIONS)}"
            for name in values
            if name not in SECTIONS
        ]
        for name in ("model", "data", "template"):
            if name not in values:
                problems.append(f"{name}: missing section")

        def section(name: str, kind: type) -> Any:
            if name not in values and name in ("model", "data"):
                return None
            return build(kind, values.get(name, {}), name, problems)

        evaluation = dict(values.get("evaluation", {}))
        scorer = build_part(
            "scorer", evaluation.pop("scorer", "exact"), "evaluation.scorer", problems
        )
        built_evaluation = build(Evaluation, evaluation, "evaluation", problems)
        gradients = values.get("gradients", [{"name": "clip"}])
        if not isinstance(gradients, list):
            problems.append("gradients: expected a list, as in [[gradients]]")
            gradients = []
        template, merges = _template(values.get("template", {}), problems)
        target = section("target", Target)
        parts = {
            "region": section("trust_region", TrustRegion),
            "schedule": section("schedule", Schedule),
            "gradients": tuple(
                build_part("gradients", value, f"gradients.{i}", problems)
                for i, value in enumerate(gradients)
            ),
            **{
                kind: build_part(kind, values.get(kind, default), kind, problems)
                for kind, default in _DEFAULT_PARTS.items()
            },
        }
        recipe = {
            "model": section("model", ModelSettings),
            "data": section("data", DataSettings),
            "template": template,
            "target": target,
            "training": section("training", Training),
            "head_cache": section("head_cache", HeadCacheSettings),
            "report": section("report", ReportSettings),
        }
        _check_together(recipe, parts, problems)
        if problems:
            raise RecipeError(source, problems)
        assert built_evaluation is not None
        return cls(
            **recipe,
            parts=Parts(**parts),
            evaluation=dataclasses.replace(built_evaluation, scorer=scorer),
            merges=merges,
        )

    def as_dict(self) -> dict[str, Any]:
        """Every setting, defaults included, as `from_dict` takes it."""
        template = {**self.template.as_dict(), "merges": self.merges}
        parts = self.parts
        values = {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "template": template,
            "target": dataclasses.asdict(self.target),
            "trust_region": dataclasses.asdict(parts.region),
            "parameterization": part_values("parameterization", parts.parameterization),
            "objective": part_values("objective", parts.objective),
            "gradients": [part_values("gradients", part) for part in parts.gradients],
            "optimizer": part_values("optimizer", parts.optimizer),
            "schedule": dataclasses.asdict(parts.schedule),
            "training": dataclasses.asdict(self.training),
            "evaluation": {
                **dataclasses.asdict(self.evaluation),
                "scorer": part_values("scorer", self.evaluation.scorer),
            },
            "head_cache": dataclasses.asdict(self.head_cache),
            "report": dataclasses.asdict(self.report),
        }
        resolved: dict[str, Any] = _without_none(values)
        return resolved

    def as_toml(self) -> str:
        """The resolved recipe; TOML has no null, so what is unset is left out."""
        return tomli_w.dumps(self.as_dict())


_DEFAULT_PARTS = {
    "parameterization": "free",
    "objective": "cross_entropy",
    "optimizer": "adamw",
}
SECTIONS: dict[str, type | None] = {
    "model": ModelSettings,
    "data": DataSettings,
    "template": None,
    "target": Target,
    "trust_region": TrustRegion,
    "parameterization": None,
    "objective": None,
    "gradients": None,
    "optimizer": None,
    "schedule": Schedule,
    "training": Training,
    "evaluation": Evaluation,
    "head_cache": HeadCacheSettings,
    "report": ReportSettings,
}


def _template(values: object, problems: list[str]) -> tuple[Template | None, str]:
    """`text`, or any of `system`, `user`, `assistant`, or a list of `messages`."""
    if not isinstance(values, Mapping):
        problems.append("template: expected a table")
        return None, "report"
    known = {*ROLES, "text", "messages", "options", "merges"}
    unknown = [name for name in values if name not in known]
    problems += [f"template.{name}: unknown option; {nearest(name, known)}" for name in unknown]
    merges = values.get("merges", "report")
    if merges not in ("report", "refuse"):
        problems.append(f"template.merges: {merges!r}; expected 'report' or 'refuse'")
    forms = [("text" in values), ("messages" in values), any(role in values for role in ROLES)]
    if sum(forms) != 1:
        if values:
            problems.append("template: give either text, or messages, or system/user/assistant")
        return None, merges
    options = values.get("options", {})
    try:
        if "text" in values:
            return Template.plain(values["text"]), merges
        if "messages" in values:
            messages = tuple(Message(m["role"], m["content"]) for m in values["messages"])
            return Template(messages=messages, options=options), merges
        return Template.chat(
            **{r: values[r] for r in ROLES if r in values}, options=options
        ), merges
    except EmbedgradError as error:
        problems.append(str(error))
    except (KeyError, TypeError) as error:
        problems.append(f"template: every message needs a role and a content, both text ({error})")
    return None, merges


def _check_together(
    recipe: Mapping[str, Any], parts: Mapping[str, Any], problems: list[str]
) -> None:
    """What no section can see alone."""
    target, objective = recipe["target"], parts["objective"]
    if target and objective and not target.choices and objective.needs_choices(available=False):
        problems.append("objective.over: 'choices', but target.choices lists none")
    template, data = recipe["template"], recipe["data"]
    if template and data and data.truncate and data.truncate not in template.columns:
        problems.append(
            f"data.truncate: {data.truncate!r} is not a column of the template; "
            f"{nearest(data.truncate, template.columns)}"
        )
    if recipe["head_cache"]:
        try:
            budget_bytes(recipe["head_cache"].budget)
        except RecipeError as error:
            problems += [f"head_cache.budget: {problem}" for problem in error.problems]


def _override(values: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set one dotted name; the value is TOML, or else plain text."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        problems.append(f"{override!r}: expected section.option=value")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = name.split(".")
    for part in path:
        inner: Any = values.setdefault(part, {})
        if not isinstance(inner, dict):
            problems.append(f"{name}: {part} is not a section")
            return
        values = inner
    values[last] = value


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
