"""A mean-field posterior over adapter weights themselves, found by backpropagation through draws of the weights.

Wang et al., "BLoB: Bayesian low-rank adaptation by backpropagation for large language models", 2406.11675. There the A
matrices are uncertain and the B matrices a point; here every declared site is uncertain, with the prior that the
program declares, and so are the latents of the likelihood.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .._typing import Tensor
from ..data import Comparisons
from ..errors import ArgumentError, ConvergenceWarning
from ..programs import RewardModel
from ..rewards import LoRANetwork
from ._density import FeedbackDensity, _weighted
from ._lora_fit import train_network
from ._settings import check_positive
from ._shared_prefix import swapped_weights
from ._trainer import JointLoss
from .network_posterior import NetworkDraws, NetworkPosterior, network_report
from .training import Training, train

#: Whether standard deviations have settled is tried by making all of them larger by this factor, on so many draws.
_LARGER, _SETTLING_DRAWS = 1.1, 4


@dataclasses.dataclass(frozen=True)
class MeanField:
    """The objective of a normal approximation with independent weights and latents.

    Attributes:
        init_scale: Standard deviation that weights start with, in units of the prior's.
        latent_init_scale: Standard deviation that unconstrained latents start with.
        scale_learning_rate: Peak learning rate of the standard deviations, on the scale where softplus gives them.
        seed: Seed of the noise.
    """

    init_scale: float
    latent_init_scale: float
    scale_learning_rate: float
    seed: int

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of a run."""
        settings = dataclasses.asdict(self)
        return {"objective": "mean-field"} | {f"objective.{name}": settings[name] for name in sorted(settings)}

    def loss(
        self, network: LoRANetwork, program: RewardModel, density: FeedbackDensity, *, num_rows: int, num_batches: int
    ) -> "MeanFieldLoss":
        """The loss module."""
        return MeanFieldLoss(self, network, program, density, num_rows=num_rows, num_batches=num_batches)

    def start(self, network: LoRANetwork, density: FeedbackDensity) -> Tensor:
        """Latents, then `rho` of the latents and of the weights, see `MeanFieldLoss`."""
        latents = density.initial_latents.detach().cpu()
        spread = torch.full_like(latents, _inverse_softplus(self.latent_init_scale))
        rho = torch.full((network.num_parameters,), _inverse_softplus(self.init_scale), dtype=torch.float64)
        return torch.cat([latents, spread, rho])


