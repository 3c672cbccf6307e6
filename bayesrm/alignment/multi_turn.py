"""Preference games over conversations of several turns: values, mirror descent and exploitability, exact on a tree.

The policy speaks, another party answers with known probabilities, and so on until the conversation ends; it wins if its
conversation is preferred to an independent one of the opponent over the same start. This is the game of MTPO (Shani et
al., "Multi-turn reinforcement learning from preference human feedback", 2405.14655), whose Q(s, a) has one more term,
the cost of the divergence in s itself, which is the same for all speeches:

    J(pi, pi') = E[P(final, final')] - tau E_pi[sum_turns KL(pi(.|s) || p0(.|s))] + tau E_pi'[the same of pi']
    Q(s, a) = E[V(s') | s, a],   V(s) = sum_a pi(a|s) (Q(s, a) - tau log(pi(a|s) / p0(a|s))),
    V(final) = E_opponent[P(final, final')].

By the chain rule the sum of turn-wise divergences is that between the distributions of whole conversations, as both
policies talk to the same party. J is linear in V(final), so that against a fixed opponent the best policy follows from
backward induction, pi(a|s) proportional to p0(a|s) exp(Q(s, a) / tau). A policy that is its own best response is the
Nash policy; one turn is the game of `games`.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float

from .._typing import Tensor
from ..errors import ArgumentError

#: Sums of probabilities may be this far off, which is rounding of float32.
_SLACK = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class TurnTree:
    """Conversations that can be enumerated: states in which the policy speaks, and ends.

    Attributes:
        transitions: Probability that speech a in state s leads to each of the S states and then the F ends, shape
            `(S, A, S + F)`; all 0 where there is no speech a. State 0 is the start, and a state leads to later ones
            only.

    Raises:
        ArgumentError: Probabilities do not sum to 1 (or 0), a state leads to an earlier one, has no speech, or there is
            no end.

    Example:
        Two turns: the first word is remembered, and the two words make one of four ends.

        >>> transitions = torch.zeros(3, 2, 3 + 4)
        >>> for first in range(2):
        ...     transitions[0, first, 1 + first] = 1.0
        ...     for second in range(2):
        ...         transitions[1 + first, second, 3 + 2 * first + second] = 1.0
        >>> tree = TurnTree(transitions)
        >>> tree.reach(tree.uniform())[1]
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    transitions: Float[Tensor, "states speeches nodes"]

    def __post_init__(self) -> None:
        t = self.transitions.double()
        states, _, nodes = t.shape
        total = t.sum(-1)
        if nodes <= states:
            raise ArgumentError(f"`transitions` has {states} states and {nodes} nodes; there must be an end among them")
        if bool((t < 0.0).any()) or not bool((((total - 1.0).abs() < _SLACK) | (total == 0.0)).all()):
            raise ArgumentError("`transitions` must hold probabilities that sum to 1 for each speech, or to 0 for none")
        if bool((total == 0.0).all(1).any()):
            raise ArgumentError(f"state {int((total == 0.0).all(1).nonzero()[0, 0])} has no speech; make it an end")
        if bool(t[:, :, :states].sum(1).tril().any()):
            raise ArgumentError("a state leads to itself or an earlier one; number the states in the order of turns")
        object.__setattr__(self, "transitions", torch.where(total[..., None] > 0.0, t / total[..., None], 0.0))

    @property
    def num_states(self) -> int:
        """Number of states S in which the policy speaks."""
        return int(self.transitions.shape[0])

    @property
    def num_ends(self) -> int:
        """Number of ends F."""
        return int(self.transitions.shape[2]) - self.num_states

    @property
    def allowed(self) -> Bool[Tensor, "states speeches"]:
        """Which speeches there are."""
        return self.transitions.sum(-1) > 0.0

    def uniform(self) -> Float[Tensor, "states speeches"]:
        """The policy that takes every speech of a state alike."""
        allowed = self.allowed.double()
        return allowed / allowed.sum(1, keepdim=True)

    def reach(
        self, policy: Float[Tensor, "states speeches"]
    ) -> tuple[Float[Tensor, " states"], Float[Tensor, " ends"]]:
        """Probability that a conversation comes through each state, and that it ends in each end."""
        moves = torch.einsum("sa,san->sn", policy.double(), self.transitions)
        reached = moves.new_zeros(moves.shape[1])
        reached[0] = 1.0
        for s in range(self.num_states):
            reached = reached + reached[s] * moves[s]
        return reached[: self.num_states], reached[self.num_states :]


