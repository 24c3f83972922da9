"""Parse a recipe's TOML into checked settings and built parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tomli_w

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import parse_toml, read_text
from embedgrad.data.readers import Source, read_table
from embedgrad.data.splits import NAMES as SPLITS
from embedgrad.errors import (
    DataError,
    EmbedgradError,
    RecipeError,
    RunError,
    TemplateError,
    nearest,
)
from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.optimizers import Schedule
from embedgrad.parts.parameterizations import is_deep
from embedgrad.parts.registry import build, build_part, build_parts, part_values, values_of
from embedgrad.parts.scorers import SandboxedFunction
from embedgrad.prompt.images import TEMPLATE, Images
from embedgrad.prompt.place import PLACES, place_span
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import ROLES, Message, Template, by_role, only
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.recipe.consistency import check_together
from embedgrad.recipe.overrides import check_values, override
from embedgrad.recipe.paths import anchor, relocate
from embedgrad.recipe.settings import (
    CompareSettings,
    DataSettings,
    ExportSettings,
    ModelSettings,
    PrefixCacheSettings,
    ReportSettings,
)
from embedgrad.training.demonstrations import Demonstrations
from embedgrad.training.engine import SamplingEngine
from embedgrad.training.self_training import Solutions
from embedgrad.training.settings import Parts, Training
from embedgrad.training.teacher import Teaching


@final
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
    demonstrations: Demonstrations = Demonstrations()
    solutions: Solutions = Solutions()
    teacher: Teaching | None = None
    prefix_cache: PrefixCacheSettings = PrefixCacheSettings()
    report: ReportSettings = ReportSettings()
    compare: CompareSettings = CompareSettings()
    export: ExportSettings = ExportSettings()
    merges: str = "report"
    place: str | None = None
    images: Images | None = None

    def needs_text(self, what: str) -> None:
        """Raise `RecipeError` for a recipe of images, which `what` cannot do."""
        if self.images is not None:
            can = "optimize, resume, tune, map, evaluate, inspect, generate and report do"
            raise RecipeError("recipe", [f"images: {what} does not work with images; {can}"])

    @property
    def group_column(self) -> str | None:
        """The column by whose values scores are also given apart, if any."""
        return self.evaluation.group or self.parts.objective.group_column

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML file; overrides look like "training.epochs=2". Raises `RecipeError`.

        Its paths are relative to its folder, those of overrides to the current one.
        """
        values = read_toml(path)
        anchor(values, Path(path).parent)
        override(values, overrides)
        return cls.from_dict(values, str(path))

    @classmethod
    def read_run(
        cls, folder: Path, overrides: Sequence[str] = (), *, trust_scorer: bool = False
    ) -> Recipe:
        """Read a run's recipe.toml. Raises `RecipeError`, and `RunError` for an older version.

        A user's scorer that it names runs only if it has run here before, or `trust_scorer`.
        """
        path = folder / "recipe.toml"
        values = read_toml(path)
        check_run_version(folder, values)
        anchor(values, folder)
        override(values, overrides)
        recipe = cls.from_dict(values, str(path))
        if isinstance(scorer := recipe.evaluation.scorer, SandboxedFunction):
            scorer.trust() if trust_scorer else scorer.ask_first()
        return recipe

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Check plain values and build the parts. Raises `RecipeError` with every problem."""
        if not isinstance(values, Mapping):
            raise RecipeError(source, ["expected a table of sections"])
        if "tasks" in values:
            why = "only `embedgrad optimize` takes a recipe of several [[tasks]]"
            raise RecipeError(source, [f"tasks: {why}; of its run give one task's folder"])
        values = dict(values)
        problems: list[str] = []
        check_values(values, "", problems)
        _check_names(values, problems)
        evaluation, scorer = values.get("evaluation", {}), {}
        if isinstance(evaluation, Mapping):
            scorer = evaluation.get("scorer", {})
            values["evaluation"] = {k: v for k, v in evaluation.items() if k != "scorer"}
        scorer = build_part("scorer", scorer, "evaluation.scorer", problems)
        sections: dict[str, Any] = {
            name: build(kind, values.get(name, {}), name, problems)
            for name, kind in SECTIONS.items()
            if kind is not None
            and (name in values or name not in (*REQUIRED, "images"))
            and name != "teacher"
        }
        sections["teacher"] = _teacher(values["teacher"], problems) if "teacher" in values else None
        sections["template"], prompt = None, dict[str, Any]()
        if "template" in values:
            sections["template"], prompt = _template(values["template"], problems)
        elif "images" in values:
            sections["template"] = TEMPLATE
        parts = {
            "trust_region": sections.pop("trust_region"),
            "schedule": sections.pop("schedule"),
            "augmentations": build_parts(
                "augmentations", values.get("augmentations", []), problems
            ),
            "transforms": build_parts("transforms", values.get("transforms", [{}]), problems),
            **{
                kind: build_part(kind, values.get(kind, {}), kind, problems)
                for kind in ("parameterization", "objective", "optimizer")
            },
        }
        check_together(sections, parts["objective"], problems, taught="teacher" in values)
        if sections.get("images") and is_deep(parts["parameterization"]):
            problems.append("parameterization.deep: [images] has queries in every layer anyway")
        sampled = parts["objective"] and parts["objective"].sampling and not sections["teacher"]
        if sampled and sections["solutions"]:
            # It trains on answers that the model writes, so no others are read or written.
            sections["solutions"] = dataclasses.replace(sections["solutions"], source="answer")
        if problems:
            raise RecipeError(source, problems)
        optimizer, given = parts["optimizer"], values.get("optimizer", {})
        if "learning_rate" not in given:
            rate = optimizer.learning_rate * parts["objective"].step_share
            parts["optimizer"] = dataclasses.replace(optimizer, learning_rate=rate)
        parts["sampling"] = sections.pop("sampling")
        sections["evaluation"] = dataclasses.replace(sections["evaluation"], scorer=scorer)
        return cls(**sections, parts=Parts(**parts), **prompt)

    def with_data(self, folder: str | Path, **splits: Source) -> Recipe:
        """The recipe with data frames or `Dataset`s as its train, dev and test.

        They are written to `folder`, as train.jsonl and so on, so that the run can be opened again.
        Numbers of classes become the names that a `Dataset` has for them, unless `data.labels` is
        set. Raises `DataError`, and `RunError` where a file cannot be written.
        """
        data = self.data
        for name, source in splits.items():
            if name not in SPLITS:
                raise DataError(f"with_data: unknown split {name!r}; {nearest(name, SPLITS)}")
            table = read_table(source)
            lines = [json.dumps(row, ensure_ascii=False, default=str) for row in table.rows]
            path = Path(folder) / f"{name}.jsonl"
            content = "".join(f"{line}\n" for line in lines)
            write_file(path, content.encode(errors="surrogatepass"))  # refused where it is read
            labels = data.labels or table.class_labels(data.answer)
            changes: dict[str, Any] = {name: str(path), "labels": labels}
            data = dataclasses.replace(data, **changes)
        return dataclasses.replace(self, data=data)

    def as_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """Every setting, defaults included, as `from_dict` takes it.

        Paths are relative to the current folder, or to `folder`.
        """
        values: dict[str, Any] = {"version": VERSION}
        built = {**vars(self.parts), **vars(self)}
        for name, kind in SECTIONS.items():
            part = built[name]
            if name == "template" and self.images is not None:
                continue
            if name == "template":
                own = {"merges": self.merges, "place": self.place}
                values[name] = {**self.template.as_dict(), **own}
            elif kind is not None and part is not None:
                values[name] = values_of(part)
            elif part is None:
                continue
            elif isinstance(part, list | tuple):
                values[name] = [part_values(name, one) for one in part]
            else:
                values[name] = part_values(name, part)
        values["evaluation"]["scorer"] = part_values("scorer", self.evaluation.scorer)
        if self.teacher and self.teacher.template:
            values["teacher"]["template"] = self.teacher.template.as_dict()
        resolved: dict[str, Any] = _plain(values)
        return resolved if folder is None else relocate(resolved, folder)

    def as_toml(self, folder: Path | None = None) -> str:
        """As `as_dict`; unset options are left out, as TOML has no null."""
        return tomli_w.dumps(self.as_dict(folder))


AUTO = "auto"  # a place that a run chooses on dev
VERSION = 2  # of a resolved recipe; version 1 had no such field
REQUIRED = ("model", "data", "template")  # or, instead of a template, images
# Every section with its type; None for the template and the parts, which are built elsewhere.
SECTIONS: dict[str, Any] = {
    "model": ModelSettings,
    "data": DataSettings,
    "template": None,
    "images": Images,
    "target": Target,
    "demonstrations": Demonstrations,
    "trust_region": TrustRegion,
    "parameterization": None,
    "objective": None,
    "sampling": SamplingEngine,
    "augmentations": None,
    "transforms": None,
    "optimizer": None,
    "schedule": Schedule,
    "training": Training,
    "solutions": Solutions,
    "teacher": Teaching,
    "evaluation": Evaluation,
    "prefix_cache": PrefixCacheSettings,
    "report": ReportSettings,
    "compare": CompareSettings,
    "export": ExportSettings,
}
RENAMED = {
    "head_cache": "[prefix_cache]",
    "gradients": "[[transforms]]",
    "target.prefix": "target.answer_prefix",
}


def check_run_version(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise `RunError` for a recipe of an older embedgrad; what has another name since gets it."""
    if values.get("version", 1) == 1 or not RENAMED.keys().isdisjoint(values):
        raise RunError(
            f"{folder} was written by an older embedgrad (recipe version 1; this one reads "
            f"{VERSION}): run its recipe again"
        )
    if isinstance(report := values.get("report"), dict) and report.pop("tensorboard", False):
        report["trackers"] = ["tensorboard"]


