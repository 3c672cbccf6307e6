"""The published methods with settings for the enumerable world, and how near each should come to its own target."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from _alignment_training import Schedule, propose
from _alignment_world import World
from torch import Tensor

import bayesrm as brm
from bayesrm import _ready_files
from bayesrm.alignment import Method, games, projections
from bayesrm.alignment.projections import TokenPaths
from bayesrm.programs import ExponentialTilt

TEMPERATURE = 0.5
BEST_OF = 4
#: KL regularisation of the preference games, in certain wins for a nat.
TAU = 0.1
STEP = 4.0
TILT = brm.GoodnessPosterior(ExponentialTilt(TEMPERATURE))
#: Nash-MD's weight of the reference in the opponent.
MIXTURE = 0.2


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method that is trained.

    Attributes:
        name: Of the method.
        method: Its pair of target and projection.
        rate: First step size.
        curvature: c, where the expected loss has the Hessian `c F` at its minimum, F being the Fisher information of
            the policy. A squared error of pairs has 4, and a step of mirror descent with rate `step` and regularisation
            tau a factor `step tau`, as it goes only that part of the way to the Nash policy.
        own_target: log-density of what it should reach, of all responses.
        game: Whether it plays the cyclic preference game.
        steps: Gradient steps a round.
    """

    name: str
    method: Method
    rate: float
    curvature: float
    own_target: Callable[[World], Tensor]
    game: bool = False
    steps: int = 2

    def schedule(self, rounds: int) -> Schedule:
        """For that many rounds."""
        return Schedule(rounds, self.steps, self.rate)


def published(name: str, **settings: Any) -> Method:
    """A method of `inference/alignment/`."""
    method: Method = _ready_files.load_build("inference/alignment", name)(**settings)
    return method


def exact(target: object) -> Callable[[World], Tensor]:
    """Log-density of a target on all responses."""
    return lambda world: Method(target, projections.ForwardKL()).weigh(world.candidates()).log_weights  # type: ignore[arg-type]


def nash(world: World) -> Tensor:
    """Log-density of the Nash policy of the regularised game."""
    return games.nash_policy(world.preferences, world.log_reference.exp(), regularisation=TAU).log()


def nash_md_rest(world: World) -> Tensor:
    """Where Nash-MD with a constant step comes to rest: `pi = p0 exp(P m / tau) / Z` against its mixture m with p0."""
    reference = policy = world.log_reference.exp()
    for _ in range(2000):
        policy = games.mirror_descent_step(
            world.preferences, policy, reference, step_size=MIXTURE / TAU, regularisation=TAU, step="nash_md"
        )
    return policy.log()


def entries() -> list[Entry]:
    """The methods that should reach a target of their own."""
    soft = published("soft_q_learning", beta=TEMPERATURE, reference=True, reversed_roles=0.5, anchor_rate=1.0)
    bond = published("bond", n=BEST_OF, proposal="reference")
    # WIND's eta is such that its step of mirror descent is the same as INPO's.
    wind = functools.partial(published, "wind", eta=STEP / (1.0 - STEP * TAU), tau=TAU)
    inpo = published("inpo", eta=1.0 / STEP, tau=TAU, num_candidates=4)
    nash_md = published("nash_md", tau=TAU, mixture=MIXTURE)
    share = STEP * TAU
    return [
        Entry("BRAIn", published("brain", beta=TEMPERATURE), 2.0, 1 - 1 / 8, exact(TILT)),
        Entry("RLHF", published("rlhf", beta=TEMPERATURE, num_candidates=8), 1.0, 1.0, exact(TILT), steps=1),
        Entry("soft Q-learning", soft, 1.0, 1 / 3, exact(TILT)),
        Entry("BOND", bond, 0.5, 1.0, exact(bond.target)),
        Entry("INPO", inpo, 0.25, 4 * share, nash, game=True),
        Entry("WIND, squared", wind(loss="squared"), 0.25, 4 * share, nash, game=True),
        Entry("WIND, NCE", wind(loss="nce"), 2.0, 0.5 * share, nash, game=True),
        Entry("WIND, KL", wind(loss="kl"), 2.0, (1 - 1 / 8) * share, nash, game=True),
        Entry("Nash-MD", nash_md, 2.0, MIXTURE, nash_md_rest, game=True, steps=1),
    ]


@dataclasses.dataclass(frozen=True)
class Expected:
    """How far from its target stochastic gradient descent should end, in nats of KL divergence.

    Attributes:
        unlearnt: `|theta_0 - theta*|^2 / (2 c sum of the step sizes)`, the bound for gradient descent on a convex loss.
        noise: What the noise of the gradient keeps alive, with steps that fall linearly to 0.
        bias: How far the expected gradient, which is not zero at the target, moves the minimum.
    """

    unlearnt: float
    noise: float
    bias: float

    @property
    def bound(self) -> float:
        """The sum, with twice the noise and the bias, which are of the linearised dynamics."""
        return self.unlearnt + 2.0 * (self.noise + self.bias)


