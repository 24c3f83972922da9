"""AUC of the choices' scores: right answers above wrong ones?"""

from __future__ import annotations

from collections.abc import Sequence

_DRAWS = 2000
_MOST_ROWS = 1000  # pairs of rows are in memory


def macro_auc(
    scores: Sequence[Sequence[float]], gold: Sequence[int], *, seed: int = 0
) -> tuple[float, tuple[float, float]] | None:
    """The AUC of each choice against the rest, averaged over choices, and its 95 % interval.

    `scores` has a number per row and choice, `gold` the right choices. 0.5 is chance. A row's score
    of the right choice against another row's of a wrong one is a pair; equal scores count half
    (Hanley and McNeil 1982, Radiology 143:29; several choices: Provost and Domingos 2000). The
    interval is a percentile bootstrap's over rows. None where only one choice occurs.
    """
    import numpy as np

    scores_NC, gold_N = np.asarray(scores, dtype=np.float64), np.asarray(gold)
    n = len(gold_N)
    if n > _MOST_ROWS or scores_NC.shape[:1] != (n,) or not np.isfinite(scores_NC).all():
        raise ValueError(
            f"expected up to {_MOST_ROWS} rows of finite scores, and a choice for each"
        )
    present = np.unique(gold_N)
    if len(present) < 2:
        return None
    generator = np.random.default_rng(seed)
    draws_SN = generator.multinomial(n, np.full(n, 1 / n), size=_DRAWS).astype(np.float64)
    weights_SN = np.concatenate([np.ones((1, n)), draws_SN])  # first the rows as they are
    areas = []
    for choice in present:
        own_N, scores_N = gold_N == choice, scores_NC[:, choice]
        above_PQ = scores_N[own_N][:, None] - scores_N[~own_N]
        above_PQ = (np.sign(above_PQ) + 1) / 2
        own_SP, rest_SQ = weights_SN[:, own_N], weights_SN[:, ~own_N]
        pairs_S = own_SP.sum(axis=1) * rest_SQ.sum(axis=1)
        with np.errstate(invalid="ignore"):  # a draw may lack the choice
            areas.append(((own_SP @ above_PQ) * rest_SQ).sum(axis=1) / pairs_S)
    areas_KS = np.stack(areas)
    drawn = np.isfinite(areas_KS)
    mean_S = np.where(drawn, areas_KS, 0).sum(axis=0) / np.maximum(drawn.sum(axis=0), 1)
    low, high = np.quantile(mean_S[1:][drawn[:, 1:].any(axis=0)], [0.025, 0.975])
    return float(mean_S[0]), (float(low), float(high))