def read_toml(path: str | Path) -> dict[str, Any]:
    """The sections of a recipe's file as they are. Raises `RecipeError`."""
    try:
        return parse_toml(read_text(path))
    except OSError as error:
        raise RecipeError(
            str(path), [f"cannot be read ({error.strerror}); `embedgrad new` writes a recipe"]
        ) from error
    except ValueError as error:
        raise RecipeError(str(path), [f"is not TOML: {error}"]) from error


def _check_names(values: dict[str, Any], problems: list[str]) -> None:
    """Sections that are unknown or missing, and old names, which are taken out of `values`."""
    target = values.get("target")
    if isinstance(target, Mapping) and "prefix" in target:
        values["target"] = {name: value for name, value in target.items() if name != "prefix"}
        problems.append(f"target.prefix: is now {RENAMED['target.prefix']}")
    for name in values:
        if name == "version":
            if type(values[name]) is not int or values[name] != VERSION:
                problems.append(
                    f"version: {values[name]!r}; this embedgrad reads {VERSION}, or leave it out"
                )
        elif name in RENAMED:
            problems.append(f"{name}: is now {RENAMED[name]}")
        elif name not in SECTIONS:
            problems.append(f"{name}: unknown section; {nearest(str(name), SECTIONS)}")
    needed = [name for name in REQUIRED if name != "template" or "images" not in values]
    problems += [f"{name}: missing section" for name in needed if name not in values]


