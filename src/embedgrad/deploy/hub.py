"""Push a refined prompt to the Hugging Face Hub, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, final

import huggingface_hub
from huggingface_hub import EvalResult, ModelCardData, errors

from embedgrad.deploy.base_model import Base, anonymous
from embedgrad.deploy.card import code, data_lines, fence, licenses, plain, score_lines
from embedgrad.deploy.programs import fill, to_source
from embedgrad.errors import ArtifactError, ExportError
from embedgrad.model.loading.info import ModelInfo
from embedgrad.model.loading.quiet import one_line, silence_libraries
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.hub import HUB, check_repository
from embedgrad.recipe.open_run import images_of, load_prompt, model_of
from embedgrad.recipe.settings import ExportSettings

LOGIN = "run `hf auth login`, or set HF_TOKEN"


@final
class PushResult(TypedDict):
    """What `push` wrote: the repository, the commit's address, and how to load it."""

    repository: str
    url: str
    load: str


def push(
    run: str | Path, repository: str, *, private: bool = False, base_model: str | None = None
) -> PushResult:
    """Push a run's prompt, or one alone, to `repository`, OWNER/NAME, which is made if need be.

    The commit holds the artifact and a README.md with the Hub's metadata: base model, data, and
    scores as a model index. `base_model` is the public name of a model that was not loaded from the
    Hub. Raises `ArtifactError`, and `ExportError` without a login or where the Hub refuses.
    """
    check_repository(repository, "push")
    prompt = load_prompt(Path(run))
    if not huggingface_hub.get_token():
        raise ExportError(f"push: no login to the Hub; {LOGIN}")
    settings = ExportSettings(base_model=base_model)
    try:
        info = ModelInfo(**{"path": "", **_facts(prompt)})
    except TypeError as error:
        raise ArtifactError(f"{run}: does not say which model it is for") from error
    prompt = anonymous(prompt, info, settings)
    api = huggingface_hub.HfApi()
    with TemporaryDirectory() as aside:
        folder = artifact.save(prompt, Path(aside) / "prompt")
        (folder / "README.md").write_text(
            prompt_card(prompt, Base.of(info, settings), repository), encoding="utf-8"
        )
        try:
            with silence_libraries():
                api.create_repo(repository, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message=f"Refined prompt: {prompt.spans[0].text[:50].strip()}",
                )
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            what = LOGIN if status == 401 else "choose a name of your own" if status == 403 else ""
            why = one_line(error) + (f"; {what}" if what else "")
            raise ExportError(f"push: the Hub refused {repository}: {why}") from error
        except Exception as error:  # the network stack's own types
            why = one_line(error)
            raise ExportError(f"push: the Hub could not be reached: {why}; try again") from error
    return PushResult(
        repository=repository,
        url=str(commit.commit_url),
        load=f'embedgrad.load("{HUB}{repository}")',
    )


def prompt_card(prompt: PromptEmbedding, base: Base, repository: str) -> str:
    """A README.md for the Hub, with metadata as https://huggingface.co/docs/hub/model-cards has it.

    What the files say is escaped.
    """
    known: Mapping[str, Any] = prompt.provenance
    scores = known.get("scores") or {}
    data = (known.get("data") or {}).get("test") or {}
    metrics = {"accuracy": "accuracy", "macro_f1": "f1"}
    choices = bool(prompt.target.choices)
    deep = ((known.get("recipe") or {}).get("parameterization") or {}).get("deep")
    results = [
        EvalResult(
            task_type="text-classification" if choices else "text-generation",
            dataset_type=str(data.get("source")),
            dataset_name=str(data.get("source")),
            dataset_split="test",
            metric_type=metric,
            metric_name=f"{name}, refined prompt",
            metric_value=value,
        )
        for name, metric in metrics.items()
        if (value := (scores.get("refined") or {}).get(name)) is not None
    ]
    metadata = ModelCardData(
        base_model=base.model if base.public else None,
        license=(known.get("licenses") or {}).get("model"),
        library_name="embedgrad",
        tags=["embedgrad", "prompt-tuning"],
        model_name=repository,
        eval_results=results or None,
    )
    return fill(
        "prompt_card.md",
        metadata=metadata.to_yaml(),
        code=code,
        fence=fence,
        plain=plain,
        title=repository,
        base=base,
        hub=HUB,
        exports=not deep and images_of(prompt) is None,
        spans=[span.text for span in prompt.spans],
        choices=prompt.target.choices,
        program=(
            "import embedgrad as eg\n\n"
            f"prompt = eg.load({to_source(HUB + repository)})\n"
            f"print(prompt.generate({to_source(dict.fromkeys(prompt.template.columns, '...'))}))"
        ),
        scores=score_lines(scores) if "refined" in scores and "text" in scores else [],
        facts=[*data_lines([prompt]), *licenses([prompt])],
    )


def _facts(prompt: PromptEmbedding) -> dict[str, Any]:
    known = model_of(prompt, "push it from its run")
    return {name: value for name, value in known.items() if name in ModelInfo.__annotations__}
