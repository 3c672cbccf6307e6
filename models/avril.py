"""Inverse reinforcement learning on states and actions: rewards that explain demonstrations and preferences.

Chan and van der Schaar, "Scalable Bayesian Inverse Reinforcement Learning", 2102.06483; whoever demonstrates acts by a
Boltzmann policy (Ramachandran and Amir, 2007).
"""

from collections.abc import Sequence

import bayesrm as brm


def build(
    *,
    num_actions: int = 2,
    num_states: int | None = None,
    hidden: Sequence[int] = (64, 64),
    by_action: bool = False,
    precision: float = 1.0,
    discount: float = 1.0,
    rationality: float = 1.0,
    dynamics: str | None = None,
) -> brm.programs.InverseRL:
    """Declares the program.

    Args:
        num_actions: Number of actions.
        num_states: Number of states, where they are numbers; none for features.
        hidden: Widths of the hidden layers; none for a table.
        by_action: Whether the reward depends on the action too.
        precision: Prior precision of the reward of a step.
        discount: What the reward of the next step is worth now.
        rationality: Inverse temperature of the demonstrator's policy.
        dynamics: File of a `TabularMDP` (.npz), for `nuts`, which needs to know where actions lead.
    """
    mdp = None if dynamics is None else brm.programs.TabularMDP.load(dynamics)
    reward = brm.rewards.StateReward(num_actions, num_states, tuple(hidden), by_action, mdp)
    prior = brm.priors.Gaussian(precision=precision)
    return brm.programs.InverseRL(reward, prior=prior, discount=discount, rationality=rationality)
