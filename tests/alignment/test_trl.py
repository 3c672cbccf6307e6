"""Rewards and data sets for TRL against computations with plain loops, and TRL's own trainers with them."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import bayesrm as brm
from bayesrm.alignment.trl import (
    LeftOut,
    PosteriorReward,
    best_of_n_dataset,
    preference_dataset,
    weighted_preference_dataset,
)
from bayesrm.errors import ArgumentError, DataError
from bayesrm.selection import LowerConfidenceBound, Mean, RiskAverse, SoftBestOfN, Thompson, WorstCase

from ..rewards import lora_models as models

PROMPTS = ["w1 w2", "w3", "w1 w2", "w4 w5", "w3", "w1 w2", "w3"]
COMPLETIONS = ["w6 w7", "w8", "w9", "w6", "w8 w8", "w6 w7", "w10 w11 w12"]
#: Rows of each prompt's completions above.
ROWS = {"w1 w2": [0, 2, 5], "w3": [1, 4, 6], "w4 w5": [3]}


def counts(text):
    """How often each of 40 words occurs; of messages, in their contents."""
    words = text if isinstance(text, str) else " ".join(message["content"] for message in text)
    return np.array([words.split().count(word) for word in models.WORDS], dtype=float)


class Linear:
    """A reward linear in the words of prompt and response, with a Gaussian belief about its weights, or draws."""

    def __init__(self, draws=None):
        rng = np.random.default_rng(0)
        self.mean = rng.normal(size=40)
        self.factor = 0.4 * rng.normal(size=(40, 5))
        self.draws = None if draws is None else self.mean + rng.normal(size=(draws, 5)) @ self.factor.T
        self.read = []

    def features(self, prompt, texts):
        return np.stack([counts(prompt) + counts(text) * (1 + counts(prompt).sum()) for text in texts])

    def predict(self, prompts, candidates):
        self.read += [text for texts in candidates for text in texts]
        parts = []
        for prompt, texts in zip(prompts, candidates, strict=True):
            x = self.features(prompt, texts)
            if self.draws is None:
                parts.append(brm.RewardBelief(torch.tensor(x @ self.mean)[None], torch.tensor(x @ self.factor)[None]))
            else:
                parts.append(brm.RewardBelief.from_draws(torch.tensor(self.draws @ x.T)[:, None]))
        return brm.RewardBelief.concatenate(parts)


def messages(text, role):
    return [{"role": role, "content": text}]


def state(step):
    return SimpleNamespace(global_step=step)


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    """A Laplace posterior of a linear reward on features of texts."""
    folder = models.bert(tmp_path_factory.mktemp("bert"))
    extractor = brm.rewards.FeatureExtractor(folder, cache_dir=False, device="cpu")
    model = brm.RewardModel(brm.rewards.Linear(features=extractor), brm.likelihoods.BradleyTerry())
    return brm.fit(model, models.pairs(24), inference=brm.Laplace())


@pytest.fixture(scope="module")
def lora_posterior(tmp_path_factory):
    folder = models.llama(tmp_path_factory.mktemp("llama"))
    model = brm.RewardModel(brm.rewards.LoRA(folder, rank=2, device="cpu"), brm.likelihoods.BradleyTerry())
    training = brm.Training(epochs=1.0, batch_size=8, learning_rate=1e-3)
    return brm.fit(model, models.pairs(16), inference=brm.Laplace(training=training))


@pytest.mark.parametrize("draws", [None, 30])
@pytest.mark.parametrize("utility", [Mean(), LowerConfidenceBound(1.5), RiskAverse(0.7), lambda b: b.mean - b.std])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_are_the_utility_of_each_group_wherever_its_members_stand(utility, draws, seed):
    order = np.random.default_rng(seed).permutation(len(PROMPTS)) if seed else np.arange(len(PROMPTS))
    reward = PosteriorReward(Linear(draws), utility)
    found = reward([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], columns_that=["are", "not", "used"])
    assert all(type(value) is float for value in found)
    expected = [0.0] * len(PROMPTS)
    for prompt, rows in ROWS.items():
        belief = Linear(draws).predict([prompt], [[COMPLETIONS[i] for i in rows]])
        for i, value in zip(rows, utility(belief)[0].tolist(), strict=True):
            expected[i] = value
    np.testing.assert_allclose(found, [expected[i] for i in order], rtol=1e-12, atol=1e-12)


def test_a_completion_that_comes_twice_is_read_once_and_counts_twice():
    posterior = Linear()
    PosteriorReward(posterior)(PROMPTS, COMPLETIONS)
    assert sorted(posterior.read) == sorted(["w6 w7", "w9", "w8", "w8 w8", "w10 w11 w12", "w6"])
    twice = PosteriorReward(Linear(), RiskAverse(0.5))(["w1"] * 3, ["w2", "w2", "w3"])
    # The deviation is from the mean of three completions, not of two texts.
    belief = Linear().predict(["w1"], [["w2", "w2", "w3"]])
    covariance = belief.covariance[0].numpy()
    contrast = np.eye(3) - 1 / 3
    variance = np.diag(contrast @ covariance @ contrast.T)
    np.testing.assert_allclose(twice, belief.mean[0].numpy() - variance / (2 * 0.5), rtol=1e-12)
    texts = Linear().predict(["w1"], [["w2", "w3"]])
    assert abs(twice[0] - float(RiskAverse(0.5)(texts)[0, 0])) > 1e-3


@pytest.mark.parametrize("name", ["posterior", "lora_posterior"])
def test_real_posteriors(name, request):
    fitted = request.getfixturevalue(name)
    utility = RiskAverse(0.5)
    found = PosteriorReward(fitted, utility)(PROMPTS, COMPLETIONS)
    for prompt, rows in ROWS.items():
        belief = fitted.predict([prompt], [[COMPLETIONS[i] for i in rows]])
        # Features agree to float32 rounding whatever else is in the batch.
        expected = utility(belief)[0].tolist()
        np.testing.assert_allclose([found[i] for i in rows], expected, rtol=1e-4, atol=1e-4)


def test_messages_are_grouped_whatever_the_order_of_their_keys():
    prompts = [messages("w1", "user"), [{"content": "w1", "role": "user"}], "w1"]
    completions = [messages("w2", "assistant"), messages("w3", "assistant"), messages("w3", "assistant")]
    found = PosteriorReward(Linear())(prompts, completions)
    expected = PosteriorReward(Linear())(["w1"] * 2, ["w2", "w3"])
    np.testing.assert_allclose(found[:2], expected, rtol=1e-12)
    # The text is a prompt of its own; alone in its group nothing deviates.
    assert found[2] == pytest.approx(float(Linear().predict(["w1"], [["w3"]]).mean))


def test_in_a_group_of_two_no_penalty_on_deviations_changes_a_difference():
    means = PosteriorReward(Linear(), Mean())(["w1"] * 2, ["w2", "w3"])
    for utility in (RiskAverse(0.1), LowerConfidenceBound(3.0)):
        found = PosteriorReward(Linear(), utility)(["w1"] * 2, ["w2", "w3"])
        assert found[0] - found[1] == pytest.approx(means[0] - means[1], rel=1e-9)


@pytest.mark.parametrize("blank", ["", " \n", [], messages("", "assistant")])
def test_completions_without_words(blank):
    wrap = (lambda text: text) if isinstance(blank, str) else (lambda text: messages(text, "assistant"))
    logged, extra = {}, {}
    arguments = (["w1", "w1", "w1", "w2"], [wrap("w2"), blank, wrap("w3"), blank])
    reward = PosteriorReward(Linear(), name="r")
    found = reward(*arguments, log_metric=logged.__setitem__, log_extra=extra.__setitem__)
    assert found[1] is None
    assert found[3] is None
    np.testing.assert_allclose([found[0], found[2]], PosteriorReward(Linear())(["w1"] * 2, ["w2", "w3"]))
    assert all(len(column) == 4 and column[1] is None for column in extra.values())
    assert set(extra) == {"r/reward_mean", "r/reward_std"}
    assert PosteriorReward(Linear(), empty=-2.0)(*arguments)[1::2] == [-2.0, -2.0]
    logged.clear()
    assert reward(["w1"], [blank], log_metric=logged.__setitem__) == [None]
    assert logged == {}


@pytest.mark.parametrize("draws", [None, 40])
def test_what_is_logged(draws):
    logged, extra = {}, {}
    reward = PosteriorReward(Linear(draws), LowerConfidenceBound(1.0), name="r")
    utility = reward(PROMPTS, COMPLETIONS, log_metric=logged.__setitem__, log_extra=extra.__setitem__)
    mean, std, deviation, right = (np.zeros(len(PROMPTS)) for _ in range(4))
    for prompt, rows in ROWS.items():
        belief = Linear(draws).predict([prompt], [[COMPLETIONS[i] for i in rows]])
        contrast = np.eye(len(rows)) - 1 / len(rows)
        mean[rows] = belief.mean[0]
        deviation[rows] = contrast @ belief.mean[0].numpy()
        std[rows] = np.sqrt(np.maximum(np.diag(contrast @ belief.covariance[0].numpy() @ contrast.T), 0.0))
        above = np.array(utility)[rows] > np.mean(np.array(utility)[rows])
        for j, i in enumerate(rows):
            if len(rows) == 1:
                right[i] = 0.5
            elif draws is None:
                right[i] = stats.norm.cdf((1 if above[j] else -1) * deviation[i] / std[i])
            else:
                gaps = belief.draws[:, 0].numpy() @ contrast[j]
                right[i] = np.mean((gaps > 0) == above[j])
    np.testing.assert_allclose(extra["r/reward_mean"], mean, rtol=1e-10)
    np.testing.assert_allclose(extra["r/reward_std"], std, rtol=1e-7, atol=1e-7)
    expected = {
        "r/reward_mean": mean.mean(),
        "r/reward_std": std.mean(),
        "r/penalty": np.mean(mean - utility),
        "r/sign_probability": right.mean(),
        "r/uncertain_share": (std**2).sum() / (std**2 + deviation**2).sum(),
    }
    assert logged == pytest.approx(expected, rel=1e-8)


def test_draws_are_new_for_each_prompt_and_step_and_repeat_on_resume():
    prompts, completions = ["w1"] * 3 + ["w2"] * 3, ["w5", "w6", "w7"] * 2
    reward = PosteriorReward(Linear(), Thompson(seed=3))
    first = reward(prompts, completions, trainer_state=state(4))
    assert PosteriorReward(Linear(), Thompson(seed=3))(prompts, completions, trainer_state=state(4)) == first
    assert reward(prompts, completions, trainer_state=state(5)) != first
    assert PosteriorReward(Linear(), Thompson(seed=4))(prompts, completions, trainer_state=state(4)) != first
    # A prompt's draw does not depend on what else is in the batch.
    assert reward(prompts[3:], completions[3:], trainer_state=state(4)) == first[3:]
    # One draw serves a whole group: equal completions have equal rewards.
    same = reward(["w1"] * 3, ["w5", "w6", "w5"], trainer_state=state(4))
    assert same[0] == same[2]
    with pytest.raises(ArgumentError, match=r"`trainer_state` is missing: Thompson draws anew"):
        reward(prompts, completions)


def test_draws_have_the_joint_distribution_of_the_belief():
    belief = Linear().predict(["w1"], [["w5", "w6", "w7"]])
    reward = PosteriorReward(Linear(), Thompson())
    number = 500
    drawn = np.array([reward(["w1"] * 3, ["w5", "w6", "w7"], trainer_state=state(step)) for step in range(number)])
    covariance = belief.covariance[0].numpy()
    error = np.sqrt(np.diag(covariance) / number)
    assert (abs(drawn.mean(0) - belief.mean[0].numpy()) < 4.5 * error).all()
    # Standard error of a covariance of normal draws.
    diagonal = np.diag(covariance)
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / number)
    assert (abs(np.cov(drawn.T) - covariance) < 4.5 * spread).all()


def test_names():
    assert PosteriorReward(Linear()).__name__ == "risk_averse_reward"
    assert PosteriorReward(Linear(), brm.beliefs.expected).__name__ == "expected_reward"
    assert PosteriorReward(Linear(), lambda belief: belief.mean).__name__ == "posterior_reward"
    assert PosteriorReward(Linear(), name="mine").__name__ == "mine"


def test_what_is_refused(posterior):
    on_arrays = brm.fit(
        brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry()),
        brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1]], outcome=[0]),
        inference=brm.Laplace(),
    )
    with pytest.raises(ArgumentError, match=r"`posterior` was fitted on precomputed features"):
        PosteriorReward(on_arrays)
    with pytest.raises(ArgumentError, match=r"`empty` is nan"):
        PosteriorReward(posterior, empty=math.nan)
    with pytest.raises(ArgumentError, match=r"2 prompts but 1 completions"):
        PosteriorReward(posterior)(["w1", "w1"], ["w2"])
    with pytest.raises(ArgumentError, match=r"scores of shape \(1,\); expected \(1, 1\)"):
        PosteriorReward(posterior, lambda belief: belief.mean[0])(["w1"], ["w2"])
    with pytest.raises(ArgumentError, match=r"NaN"):
        PosteriorReward(posterior, lambda belief: belief.mean * math.nan)(["w1"], ["w2"])
    with pytest.raises(ArgumentError, match=r"infinity"):
        PosteriorReward(posterior, lambda belief: belief.mean + math.inf)(["w1"], ["w2"])
    with pytest.raises(DataError, match=r"neither text nor messages of text"):
        PosteriorReward(posterior)([[{"role": "user", "content": [{"image": object()}]}]], ["w2"])


PROCESSES = """
import json, sys
import torch.distributed
sys.path.insert(0, sys.argv[1])
from tests.alignment.test_trl import COMPLETIONS, PROMPTS, Linear, state
from bayesrm.alignment.trl import PosteriorReward
from bayesrm.selection import RiskAverse, Thompson
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
part = slice(0, 4) if rank == 0 else slice(4, None)
found = {}
for name, utility in (("risk", RiskAverse(0.5)), ("thompson", Thompson(1))):
    for across in (True, False):
        reward = PosteriorReward(Linear(), utility, across_processes=across)
        logged = {}
        rewards = reward(PROMPTS[part], COMPLETIONS[part], trainer_state=state(2), log_metric=logged.__setitem__)
        found[f"{name} {across}"] = rewards
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_groups_that_processes_share(tmp_path):
    """Two processes that hold parts of the groups give the rewards of one; without their exchange they do not."""
    (tmp_path / "script.py").write_text(PROCESSES)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), root, str(tmp_path)],
            env=os.environ | store | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name, utility in (("risk", RiskAverse(0.5)), ("thompson", Thompson(1))):
        one = PosteriorReward(Linear(), utility)(PROMPTS, COMPLETIONS, trainer_state=state(2))
        np.testing.assert_allclose(first[f"{name} True"] + second[f"{name} True"], one, rtol=1e-12)
    alone = np.array(first["risk False"] + second["risk False"])
    assert np.abs(alone - PosteriorReward(Linear(), RiskAverse(0.5))(PROMPTS, COMPLETIONS)).max() > 1e-2


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


