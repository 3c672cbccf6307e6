"""What a posterior over rewards of states says of itself: draws, predictions, ArviZ, and the way to disk and back."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.data import Trajectories
from bayesrm.engines import AVRIL, NUTS, FitReport, TrajectoryPosterior
from bayesrm.engines._state_rewards import DrawnRewards
from bayesrm.errors import ArgumentError, DataError, EngineError
from bayesrm.likelihoods import BradleyTerry, LabelNoise
from bayesrm.programs import InverseRL, TabularMDP
from bayesrm.rewards import StateReward

pytest.importorskip("numpyro")

S, A, DISCOUNT, RATIONALITY = 3, 2, 0.8, 1.5
WORLD = TabularMDP(
    [[[0.1, 0.9, 0.0], [0.7, 0.0, 0.3]], [[0.0, 0.2, 0.8], [0.5, 0.5, 0.0]], [[0.4, 0.4, 0.2], [0.0, 0.1, 0.9]]]
)
DATA = Trajectories.from_arrays(
    [[0, 1, 2, 1], [1, 1], [2, 0, 0], [0, 2]], [[1, 0, 1, 1], [0, 1], [1, 1, 0], [0, 1]], ended=False,
    demonstrated=[True, True, False, False], preferences=[[2, 3], [1, 3], [2, 1]], ids=["p", "q", "r", "s"],
    group=["g", "g", "h", "h"],
)  # fmt: skip


def fitted(engine, *, by_action=False, data=DATA, likelihood=None, states=S):
    reward = StateReward(A, states, (), by_action, WORLD if isinstance(engine, NUTS) else None)
    program = InverseRL(reward, likelihood or BradleyTerry(), discount=DISCOUNT, rationality=RATIONALITY)
    return brm.fit(program, data, inference=engine, seed=3)


SHORT = NUTS(num_chains=2, num_warmup=100, num_samples=60, mass_matrix="diagonal")


@pytest.fixture(scope="module")
def drawn():
    with pytest.warns(brm.errors.ConvergenceWarning):
        return fitted(SHORT, likelihood=LabelNoise(BradleyTerry()))


@pytest.fixture(scope="module")
def by_action(drawn):
    """Draws of no sampler: two chains of 60 numbers for each state and action."""
    reward = StateReward(A, S, by_action=True, dynamics=WORLD)
    program = InverseRL(reward, discount=DISCOUNT, rationality=RATIONALITY)
    values = torch.randn(120, S, A, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TrajectoryPosterior(program, drawn.report, DrawnRewards(program, values, 2))


@pytest.fixture(scope="module")
def normal():
    return fitted(AVRIL(num_steps=80, learning_rate=0.05, min_std=0.2))


def test_it_is_a_posterior_and_has_its_public_methods(normal):
    assert isinstance(normal, brm.Posterior)
    for name in vars(brm.Posterior):
        if not name.startswith("_"):
            theirs, ours = (
                list(inspect.signature(getattr(cls, name)).parameters) for cls in (brm.Posterior, TrajectoryPosterior)
            )
            assert ours == theirs, name


def test_trajectories_have_no_prompts(normal):
    with pytest.raises(ArgumentError, match="`by` is 'prompt'; trajectories have no prompts"):
        normal.to_arviz(DATA, by="prompt")


def test_draws_are_those_of_the_chains_and_sum_along_trajectories(drawn):
    draws = drawn.draw(DATA)
    values = drawn.rewards.values[..., 0]
    assert draws.num_chains == 2
    assert torch.allclose(draws.rewards[:, 0], values[:, [0, 1, 2, 1]].sum(1))
    assert torch.equal(draws.sample_stats["diverging"], drawn.sample_stats["diverging"])
    assert torch.equal(drawn.draw_reward([2, 0, 2]), values[:, [2, 0, 2]])
    few = drawn.draw(DATA, num_samples=10)
    assert len(few.rewards) == 10
    assert torch.equal(few.rewards[0], draws.rewards[0])
    assert torch.equal(few.rewards[-1], draws.rewards[-1])
    (rate,) = drawn.latents(10).values()
    full = next(iter(drawn.latents().values()))
    # Latents come from the same draws as the rewards.
    kept = [0, 15, 30, 44, 59]
    assert torch.allclose(rate, torch.cat([full[:60][kept], full[60:][kept]]))


def test_draws_by_action_take_the_action_along(by_action):
    values = by_action.rewards.values
    assert torch.equal(by_action.draw_reward([0, 2], [1, 0]), torch.stack([values[:, 0, 1], values[:, 2, 0]], dim=1))
    expected = values[:, [2, 0, 0], [1, 1, 0]].sum(1)
    assert torch.allclose(by_action.draw(DATA).rewards[:, 2], expected)
    with pytest.raises(ArgumentError, match="`actions` is missing"):
        by_action.draw_reward([0])


def test_normal_draws_have_the_moments_and_do_not_depend_on_the_data(normal):
    draws = normal.draw(DATA, num_samples=4000, seed=1).rewards
    belief = normal.predict(candidates=[DATA])
    # Mirrored draws have the mean exactly.
    assert torch.allclose(draws.mean(0), belief.mean[0], atol=1e-12)
    sampled, expected = torch.cov(draws.T), belief.covariance[0]
    # Var of a sample covariance of pairs: (c_ij^2 + c_ii c_jj) / pairs.
    spread = ((expected.square() + expected.diag()[:, None] * expected.diag()) / 2000).sqrt()
    assert ((sampled - expected).abs() <= 4.5 * spread + 1e-12).all()
    part = normal.draw(DATA.select([2]), num_samples=4000, seed=1).rewards
    assert torch.equal(part[:, 0], draws[:, 2])
    assert not torch.equal(normal.draw(DATA, num_samples=4000, seed=2).rewards, draws)
    assert normal.draw(DATA, num_samples=7).rewards.shape == (7, 4)
    assert normal.draw(DATA).rewards.shape == (1000, 4)


def test_beliefs_about_groups_are_those_of_their_members(drawn):
    belief = drawn.predict_items(DATA)
    assert belief.mean.shape == (2, 2)
    parts = [drawn.predict(candidates=[DATA.select(rows)]).mean[0] for rows in ([0, 1], [2, 3])]
    assert torch.allclose(belief.mean, torch.stack(parts))


def test_preferences_are_predicted_by_the_average_over_draws(drawn):
    prediction = drawn.predict_feedback(DATA, num_samples=120)
    values = drawn.rewards.values[..., 0]
    (name,) = drawn.latents()
    rate = drawn.latents()[name]
    returns = torch.stack([values[:, list(s)].sum(1) for s in ([0, 1, 2, 1], [1, 1], [2, 0, 0], [0, 2])], dim=1)
    comparison = DATA.groups()[0].comparison
    expected = []
    for s in range(len(values)):
        # Each draw under the likelihood itself, with the latent that belongs to it.
        rewards = returns[s][torch.as_tensor(DATA.preferences)]
        with brm.backend.Recorder({name: rate[s]}):
            d = drawn.program.feedback_model.feedback([rewards], [comparison])[0]
        expected.append(d.log_prob(torch.zeros(3, dtype=torch.int64)).exp())
    assert torch.allclose(prediction.log_prob.exp(), torch.stack(expected).mean(0), atol=1e-10)
    group = prediction.groups[0]
    assert torch.allclose(group.probs.sum(1), torch.ones(3, dtype=torch.float64))
    assert group.observed.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="no preferences"):
        drawn.predict_feedback(DATA.select([0]))


def test_preferences_under_normal_rewards_agree_with_quadrature(normal):
    prediction = normal.predict_feedback(DATA, num_samples=4096, seed=0)
    belief = normal.predict(candidates=[DATA])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for row, (better, worse) in enumerate(DATA.preferences):
        gap = float(belief.mean[0, better] - belief.mean[0, worse])
        root = belief.root[0, better] - belief.root[0, worse]
        values = 1 / (1 + np.exp(-(gap + float(root.square().sum().sqrt()) * nodes)))
        expected = values @ weights / weights.sum()
        error = np.sqrt((values**2 @ weights / weights.sum() - expected**2) / 4096)
        # Mirrored pairs do better than the independent draws of this error.
        assert abs(float(prediction.log_prob[row].exp()) - expected) < 4.5 * error


def chains(values, count=2):
    return values.reshape(count, -1, *values.shape[1:])


def test_arviz_has_named_dimensions_and_log_likelihoods_by_brute_force(drawn):
    idata = drawn.to_arviz(DATA, seed=5)
    posterior = idata["posterior"]
    assert dict(posterior["reward"].sizes) == {"chain": 2, "draw": 60, "state": 3}
    np.testing.assert_array_equal(posterior["reward"].values, chains(drawn.rewards.values[..., 0].numpy()))
    np.testing.assert_allclose(posterior["return"].values, chains(drawn.draw(DATA).rewards.numpy()))
    assert posterior["trajectory"].values.tolist() == ["p", "q", "r", "s"]
    (name,) = drawn.latents()
    np.testing.assert_allclose(posterior[name].values, chains(drawn.latents()[name].numpy()))
    logs = idata["log_likelihood"]
    assert logs["taken"].coords["demonstration"].values.tolist() == ["p", "q"]
    values = WORLD.soft_values(drawn.rewards.values, discount=DISCOUNT, rationality=RATIONALITY)
    log_policy = torch.log_softmax(RATIONALITY * values, 2)
    expected = torch.stack([log_policy[:, [0, 1, 2, 1], [1, 0, 1, 1]].sum(1), log_policy[:, [1, 1], [0, 1]].sum(1)], 1)
    np.testing.assert_allclose(logs["taken"].values, chains(expected.numpy()), atol=1e-12)
    prediction = drawn.predict_feedback(DATA, num_samples=120)
    np.testing.assert_allclose(
        np.exp(logs["feedback"].values).mean((0, 1)), prediction.log_prob.exp().numpy(), atol=1e-12
    )
    assert {"diverging", "energy", "n_steps", "acceptance_rate"} <= set(idata["sample_stats"].data_vars)
    assert idata["observed_data"]["taken"].values.tolist() == [1, 0, 1, 1, 0, 1]
    predicted = idata["posterior_predictive"]
    assert predicted["taken"].shape == (2, 60, 6)
    share = drawn.policy([0, 1, 2, 1, 1, 1])[:, 1].numpy()
    found = predicted["taken"].values.mean((0, 1))
    assert (np.abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / 120)).all()
    constant = idata["constant_data"]
    assert constant["visits"].values.tolist() == [[0, 1], [2, 2], [0, 1]]
    assert constant["state_of_step"].values.tolist() == [0, 1, 2, 1, 1, 1]
    assert constant["candidates"].values.tolist() == DATA.preferences.tolist()
    assert "posterior_predictive" not in drawn.to_arviz(DATA, predictive=False)


def test_arviz_of_rewards_of_actions_and_of_features(by_action):
    idata = by_action.to_arviz(DATA)
    assert dict(idata["posterior"]["reward"].sizes) == {"chain": 2, "draw": 60, "state": 3, "action": 2}
    rng = np.random.default_rng(0)
    data = Trajectories.from_arrays(list(rng.normal(size=(5, 4, 2))), list(rng.integers(0, 2, size=(5, 4))))
    posterior = fitted(AVRIL(num_steps=20), data=data, states=None)
    idata = posterior.to_arviz(data, num_samples=50)
    assert dict(idata["posterior"]["reward"].sizes) == {"chain": 1, "draw": 50, "state": 20}
    features = idata["constant_data"]["features"].values
    np.testing.assert_array_equal(features[idata["constant_data"]["state_of_step"].values], data.states)
    rewards = idata["posterior"]["reward"].values[0][:, idata["constant_data"]["state_of_step"].values]
    np.testing.assert_allclose(idata["posterior"]["return"].values[0], rewards.reshape(50, 5, 4).sum(2))


def test_arviz_leaves_out_what_a_point_of_action_values_cannot_say(normal):
    idata = normal.to_arviz(DATA, num_samples=30)
    assert set(idata["log_likelihood"].data_vars) == {"feedback"}
    assert "sample_stats" not in idata
    assert idata["posterior"]["reward"].shape == (1, 30, 3)


def test_demonstrations_leave_latents_at_their_prior():
    shown = DATA.select([0, 1])
    shown = dataclasses.replace(shown, preferences=np.zeros((0, 2), dtype=np.int64))
    with pytest.warns(brm.errors.ConvergenceWarning):
        posterior = fitted(SHORT, data=shown, likelihood=LabelNoise(BradleyTerry()))
    (values,) = posterior.latents().values()
    assert len(values.unique()) == 120
    point = fitted(AVRIL(num_steps=5), data=shown, likelihood=LabelNoise(BradleyTerry()))
    (held,) = point.latents(4).values()
    assert len(held.unique()) == 1
    # Both predict preferences, though they have seen none.
    for one in (posterior, point):
        assert bool((one.predict_feedback(DATA).log_prob < 0).all())


def test_saved_it_is_read_by_every_posteriors_reader(drawn, normal, tmp_path):
    for posterior in (drawn, normal):
        posterior.save_pretrained(tmp_path / "run")
        again = brm.Posterior.from_pretrained(tmp_path / "run")
        assert isinstance(again, TrajectoryPosterior)
        assert torch.equal(again.draw(DATA, num_samples=20).rewards, posterior.draw(DATA, num_samples=20).rewards)
        assert again.latents(5).keys() == posterior.latents(5).keys()
        assert again.sample_stats.keys() == posterior.sample_stats.keys()
        assert again.report.data_digest == posterior.report.data_digest is not None
        assert again.summary() == posterior.summary()


def test_the_summary_tells_engine_data_and_latents(drawn, normal):
    text = drawn.summary()
    assert "NUTS" in text
    assert "11 steps of 4 trajectories, 3 distinct states" in text
    assert "chains      largest R-hat" in text
    assert "latent " in text
    assert "objective " in normal.summary()


def refuse_constants(text):
    raise AssertionError(f"{text} is no strict JSON")


def test_what_is_saved_is_strict_json_and_comes_back(drawn, tmp_path):
    report = dataclasses.replace(
        drawn.report, gradient_norm=math.nan, diagnostics={"r_hat": math.nan, "worst": -math.inf, "list": [math.inf, 1]}
    )
    odd = TrajectoryPosterior(drawn.program, report, drawn.rewards)
    odd.save_pretrained(tmp_path / "run")
    text = (tmp_path / "run" / "posterior.json").read_text()
    stored = json.loads(text, parse_constant=refuse_constants)
    assert stored["report"]["gradient_norm"] is None
    found = brm.Posterior.from_pretrained(tmp_path / "run").report
    assert isinstance(found, FitReport)
    assert math.isnan(found.gradient_norm)
    assert math.isnan(found.diagnostics["r_hat"])
    assert found.diagnostics["worst"] == -math.inf
    assert found.diagnostics["list"] == [math.inf, 1]


def test_what_cannot_be_asked_is_named(normal):
    # Checks of types at run time, which tests turn on, would come first.
    reward, draw = inspect.unwrap(TrajectoryPosterior.reward), inspect.unwrap(TrajectoryPosterior.draw)
    with pytest.raises(ArgumentError, match="`states` is 1; give a list of at least one: numbers"):
        reward(normal, 1)
    with pytest.raises(ArgumentError, match=r"`states` is \[\]"):
        reward(normal, [])
    with pytest.raises(ArgumentError, match="`states` cannot be read as an array"):
        normal.policy([[1.0], [1.0, 2.0]])
    with pytest.raises(ArgumentError, match="`states` has 2 entries and `actions` 1"):
        normal.reward([0, 1], [0])
    with pytest.raises(ArgumentError, match="`num_samples` is 0"):
        normal.draw(DATA, num_samples=0)
    with pytest.raises(ArgumentError, match="`data` is of type Comparisons; this posterior is about Trajectories"):
        draw(normal, brm.Comparisons.from_pairs(["a"], ["b"], ["c"]))


def test_engines_that_serve_are_named_by_what_is_known():
    for reward, names in (
        (StateReward(A, S), r"an InverseRL; use AVRIL\(\)$"),
        (StateReward(A, S, dynamics=WORLD), r"an InverseRL; use AVRIL\(\), NUTS\(\)$"),
    ):
        with pytest.raises(EngineError, match=names):
            brm.fit(InverseRL(reward), DATA, inference=brm.Laplace())


def test_draws_hold_what_the_sampler_recorded(drawn):
    assert isinstance(drawn.rewards, DrawnRewards)
    assert all(len(values) == 120 for values in drawn.sample_stats.values())
    assert int(drawn.sample_stats["diverging"].sum()) == drawn.report.diagnostics["divergences"]


def test_states_of_another_width_are_refused():
    rng = np.random.default_rng(0)
    data = Trajectories.from_arrays([rng.normal(size=(6, 3)) for _ in range(4)], [rng.integers(2, size=6)] * 4)
    program = InverseRL(StateReward(2, hidden=(4,)))
    posterior = brm.fit(program, data, inference=AVRIL(num_steps=2), seed=0)
    for ask in (posterior.reward, posterior.policy):
        with pytest.raises(DataError, match="the states have 1 features; the posterior was fitted on states of 3"):
            ask([[1.0]])
