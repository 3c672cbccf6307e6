"""What every engine returns: beliefs about rewards, predictions of feedback, latents, and a way to disk."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Comparisons
from ..data.groups import Comparison, FeedbackGroup
from ..errors import ArgumentError, DataError, LikelihoodError
from ..likelihoods.base import outcomes_of
from ..programs import RewardModel
from ._density import FeedbackDensity, _tile
from .prediction import FeedbackPrediction, GroupPrediction

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class FitReport:
    """How a posterior came about: what `summary` prints and `save_pretrained` keeps.

    Attributes:
        engine: Name and settings of the engine.
        seed: Seed of the fit.
        seconds: Wall time of the fit.
        num_rows: Rows of feedback.
        num_items: Unique items.
        num_prompts: Unique prompts.
        num_parameters: Parameters of the reward function, P.
        num_coordinates: Coordinates the engine worked in, R.
        converged: Whether the optimiser reached its gradient tolerance.
        gradient_norm: Gradient norm at the end, in whitened coordinates.
        iterations: Optimiser steps.
        log_evidence: Laplace's approximation of log p(feedback), when computed.
        curvature: Which curvature was used (`observed`, `fisher`, `fisher-draws`), when one was.
        prior_precision: Prior precision, given or tuned, by parameter site or one number.
        tuned: Whether it was tuned by the marginal likelihood.
        structure_check: Comparison of an approximate structure with `full` on a probe set.
    """

    engine: dict[str, Any]
    seed: int
    seconds: float
    num_rows: int
    num_items: int
    num_prompts: int
    num_parameters: int
    num_coordinates: int
    converged: bool
    gradient_norm: float
    iterations: int
    log_evidence: float | None = None
    curvature: str | None = None
    prior_precision: float | Mapping[str, float] = 1.0
    tuned: bool = False
    structure_check: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class FeedbackSchema:
    """The kinds of feedback a posterior was fitted on, as far as its latents depend on them.

    Attributes:
        kinds: For each group of rows: kind, K, depth, number of levels, whether margins and lengths were there.
        annotators: Names of the annotators, in the order of their codes.
    """

    kinds: tuple[dict[str, Any], ...]
    annotators: tuple[str, ...]

    @classmethod
    def of(cls, data: Comparisons, groups: Sequence[FeedbackGroup]) -> "FeedbackSchema":
        """The schema of training data."""
        kinds = []
        for g in groups:
            c = g.comparison
            present = {name: getattr(c, name) is not None for name in ("annotator", "margin", "lengths")}
            kinds.append(
                {"kind": c.kind, "num_candidates": c.num_candidates, "depth": c.depth, "num_levels": c.num_levels}
                | present
            )
        return cls(tuple(kinds), tuple(data.annotators))

    def example_groups(self) -> list[FeedbackGroup]:
        """One made-up row of each kind, enough to find the latents of a likelihood and their supports."""
        groups = []
        for i, kind in enumerate(self.kinds):
            k = kind["num_candidates"]
            comparison = Comparison(
                kind=kind["kind"],
                num_rows=1,
                num_candidates=k,
                depth=kind["depth"],
                num_levels=kind["num_levels"],
                annotator=torch.zeros(1, dtype=torch.long) if kind["annotator"] else None,
                num_annotators=len(self.annotators),
                margin=torch.zeros(1, dtype=torch.float64) if kind["margin"] else None,
                lengths=torch.ones(1, k, dtype=torch.float64) if kind["lengths"] else None,
            )
            outcome = (
                torch.arange(kind["depth"])[None] if kind["kind"] == "ranking" else torch.zeros(1, dtype=torch.long)
            )
            one = torch.ones(1, dtype=torch.float64)
            groups.append(FeedbackGroup(comparison, torch.arange(k)[None], outcome, one, torch.tensor([i])))
        return groups

    def check(self, groups: Sequence[FeedbackGroup], annotators: Sequence[str]) -> list[FeedbackGroup]:
        """`groups` of other data with annotators coded as in training.

        Raises:
            LikelihoodError: An annotator was not in the training data, or ratings have other levels.
        """
        levels = {kind["num_levels"] for kind in self.kinds if kind["kind"] == "rating"}
        uses_annotators = any(kind["annotator"] for kind in self.kinds)
        code = {name: i for i, name in enumerate(self.annotators)}
        result = []
        for g in groups:
            c = g.comparison
            if c.kind == "rating" and levels and c.num_levels not in levels:
                raise LikelihoodError(
                    f"ratings with {c.num_levels} levels, the posterior was fitted on {sorted(levels)}"
                )
            if c.annotator is not None and uses_annotators:
                known = torch.tensor([code.get(name, -1) for name in annotators] + [-1])
                # The last entry serves code -1, rows without an annotator.
                mapped = known.to(c.annotator.device)[c.annotator]
                strange = (mapped < 0) & (c.annotator >= 0)
                if bool(strange.any()):
                    name = annotators[int(c.annotator[strange][0])]
                    raise LikelihoodError(
                        f"annotator {name!r} of row {int(g.rows[strange][0])} was not in the training data, which has "
                        f"{len(self.annotators)} ({', '.join(map(repr, self.annotators[:5]))}"
                        f"{', ...' if len(self.annotators) > 5 else ''}); leave such rows out with `data.select`"
                    )
                c = dataclasses.replace(c, annotator=mapped, num_annotators=len(self.annotators))
                g = dataclasses.replace(g, comparison=c)
            result.append(g)
        return result


class Posterior(abc.ABC):
    """A posterior over the reward function and the likelihood's latents.

    Attributes:
        program: The reward model, with its prior as tuned.
        schema: The kinds of feedback it was fitted on.
        report: How it was fitted.
    """

    program: RewardModel
    schema: FeedbackSchema
    report: FitReport

    @abc.abstractmethod
    def _belief(self, features: Tensor, sizes: Sequence[int]) -> RewardBelief:
        """Joint belief about items with float64 features `(items, D)`, `sizes` of them to a prompt in turn."""

    @abc.abstractmethod
    def _feedback_draws(
        self, features: Tensor, groups: Sequence[FeedbackGroup], num_samples: int, seed: int
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
            features = torch.cat([torch.as_tensor(c).double() for c in candidates])
        else:
            if prompts is None:
                raise ArgumentError(
                    "`prompts` is missing; it may be left out only when the candidates are arrays of features"
                )
            extractor = self.program.reward.features
            if extractor is None:
                raise ArgumentError(
                    "this posterior was fitted on precomputed features; "
                    "give `candidates` as arrays of the same features"
                )
            flat_prompts = [p for p, c in zip(prompts, candidates, strict=True) for _ in c]
            flat = [response for c in candidates for response in c]
            features = torch.as_tensor(extractor.extract(flat_prompts, flat, progress=progress)).double()
        return self._belief(self._checked(features), sizes)

    def predict_items(self, data: Comparisons) -> RewardBelief:
        """Joint belief about the items of `data`, grouped by prompt; candidates in the order of the items."""
        prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
        order = torch.argsort(prompt, stable=True)
        sizes = torch.unique(prompt, return_counts=True)[1].tolist()
        return self._belief(self._checked(self.program.encode(data).double())[order], sizes)

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
        features = self._checked(self.program.encode(data).double())
        totals: list[Tensor] = [
            torch.full((g.comparison.num_rows,), -torch.inf, dtype=torch.float64) for g in density.groups
        ]
        tables: list[Tensor | None] = [None] * len(groups)
        supports: list[Tensor | None] = [None] * len(groups)
        count = 0
        with torch.no_grad():
            for rewards, latents in self._feedback_draws(features, density.groups, num_samples, seed):
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
        precision = r.prior_precision if not isinstance(r.prior_precision, Mapping) else dict(r.prior_precision)
        shown = f"{precision:.4g}" if isinstance(precision, float) else str(precision)
        lines = [
            f"{type(self.program.reward).__name__} reward, {_likelihood_name(self.program.likelihood)} likelihood, "
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
                f"rank correlation {check['rank_correlation']:.2f}"
            )
        for name, draws in self.latents(2000).items():
            flat = draws.reshape(len(draws), -1)
            low, mid, high = torch.quantile(flat, torch.tensor([0.05, 0.5, 0.95], dtype=flat.dtype), dim=0)
            shown = ", ".join(
                f"{m:.3g} [{lo:.3g}, {hi:.3g}]" for lo, m, hi in zip(low[:4], mid[:4], high[:4], strict=True)
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


def _likelihood_name(likelihood: Any) -> str:
    if isinstance(likelihood, Mapping):
        return " + ".join(f"{kind}: {_likelihood_name(value)}" for kind, value in likelihood.items())
    base = getattr(likelihood, "base", None)
    name = getattr(likelihood, "__name__", type(likelihood).__name__)
    return f"{name}({_likelihood_name(base)})" if base is not None else name
