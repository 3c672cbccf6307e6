"""Joints with TRL: a posterior as a reward function of GRPO and RLOO, and its picks as data sets for SFT and DPO.

Nothing here imports TRL, so that all of it can be tried without; the trainers themselves come with
`pip install "bayesrm[trl]"`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..beliefs import RewardBelief
from ..data.rendering import Content
from ..engines import Posterior
from ..errors import ArgumentError
from ..rewards import ProjectedHead
from ..selection import RiskAverse, Rule
from ._scoring import Predicts
from ._trl_best_of_n import best_of_n_dataset
from ._trl_groups import Groups, is_seeded, utilities
from ._trl_pairs import LeftOut, PreferencePairs
from ._trl_preferences import Rejected, preference_dataset
from ._trl_weighted import weighted_preference_dataset

__all__ = [
    "LeftOut",
    "PosteriorReward",
    "PreferencePairs",
    "Rejected",
    "best_of_n_dataset",
    "preference_dataset",
    "weighted_preference_dataset",
]


@dataclasses.dataclass(frozen=True, eq=False)
class PosteriorReward:
    """A posterior as one of the `reward_funcs` of TRL's `GRPOTrainer` and `RLOOTrainer`.

    The completions of one prompt are a group, wherever they stand in the batch. The joint belief about a group,
    `posterior.predict`, goes through a utility, any callable from a `RewardBelief` to scores `(B, K)`: `Mean()`,
    `LowerConfidenceBound(k)`, `RiskAverse(b)`, `Thompson(seed)` and others of `bayesrm.selection`. Both trainers
    subtract a baseline of the group, so that only what is believed about *differences* inside it matters.

    The default is `RiskAverse(b=1.0)`. What it takes off comes from what preferences identify, the deviation from the
    group's mean, in the units of the reward (the log odds of a preference, under Bradley-Terry); it is the worst
    expected reward that another belief can give at a price of b for each nat that it differs (Hahami et al.,
    2606.09073), and so stands beside TRL's `beta`, the price of a nat between policies.

    What to know of TRL:

    * GRPO divides by the group's standard deviation (`scale_rewards="group"`, the default). Then the penalty changes
      order and spacing inside a group and nothing else: a group whose differences are mostly noise pulls as hard as one
      that is well known, and where the penalty outweighs the differences of means, all the pull is towards what is
      known. With `scale_rewards="none"`, as RLOO does by default, rewards keep their units.
    * In a group of two both deviate by the same amount, and no penalty on deviations changes anything. Generate three
      or more, or use a pointwise penalty or `Thompson`.
    * A process may hold part of a group where its batch (`per_device_train_batch_size * steps_per_generation`) is no
      multiple of `num_generations`. Deviations from the mean of a part would be others, so the completions are
      collected from all processes first (`across_processes`), and each process reads the groups that it has a part in.
    * Equal prompts in one batch, for instance of two equal rows of the data set, are one larger group here.
    * Completions hardly ever come twice: give a `FeatureExtractor` `cache_dir=False`, or its cache grows with them.

    What is logged, as averages over completions, each under `name/`: `reward_mean`, the posterior mean; `reward_std`,
    the standard deviation of the deviation from the group's mean; `uncertain_share`, the share of the squared
    deviations that is posterior variance and not difference of means; `penalty`, mean less utility; and
    `sign_probability`, the probability that a completion whose utility is above (below) its group's average has a
    reward above (below) it: one half says that advantages are noise. The table of completions gets `name/reward_mean`
    and `name/reward_std`. Of an empty completion there is no belief, and it is left out of its group.

    Attributes:
        posterior: From any engine, over texts; or anything that predicts as one does.
        utility: Scores completions. One that draws (a dataclass with a `seed`) does so anew for each prompt and step,
            by a seed made of its own, `trainer_state.global_step` and the prompt: a resumed run repeats its draws.
        name: What TRL calls the reward, by default that of the utility: `risk_averse_reward`.
        empty: Reward of a completion without words. With `None` TRL gives it no advantage and leaves it out of the
            baseline (TRL 1.16; earlier releases may not).
        across_processes: Whether to collect groups from all processes of `torch.distributed`, all of which must then
            call the reward together, as TRL does; else each process sees what it has.

    Raises:
        ArgumentError: The posterior reads features and not texts, a setting cannot be used, the utility returns
            something else than a finite score for each completion, or it draws and there is no `trainer_state`.

    Example:
        >>> from bayesrm.selection import LowerConfidenceBound
        >>> class Length:
        ...     def predict(self, prompts, candidates):
        ...         beliefs = [torch.tensor([[float(len(text)) for text in texts]]) for texts in candidates]
        ...         return RewardBelief.concatenate([RewardBelief(m, torch.diag_embed(m)) for m in beliefs])
        >>> reward = PosteriorReward(Length(), LowerConfidenceBound(k=1.0, spread="pointwise"), name="short")
        >>> reward(["Hi", "Bye", "Hi", "Bye"], ["a", "bb", "ccc", ""])
        [0.0, 0.0, 0.0, None]
    """

    posterior: Predicts
    utility: Rule = dataclasses.field(default_factory=RiskAverse)
    _: dataclasses.KW_ONLY
    name: str | None = None
    empty: float | None = None
    across_processes: bool = True

    def __post_init__(self) -> None:
        if not callable(self.utility):
            raise ArgumentError(f"`utility` is {self.utility!r}; give a callable from a belief to scores")
        if self.empty is not None and not math.isfinite(self.empty):
            raise ArgumentError(f"`empty` is {self.empty}; give a finite reward, or None for no advantage")
        if isinstance(self.posterior, Posterior):
            head = self.posterior.program.head
            if not isinstance(head, ProjectedHead) and head.features is None:
                raise ArgumentError(
                    "`posterior` was fitted on precomputed features and cannot read completions; fit it with a feature "
                    "extractor, for instance `rewards.Linear(features=FeatureExtractor(...))`, or a LoRA reward"
                )
        if self.name is None:
            object.__setattr__(self, "name", _name_of(self.utility))

    @property
    def __name__(self) -> str:
        """The name, where TRL looks for it."""
        assert self.name is not None
        return self.name

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """The utility of each completion; `None`, or `empty`, for one without words.

        Args:
            prompts: One for each completion, texts or messages.
            completions: Texts or messages.
            completion_ids: Not used.
            log_metric: TRL's way to log a number.
            log_extra: TRL's way to add a column to the table of completions.
            trainer_state: The state of the trainer, of which a utility that draws takes `global_step`.
            columns: Other columns of the data set; not used.
        """
        if is_seeded(self.utility) and trainer_state is None:
            raise ArgumentError(
                f"`trainer_state` is missing: {type(self.utility).__name__} draws anew at each step; pass a state with "
                "`global_step`, as TRL 1.16 does"
            )
        groups = self._groups(prompts, completions)
        rewards: list[float | None] = [self.empty] * len(prompts)
        means: list[float | None] = [None] * len(prompts)
        stds: list[float | None] = [None] * len(prompts)
        worded = (groups.places[:, 0] >= 0).nonzero()[:, 0].tolist()
        if worded:
            with torch.no_grad():
                belief = groups.belief(self.posterior)
                step = 0 if trainer_state is None else int(trainer_state.global_step)
                scores = utilities(self.utility, belief, groups.keys, step)
            if not bool(torch.isfinite(scores).all()):
                raise ArgumentError("the utility returned infinity for a completion; a reward is finite")
            at = tuple(groups.places[worded].to(belief.mean.device).T)
            deviation = belief.differences()
            for column, values in ((rewards, scores), (means, belief.mean), (stds, deviation.std)):
                for row, value in zip(worded, values[at].tolist(), strict=True):
                    column[row] = value
            if log_metric is not None:
                for name, number in _summary(belief, deviation, scores, at).items():
                    log_metric(f"{self.name}/{name}", number)
        if log_extra is not None:
            log_extra(f"{self.name}/reward_mean", means)
            log_extra(f"{self.name}/reward_std", stds)
        return rewards

    def _groups(self, prompts: Sequence[Content], completions: Sequence[Content]) -> Groups:
        """Groups of this process, with the members that other processes hold."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        count = torch.distributed.get_world_size() if distributed else 1
        if not self.across_processes or count == 1:
            return Groups.of(prompts, completions)
        held: list[Any] = [None] * count
        torch.distributed.all_gather_object(held, (list(prompts), list(completions)))
        first = sum(len(part) for part, _ in held[: torch.distributed.get_rank()])
        everything = Groups.of([p for part, _ in held for p in part], [c for _, part in held for c in part])
        return everything.part(range(first, first + len(prompts)))


