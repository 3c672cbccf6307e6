"""Our curvature inside laplace-torch: against its own exact backend, torch.func, and our own posteriors."""

import importlib.util
from pathlib import Path

import laplace
import pytest
import torch
from laplace.curvature import CurvatureInterface, CurvlinopsGGN
from torch.utils.data import DataLoader

import bayesrm as brm
from bayesrm.data.groups import Comparison, FeedbackGroup
from bayesrm.engines._kron import DiagCovariance, diag_curvature, kron_factors
from bayesrm.engines.laplace_torch import PairKron, PreferenceCurvature, pair_model
from bayesrm.errors import ArgumentError

SPEC = importlib.util.spec_from_file_location("lora_models", Path(__file__).parents[1] / "rewards" / "lora_models.py")
lora_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lora_models)

NUM_PAIRS = 11


@pytest.fixture(scope="module", params=["bert", "llama"])
def setting(request, tmp_path_factory):
    """(model, token sequences of pairs) of a tiny network away from its initialisation."""
    folder = getattr(lora_models, request.param)(tmp_path_factory.mktemp(request.param))
    # curvlinops differentiates forwards, which torch's fused attention cannot.
    network = brm.rewards.LoRA(folder, rank=2, attention="eager").load(seed=0)
    step = torch.randn(network.num_parameters, generator=torch.Generator().manual_seed(1))
    network.set_theta(network.theta() + 0.3 * step)
    prompts, first = lora_models.texts(NUM_PAIRS)
    _, second = lora_models.texts(NUM_PAIRS, seed=1)
    pairs = list(zip(network.tokenize(prompts, first), network.tokenize(prompts, second), strict=True))
    return pair_model(network), pairs


@pytest.fixture(scope="module")
def dense(setting):
    """(derivatives `(pairs, 2, P)` by torch.func, curvature `(pairs,)` in the difference), in float64."""
    model, pairs = setting
    batch = model.collate(pairs)
    reference = CurvatureInterface(model, "classification")
    jacobian, rewards = reference.jacobians(batch)
    difference = (rewards[:, 1] - rewards[:, 0]).double()
    return jacobian.double(), difference.sigmoid() * (-difference).sigmoid()


def fit(setting, structure, backend=PreferenceCurvature, batch_size=4, **settings):
    model, pairs = setting
    posterior = laplace.Laplace(
        model, "reward_modeling", subset_of_weights="all", hessian_structure=structure, backend=backend, **settings
    )
    posterior.fit(DataLoader(pairs, batch_size=batch_size, collate_fn=model.collate))
    return posterior


def candidates(setting):
    model, pairs = setting
    return model.network.collate([second for _, second in pairs[:5]])


def ours(setting, dense):
    """Arguments of `kron_factors` for the same pairs."""
    model, _ = setting
    jacobian, strength = dense
    shapes = model.network.parameter_shapes()
    n = len(jacobian)
    items = torch.arange(2 * n).reshape(n, 2)
    group = FeedbackGroup(Comparison("choice", n, 2), items, torch.zeros(n).long(), torch.ones(n), torch.arange(n))
    block = strength[:, None, None] * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return jacobian.flatten(0, 1), shapes, [group], [block]


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def test_jacobians_are_those_of_torch_func(setting):
    model, pairs = setting
    ours, theirs = (cls(model, "classification") for cls in (PreferenceCurvature, CurvatureInterface))
    for x, width in ((model.collate(pairs), 2), (candidates(setting), 1)):
        (jacobian, rewards), (expected, expected_rewards) = ours.jacobians(x), theirs.jacobians(x)
        assert jacobian.shape[1] == rewards.shape[1] == width
        assert relative(jacobian, expected) < 1e-5
        assert relative(rewards, expected_rewards) < 1e-5
        kept, _ = ours.jacobians(x, enable_backprop=True)
        assert kept.requires_grad
        assert relative(kept, expected) < 1e-6