ASKED = ["w1", "w2 w3", "w4", "w5"]
OFFERED = [["w10", "w11 w12", "w13"], ["w14", "w15"], ["w16", "w16"], ["w17", "w18", "w19", "w20"]]


@pytest.mark.parametrize("rule", [None, Mean(), LowerConfidenceBound(2.0), WorstCase(num_members=3)])
def test_best_of_n_dataset(rule):
    found = best_of_n_dataset(Linear(), ASKED, OFFERED, rule)
    belief = Linear().predict(ASKED, OFFERED)
    assert found["prompt"] == ASKED
    assert found["completion"] == [texts[pick] for texts, pick in zip(OFFERED, found["candidate"], strict=True)]
    if not isinstance(rule, WorstCase):
        assert found["candidate"] == brm.select(belief, rule or RiskAverse()).tolist()
    picked = torch.tensor(list(found["candidate"]))[:, None]
    np.testing.assert_allclose(found["reward_mean"], belief.mean.gather(1, picked)[:, 0])
    np.testing.assert_allclose(found["reward_std"], belief.differences().std.gather(1, picked)[:, 0], rtol=1e-6)


def test_a_text_among_messages_becomes_a_message():
    found = best_of_n_dataset(Linear(), ["w1", messages("w2", "user")], [["w3"], [messages("w4", "assistant")]])
    assert found["prompt"] == [messages("w1", "user"), messages("w2", "user")]
    assert found["completion"] == [messages("w3", "assistant"), messages("w4", "assistant")]


