"""Which recorded answers are probably not the ones that were meant?

Let z_i say whether answer i is wrong: whether noise put y_i on record where another answer was meant. Given parameters
and latents theta, answers are independent, so p(z_i | theta, all answers) = p(z_i | theta, y_i), and

    p(z_i | all answers) = E[p(z_i, y_i | theta) / p(y_i | theta)],  theta ~ p(theta | all answers).

The posterior has seen y_i, and should have: a program with noise learns from an answer only as far as it may be right.
Of an answer y that the posterior has not seen, the same probability is E[p(z, y | theta)] / E[p(y | theta)]: draws are
weighted by p(y | theta), as if it had.

A program without noise trusts every answer fully. To ask of one of them whether it is wrong after all, that trust has
to be taken back: p(z_i, y_i | theta) and p(y_i | theta), at an assumed rate of wrong answers, are averaged over the
posterior given all *other* answers, with importance weights 1 / p_meant(y_i | theta).
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._typing import Tensor
from ..data import Comparisons
from ..engines import Posterior, psis
from ..engines._density import FeedbackDensity
from ..engines._digest import feedback_digest
from ..engines.psis import MIN_DRAWS
from ..errors import ArgumentError, ParetoWarning
from ._label_probabilities import Probabilities, reliable_ratio
from ._label_raters import RaterAudit, audit_raters
from ._wrong_answers import Answers, records_wrongly
from .loo import _UNWEIGHABLE

#: Coverage of the intervals.
LEVEL = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class LabelAudit:
    """How probable it is of each recorded answer that another one was meant.

    Attributes:
        data: The rows.
        prob_flipped: P(the recorded answer of the row is not the one that was meant), shape `(rows,)`. A tie, or the
            middle level of a rating, is its own opposite and cannot be wrong: 0. NaN for a masked row whose answer the
            likelihood deems impossible.
        log_prob: Its logarithm, which tells probabilities near zero apart, shape `(rows,)`.
        k_hat: Shape of the tail of each row's leave-one-out weights, shape `(rows,)`, NaN for rows that needed none;
            `None` where no row did.
        expected_wrong: Expected number of wrong answers among the rows that count.
        wrong_interval: Central 90% posterior interval of that number, from joint draws: answers are right or wrong
            together where they hang on the same weights. `None` where each row has a posterior of its own (leave-one-
            out, data that were not fitted), which say nothing about rows jointly.
        raters: Annotators with their reliability, least reliable first, where the program has `RaterReliability`.
        fitted: Whether `data` are those of the fit. On others each probability is a prediction given the observed
            answer, and given none of the other answers in `data`.
        corrected: Whether draws of an approximate engine were weighted to be those of the exact posterior; they are
            taken as they come where such weights are not reliable, as in many dimensions.
        flip_rate: The rate that was assumed for kinds of feedback without noise in their likelihood.
        num_draws: Number of draws.
    """

    data: Comparisons
    prob_flipped: Tensor
    log_prob: Tensor
    k_hat: Tensor | None
    expected_wrong: float
    wrong_interval: tuple[float, float] | None
    raters: tuple[RaterAudit, ...]
    fitted: bool
    corrected: bool
    flip_rate: float | None
    num_draws: int

    @property
    def ranked(self) -> NDArray[np.int64]:
        """Rows, the most suspicious first, shape `(rows,)`."""
        order: NDArray[np.int64] = np.argsort(-self.log_prob.nan_to_num(nan=-torch.inf).numpy(), kind="stable")
        return order

    @property
    def num_unreliable(self) -> int:
        """Number of rows whose leave-one-out weights cannot be trusted."""
        return 0 if self.k_hat is None else int((self.k_hat > self.k_hat_threshold).sum())

    @property
    def k_hat_threshold(self) -> float:
        """Largest reliable k-hat."""
        return psis.k_hat_threshold(max(self.num_draws, MIN_DRAWS))

    @property
    def annotator(self) -> tuple[str | None, ...]:
        """Annotator of each row."""
        found: list[str | None] = [None] * len(self.data)
        for group in self.data.groups():
            if group.comparison.annotator is not None:
                for row, code in zip(group.rows.tolist(), group.comparison.annotator.tolist(), strict=True):
                    found[row] = self.data.annotators[code] if code >= 0 else None
        return tuple(found)

    def table(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows as plain records, the most suspicious first: what `json` and `pandas.DataFrame` take.

        Each has `row`, `prob_flipped`, `log_prob`, `k_hat`, `kind`, `comparison` (one line for a person), `annotator`,
        and `reliability`, `reliability_low`, `reliability_high` of that annotator; and `prompt` and `responses` where
        the data have texts.

        Args:
            limit: Most records; `None` for all.
        """
        annotators = self.annotator
        # Raters may have one reliability for each kind of feedback, or one for all.
        reliability = {(rater.kind, rater.name): rater for rater in self.raters}
        place = {row: (g, i) for g in self.data.groups() for i, row in enumerate(g.rows.tolist())}
        records = []
        for row in self.ranked[:limit].tolist():
            group, i = place[row]
            kind, name = group.comparison.kind, annotators[row]
            record: dict[str, Any] = {
                "row": row,
                "prob_flipped": float(self.prob_flipped[row]),
                "log_prob": float(self.log_prob[row]),
                "k_hat": None if self.k_hat is None else float(self.k_hat[row]),
                "kind": kind,
                "comparison": self.data.describe_row(row),
                "annotator": name,
            }
            rater = reliability.get((kind, name or ""), reliability.get((None, name or "")))
            if rater is not None:
                record |= {"reliability": rater.reliability, "reliability_low": rater.low}
                record |= {"reliability_high": rater.high}
            texts = [self.data.text(item) for item in group.items[i].tolist()]
            if any(response != "" for _, response in texts):
                record |= {"prompt": texts[0][0], "responses": [response for _, response in texts]}
            records.append(record)
        return records

    def keep(self, threshold: float = 0.5) -> Comparisons:
        """The rows that are less probably wrong than `threshold`; the others are left out.

        Raises:
            ArgumentError: `threshold` is no probability, or no row is left.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ArgumentError(f"`threshold` is {threshold}; a probability lies in [0, 1]")
        suspicious = (self.prob_flipped >= threshold).numpy()
        if suspicious.all():
            raise ArgumentError(
                f"`threshold` is {threshold}; all {len(suspicious)} answers are at least as probably wrong as that"
            )
        return self.data.select(~suspicious)

    def reweight(self) -> Comparisons:
        """The same rows, each weight times the probability that the answer is right.

        A program without noise that is fitted to them trusts each answer as far as the audit did. It is no posterior:
        the probabilities are taken as known, and they were found with the same answers. Nor is it the M step of an EM
        algorithm for the program with noise, which also counts the *opposite* answer, with the probability that the
        recorded one is wrong; here what a wrong answer says about the right one is lost.
        """
        kept = 1.0 - self.prob_flipped.nan_to_num(nan=0.0).numpy()
        rows = self.data._rows
        return dataclasses.replace(self.data, _rows=dataclasses.replace(rows, weight=rows.weight * kept))

    def __str__(self) -> str:
        text = f"{self.expected_wrong:.1f} of {len(self.data)} answers are expected to be wrong"
        if self.wrong_interval is not None:
            text += f" (90%: {self.wrong_interval[0]:.0f} to {self.wrong_interval[1]:.0f})"
        row = int(self.ranked[0])
        text += f", the most suspicious is row {row} ({float(self.prob_flipped[row]):.3g})"
        if self.k_hat is not None:
            text += f", k-hat above {self.k_hat_threshold:.2f} for {self.num_unreliable}"
        return text


def audit_labels(
    posterior: Posterior,
    data: Comparisons,
    *,
    flip_rate: float | None = None,
    num_samples: int = 2000,
    seed: int = 0,
) -> LabelAudit:
    """The probability of each recorded answer that another one was meant, given all answers.

    Where the program's likelihood has `LabelNoise` or `RaterReliability` (alone, one in the other, or inside
    `LengthBias`), this is what the program says. Other likelihoods hold that every answer is meant: for them
    `flip_rate` is assumed for one row at a time, with the other rows held to be right.

    Args:
        posterior: The posterior. That of a point (`MAP`) serves a program with noise, at its mode.
        data: The feedback it was fitted on, or other feedback, see `LabelAudit.fitted`.
        flip_rate: Rate of wrong answers assumed for kinds of feedback whose likelihood has no noise.
        num_samples: Number of draws; a posterior made of draws gives those it has, at most as many.
        seed: Seed of the draws.

    Raises:
        ArgumentError: `flip_rate` is missing or has no use, or leave-one-out cannot weight the posterior.
        LikelihoodError: The likelihood wraps noise so that the answer that was meant cannot be told.

    Warns:
        ParetoWarning: The leave-one-out weights of some rows are not reliable.

    Example:
        >>> import bayesrm as brm
        >>> x = np.tile([[1.0], [0.0]], (20, 1))
        >>> outcome = [1] + [0] * 19
        >>> data = brm.Comparisons.from_arrays(x, candidates=np.arange(40).reshape(20, 2), outcome=outcome)
        >>> noisy = brm.likelihoods.LabelNoise(brm.likelihoods.BradleyTerry(), flip_rate=0.1)
        >>> posterior = brm.fit(brm.RewardModel(brm.rewards.Linear(), noisy), data)
        >>> audit = audit_labels(posterior, data)
        >>> int(audit.ranked[0]), bool(audit.prob_flipped[0] > 5 * audit.prob_flipped[1])
        (0, True)
    """
    kinds = {kind: records_wrongly(posterior.program.likelihood_of(kind)) for kind in data.kinds}
    _check_rate(flip_rate, [kind for kind, noisy in kinds.items() if not noisy])
    fitted = posterior.report.data_digest is not None and posterior.report.data_digest == feedback_digest(data)
    draws = posterior.weighted_draws(data, num_samples=num_samples, seed=seed)
    left_out = fitted and not all(kinds.values())
    obstacle = _UNWEIGHABLE.get(str(posterior.report.engine["name"]))
    if obstacle is None and len(draws.rewards) < MIN_DRAWS:
        obstacle = f"made of {len(draws.rewards)} draws, fewer than the {MIN_DRAWS} from which weights can be judged"
    if left_out and obstacle is not None:
        raise ArgumentError(
            f"the posterior is {obstacle}, and its program has no noise, so an answer cannot be left out; use Laplace, "
            "SVI or NUTS, or declare LabelNoise"
        )
    density = posterior._density_of(data)
    answers = [Answers.of(density, group, flip_rate) for group in density.groups]
    ratio = reliable_ratio(draws)
    probabilities = Probabilities(density, answers, draws, ratio, fitted=fitted, seed=seed)
    log_prob, k_hat = torch.full((2, len(data)), torch.nan, dtype=torch.float64)
    for i, a in enumerate(answers):
        if a.assumed and fitted:
            log_prob[a.group.rows], k_hat[a.group.rows] = probabilities.left_out(i)
        else:
            log_prob[a.group.rows] = probabilities.of_group(i)
    log_prob[_impossible(data, density)] = torch.nan
    counted = (torch.as_tensor(data._rows.weight) > 0) & ~log_prob.isnan()
    prob = log_prob.exp()
    result = LabelAudit(
        data=data,
        prob_flipped=prob,
        log_prob=log_prob,
        k_hat=k_hat if left_out else None,
        expected_wrong=float(prob[counted].sum()),
        wrong_interval=probabilities.interval(LEVEL) if fitted and not left_out else None,
        raters=audit_raters(posterior, density, draws, ratio, torch.where(counted, prob, 0.0), counted, LEVEL),
        fitted=fitted,
        corrected=ratio is not None,
        flip_rate=flip_rate,
        num_draws=len(draws.rewards),
    )
    if result.num_unreliable:
        warnings.warn(
            f"the leave-one-out weights of {result.num_unreliable} of {len(data)} rows have a k-hat above "
            f"{result.k_hat_threshold:.2f} (largest {float(k_hat.nan_to_num(nan=0.0).max()):.2f}): their probabilities "
            "of being wrong are not reliable; a program with LabelNoise needs no such weights",
            ParetoWarning,
            stacklevel=2,
        )
    return result


def _check_rate(flip_rate: float | None, without_noise: list[str]) -> None:
    if flip_rate is None:
        if without_noise:
            raise ArgumentError(
                f"the likelihood of {' and '.join(without_noise)} has no noise: it holds that every answer was meant; "
                "give `flip_rate`, the share of wrong answers to assume, or fit a program with LabelNoise"
            )
        return
    if not without_noise:
        raise ArgumentError(f"`flip_rate` is {flip_rate}, and the program has noise of its own; leave `flip_rate` out")
    if not 0.0 < flip_rate < 0.5:
        raise ArgumentError(f"`flip_rate` is {flip_rate}; an assumed share of wrong answers lies in (0, 0.5)")


def _impossible(data: Comparisons, density: FeedbackDensity) -> Tensor:
    """Masked rows whose answers the likelihood gives no probability; the density holds other answers in their place."""
    bad = torch.zeros(len(data), dtype=torch.bool)
    for given, legal in zip(data.groups(), density.groups, strict=True):
        differs = given.outcome != legal.outcome
        bad[given.rows] = differs.any(-1) if differs.dim() > 1 else differs
    return bad
