"""The posterior over responses: enumeration against loops, importance sampling against enumeration."""

import math
import warnings

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.engines import response_posterior
from bayesrm.errors import ArgumentError, DataError, EngineError, ParetoWarning
from bayesrm.programs import ExponentialTilt, GoodnessPosterior, LogisticGoodness, ScoredCandidates
from bayesrm.selection import RiskAverse

RESPONSES = 12


def world(seed=0, dtype=torch.float64):
    """One prompt whose responses can be enumerated: means, covariance root, log p0 and log p' of another proposal."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(RESPONSES, generator=generator, dtype=dtype)
    root = 0.5 * torch.randn(RESPONSES, 2, generator=generator, dtype=dtype)
    reference = torch.log_softmax(torch.randn(RESPONSES, generator=generator, dtype=dtype), 0)
    # Half of it uniform, so that no response has a large weight and the normal limit of the average is near.
    proposal = (0.5 * reference.exp() + 0.5 / RESPONSES).log()
    return mean, root, reference, proposal


def enumerated(mean, root, reference):
    return ScoredCandidates(brm.RewardBelief(mean[None], root[None]), reference[None])


def drawn(mean, root, reference, proposal, *, prompts, draws, seed):
    """As many independent sets of draws from the proposal as prompts, and the places of the draws."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.multinomial(proposal.exp().expand(prompts, -1), draws, replacement=True, generator=generator)
    belief = brm.RewardBelief(mean[places], root[places])
    return ScoredCandidates(belief, reference[places], proposal=proposal[places]), places


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_enumeration_is_the_loop(dtype):
    mean, root, reference, _ = world(dtype=dtype)
    mask = torch.ones(2, RESPONSES, dtype=torch.bool)
    mask[1, 5:] = False
    log_p0 = torch.stack([reference, torch.log_softmax(reference.masked_fill(~mask[1], -math.inf), 0)])
    belief = brm.RewardBelief(mean.expand(2, -1), root.expand(2, -1, -1), mask)
    log_p0[1, 5:] = math.nan
    posterior = brm.fit(GoodnessPosterior(LogisticGoodness(0.5, 0.3)), ScoredCandidates(belief, log_p0))
    for prompt, count in enumerate((RESPONSES, 5)):
        r, p = mean[:count].double().numpy(), np.exp(log_p0[prompt, :count].double().numpy())
        centre = sum(p[i] * r[i] for i in range(count)) + 0.3
        joint = [p[i] / (1 + math.exp(-(r[i] - centre) / 0.5)) for i in range(count)]
        weights = [value / sum(joint) for value in joint]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert posterior.weights[prompt, :count].tolist() == pytest.approx(weights, rel=tolerance)
        assert not bool(posterior.weights[prompt, count:].any())
        assert float(posterior.log_evidence[prompt]) == pytest.approx(math.log(sum(joint)), rel=tolerance)
        kl = sum(w * math.log(w / q) for w, q in zip(weights, p, strict=True))
        assert float(posterior.kl_to_reference()[prompt]) == pytest.approx(kl, rel=10 * tolerance)
        value, error = posterior.expectation(belief.mean)
        assert float(value[prompt]) == pytest.approx(float(np.dot(weights, r)), rel=10 * tolerance)
        assert float(error[prompt]) == 0.0
        assert float(posterior.ess[prompt]) == pytest.approx(1 / sum(w * w for w in weights), rel=10 * tolerance)
    assert bool(posterior.reliable.all())
    assert not posterior.smoothed
    assert not bool(posterior.k_hat.any())


def test_enumeration_refuses_what_is_not_all_there_is():
    mean, root, reference, proposal = world()
    draws, _ = drawn(mean, root, reference, proposal, prompts=1, draws=30, seed=0)
    with pytest.raises(EngineError, match="carry `proposal`, so they are draws"):
        brm.fit(GoodnessPosterior(), draws, inference=brm.Enumeration())
    part = enumerated(mean[:-1], root[:-1], reference[:-1])
    with pytest.raises(EngineError, match=r"prompt 0 probability 0\.\d+ in all, not 1"):
        brm.fit(GoodnessPosterior(), part)
    with pytest.raises(EngineError, match="carry no `proposal`"):
        brm.fit(GoodnessPosterior(), enumerated(mean, root, reference), inference=brm.ImportanceSampling())
    with pytest.raises(EngineError, match="Laplace cannot serve a GoodnessPosterior; use Enumeration"):
        brm.fit(GoodnessPosterior(), draws, inference=brm.Laplace())
    data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]], outcome=[0])
    with pytest.raises(DataError, match="GoodnessPosterior explains ScoredCandidates"):
        brm.fit(GoodnessPosterior(), data)
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
    with pytest.raises(EngineError, match="cannot serve a RewardModel"):
        brm.fit(model, data, inference=brm.Enumeration())


