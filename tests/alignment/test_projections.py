"""Projections: autograd against the written estimators, exact expectations by enumeration, and fixed points."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.special
import torch

import bayesrm as brm
from bayesrm.alignment.projections import (
    BestAndWorst,
    DistributionalPolicyGradient,
    ForwardKL,
    Jeffreys,
    LinearListwise,
    ListwiseCrossEntropy,
    MovingAnchorJeffreys,
    NoiseContrastive,
    PairwiseLogistic,
    PathConsistency,
    PolicyGradient,
    Projection,
    ReverseKL,
    SquaredLogRatio,
    TokenPaths,
)
from bayesrm.alignment.targets import BestOfN, ChiSquaredPessimism, MirrorDescent
from bayesrm.engines import ResponsePosterior, response_posterior
from bayesrm.errors import ArgumentError
from bayesrm.programs import ExponentialTilt, GoodnessPosterior, ScoredCandidates

NAN = math.nan
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, False, True, True]])
FULL = torch.ones(3, 4, dtype=torch.bool)


class Known:
    """A target whose log density at the candidates is given."""

    def __init__(self, log_density):
        self.values = log_density

    def log_density(self, candidates):
        return self.values


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def scene(*, drawn, mask=MASK, target=None, seed=0):
    """A posterior on three prompts and the policy's log-probabilities; NaN wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def log_probs():
        return torch.log_softmax(normal(3, 4).masked_fill(~mask, -math.inf), 1).masked_fill(~mask, NAN)

    belief = brm.RewardBelief(normal(3, 4), 0.3 * normal(3, 4, 2), mask)
    real = mask[:, :, None] & mask[:, None, :]
    preferences = torch.where(real, belief.preference_matrix(), NAN)
    candidates = ScoredCandidates(
        belief, log_probs(), proposal=log_probs() if drawn else None, anchor=log_probs(), preferences=preferences
    )
    posterior = response_posterior(target or GoodnessPosterior(ExponentialTilt(0.7)), candidates)
    return log_probs().requires_grad_(), posterior


def gradient_of(projection, log_probs, posterior):
    """Losses and their gradient with respect to the candidates' log-probabilities."""
    losses = projection(log_probs, posterior)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    return losses.detach(), gradient


def prompts_of(log_probs, posterior):
    """The numbers of each prompt's real candidates, as numpy arrays by name."""
    c = posterior.candidates
    for b, keep in enumerate(c.mask):
        yield (
            b,
            keep,
            {
                "q": log_probs.detach()[b, keep].numpy(),
                "proposal": c.log_proposal[b, keep].numpy(),
                "reference": c.reference[b, keep].numpy(),
                "density": posterior.log_density[b, keep].numpy(),
                "evidence": float(posterior.log_evidence[b]),
                "preferences": c.preference_matrix[b][keep][:, keep].numpy(),
                "anchor": None if c.anchor is None else c.anchor[b, keep].numpy(),
                "exhaustive": c.exhaustive,
            },
        )


def normalise(log_weights):
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def brain(v):
    """sum_i (beta_i - alpha_i) grad log q_i, to be descended."""
    return normalise(v["q"] - v["proposal"]) - normalise(v["density"] - v["proposal"])


def forward_kl(v):
    return -normalise(v["density"] - v["proposal"])


def reverse_kl(v):
    b, a = normalise(v["q"] - v["proposal"]), normalise(v["density"] - v["proposal"])
    gap = np.log(b / a)
    return b * (gap - (b * gap).sum())


def dpg(v, baseline=False):
    n, weights = len(v["q"]), []
    for i in range(n):
        weight = math.exp(v["density"][i] - v["evidence"] - v["proposal"][i])
        weight -= math.exp(v["q"][i] - v["proposal"][i]) if baseline else 0.0
        weights.append(-weight / n)
    return np.array(weights)


def policy_gradient(v, clip=math.inf):
    n, result = len(v["q"]), []
    returns = v["density"] - v["q"]
    for i in range(n):
        ratio = min(clip, math.exp(v["q"][i] - v["proposal"][i]))
        if v["exhaustive"]:
            baseline = sum(min(clip, n * math.exp(v["q"][j])) * returns[j] / n for j in range(n))
        else:
            baseline = sum(returns[j] for j in range(n) if j != i) / (n - 1)
        result.append(-ratio * (returns[i] - baseline) / n)
    return np.array(result)


def jeffreys(v):
    return 0.7 * forward_kl(v) + 0.3 * policy_gradient(v)


def lire(v, temperature, softmax):
    shares = normalise(v["q"] / temperature)
    rewards = v["density"] - v["reference"]
    worth = normalise(rewards) if softmax else rewards
    return -shares * (worth - (shares * worth).sum()) / temperature


def nce(v):
    a, n = normalise(v["density"] - v["proposal"]), len(v["q"])
    h = v["q"] - v["proposal"]
    return np.array([-a[i] * sigmoid(-h[i]) + sigmoid(h[i]) / n for i in range(n)])


def pairs_of(v, which):
    """Unordered pairs and their weights, the better one by the target's tilt first where it matters."""
    tilt = v["density"] - v["reference"]
    if which == "best_worst":
        return [(int(tilt.argmax()), int(tilt.argmin()), 1.0)]
    n = len(tilt)
    return [(i, j, 2.0 / (n * (n - 1))) for i in range(n) for j in range(i)]