def _summary(belief: RewardBelief, deviation: RewardBelief, scores: Tensor, at: tuple[Tensor, ...]) -> dict[str, float]:
    """Averages over the completions at some places, and the share of their squared deviations that is variance."""
    size = belief.valid.sum(1, keepdim=True)
    sign = (scores - scores.sum(1, keepdim=True) / size).sign()
    variance, squares = deviation.variance[at], deviation.mean[at].square()
    total = float((variance + squares).sum())
    numbers = {
        "reward_mean": belief.mean[at],
        "reward_std": variance.sqrt(),
        "penalty": (belief.mean - scores)[at],
        "sign_probability": _probability_of_sign(deviation, sign)[at],
    }
    averages = {name: float(values.double().mean()) for name, values in numbers.items()}
    # Where all completions are one, nothing differs and nothing is uncertain.
    return averages | {"uncertain_share": float(variance.sum()) / total if total > 0 else 0.0}


def _probability_of_sign(deviation: RewardBelief, sign: Tensor) -> Tensor:
    """P(deviation has this sign), one half where the sign is 0; shape `(B, K)`."""
    if deviation.draws is not None:
        return 0.5 * (1.0 + (deviation.draws * sign).sign()).mean(0)
    ratio = torch.where(deviation.std > 0, deviation.mean / deviation.std, deviation.mean.sign() * torch.inf)
    probability: Tensor = torch.special.ndtr(torch.where((deviation.mean == 0) | (sign == 0), 0.0, ratio * sign))
    return probability


def _name_of(utility: Rule) -> str:
    name = getattr(utility, "__name__", type(utility).__name__)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return f"{words}_reward" if words.isidentifier() else "posterior_reward"
