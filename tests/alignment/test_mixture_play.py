"""MTPO-tau: the mixture of policy and reference plays both sides, against enumeration and the Nash policy."""

import math

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import Method, games, load_method, multi_turn, targets
from bayesrm.errors import ArgumentError
from bayesrm.programs import ScoredCandidates

from . import policies
from .test_multi_turn import lesson, policy_on, preferences_on, with_answers, words, worth_by_enumeration
from .test_turn_reward import START, environment, reward

TAU = 0.2


def step(tree, policy, preferences, reference, step_size, tau=TAU):
    return multi_turn.mirror_descent_step(
        tree, policy, preferences, reference=reference, step_size=step_size, regularisation=tau, mixture=True
    )


def mixture_of(policy, reference, share):
    log_p = [torch.where(p > 0, p, 1.0).log() for p in (policy, reference)]
    mixed = (log_p[0] * (1 - share) + log_p[1] * share).exp() * (reference > 0)
    return mixed / mixed.sum(1, keepdim=True)


def divergence(tree, one, other):
    """KL(one || other) of whole conversations."""
    by_state = torch.where(one > 0, one * (one / other.clamp_min(1e-300)).log(), 0.0).sum(1)
    return float((tree.reach(one)[0] * by_state).sum())


class TestExactStep:
    def test_one_turn_is_nash_md(self):
        tree = words(turns=1, size=4)
        preferences, policy, reference = preferences_on(tree), policy_on(tree, 1), policy_on(tree, 2)
        found = step(tree, policy, preferences, reference, 0.7)
        expected = games.mirror_descent_step(
            preferences, policy[0], reference[0], step_size=0.7, regularisation=TAU, step="nash_md"
        )
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-14)
        other = multi_turn.mirror_descent_step(
            tree, policy, preferences, reference=reference, step_size=0.7, regularisation=TAU
        )
        assert not torch.allclose(found, other, atol=1e-3)

    def test_q_is_that_of_the_mixture_by_enumeration(self):
        tree = with_answers()
        preferences, policy, reference = preferences_on(tree), policy_on(tree, 1), policy_on(tree, 2)
        m = mixture_of(policy, reference, 0.7 * TAU)
        found = step(tree, policy, preferences, reference, 0.7)
        for a in range(3):
            forced = m.clone()
            forced[0] = torch.eye(3)[a]
            # The first turn's own cost is that of every speech, and the opponent's is no one's to choose.
            worth = worth_by_enumeration(tree, forced, m, preferences, reference, TAU)
            q = worth - TAU * float(reference[0, a].log())
            if a == 0:
                base = float(found[0, a].log() - m[0, a].log()) - 0.7 * q
            assert abs(float(found[0, a].log() - m[0, a].log()) - 0.7 * q - base) < 1e-12

    @pytest.mark.parametrize("make", [words, with_answers])
    def test_falling_steps_reach_the_nash_policy(self, make):
        tree = make()
        preferences, reference = preferences_on(tree, scale=3.0), tree.uniform()
        nash = reference
        for _ in range(400):
            nash = multi_turn.mirror_descent_step(
                tree, nash, preferences, reference=reference, step_size=0.5, regularisation=TAU
            )
        assert multi_turn.exploitability(tree, nash, preferences, reference=reference, regularisation=TAU) < 1e-10
        policy, smallest, gaps = reference, float(reference[tree.allowed].min()), []
        for t in range(1000):
            # Theorem B.3 of the paper, with H = 2 turns.
            bound = 8 * 2 / (t + 1) * max(1 / TAU**2, 4 * math.log(smallest) ** 2)
            gaps.append(divergence(tree, nash, policy))
            assert gaps[-1] <= bound
            policy = step(tree, policy, preferences, reference, 2 / (TAU * (t + 2)))
        # 1 / t and better, where the bound speaks of a rate alone.
        assert gaps[999] < 0.15 * gaps[99] < 0.15 * 0.15 * gaps[9]
        assert gaps[999] < 1e-4 < 0.05 < gaps[0]

    def test_with_one_step_the_mixture_rests_near_the_nash_policy_and_not_at_it(self):
        tree = with_answers()
        preferences, reference = preferences_on(tree, scale=3.0), tree.uniform()
        size, kept = 1.5, 1 - 1.5 * TAU
        rest = reference
        for _ in range(500):
            rest = step(tree, rest, preferences, reference, size)
        m = mixture_of(rest, reference, size * TAU)
        q = multi_turn.preference_values(tree, m, m, preferences, reference=reference, regularisation=TAU).q
        target = torch.softmax(torch.where(tree.allowed, kept * q / TAU, -torch.inf), 1)
        torch.testing.assert_close(m, target, rtol=0, atol=1e-10)
        gap = multi_turn.exploitability(tree, m, preferences, reference=reference, regularisation=TAU)
        start = multi_turn.exploitability(tree, reference, preferences, reference=reference, regularisation=TAU)
        assert 1e-4 < gap < 0.5 * start

    def test_with_one_turn_the_mixture_rests_at_the_nash_policy_of_another_regularisation(self):
        tree = words(turns=1, size=4)
        preferences, reference = preferences_on(tree), policy_on(tree, 2)
        rest = reference
        for _ in range(300):
            rest = step(tree, rest, preferences, reference, 1.5)
        m = mixture_of(rest, reference, 1.5 * TAU)
        nash = games.nash_policy(preferences, reference[0], regularisation=TAU / (1 - 1.5 * TAU))
        torch.testing.assert_close(m[0], nash, rtol=0, atol=1e-9)


