import math

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.backend import dist
from bayesrm.engines import _curvature, _group_evidence
from bayesrm.engines._curvature import CurvatureKind
from bayesrm.engines._density import FeedbackDensity
from bayesrm.engines._group_evidence import GroupEvidence, _ascend, _returned, tune_groups
from bayesrm.engines._grouped_design import ColumnGroups, GramGroups

L = brm.likelihoods
LOG_FACTORS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def comparisons(features, rows, k=2, kind="choice", seed=0, **columns):
    """Rows over shared items, so that an item's curvature comes from several rows."""
    rng = np.random.default_rng(seed)
    candidates = np.stack([rng.permutation(len(features))[:k] for _ in range(rows)])
    outcome = np.tile(np.arange(k), (rows, 1)) if kind == "ranking" else np.zeros(rows, int)
    return brm.Comparisons.from_arrays(
        features, candidates=candidates, outcome=outcome, kind=kind,
        words=rng.integers(10, 300, size=len(features)), **columns,
    )  # fmt: skip


def problem(likelihood, *, num_features=6, items=30, rows=40, parameters=None, seed=0, **design):
    """(density, features, data) with feedback simulated from the model."""
    features = np.random.default_rng(seed).normal(size=(items, num_features))
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    data = comparisons(features, rows, seed=seed, **design)
    given = None if parameters is None else {"weight": torch.as_tensor(parameters, dtype=torch.float64)}
    data = model.simulate(data, seed=seed, parameters=given).data
    return FeedbackDensity(model, data.groups()), torch.as_tensor(features), data


def families(columns, num_groups):
    group = torch.arange(columns.shape[1]) * num_groups // columns.shape[1]
    parts = [columns[:, group == g] for g in range(num_groups)]
    return {"columns": ColumnGroups(columns, group), "grams": GramGroups([part @ part.T for part in parts])}


def no_offset(family):
    return torch.zeros(len(family.columns if isinstance(family, ColumnGroups) else family.grams[0])).double()


def searching(density, family, offset=None, *, curvature="auto", seed=0):
    return GroupEvidence(
        density, family, no_offset(family) if offset is None else offset, density.initial_latents, tolerance=1e-11,
        max_iterations=100, curvature=CurvatureKind(curvature), seed=seed,
    )  # fmt: skip


def tuned(density, family, *, max_iterations=100):
    return tune_groups(
        density, family, no_offset(family), density.initial_latents, tolerance=1e-8, max_iterations=max_iterations,
        curvature=CurvatureKind.AUTO, seed=0,
    )  # fmt: skip


def differences(search, log_factors, step=5e-4):
    """Central differences: error h^2 / 6 times the third derivative, and the modes' tolerance over h."""
    ends = [
        [search.at(log_factors + sign * step * e).log_evidence for sign in (1, -1)]
        for e in torch.eye(len(log_factors), dtype=torch.float64)
    ]
    return torch.tensor([(up - down) / (2 * step) for up, down in ends], dtype=torch.float64)


class NormalRating:
    """Ratings with unit normal noise: the one case in which Laplace's evidence is exact and known in closed form."""

    def __call__(self, rewards, comparison):
        return dist.Normal(rewards[..., 0], 1.0)