@dataclasses.dataclass(frozen=True, eq=False)
class TurnValues:
    """Values of a policy against an opponent.

    Attributes:
        q: Q(s, a), shape `(S, A)`; 0 where there is no speech a.
        v: V(s), shape `(S,)`; V(0) is the value of the conversation.
    """

    q: Float[Tensor, "states speeches"]
    v: Float[Tensor, " states"]


def preference_values(
    tree: TurnTree,
    policy: Float[Tensor, "states speeches"],
    opponent: Float[Tensor, "states speeches"],
    preferences: Float[Tensor, "ends ends"],
    *,
    reference: Float[Tensor, "states speeches"] | None = None,
    regularisation: float = 0.0,
) -> TurnValues:
    """Q(s, a) and V(s): the chance that the conversation will be preferred to one of the opponent, less what it costs.

    Args:
        tree: The conversations.
        policy: pi(a|s).
        opponent: The policy of the other conversation.
        preferences: P(end i preferred to end j).
        reference: p0(a|s); needed with a regularisation.
        regularisation: tau, the cost of a nat of divergence from the reference in the turns to come.

    Raises:
        ArgumentError: A policy is none on this tree, or the reference is missing.

    Example:
        >>> tree = TurnTree(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))
        >>> preferences = torch.tensor([[0.5, 0.9], [0.1, 0.5]])
        >>> preference_values(tree, tree.uniform(), tree.uniform(), preferences).q
        tensor([[0.7000, 0.3000]], dtype=torch.float64)
    """
    policy, worth = _checked(tree, policy, opponent, preferences)
    if regularisation == 0.0:
        cost = torch.zeros_like(policy)
    else:
        reference = _reference(tree, reference, regularisation)
        cost = regularisation * _log_ratio(policy, reference)

    def value(q: Tensor, s: int) -> Tensor:
        return torch.where(policy[s] > 0.0, policy[s] * (q - cost[s]), 0.0).sum()

    return _backward(tree, worth, value)


def best_response(
    tree: TurnTree,
    opponent: Float[Tensor, "states speeches"],
    preferences: Float[Tensor, "ends ends"],
    *,
    reference: Float[Tensor, "states speeches"],
    regularisation: float,
) -> tuple[Float[Tensor, "states speeches"], TurnValues]:
    """The policy that does best against an opponent, and its values, by backward induction.

    V(s) = tau log sum_a p0(a|s) exp(Q(s, a) / tau); for tau = 0 the largest Q(s, a) of a speech that p0 has.

    Args:
        tree: The conversations.
        opponent: The policy of the other conversation.
        preferences: P(end i preferred to end j).
        reference: p0(a|s).
        regularisation: tau.

    Raises:
        ArgumentError: A policy is none on this tree.
    """
    _, worth = _checked(tree, opponent, opponent, preferences)
    reference = _reference(tree, reference, regularisation)
    hard = regularisation == 0.0

    def value(q: Tensor, s: int) -> Tensor:
        if hard:
            return q[reference[s] > 0.0].amax()
        return regularisation * torch.logsumexp(reference[s].log() + q / regularisation, 0)

    values = _backward(tree, worth, value)
    if hard:
        best = ((values.q == values.v[:, None]) & (reference > 0.0)).double()
        return best / best.sum(1, keepdim=True), values
    return torch.softmax(reference.log() + values.q / regularisation, 1), values


def exploitability(
    tree: TurnTree,
    policy: Float[Tensor, "states speeches"],
    preferences: Float[Tensor, "ends ends"],
    *,
    reference: Float[Tensor, "states speeches"],
    regularisation: float,
) -> float:
    """What the best response to a policy wins beyond 1/2, its value against itself; 0 for the Nash policy alone.

    Args:
        tree: The conversations.
        policy: The policy.
        preferences: P(end i preferred to end j), P + P^T = 1.
        reference: p0(a|s).
        regularisation: tau.

    Raises:
        ArgumentError: A policy is none on this tree, or P + P^T is not 1.
    """
    off = float((preferences.double() + preferences.double().T - 1.0).abs().max())
    if off > _SLACK:
        raise ArgumentError(f"`preferences` + its transpose must be 1, and is {off:.3g} off")
    _, best = best_response(tree, policy, preferences, reference=reference, regularisation=regularisation)
    own = preference_values(tree, policy, policy, preferences, reference=reference, regularisation=regularisation)
    return float(best.v[0] - own.v[0])