def expected_end(world: World, entry: Entry, schedule: Schedule, *, num_sets: int, seed: int) -> Expected:
    """Derives how near a method comes from the gradients of sampled losses at its target.

    In the eigenbasis of the Fisher information F, with eigenvalue f, `h = c f` and gradient noise of variance s, the
    variance of a parameter under step sizes that fall linearly from a to 0 in K steps ends at
    `a^2 s / K^2 int t^2 exp(-h a t^2 / K) dt = sqrt(pi) / 4 s sqrt(a / K) h^(-3/2)`, and at no more than `a^2 s K / 3`.
    Steps on the same candidates add their noise before it is squared. The KL divergence is half f times that.
    """
    responses, rows = world.responses, len(world.rewards)
    log_target = entry.own_target(world)
    if entry.method.needs_tokens:
        # The levels of these logits are values; learning them is not in the bound.
        logits = responses.logits_of(entry.method.target.log_density(world.candidates()), normalise=False)
    else:
        logits = responses.logits_of(log_target)
    gap = logits - world.reference
    gap = gap - gap.mean(-1, keepdim=True)
    unlearnt = gap.square().sum((1, 2)) / (2.0 * entry.curvature * schedule.total_rate)

    gradient = sampled_gradients(world, entry.method, logits, num_sets=num_sets, seed=seed)
    mean = gradient.mean(1)
    information, basis = torch.linalg.eigh(fisher(world, logits))
    inside = information > 1e-6
    s = torch.einsum("rmk,rkj->rmj", gradient - mean[:, None], basis).square().sum(1) / (num_sets - 1)
    h = entry.curvature * information.clamp_min(1e-6)
    rate, total = schedule.rate, schedule.rounds * schedule.steps
    variance = 0.25 * math.sqrt(math.pi) * s * math.sqrt(rate / total) * h**-1.5
    variance = schedule.steps * torch.minimum(variance, rate**2 * s * total / 3.0)
    noise = 0.5 * torch.where(inside, information * variance, 0.0).sum(1)

    pull = torch.einsum("rk,rkj->rj", mean, basis).square() - s / num_sets
    shift = torch.minimum(pull / h.square(), pull.abs() * schedule.total_rate**2)
    bias = 0.5 * torch.where(inside, information * shift, 0.0).sum(1)
    return Expected(float(unlearnt.mean()), float(noise.mean()), max(0.0, float(bias.sum() / rows)))


def sampled_gradients(world: World, method: Method, logits: Tensor, *, num_sets: int, seed: int) -> Tensor:
    """Gradients of the losses of independent sets of candidates at a policy, shape `(rows, sets, parameters)`.

    Args:
        world: The world.
        method: The method.
        logits: The policy, and the anchor.
        num_sets: Sets of each row.
        seed: Of the candidates.
    """
    many = repeated(world, num_sets)
    policy = logits.repeat_interleave(num_sets, 0)
    generator = torch.Generator().manual_seed(seed)
    places, proposal = propose(many, method, policy, policy, generator)
    log_policy = world.responses.log_probs(policy)
    candidates = many.candidates(places, proposal=proposal, anchor=log_policy, sources=method.sources)
    leaf = policy.clone().requires_grad_()
    taken: Tensor | TokenPaths
    if method.needs_tokens:
        taken = world.responses.paths(leaf, policy, places)
    else:
        taken = world.responses.log_probs(leaf).gather(1, places)
    method.loss(taken, method.weigh(candidates)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.reshape(len(logits), num_sets, -1)


def repeated(world: World, times: int) -> World:
    """Each row many times, one after the other."""
    reference, rewards, judged = (
        x.repeat_interleave(times, 0) for x in (world.reference, world.rewards, world.preferences)
    )
    return World(world.responses, reference, rewards, judged, world.num_seeds)


def scores(world: World, logits: Tensor) -> Tensor:
    """Gradients of log q(y) with respect to the logits, shape `(rows, responses, parameters)`."""
    taken = world.responses.path_matrix.T
    shape = (len(world.responses), -1, world.responses.num_tokens)
    visited = taken.reshape(shape).sum(2, keepdim=True)
    return taken[None] - (visited[None] * torch.softmax(logits, -1)[:, None]).flatten(2)


def fisher(world: World, logits: Tensor) -> Tensor:
    """Fisher information of the logits, shape `(rows, parameters, parameters)`."""
    score, q = scores(world, logits), world.responses.log_probs(logits).exp()
    return torch.einsum("ry,ryj,ryk->rjk", q, score, score)
