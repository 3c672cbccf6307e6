"""A posterior over the responses to each prompt, by weights on candidates."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import ArgumentError, EngineError
from ..programs import ScoredCandidates
from .psis import MIN_DRAWS, k_hat_threshold, pareto_smooth


@runtime_checkable
class Target(Protocol):
    """A distribution over responses that is known up to a constant for each prompt."""

    def log_density(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log pi*(y | x) up to a constant, shape `(B, n)`; minus infinity where it is zero and outside the mask."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ResponsePosterior:
    """A target distribution over responses as weights on candidates; what the projections of alignment distil.

    Attributes:
        target: The distribution, for instance a `GoodnessPosterior`.
        candidates: The candidates.
        log_density: log pi*(y | x) up to a constant for each prompt, shape `(B, n)`.
        log_weights: Logarithms of the weights, which sum to 1 for each prompt, shape `(B, n)`: self-normalised
            importance weights, or the probabilities themselves where the candidates are exhaustive.
        log_evidence: log of the sum of the unnormalised density over all responses, shape `(B,)`: of a
            `GoodnessPosterior` log p(G = 1 | x). Estimated, unless the candidates are exhaustive. An `ExponentialTilt`
            measures rewards from the best of the candidates at hand; give its `maximum` to compare sets of candidates.
        k_hat: Shape of the generalised Pareto distribution fitted to each prompt's largest weights, shape `(B,)`; 0
            where the candidates are exhaustive, and not a number where they are fewer than 25.
        smoothed: Whether the weights' tails were replaced by quantiles of that distribution.
    """

    target: Target
    candidates: ScoredCandidates
    log_density: Float[Tensor, "prompts candidates"]
    log_weights: Float[Tensor, "prompts candidates"]
    log_evidence: Float[Tensor, "prompts"]
    k_hat: Float[Tensor, "prompts"]
    smoothed: bool = False

    @property
    def weights(self) -> Float[Tensor, "prompts candidates"]:
        """Weights of the candidates, which sum to 1 for each prompt."""
        return self.log_weights.exp()

    @property
    def ess(self) -> Float[Tensor, "prompts"]:
        """Effective sample size 1 / sum(w^2) of each prompt's draws, shape `(B,)`."""
        return 1.0 / self.weights.square().sum(1)

    @property
    def reliable(self) -> Bool[Tensor, "prompts"]:
        """Whether each prompt's k-hat is below its threshold; never where there are too few draws to tell."""
        counts = self.candidates.mask.sum(1).tolist()
        limits = [k_hat_threshold(n) if n >= MIN_DRAWS else -math.inf for n in counts]
        judged = self.k_hat <= torch.tensor(limits).to(self.k_hat)
        return judged | self.candidates.exhaustive

    def expectation(
        self, values: Float[Tensor, "prompts candidates"], *, allow_unreliable: bool = False
    ) -> tuple[Float[Tensor, "prompts"], Float[Tensor, "prompts"]]:
        """Expectation of a function of the response under the posterior, and its Monte Carlo standard error.

        The error is that of the ratio estimator, `sqrt(sum w^2 (f - mean)^2)`; 0 where the candidates are exhaustive.

        Args:
            values: The function at the candidates, shape `(B, n)`.
            allow_unreliable: Answer also where k-hat says that the weights cannot be trusted, or cannot tell.

        Raises:
            EngineError: The weights of a prompt cannot be trusted.
            ArgumentError: `values` has another shape.

        Example:
            >>> import bayesrm as brm
            >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
            >>> candidates = brm.programs.ScoredCandidates(belief, reference=torch.tensor([[0.5, 0.5]]).log())
            >>> posterior = brm.fit(brm.GoodnessPosterior(), candidates, inference=brm.Enumeration())
            >>> posterior.expectation(belief.mean)[0]
            tensor([0.7311])
        """
        if values.shape != self.log_weights.shape:
            raise ArgumentError(
                f"`values` has shape {tuple(values.shape)}; the candidates have {tuple(self.log_weights.shape)}"
            )
        if not allow_unreliable and not bool(self.reliable.all()):
            worst = int(torch.nonzero(~self.reliable)[0])
            raise EngineError(
                f"the importance weights of prompt {worst} cannot be trusted: k-hat {float(self.k_hat[worst]):.2f}, "
                f"{float(self.ess[worst]):.1f} effective of {int(self.candidates.mask[worst].sum())} draws; draw more, "
                "from a proposal nearer to the target, or pass allow_unreliable=True"
            )
        values = torch.where(self.candidates.mask, values, 0.0)
        mean = (self.weights * values).sum(1)
        if self.candidates.exhaustive:
            return mean, torch.zeros_like(mean)
        error = (self.weights.square() * (values - mean[:, None]).square()).sum(1).sqrt()
        return mean, error

    def kl_to_reference(self) -> Float[Tensor, "prompts"]:
        """KL(posterior || reference) in nats, shape `(B,)`; an estimate, unless the candidates are exhaustive."""
        tilt = (self.log_density - self.candidates.reference - self.log_evidence[:, None]).masked_fill(
            self.log_weights == -math.inf, 0.0
        )
        return (self.weights * tilt).sum(1)

    def resample(self, num_draws: int, *, seed: int) -> Int64[Tensor, "prompts draws"]:
        """Places of draws from the posterior among each prompt's candidates, with replacement (Rubin 1987)."""
        if num_draws < 1:
            raise ArgumentError(f"`num_draws` is {num_draws}; at least 1 draw is made")
        generator = torch.Generator(device=self.log_weights.device).manual_seed(seed)
        return torch.multinomial(self.weights, num_draws, replacement=True, generator=generator)


