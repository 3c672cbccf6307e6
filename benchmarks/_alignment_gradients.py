"""What LIRE, J-BOND, SAIL and BoNBoN descend: the expectation of their losses in closed form, and its minimum."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from _alignment_methods import TEMPERATURE, TILT, published, sampled_gradients
from _alignment_world import World
from torch import Tensor

from bayesrm.alignment import Method, projections

#: From the policy's log q(y) with gradients, of the same without (previous policy, and what draws), and the world.
Population = Callable[[Tensor, Tensor, World], Tensor]


def lire(log_q: Tensor, log_previous: Tensor, world: World, *, n: int, temperature: float = 2.0) -> Tensor:
    """`- E sum_i softmax(log q / T)_i softmax(r / beta)_i` over all tuples of n draws of the reference."""
    tuples = torch.tensor(list(itertools.product(range(len(world.responses)), repeat=n)))
    chance = world.log_reference[:, tuples].sum(2).exp()
    share = torch.softmax(log_q[:, tuples] / temperature, 2)
    worth = torch.softmax(world.rewards[:, tuples] / TEMPERATURE, 2)
    return -(chance * (share * worth).sum(2)).sum(1)


def j_bond(log_q: Tensor, log_previous: Tensor, world: World, *, regularisation: float) -> Tensor:
    """Half of likelihood of the anchor's best of 2, half of KL(q || anchor exp(reward)), and KL(q || anchor)."""
    anchor = log_previous.exp()
    better = (world.rewards[:, None, :] > world.rewards[:, :, None]).double()
    above = torch.einsum("rij,rj->ri", better, anchor)
    best_of_two = anchor * (2.0 * (1.0 - above) - anchor)
    reward = -math.log(16.0) * above.square()
    q, log_ratio = log_q.exp(), log_q - log_previous
    forward = -(best_of_two * log_q).sum(1)
    backward = (q * (log_ratio - reward)).sum(1)
    return 0.5 * forward + 0.5 * backward + regularisation * (q * log_ratio).sum(1)


def sail(log_q: Tensor, log_previous: Tensor, world: World) -> Tensor:
    """DPO's expected loss on pairs of the policy's own draws, whose distribution moves with the policy."""
    tilt = log_q - world.log_reference
    h = TEMPERATURE * (tilt[:, :, None] - tilt[:, None, :])
    wins = torch.sigmoid(world.rewards[:, :, None] - world.rewards[:, None, :])
    loss = -2.0 * wins * torch.nn.functional.logsigmoid(h)
    return torch.einsum("ri,rij,rj->r", log_q.exp(), loss, log_q.exp())


def bonbon(log_q: Tensor, log_previous: Tensor, world: World, *, n: int, alpha: float = 0.005) -> Tensor:
    """The loss at best and worst of n draws of the reference, by the distribution of both together."""
    order = world.rewards.argsort(1)
    p = world.log_reference.exp().gather(1, order)
    upto = torch.nn.functional.pad(p.cumsum(1), (1, 0))
    # All draws between two ranks, by whether each end is met: inclusion and exclusion.
    low, high = upto[:, None, :-1], upto[:, 1:, None]
    inner_low, inner_high = upto[:, None, 1:], upto[:, :-1, None]

    def all_in(a: Tensor, b: Tensor) -> Tensor:
        return (b - a).clamp_min(0.0).pow(n)

    chance = all_in(low, high) - all_in(inner_low, high) - all_in(low, inner_high) + all_in(inner_low, inner_high)
    ranks = torch.arange(p.shape[1])
    chance = torch.where(ranks[:, None] > ranks[None, :], chance, 0.0) + torch.diag_embed(p.pow(n))
    log_q, log_p0 = log_q.gather(1, order), world.log_reference.gather(1, order)
    tilt = log_q - log_p0
    margin = (n - 1) * sum(1.0 / k for k in range(1, n))
    squared = (tilt[:, :, None] - tilt[:, None, :] - margin).square()
    return (chance * ((1.0 - alpha) * squared - alpha * log_q[:, :, None])).sum((1, 2))


@dataclasses.dataclass(frozen=True)
class Descended:
    """A method without a target of its own, and the expectation of its loss.

    Attributes:
        name: Of the method.
        method: With the number of candidates for which the expectation is.
        population: The expected loss.
    """

    name: str
    method: Method
    population: Population


def small() -> list[Descended]:
    """For a world so small that pairs and triples of responses can be listed."""
    lire_three = published("lire", reward_temperature=TEMPERATURE, num_candidates=3)
    return [
        Descended("LIRE, n=3", lire_three, lambda q, a, w: lire(q, a, w, n=3)),
        Descended("J-BOND", published("j_bond"), lambda q, a, w: j_bond(q, a, w, regularisation=1.0)),
        Descended("SAIL", published("sail", beta=TEMPERATURE), sail),
        Descended("BoNBoN, n=3", published("bonbon", n=3), lambda q, a, w: bonbon(q, a, w, n=3)),
    ]


def without_score_function() -> Descended:
    """A control: DPO on the policy's pairs does not descend SAIL's expected loss."""
    method = published("sail", beta=TEMPERATURE, score_function=0.0)
    return Descended("SAIL without its score function", method, sail)


def largest_deviation(world: World, described: Descended, *, num_sets: int, seed: int) -> tuple[float, int]:
    """Largest distance of the mean sampled gradient from the exact one, in standard errors, and of how many numbers.

    The policy is half way to the tilt, so that nothing is special about it.
    """
    log_q = 0.5 * (world.log_reference + Method(TILT, projections.ForwardKL()).weigh(world.candidates()).log_weights)
    logits = world.responses.logits_of(log_q)
    leaf = logits.clone().requires_grad_()
    log_policy = world.responses.log_probs(leaf)
    described.population(log_policy, log_policy.detach(), world).sum().backward()
    assert leaf.grad is not None
    found = sampled_gradients(world, described.method, logits, num_sets=num_sets, seed=seed)
    error = found.std(1) / math.sqrt(num_sets)
    # The gradient of a logit that all logits of its prefix balance is zero in every set.
    varies = error > 1e-12
    deviation = (found.mean(1) - leaf.grad.flatten(1)).abs()[varies] / error[varies]
    return float(deviation.max()), int(varies.sum())


def lowest(world: World, population: Population, *, steps: int = 400) -> Tensor:
    """Log q(y) where an expected loss is lowest from the reference on, by L-BFGS, shape `(rows, responses)`."""
    leaf = world.reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([leaf], max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_q = world.responses.log_probs(leaf)
        loss = population(log_q, log_q.detach(), world).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return world.responses.log_probs(leaf.detach())
