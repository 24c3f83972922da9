"""The frozen model: what it says of answers, given refined rows.

    rows_PD + TokenSequences  ->  Outcome: log-probability of every answer, per example

With head reuse a pass computes only what can depend on the rows: prompt, tail and targets, on top
of the head's stored keys and values. All choices of a row share one pass: each choice is a branch
that sees head, prompt and tail but no other choice. `reuse_off` says why a model cannot do this;
then each answer takes a full pass.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from embedgrad.cutting import Ids
from embedgrad.examples import Example
from embedgrad.frozen_model import FrozenModel
from embedgrad.head_cache import Head, HeadCache, budget_bytes
from embedgrad.layout import Layout, left_padded, stack_heads, summed
from embedgrad.loading import LoadedModel, load
from embedgrad.outcome import Outcome
from embedgrad.sequence import Sequencer, Target, TokenSequence
from embedgrad.span import Span
from embedgrad.template import Renderer, Template


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    head_cache_budget: str | float = 0.25,
    notify: Callable[[str], None] | None = None,
) -> LanguageModel:
    """Load a frozen model: Hub id, folder, `.gguf` file, or `package:NAME`. Raises `ModelError`."""
    loaded = load(
        name, revision=revision, device=device, dtype=dtype, attention=attention, notify=notify
    )
    return LanguageModel(loaded, head_cache_budget=head_cache_budget)


class LanguageModel(FrozenModel):
    """A frozen model that says how likely answers are, given refined rows.

    `head_cache_budget` bounds the stored heads: bytes, "2 GiB", or a fraction of free memory; 0
    stores none.
    """

    def __init__(self, loaded: LoadedModel, *, head_cache_budget: str | float = 0.25):
        super().__init__(loaded)
        self.heads = HeadCache(budget_bytes(head_cache_budget))
        if not self.reuse_off:
            self.reuse_off = self._probe()

    def sequencer(
        self,
        template: Template,
        target: Target,
        rows: Sequence[Example] = (),
        *,
        span: Span | None = None,
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
            span=span,
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
        """Log-probabilities of the answers, differentiable in the rows (twice if eager).

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
        order: list[int] = []
        parts = []
        if reused:
            picked = [(sequences[i], targets[i]) for i in reused]
            parts.append(self._from_heads(rows_PD, picked, width))
            order += reused
        if others:
            picked = [(sequences[i], targets[i]) for i in others]
            parts.append(self._in_full(rows_PD, picked, width))
            order += others
        logprobs = torch.cat(parts)
        if order != sorted(order):
            logprobs = logprobs[torch.tensor(order, device=self.device).argsort()]
        return logprobs.masked_fill(tokens == 0, -torch.inf), tokens

    # -- with stored heads ---------------------------------------------------------------------

    def _from_heads(
        self, rows_PD: Tensor, picked: Sequence[tuple[TokenSequence, Sequence[Ids]]], width: int
    ) -> Tensor:
        heads = self.heads_of([sequence.head for sequence, _ in picked])
        layout = Layout(len(rows_PD), width)
        for sequence, targets in picked:
            layout.add(len(sequence.head), sequence.tail, targets)
        batch = layout.tensors(self.device)
        logits = self.forward(
            self.splice(batch.ids_BT, batch.prompt_at, rows_PD),
            batch.positions_BT,
            batch.branches_BT,
            stack_heads(heads),
            left_padded([head.length for head in heads], self.device),
            batch.keep_BT,
        )
        return batch.gather(logits)

    @torch.no_grad()
    def heads_of(self, wanted: Sequence[Ids]) -> list[Head]:
        """Keys and values of heads, stored ones reused.

        Each is computed alone, so that its bits do not depend on what else is asked for or stored:
        an interrupted run, which starts with nothing stored, then gives the same rows.
        """
        found: dict[Ids, Head] = {}
        for ids in dict.fromkeys(wanted):
            head = self.heads.get(ids)
            if head is None:
                head = self._compute_head(ids)
                self.heads.put(ids, head)
            found[ids] = head
        return [found[ids] for ids in wanted]

    def _compute_head(self, ids: Ids) -> Head:
        if not ids:
            one = self._compute_head((0,))
            return Head(one.keys[:, :, :0].clone(), one.values[:, :, :0].clone())
        ids_BT = torch.tensor([ids], device=self.device)
        positions_BT = torch.arange(len(ids), device=self.device)[None]
        last = positions_BT == len(ids) - 1  # some logits must be computed
        past: Any = DynamicCache()
        none = left_padded([0], self.device)
        trunk = torch.zeros_like(positions_BT)
        self.forward(self._embed(ids_BT), positions_BT, trunk, past, none, last)
        return Head(
            torch.stack([layer.keys[0] for layer in past.layers]),
            torch.stack([layer.values[0] for layer in past.layers]),
        )

    # -- what the model allows -----------------------------------------------------------------

    def _reuses(self, sequence: TokenSequence, prompt: int, targets: Sequence[Ids]) -> bool:
        if self.reuse_off:
            return False
        if self.longest_reuse is None:
            return True
        longest = max(len(ids) for ids in targets)
        return len(sequence.head) + prompt + len(sequence.tail) + longest <= self.longest_reuse

    def _in_full(
        self,
        rows_PD: Tensor,
        picked: Sequence[tuple[TokenSequence, Sequence[Ids]]],
        width: int,
    ) -> Tensor:
        """Every answer in a pass of its own over the whole sequence, padded on the right."""
        if self.longest_reuse is not None and (len(picked), width) != (1, 1):
            # Rotary scaling by length sees the longest row of a batch, so each answer goes alone.
            lone = [
                [self._in_full(rows_PD, [(s, (ids,))], 1)[0, 0] for ids in targets]
                for s, targets in picked
            ]
            nothing = rows_PD.new_zeros(())
            return torch.stack([torch.stack(row + [nothing] * (width - len(row))) for row in lone])
        prompt = (0,) * len(rows_PD)
        lines = [
            (s.head + prompt + s.tail, len(s.head), ids, b * width + c)
            for b, (s, targets) in enumerate(picked)
            for c, ids in enumerate(targets)
        ]
        longest = max(len(context) + len(ids) - 1 for context, _, ids, _ in lines)
        ids_BT = torch.zeros(len(lines), longest, dtype=torch.long, device=self.device)
        mask_BT = torch.zeros_like(ids_BT)
        keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        prompt_at: list[int] = []
        wanted: list[int] = []
        cells: list[int] = []
        for i, (context, head, ids, cell) in enumerate(lines):
            full = context + ids[:-1]
            ids_BT[i, : len(full)] = torch.tensor(full, device=self.device)
            mask_BT[i, : len(full)] = 1
            keep_BT[i, len(context) - 1 : len(full)] = True
            prompt_at += range(i * longest + head, i * longest + head + len(prompt))
            wanted += ids
            cells += [cell] * len(ids)
        at = torch.tensor(prompt_at, dtype=torch.long, device=self.device)
        logits = self.full_pass(self.splice(ids_BT, at, rows_PD), mask_BT, keep_BT)
        rows = torch.arange(len(wanted), device=self.device)
        return summed(logits, rows, wanted, cells, len(picked), width)

    @torch.no_grad()
    def _probe(self) -> str:
        """Compare both ways on a few tokens; a model that nobody foresaw is caught here."""
        some = [1 + i * 7 % max(self.info.vocabulary - 1, 1) for i in range(16)]
        nobody = Example({}, "", "probe")
        long = TokenSequence(
            tuple(some[:5]), tuple(some[5:8]), (tuple(some[8:10]), (some[10],)), 0, None, nobody
        )
        short = TokenSequence(
            tuple(some[11:13]),
            tuple(some[13:15]),
            ((some[15],), (some[0], some[1])),
            0,
            None,
            nobody,
        )
        rows = self.embed(some[2:5])
        picked = [(s, s.targets) for s in (long, short)]
        stored, self.heads = self.heads, HeadCache(0)
        try:
            difference = self._from_heads(rows, picked, 2) - self._in_full(rows, picked, 2)
        except Exception as error:
            # Any failure inside a model we do not know means the same: use the plain way.
            return f"this model does not take stored heads ({type(error).__name__}: {error})"
        finally:
            self.heads = stored
        tolerance = 1e-2 if self.dtype in (torch.float32, torch.float64) else 0.5
        if not difference.abs().max().item() < tolerance:
            return "with stored heads this model gives other results than in full passes"
        return ""
