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
from ..rewards import PairwiseHead, PreferenceBelief, ProjectedHead
from ..rewards.tangent import TangentFeatures, whole_prompts
from ._density import FeedbackDensity, _tile
from ._digest import feedback_digest
from ._schema import FeedbackSchema
from .draws import JointDraws
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
    def _joint_draws(
        self, features: Tensor, sizes: Sequence[int], outside: Tensor | None, num_samples: int, seed: int
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Joint draws of items' rewards `(S, items)` and of the latents `(S, Q)`, and each draw's statistics.

        A statistic `log_q` is the log density of the draw in whitened coordinates under the approximation; with
        `log_prior`, that of its coordinates under the prior, it gives importance ratios. The items of each prompt are
        next to each other, `sizes` of them.
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
        self._refuse_rewards()
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
            shapes = [tuple(c.shape) for c in candidates]
            odd = next((i for i, x in enumerate(shapes) if len(x) != 2 or x[1] != shapes[0][-1]), None)
            if odd is not None:
                raise ArgumentError(
                    f"`candidates[{odd}]` has shape {shapes[odd]}; features are of shape (K, num_features), with the "
                    "same num_features for all prompts"
                )
            features = torch.cat([torch.as_tensor(c).double() for c in candidates])
            head = self.program.head
            if isinstance(head, ProjectedHead):
                return self._belief_about(head.encode_features(features, sizes), sizes)
            return self._belief(self._checked(features), sizes, None)
        if prompts is None:
            raise ArgumentError(
                "`prompts` is missing; it may be left out only when the candidates are arrays of features"
            )
        reward = self.program.head
        if isinstance(reward, ProjectedHead):
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

    def predict_preferences(
        self,
        prompts: Sequence[Any] | None = None,
        candidates: Sequence[Any] | None = None,
        *,
        progress: bool = False,
    ) -> PreferenceBelief:
        """Joint belief about which of two candidates of each prompt is preferred; what preference games take.

        Of a reward it is the belief about differences of rewards, of a `PairwisePreference` one that may hold cycles.

        Args:
            prompts: As for `predict`.
            candidates: As for `predict`.
            progress: Whether to show progress of feature extraction.

        Raises:
            ArgumentError: The arguments do not fit together.
            DataError: A candidate's text is empty or its features are not finite.

        Example:
            >>> import bayesrm as brm, numpy as np
            >>> data = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1], [1, 2]], outcome=[0, 0])
            >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
            >>> brm.fit(model, data).predict_preferences(candidates=[np.eye(3)]).preference_matrix().shape
            torch.Size([1, 3, 3])
        """
        head = self.program.head
        if not isinstance(head, PairwiseHead):
            return PreferenceBelief.from_rewards(self.predict(prompts, candidates, progress=progress))
        pairs = head.candidate_pairs(prompts, candidates, progress=progress)
        scores = self._belief(torch.cat(pairs), [len(p) for p in pairs], None)
        return PreferenceBelief.from_scores(scores, [len(c) for c in candidates or ()])

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
        reward: ProjectedHead,
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
                found = reward.encode_texts(
                    [prompts[i] for i in part for _ in candidates[i]],
                    [response for i in part for response in candidates[i]],
                    run,
                    start=sum(sizes[:start]),
                )
                yield self._belief_about(found, run)
                start += len(run)
                bar.update(sum(run))

    def predict_items(self, data: Comparisons) -> RewardBelief:
        """Joint belief about the items of `data`, grouped by prompt; candidates in the order of the items."""
        self._refuse_rewards()
        order, sizes = _by_prompt(data)
        features, outside = self._encoded(data)
        return self._belief(features[order], sizes, None if outside is None else outside[order])

    def draw(self, data: Comparisons, *, num_samples: int | None = None, seed: int = 0) -> JointDraws:
        """Joint posterior draws of the rewards of all items of `data` and of the likelihood's latents.

        Args:
            data: Comparisons, those of the fit or others.
            num_samples: Number of draws. A posterior that is made of draws gives those it has, at most as many
                (but one of every chain), spread evenly over its chains; by default all of them, and 1,000 of a normal
                posterior.
            seed: Seed of what is drawn anew; the same seed draws the same parameters whatever the data.

        Example:
            >>> import bayesrm as brm, numpy as np
            >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
            >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
            >>> brm.fit(model, data).draw(data, num_samples=7).rewards.shape
            torch.Size([7, 2])
        """
        num_samples = self._default_draws if num_samples is None else num_samples
        if num_samples < 1:
            raise ArgumentError(f"`num_samples` is {num_samples}; at least 1 draw is needed")
        explained = self._explained(data)
        order, sizes = _by_prompt(explained)
        features, outside = self._encoded(explained)
        rewards, latents, stats = self._joint_draws(
            features[order], sizes, None if outside is None else outside[order], num_samples, seed
        )
        rewards = rewards[:, torch.argsort(order)]
        stats, log_ratio = dict(stats), None
        if "log_q" in stats:
            log_q, log_prior = stats.pop("log_q"), stats.pop("log_prior")
            if self.report.data_digest == feedback_digest(data):
                with torch.no_grad():
                    log_ratio = self._density_of(data).log_joints(rewards, latents) + log_prior - log_q
        elif "log_ratio" in stats:
            log_ratio = stats.pop("log_ratio")
            log_ratio = log_ratio if self.report.data_digest == feedback_digest(data) else None
        return JointDraws(rewards, latents, log_ratio, self._num_chains, stats)

    def weighted_draws(self, data: Comparisons, *, num_samples: int | None = None, seed: int = 0) -> JointDraws:
        """Draws to be reweighted, as leave-one-out does, with `log_ratio` where they come from an approximation.

        They are those of `draw`, but where these were resampled: then those that they were resampled from.
        """
        return self.draw(data, num_samples=num_samples, seed=seed)

    #: Number of Markov chains that draws come from.
    _num_chains = 1
    #: Draws that `draw` gives when it is not told how many.
    _default_draws = 1000

    def _density_of(self, data: Comparisons) -> FeedbackDensity:
        """The density of other data, annotators coded as in training."""
        return FeedbackDensity(self.program, self.schema.check(self._explained(data).groups(), data.annotators))

    def _explained(self, data: Comparisons) -> Comparisons:
        """The data as the head sees them: of a pairwise preference, comparisons of pairs."""
        head = self.program.head
        return head.pairs(data) if isinstance(head, PairwiseHead) else data

    def _refuse_rewards(self) -> None:
        if isinstance(self.program.head, PairwiseHead):
            raise ArgumentError("a pairwise preference has no reward of a single response; use `predict_preferences`")

    def to_arviz(
        self,
        data: Comparisons,
        *,
        num_samples: int = 1000,
        seed: int = 0,
        predictive: bool = True,
        by: str = "comparison",
    ) -> Any:
        """The posterior on `data` for ArviZ: reward draws and latents, never the weights of a network.

        Groups: `posterior`, `posterior_predictive`, `log_likelihood` (a number for each comparison, or each prompt),
        `sample_stats`, `observed_data` and `constant_data`; dimensions `item`, `comparison`, `prompt`, `candidate`,
        `annotator`, `feature`.

        `arviz.loo` of it leaves out one comparison at a time, or with `by="prompt"` one prompt. It takes the draws for
        draws of the exact posterior: it ignores `log_ratio` in `sample_stats`, which says by how much those of an
        approximate engine (Laplace, SVI, ImportanceSampling) are not, and weights of comparisons where it leaves those
        out. `diagnostics.loo` heeds both.

        Args:
            data: Comparisons, usually those of the fit.
            num_samples: Number of draws, see `draw`.
            seed: Seed.
            predictive: Whether to draw feedback from the posterior predictive.
            by: What has a number in `log_likelihood`: each `"comparison"`, or each `"prompt"`, whose comparisons are
                summed with their weights.

        Returns:
            `arviz.InferenceData`, or with ArviZ 1.x an `xarray.DataTree`.

        Raises:
            ArgumentError: `by` is neither.
            EngineError: ArviZ is not installed.
        """
        from ._arviz_export import export

        return export(self, self._explained(data), num_samples=num_samples, seed=seed, predictive=predictive, by=by)

    def _encoded(self, data: Comparisons) -> tuple[Tensor, Tensor | None]:
        """Features of the items of `data` and, for a projected head, what lies outside its coordinates."""
        head = self.program.head
        if isinstance(head, ProjectedHead):
            found = head.encode_items(data)
            return self._checked(found.values), self._scaled(found.outside)
        return self._checked(self.program.encode(data).double()), None

    def _belief_about(self, found: TangentFeatures, sizes: Sequence[int]) -> RewardBelief:
        return self._belief(self._checked(found.values), sizes, self._scaled(found.outside))

    def _scaled(self, outside: Tensor | None) -> Tensor | None:
        """What lies outside the coordinates of a projected head, under the prior of its one parameter site."""
        if outside is None:
            return None
        (site,) = self.program.head.parameter_shapes(self._num_features())
        scaled: Tensor = outside * self.program.prior.of(site) ** -0.5
        return scaled

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
        data = self._explained(data)
        density = self._density_of(data)
        groups = self.schema.check(data.groups(), data.annotators)
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
        from ._summary import summarise

        return summarise(self)

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


def _by_prompt(data: Comparisons) -> tuple[Tensor, list[int]]:
    """Items of each prompt next to each other: their order, and how many each prompt has."""
    prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
    return torch.argsort(prompt, stable=True), torch.unique(prompt, return_counts=True)[1].tolist()