def test_full_is_the_generalised_gauss_newton_matrix(setting):
    # The variances are those of an inverse in float32, to the last digit times its condition number (about 100 here).
    found, expected = (
        fit(setting, "full", backend, prior_precision=10.0) for backend in (PreferenceCurvature, CurvlinopsGGN)
    )
    assert relative(found.posterior_precision, expected.posterior_precision) < 1e-5
    x = candidates(setting)
    (mean, variance), (expected_mean, expected_variance) = found(x), expected(x)
    assert mean.shape == (5, 1)
    assert variance.shape == (5, 1, 1)
    assert relative(mean, expected_mean) < 1e-5
    assert relative(variance, expected_variance) < 1e-5
    torch.testing.assert_close(
        found.log_marginal_likelihood(), expected.log_marginal_likelihood(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("batch_size", [1, 4, NUM_PAIRS])
def test_kron_has_the_factors_of_pair_differences_whatever_the_batches(setting, dense, batch_size):
    posterior = fit(setting, "kron", batch_size=batch_size)
    jacobian, strength = dense
    sizes = [p.numel() for p in posterior.params]
    difference = (strength.sqrt()[:, None] * (jacobian[:, 1] - jacobian[:, 0])).split(sizes, dim=1)
    for p, rows, factors in zip(posterior.params, difference, posterior.H_facs.kfacs, strict=True):
        if p.dim() == 1:
            assert relative(factors[0] + 1.0, rows.T @ rows + 1.0) < 1e-5
            continue
        left = sum(d.reshape(p.shape) @ d.reshape(p.shape).T for d in rows)
        right = sum(d.reshape(p.shape).T @ d.reshape(p.shape) for d in rows)
        assert relative(factors[0], left) < 1e-5
        assert relative(factors[1], right / left.trace()) < 1e-5


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_predictions_are_those_of_our_posteriors(setting, dense, structure):
    model, _ = setting
    x = candidates(setting)
    layers = torch.linspace(0.5, 2.0, len(model.network.sites))
    posterior = fit(setting, structure, prior_precision=layers)
    prior = dict(zip(model.network.sites, layers.tolist(), strict=True))
    jacobian, shapes, groups, blocks = ours(setting, dense)
    expected = (
        kron_factors(jacobian, shapes, groups, blocks).posterior(prior)
        if structure == "kron"
        else DiagCovariance.of(diag_curvature(jacobian, shapes, groups, blocks), shapes, prior)
    )
    test = CurvatureInterface(model, "classification").jacobians(x)[0][:, 0]
    mean, covariance = posterior(x, joint=True)
    assert relative(mean, model(x)[:, 0]) < 1e-5
    assert relative(covariance, expected.covariance(test)) < 1e-4
    assert relative(posterior(x)[1].flatten(), expected.covariance(test).diagonal()) < 1e-4
    assert relative(posterior.log_det_posterior_precision, expected.log_det) < 1e-4


def test_the_bias_of_the_head_gets_no_curvature_from_pairs(setting):
    model, _ = setting
    if "classifier.bias" not in model.network.sites:
        pytest.skip("this head has no bias")
    place = list(model.network.sites).index("classifier.bias")
    assert float(fit(setting, "kron").H_facs.kfacs[place][0]) == 0.0
    # The control: factors of single responses see the bias move.
    assert float(fit(setting, "kron", CurvlinopsGGN).H_facs.kfacs[place][0]) > 0.1


def test_a_fit_may_go_on_with_more_pairs(setting):
    model, pairs = setting
    whole = fit(setting, "kron")
    parts = fit((model, pairs[:4]), "kron")
    # laplace-torch returns from a checkpoint with its own class of factors.
    restored = fit((model, pairs[:2]), "kron")
    restored.load_state_dict(parts.state_dict())
    for posterior in (parts, restored):
        posterior.fit(DataLoader(pairs[4:], batch_size=4, collate_fn=model.collate), override=False)
        for found, expected in zip(posterior.H_facs.kfacs, whole.H_facs.kfacs, strict=True):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_multiple_of_factors_is_a_multiple_of_the_curvature():
    factors = PairKron([[torch.eye(2), torch.eye(3) / 3], [torch.eye(1)]])
    torch.testing.assert_close((4.0 * factors).to_matrix(), 4.0 * factors.to_matrix())
    torch.testing.assert_close((factors + factors).to_matrix(), 2.0 * factors.to_matrix())


def test_prior_mean_is_the_initialisation(setting):
    model, _ = setting
    network = model.network
    posterior = fit(setting, "diag", prior_mean=model.prior_mean)
    moved = network.theta() - network.initial_theta()
    torch.testing.assert_close(posterior.scatter, moved @ moved)
    # The control: laplace-torch's own mean of zero counts the initialisation too.
    theta = network.theta()
    torch.testing.assert_close(fit(setting, "diag").scatter, theta @ theta)
    assert not torch.isclose(theta @ theta, moved @ moved, rtol=0.05)


class Scores(torch.nn.Module):
    """Scores of rows of features `(B, K, D)` or `(B, D)`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([30.0, 1.0, -0.5]))

    def forward(self, x):
        scores = x @ self.weight
        return scores if x.dim() == 3 else scores[:, None]


@pytest.mark.parametrize("k", [2, 3])
def test_any_reward_model_and_any_number_of_candidates(k):
    x = torch.randn(6, k, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 1.0])
    loss, curvature = PreferenceCurvature(Scores(), "classification").full(x, torch.zeros(6).long())
    expected_loss, expected = CurvlinopsGGN(Scores(), "classification").full(x, torch.zeros(6).long())
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(curvature, expected, rtol=1e-5, atol=1e-5)


def test_curvature_holds_where_a_pair_is_all_but_decided():
    x = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    for row in x:
        _, diagonal = PreferenceCurvature(Scores(), "classification").diag(row[None], torch.zeros(1).long())
        # p (1 - p) = exp(-30) up to exp(-60).
        assert float(diagonal[0]) == pytest.approx(9.357622968840175e-14, rel=1e-6)


def test_a_subset_of_the_parameters(setting, dense):
    model, pairs = setting
    jacobian, strength = dense
    chosen = torch.tensor([3, 0, 7])
    backend = PreferenceCurvature(model, "classification", subnetwork_indices=chosen)
    difference = (jacobian[:, 1] - jacobian[:, 0])[:, chosen]
    _, curvature = backend.full(model.collate(pairs), torch.zeros(len(pairs)).long())
    assert relative(curvature, (strength[:, None] * difference).T @ difference) < 1e-5


def test_what_it_cannot_do_is_refused(setting):
    model, _ = setting
    with pytest.raises(ArgumentError, match="'regression'"):
        PreferenceCurvature(model, "regression")
    with pytest.raises(ArgumentError, match="last_layer"):
        PreferenceCurvature(model, "classification", last_layer=True)
    with pytest.raises(ArgumentError, match="is a Tensor"):
        model(torch.zeros(2, 2, 4))
    triples = torch.zeros(2, 3, 4).long()
    with pytest.raises(ArgumentError, match=r"\(2, 3, 4\)"):
        model({"input_ids": triples, "attention_mask": triples})
