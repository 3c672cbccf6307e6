"""The program: the same log joint under Pyro, NumPyro and the engines' density, and simulation from it."""

from collections import Counter

import jax
import numpy as np
import numpyro
import pyro
import pytest
import scipy.stats
import torch
from numpyro.infer.util import log_density
from pyro.poutine.runtime import _PYRO_STACK

import bayesrm as brm
from bayesrm.backend import seeded
from bayesrm.engines._density import FeedbackDensity
from bayesrm.errors import ArgumentError, DataError, LikelihoodError
from bayesrm.likelihoods import (
    Approval,
    BradleyTerry,
    Davidson,
    LabelNoise,
    LengthBias,
    Ordinal,
    PlackettLuce,
    RaterReliability,
)
from bayesrm.priors import Gaussian
from bayesrm.rewards import MLP, Linear

from ..likelihoods.cases import CASES, NUM_ANNOTATORS, to_jax

WIDTH, ROWS = 3, 8
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def declared(case, rows=ROWS, weight=None, seed=0):
    """Comparisons of random items as the case needs them; the outcomes are placeholders."""
    rng = np.random.default_rng(seed)
    items = max(10, case.num_candidates + 2)
    candidates = np.stack([rng.permutation(items)[: case.num_candidates] for _ in range(rows)])
    outcome = np.tile(np.arange(case.depth), (rows, 1)) if case.kind == "ranking" else np.zeros(rows, int)
    return brm.Comparisons.from_arrays(
        rng.normal(size=(items, WIDTH)),
        candidates=candidates,
        outcome=outcome,
        kind=case.kind,
        prompt_index=np.zeros(items, int),
        annotator=[f"rater {i % NUM_ANNOTATORS}" for i in range(rows)],
        weight=weight,
        margin=rng.normal(size=rows) if case.margin else None,
        words=rng.integers(10, 300, size=items),
        num_levels=case.num_levels,
    )


def log_joints(model, data, parameters, latents):
    """Log joint under the engines' density, under Pyro and under NumPyro."""
    features = torch.as_tensor(data.features)
    density = FeedbackDensity(model, data.groups())
    unconstrained = density.unconstrain(latents)
    expected = density.log_joint(density.gather(model.reward.apply(parameters, features)), unconstrained)
    for site in density.sites:
        u = unconstrained[site.start : site.stop].reshape(site.unconstrained_shape)
        expected = expected - site.transform.log_abs_det_jacobian(u, latents[site.name]).sum()
    for name, value in parameters.items():
        scale = model.prior.of(name) ** -0.5
        expected = expected + scipy.stats.norm.logpdf(value.numpy(), scale=scale).sum()
    values = {f"reward.{name}": value for name, value in parameters.items()} | latents
    trace = pyro.poutine.trace(pyro.poutine.condition(model, data=values)).get_trace(features, data.groups())
    sampled = {n for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}
    assert set(values) == {n for n in sampled if not n.startswith("feedback")}
    with jax.enable_x64(True):
        joint, _ = log_density(model, (to_jax(features), data.groups()), {}, to_jax(values))
        joint = float(joint)
    return float(expected), float(trace.log_prob_sum()), joint


def drawn(model, data, seed=0):
    """Data with simulated outcomes, and parameters and latents of another draw from the prior."""
    truth = model.simulate(data, seed=seed + 1)
    return model.simulate(data, seed=seed).data, truth.parameters, truth.latents


@each
def test_log_joint_is_one_number(case):
    model = brm.RewardModel(Linear(), case.likelihood, Gaussian(2.5))
    weight = np.array([1.0, 2.0, 0.5, 3.0, 1.0, 0.25, 1.5, 1.0])
    data, parameters, latents = drawn(model, declared(case, weight=weight))
    expected, under_pyro, under_numpyro = log_joints(model, data, parameters, latents)
    assert abs(under_pyro - expected) < 1e-9
    assert abs(under_numpyro - expected) < 1e-9
    # The weights do count: doubling one changes the joint.
    weight[3] *= 2
    changed = declared(case, weight=weight).with_outcomes([g.outcome for g in data.groups()])
    assert abs(log_joints(model, changed, parameters, latents)[0] - expected) > 1e-6


MASKED = np.array([1.0, 0.0, 0.5, 3.0, 0.0, 0.25, 1.5, 1.0])


