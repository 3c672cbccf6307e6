"""Given candidates, as many for each prompt as there are: losses and gradients are those of each prompt alone."""

import dataclasses

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import Method, align, load_method, projections, targets
from bayesrm.alignment._propose import Proposer, _joined
from bayesrm.alignment._round import Round
from bayesrm.alignment._trainer import ProjectionLoss
from bayesrm.alignment.monitor import RoundReport
from bayesrm.engines._processes import Processes
from bayesrm.errors import ArgumentError

from . import policies
from .align_script import METHODS, count_reward
from .test_align import training
from .test_token_rewards import SaysWord

PROMPTS = ["w1", "w2 w3", "w4 w5 w6", "w7"]
GIVEN = [
    ["w1 w1", "w2"],
    ["w3", "w1", "w1 w2 w1 w4", "", "w1"],
    ["w5 w6 w1", "w2 w2", "w9"],
    ["w8 w1", "w1 w1 w1", "w2 w3", "w1 w4 w5 w6"],
]
LOG_PROBS = [[-0.5 * len(text.split()) - 0.1 * i - 1.0 for i, text in enumerate(texts)] for texts in GIVEN]
TILT = brm.GoodnessPosterior(brm.programs.ExponentialTilt(0.5, maximum=2.0))


def judge(prompts, candidates):
    """Longer responses win; one matrix of the most candidates, whose places without response hold nothing."""
    most = max(map(len, candidates))
    found = torch.zeros(len(candidates), most, most)
    for row, texts in enumerate(candidates):
        words = torch.tensor([float(len(text.split())) for text in texts])
        found[row, : len(texts), : len(texts)] = torch.sigmoid(words[:, None] - words)
    return found


def proposer(policy, method, processes=None, *, reward=count_reward, log_probs=LOG_PROBS, given=GIVEN):
    return Proposer(policy, method, reward, judge, given, log_probs, 1.0, 8, processes or Processes())


def gradient_of(policy, method, found):
    """Losses of all prompts in one batch, and the gradient of their mean."""
    loss = ProjectionLoss(policy, method, per_pass=1)
    loss.begin(found, method.weigh(found.candidates))
    policy.model.zero_grad()
    value = loss(torch.arange(len(found.prompts)))
    value.backward()
    return float(value.detach()), torch.cat([p.grad.reshape(-1).clone() for p in policy.trainable.values()])


