"""Kronecker and diagonal posteriors against dense matrices, built entry by entry."""

import itertools

import pytest
import safetensors.torch
import torch

import bayesrm as brm
from bayesrm.data.groups import Comparison, FeedbackGroup
from bayesrm.engines._curvature import CurvatureKind, curvature
from bayesrm.engines._density import FeedbackDensity
from bayesrm.engines._kron import DiagCovariance, KronCovariance, diag_curvature, kron_bytes, kron_factors
from bayesrm.errors import ArgumentError, EngineError, PersistenceError

from .conftest import CASES, make_data

SHAPES = {"q.lora_A": (2, 5), "q.lora_B": (4, 2), "norm.weight": (3,), "score.weight": (1, 6), "score.bias": (1,)}
SIZES = [10, 8, 3, 6, 1]
PRIOR = {"q.lora_A": 0.5, "q.lora_B": 2.0, "norm.weight": 1.0, "score.weight": 3.0, "score.bias": 0.25}


def jacobian_of(items, seed=0):
    rows = torch.randn(items, sum(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, -1] = 1.0
    return rows


def group_of(items):
    rows, k = items.shape
    comparison = Comparison("choice", rows, k)
    return FeedbackGroup(comparison, items, torch.zeros(rows).long(), torch.ones(rows), torch.arange(rows))


def pairs_of(strength, seed=0):
    """Groups and blocks of Bradley-Terry pairs with curvature `strength`, among half as many items."""
    n = len(strength)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, n, (n,), generator=generator)
    items = torch.stack([first, (first + torch.randint(1, n, (n,), generator=generator)) % n], 1)
    contrast = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return [group_of(items)], [strength[:, None, None] * contrast]