def pair_by_hand(prompt, chosen, rejected):
    """P(chosen is better), mean and standard deviation of the margin, of the Gaussian belief."""
    belief = Linear().predict([prompt], [[chosen, rejected]])
    mean = float(belief.mean[0, 0] - belief.mean[0, 1])
    std = float((belief.root[0, 0] - belief.root[0, 1]).norm())
    return stats.norm.cdf(mean / std), mean, std


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_preference_dataset(threshold):
    found = preference_dataset(Linear(), ASKED, OFFERED, chosen_rule=Mean(), min_probability=threshold)
    mean = Linear().predict(ASKED, OFFERED).mean
    expected, left_out = [], []
    for b, texts in enumerate(OFFERED):
        values = mean[b, : len(texts)]
        chosen, rejected = texts[int(values.argmax())], texts[int(values.argmin())]
        if b == 2:
            left_out.append((b, LeftOut.ONE_RESPONSE))
            continue
        numbers = pair_by_hand(ASKED[b], chosen, rejected)
        if numbers[0] < threshold:
            left_out.append((b, LeftOut.UNCERTAIN))
        else:
            expected.append((ASKED[b], chosen, rejected, *numbers))
    assert list(found.left_out) == left_out
    assert len(left_out) > (threshold > 0.5)
    assert 0 < len(found.dataset) == len(expected)
    for row, (prompt, chosen, rejected, *numbers) in zip(found.dataset, expected, strict=True):
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, chosen, rejected)
        found_numbers = [row[name] for name in ("probability", "margin_mean", "margin_std")]
        np.testing.assert_allclose(found_numbers, numbers, rtol=1e-9)
    assert f"left out {len(left_out)} (" in str(found)


