"""Exact tools for preference games on supports that can be enumerated: Nash policies, exploitability, mirror descent.

Two players draw a response each, and the one whose response is preferred wins. With P(i, j) the probability that
response i is preferred to j (P + P^T = 1), a policy pi beats pi' with probability pi^T P pi'. The regularised game

    J(pi, pi') = pi^T P pi' - tau KL(pi || p0) + tau KL(pi' || p0)

has one Nash policy for tau > 0, the same for both players: pi* = p0 exp(P pi* / tau) / Z (Munos et al., "Nash learning
from human feedback", 2312.00886). Everything is float64; leading dimensions of the arguments are games of their own.
"""

import enum
import math

import numpy as np
import torch
from jaxtyping import Bool, Float

from .._typing import Tensor
from ..errors import ArgumentError, EngineError

#: P + P^T may differ from 1 by this much, which is rounding of float32.
_SLACK = 1e-5
#: Newton steps at one regularisation.
_MAX_STEPS = 40


class GameStep(enum.StrEnum):
    """Published updates of a policy in a preference game, one step of mirror descent each."""

    INPO = "inpo"
    """Against itself (Zhang et al., 2407.00617): pi^(1 - eta tau) p0^(eta tau) exp(eta P pi); its eta is 1 / ours."""
    WIND = "wind"
    """The same with the regulariser implicit (Yang et al., 2410.20727): eta / (1 + eta tau) in the place of eta."""
    NASH_MD = "nash_md"
    """Against its mixture with p0 (Munos et al., 2312.00886): m exp(eta P m), m = pi^(1 - eta tau) p0^(eta tau) / Z."""


def preference_against(
    preferences: Float[Tensor, "*games n n"], policy: Float[Tensor, "*games n"]
) -> Float[Tensor, "*games n"]:
    """P(y_i preferred to a response of the policy) for every response i.

    Args:
        preferences: P(i preferred to j); `belief.preference_matrix()` of rewards or of pairwise preferences.
        policy: Probabilities of the responses.

    Example:
        >>> preference_against(torch.tensor([[0.5, 0.9], [0.1, 0.5]]), torch.tensor([0.5, 0.5]))
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """
    against: Tensor = (preferences.double() @ policy.double()[..., None])[..., 0]
    return against


def best_response(
    preferences: Float[Tensor, "*games n n"],
    policy: Float[Tensor, "*games n"],
    reference: Float[Tensor, "*games n"],
    *,
    regularisation: float,
) -> Float[Tensor, "*games n"]:
    """What does best against a policy: p0 exp(P pi / tau) / Z, for tau = 0 the best responses in equal parts.

    Args:
        preferences: P(i preferred to j).
        policy: The opponent.
        reference: p0; responses of probability 0 are outside the game.
        regularisation: tau.

    Raises:
        ArgumentError: An argument is no preference matrix, policy or regularisation.
    """
    payoffs, policy, reference = _game(preferences, policy, reference, regularisation)
    gain = (payoffs @ policy[..., None])[..., 0]
    if regularisation == 0.0:
        gain = gain.masked_fill(reference == 0.0, -torch.inf)
        best = (gain == gain.amax(-1, keepdim=True)).double()
        return best / best.sum(-1, keepdim=True)
    return torch.softmax(reference.log() + gain / regularisation, -1)


def exploitability(
    preferences: Float[Tensor, "*games n n"],
    policy: Float[Tensor, "*games n"],
    reference: Float[Tensor, "*games n"],
    *,
    regularisation: float,
) -> Float[Tensor, "*games"]:
    """What the best response to a policy wins beyond 1/2, its value against itself; 0 for the Nash policy alone.

    max_pi' J(pi', pi) - 1/2 = tau log sum p0 exp((P pi - 1/2) / tau) + tau KL(pi || p0), and max_i (P pi)_i - 1/2 for
    tau = 0. It is at least tau KL(pi || pi*), which is what the Nash policy pi* itself wins beyond 1/2.

    Args:
        preferences: P(i preferred to j).
        policy: The policy; infinite where it gives a response more than 0 that has 0 under the reference.
        reference: p0; responses of probability 0 are outside the game.
        regularisation: tau.

    Raises:
        ArgumentError: An argument is no preference matrix, policy or regularisation.

    Example:
        >>> rock_paper_scissors = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
        >>> uniform = torch.full((3,), 1 / 3)
        >>> exploitability(rock_paper_scissors, torch.tensor([1.0, 0.0, 0.0]), uniform, regularisation=0.0)
        tensor(0.5000, dtype=torch.float64)
    """
    payoffs, policy, reference = _game(preferences, policy, reference, regularisation)
    gain = (payoffs @ policy[..., None])[..., 0]
    if regularisation == 0.0:
        outside = (policy > 0.0) & (reference == 0.0)
        best: Tensor = gain.masked_fill(reference == 0.0, -torch.inf).amax(-1)
        return best.masked_fill(outside.any(-1), torch.inf)
    soft_best = regularisation * torch.logsumexp(reference.log() + gain / regularisation, -1)
    return soft_best + regularisation * _kl(policy, reference)


