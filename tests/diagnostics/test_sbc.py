"""Simulation-based calibration: a right posterior passes, planted faults do not, and a stopped run goes on.

The long runs with every engine and likelihood are in `tests/reference/test_sbc.py`.
"""

import dataclasses
import functools
import importlib.util
import json

import numpy as np
import pytest
import scipy.stats
import torch

import bayesrm as brm
from bayesrm.diagnostics._sbc_checkpoint import described
from bayesrm.diagnostics._sbc_quantities import DefaultQuantities
from bayesrm.diagnostics._sbc_ranks import holm, normal_scores, uniformity_p_values
from bayesrm.diagnostics.plots import ecdf_band
from bayesrm.diagnostics.sbc import SBC, simulation_based_calibration
from bayesrm.errors import ArgumentError, EngineError, PersistenceError

L = brm.likelihoods


def design(rows=15, num_features=2, seed=0, **columns):
    features = np.random.default_rng(seed).normal(size=(2 * rows, num_features))
    pairs = np.arange(2 * rows).reshape(rows, 2)
    return brm.Comparisons.from_arrays(features, candidates=pairs, outcome=np.zeros(rows, int), **columns)


MODEL = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
CORRECTED = brm.ImportanceSampling(brm.Laplace(), num_samples=500, degrees_of_freedom=10.0)


@dataclasses.dataclass(frozen=True)
class Faulty:
    """An engine whose draws are moved by `shift` of their standard deviations and scaled by `scale`."""

    inner: object
    shift: float = 0.0
    scale: float = 1.0

    def fit(self, program, data, *, seed, progress):
        posterior = self.inner.fit(program, data, seed=seed, progress=progress)
        mean, std = posterior.z.mean(0), posterior.z.std(0)
        posterior.z = mean + self.scale * (posterior.z - mean) + self.shift * std
        return posterior


@dataclasses.dataclass(frozen=True)
class Prior:
    """An engine that ignores the feedback."""

    def fit(self, program, data, *, seed, progress):
        posterior = CORRECTED.fit(program, data, seed=seed, progress=progress)
        generator = torch.Generator().manual_seed(seed)
        posterior.z = torch.randn(posterior.z.shape, generator=generator, dtype=torch.float64)
        return posterior


# The test of uniformity.


def test_p_values_of_uniform_ranks_are_uniform():
    ranks = np.random.default_rng(0).integers(0, 100, size=(200, 3000))
    p = uniformity_p_values(ranks, 99)
    for level in (0.01, 0.05, 0.2, 0.5):
        # The standard error of 3,000 and of the 20,000 simulations inside.
        assert (p <= level).mean() == pytest.approx(
            level, abs=4.5 * np.sqrt(level * (1 - level) * (1 / 3000 + 1 / 2e4))
        )


def test_p_values_agree_with_the_band_that_plots_draw():
    rng = np.random.default_rng(1)
    ranks = np.floor(100 * rng.beta(1.0, rng.uniform(0.7, 1.4, size=400), size=(150, 400))).astype(int)
    p = uniformity_p_values(ranks, 99)
    points, low, high = ecdf_band(150, 99, level=0.95)
    ecdf = (ranks[:, :, None] <= points).mean(0)
    outside = ((ecdf < low) | (ecdf > high)).any(1)
    # Both are simulated: ranks whose p-value is near 0.05 may go either way.
    clear = np.abs(p - 0.05) > 0.015
    assert 50 < outside.sum() < 350
    np.testing.assert_array_equal(outside[clear], p[clear] < 0.05)


def test_holm_adjusts_as_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])


def test_normal_scores_of_a_narrow_posterior_are_wide():
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=4000), 0.5 * rng.normal(size=(99, 4000)) - 0.2
    scores = normal_scores((draws < truth).sum(0), 99)
    # Draws of N(-0.2, 0.5^2) about a truth from N(0, 1): shift 0.4, spread 2, both cut where ranks end.
    assert scores.mean() == pytest.approx(0.35, abs=0.1)
    assert 1.5 < scores.std() < 2.0


# Calibration of engines.


@pytest.mark.slow
def test_a_right_posterior_passes_and_planted_faults_are_caught():
    right = simulation_based_calibration(MODEL, design(), CORRECTED, num_replicates=60)
    assert right.ranks.shape == (60, 4)
    assert right.p_value > 0.01
    assert right.refusals == ()
    assert right.num_unconverged == 0
    assert "no sign of a wrong posterior" in str(right)
    narrow = simulation_based_calibration(MODEL, design(), Faulty(CORRECTED, scale=0.5), num_replicates=60)
    assert narrow.p_value < 0.01
    assert narrow.spread[:3].min() > 1.3
    assert "times as wide as it says" in str(narrow)