class TestMethod:
    def test_settings(self):
        plain, mixed = load_method("mtpo"), load_method("mtpo", mixture=True)
        assert plain.target == targets.MirrorDescent(15.0, 0.005, payoff="reward")
        assert plain.sources == ("policy",) * 8
        assert mixed.target.regularisation == 0.0025
        assert mixed.mixture_weight == pytest.approx(0.0375)
        assert mixed.sources == ("mixture",) * 8
        assert load_method("mtpo", mixture=True, step=2.0, tau=0.1).mixture_weight == pytest.approx(0.2)

    @pytest.mark.parametrize("playing", ["mixture", "policy"])
    def test_expected_gradient_is_that_of_the_exact_step(self, playing):
        """Sampled speeches and conversations of one of them, against the gradient of KL(policy || next policy)."""
        tree, size = lesson(), 1.2
        preferences, policy, reference = preferences_on(tree), policy_on(tree, 1), policy_on(tree, 2)
        method = load_method("mtpo", step=size, tau=TAU, mixture=True, num_candidates=3)
        logits = policy.log().requires_grad_()
        after = step(tree, policy, preferences, reference, size)
        log_q = torch.log_softmax(logits, 1)
        (exact,) = torch.autograd.grad((log_q.exp() * (log_q - after.log())).sum(), logits)
        sets, gradients = 4000, []
        player = mixture_of(policy, reference, size * TAU) if playing == "mixture" else policy
        for s in range(tree.num_states):
            speeches, worth = sampled(tree, method, player, policy, reference, preferences, s, sets)
            rows = reference[s].log()[speeches], player[s].log()[speeches], policy[s].log()[speeches]
            belief = brm.RewardBelief(worth, torch.zeros(*worth.shape, 1, dtype=worth.dtype))
            candidates = ScoredCandidates(belief, rows[0], proposal=rows[1], anchor=rows[2])
            leaf = rows[2].clone().requires_grad_()
            (by_speech,) = torch.autograd.grad(method.loss(leaf, method.weigh(candidates)).sum(), leaf)
            onto = torch.zeros(sets, 3, dtype=torch.float64).scatter_add_(1, speeches, by_speech)
            gradients.append(onto - onto.sum(1, keepdim=True) * policy[s])
        mean = torch.stack([g.mean(0) for g in gradients])
        error = torch.stack([g.std(0) / sets**0.5 for g in gradients])
        assert float(error.max()) < 0.05 * float(exact.abs().max())
        worst = float(((mean - exact).abs() / error).max())
        # Conversations of the policy alone are those of MTPO, and of another step.
        assert worst < 4.5 if playing == "mixture" else worst > 4.5


def sampled(tree, method, player, policy, reference, preferences, s, sets):
    """Candidates of state s in `lesson`, drawn from the player, with an unbiased estimate of the mixture's Q."""
    generator = torch.Generator().manual_seed(s)

    def draw(weights):
        flat = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, True, generator=generator)
        return flat.reshape(weights.shape[:-1])

    def finished(first):
        state = draw(tree.transitions[0, first][..., : tree.num_states])
        second = draw(player[state])
        return 3 * (state - 1) + second, (player[state, second] / reference[state, second]).log()

    speeches = torch.multinomial(player[s], sets * method.num_candidates, True, generator=generator).reshape(sets, -1)
    ends, cost = (3 * (s - 1) + speeches, 0.0) if s else finished(speeches)
    opponents, _ = finished(draw(player[0].expand(sets, -1)))
    return speeches, preferences[ends, opponents[:, None]] - TAU * cost