def nash_policy(
    preferences: Float[Tensor, "*games n n"],
    reference: Float[Tensor, "*games n"],
    *,
    regularisation: float,
    tolerance: float = 1e-10,
) -> Float[Tensor, "*games n"]:
    """The Nash policy of the regularised game.

    tau > 0: damped Newton steps on u = log p0 + P softmax(u) / tau, from large tau down. With A = P - 1/2 antisymmetric
    and C the covariance of softmax(u), the Jacobian I - A C / tau has eigenvalues 1 + i w, w real: it is never
    singular, and the path from p0 at infinite tau does not end. A policy with the largest residual e is within e of the
    Nash policy in total absolute difference, because <A (pi - pi*), pi - pi*> = 0 leaves KL(pi || pi*) + KL(pi* || pi)
    = <residual, pi - pi*>, to which Pinsker's inequality applies. So `tolerance` bounds the error itself.

    tau = 0: a linear programme finds a policy that no response beats with more than 1/2 (von Neumann). There may be
    several; this is then one of them, and not always the limit tau -> 0.

    Args:
        preferences: P(i preferred to j).
        reference: p0; responses of probability 0 are outside the game.
        regularisation: tau.
        tolerance: Largest error, as total absolute difference; at least rounding, about 1e-15 / tau. For tau = 0 the
            largest exploitability.

    Raises:
        ArgumentError: An argument is no preference matrix, policy or regularisation.
        EngineError: The tolerance was not reached.

    Example:
        >>> cycle = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
        >>> nash_policy(cycle, torch.full((3,), 1 / 3), regularisation=0.0)
        tensor([0.3000, 0.3000, 0.4000], dtype=torch.float64)
    """
    payoffs, _, reference = _game(preferences, reference, reference, regularisation)
    if not tolerance > 0.0:
        raise ArgumentError(f"`tolerance` is {tolerance}; it is positive")
    n = payoffs.shape[-1]
    flat, prior = payoffs.reshape(-1, n, n), reference.reshape(-1, n)
    if regularisation == 0.0:
        games = zip(flat, prior, strict=True)
        return torch.stack([_linear_programme(a, p > 0.0, tolerance) for a, p in games]).reshape(reference.shape)
    return _follow(flat, prior, regularisation, tolerance).reshape(reference.shape)


