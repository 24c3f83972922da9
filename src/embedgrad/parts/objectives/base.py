"""Base class of objectives: per-example losses to one number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.decisions import Decided
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

State = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Sampling:
    """How the model's own answers are drawn, where an objective trains on these.

    `samples` answers to every question of a batch, with the rows as they are then. `max_new_tokens`
    None: as in evaluation. `scored`: they get rewards, and questions whose answers are all as good
    are replaced by others, until `tries` times the batch's questions were asked. `drop_cut`: what
    hits the token limit is left out; else its reward is 0. `kl` is the weight of the distance to
    the starting rows in a reward. `updates` are steps per batch; of more than one, each answer has
    the log-probabilities of its tokens when it was drawn as `old_logprobs` in `Example.extra`.
    `random` rewards are drawn by a coin, whatever the answer.
    """

    samples: int
    temperature: float = 1.0
    max_new_tokens: int | None = None
    scored: bool = False
    tries: int = 1
    drop_cut: bool = False
    kl: float = 0.0
    updates: int = 1
    random: bool = False


class Objective(ABC):
    """Turns a batch's outcome into one number to make smaller; not only means.

    Its options are the fields of a frozen dataclass.
    """

    step_share: ClassVar[float] = 1.0
    """Share of an optimizer's default step size to take where a recipe gives none."""
    is_mean: ClassVar[bool] = False
    """Whether `reduce` is the mean of the losses, so that a batch computed in parts needs no pass
    over the whole of it first."""

    needs_labels: ClassVar[bool] = True
    """Whether training rows need answers of their own; else a teacher gives them."""
    decides: ClassVar[bool] = False
    """Whether rows are for decisions, which `judge` makes; dev then counts their regret."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it reads as `outcome.extra`, besides those of the template."""
        return ()

    @property
    def group_column(self) -> str | None:
        """The column by which it compares examples, and scores are given apart; None: none."""
        return None

    @property
    def balance_by(self) -> str | None:
        """The column of whose values every batch holds equally many examples; None: as drawn."""
        return None

    @property
    def needs_groups(self) -> bool:
        """Whether a batch must hold all rows of a `data.group`, or none."""
        return False

    @property
    def needs_end(self) -> bool:
        """Whether it reads `outcome.end_logprobs_B`."""
        return False

    @property
    def sampling(self) -> Sampling | None:
        """How the answers of the model itself are drawn that it trains on; None: it does not."""
        return None

    def tokens_to_read(self, sequence: TokenSequence) -> Sequence[Ids] | None:
        """Tokens whose log-probabilities it reads as `outcome.token_logprobs_BTK`.

        K ids, the same number everywhere, for each token of the sequence's right answer; None: it
        reads none.
        """
        return None

    @abstractmethod
    def needs_choices(self, *, available: bool) -> bool:
        """Whether every choice must be scored; `available` says whether there are choices."""

    @abstractmethod
    def losses(self, outcome: Outcome) -> Tensor:
        """One loss per example, shape [B], in nats; each depends on its own example alone.

        Shape [B, K] where `reduce` needs K numbers of each.
        """

    @abstractmethod
    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        """One number, shape [], from the losses of the whole batch, differentiable in them.

        It sees the whole batch at once, in however many parts the losses are computed. It may rank
        the losses, compare `outcome.groups`, or read `outcome.extra`; of the outcome it uses no
        log-probability, as their gradient reaches the prompt through the losses alone.
        """

    def check(  # noqa: B027
        self, train: Sequence[Example], dev: Sequence[Example], test: Sequence[Example] = ()
    ) -> None:
        """Raise `DataError` where it cannot train on these rows, before a model is loaded."""

    def judge(
        self, examples: Sequence[Example], shares: Sequence[Mapping[str, float]]
    ) -> list[Decided]:
        """Every decision over these rows, given the probabilities of each row's choices."""
        return []

    def init(
        self,
        train: Sequence[TokenSequence],
        losses: Callable[[Sequence[TokenSequence]], Tensor],
        steps: int,
    ) -> State:
        """What it remembers before the first of all `steps`; {} where that is nothing.

        `losses` gives the losses of examples, shape [B], with the prompt that training starts from.
        """
        return {}

    def reduce_with(self, state: State, losses_B: Tensor, outcome: Outcome) -> Tensor:
        """`reduce`, for an objective that remembers earlier batches."""
        return self.reduce(losses_B, outcome)

    def update(self, state: State, losses_B: Tensor, outcome: Outcome) -> State:
        """The state after a step, by that step's losses; the checkpoint saves it."""
        return state
