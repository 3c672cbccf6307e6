"""AVRIL on language models: AVA-d on demonstrations, AVA-p on preferences."""

import abc
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from .._typing import Tensor
from ..data import Comparisons, Demonstrations
from ..errors import DataError
from ..likelihoods import base as likelihoods
from ..programs import InverseRL, RewardModel
from ..rewards import StateValues, TokenReward, TokenRewardHead, TokenRewardNetwork, TokenSteps
from ..rewards._tokens import TokenSequences
from ._avril_objective import StepTerms, step_terms, temporal_difference
from ._batches import _companions, select_rows
from ._density import FeedbackDensity, _weighted
from ._digest import feedback_digest
from ._module_training import train_module
from ._schema import FeedbackSchema
from ._settings import settings_of
from .report import FitReport
from .token_posterior import TokenPosterior

if TYPE_CHECKING:
    from .avril import AVRIL

_LOG = logging.getLogger("bayesrm")


def fit_text(
    engine: "AVRIL", program: InverseRL, data: Demonstrations | Comparisons, *, seed: int, progress: bool
) -> TokenPosterior:
    """Trains the network of a token reward on AVRIL's objective, see `AVRIL`."""
    begin = time.perf_counter()
    assert isinstance(program.reward, TokenReward)
    network = program.reward.load(seed)
    if engine.constraint_weight >= engine.kl_weight and engine.constraint_weight > 0.0:
        _LOG.warning(
            "AVRIL on text with `constraint_weight` %g and `kl_weight` %g: the posterior loses its entropy, and its "
            "standard deviations shrink to the residual of the temporal difference; use a smaller `constraint_weight`, "
            "such as 0.1", engine.constraint_weight, engine.kl_weight,
        )  # fmt: skip
    spread = program.reward_precision**-0.5
    network.start_at(spread)
    network.log_std_floor = math.log(engine.min_std * spread)
    if isinstance(data, Comparisons):
        objective: TextObjective = PreferenceObjective.of(engine, program, network, data, seed)
    else:
        objective = DemonstrationObjective.of(engine, program, network, data, seed)
    module = TrainedTogether(network, objective.initial_latents)
    objective.latents = module.latents
    identity = {
        "reward": program.reward.to_config() | {"device": None},
        "program": [program.discount, program.rationality, program.reward_precision],
        "likelihood": repr(likelihoods.to_config(program.likelihood)) if callable(program.likelihood) else "several",
        "engine": [engine.next_value, engine.kl_weight, engine.constraint_weight, engine.min_std, engine.num_particles],
        "data": objective.digest(),
    }
    trained = train_module(
        module, objective.loss, objective.row_lengths, engine.training, seed=seed, progress=progress,
        identity=identity, prior_loss=objective.prior_loss,
    )  # fmt: skip
    report = FitReport(
        engine={"name": "AVRIL", "settings": settings_of(engine)}, seed=seed, seconds=time.perf_counter() - begin,
        num_rows=len(data), num_items=len(objective.sequences), num_prompts=data.num_prompts,
        num_parameters=network.num_parameters, num_coordinates=network.num_parameters,
        # A stochastic optimiser on a bound that is not concave shows no gradient to judge it by.
        converged=False, gradient_norm=math.nan, iterations=trained.steps,
        prior_precision=program.reward_precision, training=trained.summary() | objective.summary(),
        diagnostics=objective.evaluate(engine.training.batch_size),
        data_digest=feedback_digest(data) if isinstance(data, Comparisons) else None,
    )  # fmt: skip
    posterior_program = RewardModel(TokenRewardHead(network), program.likelihood, program.prior)
    if module.latents is not None:
        latents = module.latents.detach().cpu().clone()
    else:
        # Demonstrations say nothing of a likelihood's latents: they stay where their prior puts them.
        latents = FeedbackDensity(program.feedback_model, objective.schema.example_groups()).initial_latents
    return TokenPosterior(posterior_program, objective.schema, report, latents[None])