MIXED = {"choice": L.LengthBias(L.Davidson()), "ranking": L.PlackettLuce()}
CASES = {
    "bradley_terry": (L.BradleyTerry(), "auto", "observed", {}),
    "davidson": (L.Davidson(), "auto", "observed", {}),
    "davidson_fisher": (L.Davidson(), "fisher", "fisher", {}),
    "thurstone_fisher": (L.Thurstone(), "fisher", "fisher", {}),
    "ordinal": (L.Ordinal(), "auto", "observed", {"kind": "rating", "k": 1, "num_levels": 4}),
    "plackett_luce_fisher": (L.PlackettLuce(), "fisher", "fisher", {"kind": "ranking", "k": 3}),
    "noise": (L.LabelNoise(L.Davidson()), "auto", "fisher", {}),
    "weighted": (L.BradleyTerry(), "auto", "observed", {"weight": [0.0, 1.0, 2.5, 1.0] * 10}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_gradient_equals_differences_of_the_evidence(name):
    likelihood, kind, used, design = CASES[name]
    density, columns, _ = problem(likelihood, **design)
    offset = 0.3 * torch.sin(torch.arange(len(columns), dtype=torch.float64))
    found = {}
    for form, family in families(columns, 3).items():
        search = searching(density, family, offset, curvature=kind)
        point = search.at(LOG_FACTORS)
        assert point.curvature.kind == used
        gradient, informed = search.slope(point)
        found[form] = (torch.tensor(point.log_evidence, dtype=torch.float64), gradient, informed, point.rewards)
    torch.testing.assert_close(found["columns"], found["grams"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient, differences(search, LOG_FACTORS), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["columns", "grams"])
@pytest.mark.parametrize("name", ["davidson", "thurstone_fisher"])
def test_gradient_of_one_group(name, form):
    likelihood, kind, _, design = CASES[name]
    density, columns, _ = problem(likelihood, **design)
    search = searching(density, families(columns, 1)[form], curvature=kind)
    gradient, _ = search.slope(search.at(LOG_FACTORS[:1]))
    torch.testing.assert_close(gradient, differences(search, LOG_FACTORS[:1]), rtol=1e-6, atol=1e-7)


def test_both_forms_agree_for_more_columns_than_items():
    # The Gram matrix has a Cholesky factor but for a reference item, whose reward is known.
    density, columns, _ = problem(L.Davidson(), num_features=45, items=16)
    columns[0] = 0.0
    found = []
    for family in families(columns, 3).values():
        search = searching(density, family)
        # From one point to the next the mode is carried over.
        points = [search.at(factors) for factors in (LOG_FACTORS, LOG_FACTORS.flip(0))]
        assert all(point.mode.converged for point in points)
        found.append([(point.rewards, *search.slope(point), torch.tensor(point.log_evidence)) for point in points])
    assert search.family.design(LOG_FACTORS).shape == (16, 15)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_gradient_with_several_kinds_of_feedback():
    features = np.random.default_rng(3).normal(size=(20, 4))
    data = brm.Comparisons.concatenate(
        [comparisons(features, 20, seed=1), comparisons(features, 15, 3, "ranking", seed=2)]
    )
    model = brm.RewardModel(brm.rewards.Linear(), MIXED)
    data = model.simulate(data, seed=1).data
    density = FeedbackDensity(model, data.groups())
    columns = torch.as_tensor(np.asarray(data.features)).double()
    for curvature in ("observed", "fisher"):
        search = searching(density, families(columns, 2)["columns"], curvature=curvature)
        gradient, _ = search.slope(search.at(LOG_FACTORS[:2]))
        torch.testing.assert_close(gradient, differences(search, LOG_FACTORS[:2]), rtol=1e-6, atol=1e-7)


def test_the_part_through_the_mode_is_no_small_matter():
    # Without it the gradient of this problem would be off by more than a hundredth, so the test above sees it.
    density, columns, _ = problem(L.Davidson())
    family = families(columns, 3)["columns"]
    search = searching(density, family)
    point = search.at(LOG_FACTORS)
    gradient, informed = search.slope(point)
    square = torch.zeros(3, dtype=torch.float64).index_add_(0, family.group_of_column, point.mode.z.square())
    assert float((gradient - 0.5 * (informed - square)).abs().max()) > 0.01


def test_normal_noise_has_the_closed_form():
    rng = np.random.default_rng(0)
    columns = torch.as_tensor(rng.normal(size=(25, 6)))
    data = brm.Comparisons.from_arrays(
        columns.numpy(), candidates=np.arange(25)[:, None], outcome=rng.integers(5, size=25), kind="rating",
        num_levels=5,
    )  # fmt: skip
    density = FeedbackDensity(brm.RewardModel(brm.rewards.Linear(), NormalRating()), data.groups())
    y = density.groups[0].outcome.double()
    group = torch.arange(6) // 2
    factors = LOG_FACTORS.clone().requires_grad_(True)
    scaled = columns * torch.exp(-0.5 * factors)[group]
    covariance = scaled @ scaled.T + torch.eye(25, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.full_like(y, 0.5), covariance).log_prob(y)
    (slope,) = torch.autograd.grad(exact, factors)
    for family in families(columns, 3).values():
        search = searching(density, family, torch.full_like(y, 0.5))
        point = search.at(LOG_FACTORS)
        assert point.log_evidence == pytest.approx(float(exact.detach()), abs=1e-10)
        torch.testing.assert_close(search.slope(point)[0], slope, rtol=1e-10, atol=1e-10)


def test_evidence_against_quadrature():
    density, columns, data = problem(L.BradleyTerry(), num_features=2, items=100, rows=300, parameters=[1.0, -0.3])
    search = searching(density, families(columns, 2)["columns"])
    items, outcome = data.groups()[0].items, data.groups()[0].outcome
    contrast = (columns[items[:, 0]] - columns[items[:, 1]]) * (1 - 2 * outcome)[:, None]
    point = search.at(torch.zeros(2, dtype=torch.float64))
    spread = torch.linalg.inv(point.factor).square().sum(0).sqrt()
    # The trapezoidal rule's error on a bell curve is exp(-2 pi^2 / step^2): rounding at 0.25 standard deviations.
    axes = [m + s * torch.linspace(-10, 10, 81, dtype=torch.float64) for m, s in zip(point.mode.z, spread, strict=True)]
    grid = torch.cartesian_prod(*axes)
    log_likelihood = torch.nn.functional.logsigmoid(grid @ contrast.T).sum(1)
    cell = sum(torch.log(axis[1] - axis[0]) for axis in axes)
    for factors in ([0.0, 0.0], [2.0, -1.0], [-3.0, 2.0]):
        log_precision = torch.tensor(factors, dtype=torch.float64)
        log_prior = 0.5 * (log_precision - math.log(2 * math.pi) - log_precision.exp() * grid**2).sum(1)
        exact = float(torch.logsumexp(log_likelihood + log_prior, 0) + cell)
        # Laplace's relative error is O(1 / N) with N = 300.
        assert search.at(log_precision).log_evidence == pytest.approx(exact, abs=0.02)


def test_one_group_is_the_common_factor_of_the_engines():
    density, columns, data = problem(L.Davidson(), rows=200, items=120, num_features=8)
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    fitted = brm.fit(model, data, inference=brm.Laplace(prior_precision="marginal_likelihood"))
    for family in families(columns, 1).values():
        result = tuned(density, family)
        assert result.converged
        # That search stops within 5e-3 of the optimum.
        assert float(result.log_factors) == pytest.approx(math.log(fitted.program.prior.precision), abs=5e-3)
        assert result.log_evidence >= fitted.report.log_evidence - 1e-8
        assert result.log_evidence == pytest.approx(fitted.report.log_evidence, abs=1e-4)


def test_both_forms_are_tuned_alike_and_to_the_top():
    truth = np.repeat([3.0, 1.0, 0.4], 8) * np.random.default_rng(1).normal(size=24)
    density, columns, _ = problem(L.BradleyTerry(), rows=300, items=100, num_features=24, parameters=truth)
    results = {form: tuned(density, family) for form, family in families(columns, 3).items()}
    a, b = results["columns"], results["grams"]
    assert a.converged
    assert b.converged
    torch.testing.assert_close(a.log_factors, b.log_factors, rtol=0, atol=1e-3)
    torch.testing.assert_close(a.design @ a.mode.z, b.design @ b.mode.z, rtol=0, atol=1e-3)
    assert a.log_evidence == pytest.approx(b.log_evidence, abs=1e-6)
    assert bool((a.log_factors[1:] > a.log_factors[:-1]).all())
    search = searching(density, families(columns, 3)["columns"])
    for e in torch.eye(3, dtype=torch.float64):
        for step in (-0.3, 0.3):
            assert search.at(a.log_factors + step * e).log_evidence < a.log_evidence


def test_an_irrelevant_group_is_found_out():
    truth = np.concatenate([1.5 * np.random.default_rng(5).normal(size=10), np.zeros(20)])
    density, columns, _ = problem(L.BradleyTerry(), rows=300, items=200, num_features=30, parameters=truth, seed=2)
    result = tuned(density, ColumnGroups(columns, (torch.arange(30) >= 10).long()))
    assert result.converged
    # Ten weights tell a log precision to sqrt(2 / 10); the answers' noise comes on top.
    assert float(result.log_factors[0]) == pytest.approx(-math.log(np.mean(truth[:10] ** 2)), abs=1.0)
    assert float(result.log_factors[1]) > 2.0
    assert result.log_evidence > tuned(density, families(columns, 1)["columns"]).log_evidence + 5.0


def test_a_group_that_the_data_want_at_zero_width_is_switched_off_and_named():
    # Feature 2 is all that tells items 0 and 1 apart, of which each was chosen as often as the other.
    rng = np.random.default_rng(0)
    features = np.concatenate([np.zeros((2, 2)), rng.normal(size=(40, 2))])
    features = np.concatenate([features, np.eye(42)[:, :1]], axis=1)
    others = 2 + np.stack([rng.permutation(40)[:2] for _ in range(60)])
    signal = (features[others[:, 1], 0] > features[others[:, 0], 0]) ^ (rng.random(60) < 0.1)
    data = brm.Comparisons.from_arrays(
        features, candidates=np.concatenate([[[0, 1]] * 8, others]), outcome=np.concatenate([[0, 1] * 4, signal])
    )
    density = FeedbackDensity(brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry()), data.groups())
    columns = torch.as_tensor(features)
    grams = [columns[:, :2] @ columns[:, :2].T, columns[:, 2:] @ columns[:, 2:].T]
    with pytest.warns(brm.errors.ConvergenceWarning, match=r"precision of quarrel goes to infinity: .* e\^\+16"):
        result = tuned(density, GramGroups(grams, ("signal", "quarrel")))
    assert result.converged
    assert float(result.log_factors[1]) == 16.0
    assert float(result.log_factors[0]) < 0.0


@pytest.fixture(scope="module")
def two_groups():
    """(density, columns, what tuning their two groups finds)."""
    density, columns, _ = problem(L.BradleyTerry(), rows=200, items=150, num_features=12)
    return density, columns, tuned(density, families(columns, 2)["columns"])


def test_a_badly_declared_precision_is_no_trap(two_groups):
    density, columns, expected = two_groups
    # Declared e^12 times too precise: on the plateau of no reward at all, where the slope says little.
    result = tuned(density, families(columns * math.exp(-6.0), 2)["columns"])
    torch.testing.assert_close(result.log_factors + 12.0, expected.log_factors, rtol=0, atol=2e-3)


def test_a_group_that_a_long_step_took_too_far_out_comes_back(two_groups):
    density, columns, expected = two_groups
    family = families(columns, 2)["columns"]
    search = searching(density, family)
    stranded = search.at(torch.tensor([float(expected.log_factors[0]), 15.5], dtype=torch.float64))
    assert abs(float(search.slope(stranded)[0][1])) < 1e-3
    back = _returned(search, stranded)
    torch.testing.assert_close(back.log_factors, expected.log_factors, rtol=0, atol=2e-3)
    at_optimum = _ascend(search, expected.log_factors)
    assert _returned(search, at_optimum) is at_optimum


def test_groups_without_influence_stay_where_they_were_declared():
    density, columns, _ = problem(L.BradleyTerry(), rows=150, items=60)
    padded = torch.cat([columns, torch.zeros(60, 2, dtype=torch.float64)], dim=1)
    gram = columns @ columns.T
    for family in (
        ColumnGroups(padded, torch.tensor([0] * 6 + [1] * 2)),
        GramGroups([gram, torch.zeros_like(gram)]),
    ):
        point = searching(density, family).at(torch.zeros(2, dtype=torch.float64))
        gradient, informed = searching(density, family).slope(point)
        assert float(gradient[1]) == pytest.approx(0.0, abs=1e-12)
        assert float(informed[1]) == pytest.approx(0.0, abs=1e-12)


def test_drawn_information_has_a_gradient_by_differences(monkeypatch):
    density, columns, _ = problem(L.LabelNoise(L.BradleyTerry(), 0.1), rows=15, items=15, num_features=4)
    family = families(columns, 2)["columns"]
    exact, _ = searching(density, family).slope(searching(density, family).at(LOG_FACTORS[:2]))
    monkeypatch.setattr(_curvature, "MAX_ENUMERATED", 1)
    monkeypatch.setattr(_curvature, "NUM_DRAWS", 32)
    drawn = []
    for seed in range(6):
        search = searching(density, family, seed=seed)
        point = search.at(LOG_FACTORS[:2])
        assert point.curvature.kind == "fisher-draws"
        drawn.append(search.slope(point)[0])
    error, noise = torch.stack(drawn).mean(0) - exact, torch.stack(drawn).std(0) / math.sqrt(6)
    assert bool((error.abs() <= 4.0 * noise).all())
    assert bool((noise < 0.1).all())


def test_unfinished_modes_are_reported():
    density, columns, _ = problem(L.BradleyTerry(), rows=100, items=60)
    with pytest.warns(brm.errors.ConvergenceWarning, match="which are no modes"):
        tuned(density, families(columns, 2)["columns"], max_iterations=1)


def test_an_evidence_that_is_not_stationary_is_reported(monkeypatch):
    monkeypatch.setattr(_group_evidence, "_ascend", lambda search, start: search.at(start))
    density, columns, _ = problem(L.BradleyTerry(), rows=100, items=60, parameters=[3.0, 3.0, 3.0, 0.1, 0.1, 0.1])
    with pytest.warns(brm.errors.ConvergenceWarning, match="still changes by"):
        result = tuned(density, families(columns, 2)["columns"])
    assert not result.converged


def test_arguments_are_checked():
    columns = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(brm.errors.ArgumentError, match="`group_of_column` has shape"):
        ColumnGroups(columns, torch.tensor([0]))
    with pytest.raises(brm.errors.ArgumentError, match="negative group"):
        ColumnGroups(columns, torch.tensor([0, -1]))
    with pytest.raises(brm.errors.ArgumentError, match="one name for each group"):
        ColumnGroups(columns, torch.tensor([0, 1]), ("only",))
    with pytest.raises(brm.errors.ArgumentError, match="`grams` is empty"):
        GramGroups([])
    with pytest.raises(brm.errors.ArgumentError, match=r"`grams\[1\]` has shape"):
        GramGroups([torch.eye(3), torch.eye(2)])
    with pytest.raises(brm.errors.ArgumentError, match="not symmetric"):
        GramGroups([torch.triu(torch.ones(3, 3))])
    with pytest.raises(brm.errors.ArgumentError, match="2 names for 1"):
        GramGroups([torch.eye(3)], ("a", "b"))
