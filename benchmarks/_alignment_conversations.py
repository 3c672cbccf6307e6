"""MTPO on conversations of two turns: mirror descent in every state, on values of turns estimated from rollouts."""

import dataclasses

import torch
from _alignment_methods import published
from _alignment_training import Schedule
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment import multi_turn
from bayesrm.programs import ScoredCandidates

SPEECHES, ANSWERS = 3, 3
TAU = 0.1
STEP = 4.0
METHOD = published("mtpo", step=STEP, tau=TAU)


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
    world: Conversations, schedule: Schedule, *, seed: int, rollouts: int = 4, records: int = 20
) -> tuple[list[int], Tensor]:
    """Trains on sampled speeches and rollouts.

    In each round and state `METHOD.num_candidates` speeches are drawn; each is followed by `rollouts` conversations to
    their end, and each end is judged against one conversation of the same policy. What the second turn costs in
    divergence is taken off the first speech's value.

    Returns:
        Rounds done at each record, and the exploitability, shape `(records, seeds)`.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds, states, _ = world.reference.shape
    log_p0 = torch.log_softmax(world.reference, 2)
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=schedule.rate)
    kept_at = {round(schedule.rounds ** (k / records)) for k in range(1, records + 1)}
    turns, found = [0], [world.exploitability(world.reference)]
    total = schedule.rounds * schedule.steps

    def draw(probs: Tensor, num: int) -> Tensor:
        flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), num, True, generator=generator)
        return flat.reshape(*probs.shape[:-1], num)

    for turn in range(schedule.rounds):
        log_pi = torch.log_softmax(logits.detach(), 2)
        pi = log_pi.exp()
        n = METHOD.num_candidates
        speeches = draw(pi, n)
        own = (torch.arange(states)[None, :, None] - 1) * SPEECHES + speeches
        # From the start, a conversation goes on with an answer and a second speech, for candidates and opponents alike.
        firsts = torch.cat([speeches[:, 0], draw(pi[:, 0], rollouts)], 1)[..., None].expand(-1, -1, rollouts)
        answered = draw(world.answers[firsts], 1)[..., 0]
        after = 1 + firsts * ANSWERS + answered
        run = torch.arange(seeds)[:, None, None]
        second = draw(pi[run, after], 1)[..., 0]
        cost = TAU * (log_pi - log_p0)[run, after, second]
        ends = (after - 1) * SPEECHES + second
        opponents = ends[:, n:, 0]
        judge = world.preferences
        worth = judge[run, own.flatten(1)[..., None], opponents[:, None, :]].mean(2).reshape(seeds, states, n)
        wins = judge[run, ends[:, :n], opponents[:, None, :]]
        worth[:, 0] = (wins - cost[:, :n]).mean(2)
        candidates = _states(worth, log_p0, log_pi, speeches)
        posterior = METHOD.weigh(candidates)
        for step in range(schedule.steps):
            optimizer.param_groups[0]["lr"] = schedule.rate * (1.0 - (turn * schedule.steps + step) / total)
            log_q = torch.log_softmax(logits, 2).gather(2, speeches).flatten(0, 1)
            optimizer.zero_grad()
            METHOD.loss(log_q, posterior).sum().backward()
            optimizer.step()
        if turn + 1 in kept_at:
            turns.append(turn + 1)
            found.append(world.exploitability(logits.detach()))
    return turns, torch.stack(found)


def _states(worth: Tensor, log_p0: Tensor, log_pi: Tensor, speeches: Tensor) -> ScoredCandidates:
    """Candidates of every state of every run, the value of a turn in the place of a reward."""
    values = worth.flatten(0, 1)
    taken = [x.gather(2, speeches).flatten(0, 1) for x in (log_p0, log_pi)]
    belief = brm.RewardBelief(values, torch.zeros(*values.shape, 1, dtype=torch.float64))
    return ScoredCandidates(belief, taken[0], proposal=taken[1], anchor=taken[1])