@pytest.mark.parametrize("name", ["davidson", "plackett_luce-partial", "ordinal-4"])
def test_a_weight_of_zero_masks_its_row(name):
    case = next(c for c in CASES if c.name == name)
    model = brm.RewardModel(Linear(), case.likelihood, Gaussian(2.5))
    data, parameters, latents = drawn(model, declared(case, weight=MASKED))
    expected, under_pyro, under_numpyro = log_joints(model, data, parameters, latents)
    assert abs(under_pyro - expected) < 1e-9
    assert abs(under_numpyro - expected) < 1e-9
    kept = data.select(np.flatnonzero(MASKED))
    assert abs(log_joints(model, kept, parameters, latents)[0] - expected) < 1e-9


@pytest.fixture(scope="module")
def mixed():
    """Pairs, triples, two depths of rankings, ratings and approvals of the same kind of items."""
    rng = np.random.default_rng(4)

    def part(kind, rows, k, depth=None, levels=None):
        candidates = np.stack([rng.permutation(9)[:k] for _ in range(rows)])
        outcome = np.tile(np.arange(depth), (rows, 1)) if depth else np.zeros(rows, int)
        return brm.Comparisons.from_arrays(
            rng.normal(size=(9, WIDTH)),
            candidates=candidates,
            outcome=outcome,
            kind=kind,
            prompt_index=np.zeros(9, int),
            annotator=[f"rater {i % 2}" for i in range(rows)],
            weight=rng.uniform(0.5, 2.0, size=rows),
            words=rng.integers(5, 200, size=9),
            num_levels=levels,
        )

    parts = [part("choice", 5, 2), part("choice", 3, 3), part("ranking", 4, 4, depth=4), part("ranking", 3, 4, depth=2)]
    return brm.Comparisons.concatenate([*parts, part("rating", 4, 1, levels=4), part("approval", 3, 1)])


MIXED_LIKELIHOOD = {
    "choice": LengthBias(PlackettLuce(temperature=1.5)),
    "ranking": RaterReliability(PlackettLuce(), spread=None),
    "rating": LabelNoise(Ordinal()),
    "approval": Approval(),
}


@pytest.mark.parametrize("reward", [Linear(), MLP(hidden=(4, 3))], ids=["linear", "mlp"])
def test_groups_share_latents_and_kinds_have_their_own(mixed, reward):
    model = brm.RewardModel(reward, MIXED_LIKELIHOOD)
    data, parameters, latents = drawn(model, mixed)
    assert [g.label for g in data.groups()] == [
        "choice.2",
        "choice.3",
        "ranking.4.2",
        "ranking.4.4",
        "rating.1",
        "approval.1",
    ]
    assert set(latents) == {
        "choice.length_coefficient",
        "ranking.reliability_mean",
        "ranking.reliability_spread",
        "ranking.rater_deviation",
        "rating.doubled_flip_rate",
        "rating.first_cutpoint",
        "rating.cutpoint_gaps",
        "approval.approval_offset",
    }
    expected, under_pyro, under_numpyro = log_joints(model, data, parameters, latents)
    assert abs(under_pyro - expected) < 1e-9
    assert abs(under_numpyro - expected) < 1e-9


def test_one_likelihood_over_several_groups(mixed):
    model = brm.RewardModel(Linear(), RaterReliability(PlackettLuce()))
    comparing = [g.rows for g in mixed.groups() if g.comparison.kind in ("choice", "ranking")]
    choices = mixed.select(torch.cat(comparing).sort().values)
    data, parameters, latents = drawn(model, choices)
    assert len(data.groups()) == 4
    expected, under_pyro, under_numpyro = log_joints(model, data, parameters, latents)
    assert abs(under_pyro - expected) < 1e-9
    assert abs(under_numpyro - expected) < 1e-9


def test_precisions_of_sites(mixed):
    reward = MLP(hidden=(4,))
    prior = Gaussian({"layer_0.weight": 1.0, "layer_0.bias": 4.0, "output.weight": 0.25})
    model = brm.RewardModel(reward, MIXED_LIKELIHOOD, prior)
    data, parameters, latents = drawn(model, mixed)
    expected, under_pyro, under_numpyro = log_joints(model, data, parameters, latents)
    assert abs(under_pyro - expected) < 1e-9
    assert abs(under_numpyro - expected) < 1e-9