class TrainedTogether(torch.nn.Module):
    """The network with the likelihood's unconstrained latents."""

    def __init__(self, network: TokenRewardNetwork, latents: Tensor) -> None:
        super().__init__()
        self.network = network
        self.latents = torch.nn.Parameter(latents.to(network.device).clone()) if len(latents) else None

    @property
    def sites(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name."""
        own = {} if self.latents is None else {"latents": self.latents}
        return {**{f"network.{name}": p for name, p in self.network.sites.items()}, **own}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.network.device


class TextObjective(abc.ABC):
    """Minus AVRIL's objective on token sequences, a sum over rows.

    A step that several responses or rows share, the same tokens behind the same prompt, is one latent reward: its
    divergence counts once, and so does its constraint, averaged over the rows that go through it, which may go on
    differently.

    Attributes:
        sequences: Token ids of the distinct items.
        rows: Items of each row, shape `(rows, K)`, one array for each group of rows.
        row_lengths: Tokens of the longest item of each row.
        schema: Kinds of feedback.
        initial_latents: Starting point of the likelihood's unconstrained latents, shape `(Q,)`.
        latents: The latents that are trained.
    """

    def __init__(
        self, engine: "AVRIL", program: InverseRL, network: TokenRewardNetwork, sequences: TokenSequences,
        rows: Sequence[np.ndarray], counted: Sequence[np.ndarray], seed: int,
    ) -> None:  # fmt: skip
        self.engine, self.program, self.network, self.sequences = engine, program, network, sequences
        self.rows, self._seed = list(rows), seed
        self.schema = FeedbackSchema.unseen()
        self.initial_latents = torch.zeros(0, dtype=torch.float64)
        self.latents: Tensor | None = None
        # Rows that count, as (group, place in the group).
        self.places = [(g, int(r)) for g, mask in enumerate(counted) for r in np.flatnonzero(mask)]
        if not self.places:
            raise DataError("every row has weight 0; there is nothing to learn from")
        lengths = np.array([len(p) + len(r) for p, r in zip(sequences.prompts, sequences.responses, strict=True)])
        self.row_lengths = [int(lengths[self.rows[g][r]].max()) for g, r in self.places]
        self.nodes = distinct_steps(sequences)
        seen = np.zeros(1 + max(int(n.max()) for n in self.nodes))
        for g, r in self.places:
            for item in self.rows[g][r]:
                seen[self.nodes[item]] += 1.0
        self._seen = seen

    def digest(self) -> str:
        """Of the tokens and the rows."""
        digest = xxhash.xxh3_128()
        for part in (*self.sequences.prompts, *self.sequences.responses, *(r.tolist() for r in self.rows)):
            digest.update(repr(part).encode())
        return str(digest.hexdigest())

    def summary(self) -> dict[str, Any]:
        """What the report says of the data."""
        return {
            "shortened_responses": int(sum(self.sequences.response_shortened)),
            "shortened_prompts": int(sum(self.sequences.prompt_shortened)),
        }

    def terms(self, steps: TokenSteps) -> StepTerms:
        """Divergence and constraint of each step, each of shape `(n, T)`, 0 at padding."""
        program, engine = self.program, self.engine
        values = steps.values
        if self.network.settings.values == StateValues.LOGITS:
            values = values / program.rationality
        action_values = values + steps.log_probs / program.rationality
        following = values if engine.next_value == "soft" else action_values
        following = torch.nn.functional.pad(following[:, 1:], (0, 1))
        last = steps.last
        difference = temporal_difference(action_values, following, last, program.discount)
        # Nothing is known of what would have come after a response that was cut.
        known = ~(last & ~steps.ended[:, None])
        terms = step_terms(steps.mean, steps.log_std, difference, known, program.reward_precision)
        kl, constraint = torch.where(steps.mask, torch.stack([terms.kl, terms.constraint]), 0.0)
        return StepTerms(kl, constraint)

    def penalty(self, steps: TokenSteps, items: np.ndarray, times: np.ndarray) -> Tensor:
        """Share of some items in kl_weight * KL - constraint_weight * constraint, the items met `times` times."""
        weight = np.zeros(steps.mask.shape)
        for place, (item, count) in enumerate(zip(items, times, strict=True)):
            weight[place, : len(self.nodes[item])] = count / self._seen[self.nodes[item]]
        terms = self.terms(steps)
        each = self.engine.kl_weight * terms.kl - self.engine.constraint_weight * terms.constraint
        return (torch.from_numpy(weight).to(each) * each).sum()

    def loss(self, rows: Tensor, number: int) -> Tensor:
        """Share of some rows in minus the objective, float64; `number` is that of the micro-batch in the run."""
        places = [self.places[row] for row in rows.tolist()]
        used = np.concatenate([self.rows[g][r] for g, r in places])
        items, times = np.unique(used, return_counts=True)
        steps = self.network.steps(self.sequences[items.tolist()], policy=self.needs_policy)
        total = self.penalty(steps, items, times).double()
        likelihood = self.log_likelihood(places, items, steps, number)
        return total - likelihood

    @property
    def needs_policy(self) -> bool:
        """Whether the distribution of the next token enters the objective."""
        return self.engine.constraint_weight > 0.0

    @abc.abstractmethod
    def log_likelihood(
        self, places: Sequence[tuple[int, int]], items: np.ndarray, steps: TokenSteps, number: int
    ) -> Tensor:
        """E_q[log p(what the rows tell)], float64."""

    def prior_loss(self) -> Tensor:
        """Minus the log prior of the likelihood's latents."""
        return torch.zeros((), dtype=torch.float64, device=self.network.device)

    @torch.no_grad()
    def evaluate(self, batch_size: int) -> dict[str, float]:
        """The objective and its parts on all rows, in nats."""
        parts = {"log_likelihood": 0.0, "kl": 0.0, "constraint": 0.0}
        total_steps = 0.0
        for start in range(0, len(self.places), batch_size):
            places = self.places[start : start + batch_size]
            items, times = np.unique(np.concatenate([self.rows[g][r] for g, r in places]), return_counts=True)
            steps = self.network.steps(self.sequences[items.tolist()])
            terms = self.terms(steps)
            for place, (item, count) in enumerate(zip(items, times, strict=True)):
                weight = torch.from_numpy(count / self._seen[self.nodes[item]])
                for name in ("kl", "constraint"):
                    values = getattr(terms, name)[place, : len(weight)].double().cpu()
                    parts[name] += float((weight * values).sum())
                total_steps += float(weight.sum())
            parts["log_likelihood"] += float(self.log_likelihood(places, items, steps, start))
        objective = (
            parts["log_likelihood"]
            - self.engine.kl_weight * parts["kl"]
            + self.engine.constraint_weight * parts["constraint"]
        )
        return {"objective": objective, **parts, "steps": total_steps}


class DemonstrationObjective(TextObjective):
    """AVA-d: the tokens of demonstrated responses are actions of a Boltzmann policy."""

    weight: Tensor

    @classmethod
    def of(
        cls, engine: "AVRIL", program: InverseRL, network: TokenRewardNetwork, data: Demonstrations, seed: int
    ) -> "DemonstrationObjective":
        """The objective of demonstrations."""
        texts = [data.text(row) for row in range(len(data))]
        sequences = network.encode([p for p, _ in texts], [r for _, r in texts])
        rows = np.arange(len(texts))[:, None]
        objective = cls(engine, program, network, sequences, [rows], [data.weight > 0], seed)
        objective.weight = torch.from_numpy(np.asarray(data.weight))
        return objective

    @property
    def needs_policy(self) -> bool:
        """Always: the tokens are its actions."""
        return True

    def log_likelihood(
        self, places: Sequence[tuple[int, int]], items: np.ndarray, steps: TokenSteps, number: int
    ) -> Tensor:
        """Sum of the log-probabilities of the tokens."""
        at = np.searchsorted(items, [r for _, r in places])
        weight = self.weight[[r for _, r in places]].to(steps.log_probs.device)
        return (weight * steps.log_probs.sum(1)[torch.from_numpy(at)].double()).sum()


class PreferenceObjective(TextObjective):
    """AVA-p: responses are judged by the sums of their rewards."""

    density: FeedbackDensity

    @classmethod
    def of(
        cls, engine: "AVRIL", program: InverseRL, network: TokenRewardNetwork, data: Comparisons, seed: int
    ) -> "PreferenceObjective":
        """The objective of preferences."""
        groups = data.groups()
        texts = [data.text(item) for item in range(data.num_items)]
        sequences = network.encode([p for p, _ in texts], [r for _, r in texts])
        density = FeedbackDensity(
            program.feedback_model, [g.map_arrays(lambda a: a.to(network.device)) for g in groups]
        )  # fmt: skip
        rows = [g.items.numpy() for g in groups]
        objective = cls(engine, program, network, sequences, rows, [(g.weight > 0).numpy() for g in groups], seed)
        objective.schema = FeedbackSchema.of(data, groups)
        objective.density = density
        objective.initial_latents = density.initial_latents
        objective._beside = _companions(density)
        return objective

    _beside: list[Any]

    def log_likelihood(
        self, places: Sequence[tuple[int, int]], items: np.ndarray, steps: TokenSteps, number: int
    ) -> Tensor:
        """Average over mirrored draws of the rewards of the steps; shared steps share the draw."""
        count = self.engine.num_particles // 2
        device = steps.mean.device
        nodes = np.zeros(steps.mask.shape, dtype=np.int64)
        for place, item in enumerate(items):
            nodes[place, : len(self.nodes[item])] = self.nodes[item]
        distinct, where = np.unique(nodes, return_inverse=True)
        generator = torch.Generator().manual_seed(_mixed(self._seed, number))
        noise = torch.randn(count, len(distinct), generator=generator).to(steps.mean)
        noise = noise[:, torch.from_numpy(where.reshape(nodes.shape)).to(device)]
        std = torch.where(steps.mask, steps.log_std.exp(), 0.0)
        around = (noise * std).sum(2).double()
        middle = torch.where(steps.mask, steps.mean, 0.0).sum(1).double()
        rewards = torch.cat([middle + around, middle - around])
        latents = self.density.initial_latents if self.latents is None else self.latents
        total = rewards.new_zeros(())
        for group in sorted({g for g, _ in places}):
            rows = torch.tensor([r for g, r in places if g == group], device=device)
            part = select_rows(self.density.groups[group], rows)
            at = torch.from_numpy(np.searchsorted(items, part.items.cpu().numpy())).to(device)
            density = self.density.of_groups([part, *self._beside[group]]).tiled(len(rewards))
            others = [latents.new_zeros(g.items.shape) for g in density.groups[1:]]
            found = density.distributions([rewards[:, at].flatten(0, 1), *others], latents)[0][0]
            log_prob = found.log_prob(density.groups[0].outcome).reshape(len(rewards), -1).mean(0)
            total = total + _weighted(log_prob, part.weight).sum()
        return total

    def prior_loss(self) -> Tensor:
        """Minus the log prior of the latents, unconstrained."""
        if self.latents is None:
            return super().prior_loss()
        return -self.density.log_priors(self.latents[None])[0]


def distinct_steps(sequences: TokenSequences) -> list[np.ndarray]:
    """Numbers of the steps of each sequence; the same tokens behind the same prompt are the same steps.

    Example:
        >>> sequences = TokenSequences(((1,), (1,), (2,)), ((5, 6), (5, 7), (5, 6)), (True,) * 3)
        >>> [nodes.tolist() for nodes in distinct_steps(sequences)]
        [[0, 1], [0, 2], [3, 4]]
    """
    known: dict[Any, int] = {}
    found = []
    for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
        state: Any = ("prompt", prompt)
        nodes = []
        for token in response:
            # The number of a step stands for all tokens before it.
            state = known.setdefault((state, token), len(known))
            nodes.append(state)
        found.append(np.array(nodes, dtype=np.int64))
    return found


def _mixed(seed: int, number: int) -> int:
    return int(xxhash.xxh3_64_intdigest(f"{seed} {number}".encode()) >> 1)
