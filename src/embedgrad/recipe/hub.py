"""Prompts on the Hugging Face Hub, which stand wherever a run does.

`hub:OWNER/NAME[@REVISION]` names one.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from embedgrad.errors import ArtifactError
from embedgrad.events import Report, quiet, say
from embedgrad.formatting import size
from embedgrad.model.loading.quiet import silence_libraries
from embedgrad.model.loading.resolve import download_problem
from embedgrad.prompt.artifact import JSON_FILE, LARGEST_FILE, ROWS_FILE

HUB = "hub:"
FILES = [JSON_FILE, ROWS_FILE]  # nothing else of a stranger's repository is fetched


def check_repository(name: str, where: str) -> None:
    """Raise `ArtifactError` for what cannot be a repository's name."""
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]
        known = name.count("/") == 1
    except errors.HFValidationError:
        known = False
    if not known:
        raise ArtifactError(f"{where}: {name!r} cannot be a name on the Hub; expected OWNER/NAME")


def local_folder(place: str | Path, report: Report = quiet) -> Path:
    """The folder of a run or prompt: `place` itself, or where a prompt of the Hub is kept.

    A prompt in the local Hub cache is used without asking whether the Hub has a newer one, as a
    model is; `@REVISION` asks for a commit, a branch or a tag. Raises `ArtifactError`.
    """
    where = Path(place).as_posix()
    if not where.startswith(HUB):
        return Path(place)
    name, _, revision = where.removeprefix(HUB).partition("@")
    check_repository(name, where)
    at = revision or None
    cached = [huggingface_hub.try_to_load_from_cache(name, f, revision=at) for f in FILES]
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    if constants.HF_HUB_OFFLINE:
        raise ArtifactError(
            f"{where}: not in the local Hub cache {constants.HF_HUB_CACHE}; the Hub was not asked, "
            "because HF_HUB_OFFLINE is set"
        )
    say(report, [f"fetching {name} from the Hub"])
    try:
        with silence_libraries():
            info = huggingface_hub.HfApi().model_info(name, revision=at, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if not set(FILES) <= set(sizes):
                raise ArtifactError(f"{where}: holds no prompt of embedgrad; expected {FILES[0]}")
            if (most := max(sizes[file] for file in FILES)) > LARGEST_FILE:
                raise ArtifactError(
                    f"{where}: a file of {size(most)}; a prompt's has at most {size(LARGEST_FILE)}"
                )
            paths = [huggingface_hub.hf_hub_download(name, f, revision=at) for f in FILES]
    except ArtifactError:
        raise
    except Exception as error:  # the Hub client passes the network stack's own types on
        problem = download_problem(error, name, revision, "offline, give a folder")
        raise ArtifactError(f"{where}: {problem}") from error
    return Path(paths[0]).parent