@pytest.mark.slow
def test_a_posterior_that_ignores_the_feedback_is_found_by_the_log_joint_alone():
    found = simulation_based_calibration(MODEL, design(rows=30), Prior(), num_replicates=40)
    assert found.names[-1] == "log joint"
    assert found.p_values[-1] < 0.001
    assert found.p_values[:-1].min() > 0.01


def test_quantities_of_your_own_are_ranked_instead():
    def largest(rewards, latents):
        assert latents["tie_weight"].shape == rewards.shape[:1]
        return {"largest reward": rewards.max(1).values, "tie weight": latents["tie_weight"]}

    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.Davidson())
    found = simulation_based_calibration(model, design(rows=6), CORRECTED, num_replicates=12, quantities=largest)
    assert found.names == ("largest reward", "tie weight")
    assert found.ranks.shape == (12, 2)


def test_the_log_joint_of_a_linear_head_is_the_log_density_up_to_a_constant():
    """Against the joint density in the weights, for designs whose rewards determine the weights."""
    comparisons = design(rows=8, num_features=3)
    model = brm.RewardModel(brm.rewards.Linear(standardize=True), L.Davidson(), brm.priors.Gaussian(precision=0.3))
    simulation = model.simulate(comparisons, seed=0)
    density = brm.fit(model, simulation.data)._density_of(simulation.data)
    quantities = DefaultQuantities(model, comparisons)
    groups = comparisons.groups()
    raw = torch.as_tensor(np.asarray(comparisons.features)).double()
    center, spread = model.standardisation(raw, groups)
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.randn(5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards = weights @ ((raw - center) / spread).T
    found = quantities(rewards, density.constrain(u), density, u)["log joint"]
    half = 0.5 * (rewards[:, 0::2] - rewards[:, 1::2])
    logits = torch.stack([half, -half, u.expand(-1, 8)], dim=2)
    outcome = simulation.data.groups()[0].outcome
    likelihood = torch.log_softmax(logits, dim=2)[:, torch.arange(8), outcome].sum(1)
    log_prior = -0.5 * 0.3 * weights.square().sum(1) - 0.5 * (u[:, 0] - np.log(0.5)).square()
    expected = likelihood + log_prior
    torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-9, atol=1e-9)


# Its own rules.


def test_replicates_depend_on_the_seed_and_their_number_alone(tmp_path):
    every = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=14, seed=3)
    file = tmp_path / "sbc.jsonl"
    part = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=10, seed=3, checkpoint=file)
    np.testing.assert_array_equal(part.ranks, every.ranks[:10])
    # A run that was stopped while it wrote a line.
    with file.open("a") as stream:
        stream.write('{"ranks": {"rew')
    begun = len(file.read_text().splitlines())
    rest = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=14, seed=3, checkpoint=file)
    np.testing.assert_array_equal(rest.ranks, every.ranks)
    assert begun == 12
    assert len(file.read_text().splitlines()) == 15
    again = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=12, seed=3, checkpoint=file)
    np.testing.assert_array_equal(again.ranks, every.ranks[:12])
    other = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=10, seed=4)
    assert (other.ranks != every.ranks[:10]).any()


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path):
    file = tmp_path / "sbc.jsonl"
    simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=10, checkpoint=file)
    for changed in ({"seed": 1}, {"num_draws": 49}):
        with pytest.raises(PersistenceError, match="holds another calibration"):
            simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=10, checkpoint=file, **changed)
    with pytest.raises(PersistenceError, match="holds another calibration"):
        simulation_based_calibration(MODEL, design(seed=1), brm.Laplace(), num_replicates=10, checkpoint=file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], json.dumps({"no": "replicate"}), ""]))
    with pytest.raises(PersistenceError, match="cannot be used"):
        simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=10, checkpoint=file)


OWN = """
import bayesrm as brm

def own(rewards, comparison):
    d = rewards[:, 0] - rewards[:, 1]
    return brm.dist.Categorical(logits=brm.ops.stack([d, {other} * d], axis=-1))

class Wrapped:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, rewards, comparison):
        return own(self.scale * rewards, comparison)
"""