def mirror_descent_step(
    preferences: Float[Tensor, "*games n n"],
    policy: Float[Tensor, "*games n"],
    reference: Float[Tensor, "*games n"],
    *,
    step_size: float,
    regularisation: float,
    step: str = "inpo",
) -> Float[Tensor, "*games n"]:
    """The next policy of a published method on the exact game; see `GameStep` for the formulas.

    INPO and WIND have the Nash policy as their only fixed point. With WIND's eta <= 4 tau each step brings
    KL(pi* || pi) down by 1 / (1 + eta tau) or more: that is magnetic mirror descent (Sokota et al., 2206.05825, theorem
    3.4), whose condition eta <= tau / L^2 holds with L = 1/2 as P is within 1/2 of 1/2. INPO's step eta' is WIND's with
    eta = eta' / (1 - eta' tau). Nash-MD at a constant step comes to rest near the Nash policy, not at it; with eta_t =
    2 / (tau (t + 2)) it gets there: KL(pi* || pi_T) <= 8 / (tau^2 (T + 1)) (Munos et al., theorem 1).

    Args:
        preferences: P(i preferred to j).
        policy: pi_t.
        reference: p0; responses of probability 0 are outside the game.
        step_size: eta, in units of 1 / probability.
        regularisation: tau.
        step: A `GameStep`: `"inpo"`, `"wind"` or `"nash_md"`.

    Raises:
        ArgumentError: An argument is none of those accepted, or eta tau > 1 for INPO or Nash-MD.

    Example:
        >>> matrix = torch.tensor([[0.5, 0.9], [0.1, 0.5]])
        >>> uniform = torch.tensor([0.5, 0.5])
        >>> mirror_descent_step(matrix, uniform, uniform, step_size=1.0, regularisation=0.1)
        tensor([0.5987, 0.4013], dtype=torch.float64)
    """
    payoffs, policy, reference = _game(preferences, policy, reference, regularisation)
    if step not in list(GameStep):
        raise ArgumentError(f"`step` is {step!r}; it is one of {', '.join(repr(str(s)) for s in GameStep)}")
    if not 0.0 < step_size < math.inf:
        raise ArgumentError(f"`step_size` is {step_size}; it is positive and finite")
    if step == GameStep.WIND:
        step_size = step_size / (1.0 + step_size * regularisation)
    share = step_size * regularisation
    if share > 1.0 + 1e-12:
        raise ArgumentError(
            f"`step_size` * `regularisation` is {share:.3g}, which takes more of the reference than there is; at most 1"
        )
    mixture = geometric_mixture(policy, reference, min(share, 1.0))
    opponent = mixture if step == GameStep.NASH_MD else policy
    return torch.softmax(mixture.log() + step_size * (payoffs @ opponent[..., None])[..., 0], -1)


def geometric_mixture(
    policy: Float[Tensor, "*games n"], reference: Float[Tensor, "*games n"], share: float
) -> Float[Tensor, "*games n"]:
    """pi^(1 - share) p0^share / Z.

    Args:
        policy: pi.
        reference: p0.
        share: The reference's, between 0 and 1.

    Example:
        >>> geometric_mixture(torch.tensor([0.8, 0.2]), torch.tensor([0.2, 0.8]), 0.5)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if not 0.0 <= share <= 1.0:
        raise ArgumentError(f"`share` is {share}; it is between 0 and 1")
    # A weight of 0 must not meet the logarithm of 0.
    parts = [w * p.double().log() for w, p in ((1.0 - share, policy), (share, reference)) if w > 0.0]
    return torch.softmax(torch.stack(parts).sum(0), -1)


def _game(
    preferences: Tensor, policy: Tensor, reference: Tensor, regularisation: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The checked game: P - 1/2, antisymmetric, 0 outside the reference's support; policy and reference."""
    preferences, policy, reference = preferences.double(), policy.double(), reference.double()
    if not 0.0 <= regularisation < math.inf:
        raise ArgumentError(f"`regularisation` is {regularisation}; it is not negative, and finite")
    if preferences.dim() < 2 or preferences.shape[-1] != preferences.shape[-2]:
        raise ArgumentError(f"`preferences` has shape {tuple(preferences.shape)}; it is square in its last dimensions")
    for name, p in (("policy", policy), ("reference", reference)):
        if p.shape[-1:] != preferences.shape[-1:]:
            raise ArgumentError(f"`{name}` has shape {tuple(p.shape)} and `preferences` {tuple(preferences.shape)}")
        if not bool(((p >= 0.0).all(-1) & ((p.sum(-1) - 1.0).abs() < _SLACK)).all()):
            raise ArgumentError(f"`{name}` must hold probabilities that sum to 1")
    inside: Bool[Tensor, "*games n n"] = (reference[..., :, None] > 0.0) & (reference[..., None, :] > 0.0)
    transposed = preferences.transpose(-1, -2)
    off = torch.where(inside, (preferences + transposed - 1.0).abs(), 0.0)
    if not bool((off <= _SLACK).all()):
        raise ArgumentError(
            f"`preferences` + its transpose must be 1, and is {float(off.max()):.3g} off; give P(i preferred to j) for "
            "all pairs, 1/2 on the diagonal (average a judge's answers over both orders)"
        )
    payoffs = torch.where(inside, 0.5 * (preferences - transposed), 0.0)
    return payoffs, policy / policy.sum(-1, keepdim=True), reference / reference.sum(-1, keepdim=True)


