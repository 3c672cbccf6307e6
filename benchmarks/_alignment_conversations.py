"""MTPO and MTPO-tau on conversations of two turns: mirror descent in every state, on values estimated from rollouts."""

import dataclasses
from collections.abc import Callable

import torch
from _alignment_methods import published
from _alignment_training import Schedule
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment import Method, multi_turn
from bayesrm.programs import ScoredCandidates

SPEECHES, ANSWERS = 3, 3
TAU = 0.1
STEP = 4.0
METHOD = published("mtpo", step=STEP, tau=TAU)
#: MTPO-tau, a quarter of whose mixture is the reference.
MIXED_STEP = 2.5
MIXED = published("mtpo", step=MIXED_STEP, tau=TAU, mixture=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """Speech, answer, speech: the policy speaks at the start and after each of `SPEECHES * ANSWERS` first exchanges.

    Attributes:
        tree: The same, for the exact tools.
        answers: Probability of each answer to each first speech, `(speeches, answers)`.
        reference: Logits of the reference policy, shape `(seeds, states, speeches)`.
        preferences: P(end i preferred to end j), shape `(seeds, ends, ends)`; an end is a state and its speech.
    """

    tree: multi_turn.TurnTree
    answers: Tensor
    reference: Tensor
    preferences: Tensor

    def exploitability(self, logits: Tensor) -> Tensor:
        """Of each run's policy, shape `(seeds,)`."""
        return torch.tensor(
            [
                multi_turn.exploitability(
                    self.tree, one.softmax(1), judge, reference=ref.softmax(1), regularisation=TAU
                )
                for one, judge, ref in zip(logits, self.preferences, self.reference, strict=True)
            ]
        )

    def resting(self) -> Tensor:
        """Where the exact step of `MIXED` leaves the policy, log-probabilities of shape `(seeds, states, speeches)`."""
        found = []
        for judge, ref in zip(self.preferences, self.reference, strict=True):
            p0 = policy = ref.softmax(1)
            for _ in range(400):
                policy = multi_turn.mirror_descent_step(
                    self.tree, policy, judge, reference=p0, step_size=MIXED_STEP, regularisation=TAU, mixture=True
                )
            found.append(policy.log())
        return torch.stack(found)

    def divergence_from(self, other: Tensor, logits: Tensor) -> Tensor:
        """KL(other || policy) of whole conversations in each run, shape `(seeds,)`."""
        log_q = torch.log_softmax(logits, 2)
        by_state = (other.exp() * (other - log_q)).sum(2)
        reached = torch.stack([self.tree.reach(one.exp())[0] for one in other])
        return (reached * by_state).sum(1)


def make_conversations(num_seeds: int) -> Conversations:
    """Random conversations; the judge is cyclic in first and last speech together, and has tastes of its own."""
    draw = torch.Generator().manual_seed(0)
    answers = torch.rand(SPEECHES, ANSWERS, generator=draw, dtype=torch.float64) + 0.3
    answers = answers / answers.sum(1, keepdim=True)
    states = 1 + SPEECHES * ANSWERS
    ends = (states - 1) * SPEECHES
    transitions = torch.zeros(states, SPEECHES, states + ends, dtype=torch.float64)
    for a in range(SPEECHES):
        for e in range(ANSWERS):
            state = 1 + a * ANSWERS + e
            transitions[0, a, state] = answers[a, e]
            for b in range(SPEECHES):
                transitions[state, b, states + (state - 1) * SPEECHES + b] = 1.0
    place = torch.arange(ends)
    kind = (place // (ANSWERS * SPEECHES) + place % SPEECHES) % 3
    beats = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)[(kind[:, None] - kind[None, :]) % 3]
    taste = torch.randn(num_seeds, ends, generator=draw, dtype=torch.float64)
    strength = 1.1 * beats + 0.5 * (taste[:, :, None] - taste[:, None, :])
    reference = 0.8 * torch.randn(num_seeds, states, SPEECHES, generator=draw, dtype=torch.float64)
    return Conversations(multi_turn.TurnTree(transitions), answers, reference, torch.sigmoid(strength))


def train_mtpo(
    world: Conversations, schedule: Schedule, measure: Callable[[Tensor], Tensor], *, seed: int,
    method: Method = METHOD, rollouts: int = 4, records: int = 20,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Trains on sampled speeches and rollouts.

    In each round and state `method.num_candidates` speeches are drawn; each is followed by `rollouts` conversations to
    their end, and each end is judged against one conversation of the same player: the policy, or with a mixture that of
    policy and reference. What the second turn costs in divergence is taken off the first speech's value.

    Args:
        world: The conversations.
        schedule: Rounds, steps and learning rate.
        measure: From logits to a number for each run, for the records.
        seed: Seed of all draws.
        method: MTPO, or with a proposal of `"mixture"` MTPO-tau.
        rollouts: Conversations that finish a first speech, and opponents.
        records: Most records.

    Returns:
        Rounds done at each record, and what was measured, shape `(records, seeds)`.
    """
    share = method.mixture_weight if method.proposal == "mixture" else 0.0
    generator = torch.Generator().manual_seed(seed)
    seeds, states, _ = world.reference.shape
    log_p0 = torch.log_softmax(world.reference, 2)
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=schedule.rate)
    kept_at = {round(schedule.rounds ** (k / records)) for k in range(1, records + 1)}
    turns, found = [0], [measure(world.reference)]
    total = schedule.rounds * schedule.steps

    def draw(probs: Tensor, num: int) -> Tensor:
        flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), num, True, generator=generator)
        return flat.reshape(*probs.shape[:-1], num)

    for turn in range(schedule.rounds):
        log_pi = torch.log_softmax(logits.detach(), 2)
        log_player = torch.log_softmax((1.0 - share) * log_pi + share * log_p0, 2)
        player = log_player.exp()
        n = method.num_candidates
        speeches = draw(player, n)
        own = (torch.arange(states)[None, :, None] - 1) * SPEECHES + speeches
        # From the start, a conversation goes on with an answer and a second speech, for candidates and opponents alike.
        firsts = torch.cat([speeches[:, 0], draw(player[:, 0], rollouts)], 1)[..., None].expand(-1, -1, rollouts)
        answered = draw(world.answers[firsts], 1)[..., 0]
        after = 1 + firsts * ANSWERS + answered
        run = torch.arange(seeds)[:, None, None]
        second = draw(player[run, after], 1)[..., 0]
        cost = TAU * (log_player - log_p0)[run, after, second]
        ends = (after - 1) * SPEECHES + second
        opponents = ends[:, n:, 0]
        judge = world.preferences
        worth = judge[run, own.flatten(1)[..., None], opponents[:, None, :]].mean(2).reshape(seeds, states, n)
        wins = judge[run, ends[:, :n], opponents[:, None, :]]
        worth[:, 0] = (wins - cost[:, :n]).mean(2)
        candidates = _states(worth, log_p0, log_player, log_pi, speeches)
        posterior = method.weigh(candidates)
        for step in range(schedule.steps):
            optimizer.param_groups[0]["lr"] = schedule.rate * (1.0 - (turn * schedule.steps + step) / total)
            log_q = torch.log_softmax(logits, 2).gather(2, speeches).flatten(0, 1)
            optimizer.zero_grad()
            method.loss(log_q, posterior).sum().backward()
            optimizer.step()
        if turn + 1 in kept_at:
            turns.append(turn + 1)
            found.append(measure(logits.detach()))
    return turns, torch.stack(found)


def _states(
    worth: Tensor, log_p0: Tensor, log_player: Tensor, log_pi: Tensor, speeches: Tensor
) -> ScoredCandidates:  # fmt: skip
    """Candidates of every state of every run, the value of a turn in the place of a reward."""
    values = worth.flatten(0, 1)
    taken = [x.gather(2, speeches).flatten(0, 1) for x in (log_p0, log_player, log_pi)]
    belief = brm.RewardBelief(values, torch.zeros(*values.shape, 1, dtype=torch.float64))
    return ScoredCandidates(belief, taken[0], proposal=taken[1], anchor=taken[2])