def test_a_checkpoint_with_an_own_likelihood_goes_on(tmp_path):
    """Each run has functions of its own, at other addresses, read from a file as another process would."""
    kept = []

    def run(file, likelihood, count, other="0.0"):
        folder = tmp_path / str(len(kept))
        folder.mkdir()
        (folder / "own.py").write_text(OWN.format(other=other))
        spec = importlib.util.spec_from_file_location("own", folder / "own.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kept.append(module)
        model = brm.RewardModel(brm.rewards.Linear(standardize=False), likelihood(module))
        return simulation_based_calibration(
            model, design(rows=3), brm.Laplace(), num_replicates=count, checkpoint=tmp_path / file
        )

    for file, likelihood in (("a", lambda module: module.own), ("b", lambda module: module.Wrapped(2.0))):
        first = run(file, likelihood, 10)
        np.testing.assert_array_equal(run(file, likelihood, 12).ranks[:10], first.ranks)
    for file, likelihood, other in (
        ("a", lambda module: module.own, "-1.0"),
        ("b", lambda module: module.Wrapped(3.0), "0.0"),
    ):
        with pytest.raises(PersistenceError, match=r"holds another calibration \(another `program`\)"):
            run(file, likelihood, 12, other)


def test_a_checkpoint_of_other_quantities_is_refused(tmp_path):
    file = tmp_path / "sbc.jsonl"

    def run(quantities, count=10):
        engine = brm.Laplace()
        return simulation_based_calibration(
            MODEL, design(), engine, num_replicates=count, checkpoint=file, quantities=quantities
        )

    def named(name, scale=1.0):
        return lambda rewards, latents: {name: scale * rewards[:, 0]}

    run(named("a"))
    assert run(named("a"), 12).names == ("a",)
    for other in (named("a", -1.0), lambda rewards, latents: {"a": rewards[:, 0]}):
        with pytest.raises(PersistenceError, match="another `quantities`"):
            run(other)
    with pytest.raises(PersistenceError, match="another `names`, `quantities`"):
        run(named("b"))
    with pytest.raises(PersistenceError, match="another `names`, `quantities`"):
        run(None)


NAME = "a"


def test_quantities_are_known_by_their_names_too(tmp_path, monkeypatch):
    def run(checkpoint):
        def of_this_module(rewards, latents):
            return {NAME: rewards[:, 0]}

        settings = {"num_replicates": 10, "quantities": of_this_module, "checkpoint": checkpoint}
        return simulation_based_calibration(MODEL, design(), brm.Laplace(), **settings)

    run(tmp_path / "sbc.jsonl")
    monkeypatch.setitem(globals(), "NAME", "b")
    with pytest.raises(PersistenceError, match="another `names`"):
        run(tmp_path / "sbc.jsonl")


def test_quantities_that_change_their_names_are_refused():
    # A replicate asks twice, for the truth and for the draws.
    names = iter(["a"] * 20 + ["b"] * 20)
    with pytest.raises(ArgumentError, match=r"gave \['a'\] in one replicate and \['b'\] in another"):
        simulation_based_calibration(
            MODEL,
            design(),
            brm.Laplace(),
            num_replicates=20,
            quantities=lambda rewards, latents: {next(names): rewards[:, 0]},
        )


def test_descriptions_are_the_same_in_every_process_and_tell_values_apart():
    def own(scale, rewards=None):
        return scale

    def enclosing(value):
        return lambda: value

    def circular():
        def inner():
            return inner

        return inner

    values = [
        own,
        functools.partial(own, 1.0),
        functools.partial(own, 2.0),
        enclosing(np.zeros(2000)),
        enclosing(np.arange(2000)),
        enclosing(torch.ones(2000)),
        circular(),
        Faulty(CORRECTED, shift=0.5),
        Faulty(CORRECTED),
        Faulty,
        Prior().fit,
        {"choice": L.BradleyTerry(), "rating": L.Ordinal()},
        {"a", "b"},
        object(),
    ]
    found = [json.dumps(described(value)) for value in values]
    assert len(set(found)) == len(values)
    assert not any("0x" in text for text in found)
    assert found[3] == json.dumps(described(enclosing(np.zeros(2000))))
    typed = [eval(text) for text in ("lambda x: x + 1", "lambda x: x + 1", "lambda x: x + 2", "lambda y: x")]
    assert [described(f)["source"] == described(typed[0])["source"] for f in typed] == [True, True, False, False]


@dataclasses.dataclass(frozen=True)
class Refusing:
    """Refuses data in which the first candidate wins in more than `most` rows."""

    most: int

    def fit(self, program, data, *, seed, progress):
        if int((data.groups()[0].outcome == 0).sum()) > self.most:
            raise EngineError("too many first candidates")
        return brm.Laplace().fit(program, data, seed=seed, progress=progress)


def test_refusals_are_counted_and_not_made_up_for():
    found = simulation_based_calibration(MODEL, design(), Refusing(7), num_replicates=20)
    assert 0 < len(found.refusals) < 20
    assert len(found.ranks) == 20 - len(found.refusals)
    assert f"{len(found.refusals)} fits were refused and have no ranks" in str(found)
    assert found.share_refused == len(found.refusals) / 20
    with pytest.raises(EngineError, match="refused all 10 simulations; the first: too many"):
        simulation_based_calibration(MODEL, design(), Refusing(-1), num_replicates=10)


def test_refusals_leave_no_verdict():
    """2 of 100 refused are few; 3 are too many, whether the ranks look right or wrong."""
    ranks, one = np.zeros((98, 1), dtype=np.int64), np.ones(1)
    few = SBC(("reward",), ranks, 99, p_values=one, adjusted=one, shift=0 * one, spread=one)
    wrong = dataclasses.replace(few, ranks=ranks[:97], adjusted=0.001 * one)
    for found in (few, dataclasses.replace(few, refusals=("no",) * 2)):
        assert "no sign of a wrong posterior" in str(found)
    assert "the posterior is wrong" in str(wrong)
    for found in (few, wrong):
        text = str(dataclasses.replace(found, refusals=("no",) * 3))
        assert "cannot be judged, for 3% of the fits were refused" in text
        assert "no sign" not in text
        assert "is wrong" not in text


@dataclasses.dataclass(frozen=True)
class Sticky:
    """A Markov chain that moves one draw in twenty."""

    def fit(self, program, data, *, seed, progress):
        posterior = CORRECTED.fit(program, data, seed=seed, progress=progress)
        posterior.z = posterior.z[torch.randperm(500, generator=torch.Generator().manual_seed(seed))]
        posterior.z = posterior.z[::20].repeat_interleave(20, dim=0)
        posterior.sample_stats = {"diverging": torch.zeros(500, dtype=torch.bool)}
        return posterior


def test_chains_with_too_few_effective_draws_are_counted():
    found = simulation_based_calibration(MODEL, design(), Sticky(), num_replicates=10)
    assert found.num_autocorrelated == 10
    assert "10 chains have fewer effective draws than were ranked" in str(found)


def test_ties_are_broken_at_random():
    def coarse(rewards, latents):
        return {"sign": (rewards[:, 0] > rewards[:, 1]).double()}

    found = simulation_based_calibration(MODEL, design(), CORRECTED, num_replicates=40, quantities=coarse)
    assert found.p_value > 0.01
    assert len(np.unique(found.ranks)) > 15


def test_arguments_are_checked():
    def run(**settings):
        return simulation_based_calibration(MODEL, settings.pop("design", design()), brm.Laplace(), **settings)

    with pytest.raises(ArgumentError, match="`num_replicates` is 5"):
        run(num_replicates=5)
    with pytest.raises(ArgumentError, match="`num_draws` is 0"):
        run(num_draws=0)
    with pytest.raises(ArgumentError, match="weights other than 0 and 1"):
        run(design=design(weight=np.full(15, 0.5)))
    with pytest.raises(ArgumentError, match="the posterior holds 5 draws"):
        simulation_based_calibration(MODEL, design(), brm.Ensemble(num_members=5), num_replicates=10)


def test_the_figure_shows_every_quantity():
    found = simulation_based_calibration(MODEL, design(), brm.Laplace(), num_replicates=20)
    figure = found.plot()
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes if axes.axison]
    assert [label[-1] for label in labels] == list(found.names)


