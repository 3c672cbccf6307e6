"""Rounds of propose, score, weigh, project, on tables of logits instead of language models."""

import dataclasses
from collections.abc import Callable

import torch
from _alignment_world import World, divergence
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment import Method
from bayesrm.alignment.projections import TokenPaths
from bayesrm.engines.response_posterior import response_posterior


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast a policy is trained.

    Attributes:
        rounds: Rounds, each with candidates of its own.
        steps: Gradient steps of a round.
        rate: First step size of stochastic gradient descent; it falls linearly to 0.
    """

    rounds: int = 1000
    steps: int = 2
    rate: float = 2.0

    @property
    def total_rate(self) -> float:
        """Sum of the step sizes."""
        return 0.5 * self.rate * self.rounds * self.steps


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Policies along a training.

    Attributes:
        rounds: Rounds done at each record.
        log_probs: log q(y) of all responses at each record, shape `(records, rows, responses)`.
        logits: The last policy's.
    """

    rounds: list[int]
    log_probs: Tensor
    logits: Tensor

    @property
    def last(self) -> Tensor:
        """The last policy's log q(y), shape `(rows, responses)`."""
        return self.log_probs[-1]


def train(
    world: World,
    method: Method,
    schedule: Schedule,
    *,
    seed: int,
    records: int = 20,
    share: Callable[[Tensor], Tensor] | None = None,
    belief: brm.RewardBelief | None = None,
    smooth: bool = False,
) -> Trained:
    """Trains one policy for each row by the method's own weights and loss on sampled candidates.

    Rows are independent runs: losses are summed over them, and plain gradient descent lets none act on another.

    Args:
        world: What is to be learnt.
        method: The method.
        schedule: Its length and speed.
        seed: Of the candidates.
        records: How often the policy is kept, at most, more densely at the beginning.
        share: Makes logits out of parameters of the same shape, for a policy that cannot be everything.
        belief: About all responses, instead of the true rewards.
        smooth: Smooth the tails of the weights of at least 25 candidates, which methods do not.
    """
    generator = torch.Generator().manual_seed(seed)
    share = share or (lambda parameters: parameters)
    parameters = share(world.reference).clone().requires_grad_()
    optimizer = torch.optim.SGD([parameters], lr=schedule.rate)
    anchor = share(parameters).detach().clone()
    kept_at = {round(schedule.rounds ** (k / records)) for k in range(1, records + 1)}
    kept = [(0, world.responses.log_probs(anchor))]
    done, total = 0, schedule.rounds * schedule.steps
    for turn in range(1, schedule.rounds + 1):
        logits = share(parameters).detach()
        places, proposal = propose(world, method, logits, anchor, generator)
        candidates = world.candidates(
            places,
            proposal=proposal,
            anchor=world.responses.log_probs(anchor),
            sources=method.sources,
            belief=belief,
        )
        posterior = response_posterior(method.target, candidates) if smooth else method.weigh(candidates)
        for _ in range(schedule.steps):
            optimizer.param_groups[0]["lr"] = schedule.rate * (1.0 - done / total)
            logits = share(parameters)
            policy: Tensor | TokenPaths
            if method.needs_tokens:
                policy = world.responses.paths(logits, anchor, places)
            else:
                policy = world.responses.log_probs(logits).gather(1, places)
            optimizer.zero_grad()
            method.loss(policy, posterior).sum().backward()
            optimizer.step()
            done += 1
        logits = share(parameters).detach()
        if turn % method.anchor_every == 0:
            anchor = anchor + method.anchor_rate * (logits - anchor)
        if turn in kept_at:
            kept.append((turn, world.responses.log_probs(logits)))
    return Trained([turn for turn, _ in kept], torch.stack([lp for _, lp in kept]), share(parameters).detach())


def propose(
    world: World, method: Method, logits: Tensor, anchor: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws the candidates of a round, with replacement: their places and log-probabilities, both `(rows, n)`."""
    known = {
        "reference": lambda: world.reference,
        "policy": lambda: logits,
        "anchor": lambda: anchor,
        "mixture": lambda: world.responses.mixture(logits, world.reference, method.mixture_weight),
    }
    places, proposal = [], []
    for source in dict.fromkeys(method.sources):
        log_probs = world.responses.log_probs(known[source]())
        drawn = torch.multinomial(log_probs.exp(), method.sources.count(source), True, generator=generator)
        places.append(drawn)
        proposal.append(log_probs.gather(1, drawn))
    order = [s for source in dict.fromkeys(method.sources) for s, x in enumerate(method.sources) if x == source]
    back = torch.tensor(order).argsort()
    return torch.cat(places, 1)[:, back], torch.cat(proposal, 1)[:, back]


def to_target(world: World, trained: Trained, log_target: Tensor) -> Tensor:
    """KL(policy || target) at each record, shape `(records, seeds)`."""
    return torch.stack([world.by_seed(divergence(lp, log_target)) for lp in trained.log_probs])
