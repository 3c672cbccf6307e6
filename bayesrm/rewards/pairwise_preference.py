"""Preferences between two responses that no reward need explain: antisymmetric scores of pairs, cycles included."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from .._typing import Array, Tensor
from ..data._rows import Ragged
from ..data._texts import TextTable
from ..data.comparisons import Comparisons
from ..errors import ArgumentError, DataError
from ._checks import check_integer
from ._preference_belief import pairs_of
from .features import FeatureExtractor


@dataclasses.dataclass(frozen=True)
class PairwisePreference:
    """s(i, j) = w . (f_i - f_j) + g_i^T A g_j with A antisymmetric, P(i preferred to j) = sigmoid(s(i, j)).

    The first part is a reward; the second can hold cycles (rock beats scissors beats paper beats rock), which no reward
    can. g are the features in `rank` directions, scaled to unit variance. As s(i, j) is linear in (w, A), with the
    features f_i - f_j and g_ia g_jb - g_ib g_ja (a < b), every engine for linear heads serves it: `bayesrm.fit` makes
    them for the pairs that were compared (`PairwiseHead`). The likelihood sees s(i, j) where it otherwise sees
    r_i - r_j; it must depend on that difference alone and not on lengths. A general preference of this kind: Zhang et
    al., "Beyond Bradley-Terry models: a general preference model for language model alignment", 2410.02197, with w = 0.

    The parameter sites are `weight` (w) and `intransitive` (A), so that each can have its own prior precision; their
    evidence (`Laplace(prior_precision="marginal_likelihood")`) tells whether the feedback has cycles.

    Attributes:
        features: Turns texts into features; `None` when the data bring their own (`data.with_features`).
        standardize: Whether features are centred and scaled to unit variance over the training items.
        rank: Directions in which preferences may be intransitive, the leading principal ones of the differences f_i -
            f_j of the training pairs; A has rank (rank - 1) / 2 free numbers.

    Raises:
        ArgumentError: `rank` is no integer of at least 2.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> corners = np.array([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
        >>> pairs = [[0, 1], [1, 2], [2, 0]] * 20
        >>> data = brm.Comparisons.from_arrays(corners, candidates=pairs, outcome=[0] * 60)
        >>> model = brm.RewardModel(brm.rewards.PairwisePreference(rank=2), brm.likelihoods.BradleyTerry())
        >>> belief = brm.fit(model, data).predict_preferences(candidates=[corners])
        >>> (belief.preference_matrix()[0] > 0.8).int()
        tensor([[0, 1, 0],
                [0, 0, 1],
                [1, 0, 0]], dtype=torch.int32)
    """

    features: FeatureExtractor | None = None
    standardize: bool = True
    rank: int = 8

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 2)

    @property
    def is_linear(self) -> bool:
        """Always true, once it is bound to features of pairs."""
        return True

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Unknown before there are training items.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "a pairwise preference has no reward of a single response: `bayesrm.fit` turns comparisons into features "
            "of pairs before the engine starts; elsewhere, use its `bind` and the `pairs` of what that returns"
        )

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """There are no rewards of single responses.

        Raises:
            ArgumentError: Always.
        """
        self.parameter_shapes(features.shape[-1])

    def bind(self, data: Comparisons) -> "PairwiseHead":
        """The linear head on features of pairs, its directions taken from comparisons with features.

        Args:
            data: Choices between two responses, with features; rows of weight 0 do not count.

        Raises:
            DataError: A row is no choice between two responses, none counts, or the responses that were compared differ
                in fewer than two directions, so that no preference among them can be intransitive.
        """
        check_choices(data)
        if data.features is None:
            raise DataError("the data carry no features; use `data.with_features(array)`")
        candidates = _candidates(data)[data._rows.weight > 0]
        if not len(candidates):
            raise DataError("every row has weight 0; there is no feedback to learn from")
        features = torch.as_tensor(np.asarray(data.features)).double()
        pairs = torch.as_tensor(np.unique(np.sort(candidates, axis=1), axis=0)).long()
        used = features[torch.unique(pairs)]
        center, spread = used.mean(0), torch.ones_like(used[0])
        if self.standardize:
            std = used.std(0, correction=0)
            spread = torch.where(std > 1e-12 * used.abs().amax(0).clamp_min(1e-300), std, 1.0)
        _, sizes, directions = torch.linalg.svd(
            (features[pairs[:, 0]] - features[pairs[:, 1]]) / spread, full_matrices=False
        )
        rank = min(self.rank, int((sizes > 1e-8 * sizes[0].clamp_min(1e-300)).sum()))
        if rank < 2:
            raise DataError(
                f"the responses that were compared differ in {rank} direction of their features, and preferences can "
                "only be intransitive in two or more; use rewards.Linear, or other features"
            )
        directions = directions[:rank]
        # A singular vector has no sign of its own; this makes fits the same on every machine.
        directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        scale = (((used - center) / spread) @ directions.T).std(0, correction=0)
        return PairwiseHead(
            self.features,
            tuple(center.tolist()),
            tuple(spread.tolist()),
            tuple((directions / scale[:, None]).reshape(-1).tolist()),
        )


@dataclasses.dataclass(frozen=True)
class PairwiseHead:
    """A `PairwisePreference` bound to features of pairs: a linear head, whose "rewards" are the scores s(i, j).

    `bayesrm.fit` makes one: `posterior.program.reward`. A comparison of i and j is that of the pair (i, j) and a
    pair of a response with itself, whose features and score are 0.

    Attributes:
        features: Turns texts into features of responses.
        center: Subtracted from features, length D.
        spread: Features are divided by it, length D.
        directions: Directions in which preferences may be intransitive, D numbers for each in turn.
    """

    features: FeatureExtractor | None
    center: tuple[float, ...]
    spread: tuple[float, ...]
    directions: tuple[float, ...]

    @property
    def standardize(self) -> bool:
        """Never: it standardises on its own."""
        return False

    @property
    def is_linear(self) -> bool:
        """Always."""
        return True

    @property
    def num_features(self) -> int:
        """Size of the features of a pair: D + rank (rank - 1) / 2."""
        return len(self.center) + self.rank * (self.rank - 1) // 2

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.directions) // len(self.center)

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """`{"weight": (D,), "intransitive": (rank (rank - 1) / 2,)}`; the second is A above its diagonal."""
        return {"weight": (len(self.center),), "intransitive": (num_features - len(self.center),)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Scores, shape `(...,)`, of features of pairs, shape `(..., num_features)`."""
        size = len(self.center)
        return features[..., :size] @ parameters["weight"] + features[..., size:] @ parameters["intransitive"]

    def encode_pairs(
        self, first: Float[Tensor, "pairs D"], second: Float[Tensor, "pairs D"]
    ) -> Float[Tensor, "pairs num_features"]:
        """Features of pairs; swapping the two responses turns the sign of every number, exactly.

        Args:
            first: Features of the one response.
            second: Features of the other.

        Raises:
            ArgumentError: The features have another width than those of the training items.
            DataError: A feature is not finite.
        """
        center, spread = (torch.tensor(v, dtype=torch.float64) for v in (self.center, self.spread))
        directions = torch.tensor(self.directions, dtype=torch.float64).reshape(self.rank, -1)
        for features in (first, second):
            if features.dim() != 2 or features.shape[1] != len(center):
                raise ArgumentError(
                    f"features have shape {tuple(features.shape)}; the posterior was fitted on (items, {len(center)})"
                )
            bad = ~torch.isfinite(features).all(1)
            if bool(bad.any()):
                raise DataError(f"features of item {int(bad.nonzero()[0, 0])} are not finite")
        x, y = (first.double() - center) / spread, (second.double() - center) / spread
        g, h = x @ directions.T, y @ directions.T
        a, b = pairs_of(self.rank)
        return torch.cat([x - y, g[:, a] * h[:, b] - g[:, b] * h[:, a]], dim=1)

    def pairs(self, data: Comparisons, *, progress: bool = False) -> Comparisons:
        """Comparisons of pairs of responses with nothing, in the same rows; such comparisons come back as they are.

        Item p < `num_prompts` is the pair without difference of prompt p; the others are the pairs that were compared.

        Raises:
            DataError: A row is no choice between two responses, or there is nothing to make features of.
        """
        if data.features is not None and data.features.shape[1] == self.num_features:
            return data
        check_choices(data)
        features = self._item_features(data, progress)
        candidates = _candidates(data)
        pairs, pair_of_row = np.unique(np.sort(candidates, axis=1), axis=0, return_inverse=True)
        encoded = self.encode_pairs(features[pairs[:, 0]], features[pairs[:, 1]]).numpy()
        none = np.zeros((data.num_prompts, self.num_features))
        prompt_of_pair = data.prompt_of_item[pairs[:, 0]]
        both = np.stack([data.num_prompts + pair_of_row.reshape(-1), data.prompt_of_row], axis=1)
        turned = candidates[:, 0] > candidates[:, 1]
        both[turned] = both[turned][:, ::-1]
        return dataclasses.replace(
            data,
            _items=TextTable(None, len(none) + len(pairs)),
            _prompt_of_item=np.concatenate([np.arange(data.num_prompts), prompt_of_pair]),
            _words=None,
            _rows=dataclasses.replace(data._rows, candidates=Ragged.from_matrix(both)),
            _features=np.concatenate([none, encoded]),
            _ids=None,
        )

    def candidate_pairs(
        self, prompts: Sequence[Any] | None, candidates: Sequence[Any] | None, *, progress: bool = False
    ) -> list[Float[Tensor, "pairs num_features"]]:
        """For each prompt the features of no difference and of the pairs of its candidates; arguments as for `predict`.

        Raises:
            ArgumentError: The arguments do not fit together.
            DataError: A candidate's text is empty or its features are not finite.
        """
        if candidates is None or not len(candidates) or min(map(len, candidates)) == 0:
            raise ArgumentError("`candidates` must hold at least one response (or row of features) for each prompt")
        if prompts is not None and len(prompts) != len(candidates):
            raise ArgumentError(f"{len(prompts)} prompts but candidates for {len(candidates)}")
        arrays = [isinstance(c, np.ndarray | torch.Tensor) for c in candidates]
        if any(arrays) and not all(arrays):
            raise ArgumentError("`candidates` mixes arrays of features with lists of texts; give one kind")
        if all(arrays):
            features = torch.cat([torch.as_tensor(c).double() for c in candidates])
        elif self.features is None:
            raise ArgumentError(
                "this posterior was fitted on precomputed features; give `candidates` as arrays of the same features"
            )
        elif prompts is None:
            raise ArgumentError(
                "`prompts` is missing; it may be left out only when the candidates are arrays of features"
            )
        else:
            asked = [p for p, c in zip(prompts, candidates, strict=True) for _ in c]
            said = [response for c in candidates for response in c]
            features = torch.as_tensor(self.features.extract(asked, said, progress=progress)).double()
        found = []
        for part in features.split([len(c) for c in candidates]):
            i, j = pairs_of(len(part))
            # The first response with itself: zero, and checked like the others where there is no pair.
            found.append(self.encode_pairs(torch.cat([part[:1], part[i]]), torch.cat([part[:1], part[j]])))
        return found

    def _item_features(self, data: Comparisons, progress: bool) -> Tensor:
        if data.features is not None:
            return torch.as_tensor(np.asarray(data.features)).double()
        if self.features is None:
            raise DataError(
                "the data carry no features and the reward function has no feature extractor; "
                "use `data.with_features(array)`"
            )
        return torch.as_tensor(self.features.extract_items(data, progress=progress)).double()


def check_choices(data: Comparisons) -> None:
    """Refuses feedback other than choices between two responses.

    Raises:
        DataError: A row is none; the message names the first.
    """
    strange = [g for g in data.groups() if g.comparison.kind != "choice" or g.comparison.num_candidates != 2]
    if strange:
        first = min(strange, key=lambda g: int(g.rows[0]))
        c = first.comparison
        raise DataError(
            f"a pairwise preference explains choices between two responses, and this is a {c.kind} of "
            f"{c.num_candidates}; leave such rows out with `data.select`, or use a reward such as rewards.Linear",
            row=int(first.rows[0]),
        )


def _candidates(data: Comparisons) -> np.ndarray:
    return data._rows.candidates.values.reshape(-1, 2).astype(np.int64)