def squared(v, which="all", margin=None):
    result = np.zeros(len(v["q"]))
    for i, j, weight in pairs_of(v, which):
        wanted = v["density"][i] - v["density"][j] if margin is None else margin(v, i, j)
        slope = 2.0 * weight * (v["q"][i] - v["q"][j] - wanted)
        result[i] += slope
        result[j] -= slope
    return result


def dpo(v, beta, labels, which="all"):
    """Of `- P log s(beta h) - (1 - P) log s(-beta h)`."""
    result = np.zeros(len(v["q"]))
    tilt = v["density"] - v["reference"]
    for i, j, weight in pairs_of(v, which):
        h = beta * ((v["q"][i] - v["reference"][i]) - (v["q"][j] - v["reference"][j]))
        p = {
            "preference": v["preferences"][i, j],
            "tilt": sigmoid(tilt[i] - tilt[j]),
            "hard": float(tilt[i] > tilt[j]),
        }[labels]
        slope = -weight * beta * (p * sigmoid(-h) - (1.0 - p) * sigmoid(h))
        result[i] += slope
        result[j] -= slope
    return result


STEP = MirrorDescent(1.5, 0.2)


def inpo_margin(v, i, j):
    start = [0.7 * v["anchor"][k] + 0.3 * v["reference"][k] for k in (i, j)]
    return start[0] - start[1] + 1.5 * (v["preferences"][i, j] - 0.5)


ESTIMATORS = {
    "brain": (ListwiseCrossEntropy(), brain, None),
    "forward KL": (ForwardKL(), forward_kl, None),
    "reverse KL": (ReverseKL(), reverse_kl, None),
    "DPG": (DistributionalPolicyGradient(baseline=False), dpg, None),
    "GDC++": (DistributionalPolicyGradient(), lambda v: dpg(v, baseline=True), None),
    "policy gradient": (PolicyGradient(), policy_gradient, None),
    "clipped": (PolicyGradient(clip=1.1), lambda v: policy_gradient(v, 1.1), None),
    "Jeffreys": (Jeffreys(weight=0.3), jeffreys, None),
    "BOND": (Jeffreys(weight=0.3), jeffreys, BestOfN(4)),
    "LIRE": (LinearListwise(), lambda v: lire(v, 2.0, True), None),
    "LIRE raw": (LinearListwise(0.5, normalise=False), lambda v: lire(v, 0.5, False), None),
    "NCE": (NoiseContrastive(), nce, None),
    "squared": (SquaredLogRatio(), squared, None),
    "squared best worst": (SquaredLogRatio(pairs="best_worst"), lambda v: squared(v, "best_worst"), None),
    "INPO": (SquaredLogRatio(margin="preference"), lambda v: squared(v, "all", inpo_margin), STEP),
    "DPO": (PairwiseLogistic(0.3), lambda v: dpo(v, 0.3, "preference"), None),
    "DPO tilt": (PairwiseLogistic(0.3, "tilt"), lambda v: dpo(v, 0.3, "tilt"), None),
    "DPO hard": (
        PairwiseLogistic(0.3, "hard", "best_worst"),
        lambda v: dpo(v, 0.3, "hard", "best_worst"),
        None,
    ),
}


