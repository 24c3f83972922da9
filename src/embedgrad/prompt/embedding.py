"""The soft prompt: refined rows, their start, their provenance."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

from torch import Tensor

from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.span import Span, span_places
from embedgrad.prompt.template import Template, only
from embedgrad.prompt.trust_region import TrustRegion, cosine_P, drift_P


@final
@dataclass(frozen=True)
class PromptEmbedding:
    """A refined prompt with all that is needed to use it again.

    `start_rows` and `rows` are fp32, shape [P, D], in the space that `inputs_embeds` takes; where
    there are several spans, one follows the other. `date` is what the chat template was given as
    today. `provenance` holds plain JSON values: model, data, recipe, versions, scores.
    """

    template: Template
    target: Target
    spans: tuple[Span, ...]
    date: datetime.date
    start_rows: Tensor
    rows: Tensor
    trust_region: TrustRegion = TrustRegion()
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_rows(self, rows_PD: Tensor) -> PromptEmbedding:
        """The same prompt with other rows."""
        return replace(self, rows=rows_PD)

    def rows_at(self, place: float) -> Tensor:
        """Rows [P, D] on the line through both prompts: 0 is the text, 1 refined, to the bit."""
        if place == 1:
            return self.rows
        return self.start_rows + place * (self.rows - self.start_rows)

    def with_provenance(self, **entries: Any) -> PromptEmbedding:
        """The same prompt with more provenance."""
        return replace(self, provenance={**self.provenance, **entries})

    @property
    def span(self) -> Span:
        """The only span. Raises `TemplateError` where there are several."""
        return only(self.spans)

    @property
    def prompt_ids(self) -> Ids:
        """The token ids of all spans, P of them."""
        return tuple(token for span in self.spans for token in span.ids)

    def places(self) -> dict[str, slice]:
        """Where the rows of each span are: of "span", or of "span 1", "span 2" and so on."""
        return span_places(self.spans)

    @property
    def drift(self) -> Tensor:
        """Distance of each row from its start row, in norms of the start row, shape [P]."""
        return drift_P(self.rows, self.start_rows)

    @property
    def cosine(self) -> Tensor:
        """Cosine of each row to its start row, shape [P]."""
        return cosine_P(self.rows, self.start_rows)


class HoldsPrompt(Protocol):
    """What holds a prompt, as a loaded one holds it beside its model."""

    @property
    def prompt(self) -> PromptEmbedding:
        """The prompt."""


def unwrap(prompt: PromptEmbedding | HoldsPrompt) -> PromptEmbedding:
    """The prompt itself."""
    return prompt if isinstance(prompt, PromptEmbedding) else prompt.prompt
