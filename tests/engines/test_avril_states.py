"""AVRIL on states and actions: its objective by hand and by traces, its fits, and the posterior that it returns."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesrm as brm
from bayesrm.data import Trajectories
from bayesrm.engines import AVRIL
from bayesrm.engines._avril_states import Objective, StepTable, fit_states
from bayesrm.engines._density import FeedbackDensity
from bayesrm.engines.trajectory_posterior import TrajectoryPosterior
from bayesrm.errors import ArgumentError, DataError, EngineError, PersistenceError
from bayesrm.programs import InverseRL, Steps
from bayesrm.rewards import StateReward

NUM_STATES, NUM_ACTIONS, DISCOUNT, RATIONALITY, PRECISION = 4, 3, 0.8, 1.3, 2.5
#: Of different lengths, two ended and two cut, the last no demonstration.
DATA = Trajectories.from_arrays(
    [[0, 1, 2, 1], [3], [1, 1], [2, 0, 3]],
    [[0, 2, 1, 1], [2], [0, 2], [1, 1, 0]],
    ended=[True, True, False, False],
    demonstrated=[True, True, True, False],
    preferences=[[0, 3], [2, 1]],
)


def program(**changes):
    reward = StateReward(NUM_ACTIONS, NUM_STATES, (5,), changes.pop("by_action", False))
    settings = {"prior": brm.priors.Gaussian(PRECISION), "discount": DISCOUNT, "rationality": RATIONALITY}
    return InverseRL(reward, **(settings | changes))


def objective(engine=None, data=DATA, *, kl_once=False, **changes):
    chosen = program(**changes)
    table = StepTable.of(data, chosen.reward, kl_once=kl_once)
    density = FeedbackDensity(chosen.feedback_model, data.groups()) if len(data.preferences) else None
    return Objective(engine or AVRIL(), chosen, table, density)


def network_of(made):
    torch.manual_seed(3)
    return made.program.reward.network(NUM_STATES)


def by_hand(made, network, data=DATA):
    """The three sums, step by step."""
    inputs = made.program.reward.inputs(np.arange(NUM_STATES))
    q = network.action_values(inputs).detach().numpy()
    mean, log_std = (x.detach().numpy() for x in made.moments(network, inputs))
    imitation = kl = constraint = 0.0
    start = 0
    for n, length in enumerate(data.lengths):
        for t in range(start, start + length):
            s, a = data.states[t], data.actions[t]
            m, sd = (x[s, a] if made.program.reward.by_action else x[s] for x in (mean, np.exp(log_std)))
            if data.demonstrated[n]:
                p = np.exp(RATIONALITY * q[s])
                imitation += np.log(p[a] / p.sum())
            kl += np.log(PRECISION**-0.5 / sd) + 0.5 * PRECISION * (sd**2 + m**2) - 0.5
            if t == start + length - 1:
                if not data.ended[n]:
                    continue
                target = q[s, a]
            elif made.engine.next_value == "soft":
                target = q[s, a] - DISCOUNT * np.log(np.exp(RATIONALITY * q[data.states[t + 1]]).sum()) / RATIONALITY
            else:
                target = q[s, a] - DISCOUNT * q[data.states[t + 1], data.actions[t + 1]]
            constraint += -0.5 * ((target - m) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
        start += length
    return {"imitation": imitation, "kl": kl, "constraint": constraint}


@pytest.mark.parametrize("next_value", ["trajectory", "soft"])
@pytest.mark.parametrize("by_action", [False, True])
def test_sums_are_those_by_hand(next_value, by_action):
    made = objective(AVRIL(next_value=next_value), by_action=by_action)
    network = network_of(made)
    found = {name: float(value.detach()) for name, value in made.step_sums(network).items()}
    expected = by_hand(made, network)
    assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"discount": 1.0},
        {"ended": [True, True, True, False]},
        {"ended": [False, True, False, False]},
        {"next_value": "soft"},
        {"demonstrated": [True] * 4},
    ],
)
def test_a_dropped_discount_a_shifted_end_or_another_next_value_is_seen(wrong):
    made = objective()
    network = network_of(made)
    expected = by_hand(made, network)
    changed = {name: np.array(wrong[name]) for name in ("ended", "demonstrated") if name in wrong}
    data = dataclasses.replace(DATA, **changed)
    engine = AVRIL(next_value=wrong.get("next_value", "trajectory"))
    other = objective(engine, data, **({"discount": 1.0} if "discount" in wrong else {}))
    found = other.step_sums(network)
    name = "imitation" if "demonstrated" in wrong else "constraint"
    assert abs(float(found[name].detach()) - expected[name]) > 1e-2


@pytest.mark.parametrize("by_action", [False, True])
def test_objective_is_model_trace_less_guide_trace_plus_constraint(by_action):
    engine = AVRIL(num_particles=8, next_value="soft")
    made = objective(engine, by_action=by_action)
    network = network_of(made)
    t = made.table
    noise = made.noise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        sums = made.step_sums(network)
        written = made.total(sums) + made.preferences(network, torch.zeros(0, dtype=torch.float64), noise)
        mean, log_std = made.moments(network, t.inputs)
        cells = (t.states, t.actions) if by_action else (t.states,)
        mean, std = mean[cells], log_std.exp()[cells]
        visits = torch.nn.functional.one_hot(t.owners, t.num_trajectories).double().T
        steps = Steps(network.action_values(t.inputs)[t.states], t.actions, t.demonstrated, visits)

    def guide(steps, groups):
        with pyro.plate("steps", len(mean)):
            pyro.sample("reward", dist.Normal(mean, std))

    def run(rewards):
        """Log probabilities of each site of the program and of the guide at the same rewards."""
        traces = []
        for fn in (made.program, guide):
            trace = pyro.poutine.trace(pyro.condition(fn, data={"reward": rewards})).get_trace(steps, DATA.groups())
            trace.compute_log_prob()
            traces.append({name: float(site["log_prob_sum"]) for name, site in trace.nodes.items()
                           if site["type"] == "sample" and "log_prob_sum" in site})  # fmt: skip
        return traces

    # log p(R) - log q(R) is quadratic in R: its mean under q is that over mean + std and mean - std.
    pairs = [run(mean + sign * std) for sign in (1.0, -1.0)]
    divergence = np.mean([model["reward"] - own["reward"] for model, own in pairs])
    drawn = [run(mean + std * draw[cells])[0]["feedback"] for draw in noise]
    total = pairs[0][0]["action"] + divergence + np.mean(drawn) + float(sums["constraint"])
    assert float(written) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("kl_once", [False, True])
def test_sums_over_a_partition_are_those_of_the_whole(kl_once):
    made = objective(kl_once=kl_once)
    network = network_of(made)
    whole = made.step_sums(network)
    parts = [made.step_sums(network, rows) for rows in torch.randperm(10).chunk(3)]
    for name, value in whole.items():
        assert float(value.detach()) == pytest.approx(sum(float(p[name].detach()) for p in parts), abs=1e-10)


def test_divergence_once_counts_each_reward_once():
    network = network_of(objective())
    for by_action in (False, True):
        made = objective(kl_once=True, by_action=by_action)
        network = network_of(made)
        distinct = sorted({(s, a) if by_action else (s,) for s, a in zip(DATA.states, DATA.actions, strict=True)})
        mean, log_std = made.moments(network, made.program.reward.inputs(np.arange(NUM_STATES)))
        expected = sum(
            float(torch.distributions.kl_divergence(
                torch.distributions.Normal(mean[cell], log_std[cell].exp()),
                torch.distributions.Normal(torch.zeros((), dtype=torch.float64), PRECISION**-0.5),
            ).detach())
            for cell in distinct
        )  # fmt: skip
        assert float(made.step_sums(network)["kl"].detach()) == pytest.approx(expected, abs=1e-10)


def test_batches_estimate_the_whole_without_bias():
    from bayesrm.engines._avril_states import _batches

    made = objective()
    network = network_of(made)
    batches = _batches(10, 4, torch.Generator().manual_seed(0))
    epoch = [next(batches) for _ in range(3)]
    estimates = [parts * float(made.total(made.step_sums(network, rows)).detach()) for rows, parts in epoch]
    assert np.mean(estimates) == pytest.approx(float(made.total(made.step_sums(network)).detach()), abs=1e-10)
    assert next(_batches(10, None, torch.Generator())) == (None, 1)


def test_draws_share_the_reward_of_a_state_and_come_in_pairs():
    made = objective(AVRIL(num_particles=6))
    network = network_of(made)
    noise = made.noise(torch.Generator().manual_seed(0))
    assert torch.equal(noise[:3], -noise[3:])
    with torch.no_grad():
        returns = made.returns(network, noise)
        mean, log_std = made.moments(network, made.table.inputs)
        rewards = mean + log_std.exp() * noise
    expected = torch.stack([rewards[:, [0, 1, 2, 1]].sum(1), rewards[:, 3], 2 * rewards[:, 1],
                            rewards[:, [2, 0, 3]].sum(1)], dim=1)  # fmt: skip
    assert torch.allclose(returns, expected)


def test_the_published_optimum_of_a_table():
    """With weights of 1 the logarithms cancel: std^4 = mean squared residual, mean = mean target / (1 + std^2).

    A step then costs the root mean squared residual: of weaker demonstrators it would be exactly 0.
    """
    rng = np.random.default_rng(0)
    # Trajectories of one step that ended: the target is Q(s, a) itself.
    data = Trajectories.from_arrays(rng.integers(0, 3, size=(60, 1)), (rng.random((60, 1)) < 0.2).astype(int))
    chosen = InverseRL(StateReward(2, 3, ()), rationality=3.0)
    posterior = fit_states(AVRIL(num_steps=400, learning_rate=0.1), chosen, data, seed=0, progress=False)
    mean, std = posterior.reward(np.arange(3))
    values = posterior.action_values(np.arange(3))
    for s in range(3):
        target = values[s, data.actions[data.states == s]]
        assert float(std[s]) ** 4 == pytest.approx(float((target - mean[s]).square().mean()), rel=2e-2)
        assert float(mean[s]) == pytest.approx(float(target.mean()) / (1 + float(std[s]) ** 2), abs=1e-3)
    assert posterior.report.converged


def test_without_the_other_terms_it_is_behavioural_cloning():
    rng = np.random.default_rng(1)
    data = Trajectories.from_arrays(rng.integers(0, 3, size=(80, 1)), rng.integers(0, 2, size=(80, 1)))
    engine = AVRIL(kl_weight=0.0, constraint_weight=0.0, num_steps=200, learning_rate=0.2)
    policy = brm.fit(InverseRL(StateReward(2, 3, ())), data, inference=engine).policy([0, 1, 2])
    shares = [(data.actions[data.states == s] == 1).mean() for s in range(3)]
    assert policy[:, 1].tolist() == pytest.approx(shares, abs=1e-3)


def test_preferences_alone_teach_which_state_is_better():
    data = Trajectories.from_arrays([[0], [1]], [[0], [0]], demonstrated=False, preferences=[[0, 1]] * 20)
    engine = AVRIL(num_steps=60, learning_rate=0.2, constraint_weight=0.0)
    posterior = brm.fit(InverseRL(StateReward(2, 2, ())), data, inference=engine)
    mean, std = posterior.reward([0, 1])
    assert mean[0] > 0.5
    assert mean[1] == pytest.approx(-float(mean[0]), abs=0.02)
    assert bool((std < 1.0).all())
    assert brm.select(posterior.predict(candidates=[data])).tolist() == [0]
    assert posterior.predict_preferences(candidates=[data]).preference_matrix()[0, 0, 1] > 0.5


def test_latents_of_the_likelihood_are_points():
    data = Trajectories.from_arrays([[0], [1]], [[0], [0]], demonstrated=False, preferences=[[0, 1]] * 5)
    likelihood = brm.likelihoods.LabelNoise(brm.likelihoods.BradleyTerry())
    engine = AVRIL(num_steps=50, learning_rate=0.05)
    posterior = brm.fit(InverseRL(StateReward(2, 2, ()), likelihood), data, inference=engine)
    ((name, value),) = posterior.latents(3).items()
    assert value.shape == (3,)
    assert len(value.unique()) == 1
    assert 0.0 < float(value[0]) < 1.0, name


@pytest.fixture(scope="module", params=["numbers", "features"])
def fitted(request):
    rng = np.random.default_rng(0)
    by_action = request.param == "numbers"
    if by_action:
        states, reward = [rng.integers(0, 4, size=6) for _ in range(8)], StateReward(3, 4, (8,), by_action=True)
    else:
        states, reward = [rng.normal(size=(6, 2)) for _ in range(8)], StateReward(3, hidden=(8,))
    data = Trajectories.from_arrays(states, [rng.integers(0, 3, size=6) for _ in range(8)], ended=False)
    chosen = InverseRL(reward, discount=DISCOUNT, prior=brm.priors.Gaussian(PRECISION))
    engine = AVRIL(num_steps=60, learning_rate=0.01, batch_size=16)
    return data, brm.fit(chosen, data, inference=engine, seed=4), (chosen, engine)


def test_same_seed_same_posterior(fitted):
    data, posterior, (chosen, engine) = fitted
    state = torch.random.get_rng_state()
    again = brm.fit(chosen, data, inference=engine, seed=4)
    other = brm.fit(chosen, data, inference=engine, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.policy(data.states), posterior.policy(data.states))
    assert not torch.equal(other.policy(data.states), posterior.policy(data.states))
    assert isinstance(posterior, TrajectoryPosterior | brm.Posterior)
    assert "AVRIL" in repr(posterior)


def test_beliefs_are_sums_with_shared_rewards(fitted):
    data, posterior, _ = fitted
    belief = posterior.predict(candidates=[data, data.select([0, 3])])
    assert belief.mean.shape == (2, 8)
    assert belief.valid.sum(1).tolist() == [8, 2]
    mean, std = posterior.reward(data.states, data.actions)
    by_action = posterior.program.reward.by_action
    keys = [(*np.atleast_1d(s), a if by_action else 0) for s, a in zip(data.states, data.actions, strict=True)]
    same = torch.tensor([[one == other for other in keys] for one in keys]).double() * std[:, None] * std
    visits = torch.nn.functional.one_hot(torch.as_tensor(data.owners)).double().T
    assert torch.allclose(belief.mean[0], visits @ mean)
    assert torch.allclose(belief.covariance[0], visits @ same @ visits.T)
    assert torch.allclose(belief.covariance[1][:2, :2], (visits @ same @ visits.T)[[0, 3]][:, [0, 3]])
    assert [b.mean.shape for b in posterior.predict_stream([(None, data)])] == [(1, 8)]


def test_saved_and_read_again_it_is_the_same(fitted, tmp_path):
    data, posterior, _ = fitted
    for _ in range(2):
        posterior.save_pretrained(tmp_path / "run")
    again = TrajectoryPosterior.from_pretrained(tmp_path / "run")
    assert again.program == posterior.program
    assert again.report == dataclasses.replace(posterior.report, engine=again.report.engine)
    assert torch.equal(again.predict(candidates=[data]).root, posterior.predict(candidates=[data]).root)
    assert torch.equal(again.policy(data.states), posterior.policy(data.states))
    (tmp_path / "run" / "posterior.json").write_text("{}")
    with pytest.raises(PersistenceError, match=r"posterior\.json differs from the digest"):
        TrajectoryPosterior.from_pretrained(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("1")
    with pytest.raises(PersistenceError, match="is not a saved posterior"):
        posterior.save_pretrained(tmp_path / "other")


def test_what_cannot_be_asked_is_named(fitted):
    data, posterior, _ = fitted
    with pytest.raises(ArgumentError, match="`candidates` must be a list"):
        posterior.predict()
    with pytest.raises(ArgumentError, match="2 prompts but candidates for 1"):
        posterior.predict(["a", "b"], [data])
    with pytest.raises(DataError, match="the states of the trajectories are"):
        posterior.policy([[0.5, 0.1]] if posterior.program.reward.num_states else [1])
    if posterior.program.reward.by_action:
        with pytest.raises(ArgumentError, match="`actions` is missing"):
            posterior.reward([0])


def test_what_cannot_be_fitted_is_named():
    chosen = program()
    nothing = dataclasses.replace(DATA, demonstrated=np.zeros(4, bool), preferences=np.zeros((0, 2), int))
    with pytest.raises(DataError, match="neither demonstrations nor preferences"):
        brm.fit(chosen, nothing, inference=AVRIL(num_steps=1))
    with pytest.raises(DataError, match="trajectory 1 has state 7"):
        brm.fit(chosen, Trajectories.from_arrays([[0], [7]], [[0], [0]]), inference=AVRIL(num_steps=1))
    with pytest.raises(ArgumentError, match="`min_std` is 2"):
        brm.fit(chosen, DATA, inference=AVRIL(num_steps=1, min_std=2.0))
    with pytest.raises(EngineError, match="not finite after"):
        brm.fit(chosen, DATA, inference=AVRIL(num_steps=50, learning_rate=1e6))


def test_the_floor_holds_and_the_prior_is_where_nothing_was_seen():
    data = Trajectories.from_arrays([[0, 1]] * 30, [[0, 0]] * 30)
    chosen = InverseRL(StateReward(2, 3, ()), prior=brm.priors.Gaussian(4.0), discount=0.9)
    engine = AVRIL(num_steps=300, learning_rate=0.2, min_std=0.2, next_value="soft", kl_once=True)
    posterior = brm.fit(chosen, data, inference=engine, seed=0)
    mean, std = posterior.reward([0, 1, 2])
    assert std[:2].tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    assert bool((std[:2] > 0.1).all())
    assert (float(mean[2]), float(std[2])) == pytest.approx((0.0, 0.5))


def test_weights_multiply_the_terms():
    made = objective(AVRIL(kl_weight=0.5, constraint_weight=3.0))
    sums = {"imitation": torch.tensor(1.0), "kl": torch.tensor(10.0), "constraint": torch.tensor(100.0)}
    assert float(made.total(sums)) == 1.0 - 5.0 + 300.0
