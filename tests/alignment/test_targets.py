"""Target distributions against brute force, constrained optimisation and the update formulas written out."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch

import bayesrm as brm
from bayesrm.alignment.targets import BestOfN, ChiSquaredPessimism, MirrorDescent
from bayesrm.engines import Target, response_posterior
from bayesrm.errors import ArgumentError
from bayesrm.programs import ScoredCandidates
from bayesrm.selection import InferenceTimePessimism, LowerConfidenceBound, Thompson

NAN = math.nan
MASK = torch.tensor([[True] * 5, [True, True, False, True, False], [False, False, False, False, True]])


def belief_of(rewards, mask=None):
    mean = torch.as_tensor(rewards)
    return brm.RewardBelief(mean, torch.zeros(*mean.shape, 1, dtype=mean.dtype), mask)


def ragged(seed=0, *, ties=True, uniform=False, dtype=torch.float64):
    """Three prompts with 5, 3 and 1 candidates; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 5, generator=generator, dtype=dtype)
    if ties:
        rewards = rewards.round()
    logits = torch.zeros(3, 5, dtype=dtype) if uniform else torch.randn(3, 5, generator=generator, dtype=dtype)
    reference = torch.log_softmax(logits.masked_fill(~MASK, -math.inf), 1).masked_fill(~MASK, NAN)
    anchor = torch.randn(3, 5, generator=generator, dtype=dtype)
    anchor = torch.log_softmax(anchor.masked_fill(~MASK, -math.inf), 1).masked_fill(~MASK, NAN)
    return ScoredCandidates(belief_of(rewards, MASK), reference, anchor=anchor)


def check_contract(target, candidates):
    """Minus infinity outside the mask, never NaN, and a `Target`."""
    density = target.log_density(candidates)
    assert isinstance(target, Target)
    assert density.dtype == candidates.reference.dtype
    assert bool((density == -math.inf)[~candidates.mask].all())
    assert not bool(density.isnan().any())
    return density


def best_of_n_by_enumeration(rewards, p0, n):
    """P(the best of n is y): over all n-tuples, the best ones of a tuple sharing by chance."""
    result = np.zeros(len(rewards))
    for draws in itertools.product(range(len(rewards)), repeat=n):
        top = max(rewards[i] for i in draws)
        best = [i for i in draws if rewards[i] == top]
        for i in best:
            result[i] += math.prod(p0[j] for j in draws) / len(best)
    return result


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_brute_force(n, uniform, ties):
    candidates = ragged(ties=ties, uniform=uniform)
    density = check_contract(BestOfN(n), candidates).exp()
    for prompt, real in enumerate(MASK):
        rewards = candidates.belief.mean[prompt, real].tolist()
        p0 = candidates.reference[prompt, real].exp().tolist()
        expected = torch.from_numpy(best_of_n_by_enumeration(rewards, p0, n))
        torch.testing.assert_close(density[prompt, real], expected, rtol=1e-12, atol=1e-14)


def test_best_of_n_is_the_papers_sum():
    """Theorem 1 of 2407.14622, term by term."""
    candidates, n = ragged(seed=3), 7
    density = BestOfN(n).log_density(candidates).exp()
    for prompt, real in enumerate(MASK):
        rewards, p0 = candidates.belief.mean[prompt, real], candidates.reference[prompt, real].exp()
        for place, y in enumerate(torch.nonzero(real)[:, 0].tolist()):
            below = float(p0[rewards < rewards[place]].sum())
            up_to = float(p0[rewards <= rewards[place]].sum())
            total = sum((below / up_to) ** (i - 1) for i in range(1, n + 1))
            expected = float(p0[place]) * up_to ** (n - 1) * total
            assert float(density[prompt, y]) == pytest.approx(expected, rel=1e-12)