def test_what_is_rejected():
    texts = ["w10", "w11 w12", "w13", "w10"]
    belief = Linear().predict(["w1"], [texts])
    chosen = texts[int(belief.mean.argmax())]
    drawn = [
        preference_dataset(
            Linear(), ["w1"], [texts], chosen_rule=Mean(), rejected="random", min_probability=0.0, seed=seed
        ).dataset[0]["rejected"]
        for seed in range(60)
    ]
    assert set(drawn) == set(texts) - {chosen}
    optimist = preference_dataset(
        Linear(), ["w1"], [texts], chosen_rule=Mean(), rejected=lambda b: b.mean + 2 * b.std, min_probability=0.0
    )
    assert optimist.dataset[0]["rejected"] == texts[int((belief.mean + 2 * belief.std).argmin())]
    same = preference_dataset(Linear(), ["w1"], [texts], chosen_rule=Mean(), rejected=lambda b: -b.mean)
    assert same.left_out == ((0, LeftOut.SAME_RESPONSE),)
    assert same.dataset.column_names[:3] == ["prompt", "chosen", "rejected"]
    with pytest.raises(ArgumentError, match=r"`rejected` is 'best'; it is one of \['worst', 'random'\], or a rule"):
        preference_dataset(Linear(), ["w1"], [texts], rejected="best")
    with pytest.raises(ArgumentError, match=r"`min_probability` is 1.5"):
        preference_dataset(Linear(), ["w1"], [texts], min_probability=1.5)
    with pytest.raises(DataError, match=r"prompt 1: candidate 1 has no words"):
        preference_dataset(Linear(), ["w1", "w2"], [["w3"], ["w4", " "]])
    with pytest.raises(ArgumentError, match=r"`candidates` of prompt 0 is 'w3'"):
        preference_dataset(Linear(), ["w1"], ["w3"])


