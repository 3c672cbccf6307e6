"""The value of a reply in a conversation that goes on, as a reward for `align` (Shani et al., MTPO, 2405.14655)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

from ..beliefs import RewardBelief
from ..errors import ArgumentError
from ._scoring import Preferences, check_preferences
from .policy import Policy
from .rollouts import Environment, Message, rollouts


@dataclasses.dataclass(frozen=True)
class TurnReward:
    """Q(history, reply): how often the conversation that a reply leads to is preferred to one of the policy's own.

    Every reply is answered by the environment and the conversation finished by the policy as it is now; opponents are
    drawn from the same start. The mean preference of the finished conversation over the opponents, less what the turns
    to come cost in divergence from the reference, is an unbiased estimate of Q of the policy against itself. With the
    method of `inference/alignment/mtpo.py`, a `targets.MirrorDescent(payoff="reward")`, and histories as prompts,
    `align` is MTPO. With a `mixture`, both sides are played by the geometric mixture of policy and reference: MTPO-tau,
    whose mixture is here formed token by token, where the paper's is one of whole turns.

    The belief that it returns has the estimate as mean and no variance; replies of one history share their opponents.
    The random numbers follow from the seed, the history and the replies: the same question has the same answer, and
    the replies of another round have others.

    Attributes:
        policy: The policy that is aligned.
        environment: The other party.
        preferences: P(conversation i preferred to j), from starts and lists of message lists after them; for instance
            `lambda starts, ends: posterior.predict_preferences(starts, ends).preference_matrix()`.
        max_turns: Most replies of a conversation.
        num_opponents: Conversations that each start is compared with.
        num_continuations: Times that the conversation after a reply is finished.
        temperature: Of the draws.
        regularisation: Cost of a nat of divergence from the reference in the turns after the reply: the method's tau,
            so that alignment comes to rest at the Nash policy of whole conversations. 0 leaves these turns' cost out.
        mixture: Share of the reference in the mixture that plays both sides: the method's `step * tau` for MTPO-tau,
            0 for the policy itself.
        seed: Seed of the draws.

    Raises:
        ArgumentError: A number is out of range; or, when called, a history does not begin with the user.
    """

    policy: Policy
    environment: Environment
    preferences: Preferences
    max_turns: int = 2
    num_opponents: int = 4
    num_continuations: int = 1
    temperature: float = 1.0
    regularisation: float = 0.0
    mixture: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_turns", "num_opponents", "num_continuations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"`{name}` is {value!r}; it is a positive whole number")
        if not 0.0 < self.temperature < math.inf:
            raise ArgumentError(f"`temperature` is {self.temperature}; it is a positive number")
        if not 0.0 <= self.regularisation < math.inf:
            raise ArgumentError(f"`regularisation` is {self.regularisation}; it is not negative, and finite")
        if not 0.0 <= self.mixture <= 1.0:
            raise ArgumentError(f"`mixture` is {self.mixture}; the reference's share lies between 0 and 1")

    def __call__(self, prompts: Sequence[Any], candidates: Sequence[Sequence[str]]) -> RewardBelief:
        """Values of the replies `candidates` to the histories `prompts`, shape `(B, most candidates)`."""
        most = max(map(len, candidates))
        mean = torch.zeros(len(prompts), most)
        mask = torch.zeros(len(prompts), most, dtype=torch.bool)
        for row, (prompt, replies) in enumerate(zip(prompts, candidates, strict=True)):
            history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            start = 1 + next((i for i, m in enumerate(history) if m["role"] == "user"), len(history))
            if start > len(history) or history[-1]["role"] != "user":
                raise ArgumentError(f"history {row} must hold a message of the user and end with one")
            mean[row, : len(replies)] = self._values(history, start, replies)
            mask[row, : len(replies)] = True
        return RewardBelief(mean, torch.zeros(len(prompts), most, 1), mask)

    def _values(self, history: list[Message], start: int, replies: Sequence[str]) -> torch.Tensor:
        question = repr(list(replies))
        (opponents,) = rollouts(
            [history[:start]], self._respond(f"0 {question}", []), self.environment,
            num_rollouts=self.num_opponents, max_turns=self.max_turns,
        )  # fmt: skip
        finished = [
            self._finished(history, reply, f"{1 + n} {question}")
            for reply in replies
            for n in range(self.num_continuations)
        ]
        ends = [*(talk[start:] for talk, _ in finished), *(talk.turns for talk in opponents)]
        matrix = check_preferences(self.preferences, [history[:start]], [ends])[0].double()
        cost = self.regularisation * torch.tensor([divergence for _, divergence in finished], dtype=torch.float64)
        worth = matrix[: len(finished), len(finished) :].mean(1) - cost
        return worth.reshape(len(replies), self.num_continuations).mean(1).to(torch.float32)

    def _finished(self, history: list[Message], reply: str, number: str) -> tuple[list[Message], float]:
        """The conversation after a reply, finished by environment and policy, and its log-ratio to the reference."""
        talk: list[Message] = [*history, {"role": "assistant", "content": reply}]
        left = self.max_turns - sum(message["role"] == "assistant" for message in talk)
        answer = self.environment(list(talk))
        if answer is None or left < 1:
            return talk, 0.0
        talk = [*talk, {"role": "user", "content": answer}]
        ratios: list[float] = []
        ((rest,),) = rollouts(
            [talk], self._respond(number, ratios), self.environment, num_rollouts=1, max_turns=left
        )  # fmt: skip
        return list(rest.messages), math.fsum(ratios)

    def _respond(self, number: str, ratios: list[float]) -> Any:
        """Draws a reply to each of several conversations; equal ones by turns, so that they differ.

        Where divergence costs something, the replies' log-ratios of what drew them to the reference go to `ratios`.
        """
        mixture = (self.policy.reference, self.mixture) if self.mixture else None

        def respond(conversations: list[list[Message]]) -> list[str]:
            seeds, seen = [], dict[str, int]()
            for conversation in conversations:
                text = repr([(m["role"], m["content"]) for m in conversation])
                seen[text] = seen.get(text, 0) + 1
                seeds.append(xxhash.xxh3_64_intdigest(f"{self.seed} {number} {seen[text]} {text}".encode()) >> 33)
            drawn = self.policy.generate(
                conversations, 1, seed=seeds, temperature=self.temperature, mixture=mixture
            )  # fmt: skip
            if self.regularisation:
                with torch.no_grad(), self.policy.using(self.policy.reference):
                    of_reference = self.policy.log_probs(self.policy.sequences(drawn)).tolist()
                ratios.extend(group[0].log_prob - value for group, value in zip(drawn, of_reference, strict=True))
            return [group[0].text for group in drawn]

        return respond
