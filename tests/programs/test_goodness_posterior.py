"""The goodness-conditioned posterior: the Pyro program against the density of the engines, and against closed forms."""

import math

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from pyro import poutine

import bayesrm as brm
from bayesrm.errors import ArgumentError
from bayesrm.programs import ExponentialTilt, Goodness, GoodnessPosterior, LogisticGoodness, ScoredCandidates
from bayesrm.selection import LowerConfidenceBound, RiskAverse, Thompson

NAN = math.nan
#: Three prompts with 4, 2 and 3 candidates.
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, False, True, True]])
GOODNESS = [ExponentialTilt(0.7), LogisticGoodness(0.6, threshold=0.4)]
both = pytest.mark.parametrize("goodness", GOODNESS, ids=["tilt", "logistic"])


def gaussian(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return brm.RewardBelief(mean, scale * torch.randn(3, 4, 3, generator=generator, dtype=torch.float64), MASK)


def drawn_belief(seed=0):
    return brm.RewardBelief.from_draws(gaussian(seed).sample(5, seed=seed), MASK)


def scored(belief, *, drawn=False, fill=NAN):
    """Candidates with normalised references, or draws; whatever stands outside the mask is `fill`."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(logits.masked_fill(~MASK, -math.inf), 1).masked_fill(~MASK, fill)
    if not drawn:
        return ScoredCandidates(belief, reference)
    proposal = reference + 0.3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return ScoredCandidates(belief, reference, proposal=proposal)


def log_joint(program, candidates, place, **latents):
    """Of the trace, for each prompt, with the response at `place` and the other latents given."""
    sites = {"response": torch.full((3,), place), **latents}
    trace = poutine.trace(poutine.condition(program, data=sites)).get_trace(candidates)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and "log_prob" in site)


def check(program, candidates, marginalise):
    """`log_density` is the log joint, with whatever is latent besides the response summed out by `marginalise`."""
    density = program.log_density(candidates)
    assert bool((density == -math.inf)[~MASK].all())
    for place in range(4):
        rows = MASK[:, place]
        found = marginalise(place)
        torch.testing.assert_close(found[rows], density[rows, place], rtol=1e-9, atol=1e-9)
        assert bool((found[~rows] == -math.inf).all())


@both
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("utility", [brm.beliefs.expected, RiskAverse(b=0.5), LowerConfidenceBound(k=2.0)])
def test_trace_is_the_density_with_a_utility(goodness, drawn, utility):
    candidates = scored(gaussian(), drawn=drawn)
    program = GoodnessPosterior(goodness, utility)
    check(program, candidates, lambda place: log_joint(program, candidates, place))


@both
def test_trace_is_the_density_with_the_reward_integrated_out(goodness):
    # Narrow enough for Gauss-Hermite to be exact to the tolerance.
    belief = gaussian(scale=0.3)
    candidates, program = scored(belief), GoodnessPosterior(goodness, "marginal")
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    centred = belief.differences()

    def integrate(place):
        # The trace has the normal density of the reward; the rule wants the integrand over it.
        parts = []
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            reward = centred.mean[:, place] + float(node) * centred.std[:, place]
            normal = torch.distributions.Normal(centred.mean[:, place], centred.std[:, place].clamp_min(1e-12))
            joint = log_joint(program, candidates, place, reward=reward)
            parts.append(joint - normal.log_prob(reward) + math.log(weight))
        return torch.logsumexp(torch.stack(parts), 0)

    check(program, candidates, integrate)


@both
def test_trace_is_the_density_with_draws_summed_out(goodness):
    candidates, program = scored(drawn_belief()), GoodnessPosterior(goodness, "marginal")

    def total(place):
        joints = [log_joint(program, candidates, place, draw=torch.full((3,), s)) for s in range(5)]
        return torch.logsumexp(torch.stack(joints), 0)

    check(program, candidates, total)


@both
def test_pyro_sums_over_the_responses_itself(goodness):
    """Parallel enumeration of `response` gives log p(G = 1 | x), which is what `Enumeration` reports."""
    belief = brm.RewardBelief(gaussian().mean[:1], gaussian().root[:1])
    reference = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    candidates, program = ScoredCandidates(belief, reference), GoodnessPosterior(goodness)
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(pyro.infer.config_enumerate(program), lambda candidates: None, candidates)
    posterior = brm.fit(program, candidates, inference=brm.Enumeration())
    assert -loss == pytest.approx(float(posterior.log_evidence[0]), rel=1e-12)


def test_program_runs_with_a_reward_that_is_known():
    """Of a single candidate the deviation from the candidates' mean is 0, with certainty."""
    belief = brm.RewardBelief(torch.tensor([[2.0]]), torch.ones(1, 1, 1))
    candidates = ScoredCandidates(belief, torch.zeros(1, 1))
    trace = poutine.trace(GoodnessPosterior(LogisticGoodness(), "marginal")).get_trace(candidates)
    assert float(trace.nodes["reward"]["value"]) == pytest.approx(0.0, abs=1e-10)
    assert math.isfinite(trace.log_prob_sum())


def test_program_runs_forward():
    candidates = scored(gaussian())
    repeated = candidates.select(torch.arange(3).repeat(4000))
    with pyro.poutine.seed(rng_seed=0):
        places = GoodnessPosterior(LogisticGoodness(), "marginal")(repeated).reshape(4000, 3)
    for prompt in range(3):
        share = torch.bincount(places[:, prompt], minlength=4) / 4000
        expected = torch.where(MASK, candidates.reference.exp(), 0.0)[prompt]
        error = (expected * (1 - expected) / 4000).sqrt()
        assert bool(((share - expected).abs() <= 4.5 * error).all())


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 25.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_exactly_one_of_two_good_is_bradley_terry(threshold, temperature):
    """p_i (1 - p_j) / (p_i (1 - p_j) + p_j (1 - p_i)), in log odds: whatever says what is good cancels."""
    rewards = torch.linspace(-2.0, 3.0, 6, dtype=torch.float64)
    goodness = LogisticGoodness(temperature, threshold)
    offset = torch.full_like(rewards, threshold)
    good = goodness.log_prob(rewards, offset)
    bad = goodness.log_prob(2 * offset - rewards, offset)
    torch.testing.assert_close(torch.logaddexp(good, bad), torch.zeros_like(good), rtol=0.0, atol=1e-12)
    log_odds = (good - bad)[:, None] - (good - bad)[None, :]
    torch.testing.assert_close(log_odds, (rewards[:, None] - rewards[None, :]) / temperature)


def test_rare_goodness_is_the_exponential_tilt():
    candidates = scored(gaussian())
    tilt = GoodnessPosterior(ExponentialTilt(0.5)).log_density(candidates)
    rare = GoodnessPosterior(LogisticGoodness(0.5, threshold=20.0)).log_density(candidates)
    for density in (tilt, rare):
        density -= density.logsumexp(1, keepdim=True)
    torch.testing.assert_close(tilt[MASK], rare[MASK], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_marginal_tilt_is_optimistic_and_risk_averse_pessimistic(temperature):
    belief = gaussian()
    candidates, centred = scored(belief), belief.differences()

    def utility_of(posterior):
        log_goodness = posterior.log_goodness(candidates)
        return torch.where(MASK, temperature * (log_goodness - log_goodness[:, :1]), 0.0)

    marginal = utility_of(GoodnessPosterior(ExponentialTilt(temperature), "marginal"))
    averse = utility_of(GoodnessPosterior(ExponentialTilt(temperature), RiskAverse(b=temperature)))
    mean = utility_of(GoodnessPosterior(ExponentialTilt(temperature)))
    bonus = centred.variance / (2.0 * temperature)
    bonus = torch.where(MASK, bonus - bonus[:, :1], 0.0)
    torch.testing.assert_close(marginal, mean + bonus, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(averse, mean - bonus, rtol=1e-12, atol=1e-12)
    assert float(bonus.abs().max()) > 0.1


def test_joint_draw_is_one_world():
    candidates = scored(gaussian())
    found = GoodnessPosterior(ExponentialTilt(2.0), Thompson(seed=3)).log_goodness(candidates)
    world = gaussian().sample(1, seed=3)[0]
    expected = (world - world.masked_fill(~MASK, -math.inf).amax(1, keepdim=True)) / 2.0
    torch.testing.assert_close(found[MASK], expected[MASK])


def test_shared_offset_of_rewards_changes_nothing():
    belief = gaussian()
    moved = brm.RewardBelief(
        belief.mean + 100.0, torch.cat([belief.root, torch.full((3, 4, 1), 9.0).double()], 2), MASK
    )
    for goodness in GOODNESS:
        for utility in (brm.beliefs.expected, "marginal", RiskAverse(b=1.0)):
            program = GoodnessPosterior(goodness, utility)
            one, other = (program.log_density(scored(b)) for b in (belief, moved))
            torch.testing.assert_close(one[MASK], other[MASK], rtol=1e-9, atol=1e-9)


def log_expectation(mean, std):
    """Log E[sigmoid(x)] by adaptive quadrature around the mode of the integrand."""
    low, high = mean - std**2, mean + std**2
    for _ in range(200):
        mode = 0.5 * (low + high)
        low, high = (mode, high) if scipy.special.expit(-mode) > (mode - mean) / std**2 else (low, mode)

    def log_integrand(x):
        return scipy.special.log_expit(x) + scipy.stats.norm.logpdf(x, mean, std)

    peak = log_integrand(mode)
    value, _ = scipy.integrate.quad(
        lambda x: math.exp(log_integrand(x) - peak),
        mode - 12 * std,
        mode + 12 * std,
        points=[mode, 0.0] if abs(mode) < 12 * std else [mode],
        limit=400,
    )
    return peak + math.log(value)


@pytest.mark.parametrize("std", [0.0, 0.3, 1.5, 2.0, 2.6, 5.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginal_logistic_goodness_holds_far_from_the_threshold(std, dtype):
    means = [-200.0, -60.0, -40.0, -30.0, -8.0, -3.0, -0.2, 0.0, 0.5, 4.0, 30.0]
    belief = brm.RewardBelief(torch.tensor([means], dtype=dtype), torch.full((1, len(means), 1), std, dtype=dtype))
    found = LogisticGoodness().marginal_log_prob(belief, torch.zeros(1, 1, dtype=dtype))[0]
    for value, mean in zip(found.tolist(), means, strict=True):
        expected = log_expectation(mean, std) if std else float(scipy.special.log_expit(mean))
        assert value == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-9, abs=2e-5)


def test_errors_name_the_argument():
    with pytest.raises(ArgumentError, match="`temperature` is 0"):
        ExponentialTilt(0.0)
    with pytest.raises(ArgumentError, match="`temperature` is -1"):
        LogisticGoodness(-1.0)
    with pytest.raises(ArgumentError, match="`threshold` is inf"):
        LogisticGoodness(threshold=math.inf)
    with pytest.raises(ArgumentError, match="`utility` is 'mean'"):
        GoodnessPosterior(utility="mean")
    with pytest.raises(ArgumentError, match="`utility` is <class"):
        GoodnessPosterior(utility=RiskAverse)
    with pytest.raises(ArgumentError, match="`goodness` is <class"):
        GoodnessPosterior(ExponentialTilt)
    with pytest.raises(ArgumentError, match=r"`utility` returned scores of shape \(3,\)"):
        GoodnessPosterior(utility=lambda belief: belief.mean[:, 0]).log_density(scored(gaussian()))
    with pytest.raises(ArgumentError, match="`utility` returned"):
        GoodnessPosterior(utility=lambda belief: belief.mean / 0.0).log_density(scored(gaussian()))
    assert isinstance(ExponentialTilt(), Goodness)


def test_candidates_are_checked():
    belief = gaussian()
    reference = scored(belief).reference
    preferences = torch.where(MASK[:, :, None] & MASK[:, None, :], 0.5, NAN).double()
    with pytest.raises(ArgumentError, match=r"`reference` has shape \(3, 3\)"):
        ScoredCandidates(belief, reference[:, :3])
    with pytest.raises(ArgumentError, match="`proposal` has entries of real candidates that are not finite"):
        ScoredCandidates(belief, reference, proposal=torch.full_like(reference, -math.inf))
    with pytest.raises(ArgumentError, match="`anchor` requires gradients"):
        ScoredCandidates(belief, reference, anchor=reference.clone().requires_grad_())
    with pytest.raises(ArgumentError, match="`sources` is"):
        ScoredCandidates(belief, reference, sources=("policy", "policy", "policy"))
    with pytest.raises(ArgumentError, match="`sources` is"):
        ScoredCandidates(belief, reference, sources=("policy", "policy", "policy", "judge"))
    with pytest.raises(ArgumentError, match="`preferences` must hold probabilities"):
        ScoredCandidates(belief, reference, preferences=preferences + 0.1)
    beyond = preferences.clone()
    beyond[0, 0, 1], beyond[0, 1, 0] = 1.5, -0.5
    with pytest.raises(ArgumentError, match="`preferences` must hold probabilities"):
        ScoredCandidates(belief, reference, preferences=beyond)
    with pytest.raises(ArgumentError, match="the target needs `anchor`"):
        _ = ScoredCandidates(belief, reference).previous
    kept = ScoredCandidates(belief, reference, preferences=preferences).preference_matrix
    torch.testing.assert_close(kept, torch.where(preferences.isnan(), 0.0, preferences))


def test_selected_prompts_keep_everything():
    belief = drawn_belief()
    reference = scored(belief).reference
    preferences = belief.preference_matrix()
    candidates = ScoredCandidates(
        belief, reference, reference - 1.0, reference + 1.0, preferences, ("policy", "anchor", "anchor", "policy")
    )
    for prompts in (torch.tensor([2, 0]), slice(1, 3)):
        part = candidates.select(prompts)
        assert part.sources == candidates.sources
        for name in ("reference", "proposal", "anchor", "preferences"):
            torch.testing.assert_close(getattr(part, name), getattr(candidates, name)[prompts], equal_nan=True)
        whole, some = (GoodnessPosterior(utility="marginal").log_density(c) for c in (candidates, part))
        torch.testing.assert_close(some, whole[prompts])
