"""Sequence-to-sequence reward modelling as a probabilistic program: a language model that corrects responses."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int

from .._typing import Tensor
from ..backend import dist, following, plate, sample, scale
from ..data import Comparisons, Corrections
from ..errors import ArgumentError
from ..likelihoods import outcome
from ..priors import Gaussian
from ..rewards import Corrector, CorrectorNetwork
from ..rewards._checks import is_real
from ..rewards._corrector_scores import ScoreRule
from ..rewards._corrector_tokens import Reading
from ._rewrites import Rewrites, rewrites_of


@dataclasses.dataclass(frozen=True)
class LanguageFeedback:
    """What is believed to generate corrected texts: adapters from a prior, targets from a language model.

    Zhou et al., "Sequence to Sequence Reward Modeling: Improving RLHF by Language Feedback", 2409.00162. The reward
    model is a language model that reads a prompt with a response and writes a better response. It learns two mappings
    by the likelihood of sequences: *correction*, from a worse response to the better one, and *identity*, from the
    better one to itself. Where it would have written otherwise tells which tokens of a new response are wrong: see
    `rewards.Scoring`. The sum of the scores is the reward of the response.

    A row of several candidates counts as pairs of each worse candidate with the best one (of a partial ranking, those
    without a place are worse than those with one); human corrections as pairs of response and corrected text. Ties have
    no target: they are left out, and counted in `report.training`. Equal mappings are merged, weights added.

    Magnitudes of scores and the relative weight of the two mappings were not to be found in public sources of the
    paper: they are settings here. With the default scoring the scale of rewards is that of `agreement` and `departure`,
    not of preferences: probabilities of preferences that follow from it are sharp where responses are long.

    The object is a Pyro program: `program(readings, targets, weight)` with the sites `corrector.*` (weights, with
    independent normal priors around their initialisation) and `target`.

    Attributes:
        corrector: The language model.
        prior: Prior over its trained weights.
        identity_weight: Weight of identity mappings, 0 or more.
        correction_weight: Weight of correction mappings, 0 or more.
        scoring: A `rewards.Scoring`.
        agreement: Score of a token before the first divergence.
        departure: Score of a token that the corrector would not have written.
        match_after: Score of a token behind the first divergence that it would have written.
        reduce: `"sum"` or `"mean"` of the scores as the reward of a response.

    Raises:
        ArgumentError: A setting is of the wrong type or out of range.

    Example:
        >>> import bayesrm as brm
        >>> LanguageFeedback(brm.rewards.Corrector("any/model"), departure=-2.0).rule.departure
        -2.0
    """

    corrector: Corrector | CorrectorNetwork
    prior: Gaussian = dataclasses.field(default_factory=Gaussian)
    identity_weight: float = 1.0
    correction_weight: float = 1.0
    scoring: str = "divergence"
    agreement: float = 1.0
    departure: float = -1.0
    match_after: float = 0.0
    reduce: str = "sum"

    #: Types of data the program explains; `fit` checks it.
    data_type = (Comparisons, Corrections)

    def __post_init__(self) -> None:
        if isinstance(self.corrector, type) or not isinstance(self.corrector, Corrector | CorrectorNetwork):
            raise ArgumentError(f"`corrector` is {self.corrector!r}; it is rewards.Corrector(...)")
        if not isinstance(self.prior, Gaussian):
            raise ArgumentError(f"`prior` is {self.prior!r}; it is priors.Gaussian(...)")
        for name in ("identity_weight", "correction_weight"):
            if not (is_real(value := getattr(self, name)) and value >= 0.0):
                raise ArgumentError(f"`{name}` is {value!r}; it is 0 or a positive number")
        if self.identity_weight == self.correction_weight == 0.0:
            raise ArgumentError("`identity_weight` and `correction_weight` are both 0, which leaves nothing to learn")
        # It checks the settings of scores.
        _ = self.rule

    @property
    def rule(self) -> ScoreRule:
        """From a corrector's predictions to the scores of tokens."""
        return ScoreRule(self.scoring, self.agreement, self.departure, self.match_after, self.reduce)

    def rewrites(self, data: Comparisons | Corrections) -> Rewrites:
        """What the corrector should write when it reads the responses of data.

        Raises:
            DataError: A row is of a kind that names no better response, there are no texts, or nothing is left.
        """
        return rewrites_of(data, correction_weight=self.correction_weight, identity_weight=self.identity_weight)

    def __call__(
        self, readings: Sequence[Reading], targets: Int[Tensor, "rows length"], weight: Float[Tensor, "rows"]
    ) -> None:
        """Runs the program.

        Args:
            readings: What is read, as `CorrectorNetwork.encode` returns it.
            targets: Token ids of what is written, padded with -1.
            weight: Weight of each row's log-likelihood.

        Raises:
            ArgumentError: The corrector has not been loaded.
        """
        network = self.corrector
        if not isinstance(network, CorrectorNetwork):
            raise ArgumentError(
                "a Corrector holds settings alone; run `dataclasses.replace(program, corrector=corrector.load())`"
            )
        with following(weight):
            parameters = {}
            for site, center in network.initial.items():
                prior = dist.Normal(center, self.prior.of(site) ** -0.5).to_event(center.dim())
                parameters[site] = sample(f"corrector.{site}", prior)
            distribution = outcome(
                log_prob=lambda written: _log_prob(network, parameters, readings, written), sample=_refuse_to_draw,
                batch_shape=(len(readings),), event_dim=1, like=weight,
            )  # fmt: skip
            with plate("rewrites", len(readings)), scale(weight):
                sample("target", distribution, obs=targets)


def padded_targets(targets: Sequence[Sequence[int]]) -> Int[Tensor, "rows length"]:
    """Token ids of targets, padded with -1, as the program takes them."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(target, dtype=torch.int64) for target in targets], batch_first=True, padding_value=-1
    )


def _log_prob(
    network: CorrectorNetwork, parameters: Mapping[str, Tensor], readings: Sequence[Reading], written: Tensor
) -> Tensor:
    targets = [[token for token in row if token >= 0] for row in written.tolist()]
    return network.apply_parameters(parameters, network.collate(readings, targets))


def _refuse_to_draw(random: Any) -> Any:
    raise ArgumentError(
        "a corrector's texts are not drawn by the program; `CorrectorNetwork.correct` writes the most probable tokens"
    )
