"""Values of turns as a reward for `align`."""

import dataclasses

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import Method, align, projections, targets
from bayesrm.alignment.turn_reward import TurnReward
from bayesrm.errors import ArgumentError

from . import policies

START = [{"role": "user", "content": "w1"}]


def replies(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def counting(starts, ends):
    """The conversation whose replies say `w1` more often is preferred."""
    counts = torch.tensor([[" ".join(replies(end)).split().count("w1") for end in of_start] for of_start in ends])
    return torch.sigmoid((counts[:, :, None] - counts[:, None, :]).double())


def environment(messages):
    return "w2" if len(replies(messages)) < 2 else None


def reward(policy, **settings):
    return TurnReward(policy, environment, counting, **{"max_turns": 2, "num_opponents": 3} | settings)


def test_a_last_reply_is_compared_with_opponents_from_the_start():
    policy = policies.policy("gpt2", limits=(32, 4))
    history = [*START, {"role": "assistant", "content": "w1 w1"}, {"role": "user", "content": "w2"}]
    belief = reward(policy)([history], [["w1 w1 w1", "w3"]])
    # Nothing follows the second reply: only the opponents are random, and they are shared.
    assert belief.mean[0, 0] > belief.mean[0, 1]
    again = reward(policy)([history], [["w1 w1 w1", "w3"]])
    assert torch.equal(belief.mean, again.mean)


def test_the_estimate_is_unbiased():
    policy = policies.policy("gpt2", count=3, limits=(24, 1), spread=0.1)
    reply = "w1"
    drawn = torch.cat([reward(policy, num_opponents=2, seed=s)([START], [[reply]]).mean[0] for s in range(300)])
    exact = torch.zeros(())
    # All conversations: two replies of one token each; token 0 ends at once and says nothing.
    words = ["", "w0", "w1", "w2"]

    def probabilities(history):
        sequences = policy.encode([history] * 3, words[1:], on_long="shorten")
        with torch.no_grad():
            p = policy.log_probs(sequences).exp().double()
        return torch.cat([1 - p.sum(0, keepdim=True), p])

    def after(first):
        return [*START, {"role": "assistant", "content": first}, {"role": "user", "content": "w2"}]

    first = probabilities(START)
    counts = {w: float(w == "w1") for w in words}
    finals = {
        (a, b): float(first[i] * probabilities(after(a))[j]) for i, a in enumerate(words) for j, b in enumerate(words)
    }
    second = probabilities(after(reply))
    for j, b in enumerate(words):
        for (a, c), p in finals.items():
            gap = torch.tensor(counts[reply] + counts[b] - counts[a] - counts[c])
            exact = exact + second[j] * p * torch.sigmoid(gap)
    error = float(drawn.double().std()) / len(drawn) ** 0.5
    assert abs(float(drawn.double().mean()) - float(exact)) < 4.5 * error


def test_align_raises_the_value_of_both_turns():
    policy = policies.policy("gpt2", limits=(32, 4), spread=0.2)
    histories = [
        START,
        *([*START, {"role": "assistant", "content": f"w{i}"}, {"role": "user", "content": "w2"}] for i in (1, 3)),
    ]
    method = Method(
        targets.MirrorDescent(step=20.0, regularisation=0.01, payoff="reward"), projections.ListwiseCrossEntropy(),
        num_candidates=6,
    )  # fmt: skip
    training = brm.Training(epochs=1.0, batch_size=3, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)
    before = policy.snapshot()

    def said():
        drawn = policy.generate(histories, 60, seed=5)
        return sum(r.text.split().count("w1") for group in drawn for r in group) / 180

    first = said()
    align(policy, reward(policy), histories, method=method, rounds=6, training=training)
    assert any(not torch.equal(before.values[n], p) for n, p in policy.trainable.items())
    assert said() > first + 0.2


def test_bad_settings_and_histories():
    policy = policies.policy("gpt2")
    with pytest.raises(ArgumentError, match="max_turns"):
        reward(policy, max_turns=0)
    with pytest.raises(ArgumentError, match="history 0"):
        reward(policy)([[{"role": "assistant", "content": "w1"}]], [["w1"]])
    assert dataclasses.replace(reward(policy), seed=3).seed == 3