@pytest.fixture(params=["bradley_terry", "plackett_luce", "ordinal"])
def feedback(request):
    """(groups, curvature blocks) of pairs, rankings of four and ratings, at random rewards."""
    likelihood, design = CASES[request.param]
    weight = [0.5 + 0.1 * (i % 7) for i in range(14)]
    density = FeedbackDensity(
        brm.RewardModel(brm.rewards.Linear(), likelihood), make_data(rows=14, weight=weight, **design).groups()
    )
    items = 1 + max(int(g.items.max()) for g in density.groups)
    rewards = torch.randn(items, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = curvature(density, density.gather(rewards), density.initial_latents, CurvatureKind.AUTO)
    return density.groups, found.rewards, jacobian_of(items)


def matrix(row, site):
    part = row.split(SIZES)[list(SHAPES).index(site)]
    return part.reshape(SHAPES[site]) if len(SHAPES[site]) == 2 else part.reshape(1, -1)


def dense_curvature(jacobian, groups, blocks):
    total = torch.zeros(sum(SIZES), sum(SIZES), dtype=torch.float64)
    for group, block in zip(groups, blocks, strict=True):
        for items, h in zip(group.items, block, strict=True):
            total += jacobian[items].T @ h @ jacobian[items]
    return total


def dense_kron(jacobian, groups, blocks):
    """Posterior precision under `PRIOR` with factors from double sums over the candidates of each row."""
    parts = []
    for site, shape in SHAPES.items():
        left, right = 0.0, 0.0
        for group, block in zip(groups, blocks, strict=True):
            for items, h in zip(group.items, block, strict=True):
                for i, j in itertools.product(range(len(items)), repeat=2):
                    a, b = matrix(jacobian[items[i]], site), matrix(jacobian[items[j]], site)
                    left = left + h[i, j] * a @ b.T
                    right = right + h[i, j] * a.T @ b
        scale = left.trace() if len(shape) == 2 and left.trace() > 0 else 1.0
        site_curvature = torch.kron(left, right) / scale if len(shape) == 2 else right
        parts.append(site_curvature + PRIOR[site] * torch.eye(len(site_curvature), dtype=torch.float64))
    return torch.block_diag(*parts)


def test_kron_covariance_is_the_inverse_of_the_dense_product(feedback):
    groups, blocks, jacobian = feedback
    precision = dense_kron(jacobian, groups, blocks)
    posterior = kron_factors(jacobian, SHAPES, groups, blocks).posterior(PRIOR)
    test = jacobian_of(12, seed=3).reshape(4, 3, -1)
    expected = test @ torch.linalg.inv(precision) @ test.transpose(1, 2)
    torch.testing.assert_close(posterior.covariance(test), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.covariance(test[0]), expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.precision.inv_square_form(test), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.log_det, torch.linalg.slogdet(precision)[1], rtol=1e-10, atol=0.0)


def test_diag_is_the_diagonal_of_the_dense_curvature(feedback):
    groups, blocks, jacobian = feedback
    prior = torch.cat([torch.full((n,), p, dtype=torch.float64) for n, p in zip(SIZES, PRIOR.values(), strict=True)])
    precision = dense_curvature(jacobian, groups, blocks).diagonal() + prior
    posterior = DiagCovariance.of(diag_curvature(jacobian, SHAPES, groups, blocks), SHAPES, PRIOR)
    test = jacobian_of(6, seed=3).reshape(2, 3, -1)
    expected = test @ torch.diag(1 / precision) @ test.transpose(1, 2)
    torch.testing.assert_close(posterior.covariance(test), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.log_det, precision.log().sum(), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("size", [1, 5])
def test_items_may_come_in_any_order_and_in_chunks(feedback, size):
    groups, blocks, jacobian = feedback
    order = torch.randperm(len(jacobian), generator=torch.Generator().manual_seed(2))
    chunks = [(index, jacobian[index]) for index in order.split(size)]
    whole = kron_factors(jacobian, SHAPES, groups, blocks).posterior(PRIOR)
    pieces = kron_factors(iter(chunks), SHAPES, groups, blocks).posterior(PRIOR)
    test = jacobian_of(3, seed=3)
    torch.testing.assert_close(pieces.covariance(test), whole.covariance(test), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        diag_curvature(iter(chunks), SHAPES, groups, blocks), diag_curvature(jacobian, SHAPES, groups, blocks)
    )


def test_float32_derivatives_are_summed_in_float64(feedback):
    groups, blocks, jacobian = feedback
    single = kron_factors(jacobian.float(), SHAPES, groups, blocks)
    double = kron_factors(jacobian.float().double(), SHAPES, groups, blocks)
    for a, b in zip(single.factors.values(), double.factors.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_kron_is_exact_where_gradients_are_rows_or_share_one_rank_one_shape():
    groups, blocks = pairs_of(torch.linspace(0.05, 0.3, 20, dtype=torch.float64))
    jacobian = jacobian_of(20)
    u, v = jacobian_of(1, seed=5)[0, :4], jacobian_of(1, seed=5)[0, 4:6]
    jacobian[:, 10:18] = jacobian[:, :1] * torch.outer(u, v).reshape(-1)
    factors = kron_factors(jacobian, SHAPES, groups, blocks)
    dense = dense_curvature(jacobian, groups, blocks)
    found = [f[0] if len(f) == 1 else torch.kron(*f) for f in factors.normalised()]
    starts = list(itertools.accumulate([0, *SIZES]))
    for i in (1, 2, 3, 4):
        block = dense[starts[i] : starts[i + 1], starts[i] : starts[i + 1]]
        torch.testing.assert_close(found[i], block, rtol=1e-10, atol=1e-10)
    # The control: gradients of rank two are not a Kronecker product.
    assert not torch.allclose(found[0], dense[:10, :10], rtol=0.1)


def test_a_single_pair_keeps_trace_and_direction():
    groups, blocks = pairs_of(torch.tensor([0.2, 0.0], dtype=torch.float64))
    jacobian = jacobian_of(2)
    left, right = kron_factors(jacobian, SHAPES, groups, blocks).normalised()[0]
    gradient = (0.2**0.5 * (jacobian[0] - jacobian[1]))[:10].reshape(2, 5)
    torch.testing.assert_close(left, gradient @ gradient.T)
    torch.testing.assert_close(right, gradient.T @ gradient / gradient.square().sum())
    torch.testing.assert_close(torch.kron(left, right).trace(), gradient.square().sum())


@pytest.mark.parametrize("k", [2, 3, 5])
def test_what_candidates_share_gets_no_curvature_at_all(k):
    generator = torch.Generator().manual_seed(0)
    items = torch.stack([torch.randperm(9, generator=generator)[:k] for _ in range(6)])
    p = torch.rand(6, k, generator=generator, dtype=torch.float64).softmax(1)
    blocks = [torch.diag_embed(p) - p[:, :, None] * p[:, None, :]]
    factors = kron_factors(jacobian_of(9), SHAPES, [group_of(items)], blocks)
    assert float(factors.factors["score.bias"][0]) == 0.0
    assert float(diag_curvature(jacobian_of(9), SHAPES, [group_of(items)], blocks)[-1]) == 0.0


def test_ratings_inform_the_bias():
    group, block = group_of(torch.arange(5)[:, None]), torch.full((5, 1, 1), 0.3, dtype=torch.float64)
    factors = kron_factors(jacobian_of(5), SHAPES, [group], [block])
    torch.testing.assert_close(float(factors.factors["score.bias"][0]), 5 * 0.3)


def test_groups_of_several_kinds_add_up(feedback):
    groups, blocks, jacobian = feedback
    more, more_blocks = pairs_of(torch.full((6,), 0.2, dtype=torch.float64))
    together = kron_factors(jacobian, SHAPES, [*groups, *more], [*blocks, *more_blocks])
    apart = [kron_factors(jacobian, SHAPES, g, b) for g, b in ((groups, blocks), (more, more_blocks))]
    for site, factors in together.factors.items():
        for i, factor in enumerate(factors):
            torch.testing.assert_close(factor, apart[0].factors[site][i] + apart[1].factors[site][i])


def test_without_feedback_the_posterior_is_the_prior():
    group, block = group_of(torch.arange(4).reshape(2, 2)), torch.zeros(2, 2, 2, dtype=torch.float64)
    prior = torch.cat([torch.full((n,), p, dtype=torch.float64) for n, p in zip(SIZES, PRIOR.values(), strict=True)])
    test = jacobian_of(3)
    # Masked rows need no derivatives.
    posterior = kron_factors([], SHAPES, [group], [block]).posterior(PRIOR)
    torch.testing.assert_close(posterior.covariance(test), test / prior @ test.T, rtol=1e-12, atol=1e-12)


def test_state_survives_safetensors(feedback, tmp_path):
    groups, blocks, jacobian = feedback
    kron = kron_factors(jacobian, SHAPES, groups, blocks).posterior(PRIOR)
    diag = DiagCovariance.of(diag_curvature(jacobian, SHAPES, groups, blocks), SHAPES, PRIOR)
    for posterior in (kron, diag):
        safetensors.torch.save_file(posterior.state(), tmp_path / "state")
        restored = type(posterior).from_state(safetensors.torch.load_file(tmp_path / "state"), SHAPES)
        assert torch.equal(restored.covariance(jacobian[:3]), posterior.covariance(jacobian[:3]))
        assert torch.equal(restored.log_det, posterior.log_det)


def test_incomplete_state_is_refused(feedback):
    groups, blocks, jacobian = feedback
    state = kron_factors(jacobian, SHAPES, groups, blocks).posterior(PRIOR).state()
    del state["q.lora_B/values/1"]
    with pytest.raises(PersistenceError, match=r"q\.lora_B/values/1"):
        KronCovariance.from_state(state, SHAPES)
    with pytest.raises(PersistenceError, match="precision"):
        DiagCovariance.from_state({"precision": torch.ones(3)}, SHAPES)


def test_missing_items_wrong_sites_and_bad_curvature_are_refused():
    groups, blocks = pairs_of(torch.full((6,), 0.2, dtype=torch.float64))
    jacobian = jacobian_of(6)
    absent = int(groups[0].items[0, 0])
    present = torch.tensor([i for i in range(6) if i != absent])
    with pytest.raises(ArgumentError, match=f"lacks 1 items .* item {absent}"):
        kron_factors([(present, jacobian[present])], SHAPES, groups, blocks)
    with pytest.raises(ArgumentError, match="27 columns"):
        kron_factors(jacobian[:, :-1], SHAPES, groups, blocks)
    with pytest.raises(EngineError, match="positive semi-definite"):
        kron_factors(jacobian, SHAPES, groups, [-blocks[0]])
    jacobian[absent, 12] = torch.inf
    with pytest.raises(EngineError, match="lora_B"):
        kron_factors(jacobian, SHAPES, groups, blocks).posterior(PRIOR)
    with pytest.raises(EngineError, match="not finite"):
        DiagCovariance.of(diag_curvature(jacobian, SHAPES, groups, blocks), SHAPES, PRIOR)


def test_memory_counts_factors_and_eigenvectors():
    assert kron_bytes({"a": (8, 384), "b": (2,)}) == 16 * (8**2 + 384**2 + 2**2)
