"""Approximate variational reward imitation learning: AVRIL, and AVA for text."""

import dataclasses
import enum
import math

from ..data import Comparisons, Demonstrations, Trajectories
from ..errors import ArgumentError
from ..programs import InverseRL
from ._settings import check_choice, check_positive, check_real, check_training
from .posterior import Posterior
from .training import Training
from .trajectory_posterior import TrajectoryPosterior


class NextValue(enum.StrEnum):
    """The value of the next state in the temporal difference."""

    TRAJECTORY = "trajectory"
    """Q(s', a') of the action that was taken there, as in AVRIL's released code."""
    SOFT = "soft"
    """log sum_a exp(rationality * Q(s', a)) / rationality: the differences are then those of a soft-optimal policy."""


@dataclasses.dataclass(frozen=True)
class AVRIL:
    """A normal distribution q(R_t) for the reward of each step, and action values Q that agree with them.

    Chan and van der Schaar, "Scalable Bayesian Inverse Reinforcement Learning", 2102.06483; for text, AVA (Cai et al.,
    2411.09341). Networks give the mean and the standard deviation of q and the action values; it maximises the sum over
    the data of

        E_q[log p(actions, preferences | R, Q)] - kl_weight * KL(q(R) || p(R)) + constraint_weight * log q(R = TD(Q)),

    where TD(Q) = Q(s, a) - discount * V(s') is the reward that the action values imply, and Q(s, a) itself at the end
    of a trajectory. The last step of a trajectory that was cut has no next value and stays out of the constraint.

    Where this differs from the released code of AVRIL: that one has discount 1, leaves out the end of each trajectory,
    and averages over the data. In AVA-p (preferences) the actions of neither response are imitated; preferences are
    explained by the sums of rewards under q, and both responses take part in the other two terms.

    q is no posterior in the strict sense: Q is a point, and the constraint pulls q onto the rewards that it implies.
    With both weights equal, the entropy of q cancels (`-KL` holds `+log std`, the constraint `-log std`), and standard
    deviations shrink to the residual of the temporal difference, however few the data. With a smaller
    `constraint_weight`, such as the 0.1 of `inference/ava.py`, some of the entropy is left; with 0 and preferences it
    is variational inference for the declared rewards, and the action values learn nothing.

    Attributes:
        next_value: A `NextValue`.
        kl_weight: Weight of the divergence from the prior; 1 in the released code.
        constraint_weight: Weight of the temporal-difference term, lambda; 1 in the released code.
        min_std: Smallest standard deviation of q, in units of the prior's, below 1.
        kl_once: Count the divergence once for each distinct reward, as a reward that is a function of the state asks
            for, instead of once for each step (published). Of text, where it always counts once, it has no meaning.
        num_particles: Draws of the rewards by which the likelihood of preferences is averaged, half of them mirrored.
        num_steps: Steps of the optimiser (of text: see `training`).
        learning_rate: Its step size (of text: see `training`).
        batch_size: Steps of trajectories that an update takes; all by default (of text: see `training`).
        training: How the weights of a language model are trained.

    Raises:
        ArgumentError: A setting is out of range.

    Example:
        >>> AVRIL(next_value="soft").constraint_weight
        1.0
    """

    next_value: str = "trajectory"
    kl_weight: float = 1.0
    constraint_weight: float = 1.0
    min_std: float = 1e-3
    kl_once: bool = False
    num_particles: int = 32
    num_steps: int = 5000
    learning_rate: float = 1e-3
    batch_size: int | None = None
    training: Training = dataclasses.field(default_factory=Training)

    #: Programs that the engine serves.
    programs = (InverseRL,)

    def __post_init__(self) -> None:
        check_choice("next_value", self.next_value, NextValue)
        for name in ("kl_weight", "constraint_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
                raise ArgumentError(f"`{name}` is {getattr(self, name)}; it is 0 or a positive number")
        check_real("min_std", self.min_std)
        if self.min_std >= 1.0:
            raise ArgumentError(f"`min_std` is {self.min_std}; it is a part of the prior's standard deviation, below 1")
        check_real("learning_rate", self.learning_rate)
        for name in ("num_particles", "num_steps"):
            check_positive(name, getattr(self, name))
        if self.num_particles % 2:
            raise ArgumentError(f"`num_particles` is {self.num_particles}; it is an even number")
        if self.batch_size is not None:
            check_positive("batch_size", self.batch_size)
        check_training(self.training)

    def fit(
        self, program: InverseRL, data: Demonstrations | Comparisons | Trajectories, *, seed: int, progress: bool
    ) -> Posterior | TrajectoryPosterior:
        """The variational posterior, see `bayesrm.fit`; of trajectories a `TrajectoryPosterior`."""
        if not isinstance(data, Trajectories):
            from ._avril_text import fit_text

            return fit_text(self, program, data, seed=seed, progress=progress)
        from ._avril_states import fit_states

        return fit_states(self, program, data, seed=seed, progress=progress)