@pytest.mark.parametrize("utility", [brm.beliefs.expected, RiskAverse(b=1.0, spread="pointwise")])
def test_importance_sampling_agrees_with_enumeration(utility):
    """Expectations within their reported errors, at the nominal rate, over 500 independent sets of 800 draws."""
    mean, root, reference, proposal = world()
    program = GoodnessPosterior(ExponentialTilt(1.0), utility)
    exact = brm.fit(program, enumerated(mean, root, reference))
    truth = float(exact.expectation(mean[None])[0][0])
    candidates, places = drawn(mean, root, reference, proposal, prompts=500, draws=800, seed=1)
    posterior = response_posterior(program, candidates, smooth=False)
    value, error = posterior.expectation(mean[places], allow_unreliable=True)
    z = (value - truth) / error
    assert float(z.abs().max()) < 4.5
    # Shares of a binomial of 500.
    for bound, nominal in ((1.0, 0.6827), (1.96, 0.95)):
        share = float((z.abs() < bound).double().mean())
        assert share == pytest.approx(nominal, abs=4.5 * math.sqrt(nominal * (1 - nominal) / 500))
    assert float(value.mean()) == pytest.approx(truth, abs=4.5 * float(value.std()) / math.sqrt(500) + 1.0 / 800)


def test_evidence_is_unbiased():
    mean, root, reference, proposal = world(seed=2)
    # A goodness whose offset is not estimated from the draws themselves.
    fixed = LogisticGoodness(0.8)
    belief_mean = float((reference.exp() * mean).sum())
    exact = enumerated(mean, root, reference)
    truth = float(brm.fit(GoodnessPosterior(fixed), exact).log_evidence.exp()[0])

    class Known:
        def log_density(self, candidates):
            offset = torch.full_like(candidates.reference, belief_mean)
            return candidates.reference + fixed.log_prob(candidates.belief.mean, offset)

    candidates, _ = drawn(mean, root, reference, proposal, prompts=5000, draws=8, seed=3)
    evidence = response_posterior(Known(), candidates).log_evidence.exp()
    assert float(evidence.mean()) == pytest.approx(truth, abs=4.5 * float(evidence.std()) / math.sqrt(5000))
    # Jensen: the logarithm is not, and the test would see it.
    log_error = 4.5 * float(evidence.log().std()) / math.sqrt(5000)
    assert abs(float(evidence.log().mean()) - math.log(truth)) > log_error


def test_forgetting_the_reference_is_seen():
    """Negative control: weights without p0 / p' miss the truth by many errors."""
    mean, root, reference, proposal = world()
    exact = brm.fit(GoodnessPosterior(), enumerated(mean, root, reference))
    truth = float(exact.expectation(mean[None])[0][0])
    candidates, places = drawn(mean, root, reference, proposal, prompts=1, draws=20_000, seed=1)
    wrong = ScoredCandidates(candidates.belief, candidates.reference, proposal=candidates.reference)
    for scored, low, high in ((candidates, 0.0, 4.5), (wrong, 9.0, math.inf)):
        value, error = response_posterior(GoodnessPosterior(), scored).expectation(mean[places])
        assert low <= abs(float(value[0]) - truth) / float(error[0]) <= high


def continuous(spread, *, draws=400, prompts=2, seed=0):
    """Rewards from a normal distribution of this standard deviation: the weights exp(r) are log-normal."""
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(prompts, draws, generator=generator, dtype=torch.float64)
    log_p = torch.zeros(prompts, draws, dtype=torch.float64)
    return ScoredCandidates(brm.RewardBelief(mean, torch.zeros(prompts, draws, 1).double()), log_p, proposal=log_p)


