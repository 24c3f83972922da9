"""The prompt as embeddings: where it starts, where it is, and where it came from."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from embedgrad.prompt.sequence import Target
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Template
from embedgrad.prompt.trust_region import TrustRegion, cosine_P, drift_P


@dataclass(frozen=True)
class PromptEmbedding:
    """A refined prompt with all that is needed to use it again.

    `start_rows` and `rows` are fp32, shape [P, D], in the space that `inputs_embeds` takes. `date`
    is what the chat template was given as today. `provenance` holds plain JSON values: model, data,
    recipe, versions, scores.
    """

    template: Template
    target: Target
    span: Span
    date: datetime.date
    start_rows: Tensor
    rows: Tensor
    trust_region: TrustRegion = TrustRegion()
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_rows(self, rows_PD: Tensor) -> PromptEmbedding:
        """The same prompt with other rows."""
        return replace(self, rows=rows_PD)

    def with_provenance(self, **entries: Any) -> PromptEmbedding:
        """The same prompt with more said about it."""
        return replace(self, provenance={**self.provenance, **entries})

    @property
    def drift(self) -> Tensor:
        """Distance of each row from its start row, in norms of the start row, shape [P]."""
        return drift_P(self.rows, self.start_rows)

    @property
    def cosine(self) -> Tensor:
        """Cosine of each row to its start row, shape [P]."""
        return cosine_P(self.rows, self.start_rows)
