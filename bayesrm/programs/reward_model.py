"""The reward model as a probabilistic program: prior x reward function x preference likelihood."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._typing import Array, Tensor
from ..backend import PriorRecorder, convert, dist, following, plate, sample, scale, seeded, shared_latents
from ..data import Comparisons
from ..data.groups import Comparison, FeedbackGroup
from ..errors import ArgumentError, DataError, LikelihoodError
from ..likelihoods import Likelihood
from ..priors import Gaussian
from ..rewards import GaussianProcess, Head, LoRA, LoRANetwork, ProjectedHead


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Feedback drawn from a program, with the truth behind it.

    Attributes:
        data: The comparisons with simulated outcomes.
        rewards: True reward of every item, shape `(items,)`.
        parameters: True parameters of the reward function, by site.
        latents: True latents of the likelihood, by site, in constrained space.
    """

    data: Comparisons
    rewards: Tensor
    parameters: dict[str, Tensor]
    latents: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """What is believed to generate feedback: parameters from a prior, rewards of the items, answers from a likelihood.

    The object is a Pyro program and, called with JAX arrays, a NumPyro program: `model(features, groups)` with the
    sites `reward.*` (parameters), the likelihood's latents, and `feedback` (one site per group of rows, named
    `feedback.<kind>.<K>` when there are several). Every inference engine works from this one declaration.

    Attributes:
        reward: The reward function, for instance `rewards.Linear` or `rewards.LoRA`.
        likelihood: A likelihood, or one for each kind of feedback: `{"choice": ..., "rating": ...}`; then the latents'
            names get the kind as prefix (`rating.first_cutpoint`).
        prior: Prior over the parameters of the reward function.

    Example:
        >>> import bayesrm as brm
        >>> model = RewardModel(reward=brm.rewards.Linear(), likelihood=brm.likelihoods.BradleyTerry())
        >>> model.prior.precision
        1.0
    """

    reward: Head | LoRA | LoRANetwork
    likelihood: Likelihood | Mapping[str, Likelihood]
    prior: Gaussian = dataclasses.field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        if isinstance(self.reward, type) or not isinstance(self.reward, Head | LoRA | LoRANetwork):
            raise ArgumentError(f"`reward` is {self.reward!r}; it is a reward function such as rewards.Linear()")
        likelihoods = self.likelihood.values() if isinstance(self.likelihood, Mapping) else [self.likelihood]
        for likelihood in likelihoods:
            if isinstance(likelihood, type) or not callable(likelihood):
                hint = "; call the class to make one" if isinstance(likelihood, type) else ""
                raise ArgumentError(f"`likelihood` is {likelihood!r}, not a likelihood such as BradleyTerry(){hint}")

    #: Type of data the program explains; `fit` checks it.
    data_type = Comparisons

    @property
    def head(self) -> Head:
        """The reward function, where it is a head.

        Raises:
            ArgumentError: It is a language model, which must be linearised first.
        """
        if isinstance(self.reward, LoRA | LoRANetwork):
            raise ArgumentError(
                "this needs a head on features, and the reward is a LoRA language model; use MAP or Laplace. The "
                "program of a Laplace posterior, `posterior.program`, has the network's tangent as a linear head"
            )
        return self.reward

    def __call__(self, features: Array | Mapping[str, Tensor], groups: Sequence[FeedbackGroup]) -> Array:
        """Runs the program.

        Args:
            features: Features of the items, shape `(items, num_features)`, torch or JAX; for a `LoRANetwork` their
                token sequences as `network.collate` returns them.
            groups: Rows of feedback that index them, from `data.groups()`.

        Returns:
            The rewards of the items, shape `(items,)`.
        """
        if isinstance(self.reward, LoRANetwork):
            if not isinstance(features, Mapping):
                raise ArgumentError("`features` must be token sequences as `LoRANetwork.collate` returns them")
            return self._run_network(self.reward, features, groups)
        if isinstance(self.reward, LoRA):
            raise ArgumentError(
                "a LoRA reward holds settings alone; run `dataclasses.replace(model, reward=model.reward.load())`"
            )
        if isinstance(features, Mapping):
            raise ArgumentError("`features` is a mapping; a head takes an array of shape (items, num_features)")
        with following(features):
            parameters = {}
            for site, shape in self.head.parameter_shapes(features.shape[-1]).items():
                prior = dist.Normal(0.0, self.prior.of(site) ** -0.5).expand(shape).to_event(len(shape))
                parameters[site] = sample(f"reward.{site}", prior)
            rewards = self.head.apply(parameters, features)
            self.observe(rewards, [g.map_arrays(lambda a: convert(a, features)) for g in groups])
        return rewards

    def _run_network(
        self, network: LoRANetwork, batch: Mapping[str, Tensor], groups: Sequence[FeedbackGroup]
    ) -> Tensor:
        with following(network.theta()):
            parameters = {}
            for site, center in network.initial.items():
                prior = dist.Normal(center, self.prior.of(site) ** -0.5).to_event(center.dim())
                parameters[site] = sample(f"reward.{site}", prior)
        rewards = network.apply_parameters(parameters, batch)
        self.observe(rewards, [g.map_arrays(lambda a: convert(a, rewards)) for g in groups])
        return rewards

    def observe(self, rewards: Array, groups: Sequence[FeedbackGroup]) -> None:
        """Declares the feedback on items with the given rewards, shape `(items,)`: latents and the `feedback` sites."""
        with following(rewards):
            distributions = self.feedback([rewards[g.items] for g in groups], [g.comparison for g in groups])
            for group, distribution in zip(groups, distributions, strict=True):
                suffix = "" if len(groups) == 1 else f".{group.label}"
                with plate(f"comparisons{suffix}", group.comparison.num_rows), scale(group.weight):
                    sample(f"feedback{suffix}", distribution, obs=group.outcome)

    def feedback(self, rewards: Sequence[Array], comparisons: Sequence[Comparison]) -> list[Any]:
        """Distribution of the feedback of each group of rows, with latents shared between the groups.

        Args:
            rewards: Rewards of the candidates of each group, shape `(rows, K)`.
            comparisons: Kind and circumstances of each group.
        """
        distributions = []
        values: dict[str, Any] = {}
        for r, comparison in zip(rewards, comparisons, strict=True):
            prefix = f"{comparison.kind}." if isinstance(self.likelihood, Mapping) else ""
            with following(r), shared_latents(values, prefix):
                distribution = self.likelihood_of(comparison.kind)(r, comparison)
            if not hasattr(distribution, "batch_shape"):
                raise LikelihoodError(
                    f"the likelihood returned a {type(distribution).__name__} for rows of kind '{comparison.kind}'; it "
                    "must return a distribution over the outcomes, such as `brm.dist.Categorical(logits=...)`"
                )
            if tuple(distribution.batch_shape) != (comparison.num_rows,):
                raise LikelihoodError(
                    f"the likelihood returned batch shape {tuple(distribution.batch_shape)} "
                    f"for {comparison.num_rows} rows of kind '{comparison.kind}'; "
                    "it must return one distribution for each row, batch shape (rows,)"
                )
            distributions.append(distribution)
        return distributions

    def likelihood_of(self, kind: str) -> Likelihood:
        """The likelihood of feedback of `kind`."""
        if not isinstance(self.likelihood, Mapping):
            return self.likelihood
        if kind not in self.likelihood:
            raise LikelihoodError(
                f"the data hold feedback of kind '{kind}', "
                f"the model has likelihoods for {sorted(self.likelihood)}; add one"
            )
        return self.likelihood[kind]

    def encode(self, data: Comparisons, *, progress: bool = False) -> Tensor:
        """Features of the items of `data`, shape `(items, num_features)`: those attached, else extracted from texts.

        Raises:
            DataError: The data have no features and the reward function has no extractor.
        """
        head = self.head
        if isinstance(head, ProjectedHead) and head.features is not None:
            return torch.as_tensor(head.features.extract_items(data, progress=progress))
        if data.features is not None:
            return torch.as_tensor(np.asarray(data.features))
        if head.features is None:
            raise DataError(
                "the data carry no features and the reward function has no feature extractor; "
                "pass `features=FeatureExtractor(...)` to the head or use `data.with_features(array)`"
            )
        return torch.as_tensor(head.features.extract_items(data, progress=progress))

    def standardisation(self, features: Tensor, groups: Sequence[FeedbackGroup]) -> tuple[Tensor, Tensor]:
        """What the head subtracts from features and then divides them by, each of shape `(num_features,)`.

        Zeros and ones where the head does not standardise.

        Args:
            features: Features of the items, shape `(items, num_features)`.
            groups: The rows; items of rows with weight 0 do not count.
        """
        if not self.head.standardize:
            return features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
        used = features[torch.unique(torch.cat([g.items[g.weight > 0].reshape(-1) for g in groups]))]
        std = used.std(0, correction=0)
        # A feature that never varies carries nothing; dividing by its rounding would blow it up elsewhere.
        constant = std <= 1e-12 * used.abs().amax(0).clamp_min(1e-300)
        return used.mean(0), torch.where(constant, torch.ones_like(std), std)

    def simulate(
        self,
        data: Comparisons,
        *,
        seed: int,
        parameters: Mapping[str, Tensor | float] | None = None,
        latents: Mapping[str, Tensor | float] | None = None,
    ) -> Simulation:
        """Draws feedback of every kind from the program, for the comparisons that `data` declares.

        Args:
            data: Which items are compared, by whom, in which kind of feedback; its outcomes are ignored.
            seed: Seed; the same seed draws the same feedback.
            parameters: Parameters of the reward function by site (without `reward.`); drawn from the prior when absent.
            latents: Latents of the likelihood by site, in constrained space; those absent are drawn from their prior.

        Raises:
            ArgumentError: A given parameter or latent is not one of the program's.
        """
        features = self.encode(data).double()
        groups = [g.map_arrays(lambda a: convert(a, features)) for g in data.groups()]
        center, spread = self.standardisation(features, groups)
        if isinstance(self.reward, GaussianProcess):
            program = dataclasses.replace(self, reward=self.reward.bind(features, center, spread))
            return program.simulate(data, seed=seed, parameters=parameters, latents=latents)
        features = (features - center) / spread
        shapes = self.head.parameter_shapes(features.shape[-1])
        for name in parameters or {}:
            if name not in shapes:
                raise ArgumentError(f"`parameters` names '{name}'; the reward function has {sorted(shapes)}")
        with seeded(seed), following(features):
            given = {k: torch.as_tensor(v).double() for k, v in (parameters or {}).items()}
            truth = {
                site: given[site] if site in given else torch.randn(shape).double() * self.prior.of(site) ** -0.5
                for site, shape in shapes.items()
            }
            rewards = self.head.apply(truth, features)
            recorder = PriorRecorder({k: torch.as_tensor(v).double() for k, v in (latents or {}).items()})
            with recorder:
                distributions = self.feedback([rewards[g.items] for g in groups], [g.comparison for g in groups])
            outcomes = [d.sample().long() for d in distributions]
        unknown = sorted(set(latents or {}) - set(recorder.sites))
        if unknown:
            raise ArgumentError(f"`latents` names {unknown}; the likelihood has {sorted(recorder.sites)}")
        drawn = {name: value for name, (_, value) in recorder.sites.items()}
        return Simulation(data.with_outcomes(outcomes), rewards, truth, drawn)