def test_weighted_pairs_follow_the_weights():
    texts, number, temperature = ["w10", "w11 w12", "w13", "w10"], 4000, 2.0
    found = weighted_preference_dataset(
        Linear(), ["w1"], [texts], temperature=temperature, utility=Mean(), pairs_per_prompt=number
    ).dataset
    belief = Linear().predict(["w1"], [texts])
    weights = (belief.mean[0] / temperature).softmax(0).numpy()
    by_text = {text: sum(w for w, t in zip(weights, texts, strict=True) if t == text) for text in texts}
    assert min(by_text.values()) > 0.01
    chosen = np.array(list(found["chosen"]))
    rejected = np.array(list(found["rejected"]))
    assert not (chosen == rejected).any()
    for text, p in by_text.items():
        assert abs(np.mean(chosen == text) - p) < 4.5 * math.sqrt(p * (1 - p) / number)
    # Against "w13" stand three candidates, two of which read the same.
    others = rejected[chosen == "w13"]
    assert abs(np.mean(others == "w10") - 2 / 3) < 4.5 * math.sqrt(2 / 9 / len(others))
    row = found[0]
    np.testing.assert_allclose(
        [row["probability"], row["margin_mean"], row["margin_std"]],
        pair_by_hand("w1", row["chosen"], row["rejected"]),
        rtol=1e-9,
    )


