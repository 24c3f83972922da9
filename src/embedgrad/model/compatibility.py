"""Check that a saved prompt belongs to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from embedgrad.errors import ArtifactError
from embedgrad.model.loading import ModelInfo
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.trust_region import near


def fit_to_model(
    prompt: PromptEmbedding, model: ModelInfo, embed: Callable[[Sequence[int]], torch.Tensor]
) -> PromptEmbedding:
    """The prompt with the start rows of its model, which a file may hold in fewer bits.

    `embed` gives the model's own rows of token ids. Raises `ArtifactError` for a prompt that was
    made for another model, and names what differs.
    """
    known = prompt.provenance.get("model")
    made_for = known if isinstance(known, dict) else {}
    width, digest = prompt.rows.shape[1], made_for.get("embedding_digest")
    if not width or width % model.width:
        problem = f"its rows are {width} wide, the model's {model.width}"
    elif digest == model.embedding_digest and max(prompt.prompt_ids) < model.vocabulary:
        own = embed(prompt.prompt_ids).detach().cpu().float()
        own = torch.nn.functional.pad(own, (0, width - model.width))  # rows for later layers
        # Others are kept: training may start elsewhere than at the words.
        return replace(prompt, start_rows=own) if near(prompt.start_rows, own, 1e-2) else prompt
    else:
        here = model.embedding_digest[:19]
        problem = f"the embedding tables differ ({str(digest)[:19]}, here {here})"
        inside = max(prompt.prompt_ids) < model.vocabulary
        if not inside or not torch.allclose(
            embed(prompt.prompt_ids).cpu().float(),
            prompt.start_rows[:, : model.width],
            rtol=2e-2,
            atol=1e-3,
        ):
            problem += ", and the rows that its words start from"
    revision = f" (revision {made_for['revision']})" if made_for.get("revision") else ""
    raise ArtifactError(
        f"this prompt was made for {made_for.get('name', 'an unknown model')}{revision}, not for "
        f"{model.name}: {problem}; use the model that it was made for"
    )