def test_best_of_n_sees_the_order_alone():
    candidates = ragged()
    monotone = brm.RewardBelief((3.0 * candidates.belief.mean).exp(), candidates.belief.root, MASK)
    other = ScoredCandidates(monotone, candidates.reference)
    torch.testing.assert_close(BestOfN(5).log_density(other), BestOfN(5).log_density(candidates))
    # Negative control: another order.
    reverse = brm.RewardBelief(-candidates.belief.mean, candidates.belief.root, MASK)
    found = BestOfN(5).log_density(ScoredCandidates(reverse, candidates.reference))
    assert not torch.allclose(found[0], BestOfN(5).log_density(candidates)[0], atol=0.1)


def test_best_of_n_from_draws_converges():
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64).round(decimals=1)
    p0 = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    proposal = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    exact = BestOfN(4).log_density(ScoredCandidates(belief_of(rewards[None]), p0.log()[None]))[0]
    errors = []
    for draws in (100, 10_000):
        places = torch.multinomial(proposal.expand(20, -1), draws, replacement=True, generator=generator)
        candidates = ScoredCandidates(belief_of(rewards[places]), p0.log()[places], proposal=proposal.log()[places])
        found = BestOfN(4).log_density(candidates)
        errors.append(float((found - exact[places]).square().mean().sqrt()))
    # The error falls as one over the square root of the draws, here by 10.
    assert errors[1] < errors[0] / 6
    assert errors[1] < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 10_000])
def test_best_of_n_at_extremes(dtype, n):
    p0 = torch.tensor([1e-12, 0.5, 1e-12, 0.5 - 2e-12], dtype=torch.float64)
    candidates = ScoredCandidates(
        belief_of(torch.tensor([[3.0, 0.0, -2.0, 1.0]], dtype=dtype)), p0.log().to(dtype)[None]
    )
    density = check_contract(BestOfN(n), candidates)[0].double()
    order = [2, 1, 3, 0]
    cumulative = p0[order].cumsum(0)
    for place, y in enumerate(order):
        up_to = float(cumulative[place])
        below = float(cumulative[place] - p0[y]) if place else 0.0
        # log(up_to^n - below^n), by expm1 where the two nearly agree.
        ratio = n * math.log1p(-float(p0[y]) / up_to) if below else -math.inf
        expected = n * math.log(up_to) + math.log(-math.expm1(ratio))
        assert float(density[y]) == pytest.approx(expected, rel=2e-6 if dtype == torch.float32 else 1e-9, abs=1e-6)
    tail = ScoredCandidates(
        belief_of(torch.tensor([[1.0, 0.0, 2.0, 3.0]], dtype=dtype)),
        torch.tensor([[-1e-7, -120.0, -300.0, -900.0]], dtype=dtype),
    )
    density = check_contract(BestOfN(n), tail)[0]
    assert bool(torch.isfinite(density).all())
    # Above all that has mass, a response counts n times: n chances to draw it.
    assert density[2:].tolist() == pytest.approx([-300.0 + math.log(n), -900.0 + math.log(n)], rel=1e-5)


def test_best_of_n_takes_a_utility():
    generator = torch.Generator().manual_seed(1)
    belief = brm.RewardBelief(torch.zeros(1, 3), torch.randn(1, 3, 2, generator=generator))
    reference = torch.full((1, 3), 1 / 3).log()
    rule = LowerConfidenceBound(k=1.0)
    found = BestOfN(2, rule).log_density(ScoredCandidates(belief, reference))
    expected = BestOfN(2).log_density(ScoredCandidates(belief_of(rule(belief)), reference))
    torch.testing.assert_close(found, expected)


def constrained(rewards, p0, strength):
    """argmax E[r] - strength / 2 chi2(pi || p0) over the simplex, by bisection for the normaliser."""

    def policy(threshold):
        return p0 * np.maximum(0.0, (rewards - threshold) / strength)

    threshold = scipy.optimize.brentq(
        lambda t: policy(t).sum() - 1.0, rewards.min() - strength - 1.0, rewards.max(), xtol=1e-15, rtol=1e-15
    )
    return policy(threshold)