P = projections
SCORE = P.PairwiseLogistic(labels="tilt", score_function=0.0)
CASES = {
    "listwise cross-entropy": (TILT, P.ListwiseCrossEntropy()),
    "forward KL to the best of 4": (targets.BestOfN(4), P.ForwardKL()),
    "reverse KL": (TILT, P.ReverseKL()),
    "DPG": (TILT, P.DistributionalPolicyGradient(baseline=False)),
    "GDC++": (TILT, P.DistributionalPolicyGradient()),
    "Jeffreys": (targets.BestOfN(4), P.Jeffreys()),
    "linear listwise": (TILT, P.LinearListwise()),
    "noise contrastive": (TILT, P.NoiseContrastive()),
    "pairwise logistic": (TILT, SCORE),
    "policy gradient": (TILT, P.PolicyGradient(clip=2.0)),
    "squared log-ratio, INPO": (targets.MirrorDescent(2.0, 0.1), P.SquaredLogRatio("preference")),
    "best and worst": (TILT, P.SquaredLogRatio(pairs="best_worst")),
    "Nash-MD": (targets.MirrorDescent(2.0, 0.1, opponent="mixture"), P.PolicyGradient()),
    "chi-squared": (targets.ChiSquaredPessimism(1.0), P.ForwardKL()),
    "risk-averse": (brm.GoodnessPosterior(utility=brm.selection.RiskAverse(b=0.5)), P.ListwiseCrossEntropy()),
    "path consistency": (TILT, P.PathConsistency(reversed_roles=0.5)),
    "token policy gradient": (TILT, P.TokenPolicyGradient(0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_each_prompt_alone(case):
    method = Method(*CASES[case], proposal="policy")
    policy = policies.moved(policies.policy("gpt2"), scale=0.05)
    reward = SaysWord(std=0.1) if method.needs_token_rewards else count_reward
    made = proposer(policy, method, reward=reward)
    found = made.propose(PROMPTS, [3, 1, 0, 2], None, seed=0)
    assert found.counts == [4, 5, 2, 3]
    assert found.candidates.mask.sum(1).tolist() == found.counts
    value, gradient = gradient_of(policy, method, found)
    alone = [gradient_of(policy, method, made.propose(PROMPTS, [i], None, seed=0)) for i in (3, 1, 0, 2)]
    assert value == pytest.approx(sum(one for one, _ in alone) / 4, rel=1e-4)
    expected = torch.stack([one for _, one in alone]).mean(0)
    # Rounding of float32 through two layers.
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # Were a candidate more or less to count, the gradient would be another one.
    fewer = proposer(policy, method, reward=reward, given=[texts[:2] for texts in GIVEN], log_probs=None)
    _, other = gradient_of(policy, method, fewer.propose(PROMPTS, [3, 1, 0, 2], None, seed=0))
    assert float((other - expected).abs().max()) > 0.01 * float(expected.abs().max())


def test_monitors_are_means_over_the_prompts_each_by_itself():
    policy = policies.moved(policies.policy("gpt2"), scale=0.05)
    made = proposer(policy, METHODS["brain"])

    def report(places):
        found = made.propose(PROMPTS, places, None, seed=0)
        return RoundReport.of(found, METHODS["brain"].weigh(found.candidates), number=0, step=0)

    together, alone = report([0, 1, 2, 3]), [report([i]) for i in range(4)]
    for name in ("reward", "reward_std", "kl_to_reference", "target_kl", "target_ess", "policy_ess"):
        expected = sum(getattr(one, name) for one in alone) / 4
        assert getattr(together, name) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("name", ["brain", "tokens"])
def test_a_round_survives_the_disk_and_its_parts_are_joined(name, tmp_path):
    method = dataclasses.replace(METHODS[name], proposal="policy")
    policy = policies.policy("gpt2")
    whole = proposer(policy, method).propose(PROMPTS, [0, 1, 2, 3], policy.snapshot(), seed=0)
    # Two processes: each holds every second prompt, and other numbers of candidates.
    parts = [
        proposer(policy, method).propose(PROMPTS, places, policy.snapshot(), seed=0) for places in ([0, 2], [1, 3])
    ]
    joined = _joined(parts, 4)
    whole.save(tmp_path / "round.safetensors")
    for found in (Round.load(tmp_path / "round.safetensors"), joined):
        assert found.texts == GIVEN
        for column in ("prompts", "responses", "ended"):
            assert getattr(found.sequences, column) == getattr(whole.sequences, column)
        assert found.candidates.sources == ("given",) * 5
        one, other = found.candidates, whole.candidates
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.belief.mean, other.belief.mean)
        for part in ("reference", "proposal", "anchor"):
            torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=0, atol=1e-5)
        assert torch.equal(one.preference_matrix, other.preference_matrix)
        torch.testing.assert_close(found.policy, whole.policy, rtol=0, atol=1e-5)
        assert found.sequences_of([1, 0]).responses[5:] == whole.sequences.responses[:2]
        if name == "tokens":
            torch.testing.assert_close(found.target_values, whole.target_values, rtol=0, atol=1e-4)


def test_a_policy_learns_from_them_and_goes_on(tmp_path):
    def run(place):
        policy = policies.policy("gpt2")
        return policy, align(
            policy, count_reward, PROMPTS, method=METHODS["brain"], candidates=GIVEN, candidate_log_probs=LOG_PROBS,
            rounds=6, training=training(learning_rate=1e-2, batch_size=2, output_dir=place),
        )  # fmt: skip

    policy, report = run(str(tmp_path / "run"))
    assert report.final.reward > report.rounds[0].reward + 0.3
    again, found = run(str(tmp_path / "run"))
    assert (found.final.reward, found.final.kl_to_reference) == (report.final.reward, report.final.kl_to_reference)
    assert all(torch.equal(p, again.trainable[name]) for name, p in policy.trainable.items())


class TestWhatAMethodTakes:
    def go(self, method, given=GIVEN, **settings):
        return align(
            policies.policy("gpt2"), count_reward, PROMPTS, method=method, candidates=given, rounds=1,
            training=training(), **settings,
        )  # fmt: skip

    def test_draws_that_only_the_method_can_make(self):
        with pytest.raises(ArgumentError, match=r"draws of policy and anchor .* takes no `candidates`"):
            self.go(load_method("j_bond"), [texts[:1] * 3 for texts in GIVEN])

    def test_terms_that_weigh_nothing(self):
        pairs = [texts[:2] for texts in GIVEN]
        with pytest.raises(ArgumentError, match=r"PairwiseLogistic learns from draws of policy .* no `candidates`"):
            self.go(load_method("sail"), pairs)

    def test_margins_that_are_right_on_average_alone(self):
        with pytest.raises(ArgumentError, match=r"SquaredLogRatio learns from draws of policy .* no `candidates`"):
            self.go(load_method("inpo"), [texts[:2] for texts in GIVEN])

    def test_a_given_number(self):
        with pytest.raises(ArgumentError, match=r"`candidates`\[0\] holds 2 responses; BestAndWorst takes exactly 3"):
            self.go(load_method("bonbon", n=3))
        self.go(load_method("bonbon", n=2), [texts[:2] for texts in GIVEN])

    @pytest.mark.parametrize("name", ["rlhf", "wind", "dpo", "bond"])
    def test_pairs_and_baselines_need_two(self, name):
        with pytest.raises(ArgumentError, match=r"`candidates`\[2\] holds 1 responses; \w+ takes at least 2"):
            self.go(load_method(name), [*GIVEN[:2], ["w1"], GIVEN[3]])

    def test_one_is_enough_for_a_listwise_loss(self):
        self.go(METHODS["brain"], [*GIVEN[:3], ["w1"]])
        with pytest.raises(ArgumentError, match=r"`candidates`\[1\] holds 0 responses; \w+ takes at least 1"):
            self.go(METHODS["brain"], [GIVEN[0], [], *GIVEN[2:]])

    def test_what_does_not_fit(self):
        with pytest.raises(ArgumentError, match=r"`candidate_log_probs`\[\d\] must hold a number for each"):
            self.go(METHODS["brain"], candidate_log_probs=[[-1.0] * 2] * 4)
        above = [[5.0] * len(texts) for texts in GIVEN]
        with pytest.raises(ArgumentError, match=r"`candidate_log_probs`\[0\] holds 5.0; .* at most 0"):
            self.go(METHODS["brain"], candidate_log_probs=above)
        with pytest.raises(ArgumentError, match=r"`candidates`\[3\] is of type str; give a list"):
            self.go(METHODS["brain"], [*GIVEN[:3], "w1 w2"])
