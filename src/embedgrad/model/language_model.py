"""The frozen language model: scores and generates answers.

    prompt_PD + TokenSequences  ->  Outcome: log-probability of every answer, per example

With prefix reuse a pass computes only what can depend on the rows: prompt, suffix and targets, on
top of the prefix's stored keys and values. All choices of an example share one pass: each choice is
a branch that sees prefix, prompt and suffix but no other choice. Sequences of like length share a
pass, so that little is padding. Where `why_not_reusable` gives a reason, each answer takes a full
pass.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.events import Report, stage
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.capabilities import try_generate, try_reuse
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.forward import ForwardPass, in_order
from embedgrad.model.generation import Reply, begin, generate, reply, without_copies
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.loading.spread import DeviceMap
from embedgrad.model.outcome import Outcome
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.model.prefixes import PrefixStore
from embedgrad.model.workers import here
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.images import ImageSequencer
from embedgrad.prompt.joint import JointSequencer
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Renderer, Template
from embedgrad.report.terminal.bars import show


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: Mapping[str, int | str] = {},
    prefix_cache_budget: str | float = 0.25,
    report: Report = show,
) -> LanguageModel:
    """Load a frozen model: Hub id, folder, `.gguf` file, or `package:NAME`. Raises `ModelError`."""
    stage(report, f"loading {name}")
    loaded = load(
        name,
        revision=revision,
        device=device,
        dtype=dtype,
        attention=attention,
        device_map=device_map,
        max_memory=max_memory,
        report=report,
    )
    return LanguageModel(loaded, prefix_cache_budget=prefix_cache_budget)


@final
class LanguageModel:
    """A frozen causal language model: a forward pass, and a store of prefixes.

    `prefix_cache_budget` bounds the stored prefixes: bytes, "2 GiB", or a fraction of free memory;
    0 stores none.
    """

    def __init__(self, loaded: LoadedModel, *, prefix_cache_budget: str | float = 0.25):
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.info = loaded.info
        self.device = loaded.model.device
        self.dtype = loaded.model.dtype
        self.forward = ForwardPass(loaded)
        self.prefixes = PrefixStore(
            self.forward, PrefixCache.on(loaded.model.device, prefix_cache_budget)
        )
        try_reuse(self.forward, PrefixStore(self.forward, PrefixCache(0)))
        if self.forward.one_by_one:
            try_generate(self.forward)

    def with_prefix_cache(self, cache: PrefixCache) -> LanguageModel:
        """The same model with its prefixes in another cache; nothing is loaded or tried again."""
        other = copy.copy(self)
        other.prefixes = copy.copy(self.prefixes)
        other.prefixes.cache = cache
        return other

    @property
    def prefix_cache(self) -> PrefixCache:
        """Where prefixes are stored; see `with_prefix_cache`."""
        return self.prefixes.cache

    @property
    def why_not_reusable(self) -> str | None:
        """Why stored prefixes cannot be used with this model; None: they can."""
        return self.forward.why_not_reusable

    @property
    def end_ids(self) -> Ids:
        """Tokens that end an answer, by the model's generation settings and its tokenizer."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return tuple({int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None})

    def ends_of(self, sequencer: Sequencer | JointSequencer | ImageSequencer) -> Ids:
        """Tokens that end an answer to a template: the model's own, and its end of a turn."""
        return tuple({*sequencer.end_ids, *self.end_ids})

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows [T, D] of tokens as `inputs_embeds` takes them: fp32; float64 for such a model."""
        rows = self.forward.embed(torch.tensor(ids, dtype=torch.long, device=self.device))
        return rows if rows.dtype == torch.float64 else rows.float()

    def vocabulary_rows(self) -> Tensor:
        """Rows of every token, shape [V, D], as `embed` gives them."""
        return self.embed(range(self.model.get_input_embeddings().num_embeddings))

    def sequencer(
        self,
        template: Template,
        target: Target,
        rows: Sequence[Example] = (),
        *,
        spans: Sequence[Span] = (),
        date: datetime.date | None = None,
        merges: str = "report",
        truncate: str | None = None,
    ) -> Sequencer:
        """A `Sequencer` for this model; chat templates show `date` (unset: today)."""
        renderer = Renderer(template, self.tokenizer, date=date or datetime.date.today())
        return Sequencer(
            renderer,
            self.tokenizer,
            target,
            rows=rows,
            spans=spans,
            context=self.info.context,
            vocabulary=self.info.vocabulary,
            merges=merges,
            truncate=truncate,
        )

    def prefixes_of(self, ids: Sequence[Ids], shared: Sequence[int] = ()) -> list[CachedPrefix]:
        """Keys and values of prefixes; see `PrefixStore.prefixes_of`."""
        return self.prefixes.prefixes_of(ids, shared)

    def prepare(self, sequences: Sequence[TokenSequence]) -> None:
        """Build prefixes ahead of their batches; see `PrefixStore.prepare`."""
        self.prefixes.prepare(here().select_stored(sequences))

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
        read: Sequence[Sequence[Ids]] | None = None,
    ) -> Outcome:
        """Log-probabilities of the answers, differentiable in the prompt's rows.

        Twice differentiable with stored prefixes; in full passes only with eager attention.

        `choices=False` computes the right answer only: the outcome has one target per example.
        `read` gives K token ids for each token of each right answer; the outcome then has their
        log-probabilities in that token's place. A pure function: the same rows and sequences give
        the same outcome. Of several workers each computes its own examples, and only these
        have a graph.
        """
        prompt_PD, share = join_spans(prompt), here().share(batch)
        targets = [s.targets if choices else (s.targets[s.gold],) for s in batch]
        width = max(len(t) for t in targets)
        counts = [[len(ids) for ids in t] + [0] * (width - len(t)) for t in targets]
        tokens_BC = torch.tensor(counts, device=self.device)
        scored = list(zip(batch, targets, [()] * len(batch) if read is None else read, strict=True))
        more = max(sum(map(len, ids)) for *_, ids in scored)
        parts, order = list[Tensor](), list[int]()
        for own_PD, own in _by_rows(prompt_PD, batch, share):
            reused, others = list[int](), list[int]()
            for i in own:
                sequence, ids, _ = scored[i]
                can_reuse = self.forward.can_reuse(sequence, len(own_PD), ids)
                (reused if can_reuse else others).append(i)
            if reused:
                context = self.prefixes.context_of(own_PD, [batch[i] for i in reused])
                some = [scored[i] for i in reused]
                parts.append(self.forward.on_prefixes(context, some, width, more))
            if others:
                some = [scored[i] for i in others]
                parts.append(self.forward.in_full(own_PD, some, width, more))
            order += reused + others
        # A worker without examples has no lines, which are in the graph of the rows all the same.
        none = prompt_PD.new_zeros(0, width + more) * (0 if parts else prompt_PD.sum())
        lines = in_order(parts or [none], order)
        if self.forward.lockstep.needed:
            lines = lines + self.forward.lockstep.finish(prompt_PD)
        logprobs = here().fill(lines, share, len(batch))
        logprobs_BC = logprobs[:, :width].masked_fill(tokens_BC == 0, -torch.inf)
        per_place = next((len(ids[0]) for *_, ids in scored if ids), 0)
        examples = [s.example for s in batch]
        columns = dict.fromkeys(chain(*(example.extra for example in examples)))
        return Outcome(
            logprobs_BC,
            tokens_BC,
            torch.tensor([s.gold if choices else 0 for s in batch], device=self.device),
            tuple(example.group for example in examples),
            normalize,
            tuple(example.task or None for example in examples),
            {name: [example.extra.get(name) for example in examples] for name in columns},
            tuple(s.reasoning for s in batch),
            token_logprobs_BTK=(
                logprobs[:, width:].reshape(len(batch), -1, per_place) if per_place else None
            ),
        )

    def generate(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        decoding: Decoding = Decoding(),
        *,
        end_ids: Ids,
        batch_size: int = 16,
        numbers: Sequence[int] | None = None,
    ) -> list[tuple[Reply, ...]]:
        """Free answers, `decoding.samples` per sequence; see `generation.replies`."""
        one, copies = without_copies(decoding)
        options: dict[str, Any] = {"batch_size": batch_size, "numbers": numbers}
        found = self.sample(prompt, batch, one, end_ids=end_ids, **options)
        return [tuple(map(reply, answers)) * copies for answers in found]

    def sample(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        decoding: Decoding,
        *,
        end_ids: Ids,
        batch_size: int = 16,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """The tokens of free answers; see `generation.generate`.

        Of several workers each writes its share, and all get all.
        """
        prompt_PD, found = join_spans(prompt), dict[int, list[Generation]]()
        numbers = range(len(batch)) if numbers is None else numbers
        for own_PD, own in _by_rows(prompt_PD, batch, here().share(batch)):
            answers = generate(
                self,
                own_PD,
                [batch[i] for i in own],
                decoding,
                end_ids=end_ids,
                batch_size=batch_size,
                numbers=[numbers[i] for i in own],
            )
            found |= zip(own, answers, strict=True)
        self.forward.lockstep.finish(prompt_PD)
        if here().count > 1:
            tokens = {i: [[*a.ids, *a.end] for a in answers] for i, answers in found.items()}
            others = here().gather(tokens)
            for own_PD, theirs in _by_rows(prompt_PD, batch, sorted(others.keys() - found.keys())):
                for i in theirs:
                    start = partial(begin, self, own_PD, decoding, end_ids, batch[i])
                    found[i] = [
                        _fill(start((numbers[i], n)), ids) for n, ids in enumerate(others[i])
                    ]
        return [found[i] for i in range(len(batch))]


def _fill(answer: Generation, ids: Sequence[int]) -> Generation:
    """An answer with the tokens that another worker wrote."""
    for token in ids:
        answer.add(token)
    return answer


def _by_rows(
    prompt_PD: Tensor, batch: Sequence[TokenSequence], share: Sequence[int]
) -> Iterator[tuple[Tensor, list[int]]]:
    """Sequences of a share of a batch with the same of the prompt's rows, and these rows."""
    for rows in dict.fromkeys(batch[i].rows for i in share):
        own = [i for i in share if batch[i].rows == rows]
        yield (prompt_PD if rows is None else prompt_PD[list(rows)]), own