def test_weighted_pairs_by_given_weights_and_seeds():
    weights = torch.full((4, 4), math.nan)
    for b, texts in enumerate(OFFERED):
        weights[b, : len(texts)] = torch.arange(len(texts)) * 3.0 + b
    tempered = SoftBestOfN(temperature=1.0, utility=lambda b: torch.arange(4.0).double().expand_as(b.mean) * 3.0)
    given = weighted_preference_dataset(Linear(), ASKED, OFFERED, log_weights=weights, seed=5)
    by_utility = weighted_preference_dataset(
        Linear(), ASKED, OFFERED, temperature=tempered.temperature, utility=tempered.utility, seed=5
    )
    assert given.dataset.to_list() == by_utility.dataset.to_list()
    assert given.left_out == ((2, LeftOut.ONE_RESPONSE),) * 4
    # Draws depend on the prompt, not on its place; another seed gives others.
    last = weighted_preference_dataset(Linear(), ASKED[3:], OFFERED[3:], log_weights=weights[3:], seed=5)
    assert last.dataset.to_list() == given.dataset.to_list()[-4:]
    others = weighted_preference_dataset(Linear(), ASKED, OFFERED, log_weights=weights, seed=6)
    assert others.dataset.to_list() != given.dataset.to_list()
    sure = weighted_preference_dataset(Linear(), ASKED, OFFERED, log_weights=weights, seed=5, min_probability=0.5)
    assert sum(reason == LeftOut.UNCERTAIN for _, reason in sure.left_out) == 12 - len(sure.dataset) > 0
    with pytest.raises(ArgumentError, match=r"either `temperature` or `log_weights`"):
        weighted_preference_dataset(Linear(), ASKED, OFFERED)
    with pytest.raises(ArgumentError, match=r"`temperature` is 0"):
        weighted_preference_dataset(Linear(), ASKED, OFFERED, temperature=0.0)
    with pytest.raises(ArgumentError, match=r"`log_weights` has shape \(3, 4\); expected \(4, 4\)"):
        weighted_preference_dataset(Linear(), ASKED, OFFERED, log_weights=weights[:3])
    with pytest.raises(ArgumentError, match=r"weights of prompt 0 cannot be normalised"):
        weighted_preference_dataset(Linear(), ASKED, OFFERED, log_weights=weights * -math.inf)