def test_heavy_tails_are_refused():
    program = GoodnessPosterior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = brm.fit(program, continuous(0.5))
    assert bool(good.reliable.all())
    assert good.smoothed
    with pytest.warns(ParetoWarning, match=r"weights of 2 of 2 prompts have too heavy a tail, the first prompt 0"):
        bad = brm.fit(program, continuous(6.0))
    assert not bool(bad.reliable.any())
    with pytest.raises(EngineError, match="weights of prompt 0 cannot be trusted"):
        bad.expectation(bad.candidates.belief.mean)
    assert bad.expectation(bad.candidates.belief.mean, allow_unreliable=True)[0].shape == (2,)
    with pytest.raises(EngineError, match="draw more candidates"):
        brm.fit(program, continuous(6.0), inference=brm.ImportanceSampling(max_k_hat=0.7))
    brm.fit(program, continuous(0.5), inference=brm.ImportanceSampling(max_k_hat=0.7))


def test_smoothing_is_that_of_psis():
    candidates = continuous(1.0)
    raw = response_posterior(GoodnessPosterior(), candidates, smooth=False)
    smooth = response_posterior(GoodnessPosterior(), candidates)
    assert not raw.smoothed
    for prompt in range(2):
        psis = brm.engines.psis.pareto_smooth(raw.log_density[prompt] - candidates.log_proposal[prompt])
        torch.testing.assert_close(smooth.log_weights[prompt], psis.log_weights)
        assert float(smooth.k_hat[prompt]) == float(raw.k_hat[prompt]) == psis.k_hat
    assert bool((smooth.ess > raw.ess).any())
    torch.testing.assert_close(smooth.weights.sum(1), torch.ones(2).double())


def test_ragged_prompts_are_smoothed_one_by_one():
    candidates = continuous(0.3, draws=200)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, 20:] = False
    garbage = candidates.reference.masked_fill(~mask, math.nan)
    belief = brm.RewardBelief(candidates.belief.mean, candidates.belief.root, mask)
    posterior = response_posterior(GoodnessPosterior(), ScoredCandidates(belief, garbage, proposal=garbage))
    assert math.isnan(float(posterior.k_hat[1]))
    assert posterior.reliable.tolist() == [True, False]
    alone = response_posterior(GoodnessPosterior(), candidates.select(slice(0, 1)))
    torch.testing.assert_close(posterior.log_weights[:1], alone.log_weights)
    few = torch.softmax(candidates.belief.mean[1, :20], 0)
    torch.testing.assert_close(posterior.weights[1, :20], few)
    assert not bool(posterior.weights[1, 20:].any())
    assert bool(torch.isfinite(posterior.kl_to_reference()).all())
    with pytest.raises(EngineError, match="prompt 1 cannot be trusted"):
        posterior.expectation(belief.mean)


def test_resampling_frequencies():
    mean, root, reference, _ = world()
    posterior = brm.fit(GoodnessPosterior(), enumerated(mean, root, reference))
    places = posterior.resample(20_000, seed=4)
    assert torch.equal(places, posterior.resample(20_000, seed=4))
    share = torch.bincount(places[0], minlength=RESPONSES) / 20_000
    weights = posterior.weights[0]
    assert bool(((share - weights).abs() <= 4.5 * (weights * (1 - weights) / 20_000).sqrt()).all())
    with pytest.raises(ArgumentError, match="`num_draws` is 0"):
        posterior.resample(0, seed=0)


class Constant:
    """A target with a given log density."""

    def __init__(self, value):
        self.value = value

    def log_density(self, candidates):
        return torch.full_like(candidates.reference, self.value)


def test_errors():
    candidates = continuous(1.0, draws=30)
    with pytest.raises(EngineError, match="no candidate of prompt 0 a positive density"):
        response_posterior(Constant(-math.inf), candidates)
    for value in (math.nan, math.inf):
        with pytest.raises(EngineError, match="candidate of prompt 0 is not a number or infinite"):
            response_posterior(Constant(value), candidates)
    posterior = response_posterior(Constant(0.0), candidates)
    with pytest.raises(ArgumentError, match=r"`values` has shape \(2, 29\)"):
        posterior.expectation(torch.zeros(2, 29).double())


def test_density_zero_of_most_candidates_is_no_reason_for_trust():
    class Rare:
        def log_density(self, candidates):
            place = torch.arange(candidates.reference.shape[1])
            return candidates.reference.masked_fill(place >= 10, -math.inf)

    posterior = response_posterior(Rare(), continuous(1.0, draws=100))
    assert bool(torch.isinf(posterior.k_hat).all())
    assert not bool(posterior.reliable.any())


def test_the_seed_changes_nothing_and_no_global_state_is_touched():
    candidates = continuous(1.0)
    state = torch.get_rng_state()
    one, other = (brm.fit(GoodnessPosterior(), candidates, seed=seed).log_weights for seed in (0, 1))
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
