"""The frozen model: what it says of answers, given refined rows.

    rows_PD + TokenSequences  ->  Outcome: log-probability of every answer, per example

With prefix reuse a pass computes only what can depend on the rows: prompt, suffix and targets, on
top of the prefix's stored keys and values. All choices of a row share one pass: each choice is a
branch that sees prefix, prompt and suffix but no other choice. Rows of like length share a pass, so
that little is padding. `reuse_off` says why a model cannot do this; then each answer takes a full
pass.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.model.full_pass import in_full
from embedgrad.model.kv_cache import KVCache
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.outcome import Outcome
from embedgrad.model.packing import Packing, passes
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.model.prefixes import ReusingModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.prompt.span import Span
from embedgrad.prompt.template import Renderer, Template

Picked = Sequence[tuple[TokenSequence, Sequence[Ids]]]


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    prefix_cache_budget: str | float = 0.25,
    notify: Callable[[str], None] | None = None,
) -> LanguageModel:
    """Load a frozen model: Hub id, folder, `.gguf` file, or `package:NAME`. Raises `ModelError`."""
    loaded = load(
        name, revision=revision, device=device, dtype=dtype, attention=attention, notify=notify
    )
    return LanguageModel(loaded, prefix_cache_budget=prefix_cache_budget)


class LanguageModel(ReusingModel):
    """A frozen model that says how likely answers are, given refined rows.

    `prefix_cache_budget` bounds the stored prefixes: bytes, "2 GiB", or a fraction of free memory;
    0 stores none.
    """

    def __init__(self, loaded: LoadedModel, *, prefix_cache_budget: str | float = 0.25):
        super().__init__(loaded, PrefixCache.on(loaded.model.device, prefix_cache_budget))
        if not self.reuse_off:
            self._find_out()

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
        """What turns examples into this model's token sequences; see `Sequencer`.

        `date` is what a chat template is told as today; unset: today.
        """
        renderer = Renderer(template, self.tokenizer, date=date or datetime.date.today())
        return Sequencer(
            renderer,
            self.tokenizer,
            target,
            rows=rows,
            spans=spans,
            context=self.info.context,
            merges=merges,
            truncate=truncate,
        )

    def outcome(
        self,
        rows_PD: Tensor,
        sequences: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
    ) -> Outcome:
        """Log-probabilities of the answers, differentiable in the rows.

        Twice differentiable with stored prefixes; in full passes only with eager attention.

        `choices=False` computes the right answer only, and the outcome has one target per row.
        A pure function: the same rows and sequences give the same outcome.
        """
        targets = [s.targets if choices else (s.targets[s.gold],) for s in sequences]
        gold = [s.gold if choices else 0 for s in sequences]
        logprobs, tokens = self._logprobs(rows_PD, sequences, targets)
        return Outcome(
            logprobs,
            tokens,
            torch.tensor(gold, device=self.device),
            tuple(s.example.group for s in sequences),
            normalize,
        )

    def _logprobs(
        self, rows_PD: Tensor, sequences: Sequence[TokenSequence], targets: Sequence[Sequence[Ids]]
    ) -> tuple[Tensor, Tensor]:
        width = max(len(t) for t in targets)
        counts = [[len(ids) for ids in t] + [0] * (width - len(t)) for t in targets]
        tokens = torch.tensor(counts, device=self.device)
        reused = [i for i, s in enumerate(sequences) if self._reuses(s, len(rows_PD), targets[i])]
        others = sorted(set(range(len(sequences))) - set(reused))
        parts = []
        for way, order in ((self._from_prefixes, reused), (self._in_full, others)):
            if order:
                parts.append(way(rows_PD, [(sequences[i], targets[i]) for i in order], width))
        logprobs = _in_order(parts, reused + others)
        return logprobs.masked_fill(tokens == 0, -torch.inf), tokens

    def _reuses(self, sequence: TokenSequence, prompt: int, targets: Sequence[Ids]) -> bool:
        if self.reuse_off:
            return False
        if self.longest_reuse is None:
            return True
        longest = max(len(ids) for ids in targets)
        return len(sequence.prefix) + prompt + len(sequence.suffix) + longest <= self.longest_reuse

    def _from_prefixes(self, rows_PD: Tensor, picked: Picked, width: int) -> Tensor:
        ahead = self.context_of(rows_PD, [sequence for sequence, _ in picked])
        layout = Packing(len(ahead.rows_PD), width)
        for before, (sequence, targets) in zip(ahead.before, picked, strict=True):
            layout.add(before, sequence.suffix, targets)
        groups = passes(layout.lengths)
        parts = []
        for group in groups:
            batch = layout.tensors(group, self.device)
            embeds = self.splice(batch.ids_BT, batch.prompt_at, ahead.rows_PD)
            past = KVCache(ahead.cached(group))
            parts.append(batch.table(self.logprobs(embeds, batch, past)))
        return _in_order(parts, [i for group in groups for i in group])

    def _in_full(self, rows_PD: Tensor, picked: Picked, width: int) -> Tensor:
        return in_full(self, rows_PD, picked, width)

    # -- what the model allows -----------------------------------------------------------------

    @torch.no_grad()
    def _find_out(self) -> None:
        """Try what the model takes, on a few tokens; one that nobody foresaw is caught here."""
        self.linear_lm_head = self._has_linear_lm_head()
        fast, self.feed_forward = self.feed_forward, None
        full = self._tried(self._in_full)
        self.feed_forward = fast
        exact = self.dtype in (torch.float32, torch.float64)
        if exact and not _differ(self._tried(self._from_prefixes), full, 1e-3):
            return  # the usual case, in the fewest passes
        self.feed_forward, self.joins_keys = None, True
        joined = self._tried(self._from_prefixes)
        self.reuse_off = _differ(joined, full, 1e-2 if exact else 0.5)
        if self.reuse_off:
            return
        # Rounding hides much in half precision; with joined keys it is nearly the same.
        for self.feed_forward, self.joins_keys in ((fast, False), (None, False), (None, True)):
            if not _differ(self._tried(self._from_prefixes), joined, 1e-3 if exact else 0.1):
                return

    def _has_linear_lm_head(self) -> bool:
        """Whether logits are a linear layer of the last hidden states and nothing else."""
        ids = torch.tensor([[1, 2, 3]], device=self.device) % max(self.info.vocabulary, 1)
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(
            lambda _, __, output: seen.append(output.last_hidden_state)
        )
        try:
            plain = self.model(input_ids=ids, use_cache=False).logits
            layer = self.model.get_output_embeddings()
            logits = torch.nn.functional.linear(seen[0], layer.weight, getattr(layer, "bias", None))
        except Exception:  # whatever a model we do not know raises, it is not a plain one
            return False
        finally:
            hook.remove()
        return torch.equal(logits, plain)  # the same operation on the same numbers

    def _tried(self, way: Callable[[Tensor, Picked, int], Tensor]) -> Tensor | str:
        """Log-probabilities on a few tokens, or why there are none."""
        some = [1 + i * 7 % max(self.info.vocabulary - 1, 1) for i in range(16)]
        nobody = Example({}, "", "probe")
        a, b, c, d, e = (tuple(some[i:j]) for i, j in ((0, 5), (5, 8), (8, 10), (11, 13), (13, 15)))
        rows = [
            TokenSequence(a, b, (c, (some[10],)), 0, None, nobody),
            TokenSequence(d, e, ((some[15],), (some[0], some[1])), 0, None, nobody),
        ]
        stored, self.prefix_cache = self.prefix_cache, PrefixCache(0)
        try:
            return way(self.embed(some[2:5]), [(s, s.targets) for s in rows], 2)
        except Exception as error:
            # Any failure inside a model we do not know means the same: use the plain way.
            return f"{type(error).__name__}: {error}"
        finally:
            self.prefix_cache = stored


def _differ(found: Tensor | str, expected: Tensor | str, tolerance: float) -> str:
    """Why one way of computing cannot take the place of another; "" if it can."""
    if isinstance(expected, str) or isinstance(found, str):
        reason = expected if isinstance(expected, str) else found
        return f"this model does not take stored prefixes ({reason})"
    if not (found - expected).abs().max().item() < tolerance:
        return "with stored prefixes this model gives other results than in full passes"
    return ""


def _in_order(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Join parts whose rows are those of the given indices, in the order of the indices."""
    joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if list(order) == sorted(order):
        return joined
    return joined[torch.tensor(order, device=joined.device).argsort()]
