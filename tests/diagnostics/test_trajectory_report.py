"""The report on rewards of states: its sections by cases whose verdict is known, and the page."""

import dataclasses

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.data import Trajectories
from bayesrm.diagnostics import report
from bayesrm.diagnostics._actions import action_scores
from bayesrm.diagnostics._report import Status, examine
from bayesrm.diagnostics._report._trajectory_model import declared_variables
from bayesrm.engines import AVRIL, TrajectoryPosterior
from bayesrm.engines._state_rewards import DrawnRewards
from bayesrm.engines._trajectory_digest import trajectory_digest
from bayesrm.errors import ArgumentError, DataError
from bayesrm.likelihoods import BradleyTerry, LabelNoise
from bayesrm.programs import InverseRL, TabularMDP
from bayesrm.rewards import StateReward

pytest.importorskip("matplotlib")

S, DISCOUNT, RATIONALITY = 10, 0.9, 2.0


def corridor():
    onward = np.zeros((S, 2, S))
    for s in range(S):
        onward[s, 0, max(s - 1, 0)] = onward[s, 1, min(s + 1, S - 1)] = 1.0
    return TabularMDP(onward)


WORLD = corridor()
REWARDS = np.sin(np.arange(S))


def shown(seed, count=60, rationality=RATIONALITY):
    return WORLD.demonstrate(REWARDS, count, max_steps=8, discount=DISCOUNT, rationality=rationality, seed=seed)


