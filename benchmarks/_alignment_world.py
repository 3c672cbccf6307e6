"""A world of responses so small that all of them can be listed, for many independent runs at once."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment.projections import TokenPaths
from bayesrm.programs import ScoredCandidates


class Responses:
    """All responses of at most `length` tokens, and the decisions of an autoregressive policy that lead to them.

    A policy is a table of logits, shape `(rows, prefixes, tokens)`: at each prefix shorter than `length` it goes on
    with one of the symbols or ends. A row is one prompt of one run.

    Args:
        num_symbols: Tokens beside the end.
        length: Longest response; it needs no end.
    """

    def __init__(self, num_symbols: int, length: int) -> None:
        symbols = range(num_symbols)
        self.num_symbols, self.length, self.num_tokens = num_symbols, length, num_symbols + 1
        self.prefixes = [p for k in range(length) for p in itertools.product(symbols, repeat=k)]
        self.texts = [*self.prefixes, *itertools.product(symbols, repeat=length)]
        place = {prefix: k for k, prefix in enumerate(self.prefixes)}
        self.decisions = torch.zeros(len(self.texts), length, dtype=torch.int64)
        self.mask = torch.zeros(len(self.texts), length, dtype=torch.bool)
        for k, text in enumerate(self.texts):
            tokens = text if len(text) == length else (*text, num_symbols)
            for t, token in enumerate(tokens):
                self.decisions[k, t] = place[text[:t]] * self.num_tokens + token
                self.mask[k, t] = True
        self.depth = torch.tensor([len(prefix) for prefix in self.prefixes])
        self.path_matrix = torch.zeros(len(self.prefixes) * self.num_tokens, len(self.texts), dtype=torch.float64)
        for k in range(len(self.texts)):
            self.path_matrix[self.decisions[k, self.mask[k]], k] = 1.0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_free(self) -> int:
        """Free parameters of a row's policy."""
        return len(self.prefixes) * self.num_symbols

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log q(y) of all responses, shape `(rows, responses)`."""
        return torch.log_softmax(logits, -1).flatten(1) @ self.path_matrix

    def logits_of(self, log_density: Tensor, *, normalise: bool = True) -> Tensor:
        """Logits of the policy with these log-densities: those of all responses behind a token, or normalised."""
        reach = (self.path_matrix[None] > 0).expand(len(log_density), -1, -1)
        joint = log_density[:, None, :].masked_fill(~reach, -torch.inf)
        behind = torch.logsumexp(joint, 2).reshape(len(log_density), -1, self.num_tokens)
        return torch.log_softmax(behind, -1) if normalise else behind

    def mixture(self, logits: Tensor, reference: Tensor, weight: float) -> Tensor:
        """Logits of the geometric mixture of two policies, token by token."""
        both = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
        return (1.0 - weight) * both[0] + weight * both[1]

    def paths(self, logits: Tensor, target: Tensor, places: Tensor) -> TokenPaths:
        """Token-level quantities of the responses at `places`, shape `(rows, n)`, Q-values being the logits."""
        steps = self.decisions[places].flatten(1)
        prefixes, shape = steps // self.num_tokens, (*places.shape, self.length)
        log_probs, target_log_probs = (
            torch.log_softmax(x, -1).flatten(1).gather(1, steps).reshape(shape) for x in (logits, target)
        )
        values, target_values = (torch.logsumexp(x, -1).gather(1, prefixes).reshape(shape) for x in (logits, target))
        return TokenPaths(log_probs, target_values, self.mask[places], values, target_log_probs)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Rewards and preferences of all responses, and a reference policy; rows are the prompts of every run.

    Attributes:
        responses: What can be said.
        reference: Logits of the reference policy, shape `(rows, prefixes, tokens)`.
        rewards: True rewards, shape `(rows, responses)`; mean 0 and standard deviation 1 under the reference.
        preferences: P(i preferred to j), shape `(rows, responses, responses)`.
        num_seeds: Runs; rows are prompts within runs.
    """

    responses: Responses
    reference: Tensor
    rewards: Tensor
    preferences: Tensor
    num_seeds: int

    @property
    def log_reference(self) -> Tensor:
        """Log p0(y), shape `(rows, responses)`."""
        return self.responses.log_probs(self.reference)

    def by_seed(self, values: Tensor) -> Tensor:
        """Means over each run's prompts, shape `(seeds,)`."""
        return values.reshape(self.num_seeds, -1).mean(1)

    def candidates(
        self,
        places: Tensor | None = None,
        *,
        proposal: Tensor | None = None,
        anchor: Tensor | None = None,
        sources: tuple[str, ...] | None = None,
        belief: brm.RewardBelief | None = None,
    ) -> ScoredCandidates:
        """The responses at `places`, shape `(rows, n)`, scored by the true reward; all responses by default.

        Args:
            places: Which responses.
            proposal: Their log-probabilities under what drew them, shape `(rows, n)`.
            anchor: Log-probabilities of all responses under the previous policy.
            sources: What drew the candidates of each place.
            belief: About all responses, instead of the true rewards.
        """
        belief = belief or brm.RewardBelief(self.rewards, torch.zeros(*self.rewards.shape, 1, dtype=torch.float64))
        if places is None:
            return ScoredCandidates(belief, self.log_reference, anchor=anchor, preferences=self.preferences)
        rows = torch.arange(len(places))[:, None]
        return ScoredCandidates(
            brm.RewardBelief(belief.mean[rows, places], belief.root[rows, places]),
            self.log_reference[rows, places],
            proposal=proposal,
            anchor=None if anchor is None else anchor[rows, places],
            preferences=self.preferences[rows[:, :, None], places[:, :, None], places[:, None, :]],
            sources=sources,
        )


