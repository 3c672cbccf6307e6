"""Rater reliability: each annotator gives the answer that was meant with a probability of their own."""

import dataclasses

from .._typing import Array
from ..backend import dist, ops, plate, sample
from ..data.groups import Comparison
from ..errors import LikelihoodError
from .base import Likelihood, register
from .flips import flipped_mixture


@register("rater_reliability")
@dataclasses.dataclass(frozen=True)
class RaterReliability:
    """P(y) = eta_a P_base(y) + (1 - eta_a) P_base(flip(y)), Crowd-BT (Chen et al., WSDM 2013) with partial pooling.

    The reliability of annotator a is eta_a = 1/2 + sigmoid(m + s z_a) / 2, above one half: reliabilities and rewards
    could otherwise be mirrored together. m is shared, s says how much raters differ, z_a ~ N(0, 1); raters with few
    answers are drawn towards the others.

    Attributes:
        base: Likelihood of the answer that was meant.
        mean_prior: Prior mean of m; the default puts a typical reliability near 0.91.
        mean_scale: Prior standard deviation of m.
        spread_mean: Prior mean of log s.
        spread_scale: Prior standard deviation of log s.

    Latents:
        reliability_mean: m, shape `()`.
        reliability_spread: s, shape `()`.
        rater_deviation: z, shape `(num_annotators,)`, in the order of `data.annotators`; `reliability` gives eta.

    Example:
        >>> import torch, bayesrm as brm
        >>> rows = brm.data.Comparison(kind="choice", num_rows=2, num_candidates=2,
        ...                            annotator=torch.tensor([0, 1]), num_annotators=2)
        >>> known = {"reliability_mean": torch.tensor(0.0), "reliability_spread": torch.tensor(1.0),
        ...          "rater_deviation": torch.tensor([30.0, -30.0])}
        >>> with brm.backend.Recorder(known):
        ...     d = RaterReliability(brm.likelihoods.BradleyTerry())(torch.tensor([[30.0, 0.0]] * 2), rows)
        >>> d.log_prob(torch.tensor([0, 0])).exp()
        tensor([1.0000, 0.5000])
    """

    base: Likelihood
    mean_prior: float = 1.5
    mean_scale: float = 1.0
    spread_mean: float = -0.5
    spread_scale: float = 0.5

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over the outcomes of the base likelihood."""
        if comparison.annotator is None or bool((comparison.annotator < 0).any()):
            raise LikelihoodError(
                "RaterReliability needs the annotator of every row; give the data an `annotator` column"
            )
        base = self.base(rewards, comparison)
        mean = sample("reliability_mean", dist.Normal(self.mean_prior, self.mean_scale))
        spread = sample("reliability_spread", dist.LogNormal(self.spread_mean, self.spread_scale))
        with plate("raters", comparison.num_annotators):
            deviation = sample("rater_deviation", dist.Normal(0.0, 1.0))
        logit = (mean + spread * deviation)[comparison.annotator]
        # eta = (1 + s(logit)) / 2, and 1 - eta = s(-logit) / 2
        log_half = -0.6931471805599453
        log_kept = log_half + ops.log1p(ops.sigmoid(logit))
        return flipped_mixture(base, comparison, log_kept, log_half + ops.log_sigmoid(-logit), like=rewards)

    @staticmethod
    def reliability(latents: dict[str, Array]) -> Array:
        """eta of each annotator, shape `(..., num_annotators)`, from draws or values of the latents."""
        mean, spread = latents["reliability_mean"], latents["reliability_spread"]
        return 0.5 + 0.5 * ops.sigmoid(mean[..., None] + spread[..., None] * latents["rater_deviation"])