def mirror_descent_step(
    tree: TurnTree,
    policy: Float[Tensor, "states speeches"],
    preferences: Float[Tensor, "ends ends"],
    *,
    reference: Float[Tensor, "states speeches"],
    step_size: float,
    regularisation: float,
    mixture: bool = False,
) -> Float[Tensor, "states speeches"]:
    """One step of self-play in every state: pi(a|s)^(1 - eta tau) p0(a|s)^(eta tau) exp(eta Q(s, a)) / Z.

    Q is that of the policy against itself, regularised (the paper's equation 2). A policy that the step leaves alone is
    p0 exp(Q / tau) / Z in every state, its own best response, so that the fixed point is the Nash policy whatever the
    step.

    With `mixture`, the paper's MTPO-tau, Q is that of m = pi^(1 - eta tau) p0^(eta tau) / Z against itself. With steps
    eta_t = 2 / (tau (t + 2)), t = 0, 1, ..., policy and mixture reach the Nash policy (theorem B.2). With one step for
    all rounds the mixture comes to rest where m = p0 exp((1 - eta tau) Q / tau) / Z, near it; with one turn that is the
    Nash policy of the regularisation tau / (1 - eta tau).

    Args:
        tree: The conversations.
        policy: pi_t, positive wherever the reference is.
        preferences: P(end i preferred to end j).
        reference: p0(a|s).
        step_size: eta.
        regularisation: tau.
        mixture: Whether the mixture of policy and reference plays both sides.

    Raises:
        ArgumentError: A policy is none on this tree, or eta tau is above 1.

    Example:
        >>> tree = TurnTree(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))
        >>> preferences = torch.tensor([[0.5, 0.9], [0.1, 0.5]])
        >>> uniform = tree.uniform()
        >>> mirror_descent_step(tree, uniform, preferences, reference=uniform, step_size=1.0, regularisation=0.1)
        tensor([[0.5987, 0.4013]], dtype=torch.float64)
    """
    share = step_size * regularisation
    if not (0.0 < step_size < math.inf and share <= 1.0 + 1e-12):
        raise ArgumentError(
            f"`step_size` is {step_size} and times `regularisation` {share:.3g}; it is positive, and that at most 1"
        )
    start = torch.zeros_like(tree.allowed, dtype=torch.float64)
    # A weight of 0 must not meet the logarithm of 0.
    for weight, p in ((1.0 - share, policy), (share, reference)):
        if weight > 0.0:
            start = start + weight * p.double().log()
    start = start.masked_fill(~tree.allowed, -torch.inf)
    player = torch.softmax(start, 1) if mixture else policy
    q = preference_values(tree, player, player, preferences, reference=reference, regularisation=regularisation).q
    return torch.softmax(start + step_size * q, 1)


def _backward(tree: TurnTree, worth: Tensor, value: Callable[[Tensor, int], Tensor]) -> TurnValues:
    nodes = torch.cat([worth.new_zeros(tree.num_states), worth])
    q = torch.zeros(tree.transitions.shape[:2], dtype=torch.float64)
    for s in reversed(range(tree.num_states)):
        q[s] = tree.transitions[s] @ nodes
        nodes[s] = value(q[s], s)
    return TurnValues(q, nodes[: tree.num_states])


def _checked(tree: TurnTree, policy: Tensor, opponent: Tensor, preferences: Tensor) -> tuple[Tensor, Tensor]:
    """The policy in float64, and what each end is worth against the opponent."""
    if tuple(preferences.shape) != (tree.num_ends, tree.num_ends):
        raise ArgumentError(f"`preferences` has shape {tuple(preferences.shape)}; there are {tree.num_ends} ends")
    policy, opponent = _policy(tree, "policy", policy), _policy(tree, "opponent", opponent)
    return policy, preferences.double() @ tree.reach(opponent)[1]


def _policy(tree: TurnTree, name: str, policy: Tensor) -> Tensor:
    policy = policy.double()
    if policy.shape != tree.allowed.shape:
        raise ArgumentError(f"`{name}` has shape {tuple(policy.shape)}; the tree has {tuple(tree.allowed.shape)}")
    fine = (policy >= 0.0).all() & ((policy.sum(1) - 1.0).abs() < _SLACK).all() & (policy[~tree.allowed] == 0.0).all()
    if not bool(fine):
        raise ArgumentError(f"`{name}` must hold, for each state, probabilities of its speeches that sum to 1")
    return policy / policy.sum(1, keepdim=True)


def _reference(tree: TurnTree, reference: Tensor | None, regularisation: float) -> Tensor:
    if not 0.0 <= regularisation < math.inf:
        raise ArgumentError(f"`regularisation` is {regularisation}; it is not negative, and finite")
    if reference is None:
        raise ArgumentError("`reference` is missing; a regularisation is the cost of leaving it")
    return _policy(tree, "reference", reference)


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    return torch.where(policy > 0.0, policy.log() - reference.log(), 0.0)
