"""A model of the Hugging Face Hub as a local folder: the local cache first, then a download."""

from __future__ import annotations

from pathlib import Path
from typing import final

import huggingface_hub
from huggingface_hub import constants, errors

from embedgrad.errors import ModelError
from embedgrad.model.loading.checkpoint_folder import CONFIG, INDEX, TOKENIZERS, WEIGHTS, problem_of
from embedgrad.model.loading.quiet import Notify, one_line, silence_libraries

# Named one by one: no pickles, no code, no second copy of the weights in another format.
_WANTED = (
    *(CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", "generation_config.json", "README.md"),
    *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json"),
)
_SUBFOLDERS = "*/*"


@final
class HubMiss(Exception):
    """Why the Hub gave no model for a name, as the end of a sentence."""


def hub_folder(
    name: str, *, revision: str | None, local_files_only: bool, notify: Notify | None
) -> Path:
    """Find or fetch a whole snapshot of `name`; the folder's own name is its commit hash.

    A snapshot in the cache is used without asking whether the Hub has a newer one. Raises `HubMiss`
    with what was tried, and `ModelError` for a repository that holds no model we can read.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except errors.HFValidationError:
        raise HubMiss("it cannot be a name on the Hub, which are like owner/model") from None
    cached = huggingface_hub.try_to_load_from_cache(name, CONFIG, revision=revision)
    problem: str | None = "it is not there"
    if isinstance(cached, str):
        problem = problem_of(Path(cached).parent)
        if problem is None:
            return Path(cached).parent
    tried = f"not in the local Hub cache {constants.HF_HUB_CACHE} ({problem})"
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise HubMiss(f"{tried}; the Hub was not asked, because {why} is set")
    if notify:
        notify(f"fetching {name} from the Hub")
    try:
        folder = _download(name, revision)
    except HubMiss as miss:
        raise HubMiss(f"{tried}; {miss}") from miss.__cause__
    if problem := problem_of(folder):
        raise ModelError(f"model {name!r}: its files on the Hub cannot be used: {problem}")
    return folder


def _download(name: str, revision: str | None) -> Path:
    try:
        with silence_libraries():
            return Path(
                huggingface_hub.snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(_WANTED),
                    ignore_patterns=[_SUBFOLDERS],
                )
            )
    except errors.GatedRepoError as error:
        terms = f"accept its terms at https://huggingface.co/{name} and run `hf auth login`"
        raise HubMiss(f"access to it is restricted: {terms}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubMiss("the Hub has no repository of that name that you can access") from error
    except errors.RevisionNotFoundError as error:
        raise HubMiss(f"the Hub has it, but no revision {revision!r}") from error
    except Exception as error:  # the network stack's own types, which the Hub client passes on
        raise HubMiss(
            f"the Hub could not be reached: {one_line(error)}; offline, give a folder, a .gguf file"
            " or package:NAME"
        ) from error