def test_ranks_follow_their_definition():
    """The rank of a truth among draws of Laplace's approximation, by the normal distribution function."""
    found = simulation_based_calibration(MODEL, design(rows=40), brm.Laplace(), num_replicates=30, num_draws=999)
    seeds = [np.random.SeedSequence([0, i]).generate_state(4) for i in range(30)]
    expected = []
    for truth_seed, *_ in seeds:
        simulation = MODEL.simulate(design(rows=40), seed=int(truth_seed))
        posterior = brm.fit(MODEL, simulation.data)
        features = torch.as_tensor(np.asarray(simulation.data.features)).double()
        belief = posterior.predict(candidates=[features[:2]]).differences(1)
        true = simulation.rewards[0] - simulation.rewards[1]
        expected.append(scipy.stats.norm.cdf((true - belief.mean[0, 0]) / belief.std[0, 0]))
    shares = (found.ranks[:, 0] + 0.5) / 1000
    # A share of 999 draws has a standard error of at most 0.016.
    np.testing.assert_allclose(shares, expected, atol=5 * 0.016)


def test_gaussian_processes_are_ranked_too():
    rng = np.random.default_rng(0)
    pairs = np.arange(20).reshape(10, 2)
    design = brm.Comparisons.from_arrays(rng.normal(size=(20, 2)), candidates=pairs, outcome=[0] * 10)
    model = brm.RewardModel(brm.rewards.GaussianProcess(lengthscale=1.0), brm.likelihoods.BradleyTerry())
    found = simulation_based_calibration(model, design, brm.Laplace(), num_replicates=12, num_draws=19)
    assert "log joint" in found.names
    assert "show only gross faults" in str(found)