@pytest.mark.parametrize("drawn", [False, True], ids=["all", "drawn"])
@pytest.mark.parametrize("mask", [MASK, FULL], ids=["masked", "full"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_autograd_is_the_written_estimator(name, mask, drawn):
    projection, estimator, target = ESTIMATORS[name]
    log_probs, posterior = scene(drawn=drawn, mask=mask, target=target)
    losses, gradient = gradient_of(projection, log_probs, posterior)
    assert isinstance(projection, Projection)
    assert losses.shape == (3,)
    assert bool(torch.isfinite(losses).all())
    assert bool((gradient[~mask] == 0).all())
    for b, keep, values in prompts_of(log_probs, posterior):
        np.testing.assert_allclose(gradient[b, keep].numpy(), estimator(values), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_prompts_do_not_see_each_other(name):
    projection, _, target = ESTIMATORS[name]
    log_probs, posterior = scene(drawn=True, mask=FULL, target=target)
    together = projection(log_probs, posterior)
    for b in range(3):
        part = posterior.candidates.select(slice(b, b + 1))
        alone = response_posterior(posterior.target, part)
        torch.testing.assert_close(projection(log_probs[b : b + 1], alone)[0], together[b])


def test_values_of_the_losses():
    """Where a loss is a divergence its value is one, not only its gradient."""
    log_probs, posterior = scene(drawn=False)
    log_probs = log_probs.detach()
    kl, jeff = ReverseKL()(log_probs, posterior), SquaredLogRatio()(log_probs, posterior)
    dpo_loss, braining = PairwiseLogistic(0.3)(log_probs, posterior), ListwiseCrossEntropy()(log_probs, posterior)
    for b, _, v in prompts_of(log_probs, posterior):
        q, a = normalise(v["q"]), normalise(v["density"])
        assert float(kl[b]) == pytest.approx((q * np.log(q / a)).sum())
        assert float(braining[b]) == pytest.approx(-(a * np.log(q)).sum())
        pairs = pairs_of(v, "all")
        gaps = [w * (v["q"][i] - v["q"][j] - v["density"][i] + v["density"][j]) ** 2 for i, j, w in pairs]
        assert float(jeff[b]) == pytest.approx(sum(gaps))
        total = 0.0
        for i, j, w in pairs:
            h = 0.3 * (v["q"][i] - v["reference"][i] - v["q"][j] + v["reference"][j])
            p = v["preferences"][i, j]
            total -= w * (p * math.log(sigmoid(h)) + (1 - p) * math.log(sigmoid(-h)))
        assert float(dpo_loss[b]) == pytest.approx(total)


def tabular(target=None, seed=1, size=6):
    """All responses of one prompt, the target's posterior on them, and its normalised log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    mean, reference = (torch.randn(1, size, generator=generator, dtype=torch.float64) for _ in range(2))
    belief = brm.RewardBelief(mean, torch.zeros(1, size, 1).double())
    reference = torch.log_softmax(reference, 1)
    candidates = ScoredCandidates(belief, reference, anchor=reference, preferences=belief.preference_matrix())
    posterior = response_posterior(target or GoodnessPosterior(), candidates)
    return posterior, posterior.log_weights


AT_TARGET = {
    "brain": ListwiseCrossEntropy(),
    "forward KL": ForwardKL(),
    "reverse KL": ReverseKL(),
    "DPG": DistributionalPolicyGradient(baseline=False),
    "GDC++": DistributionalPolicyGradient(),
    "policy gradient": PolicyGradient(),
    "Jeffreys": Jeffreys(),
    "NCE": NoiseContrastive(),
    "squared": SquaredLogRatio(),
    "DPO tilt": PairwiseLogistic(1.0, "tilt"),
    "DPO preference": PairwiseLogistic(1.0, "preference"),
}


def tabular_gradient(projection, posterior, logits):
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(projection(torch.log_softmax(logits, 1), posterior).sum(), logits)
    return gradient


@pytest.mark.parametrize("name", AT_TARGET)
def test_target_is_the_fixed_point(name):
    posterior, target = tabular()
    projection = AT_TARGET[name]
    assert float(tabular_gradient(projection, posterior, target).norm()) < 1e-8
    assert float(tabular_gradient(projection, posterior, posterior.candidates.reference).norm()) > 1e-3
    # Descended from the reference it is where one ends.
    logits = posterior.candidates.reference.clone()
    for _ in range(500):
        logits = logits - 2.0 * tabular_gradient(projection, posterior, logits)
    kl = (target.exp() * (target - torch.log_softmax(logits, 1))).sum()
    assert float(kl) < 0.02 * float((target.exp() * (target - posterior.candidates.reference)).sum())


@pytest.mark.parametrize("target", [BestOfN(4), BestOfN(4, lambda belief: belief.mean.round())], ids=["", "ties"])
def test_best_of_n_is_the_fixed_point_of_bond(target):
    posterior, log_target = tabular(target)
    assert float(tabular_gradient(Jeffreys(), posterior, log_target).norm()) < 1e-8


def test_lire_ends_at_the_best_response():
    """Its loss is linear in the shares: the target is no fixed point, the point mass on the best one is."""
    posterior, target = tabular()
    assert float(tabular_gradient(LinearListwise(), posterior, target).norm()) > 1e-3
    logits = posterior.candidates.reference.clone()
    for _ in range(1000):
        logits = logits - 100.0 * tabular_gradient(LinearListwise(), posterior, logits)
    best = int(posterior.candidates.belief.mean[0].argmax())
    assert float(torch.softmax(logits, 1)[0, best]) > 0.999
    assert float(target.exp()[0, best]) < 0.9


def test_inpo_regression_ends_at_the_mirror_descent_step():
    """With pairs weighted uniformly the step against the uniform policy is the minimum."""
    generator = torch.Generator().manual_seed(0)
    above = torch.rand(1, 5, 5, generator=generator, dtype=torch.float64).triu(1)
    preferences = above + (1.0 - above.transpose(1, 2)).tril(-1) + 0.5 * torch.eye(5).double()
    belief = brm.RewardBelief(torch.zeros(1, 5).double(), torch.zeros(1, 5, 1).double())
    reference = torch.log_softmax(torch.randn(1, 5, generator=generator, dtype=torch.float64), 1)
    uniform = torch.full((1, 5), 0.2).double().log()
    candidates = ScoredCandidates(belief, reference, anchor=uniform, preferences=preferences)
    target = MirrorDescent(2.0, 0.2)
    posterior = response_posterior(target, candidates)
    projection = SquaredLogRatio(margin="preference")
    assert float(tabular_gradient(projection, posterior, posterior.log_weights).norm()) < 1e-8
    assert float(projection(posterior.log_weights, posterior)) > 0.01


def test_inpo_loss_of_a_certain_judge():
    """(h - 1 / (2 eta))^2 with h = dlog pi - tau/eta dlog p0 - (eta - tau)/eta dlog pi_t, winner less loser."""
    eta, tau = 0.5, 0.2
    generator = torch.Generator().manual_seed(0)
    log_q, reference, anchor = torch.randn(3, 1, 2, generator=generator, dtype=torch.float64)
    preferences = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)
    belief = brm.RewardBelief(torch.zeros(1, 2).double(), torch.zeros(1, 2, 1).double())
    candidates = ScoredCandidates(belief, reference, reference, anchor, preferences)
    posterior = response_posterior(MirrorDescent(1 / eta, tau), candidates)
    dq, d0, dt = (float(x[0, 0] - x[0, 1]) for x in (log_q, reference, anchor))
    h = dq - tau / eta * d0 - (eta - tau) / eta * dt
    found = SquaredLogRatio(margin="preference")(log_q, posterior)
    assert float(found) == pytest.approx((h - 1 / (2 * eta)) ** 2)


def test_brain_on_pairs_with_a_certain_target_is_dpo():
    generator = torch.Generator().manual_seed(2)
    log_q, reference = torch.randn(2, 50, 2, generator=generator, dtype=torch.float64)
    rewards = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    belief = brm.RewardBelief(rewards, torch.zeros(50, 2, 1).double())
    candidates = ScoredCandidates(belief, reference, proposal=reference)
    certain = response_posterior(GoodnessPosterior(ExponentialTilt(1e-6)), candidates)
    winner = rewards.argmax(1, keepdim=True)
    ratio = log_q - reference
    h = (ratio.gather(1, winner) - ratio.gather(1, 1 - winner))[:, 0]
    expected = -torch.nn.functional.logsigmoid(h)
    torch.testing.assert_close(ListwiseCrossEntropy()(log_q, certain), expected)
    torch.testing.assert_close(PairwiseLogistic(1.0, "hard")(log_q, certain), expected)


def test_first_step_of_brain_on_its_own_samples():
    log_probs, posterior = scene(drawn=True, mask=FULL)
    candidates = dataclasses.replace(posterior.candidates, proposal=log_probs.detach())
    posterior = response_posterior(posterior.target, candidates)
    _, gradient = gradient_of(ListwiseCrossEntropy(), log_probs, posterior)
    torch.testing.assert_close(-gradient, posterior.weights - 0.25)


def test_margin_of_bonbon():
    assert BestAndWorst(n=8).margin == pytest.approx(18.15)
    for n in (2, 5, 8, 64):
        # E log U_(n) - E log U_(1) of n uniform numbers, times n - 1.
        expected = (n - 1) * (scipy.special.digamma(n) - scipy.special.digamma(1))
        assert BestAndWorst(n=n).margin == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", [GoodnessPosterior(), BestOfN(4)])
def test_bonbon_gradient(target):
    log_probs, posterior = scene(drawn=True, mask=FULL, target=target)
    projection = BestAndWorst(n=4, alpha=0.2)
    losses, gradient = gradient_of(projection, log_probs, posterior)
    for b, _, v in prompts_of(log_probs, posterior):
        rewards = posterior.candidates.belief.mean[b].numpy()
        best, worst = int(rewards.argmax()), int(rewards.argmin())
        gap = v["q"][best] - v["q"][worst] - v["reference"][best] + v["reference"][worst] - 3 * (1 + 1 / 2 + 1 / 3)
        expected = np.zeros(4)
        expected[best] = -0.2 + 0.8 * 2 * gap
        expected[worst] = -0.8 * 2 * gap
        np.testing.assert_allclose(gradient[b].numpy(), expected, rtol=1e-10)
        assert float(losses[b]) == pytest.approx(-0.2 * v["q"][best] + 0.8 * gap**2)


def response_space(seed=3, size=4):
    """log q as a function of logits, log p0, an anchor, another proposal, and rewards, of all responses."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    reference, anchor, proposal = (
        torch.log_softmax(torch.randn(size, generator=generator, dtype=torch.float64), 0) for _ in range(3)
    )
    rewards = torch.randn(size, generator=generator, dtype=torch.float64)
    return logits, reference, anchor, proposal, rewards


def expected_gradient(projection, make_posterior, sampling, logits, *, one_by_one=False):
    """E of the gradient over all tuples of draws, place i from `sampling[i]`, exactly."""
    tuples = torch.tensor(list(itertools.product(range(len(logits)), repeat=len(sampling))))
    chance = sum(log_probs[tuples[:, i]] for i, log_probs in enumerate(sampling)).detach().exp()
    log_q = torch.log_softmax(logits, 0)
    if one_by_one:
        losses = torch.cat([projection(log_q[t][None], make_posterior(t[None])) for t in tuples])
    else:
        losses = projection(log_q[tuples], make_posterior(tuples))
    (gradient,) = torch.autograd.grad((chance * losses).sum(), logits)
    return gradient


@pytest.mark.parametrize("draws", [2, 3])
@pytest.mark.parametrize("off_policy", [False, True])
def test_policy_gradient_is_unbiased(draws, off_policy):
    logits, reference, _, proposal, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    drawn_from = proposal if off_policy else log_q.detach()

    def posterior(places):
        belief = brm.RewardBelief(rewards[places], torch.zeros(*places.shape, 1).double())
        candidates = ScoredCandidates(belief, reference[places], proposal=drawn_from[places])
        return response_posterior(GoodnessPosterior(ExponentialTilt(0.6)), candidates)

    kl = (log_q.exp() * (log_q - reference - rewards / 0.6)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    found = expected_gradient(PolicyGradient(), posterior, [drawn_from] * draws, logits)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    # Negative control: clipping off-policy weights is biased, as documented.
    if off_policy:
        clipped = expected_gradient(PolicyGradient(clip=1.0), posterior, [drawn_from] * draws, logits)
        assert float((clipped - exact).norm()) > 0.01


@pytest.mark.parametrize("baseline", [False, True])
def test_distributional_policy_gradient_is_unbiased_with_a_known_constant(baseline):
    logits, reference, _, proposal, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    log_target = torch.log_softmax(reference + rewards, 0)

    def posterior(places):
        belief = brm.RewardBelief(rewards[places], torch.zeros(*places.shape, 1).double())
        candidates = ScoredCandidates(belief, reference[places], proposal=proposal[places])
        found = response_posterior(Known(log_target[places] + 3.0), candidates)
        return dataclasses.replace(found, log_evidence=torch.full((len(places),), 3.0).double())

    (exact,) = torch.autograd.grad(-(log_target.exp() * log_q).sum(), logits, retain_graph=True)
    projection = DistributionalPolicyGradient(baseline=baseline)
    found = expected_gradient(projection, posterior, [proposal] * 3, logits)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_brain_gradient_is_that_of_the_self_normalised_divergence():
    """Unbiased for it by construction, biased for KL(target || policy) at few candidates: the step is shorter."""
    logits, reference, _, proposal, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    log_target = torch.log_softmax(reference + rewards, 0)

    def posterior(places):
        belief = brm.RewardBelief(rewards[places], torch.zeros(*places.shape, 1).double())
        return response_posterior(
            Known(log_target[places]), ScoredCandidates(belief, reference[places], proposal=proposal[places])
        )

    (exact,) = torch.autograd.grad(-(log_target.exp() * log_q).sum(), logits, retain_graph=True)
    sizes = [expected_gradient(ListwiseCrossEntropy(), posterior, [proposal] * n, logits) for n in (2, 4, 6)]
    gaps = [float((g - exact).norm()) for g in sizes]
    assert gaps[0] > gaps[1] > gaps[2] > 0.01
    assert all(float(g.norm()) < float(exact.norm()) for g in sizes)


def test_sail_is_the_gradient_through_the_pairs():
    """With the factor 1 the whole derivative of E_{y, y' ~ q} of DPO's loss, with 0 DPO's alone."""
    logits, reference, _, _, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    sigma = torch.sigmoid(rewards[:, None] - rewards[None, :])

    def posterior(places):
        belief = brm.RewardBelief(rewards[places], torch.zeros(*places.shape, 1).double())
        candidates = ScoredCandidates(belief, reference[places], proposal=log_q.detach()[places])
        return response_posterior(GoodnessPosterior(), candidates)

    tilt = log_q - reference
    h = 0.4 * (tilt[:, None] - tilt[None, :])
    log_likelihood = sigma * torch.nn.functional.logsigmoid(h) + (1 - sigma) * torch.nn.functional.logsigmoid(-h)
    pair = log_q[:, None] + log_q[None, :]
    for factor, chance in ((0.0, pair.detach().exp()), (1.0, pair.exp())):
        # The places' own probabilities sum to 1: drawing a response twice is a pair that says nothing of q.
        (exact,) = torch.autograd.grad(-(chance * log_likelihood).sum(), logits, retain_graph=True)
        projection = PairwiseLogistic(0.4, score_function=factor)
        found = expected_gradient(projection, posterior, [log_q.detach()] * 2, logits, one_by_one=True)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_baseline_of_sail_is_the_other_prompts():
    log_probs, posterior = scene(drawn=True, mask=FULL)
    _, plain = gradient_of(PairwiseLogistic(0.4), log_probs, posterior)
    _, scored = gradient_of(PairwiseLogistic(0.4, score_function=0.5), log_probs, posterior)
    log_likelihood = []
    for _, _, v in prompts_of(log_probs, posterior):
        matrix = np.zeros((4, 4))
        for i, j in itertools.product(range(4), repeat=2):
            h = 0.4 * (v["q"][i] - v["reference"][i] - v["q"][j] + v["reference"][j])
            p = v["preferences"][i, j]
            matrix[i, j] = p * math.log(sigmoid(h)) + (1 - p) * math.log(sigmoid(-h))
        log_likelihood.append(matrix)
    means = [matrix[~np.eye(4, dtype=bool)].mean() for matrix in log_likelihood]
    for b in range(3):
        baseline = (sum(means) - means[b]) / 2
        expected = np.zeros(4)
        for i, j in itertools.permutations(range(4), 2):
            expected[[i, j]] -= 0.5 * (log_likelihood[b][i, j] - baseline) / 12
        np.testing.assert_allclose((scored - plain)[b].numpy(), expected, rtol=1e-8)


def j_bond_posterior(rewards, reference, anchor, log_q):
    def posterior(places):
        belief = brm.RewardBelief(rewards[places], torch.zeros(*places.shape, 1).double())
        proposal = torch.stack([log_q.detach()[places[:, 0]], anchor[places[:, 1]], anchor[places[:, 2]]], 1)
        candidates = ScoredCandidates(
            belief, reference[places], proposal, anchor[places], sources=("policy", "anchor", "anchor")
        )
        return response_posterior(GoodnessPosterior(), candidates)

    return posterior


def test_j_bond_expected_gradient():
    """Over all triples: the derivative of (1 - b) E[-log q(best of 2)] - b (E_q[reward] - KL) + gamma KL."""
    logits, reference, anchor, _, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    posterior = j_bond_posterior(rewards, reference, anchor, log_q)
    projection = MovingAnchorJeffreys(weight=0.4, regularisation=0.7)
    found = expected_gradient(projection, posterior, [log_q.detach(), anchor, anchor], logits, one_by_one=True)
    p = anchor.exp()
    below_both = torch.stack([p[rewards > r].sum() ** 2 for r in rewards])
    best_of_two = response_posterior(
        BestOfN(2),
        ScoredCandidates(brm.RewardBelief(rewards[None], torch.zeros(1, 4, 1).double()), anchor[None]),
    ).weights[0]
    kl = (log_q.exp() * (log_q - anchor)).sum()
    worth = (log_q.exp() * -math.log(16.0) * below_both).sum()
    objective = -0.6 * (best_of_two * log_q).sum() - 0.4 * (worth - kl) + 0.7 * kl
    (exact,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_j_bond_batch_baseline_and_penalty():
    logits, reference, anchor, _, rewards = response_space()
    log_q = torch.log_softmax(logits, 0)
    worst, best, middle = rewards.argsort()[[0, 3, 1]].tolist()
    places = torch.tensor([[worst, best, middle], [best, worst, middle], [middle, worst, best]])
    leaf = log_q.detach()[places].requires_grad_()
    posterior = j_bond_posterior(rewards, reference, anchor, log_q)(places)
    _, gradient = gradient_of(MovingAnchorJeffreys(weight=0.5, regularisation=0.3), leaf, posterior)
    ratio = [float(log_q.detach()[y] - anchor[y]) for y in (worst, best, middle)]
    returns = [-math.log(16.0) - ratio[0], -ratio[1], -ratio[2]]
    expected = torch.zeros(3, 3).double()
    for b in range(3):
        others = [k for k in range(3) if k != b]
        advantage = returns[b] - sum(returns[k] for k in others) / 2
        pull = ratio[b] - sum(ratio[k] for k in others) / 2
        expected[b, 0] = -0.5 * advantage + 0.3 * pull
    for b, better in enumerate((1, 2, 2)):
        expected[b, better] = -0.5
    torch.testing.assert_close(gradient, expected)


def test_penalty_of_j_bond_is_right_at_the_median():
    """E of the reward of a draw with quantile p is log p at p = 1 / 2, of which log 16 is the consequence."""
    assert -MovingAnchorJeffreys().penalty * 0.5**2 == pytest.approx(math.log(0.5))


def two_tokens(seed=0, *, shift=0.0):
    """Responses of two tokens out of three: soft-optimal token policy and values, and rewards of all nine."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    second = torch.logsumexp(rewards, 1)
    first = torch.logsumexp(second, 0)
    log_probs = torch.stack([(second - first)[:, None].expand(3, 3), rewards - second[:, None]], -1).reshape(1, 9, 2)
    values = torch.stack([first.expand(3, 3), second[:, None].expand(3, 3)], -1).reshape(1, 9, 2) + shift
    return rewards.reshape(1, 9), log_probs, values


def path_posterior(rewards):
    belief = brm.RewardBelief(rewards, torch.zeros(*rewards.shape, 1).double())
    uniform = torch.full_like(rewards, -math.log(rewards.shape[1]))
    return response_posterior(Known(rewards), ScoredCandidates(belief, uniform))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_paths_are_consistent_for_the_soft_optimal_policy(weights):
    rewards, log_probs, values = two_tokens()
    leaf = log_probs.clone().requires_grad_()
    paths = TokenPaths(leaf, values, torch.ones(1, 9, 2, dtype=torch.bool))
    losses, gradient = gradient_of(lambda _, p: PathConsistency(*weights)(paths, p), leaf, path_posterior(rewards))
    assert float(losses.abs().max()) < 1e-25
    assert float(gradient.norm()) < 1e-8
    # Negative control: values off by a constant, which no policy can make up for, leave a loss.
    wrong = TokenPaths(leaf, two_tokens(shift=1.0)[2], paths.mask)
    assert float(PathConsistency(*weights)(wrong, path_posterior(rewards)).detach()) > 0.4


def train_soft_q(reversed_roles, rounds=400):
    """Tables of logits of two-token responses, with a Polyak copy as target network; KL(target || policy)."""
    rewards, log_target, _ = two_tokens()
    tables = [torch.zeros(3).double().requires_grad_(), torch.zeros(3, 3).double().requires_grad_()]
    copies = [table.detach().clone() for table in tables]
    posterior, mask = path_posterior(rewards), torch.ones(1, 9, 2, dtype=torch.bool)

    def paths_of(first, second):
        log_probs = torch.stack([first.log_softmax(0)[:, None].expand(3, 3), second.log_softmax(1)], -1)
        values = torch.stack([first.logsumexp(0).expand(3, 3), second.logsumexp(1)[:, None].expand(3, 3)], -1)
        return log_probs.reshape(1, 9, 2), values.reshape(1, 9, 2)

    optimiser = torch.optim.Adam(tables, lr=0.05)
    for _ in range(rounds):
        log_probs, values = paths_of(*tables)
        fixed, fixed_values = paths_of(*copies)
        paths = TokenPaths(log_probs, fixed_values, mask, values, fixed)
        optimiser.zero_grad()
        PathConsistency(reversed_roles=reversed_roles)(paths, posterior).sum().backward()
        optimiser.step()
        for copy, table in zip(copies, tables, strict=True):
            copy.lerp_(table.detach(), 0.1)
    log_q, log_p = paths_of(*tables)[0].detach().sum(-1), log_target.sum(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def test_reversed_roles_teach_the_values():
    """Without them the level of a prefix's logits gets no gradient, and the policy ends beside the optimum."""
    assert train_soft_q(0.5) < 1e-4
    assert train_soft_q(0.0) > 1e-2


def test_reversed_roles_are_checked():
    _, posterior = scene(drawn=True)
    tokens = torch.zeros(3, 4, 2)
    paths = TokenPaths(tokens, tokens, torch.ones(3, 4, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="`reversed_roles` needs `values`"):
        PathConsistency(reversed_roles=0.5)(paths, posterior)
    with pytest.raises(ArgumentError, match="`reversed_roles` is 2"):
        PathConsistency(reversed_roles=2.0)


def test_path_consistency_is_the_written_sum():
    generator = torch.Generator().manual_seed(1)
    log_probs, values = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[5, 1, 3, 2], [2, 4, 1, 1], [1, 1, 5, 2]])
    mask = torch.arange(5) < lengths[..., None]
    leaf = log_probs.masked_fill(~mask, NAN).requires_grad_()
    _, posterior = scene(drawn=True)
    paths = TokenPaths(leaf, values.masked_fill(~mask, NAN), mask)
    for reference in (True, False):
        found = PathConsistency(0.3, 0.6, reference)(paths, posterior)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        expected = []
        live = log_probs.clone().requires_grad_()
        for b in range(3):
            total, count = torch.tensor(0.0).double(), 0
            for i in range(4):
                if not MASK[b, i]:
                    continue
                end = int(lengths[b, i])
                reward = posterior.log_density[b, i]
                reward = reward if reference else reward - posterior.candidates.reference[b, i]
                each = torch.tensor(0.0).double()
                for t in range(end):
                    following = values[b, i, t + 1] if t + 1 < end else reward
                    each = each + 0.3 * (live[b, i, t] - (following - values[b, i, t])) ** 2
                    each = each + 0.6 * (live[b, i, t:end].sum() - (reward - values[b, i, t])) ** 2
                total, count = total + each / end, count + 1
            expected.append(total / count)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
        (written,) = torch.autograd.grad(sum(expected), live)
        torch.testing.assert_close(gradient, written, rtol=1e-10, atol=1e-12)


#: Means and variances of the gradients of the authors' toy: 200,000 repeats at n = 8 and 40,000 elsewhere, of the three
#: formulas written out independently; rounded to the digits shown. (proposal's mean, n): (mean, variance) by estimator.
TOY = {
    (0.0, 8): {"DPG": (-1.00, 0.125), "GDC++": (-1.00, 0.569), "BRAIn": (-0.765, 0.173)},
    (0.5, 8): {"DPG": (-1.00, 0.396), "GDC++": (-1.00, 0.355), "BRAIn": (-0.848, 0.193)},
    (1.0, 8): {"DPG": (-1.00, 1.614), "GDC++": (-1.00, 1.239), "BRAIn": (-0.769, 0.175)},
    (1.0, 2): {"DPG": (-1.00, 5.89), "BRAIn": (-0.358, 0.165)},
    (1.0, 4): {"DPG": (-1.00, 2.99), "BRAIn": (-0.611, 0.200)},
    (1.0, 32): {"DPG": (-1.00, 0.39), "BRAIn": (-0.927, 0.084)},
    (1.0, 128): {"DPG": (-1.00, 0.096), "BRAIn": (-0.979, 0.029)},
}
TOY_PROJECTIONS = {
    "DPG": DistributionalPolicyGradient(baseline=False),
    "GDC++": DistributionalPolicyGradient(),
    "BRAIn": ListwiseCrossEntropy(),
}


def toy_gradients(name, shift, n, repeats):
    """Gradients to ascend of repeats as prompts: target N(0, 1), policy N(1, 1), proposal N(shift, 1)."""
    generator = torch.Generator().manual_seed(n + int(10 * shift))
    y = shift + torch.randn(repeats, n, generator=generator, dtype=torch.float64)

    def log_normal(centre):
        return -0.5 * (y - centre).square() - 0.5 * math.log(2 * math.pi)

    belief = brm.RewardBelief(torch.zeros_like(y), torch.zeros(repeats, n, 1).double())
    candidates = ScoredCandidates(belief, log_normal(0.0), proposal=log_normal(shift))
    target = Known(log_normal(0.0))
    # Plain self-normalised weights: smoothing would change the estimator from 25 draws on.
    log_weights = torch.log_softmax(target.values - candidates.log_proposal, 1)
    known, k_hat = torch.zeros(repeats).double(), torch.full((repeats,), NAN).double()
    posterior = ResponsePosterior(target, candidates, target.values, log_weights, known, k_hat)
    centre = torch.tensor(1.0, dtype=torch.float64)
    log_probs = log_normal(centre).requires_grad_()
    _, gradient = gradient_of(TOY_PROJECTIONS[name], log_probs, posterior)
    return -(gradient * (y - centre)).sum(1)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, row in TOY.items() for name in row])
def test_gaussian_toy(case, name):
    shift, n = case
    mean, variance = TOY[case][name]
    repeats, table = (100_000, 200_000) if n == 8 else (min(40_000, 2_000_000 // n), 40_000)
    found = toy_gradients(name, shift, n, repeats)
    own_mean, own_variance = float(found.mean()), float(found.var())
    fourth = float((found - own_mean).pow(4).mean())
    both = 1.0 / repeats + 1.0 / table
    digits = 0.5 * 10.0 ** -len(str(mean).partition(".")[2].ljust(2, "0"))
    assert own_mean == pytest.approx(mean, abs=4.5 * math.sqrt(own_variance * both) + digits)
    decimals = len(str(variance).partition(".")[2])
    rounding = 0.5 * 10.0**-decimals
    assert own_variance == pytest.approx(variance, abs=4.5 * math.sqrt((fourth - own_variance**2) * both) + rounding)
    if name != "BRAIn":
        # Unbiased: the true gradient is -1.
        assert own_mean == pytest.approx(-1.0, abs=4.5 * math.sqrt(own_variance / repeats))
    else:
        assert own_mean > -1.0 + 4.5 * math.sqrt(own_variance / repeats)


def test_errors():
    log_probs, posterior = scene(drawn=True, mask=FULL)
    for projection in (ListwiseCrossEntropy(), ForwardKL(), SquaredLogRatio()):
        with pytest.raises(ArgumentError, match=r"`log_probs` has shape \(3, 3\)"):
            projection(log_probs[:, :3], posterior)
    zero = ChiSquaredPessimism(0.05)
    _, empty = scene(drawn=True, mask=FULL, target=zero)
    assert bool((empty.weights == 0).any())
    for projection in (PolicyGradient(), Jeffreys(), ReverseKL(), SquaredLogRatio(), PairwiseLogistic(labels="tilt")):
        with pytest.raises(ArgumentError, match="gives a candidate density zero"):
            projection(log_probs, empty)
    for projection in (ListwiseCrossEntropy(), ForwardKL(), NoiseContrastive(), DistributionalPolicyGradient()):
        losses, gradient = gradient_of(projection, log_probs, empty)
        assert bool(torch.isfinite(losses).all() & torch.isfinite(gradient).all())
    one = torch.tensor([[True] + [False] * 3] * 3)
    alone, single = scene(drawn=True, mask=one)
    with pytest.raises(ArgumentError, match="needs at least 2 candidates"):
        PolicyGradient()(alone, single)
    for pairs in ("all", "best_worst"):
        with pytest.raises(ArgumentError, match="a prompt has a single candidate"):
            SquaredLogRatio(pairs=pairs)(alone, single)
    with pytest.raises(ArgumentError, match="`margin` is 'preference', and the target GoodnessPosterior"):
        SquaredLogRatio(margin="preference")(log_probs, posterior)
    with pytest.raises(ArgumentError, match="`n` is 8, and a prompt has 4"):
        BestAndWorst()(log_probs, posterior)
    with pytest.raises(ArgumentError, match="`sources` is None; J-BOND"):
        MovingAnchorJeffreys()(log_probs, posterior)


def test_settings_are_checked():
    for make, name in (
        (lambda: BestAndWorst(n=1), "n"),
        (lambda: BestAndWorst(alpha=1.5), "alpha"),
        (lambda: PolicyGradient(clip=0.5), "clip"),
        (lambda: Jeffreys(weight=-0.1), "weight"),
        (lambda: MovingAnchorJeffreys(penalty=-1.0), "penalty"),
        (lambda: MovingAnchorJeffreys(regularisation=math.inf), "regularisation"),
        (lambda: LinearListwise(temperature=0.0), "temperature"),
        (lambda: PairwiseLogistic(beta=0.0), "beta"),
        (lambda: PairwiseLogistic(labels="loud"), "labels"),
        (lambda: PairwiseLogistic(pairs="some"), "pairs"),
        (lambda: PairwiseLogistic(score_function=-1.0), "score_function"),
        (lambda: SquaredLogRatio(margin="wide"), "margin"),
        (lambda: PathConsistency(0.0, 0.0), "single_step"),
        (lambda: PathConsistency(-1.0, 1.0), "single_step"),
    ):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            make()


def test_token_paths_are_checked():
    tokens = torch.zeros(1, 2, 3)
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="`target_values` requires gradients"):
        TokenPaths(tokens, tokens.clone().requires_grad_(), mask)
    gap = mask.clone()
    gap[0, 0, 1] = False
    with pytest.raises(ArgumentError, match="`mask` has gaps"):
        TokenPaths(tokens, tokens, gap)
    _, posterior = scene(drawn=True, target=ChiSquaredPessimism(0.05))
    paths = TokenPaths(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), torch.ones(3, 4, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="density zero"):
        PathConsistency()(paths, posterior)