def posterior(values=None, *, likelihood=None, latents=None, spread=None, rationality=RATIONALITY):
    """A posterior of draws around given rewards, with the report of a quick fit."""
    program = InverseRL(
        StateReward(2, S, (), dynamics=WORLD), likelihood or BradleyTerry(), discount=DISCOUNT, rationality=rationality
    )
    center = torch.as_tensor(REWARDS if values is None else values)
    scale = torch.full((S,), 0.05, dtype=torch.float64) if spread is None else torch.as_tensor(spread)
    noise = torch.randn(400, S, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = (center + scale * noise)[..., None]
    return TrajectoryPosterior(program, fitted().report, DrawnRewards(program, draws, 4), latents)


_FITTED = []


def fitted():
    if not _FITTED:
        program = InverseRL(StateReward(2, S, ()), discount=DISCOUNT, rationality=RATIONALITY)
        _FITTED.append(brm.fit(program, shown(0, 20), inference=AVRIL(num_steps=30, learning_rate=0.05)))
    return _FITTED[0]


def sections(*arguments, **settings):
    return {s.name: s for s in examine(*arguments, **settings)}


def test_scores_of_actions_are_averages_over_steps():
    data, found = shown(1, 5), posterior()
    probs = found.policy(data.states).numpy()
    scores = action_scores(found, data)
    taken = probs[np.arange(len(data.actions)), data.actions]
    assert scores["nll"].value == pytest.approx(-np.log(taken).mean())
    assert scores["accuracy"].value == pytest.approx((taken > 0.5).mean())
    assert action_scores(found, dataclasses.replace(data, demonstrated=np.zeros(5, bool))) == {}
    alone = action_scores(found, data.select([0]))
    assert np.isnan(alone["nll"].low)
    # Steps of trajectories that did not demonstrate do not count.
    some = dataclasses.replace(data, demonstrated=np.array([True, True, False, False, False]))
    first = data.owners < 2
    assert action_scores(found, some)["nll"].value == pytest.approx(-np.log(taken[first]).mean())


def test_a_right_posterior_predicts_and_a_wrong_one_is_told():
    data = shown(2)
    right = sections(posterior(), data)["actions"]
    assert right.status == Status.GOOD
    assert "no over- or under-confidence shows" in right.verdict
    # Controls: the rewards turned round, and a demonstrator thought to be far more rational than she is.
    assert sections(posterior(-REWARDS), data)["actions"].status == Status.PROBLEM
    sure = sections(posterior(rationality=20.0), data)["actions"]
    assert sure.status != Status.GOOD
    assert "over-confident" in sure.verdict
    hesitant = sections(posterior(rationality=0.3), data)["actions"]
    assert "under-confident" in hesitant.verdict
    none = sections(posterior(), dataclasses.replace(data, demonstrated=np.zeros(60, bool)))["actions"]
    assert none.status == Status.NOTE


def judged(seed, count=200, sign=1.0):
    """Pairs of single steps, the better one preferred by Bradley-Terry of the true rewards."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, S, size=(count, 2))
    gap = sign * (REWARDS[pairs[:, 0]] - REWARDS[pairs[:, 1]])
    first = rng.random(count) < 1 / (1 + np.exp(-3.0 * gap))
    order = np.where(first[:, None], [0, 1], [1, 0]) + 2 * np.arange(count)[:, None]
    return Trajectories.from_arrays(list(pairs.reshape(-1, 1)), [[0]] * (2 * count), preferences=order)


def test_preferences_are_judged_where_there_are_any():
    assert "preferences" not in sections(posterior(), shown(2))
    right = sections(posterior(3.0 * REWARDS), judged(0))["preferences"]
    assert right.status == Status.GOOD
    assert "200 preferences" in right.verdict
    wrong = sections(posterior(3.0 * REWARDS), judged(0, sign=-1.0))["preferences"]
    assert wrong.status == Status.PROBLEM
    single = Trajectories.from_arrays([[0], [1]], [[0], [0]], preferences=[[0, 1]])
    assert sections(posterior(), single)["preferences"].status == Status.NOTE


def test_the_data_of_the_fit_are_recognised():
    own = sections(fitted(), shown(0, 20))["data"]
    assert own.status == Status.PROBLEM
    assert "the very data of the fit" in own.verdict
    assert sections(posterior(), shown(3, 5))["data"].status == Status.CAUTION
    other = sections(posterior(), shown(3), train=shown(3).select([0, 1]))["data"]
    assert other.status == Status.CAUTION
    assert "step for step also in the training data" in other.verdict
    unlike = Trajectories.from_arrays([[9] * 9], [[0] * 9])
    assert sections(posterior(), shown(3), train=unlike)["data"].status == Status.GOOD
    renamed = dataclasses.replace(shown(0, 20), ids=tuple(map(str, range(20))))
    assert trajectory_digest(renamed) == trajectory_digest(shown(0, 20)) == fitted().report.data_digest
    assert trajectory_digest(shown(4, 20)) != trajectory_digest(renamed)


def test_uncertainty_is_compared_with_visits():
    train = shown(0)
    visits = np.bincount(train.states, minlength=S)
    knowing = posterior(spread=1.0 / (1.0 + visits))
    found = sections(knowing, shown(2), train=train)["uncertainty"]
    assert found.status == Status.GOOD
    # Draws keep the order of such different spreads.
    assert f"{-1.0 if len(set(visits)) == S else -0.9:+.1f}"[:3] in found.verdict
    backwards = sections(posterior(spread=0.01 + visits / visits.max()), shown(2), train=train)["uncertainty"]
    assert backwards.status == Status.CAUTION
    assert sections(knowing, shown(2))["uncertainty"].status == Status.NOTE


def test_rewards_name_the_highest_and_the_lowest_state():
    section = sections(posterior(), shown(2))["rewards"]
    assert f"Highest is the reward of state {REWARDS.argmax()}" in section.verdict
    assert f"lowest that of state {REWARDS.argmin()}" in section.verdict
    assert section.body.count("<tr>") == S + 1


def test_equal_weights_of_avril_are_warned_of():
    assert "the entropy cancels" in sections(fitted(), shown(2))["engine"].body
    program = InverseRL(StateReward(2, S, ()), discount=DISCOUNT, rationality=RATIONALITY)
    engine = AVRIL(num_steps=30, learning_rate=0.05, constraint_weight=0.1)
    found = brm.fit(program, shown(0, 20), inference=engine)
    assert "the entropy cancels" not in sections(found, shown(2))["engine"].body


def test_declared_variables_are_those_of_the_program():
    found = {v.name: v for v in declared_variables(posterior(likelihood=LabelNoise(BradleyTerry())))}
    assert [v.name for v in found.values() if v.observed] == ["action", "feedback"]
    (latent,) = set(found) - {"reward", "action", "feedback"}
    assert found["feedback"].parents == ("reward", latent)
    assert found["reward"].distribution == "Normal"


def test_the_page_is_written_with_latents_and_features(tmp_path):
    rates = {"label_noise": torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2}
    noisy = posterior(likelihood=LabelNoise(BradleyTerry()))
    (name,) = (v.name for v in declared_variables(noisy) if v.name not in ("reward", "action", "feedback"))
    noisy = posterior(likelihood=LabelNoise(BradleyTerry()), latents={name: rates["label_noise"]})
    page = report(noisy, judged(0), tmp_path / "page.html", train=shown(0), title="<Mine>").read_text()
    assert "&lt;Mine&gt;" in page
    assert name in page
    assert "over trajectories, or groups" in page
    rng = np.random.default_rng(0)
    data = Trajectories.from_arrays(list(rng.normal(size=(40, 5, 2))), list(rng.integers(0, 2, size=(40, 5))))
    program = InverseRL(StateReward(2, hidden=(4,), by_action=True))
    found = brm.fit(program, data.select(range(20)), inference=AVRIL(num_steps=20))
    page = report(found, data.select(range(20, 40)), tmp_path / "page.html", train=data.select(range(20))).read_text()
    assert "whose reward it is" in page
    assert "170 states between them are left out" in page


def test_what_does_not_fit_is_refused(tmp_path):
    comparisons = brm.Comparisons.from_pairs(["a"], ["b"], ["c"])
    with pytest.raises(ArgumentError, match="`data` is of type Comparisons; this posterior is about Trajectories"):
        examine(posterior(), comparisons)
    with pytest.raises(ArgumentError, match="`ood` is for comparisons"):
        examine(posterior(), shown(2), ood=shown(3))
    with pytest.raises(DataError, match="has state 11"):
        examine(posterior(), shown(2), train=Trajectories.from_arrays([[11]], [[0]]))
    features = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
    linear = brm.fit(brm.RewardModel(brm.rewards.Linear(), BradleyTerry()), features)
    with pytest.raises(ArgumentError, match="`data` holds trajectories; this posterior is about comparisons"):
        examine(linear, shown(2))
