"""What every engine returns: beliefs about rewards, predictions of feedback, latents, and a way to disk."""

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError, DataError
from ..likelihoods.base import outcomes_of
from ..programs import RewardModel
from ..rewards.tangent import Tangent, whole_prompts
from ._density import FeedbackDensity, _tile
from ._schema import FeedbackSchema
from .prediction import FeedbackPrediction, GroupPrediction
from .report import FitReport

if TYPE_CHECKING:
    from pathlib import Path

#: Candidates whose texts go through a network before their belief is formed.
_RUN = 2048


class Posterior(abc.ABC):
    """A posterior over the reward function and the likelihood's latents.

    Attributes:
        program: The reward model, with its prior as tuned; of a language model the linear model that was fitted, whose
            prior is in its reward's `scale`.
        schema: The kinds of feedback it was fitted on.
        report: How it was fitted.
    """

    program: RewardModel
    schema: FeedbackSchema
    report: FitReport

    @abc.abstractmethod
    def _belief(self, features: Tensor, sizes: Sequence[int], outside: Tensor | None) -> RewardBelief:
        """Joint belief about items with float64 features `(items, D)`, `sizes` of them to a prompt in turn.

        `outside` is a factor of covariance to add to that of the items of each prompt, see `TangentFeatures`.
        """

    @abc.abstractmethod
    def _feedback_draws(
        self,
        features: Tensor,
        groups: Sequence[FeedbackGroup],
        num_samples: int,
        seed: int,
        outside: Tensor | None,
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Draws of the rewards of each group, `(draws, rows, K)`, with latents that they share, unconstrained, `(Q,)`.

        Each row's own joint distribution with the latents must be right; rows need not be drawn jointly.
        """

    @abc.abstractmethod
    def _latent_draws(self, num_samples: int, seed: int) -> Tensor:
        """Draws of the unconstrained latents, shape `(num_samples, Q)`."""

    @abc.abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """Tensors from which `_restore` rebuilds the posterior."""

    def predict(
        self,
        prompts: Sequence[Any] | None = None,
        candidates: Sequence[Any] | None = None,
        *,
        progress: bool = False,
    ) -> RewardBelief:
        """Joint belief about the rewards of the candidates of each prompt.

        Args:
            prompts: Prompts, texts or message lists; may be left out when the candidates are features.
            candidates: For each prompt a list of responses, or an array of features `(K, num_features)`. Prompts may
                have different numbers of candidates.
            progress: Whether to show progress of feature extraction.

        Returns:
            A `RewardBelief` over `(prompts, most candidates)`, masked where a prompt has fewer.

        Raises:
            ArgumentError: The arguments do not fit together.
            DataError: A candidate's text is empty or its features are not finite.

        Example:
            >>> import bayesrm as brm, numpy as np
            >>> data = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1], [1, 2]], outcome=[0, 0])
            >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
            >>> posterior = brm.fit(model, data, inference=brm.Laplace())
            >>> posterior.predict(candidates=[np.eye(3)]).mean.argmax().item()
            0
        """
        if candidates is None:
            raise ArgumentError(
                "`candidates` is missing: give a list of responses (or an array of features) for each prompt"
            )
        if prompts is not None and len(prompts) != len(candidates):
            raise ArgumentError(f"{len(prompts)} prompts but candidates for {len(candidates)}")
        sizes = [len(c) for c in candidates]
        if not sizes or min(sizes) == 0:
            raise ArgumentError("every prompt needs at least one candidate" if sizes else "`candidates` is empty")
        arrays = [isinstance(c, np.ndarray | torch.Tensor) for c in candidates]
        if any(arrays) and not all(arrays):
            raise ArgumentError("`candidates` mixes arrays of features with lists of texts; give one kind")
        if all(arrays):
            if isinstance(self.program.head, Tangent):
                raise ArgumentError(
                    "`candidates` are arrays of features; this reward reads texts, give lists of responses"
                )
            features = torch.cat([torch.as_tensor(c).double() for c in candidates])
            return self._belief(self._checked(features), sizes, None)
        if prompts is None:
            raise ArgumentError(
                "`prompts` is missing; it may be left out only when the candidates are arrays of features"
            )
        reward = self.program.head
        if isinstance(reward, Tangent):
            parts = list(self._predict_texts(reward, prompts, candidates, sizes, progress))
            return parts[0] if len(parts) == 1 else RewardBelief.concatenate(parts)
        if reward.features is None:
            raise ArgumentError(
                "this posterior was fitted on precomputed features; give `candidates` as arrays of the same features"
            )
        flat_prompts = [p for p, c in zip(prompts, candidates, strict=True) for _ in c]
        flat = [response for c in candidates for response in c]
        features = torch.as_tensor(reward.features.extract(flat_prompts, flat, progress=progress)).double()
        return self._belief(self._checked(features), sizes, None)

    def predict_stream(
        self, prompts: Iterable[tuple[Any, Sequence[Any]]], *, chunk_size: int = 256
    ) -> Iterator[RewardBelief]:
        """Beliefs about one prompt after another, from a stream of any length, in bounded memory.

        Args:
            prompts: Pairs of a prompt and its candidates, as for `predict`.
            chunk_size: Prompts that are worked on together.

        Yields:
            For each prompt the belief about its candidates, shape `(1, K)`.
        """
        if chunk_size < 1:
            raise ArgumentError(f"`chunk_size` is {chunk_size}; at least 1 prompt is needed")
        stream = iter(prompts)
        while chunk := list(itertools.islice(stream, chunk_size)):
            belief = self.predict([p for p, _ in chunk], [c for _, c in chunk])
            yield from (belief[i] for i in range(len(chunk)))

    def _predict_texts(
        self,
        reward: Tangent,
        prompts: Sequence[Any],
        candidates: Sequence[Any],
        sizes: Sequence[int],
        progress: bool,
    ) -> Iterator[RewardBelief]:
        """Beliefs about runs of prompts, so that what a run needs on the way does not add up."""
        start = 0
        with tqdm(total=sum(sizes), unit="item", disable=not progress) as bar:
            for run in whole_prompts(sizes, _RUN):
                part = range(start, start + len(run))
                sequences = reward.network.tokenize(
                    [prompts[i] for i in part for _ in candidates[i]],
                    [response for i in part for response in candidates[i]],
                    start=sum(sizes[:start]),
                )
                found = reward.encode(sequences, run)
                yield self._belief(self._checked(found.values), run, found.outside)
                start += len(run)
                bar.update(sum(run))

    def predict_items(self, data: Comparisons) -> RewardBelief:
        """Joint belief about the items of `data`, grouped by prompt; candidates in the order of the items."""
        prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
        order = torch.argsort(prompt, stable=True)
        sizes = torch.unique(prompt, return_counts=True)[1].tolist()
        features, outside = self._encoded(data)
        return self._belief(features[order], sizes, None if outside is None else outside[order])

    def _encoded(self, data: Comparisons) -> tuple[Tensor, Tensor | None]:
        """Features of the items of `data` and, for a tangent, what lies outside its coordinates."""
        reward = self.program.head
        if isinstance(reward, Tangent):
            found = reward.encode_items(data)
            return self._checked(found.values), found.outside
        return self._checked(self.program.encode(data).double()), None

    def predict_feedback(self, data: Comparisons, *, num_samples: int = 1024, seed: int = 0) -> FeedbackPrediction:
        """Posterior predictive of the feedback of each row: what NLL and calibration are computed from.

        For a Gaussian posterior the average runs over scrambled Sobol points of each row's rewards and the latents;
        without latents the default is within about 1e-4 of the integral for two candidates.

        Args:
            data: Comparisons with outcomes.
            num_samples: Points to average over.
            seed: Seed of the points.

        Raises:
            LikelihoodError: The feedback is not of a kind the likelihood describes, or an annotator is unknown.
        """
        if num_samples < 1:
            raise ArgumentError(f"`num_samples` is {num_samples}; at least 1 point is needed")
        groups = self.schema.check(data.groups(), data.annotators)
        density = FeedbackDensity(self.program, groups)
        features, outside = self._encoded(data)
        totals: list[Tensor] = [
            torch.full((g.comparison.num_rows,), -torch.inf, dtype=torch.float64) for g in density.groups
        ]
        tables: list[Tensor | None] = [None] * len(groups)
        supports: list[Tensor | None] = [None] * len(groups)
        count = 0
        with torch.no_grad():
            for rewards, latents in self._feedback_draws(features, density.groups, num_samples, seed, outside):
                draws = len(rewards[0])
                count += draws
                distributions = density.tiled(draws).distributions([r.flatten(0, 1) for r in rewards], latents)[0]
                for i, (d, g) in enumerate(zip(distributions, density.groups, strict=True)):
                    shape = (draws, g.comparison.num_rows)
                    support = outcomes_of(d)
                    if support is None:
                        log_prob = d.log_prob(_tile(g.outcome, draws)).reshape(shape)
                        totals[i] = torch.logaddexp(totals[i], torch.logsumexp(log_prob, 0))
                        continue
                    supports[i] = support
                    every = [d.log_prob(v.expand(draws * g.comparison.num_rows, *v.shape)) for v in support]
                    table = torch.stack([torch.logsumexp(x.reshape(shape), 0) for x in every], dim=1)
                    known = tables[i]
                    tables[i] = table if known is None else torch.logaddexp(known, table)
        log_prob = torch.full((len(data),), float("nan"), dtype=torch.float64)
        weight = torch.ones(len(data), dtype=torch.float64)
        predictions = []
        for i, g in enumerate(groups):
            table_i, support_i = tables[i], supports[i]
            g = density.groups[i]
            weight[g.rows] = g.weight
            if table_i is None or support_i is None:
                log_prob[g.rows] = totals[i] - np.log(count)
                predictions.append(GroupPrediction(g.label, g.rows, None, None, None))
                continue
            table_i = table_i - np.log(count)
            # As the data have it: the density replaces impossible answers of masked rows.
            outcome = groups[i].outcome[:, None]
            match = (support_i == outcome) if support_i.dim() == 1 else (support_i == outcome).all(-1)
            observed = match.to(torch.uint8).argmax(1)
            log_prob[g.rows] = table_i.gather(1, observed[:, None])[:, 0].masked_fill(~match.any(1), -torch.inf)
            predictions.append(GroupPrediction(g.label, g.rows, support_i, table_i.exp(), observed))
        return FeedbackPrediction(log_prob, tuple(predictions), weight)

    def _checked(self, features: Tensor) -> Tensor:
        expected = self._num_features()
        if features.dim() != 2 or features.shape[1] != expected:
            raise ArgumentError(
                f"features have shape {tuple(features.shape)}; the posterior was fitted on (items, {expected})"
            )
        bad = ~torch.isfinite(features).all(1)
        if bool(bad.any()):
            raise DataError(f"features of item {int(bad.nonzero()[0, 0])} are not finite")
        return features

    @abc.abstractmethod
    def _num_features(self) -> int:
        """Size of the features."""

    def latents(self, num_samples: int = 1000, *, seed: int = 0) -> dict[str, Tensor]:
        """Posterior draws of the likelihood's latents in constrained space, each of shape `(num_samples, *site)`."""
        return self._density().constrain(self._latent_draws(num_samples, seed))

    def _density(self) -> FeedbackDensity:
        return FeedbackDensity(self.program, self.schema.example_groups())

    def summary(self) -> str:
        """What was fitted, how it went, and the latents with 90% intervals."""
        r = self.report
        shown = _shown_precision(r.prior_precision)
        reward = "LoRA" if isinstance(self.program.head, Tangent) else type(self.program.head).__name__
        lines = [
            f"{reward} reward, {_likelihood_name(self.program.likelihood)} likelihood, "
            f"{r.engine['name']} ({r.seconds:.1f} s)",
            f"  data        {r.num_rows} rows, {r.num_items} items, {r.num_prompts} prompts",
            f"  parameters  {r.num_parameters} in {r.num_coordinates} coordinates",
            f"  prior       precision {shown} ({'tuned by the marginal likelihood' if r.tuned else 'given'})",
            f"  optimum     gradient norm {r.gradient_norm:.1e} after {r.iterations} steps"
            + ("" if r.converged else "  NOT CONVERGED: this is no mode"),
        ]
        if r.curvature is not None:
            lines.append(f"  curvature   {r.curvature}")
        if r.log_evidence is not None:
            lines.append(f"  evidence    log p(feedback) = {r.log_evidence:.2f}")
        if r.structure_check is not None:
            check = r.structure_check
            lines.append(
                f"  structure   against full: variance ratio {check['variance_ratio']:.2f}, "
                f"rank correlation {check['rank_correlation']:.2f} ({check['num_probes']:.0f} comparisons)"
            )
        if r.training is not None:
            early = "" if r.training["steps"] >= r.training["planned_steps"] else "  STOPPED EARLY"
            lines.append(f"  training    {r.training['steps']} of {r.training['planned_steps']} steps{early}")
        if r.refinement is not None:
            move = r.refinement
            lines.append(
                f"  refinement  trained weights: gradient norm {move['trained_gradient_norm']:.1e}; the mode lies "
                f"{move['distance']:.2g} prior deviations away, {move['log_joint_gain']:.2f} nats higher, rewards move "
                f"by {move['reward_change']:.2g} (scale {move['reward_scale']:.2g})"
            )
        for name, draws in self.latents(2000).items():
            flat = draws.reshape(len(draws), -1)
            low, mid, high = torch.quantile(flat, torch.tensor([0.05, 0.5, 0.95], dtype=flat.dtype), dim=0)
            shown = ", ".join(
                f"{m:.3g} [{lo:.3g}, {hi:.3g}]" if lo < hi else f"{m:.3g} (held at its mode)"
                for lo, m, hi in zip(low[:4], mid[:4], high[:4], strict=True)
            )
            lines.append(f"  latent      {name} = {shown}" + (f", ... ({len(mid)} in all)" if len(mid) > 4 else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary().splitlines()[0]}>"

    def save_pretrained(self, path: "str | Path") -> None:
        """Writes the posterior to a folder (JSON and safetensors), all or nothing.

        Raises:
            PersistenceError: The folder cannot be written.
        """
        from ._persistence import save

        save(self, path)

    @staticmethod
    def from_pretrained(path: "str | Path", *, likelihood: Any = None) -> "Posterior":
        """Reads a posterior that `save_pretrained` wrote.

        Args:
            path: The folder.
            likelihood: The likelihood, when it was saved unregistered.

        Raises:
            PersistenceError: A file is missing, damaged or of another format version; the message names it.
            LikelihoodError: The likelihood is not registered here and not given.
        """
        from ._persistence import load

        return load(path, likelihood)


def _shown_precision(precision: float | Mapping[str, float]) -> str:
    if not isinstance(precision, Mapping):
        return f"{precision:.4g}"
    if len(precision) <= 8:
        return ", ".join(f"{site} {value:.4g}" for site, value in precision.items())
    return f"{min(precision.values()):.4g} to {max(precision.values()):.4g} over {len(precision)} sites"


def _likelihood_name(likelihood: Any) -> str:
    if isinstance(likelihood, Mapping):
        return " + ".join(f"{kind}: {_likelihood_name(value)}" for kind, value in likelihood.items())
    base = getattr(likelihood, "base", None)
    name = getattr(likelihood, "__name__", type(likelihood).__name__)
    return f"{name}({_likelihood_name(base)})" if base is not None else name