def _kl(policy: Tensor, reference: Tensor) -> Tensor:
    terms = torch.where(policy > 0.0, policy * (policy.log() - reference.log()), 0.0)
    return terms.sum(-1)


def _follow(payoffs: Tensor, reference: Tensor, tau: float, tolerance: float) -> Tensor:
    """Nash policies of games `(games, n, n)`: Newton's method from large regularisations, where it is easy, to tau."""
    inside = reference > 0.0
    prior = torch.where(inside, reference, 1.0).log()
    # Payoffs of size 1/2 divided by tau carry this much rounding.
    tolerance = max(tolerance, 4.0 * torch.finfo(torch.float64).eps * math.sqrt(payoffs.shape[-1]) / tau)
    reached, factor, u = min(1.0, 1.0 / tau) / 2.0, 2.0, prior
    while True:
        inverse = min(reached * factor, 1.0 / tau)
        last = inverse == 1.0 / tau
        found = _newton(payoffs * inverse, prior, inside, u, tolerance if last else 1e-2)
        if found is not None and last:
            return torch.softmax(found.masked_fill(~inside, -torch.inf), -1)
        if found is not None:
            reached, factor, u = inverse, min(factor**1.5, 4.0), found
        else:
            factor = math.sqrt(factor)
        if factor < 1.0 + 1e-4:
            raise EngineError(
                f"the Nash policy was not found to {tolerance:.1e}: no step leads beyond a regularisation of "
                f"{1.0 / reached:.1e}; use a larger `regularisation` or `tolerance`"
            )


def _newton(payoffs: Tensor, prior: Tensor, inside: Tensor, u: Tensor, tolerance: float) -> Tensor | None:
    """Solutions of u = prior + payoffs softmax(u), shape `(games, n)`; `None` where some are not found soon."""
    eye = torch.eye(payoffs.shape[-1], dtype=torch.float64)

    def at(u: Tensor) -> tuple[Tensor, Tensor]:
        policy = torch.softmax(u.masked_fill(~inside, -torch.inf), -1)
        residual = u - prior - (payoffs @ policy[..., None])[..., 0]
        return policy, torch.where(inside, residual, 0.0)

    policy, residual = at(u)
    for _ in range(_MAX_STEPS):
        unsolved = residual.abs().amax(-1) > tolerance
        if not bool(unsolved.any()):
            return u
        covariance = torch.diag_embed(policy) - policy[..., :, None] * policy[..., None, :]
        move = -torch.linalg.solve(eye - payoffs @ covariance, residual)
        move = torch.where(unsolved[:, None], move, 0.0)
        length = torch.ones_like(policy[:, :1])
        norm = residual.square().sum(-1)
        for _ in range(30):
            policy, trial = at(u + length * move)
            # Armijo's condition on the squared residual, whose slope along a Newton step is -2 |residual|^2.
            fine = ~unsolved | (trial.square().sum(-1) <= (1.0 - 1e-4 * length[:, 0]) * norm)
            if bool(fine.all()):
                break
            length = torch.where(fine[:, None], length, 0.5 * length)
        u, residual = u + length * move, trial
    return None


def _linear_programme(payoffs: Tensor, inside: Tensor, tolerance: float) -> Tensor:
    from scipy.optimize import linprog

    a = payoffs[inside][:, inside].numpy()
    k = len(a)
    # The policy and what the best response to it wins, which is made as small as it can be.
    found = linprog(
        np.r_[np.zeros(k), 1.0],
        A_ub=np.c_[a, -np.ones(k)],
        b_ub=np.zeros(k),
        A_eq=np.r_[np.ones(k), 0.0][None],
        b_eq=[1.0],
        bounds=[(0.0, None)] * k + [(None, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if found.status != 0:
        raise EngineError(f"the linear programme of the game failed: {found.message}")
    policy = np.clip(found.x[:k], 0.0, None)
    policy /= policy.sum()
    if (a @ policy).max() > tolerance:
        raise EngineError(
            f"the linear programme left an exploitability of {(a @ policy).max():.1e}, above `tolerance={tolerance}`"
        )
    result = torch.zeros(len(inside), dtype=torch.float64)
    result[inside] = torch.as_tensor(policy)
    return result