def response_posterior(target: Target, candidates: ScoredCandidates, *, smooth: bool = True) -> ResponsePosterior:
    """Weighs candidates by a target: exactly where they are exhaustive, else by self-normalised importance sampling.

    Args:
        target: The distribution that the weights stand for.
        candidates: Draws with their proposal's log-probabilities, or all responses.
        smooth: Replace the largest weights by quantiles of a fitted Pareto distribution (Vehtari et al., 1507.02646)
            for prompts with at least 25 draws.

    Raises:
        EngineError: The target gives no candidate of some prompt a positive density.

    Example:
        >>> import bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> drawn = torch.tensor([[-3.0, -5.0]])
        >>> candidates = brm.programs.ScoredCandidates(belief, reference=drawn, proposal=drawn)
        >>> response_posterior(brm.GoodnessPosterior(), candidates).weights
        tensor([[0.8808, 0.1192]])
    """
    log_density = target.log_density(candidates)
    if not isinstance(log_density, Tensor) or log_density.shape != candidates.mask.shape or log_density.requires_grad:
        found = tuple(log_density.shape) if isinstance(log_density, Tensor) else type(log_density).__name__
        raise ArgumentError(
            f"`log_density` of the target {type(target).__name__} returned {found}; it returns a tensor of shape "
            f"{tuple(candidates.mask.shape)} without gradients"
        )
    ratio = (log_density - candidates.log_proposal).masked_fill(~candidates.mask, -math.inf)
    if bool(torch.isnan(ratio).any()) or bool((ratio == math.inf).any()):
        bad = int(torch.nonzero(torch.isnan(ratio) | (ratio == math.inf))[0, 0])
        raise EngineError(f"the target's log density at a candidate of prompt {bad} is not a number or infinite")
    empty = (ratio == -math.inf).all(1)
    if bool(empty.any()):
        raise EngineError(
            f"the target gives no candidate of prompt {int(torch.nonzero(empty)[0])} a positive density; draw more"
        )
    counts = candidates.mask.sum(1)
    log_evidence = torch.logsumexp(ratio, 1) - counts.to(ratio).log()
    log_weights = torch.log_softmax(ratio, 1)
    k_hat = torch.zeros_like(log_evidence)
    if not candidates.exhaustive:
        k_hat, log_weights = _smooth(ratio, log_weights, counts, smooth)
    return ResponsePosterior(
        target, candidates, log_density, log_weights, log_evidence, k_hat,
        smoothed=smooth and not candidates.exhaustive and int(counts.max()) >= MIN_DRAWS,
    )  # fmt: skip


def _smooth(ratio: Tensor, log_weights: Tensor, counts: Tensor, replace: bool) -> tuple[Tensor, Tensor]:
    """k-hat of each prompt, and its log weights with the tail replaced where that is asked for."""
    k_hat = torch.full_like(log_weights[:, 0], math.nan)
    log_weights = log_weights.clone()
    for prompt, count in enumerate(counts.tolist()):
        if count < MIN_DRAWS:
            continue
        positive = ratio[prompt] > -math.inf
        if int(positive.sum()) < MIN_DRAWS:
            k_hat[prompt] = math.inf
            continue
        smoothed = pareto_smooth(ratio[prompt, positive])
        k_hat[prompt] = smoothed.k_hat
        if replace:
            log_weights[prompt, positive] = smoothed.log_weights.to(log_weights)
    return k_hat, log_weights