@pytest.mark.parametrize("strength", [0.03, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("ties", [False, True])
def test_chi_squared_is_the_constrained_optimum(strength, ties):
    candidates = ragged(seed=2, ties=ties)
    density = check_contract(ChiSquaredPessimism(strength), candidates).exp()
    torch.testing.assert_close(density.sum(1), torch.ones(3).double(), rtol=1e-12, atol=0.0)
    for prompt, real in enumerate(MASK):
        rewards = candidates.belief.mean[prompt, real].numpy()
        p0 = candidates.reference[prompt, real].exp().numpy()
        found = density[prompt, real].numpy()
        np.testing.assert_allclose(found, constrained(rewards, p0, strength), rtol=1e-9, atol=1e-11)
        # Karush-Kuhn-Tucker: one multiplier where there is mass, no response without mass would gain by any.
        gradient = rewards - strength * (found / p0 - 1.0)
        multiplier = gradient[found > 0]
        np.testing.assert_allclose(multiplier, multiplier[0], rtol=0, atol=1e-9 * (1 + strength))
        assert (gradient[found == 0] <= multiplier[0] + 1e-9).all()


def test_chi_squared_against_a_general_optimiser():
    rewards, p0, strength = np.array([0.3, -1.0, 1.2, 0.9]), np.array([0.4, 0.3, 0.1, 0.2]), 0.7

    def loss(policy):
        return -(policy @ rewards) + 0.5 * strength * (((policy - p0) ** 2) / p0).sum()

    best = scipy.optimize.minimize(
        loss, p0, method="SLSQP", bounds=[(0, 1)] * 4, tol=1e-14,
        constraints={"type": "eq", "fun": lambda policy: policy.sum() - 1},
    )  # fmt: skip
    candidates = ScoredCandidates(belief_of(torch.from_numpy(rewards)[None]), torch.from_numpy(p0).log()[None])
    found = ChiSquaredPessimism(strength).log_density(candidates).exp()[0].numpy()
    np.testing.assert_allclose(found, best.x, atol=1e-6)
    assert loss(found) <= best.fun + 1e-12


def test_chi_squared_limits():
    candidates = ragged(ties=False)
    wide = ChiSquaredPessimism(1e9).log_density(candidates)
    torch.testing.assert_close(wide[MASK], candidates.reference[MASK], rtol=0.0, atol=1e-8)
    narrow = ChiSquaredPessimism(1e-9).log_density(candidates).exp()
    best = torch.nn.functional.one_hot(candidates.belief.mean.masked_fill(~MASK, -math.inf).argmax(1), 5)
    torch.testing.assert_close(narrow, best.double(), rtol=0.0, atol=1e-9)
    # No response becomes more than (max r - lambda) / strength times as probable: here at most 1 + range / strength.
    ratio = (ChiSquaredPessimism(0.5).log_density(candidates) - candidates.reference).exp()[0]
    spread = float(candidates.belief.mean[0].max() - candidates.belief.mean[0].min())
    assert float(ratio.max()) <= 1 + spread / 0.5


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_chi_squared_is_the_selection_rules_policy_on_draws(offset):
    rewards = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    log_p = torch.full((4, 9), -3.0, dtype=torch.float64)
    candidates = ScoredCandidates(belief_of(rewards), log_p, proposal=log_p)
    posterior = response_posterior(ChiSquaredPessimism(0.4), candidates)
    expected = InferenceTimePessimism(b=0.4).probabilities(belief_of(rewards))
    # The rule's threshold has the rounding of float32, 6e-8 of a strength.
    torch.testing.assert_close(posterior.weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chi_squared_with_a_best_response_of_no_mass(dtype):
    reference = torch.tensor([[-1e-7, -900.0, -20.0]], dtype=dtype)
    candidates = ScoredCandidates(belief_of(torch.tensor([[0.0, 5.0, 1.0]], dtype=dtype)), reference)
    density = check_contract(ChiSquaredPessimism(1.0), candidates)[0]
    assert density.tolist() == pytest.approx([0.0, -900.0 + math.log(6.0), -20.0 + math.log(2.0)], abs=1e-3)


def game(seed=0, *, prompts=2, size=4):
    """An intransitive preference, a reference and a previous policy on all responses."""
    generator = torch.Generator().manual_seed(seed)
    above = torch.rand(prompts, size, size, generator=generator, dtype=torch.float64).triu(1)
    preferences = above + (1.0 - above.transpose(1, 2)).tril(-1) + 0.5 * torch.eye(size).double()
    reference, anchor = (
        torch.log_softmax(torch.randn(prompts, size, generator=generator, dtype=torch.float64), 1) for _ in range(2)
    )
    rewards = torch.randn(prompts, size, generator=generator, dtype=torch.float64)
    return ScoredCandidates(belief_of(rewards), reference, anchor=anchor, preferences=preferences)


def normalised(log_density):
    return torch.log_softmax(log_density, 1)


def against(candidates, opponent):
    """P(y > opponent), by loops."""
    wins = torch.zeros_like(candidates.reference)
    for b, i, j in itertools.product(*map(range, candidates.preferences.shape)):
        wins[b, i] += candidates.preferences[b, i, j] * opponent[b, j]
    return wins


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_nash_md_update(tau):
    """pi_{t+1} of pi_mix exp(eta P(y > pi_mix)), pi_mix of pi_t^(1 - eta tau) mu^(eta tau) (2312.00886)."""
    candidates, eta = game(), 1.6
    mixture = normalised((1 - eta * tau) * candidates.anchor + eta * tau * candidates.reference)
    expected = normalised(mixture + eta * against(candidates, mixture.exp()))
    found = MirrorDescent(eta, tau, opponent="mixture").log_density(candidates)
    torch.testing.assert_close(normalised(found), expected)


def test_inpo_update():
    """log pi_{t+1} of (tau/eta) log p0 + (1 - tau/eta) log pi_t + P(y > pi_t) / eta (2407.00617)."""
    candidates, eta, tau = game(1), 0.5, 0.2
    wins = against(candidates, candidates.anchor.exp())
    expected = tau / eta * candidates.reference + (1 - tau / eta) * candidates.anchor + wins / eta
    found = MirrorDescent(1 / eta, tau).log_density(candidates)
    torch.testing.assert_close(normalised(found), normalised(expected))


@pytest.mark.parametrize("payoff", ["probability", "log_probability"])
def test_wind_update(payoff):
    """pi_t^(1 / (1 + eta tau)) p0^(eta tau / (1 + eta tau)) exp(eta / (1 + eta tau) payoff) (2410.20727)."""
    candidates, eta, tau = game(2), 0.8, 0.3
    wins = against(candidates, candidates.anchor.exp())
    worth = wins.log() if payoff == "log_probability" else wins
    share = 1 / (1 + eta * tau)
    expected = share * candidates.anchor + eta * tau * share * candidates.reference + eta * share * worth
    found = MirrorDescent(eta * share, tau, payoff=payoff).log_density(candidates)
    torch.testing.assert_close(normalised(found), normalised(expected))


def test_reference_opponent_and_reward_payoff():
    candidates = game(3)
    wins = against(candidates, candidates.reference.exp())
    found = MirrorDescent(0.7, opponent="reference").log_density(candidates)
    torch.testing.assert_close(normalised(found), normalised(candidates.anchor + 0.7 * wins))
    found = MirrorDescent(0.7, 0.2, payoff="reward").log_density(candidates)
    expected = 0.86 * candidates.anchor + 0.14 * candidates.reference + 0.7 * candidates.belief.mean
    torch.testing.assert_close(normalised(found), normalised(expected))


@pytest.mark.parametrize("opponent", ["previous", "mixture", "reference"])
def test_win_probability_from_draws_converges(opponent):
    candidates = game(4, prompts=1)
    target = MirrorDescent(1.0, 0.4, opponent=opponent)
    exact = target.win_probability(candidates)[0]
    places = torch.multinomial(candidates.anchor.exp(), 1500, replacement=True, generator=torch.manual_seed(0))[0]
    drawn = ScoredCandidates(
        belief_of(candidates.belief.mean[:, places]),
        candidates.reference[:, places],
        proposal=candidates.anchor[:, places],
        anchor=candidates.anchor[:, places],
        preferences=candidates.preferences[:, places][:, :, places],
    )
    found = target.win_probability(drawn)[0]
    # Weighted means of 1500 numbers in [0, 1]: a standard error below 0.5 / sqrt(ess).
    weights = drawn.log_weights_of(
        target.start(drawn) if opponent == "mixture" else drawn.reference if opponent == "reference" else drawn.anchor
    ).exp()
    error = 0.5 * float(weights.square().sum().sqrt())
    assert float((found - exact[places]).abs().max()) < 4.5 * error < 0.12


def test_regression_on_pair_margins_has_the_step_as_minimum():
    """Weighted least squares over pairs from the previous policy, solved by the normal equations (INPO)."""
    candidates = game(5)
    target = MirrorDescent(2.0, 0.3)
    margins = target.pair_margins(candidates)
    for prompt in range(2):
        policy = candidates.anchor[prompt].exp().numpy()
        size = len(policy)
        rows, values, weights = [], [], []
        for i, j in itertools.product(range(size), repeat=2):
            row = np.zeros(size)
            row[i] += 1.0
            row[j] -= 1.0
            rows.append(row)
            values.append(float(margins[prompt, i, j]))
            weights.append(math.sqrt(policy[i] * policy[j]))
        scale = np.array(weights)
        solution, *_ = np.linalg.lstsq(scale[:, None] * np.array(rows), scale * np.array(values), rcond=None)
        found = normalised(torch.from_numpy(solution)[None])[0]
        expected = normalised(target.log_density(candidates))[prompt]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_mirror_descent_reaches_the_nash_policy():
    """Self-play with any one step; Nash-MD with steps 2 / (tau (t + 2)), as fast as the paper says."""
    candidates, tau = game(6), 0.3

    def iterate(steps, opponent):
        policy = candidates.reference
        for step in steps:
            state = ScoredCandidates(
                candidates.belief, candidates.reference, anchor=policy, preferences=candidates.preferences
            )
            policy = normalised(MirrorDescent(step, tau, opponent=opponent).log_density(state))
        return policy

    nash = iterate([0.5] * 400, "previous")
    fixed = normalised(candidates.reference + against(candidates, nash.exp()) / tau)
    torch.testing.assert_close(nash, fixed, rtol=0.0, atol=1e-12)

    def gap(policy):
        return float((nash.exp() * (nash - policy)).sum(1).max())

    rounds = 400
    falling = gap(iterate([2.0 / (tau * (t + 2)) for t in range(rounds)], "mixture"))
    assert falling < 8.0 / (tau**2 * (rounds + 1))
    # One step for all rounds stops beside the Nash policy: the mixture is no policy of the last iterate.
    assert gap(iterate([0.5] * 400, "mixture")) > 10 * falling


@pytest.mark.parametrize("opponent", ["previous", "mixture", "reference"])
@pytest.mark.parametrize("payoff", ["probability", "log_probability", "reward"])
def test_mirror_descent_ignores_what_is_masked(opponent, payoff):
    candidates = ragged()
    real = MASK[:, :, None] & MASK[:, None, :]
    preferences = torch.where(real, candidates.belief.preference_matrix(), NAN)
    masked = ScoredCandidates(
        candidates.belief, candidates.reference, anchor=candidates.anchor, preferences=preferences
    )
    target = MirrorDescent(1.0, 0.3, opponent=opponent, payoff=payoff)
    for scored in (candidates, masked):
        density = check_contract(target, scored)
        for prompt, keep in enumerate(MASK):
            alone = ScoredCandidates(
                belief_of(scored.belief.mean[prompt, keep][None]),
                scored.reference[prompt, keep][None],
                anchor=scored.anchor[prompt, keep][None],
            )
            torch.testing.assert_close(density[prompt, keep], target.log_density(alone)[0])


@pytest.mark.parametrize("opponent", ["previous", "mixture", "reference"])
def test_beliefs_may_be_more_precise_than_log_probabilities(opponent):
    """A linear head believes in float64, and a language model's log-probabilities are float32."""
    exact = ragged()
    mixed = ScoredCandidates(exact.belief, exact.reference.float(), anchor=exact.anchor.float())
    target = MirrorDescent(1.5, 0.2, opponent=opponent)
    found, expected = (target.log_density(c)[MASK].double() for c in (mixed, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_mirror_descent_needs_an_anchor():
    candidates = game()
    with pytest.raises(ArgumentError, match="needs `anchor`"):
        MirrorDescent(1.0).log_density(ScoredCandidates(candidates.belief, candidates.reference))


def test_errors_name_the_argument():
    for n in (0, -1, True):
        with pytest.raises(ArgumentError, match="`n` is"):
            BestOfN(n)
    with pytest.raises(ArgumentError, match="`utility` is <class"):
        ChiSquaredPessimism(1.0, Thompson)
    with pytest.raises(ArgumentError, match="`utility` returned scores of shape"):
        ChiSquaredPessimism(1.0, lambda belief: belief.mean[0]).log_density(ragged())
    for strength in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="`strength` is"):
            ChiSquaredPessimism(strength)
    with pytest.raises(ArgumentError, match="`step` is 0"):
        MirrorDescent(0.0)
    with pytest.raises(ArgumentError, match=r"`regularisation` is 0\.6; it lies between 0 and 1 / step = 0\.5"):
        MirrorDescent(2.0, 0.6)
    with pytest.raises(ArgumentError, match="`opponent` is 'nobody'"):
        MirrorDescent(1.0, opponent="nobody")
    with pytest.raises(ArgumentError, match="`payoff` is 'fame'"):
        MirrorDescent(1.0, payoff="fame")


@pytest.mark.parametrize("n", [2, 3, 8])
def test_differences_of_win_probabilities_among_draws_are_unbiased(n):
    # The tie of a draw with itself shrinks its value; that its rivals meet it makes up for that in the difference.
    generator = torch.Generator().manual_seed(0)
    count, repeats = 5, 40_000
    policy = torch.rand(count, generator=generator).double().log_softmax(0)
    scores = torch.randn(count, generator=generator).double()
    matrix = torch.sigmoid(scores[:, None] - scores[None, :])
    exact = matrix @ policy.exp()
    places = torch.multinomial(policy.exp(), repeats * n, replacement=True, generator=generator).reshape(repeats, n)
    log_probs = policy[places]
    candidates = ScoredCandidates(
        brm.RewardBelief(scores[places], torch.zeros(repeats, n, 1, dtype=torch.float64)),
        reference=log_probs, proposal=log_probs, anchor=log_probs,
        preferences=matrix[places[:, :, None], places[:, None, :]],
    )  # fmt: skip
    wins = MirrorDescent(step=1.0).win_probability(candidates)
    advantage = wins[:, 0] - wins[:, 1:].mean(1)
    for response in range(count):
        found = advantage[places[:, 0] == response]
        error = float(found.std() / len(found) ** 0.5)
        assert abs(float(found.mean() - exact[response] + 0.5)) < 4.5 * error + 1e-12