# --------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize(
    "case", [c for c in CASES if "(" not in c.name or "length" in c.name], ids=lambda case: case.name
)
def test_simulation_is_reproducible(case):
    model = brm.RewardModel(Linear(), case.likelihood)
    data = declared(case, rows=40)
    first, again, other = (model.simulate(data, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.data.groups()[0].outcome, again.data.groups()[0].outcome)
    assert torch.equal(first.parameters["weight"], again.parameters["weight"])
    assert all(torch.equal(first.latents[n], again.latents[n]) for n in first.latents)
    assert not torch.equal(first.parameters["weight"], other.parameters["weight"])
    torch.testing.assert_close(first.rewards, torch.as_tensor(data.features) @ first.parameters["weight"])
    if case.depth == 1 or case.kind != "ranking":
        assert not torch.equal(first.data.groups()[0].outcome, other.data.groups()[0].outcome)


def test_simulation_keeps_what_is_given(mixed):
    model = brm.RewardModel(Linear(), MIXED_LIKELIHOOD)
    weight = torch.tensor([1.0, -2.0, 0.5])
    cut = torch.tensor(0.25)
    truth = model.simulate(mixed, seed=0, parameters={"weight": weight}, latents={"rating.first_cutpoint": cut})
    assert torch.equal(truth.parameters["weight"], weight.double())
    assert truth.latents["rating.first_cutpoint"] == 0.25
    assert len(truth.latents) == 8
    torch.testing.assert_close(truth.rewards, torch.as_tensor(mixed.features) @ weight.double())
    np.testing.assert_array_equal(truth.data.features, mixed.features)
    with pytest.raises(ArgumentError, match=r"`parameters` names 'bias'; the reward function has \['weight'\]"):
        model.simulate(mixed, seed=0, parameters={"bias": weight})
    with pytest.raises(ArgumentError, match=r"`latents` names \['tie_weight'\]; the likelihood has \['approval"):
        model.simulate(mixed, seed=0, latents={"tie_weight": cut})


@pytest.mark.parametrize(
    "name",
    [
        "davidson",
        "plackett_luce-partial",
        "plackett_luce-choice",
        "ordinal-4",
        "approval",
        "rater_reliability(davidson)",
    ],
)
def test_simulated_frequencies(name):
    case = next(c for c in CASES if c.name == name)
    model = brm.RewardModel(Linear(), case.likelihood)
    rows = 3000
    one = declared(case, rows=1)
    group = one.groups()[0]
    data = brm.Comparisons.from_arrays(
        one.features,
        candidates=np.tile(group.items.numpy(), (rows, 1)),
        outcome=np.tile(group.outcome.numpy(), (rows, 1) if case.kind == "ranking" else rows),
        kind=case.kind,
        annotator=["a"] * rows,
        words=one.words,
        num_levels=case.num_levels,
        prompt_index=np.zeros(one.num_items, int),
    )
    truth = model.simulate(data, seed=1, parameters={"weight": torch.tensor([0.5, -0.5, 0.3])})
    comparison = data.groups()[0].comparison
    table = case.log_table(truth.rewards[data.groups()[0].items], comparison, truth.latents)[0].exp().numpy()
    counts = Counter(map(str, truth.data.groups()[0].outcome.tolist()))
    observed = np.array([counts[str(y)] for y in case.outcomes().tolist()])
    assert observed.sum() == rows
    assert (table * rows).min() >= 5
    assert scipy.stats.chisquare(observed, table / table.sum() * rows).pvalue > 1e-3


def global_state():
    # Not Python's own generator: beartype, which checks types in this test run, draws from it.
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002  (the global generator is what must not move)
        "parameters": {name: float(value.detach()) for name, value in pyro.get_param_store().items()},
        "pyro handlers": len(_PYRO_STACK),
        "numpyro handlers": len(numpyro.primitives._PYRO_STACK),
        "dtype": torch.get_default_dtype(),
        "jax 64 bits": jax.config.jax_enable_x64,
    }


def test_simulation_and_fit_touch_no_global_state():
    case = next(c for c in CASES if c.name == "rater_reliability(length_bias(davidson))")
    model = brm.RewardModel(Linear(), case.likelihood)
    torch.manual_seed(3)
    pyro.param("mine", torch.tensor(1.0))
    before = global_state()
    data = model.simulate(declared(case, rows=30), seed=0).data
    for engine in (brm.Laplace(), brm.MAP(), brm.Laplace(structure="diag")):
        posterior = brm.fit(model, data, inference=engine, seed=0)
        posterior.predict_items(data).prob_best()
        posterior.predict_feedback(data, num_samples=16)
    after = global_state()
    pyro.get_param_store().clear()
    assert [name for name in before if after[name] != before[name]] == []


# -------------------------------------------------------------------------------------------- a likelihood of one's own