# What TRL's own trainers make of it.


@pytest.fixture
def policy(tmp_path):
    """A small causal language model with a chat template."""
    import transformers

    folder = models.gpt2(tmp_path / "policy", pad=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} \n\n {% endfor %}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # On disk, where TRL finds the reference policy.
        transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder), tokenizer


def arguments(tmp_path, **others):
    return {
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "report_to": "none", "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False,
        # TRL sets it by a name that transformers calls deprecated.
        "gradient_checkpointing": None, **others,
    }  # fmt: skip


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_reinforcement_learning(method, conversational, policy, posterior, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    model, tokenizer = policy
    prompts = [messages(p, "user") if conversational else p for p in ASKED]
    settings = arguments(
        tmp_path, per_device_train_batch_size=6, num_generations=3, max_completion_length=6, log_completions=False
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[PosteriorReward(posterior), PosteriorReward(posterior, Thompson(), name="draw")],
        args=getattr(trl, f"{method}Config")(**settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "label": ["unused"] * len(prompts)}),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert math.isfinite(log["rewards/risk_averse_reward/mean"])
        assert math.isfinite(log["rewards/draw/mean"])
        assert log["risk_averse_reward/reward_std"] > 0
        assert 0 < log["risk_averse_reward/uncertain_share"] < 1
        assert 0 < log["risk_averse_reward/sign_probability"] < 1
        gap = log["risk_averse_reward/reward_mean"] - log["rewards/risk_averse_reward/mean"]
        assert log["risk_averse_reward/penalty"] == pytest.approx(gap, abs=1e-5)
        assert log["risk_averse_reward/penalty"] > 0
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    # The table of completions has a number for each.
    assert len(trainer._logs["extra"]["draw/reward_std"]) == len(trainer._logs["completion"])


def test_a_resumed_run_repeats_its_draws(policy, posterior, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    model, tokenizer = policy
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    settings = arguments(
        tmp_path, max_steps=4, per_device_train_batch_size=6, num_generations=3, max_completion_length=6
    ) | {"save_strategy": "steps", "save_steps": 2}
    logs = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model.load_state_dict(weights)
        trainer = trl.GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=PosteriorReward(posterior, Thompson(), name="draw"),
            args=trl.GRPOConfig(**settings),
            # Enough for one epoch: TRL's sampler deals others in a second one, once resumed.
            train_dataset=datasets.Dataset.from_dict({"prompt": [f"w{i}" for i in range(8)]}),
        )
        trainer.train(resume_from_checkpoint=resume)
        logs.append([log["rewards/draw/mean"] for log in trainer.state.log_history if "reward" in log])
    assert len(set(logs[0])) == 4
    assert logs[1][2:] == pytest.approx(logs[0][2:], rel=1e-5)


@pytest.fixture(params=["texts", "messages"])
def offered(request):
    """Prompts and candidates; a text needs the space that follows its prompt, messages have a template."""
    if request.param == "texts":
        return ASKED, [[f" {text}" for text in texts] for texts in OFFERED]
    candidates = [[messages(text, "assistant") for text in texts] for texts in OFFERED]
    return [messages(prompt, "user") for prompt in ASKED], candidates


def test_preference_optimisation(offered, policy, posterior, tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = policy
    pairs = preference_dataset(posterior, *offered)
    more = weighted_preference_dataset(posterior, *offered, temperature=1.0)
    for found in (pairs, more):
        trainer = trl.DPOTrainer(
            model=model,
            processing_class=tokenizer,
            args=trl.DPOConfig(**arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)),
            train_dataset=found.dataset,
        )
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_supervised_fine_tuning(offered, policy, posterior, tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = policy
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)),
        train_dataset=best_of_n_dataset(posterior, *offered),
    )
    # TRL has recognised its prompt-completion format: the loss is of the completion alone.
    labels = trainer.train_dataset[0]["labels"]
    assert labels[0] == -100
    assert labels[-1] >= 0
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