class MeanFieldLoss(JointLoss):
    """The loss of a micro-batch, -ELBO/N in expectation over its noise and on average over the batches of an epoch.

    `-[(N/B) sum(weight * log p(y | theta, u)) + log p(u) + H(q_u) - KL(q || p)] / N` at one draw of weights theta and
    unconstrained latents u for each micro-batch. The means of the weights are the network's own; their standard
    deviations are `softplus(rho)` times the prior's, those of the latents `softplus(latent_rho)`. Kingma and Welling,
    1312.6114, for the gradient.

    Attributes:
        rho: Shape `(P,)`.
        latent_rho: Shape `(Q,)`; `None` where there are no latents.
        constant: KL divergence at the start over N, a part of the loss.
    """

    def __init__(
        self,
        objective: MeanField,
        network: LoRANetwork,
        program: RewardModel,
        density: FeedbackDensity,
        *,
        num_rows: int,
        num_batches: int,
    ) -> None:
        super().__init__(network, program, density, num_rows=num_rows, num_batches=num_batches)
        q = density.num_latents
        start = objective.start(network, density)
        self.rho = torch.nn.Parameter(start[2 * q :].to(self._center))
        self.latent_rho = torch.nn.Parameter(start[q : 2 * q].to(density.initial_latents)) if q else None
        self._objective = objective
        with torch.no_grad():
            self.constant = float(self.kl(self.means())) / num_rows

    @property
    def beside(self) -> Tensor:
        """What is trained beside the means of the weights: latents, `latent_rho`, `rho`."""
        latents = [] if self.latents is None or self.latent_rho is None else [self.latents, self.latent_rho]
        return torch.cat([p.detach().cpu().double() for p in (*latents, self.rho)])

    @beside.setter
    def beside(self, vector: Tensor) -> None:
        parameters = [p for p in (self.latents, self.latent_rho, self.rho) if p is not None]
        with torch.no_grad():
            for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
                p.copy_(part)

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        """What the optimiser trains, with learning rates that differ from the weights'."""
        spreads = [p for p in (self.rho, self.latent_rho) if p is not None]
        return [*super().parameter_groups(training), {"params": spreads, "lr": self._objective.scale_learning_rate}]

    def means(self) -> Tensor:
        """Means of the weights, shape `(P,)`."""
        return torch.cat([p.reshape(-1) for p in self.network.sites.values()])

    def kl(self, means: Tensor) -> Tensor:
        """KL divergence of the weights' approximation from their prior, in nats, a float64 scalar."""
        scale = torch.nn.functional.softplus(self.rho)
        away = self._precision * (means - self._center).square()
        return (0.5 * (scale.square() + away - 1.0) - scale.log()).sum(dtype=torch.float64)

    def forward(
        self, sequences: Mapping[str, Tensor], places: Tensor, feedback: FeedbackDensity, number: int = 0
    ) -> Tensor:
        """The loss, a float64 scalar.

        Args:
            sequences: Collated items of the batch.
            places: Which of them each row compares, shape `(rows, K)`.
            feedback: The rows, and rows of other kinds that complete the latents' prior.
            number: Number of the micro-batch in the run, which decides its noise.
        """
        means = self.means()
        noise, latent_noise = self.noise(number)
        theta = means + torch.nn.functional.softplus(self.rho) * self._precision.rsqrt() * noise
        latents, entropy = self._no_latents, self._no_latents.sum()
        if self.latents is not None and self.latent_rho is not None:
            spread = torch.nn.functional.softplus(self.latent_rho)
            latents = self.latents + spread * latent_noise
            entropy = (spread.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
        total = self._data_term(theta, latents, sequences, places, feedback)
        return (self.kl(means) - entropy - total) / self._num_rows

    def noise(self, number: int) -> tuple[Tensor, Tensor]:
        """Standard normal noise of a micro-batch for the weights, `(P,)`, and for the latents, `(Q,)`."""
        seed = np.random.SeedSequence([self._objective.seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed) >> 1)
        weights = torch.randn(len(self.rho), generator=generator).to(self.rho)
        latents = torch.randn(len(self._no_latents if self.latents is None else self.latents), generator=generator)
        return weights, latents.to(self._no_latents)

    def _data_term(
        self,
        theta: Tensor,
        latents: Tensor,
        sequences: Mapping[str, Tensor],
        places: Tensor,
        feedback: FeedbackDensity,
    ) -> Tensor:
        """(N/B) sum(weight * log p) + log p(u) at theta and u, with their gradients.

        The network is differentiated here, while theta is in its weights: activations that a checkpoint recomputes
        later would be computed with other ones.
        """
        weights = list(self.network.sites.values())
        u = latents.detach().requires_grad_(torch.is_grad_enabled())
        with swapped_weights(self.network) as put:
            put(theta.detach())
            rewards = self.network(**sequences)[places].double()
            others = [u.new_zeros(g.items.shape) for g in feedback.groups[1:]]
            distributions, log_prior = feedback.distributions([rewards, *others], u)
            rows = feedback.groups[0]
            log_likelihood = _weighted(distributions[0].log_prob(rows.outcome), rows.weight).sum()
            total = log_prior + self._num_batches * log_likelihood
            if not torch.is_grad_enabled():
                return total
            found = torch.autograd.grad(total, [*weights, u], allow_unused=True, materialize_grads=True)
        gradient = torch.cat([g.reshape(-1) for g in found[:-1]])
        # The value, with a graph that hands the gradients on.
        along = (gradient * (theta - theta.detach())).sum() + (found[-1] * (latents - u.detach())).sum()
        return total.detach() + along


@dataclasses.dataclass(frozen=True)
class Approximation:
    """Independent normal distributions of the weights and of the unconstrained latents, float64, on the CPU.

    Attributes:
        mean: Means of the weights, shape `(P,)`.
        scale: Their standard deviations.
        center: Their means under the prior.
        precision: Their precisions under the prior.
        latent_mean: Means of the latents, shape `(Q,)`.
        latent_scale: Their standard deviations.
    """

    mean: Tensor
    scale: Tensor
    center: Tensor
    precision: Tensor
    latent_mean: Tensor
    latent_scale: Tensor

    @classmethod
    def of(cls, loss: MeanFieldLoss) -> "Approximation":
        """The approximation that a loss has found."""
        softplus, latent_mean, latent_rho = torch.nn.functional.softplus, loss.latents, loss.latent_rho
        precision, none = loss._precision.double(), loss._no_latents
        parts = (
            loss.means().double(),
            softplus(loss.rho.double()) * precision.rsqrt(),
            loss._center.double(),
            precision,
            none if latent_mean is None else latent_mean,
            none if latent_rho is None else softplus(latent_rho),
        )
        return cls(*(part.detach().cpu().clone() for part in parts))

    @property
    def latent_entropy(self) -> float:
        """Entropy of the latents, in nats."""
        return float((self.latent_scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())

    def kl_growth(self, factor: float) -> float:
        """By how many nats the KL divergence from the weights' prior rises with all their standard deviations."""
        squares = float((self.scale.square() * self.precision).sum())
        return 0.5 * (factor**2 - 1.0) * squares - len(self.scale) * math.log(factor)

    def draw(self, num_samples: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights `(S, P)`, latents `(S, Q)`, and `log_q` and `log_prior`, see `NetworkPosterior.log_density`."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, len(self.mean), generator=generator, dtype=torch.float64)
        latent_noise = torch.randn(num_samples, len(self.latent_mean), generator=generator, dtype=torch.float64)
        weights = self.mean + self.scale * noise
        log_density = {
            "log_q": _log_normal(noise, self.scale) + _log_normal(latent_noise, self.latent_scale),
            "log_prior": _log_normal((weights - self.center) * self.precision.sqrt(), self.precision.rsqrt()),
        }
        return weights, self.latent_mean + self.latent_scale * latent_noise, log_density


def _log_normal(whitened: Tensor, scale: Tensor) -> Tensor:
    """Log density of independent normal numbers, shape `(S,)`, given in units of their standard deviations `scale`."""
    return -(0.5 * whitened.square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum(1)


def fit_mean_field(
    program: RewardModel,
    data: Comparisons,
    training: Training,
    *,
    init_scale: float = 0.1,
    latent_init_scale: float = 0.1,
    scale_learning_rate: float = 5e-2,
    num_samples: int = 32,
    num_elbo_draws: int = 8,
    seed: int,
    progress: bool,
) -> NetworkPosterior:
    """A mean-field normal posterior over the weights of a `LoRA` reward and the unconstrained latents.

    Most weights are hardly informed by the data, and their standard deviations belong near the prior's. They start far
    below, where gradients have little noise, and need a few hundred steps to get there: a run that is too short is too
    certain, which `mean_scale` shows. It has not converged where the ELBO would rise if all standard deviations of the
    weights were a tenth larger, which is found on the same draws: how far the last steps moved says nothing under a
    learning rate that falls to zero. Whether the means have settled is not tried.

    Args:
        program: A program with a `LoRA` reward; the prior on the weights is centred at their initialisation.
        data: The comparisons.
        training: Settings of the Trainer; a run that was interrupted goes on as it would have.
        init_scale: Standard deviation that weights start with, in units of the prior's.
        latent_init_scale: Standard deviation that unconstrained latents start with.
        scale_learning_rate: Peak learning rate of the standard deviations, on the scale where softplus gives them.
        num_samples: Draws S of the approximation that the posterior holds.
        num_elbo_draws: How many of them the ELBO is estimated from, each by a pass over the data.
        seed: Seed of the initialisation, the order of the rows, the noise and the draws.
        progress: Show progress.

    Returns:
        The posterior. Its report's diagnostics: `elbo` with `elbo_std_error` in nats, `kl`, `mean_scale`, the mean of
        the standard deviations in units of the prior's, and `growth_gain` with `growth_gain_std_error`, the nats by
        which the ELBO would rise if these were a tenth larger. Engine, time and data digest are the caller's to fill
        in.

    Raises:
        ArgumentError: A setting cannot be used.
        DataError: No row has a positive weight.
        EngineError: Training diverged.
        PersistenceError: The training's folder holds another run, or cannot be written.
    """
    begin = time.perf_counter()
    if training.epochs == 0 and training.max_steps is None:
        raise ArgumentError("`training` has 0 epochs, which leaves the approximation where it starts; set `epochs`")
    for name, value in (
        ("init_scale", init_scale), ("latent_init_scale", latent_init_scale),
        ("scale_learning_rate", scale_learning_rate),
    ):  # fmt: skip
        if not 0.0 < value < math.inf:
            raise ArgumentError(f"`{name}` is {value}; it is a positive number")
    check_positive("num_elbo_draws", num_elbo_draws)
    check_positive("num_samples", num_samples)
    if num_samples < 2:
        raise ArgumentError(f"`num_samples` is {num_samples}; at least 2 draws are needed for a variance")
    untrained = train_network(
        program, data, dataclasses.replace(training, epochs=0.0, max_steps=None), seed=seed, progress=False
    )
    network, density = untrained.network, untrained.density
    objective = MeanField(init_scale, latent_init_scale, scale_learning_rate, seed)
    run = train(network, program, data, density, training, seed=seed, progress=progress, objective=objective)
    loss = objective.loss(network, program, density, num_rows=len(data), num_batches=1)
    loss.beside = run.latents
    q = Approximation.of(loss)
    theta, latents, log_density = q.draw(num_samples, seed)

    drawn = NetworkDraws(network, theta.to(network.theta().dtype), 2 * training.batch_size)
    count, tried = min(num_samples, num_elbo_draws), min(num_samples, _SETTLING_DRAWS)
    own = max(count, tried)
    wider = (q.mean + _LARGER * (theta[:tried] - q.mean)).to(drawn.draws)
    few = dataclasses.replace(drawn, draws=torch.cat([drawn.draws[:own], wider]))
    rewards = torch.from_numpy(few.extract_items(data, progress=progress)).T
    with torch.no_grad():
        values = density.log_joints(rewards, torch.cat([latents[:own], latents[:tried]]))
        kl = float(loss.kl(loss.means()))
    joint, change = values[:count], values[own:] - values[:tried]
    gain, error = float(change.mean()) - q.kl_growth(_LARGER), float(change.std()) / tried**0.5
    settled = gain <= 3.0 * error
    mean_scale = float((q.scale * q.precision.sqrt()).mean())
    diagnostics = {
        "elbo": float(joint.mean()) + q.latent_entropy - kl,
        "elbo_std_error": float(joint.std() / len(joint) ** 0.5) if len(joint) > 1 else None,
        "kl": kl,
        "mean_scale": mean_scale,
        "growth_gain": gain,
        "growth_gain_std_error": error,
    }
    report = network_report(
        "SVI", program, data, training, network, seed=seed, seconds=time.perf_counter() - begin, runs=[run],
        settled=settled, diagnostics=diagnostics,
    )  # fmt: skip
    if not (settled or run.stopped_early):
        warnings.warn(
            f"SVI stopped after {run.steps} steps while standard deviations still grew: {mean_scale:.2g} of the "
            f"prior's on average, and a tenth more would raise the bound by {gain:.2g} nats. The posterior is too "
            "certain; raise `epochs` of `training`, for some hundred steps",
            ConvergenceWarning,
            # The line that called `bayesrm.fit`.
            stacklevel=5,
        )
    program = RewardModel(drawn, program.likelihood, program.prior)
    return NetworkPosterior(program, untrained.schema, report, latents, log_density)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