def constant_ties(rewards, comparison):
    """The example of `bayesrm.likelihoods.Likelihood`."""
    share = brm.sample("tie_share", brm.dist.Beta(1.0, 4.0))
    win = brm.ops.log_sigmoid(rewards[:, 0] - rewards[:, 1])
    lose = brm.ops.log_sigmoid(rewards[:, 1] - rewards[:, 0])
    decided = brm.ops.log1p(-share)
    tie = brm.ops.log(share) + 0.0 * win
    return brm.dist.Categorical(logits=brm.ops.stack([decided + win, decided + lose, tie], axis=-1))


def test_a_users_likelihood_fits_and_its_mode_is_that_of_both_libraries():
    case = next(c for c in CASES if c.name == "davidson")
    model = brm.RewardModel(Linear(), constant_ties, Gaussian(0.5))
    data = model.simulate(declared(case, rows=60), seed=2, latents={"tie_share": torch.tensor(0.3)}).data
    posterior = brm.fit(model, data, inference=brm.Laplace())
    mode = brm.fit(model, data, inference=brm.MAP(gradient_tolerance=1e-9))
    weight = mode.parameters["weight"]
    torch.testing.assert_close(posterior.parameters["weight"], weight, rtol=0, atol=1e-6)

    with jax.enable_x64(True):
        args = (to_jax(torch.as_tensor(data.features)), data.groups())
        unconstrained = numpyro.infer.util.unconstrain_fn(
            model, args, {}, {"reward.weight": to_jax(weight), "tie_share": to_jax(mode.latents(2)["tie_share"][0])}
        )

        def potential(vector):
            values = {"reward.weight": vector[:-1], "tie_share": vector[-1]}
            return numpyro.infer.util.potential_energy(model, args, {}, values)

        point = jax.numpy.append(unconstrained["reward.weight"], unconstrained["tie_share"])
        gradient = np.asarray(jax.grad(potential)(point))
        hessian = np.asarray(jax.hessian(potential)(point))
    # Precision of the prior is 0.5, the curvature of order 10: a gradient of 1e-6 is a mode to 1e-6.
    assert np.abs(gradient).max() < 1e-6
    # The belief about the items is J H^-1 J^T with NumPyro's Hessian H, latent included.
    covariance = np.linalg.inv(hessian)[:-1, :-1]
    expected = data.features @ covariance @ data.features.T
    found = posterior.predict(candidates=[np.asarray(data.features)]).covariance[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)

    logit = torch.special.logit(mode.latents(2)["tie_share"][0])
    start = {"reward.weight": weight.clone().requires_grad_(True), "tie_share": logit.clone().requires_grad_(True)}
    _, pyro_potential, _, _ = pyro.infer.mcmc.util.initialize_model(
        model, (torch.as_tensor(data.features), data.groups()), initial_params=start
    )
    gradients = torch.autograd.grad(pyro_potential(start), list(start.values()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors(mixed):
    case = CASES[0]
    data = declared(case)
    with pytest.raises(LikelihoodError, match=r"kind 'ranking', the model has likelihoods for \['choice'\]; add one"):
        brm.RewardModel(Linear(), {"choice": BradleyTerry()}).likelihood_of("ranking")
    with pytest.raises(LikelihoodError, match=r"returned batch shape \(1,\) for 8 rows of kind 'choice'"):
        brm.fit(brm.RewardModel(Linear(), lambda r, c: brm.dist.Categorical(logits=r[:1])), data)
    with pytest.raises(LikelihoodError, match=r"returned a Tensor for rows of kind 'choice'; it must return a dist"):
        brm.fit(brm.RewardModel(Linear(), lambda r, c: r), data)
    texts = brm.Comparisons.from_pairs(["Hi"], ["Hello!"], ["What?"])
    with pytest.raises(DataError, match=r"the data carry no features and the reward function has no feature extractor"):
        brm.RewardModel(Linear(), BradleyTerry()).encode(texts)
    ties = declared(case).with_outcomes([torch.tensor([0, 1, 0, 2, 0, 1, 0, 2])])
    with pytest.raises(LikelihoodError, match=r"row 3 is a tie, .* \(2 such rows\); use Davidson or RaoKupper"):
        brm.fit(brm.RewardModel(Linear(), BradleyTerry()), ties)
    brm.fit(brm.RewardModel(Linear(), Davidson()), ties)
    with seeded(0), pytest.raises(LikelihoodError, match=r"BradleyTerry compares 2 candidates, these rows have 3"):
        brm.RewardModel(Linear(), BradleyTerry()).simulate(mixed, seed=0)