def make_world(
    seeds: Sequence[int], *, num_prompts: int = 2, num_symbols: int = 3, length: int = 3, cyclic: bool = False
) -> World:
    """Random worlds, one for each seed.

    A reward is the sum of effects of each token at its place, of pairs of neighbouring tokens and of the length. A
    cyclic preference makes responses rock, paper or scissors by their first token and their length, which wins 3 to 1,
    and gives the better reward an edge.
    """
    responses = Responses(num_symbols, length)
    features = ngrams(responses)
    reference, rewards, preferences = [], [], []
    kind = torch.tensor([(len(text) + sum(text[:1])) % 3 for text in responses.texts])
    beats = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)[(kind[:, None] - kind[None, :]) % 3]
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        for _ in range(num_prompts):
            logits = 0.8 * normal(len(responses.prefixes), responses.num_tokens)
            log_p0 = responses.log_probs(logits[None])[0]
            reward = standardised(features @ normal(features.shape[1]), log_p0)
            reference.append(logits)
            rewards.append(reward)
            preferences.append(bradley_terry(0.3 * reward, 1.1 * beats) if cyclic else bradley_terry(reward))
    parts = torch.stack(reference), torch.stack(rewards), torch.stack(preferences)
    return World(responses, *parts, num_seeds=len(seeds))


def bradley_terry(rewards: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    """P(i preferred to j), shape `(..., responses, responses)`, with `extra` beside the difference of the rewards."""
    return torch.sigmoid(rewards[..., :, None] - rewards[..., None, :] + extra)


def standardised(rewards: Tensor, log_p0: Tensor) -> Tensor:
    """Rewards with mean 0 and standard deviation 1 under the reference."""
    p0 = log_p0.exp()
    centred = rewards - (p0 * rewards).sum(-1, keepdim=True)
    return centred / (p0 * centred.square()).sum(-1, keepdim=True).sqrt()


def ngrams(responses: Responses) -> Tensor:
    """Indicators of tokens at their places, of pairs of neighbours, and of lengths, `(responses, features)`."""
    v, length = responses.num_symbols, responses.length
    found = torch.zeros(len(responses), v * length + v * v + length, dtype=torch.float64)
    for k, text in enumerate(responses.texts):
        for t, token in enumerate(text):
            found[k, t * v + token] = 1.0
        for first, second in itertools.pairwise(text):
            found[k, v * length + first * v + second] += 1.0
        if text:
            found[k, v * length + v * v + len(text) - 1] = 1.0
    return found


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; `log_p` may be minus infinity."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