def _teacher(values: object, problems: list[str]) -> Teaching | None:
    """A teacher's settings, and its template or the place of its prompt."""
    if not isinstance(values, Mapping):
        problems.append(f"teacher: {values!r}; expected a table of options")
        return None
    rest = {name: value for name, value in values.items() if name != "template"}
    teaching = build(Teaching, rest, "teacher", problems)
    if ("template" in values) + ("prompt" in values) != 1:
        problems.append("teacher: give either a template, as [teacher.template], or a prompt")
        return None
    if "template" not in values or teaching is None:
        return teaching
    own: list[str] = []
    teaching = dataclasses.replace(
        teaching, template=_template(values["template"], own, frozen=True)[0]
    )
    problems += [f"teacher.{problem}" for problem in own]
    return teaching


def _template(
    values: object, problems: list[str], *, frozen: bool = False
) -> tuple[Template | None, dict[str, Any]]:
    """`text`, or any of `system`, `user`, `assistant`, or a list of `messages`; and two settings.

    A span that is to stand elsewhere is moved there.
    """
    if not isinstance(values, Mapping):
        problems.append(f"template: {values!r}; expected a table of options")
        return None, {}
    known = {*ROLES, "text", "messages", "options", *(() if frozen else ("merges", "place"))}
    unknown = [name for name in values if name not in known]
    problems += [f"template.{n}: unknown option; {nearest(str(n), known)}" for n in unknown]
    merges = values.get("merges", "report")
    if merges not in ("report", "refuse"):
        problems.append(f"template.merges: {merges!r}; expected 'report' or 'refuse'")
    place = values.get("place")
    if place not in (None, AUTO, *PLACES):
        problems.append(f"template.place: {place!r}; expected one of {', '.join((AUTO, *PLACES))}")
        place = None
    settings = {"merges": merges, "place": place}
    texts = {name: values[name] for name in (*ROLES, "text") if name in values}
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    problems += [f"template.{name}: {texts[name]!r}; expected text" for name in wrong]
    options, messages = values.get("options", {}), values.get("messages")
    if not isinstance(options, Mapping) or ("text" in texts and options):
        problems.append(
            f"template.options: {options!r}; expected a table of variables for the model's chat "
            "template, which plain text does not use"
        )
        wrong.append("options")
    kinds = [n for n in ("text", "messages") if values.get(n) is not None]
    if len(kinds := kinds + [role for role in ROLES if role in texts][:1]) != 1:
        both = ", not " * bool(kinds) + " and ".join(kinds)
        problems.append(f"template: give either text, or messages, or system/user/assistant{both}")
        return None, settings
    try:
        if wrong:
            return None, settings
        if "text" in texts:
            template = Template(text=texts["text"], frozen=frozen)
        else:
            read = _messages(messages) if messages is not None else by_role(texts)
            template = Template(read, options=dict(options), frozen=frozen)
        if place == AUTO and not frozen:
            only(template.spans)
        return template if place in (None, AUTO) else place_span(template, place), settings
    except EmbedgradError as error:
        problems.append(str(error))
    return None, settings


def _messages(messages: object) -> tuple[Message, ...]:
    valid = isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping)
        and set(message) == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
        for message in messages
    )
    if not valid or not isinstance(messages, list | tuple):
        raise TemplateError(
            "template.messages: expected a list of messages, each with a role and a content, "
            'as in { role = "user", content = "..." }'
        )
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