class TestTurnReward:
    def test_the_estimate_is_unbiased(self):
        """Continuations and opponents are the mixture's, and the last turn's divergence is taken off."""
        start = policies.policy("gpt2", count=3, limits=(24, 1), spread=0.3)
        policy = policies.moved(start, scale=0.6, seed=1)
        tau, share, reply, said = 1.0, 0.7, "w1", ["", "w0", "w1", "w2"]
        settings = {"num_opponents": 2, "regularisation": tau, "mixture": share}

        drawn = torch.cat([reward(policy, seed=s, **settings)([START], [[reply]]).mean[0] for s in range(150)]).double()

        def probabilities(history, share):
            sequences = policy.encode([history] * 3, said[1:], on_long="shorten")
            found = []
            with torch.no_grad():
                for snapshot in (policy.snapshot(), policy.reference):
                    with policy.using(snapshot):
                        p = policy.log_probs(sequences).exp().double()
                    found.append(torch.cat([1 - p.sum(0, keepdim=True), p]))
            # Replies of one token: the mixture of tokens is that of turns.
            return mixture_of(found[0][None], found[1][None], share)[0], found[1]

        def after(first):
            return [*START, {"role": "assistant", "content": first}, {"role": "user", "content": "w2"}]

        def exact(share):
            count = torch.tensor([0.0, 0.0, 1.0, 0.0]).double()
            first, _ = probabilities(START, share)
            own, p0 = probabilities(after(reply), share)
            worth = -tau * float((own * (own / p0).log()).sum())
            for i, a in enumerate(said):
                second, _ = probabilities(after(a), share)
                for j in range(4):
                    wins = (second * torch.sigmoid(count[2] + count[j] - count[i] - count)).sum()
                    worth += float(own[j] * first[i] * wins)
            return worth

        error = float(drawn.std()) / len(drawn) ** 0.5
        assert abs(float(drawn.mean()) - exact(share)) < 4.5 * error
        # The policy itself would be worth something else by more than errors explain.
        assert abs(float(drawn.mean()) - exact(0.0)) > 4.5 * error

    def test_a_last_reply_costs_nothing_more(self):
        policy = policies.moved(policies.policy("gpt2", limits=(32, 4)))
        history = [*START, {"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}]
        free, dear = (reward(policy, regularisation=tau)([history], [["w1", "w3"]]) for tau in (0.0, 5.0))
        assert torch.equal(free.mean, dear.mean)
        free, dear = (reward(policy, regularisation=tau)([START], [["w1", "w3"]]) for tau in (0.0, 5.0))
        assert bool((free.mean - dear.mean).abs().max() > 0.1)

    def test_a_method_is_trained(self):
        policy = policies.policy("gpt2", limits=(32, 4), spread=0.2)
        histories = [START, [*START, {"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}]]
        method: Method = load_method("mtpo", step=5.0, tau=0.02, mixture=True, num_candidates=6)
        judge = reward(policy, regularisation=0.02, mixture=method.mixture_weight)
        training = brm.Training(epochs=1.0, batch_size=2, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)
        report = brm.alignment.align(policy, judge, histories, method=method, rounds=6, training=training)
        assert report.rounds[0].policy_ess == pytest.approx(6.0, abs=1e-3)
        # The opponent grows with the policy, so that wins stay about even: the words are counted.
        drawn = policy.generate(histories, 60, seed=5)
        with policy.using(policy.reference):
            before = policy.generate(histories, 60, seed=5)
        share, first = (sum(r.text.split().count("w1") for g in d for r in g) / 120 for d in (drawn, before))
        assert share > first + 0.1

    def test_settings_are_checked(self):
        policy = policies.policy("gpt2")
        for name, value in (("regularisation", -1.0), ("mixture", 1.5)):
            with pytest.raises(ArgumentError, match=f"`{name}` is {value}"):
                reward(policy, **{name: value})
        assert environment(START) == "w2"
