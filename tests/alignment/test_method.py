"""A method: where its candidates come from, and which arguments it refuses."""

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import Method
from bayesrm.alignment.projections import ListwiseCrossEntropy, PathConsistency, PolicyGradient, TokenPaths
from bayesrm.alignment.targets import BestOfN
from bayesrm.engines import response_posterior
from bayesrm.errors import ArgumentError
from bayesrm.programs import ExponentialTilt, GoodnessPosterior, ScoredCandidates

BRAIN = Method(GoodnessPosterior(), ListwiseCrossEntropy())


def scored():
    generator = torch.Generator().manual_seed(0)
    belief = brm.RewardBelief(torch.randn(2, 3, generator=generator), torch.zeros(2, 3, 1))
    log_p = torch.randn(2, 3, generator=generator) - 5.0
    return ScoredCandidates(belief, log_p, proposal=log_p)


def test_sources():
    assert BRAIN.sources == ("policy",) * 8
    mixed = ("policy", "anchor", "reference")
    assert Method(GoodnessPosterior(), PolicyGradient(), mixed, num_candidates=3).sources == mixed


def test_weigh_and_loss_are_the_parts():
    candidates = scored()
    posterior = BRAIN.weigh(candidates)
    expected = response_posterior(BRAIN.target, candidates)
    assert torch.equal(posterior.log_weights, expected.log_weights)
    log_q = candidates.reference + 0.1
    assert torch.equal(BRAIN.loss(log_q, posterior), ListwiseCrossEntropy()(log_q, expected))


def test_policy_of_the_other_kind_is_refused():
    posterior = BRAIN.weigh(scored())
    tokens = torch.zeros(2, 3, 4)
    paths = TokenPaths(tokens, tokens, torch.ones(2, 3, 4, dtype=torch.bool))
    tilt = GoodnessPosterior(ExponentialTilt(maximum=0.0))
    soft = Method(tilt, PathConsistency(), num_candidates=3)
    assert soft.needs_tokens
    assert not BRAIN.needs_tokens
    assert soft.loss(paths, posterior).shape == (2,)
    with pytest.raises(ArgumentError, match=r"`policy` is a TokenPaths; ListwiseCrossEntropy takes log-probabilities"):
        BRAIN.loss(paths, posterior)
    with pytest.raises(ArgumentError, match=r"`policy` is a Tensor; PathConsistency takes TokenPaths"):
        soft.loss(torch.zeros(2, 3), posterior)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"proposal": "judge"}, "proposal"),
        ({"proposal": ("policy", "policy")}, "proposal"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"num_candidates": True}, "num_candidates"),
        ({"anchor_every": 0}, "anchor_every"),
        ({"anchor_rate": 0.0}, "anchor_rate"),
        ({"anchor_rate": 1.5}, "anchor_rate"),
        ({"mixture_weight": -0.1}, "mixture_weight"),
    ],
)
def test_settings_are_checked(settings, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        Method(GoodnessPosterior(), ListwiseCrossEntropy(), **settings)


def test_classes_are_no_settings():
    assert Method(BestOfN(2), PolicyGradient()).target == BestOfN(2)
    with pytest.raises((ArgumentError, TypeError), match="target"):
        Method(GoodnessPosterior, ListwiseCrossEntropy())
    with pytest.raises((ArgumentError, TypeError), match="projection"):
        Method(GoodnessPosterior(), ListwiseCrossEntropy)
