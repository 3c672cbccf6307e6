"""Posteriors as ArviZ's inference data: what is in them, that they survive a file, and that ArviZ works with them."""

import json
import sys

import arviz as az
import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm import _arviz
from bayesrm.engines.draws_posterior import DrawsPosterior
from bayesrm.engines.nuts import NUTS
from bayesrm.errors import ArgumentError, EngineError

L = brm.likelihoods


def fit(model, data, **settings):
    return brm.fit(model, data, inference=brm.Laplace(prior_precision="given", **settings))


def test_every_likelihood(simulated):
    model, data = simulated
    posterior = fit(model, data)
    idata = posterior.to_arviz(data, num_samples=30, seed=5)
    draws = posterior.draw(data, num_samples=30, seed=5)
    np.testing.assert_array_equal(idata.posterior["reward"].values, draws.rewards[None].numpy())
    assert idata.posterior["reward"].dims == ("chain", "draw", "item")
    for name, values in posterior._density_of(data).constrain(draws.latents).items():
        np.testing.assert_array_equal(idata.posterior[name].values, values[None].numpy())
    # Draw by draw and row by row, what the density says.
    density = posterior._density_of(data)
    for s in (0, 17):
        expected = torch.cat(density.row_log_probs(density.gather(draws.rewards[s]), draws.latents[s]))
        np.testing.assert_allclose(idata.log_likelihood["feedback"].values[0, s], expected, atol=1e-12)
    (group,) = data.groups()
    observed, drawn = idata.observed_data["feedback"], idata.posterior_predictive["feedback"]
    np.testing.assert_array_equal(observed.values, group.outcome)
    assert drawn.dims == ("chain", "draw", *observed.dims)
    assert drawn.shape[2:] == observed.shape
    assert observed.dims == (("comparison", "rank") if group.comparison.kind == "ranking" else ("comparison",))
    np.testing.assert_array_equal(idata.constant_data["candidates"].values, group.items)
    np.testing.assert_array_equal(idata.constant_data["features"].values, data.features)
    np.testing.assert_array_equal(idata.constant_data["prompt_of_item"].values, data.prompt_of_item)
    assert idata.constant_data["features"].dims == ("item", "feature")
    assert idata.sample_stats["log_ratio"].shape == (1, 30)
    again = posterior.to_arviz(data, num_samples=30, seed=5)
    assert again.posterior_predictive.equals(idata.posterior_predictive)


def test_the_predictive_follows_the_posterior():
    # Frequencies of drawn answers against the prediction by integration.
    data = brm.Comparisons.from_arrays(
        np.random.default_rng(0).normal(size=(12, 2)), candidates=np.arange(12).reshape(6, 2), outcome=[0, 1, 2] * 2
    )
    posterior = fit(brm.RewardModel(brm.rewards.Linear(), L.Davidson()), data)
    drawn = posterior.to_arviz(data, num_samples=4000).posterior_predictive["feedback"].values[0]
    (group,) = posterior.predict_feedback(data, num_samples=4096).groups
    share = np.stack([(drawn == k).mean(0) for k in group.outcomes.tolist()], axis=1)
    error = np.sqrt(group.probs.numpy() * (1 - group.probs.numpy()) / 4000)
    assert (np.abs(share - group.probs.numpy()) < 4.5 * error + 1e-3).all()


def test_annotators_have_names():
    names = [f"rater {i % 3}" for i in range(12)]
    data = brm.Comparisons.from_arrays(
        np.random.default_rng(0).normal(size=(24, 2)),
        candidates=np.arange(24).reshape(12, 2),
        outcome=[0, 1] * 6,
        annotator=names,
    )
    posterior = fit(brm.RewardModel(brm.rewards.Linear(), L.RaterReliability(L.BradleyTerry())), data)
    idata = posterior.to_arviz(data, num_samples=10)
    assert idata.posterior["rater_deviation"].dims == ("chain", "draw", "annotator")
    assert idata.posterior["annotator"].values.tolist() == ["rater 0", "rater 1", "rater 2"]
    codes = idata.constant_data["annotator_of_comparison"].values
    assert idata.constant_data["annotator"].values[codes].tolist() == names
    # A part of the data in which one rater is missing keeps the codes of training.
    part = posterior.to_arviz(data.select([1, 2, 4]), num_samples=10)
    assert part.constant_data["annotator"].values[part.constant_data["annotator_of_comparison"].values].tolist() == [
        "rater 1", "rater 2", "rater 1"
    ]  # fmt: skip
    # Log ratios belong to the data of the fit.
    assert "sample_stats" not in part


def mixed():
    """Rankings of two depths, choices and ratings of the same items, some masked."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 3))
    items = {"prompt_index": np.repeat([0, 1, 2], 4), "ids": [f"item {i}" for i in range(12)]}
    full = np.arange(12).reshape(3, 4)
    parts = [
        brm.Comparisons.from_arrays(features, candidates=full, outcome=[[1, 0, 2, 3]] * 3, kind="ranking", **items),
        brm.Comparisons.from_arrays(features, candidates=full, outcome=[[2, 0]] * 3, kind="ranking", **items),
        brm.Comparisons.from_arrays(
            features, candidates=full[:, :2], outcome=[0, 1, 0], weight=[1, 0, 2.0], margin=[0.5, np.nan, 0], **items
        ),
        brm.Comparisons.from_arrays(features, outcome=rng.integers(0, 3, 12), kind="rating", num_levels=3, **items),
    ]
    likelihoods = {"ranking": L.PlackettLuce(), "choice": L.BradleyTerry(), "rating": L.Ordinal()}
    model = brm.RewardModel(brm.rewards.Linear(), likelihoods)
    return model, brm.Comparisons.concatenate(parts)


def test_mixed_kinds_and_masked_rows():
    model, data = mixed()
    posterior = fit(model, data)
    idata = posterior.to_arviz(data, num_samples=20)
    assert set(idata.observed_data.data_vars) == {"feedback_ranking", "feedback_choice", "feedback_rating"}
    ranking = idata.observed_data["feedback_ranking"]
    assert ranking.dims == ("comparison_ranking", "rank")
    assert ranking.values.tolist() == [[1, 0, 2, 3]] * 3 + [[2, 0, -1, -1]] * 3
    choice = idata.observed_data["feedback_choice"]
    # Row 7 has weight 0: it is listed in constant_data alone.
    assert choice["comparison_choice"].values.tolist() == [6, 8]
    assert choice.values.tolist() == [0, 0]
    assert idata.posterior_predictive["feedback_ranking"].shape == (1, 20, 6, 4)
    assert (idata.posterior_predictive["feedback_ranking"].values[:, :, 3:, 2:] == -1).all()
    counted = [i for i in range(21) if i != 7]
    assert idata.log_likelihood["comparison"].values.tolist() == counted
    constant = idata.constant_data
    assert constant.sizes["comparison"] == 21
    assert constant["weight"].values[[6, 7, 8]].tolist() == [1.0, 0.0, 2.0]
    assert constant["kind"].values[[0, 6, 9]].tolist() == ["ranking", "choice", "rating"]
    assert constant["candidates"].values[9].tolist()[1:] == [-1, -1, -1]
    assert constant["margin"].values[6] == 0.5
    np.testing.assert_array_equal(constant["prompt_of_comparison"].values, data.prompt_of_row)
    # Items without texts are never merged: each part has its own.
    assert idata.posterior.sizes["item"] == data.num_items
    draws = posterior.draw(data, num_samples=20)
    density = posterior._density_of(data)
    expected = np.full(21, np.nan)
    for g, x in zip(
        density.groups, density.row_log_probs(density.gather(draws.rewards[3]), draws.latents[3]), strict=True
    ):
        expected[g.rows] = x
    np.testing.assert_allclose(idata.log_likelihood["feedback"].values[0, 3], expected[counted], atol=1e-12)


def test_a_latent_may_bear_the_name_of_a_dimension():
    def item(rewards, comparison):
        shift = brm.sample("item", brm.dist.Normal(0.0, 1.0))
        first = rewards[:, 0] - rewards[:, 1] + shift
        return brm.dist.Categorical(logits=brm.ops.stack([first, 0.0 * first], axis=-1))

    data = brm.Comparisons.from_arrays(np.eye(4), candidates=[[0, 1], [2, 3]], outcome=[0, 1])
    idata = fit(brm.RewardModel(brm.rewards.Linear(), item), data).to_arviz(data, num_samples=10)
    assert idata.posterior["latent.item"].dims == ("chain", "draw")
    assert idata.posterior["item"].values.tolist() == [0, 1, 2, 3]


def test_likelihoods_that_branch_on_latents():
    # torch.func.vmap cannot follow the branch: draws are evaluated one by one.
    def branching(rewards, comparison):
        shift = brm.sample("shift", brm.dist.Normal(0.0, 1.0))
        sign = 1.0 if float(shift.detach()) > 0 else 0.5
        first = rewards[:, 0] - rewards[:, 1] + sign * shift
        return brm.dist.Categorical(logits=brm.ops.stack([first, 0.0 * first], axis=-1))

    data = brm.Comparisons.from_arrays(np.eye(4), candidates=[[0, 1], [2, 3]], outcome=[0, 1])
    posterior = brm.fit(brm.RewardModel(brm.rewards.Linear(), branching), data, inference=brm.MAP())
    idata = posterior.to_arviz(data, num_samples=6, predictive=False)
    density = posterior._density_of(data)
    draws = posterior.draw(data, num_samples=6)
    expected = density.row_log_probs(density.gather(draws.rewards[2]), draws.latents[2])[0]
    np.testing.assert_allclose(idata.log_likelihood["feedback"].values[0, 2], expected, atol=1e-12)
    assert "posterior_predictive" not in idata


def test_attributes_tell_where_the_draws_come_from():
    model, data = mixed()
    attributes = fit(model, data).to_arviz(data, num_samples=5, seed=9).attrs
    assert attributes["inference_library"] == "bayesrm"
    assert attributes["inference_library_version"] == brm.__version__
    assert (attributes["engine"], attributes["seed"], attributes["draw_seed"]) == ("Laplace", 0, 9)
    assert json.loads(attributes["engine_settings"])["structure"] == "full"
    assert attributes["torch_version"] == torch.__version__


def test_files(tmp_path):
    model, data = mixed()
    idata = fit(model, data).to_arviz(data, num_samples=20)
    idata.to_netcdf(str(tmp_path / "posterior.nc"))
    read = az.from_netcdf(str(tmp_path / "posterior.nc"))
    for group in (
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
    ):
        assert read[group].equals(idata[group])
        assert read[group].sizes == idata[group].sizes
    assert read.attrs["engine"] == "Laplace"


@pytest.fixture(scope="module")
def sampled():
    """Independent draws of a Gaussian posterior, presented as two chains of NUTS."""
    rng = np.random.default_rng(0)
    data = brm.Comparisons.from_arrays(
        0.3 * rng.normal(size=(80, 2)), candidates=np.arange(80).reshape(40, 2), outcome=rng.integers(0, 3, 40)
    )
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    laplace = fit(model, data)
    x, _ = laplace.coordinate_draws(1000, torch.Generator().manual_seed(0))
    size = laplace._whitening.size
    stats = {
        "diverging": torch.zeros(1000, dtype=torch.bool),
        "num_steps": torch.full((1000,), 7),
        "accept_prob": torch.full((1000,), 0.9, dtype=torch.float64),
        "energy": torch.from_numpy(rng.normal(size=1000)),
    }
    posterior = DrawsPosterior(
        model, laplace.schema, laplace.report, laplace._expansion, laplace._whitening, x[:, :size], x[:, size:],
        num_chains=2, sample_stats=stats,
    )  # fmt: skip
    return data, posterior, posterior.to_arviz(data)


def test_chains(sampled):
    data, posterior, idata = sampled
    assert idata.posterior["reward"].shape == (2, 500, 80)
    rewards = posterior.draw(data, num_samples=1000).rewards
    np.testing.assert_array_equal(idata.posterior["reward"].values[1], rewards[500:])
    stats = idata.sample_stats
    assert set(stats.data_vars) == {"diverging", "energy", "n_steps", "acceptance_rate"}
    assert stats["diverging"].dtype == bool
    np.testing.assert_array_equal(stats["energy"].values.reshape(-1), posterior.sample_stats["energy"])


@pytest.mark.slow
def test_nuts():
    rng = np.random.default_rng(0)
    data = brm.Comparisons.from_arrays(
        rng.normal(size=(20, 2)), candidates=np.arange(20).reshape(10, 2), outcome=rng.integers(0, 2, 10)
    )
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    posterior = brm.fit(model, data, inference=NUTS(num_chains=2, num_warmup=200, num_samples=500))
    idata = posterior.to_arviz(data)
    assert idata.posterior["reward"].shape == (2, 500, 20)
    assert {"diverging", "energy", "n_steps", "acceptance_rate"} <= set(idata.sample_stats.data_vars)
    assert (az.summary(idata)["r_hat"] < 1.05).all()


def test_by_prompt(sampled):
    model, data = mixed()
    posterior = fit(model, data)
    rows = posterior.to_arviz(data, num_samples=20, predictive=False)
    idata = posterior.to_arviz(data, num_samples=20, predictive=False, by="prompt")
    found = idata.log_likelihood["feedback"]
    assert found.dims == ("chain", "draw", "prompt")
    prompts, weight = np.asarray(data.prompt_of_row), idata.constant_data["weight"].values
    per_row = rows.log_likelihood["feedback"]
    counted = per_row["comparison"].values
    every = np.unique(prompts[counted])
    assert found["prompt"].values.tolist() == every.tolist()
    assert len(every) < len(counted)
    for i, prompt in enumerate(every):
        mine = prompts[counted] == prompt
        expected = (per_row.values[..., mine] * weight[counted][mine]).sum(-1)
        np.testing.assert_allclose(found.values[..., i], expected, atol=1e-12)
    for tree in (rows, idata):
        total = tree.constant_data["weight_of_prompt"]
        assert total.dims == ("prompt",)
        np.testing.assert_array_equal(total.values, [weight[prompts == i].sum() for i in range(data.num_prompts)])
    # A prompt whose rows all have weight 0 is no unit.
    alone = brm.Comparisons.from_arrays(
        np.eye(6), candidates=[[0, 1], [2, 3], [4, 5]], outcome=[0, 1, 0], weight=[1.0, 0.0, 1.0],
        prompt_index=[0, 0, 1, 1, 2, 2],
    )  # fmt: skip
    masked = fit(brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry()), alone).to_arviz(alone, by="prompt")
    assert masked.log_likelihood["prompt"].values.tolist() == [0, 2]
    assert masked.constant_data["weight_of_prompt"].values.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ArgumentError, match="`by` is 'item'"):
        posterior.to_arviz(data, by="item")


def several_rows_a_prompt():
    rng = np.random.default_rng(1)
    return brm.Comparisons.from_arrays(
        0.2 * rng.normal(size=(60, 2)), candidates=np.arange(60).reshape(30, 2), outcome=rng.integers(0, 2, 30),
        weight=rng.choice([0.5, 1.0, 2.0], 30), prompt_index=np.repeat(np.arange(15), 4),
    )  # fmt: skip


def test_loo_by_prompt_is_ours():
    # Independent draws without log ratios: both smooth the same weights, with a relative efficiency of 1.
    data = several_rows_a_prompt()
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    laplace = fit(model, data)
    x, _ = laplace.coordinate_draws(1000, torch.Generator().manual_seed(0))
    size = laplace._whitening.size
    posterior = DrawsPosterior(
        model, laplace.schema, laplace.report, laplace._expansion, laplace._whitening, x[:, :size], x[:, size:]
    )
    ours = brm.diagnostics.loo(posterior, data, num_samples=1000)
    theirs = az.loo(posterior.to_arviz(data, by="prompt"), pointwise=True, reff=1.0)
    assert theirs.n_data_points == 15
    np.testing.assert_allclose(np.asarray(theirs.elpd_i if _arviz.is_tree() else theirs.loo_i), ours.pointwise)
    by_row = az.loo(posterior.to_arviz(data), reff=1.0)
    assert by_row.n_data_points == 30
    # Of an approximate engine ours follows the log ratios, which ArviZ ignores.
    ratios = brm.diagnostics.loo(laplace, data, num_samples=1000)
    ignored = az.loo(laplace.to_arviz(data, by="prompt"), pointwise=True, reff=1.0)
    assert abs(float(ignored.elpd if _arviz.is_tree() else ignored.elpd_loo) - ratios.elpd) > 1e-6


@pytest.mark.slow
def test_loo_by_prompt_of_chains():
    data = several_rows_a_prompt()
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    posterior = brm.fit(model, data, inference=NUTS(num_chains=2, num_warmup=200, num_samples=500))
    ours = brm.diagnostics.loo(posterior, data)
    theirs = az.loo(posterior.to_arviz(data, by="prompt"), pointwise=True)
    found = np.asarray(theirs.elpd_i if _arviz.is_tree() else theirs.loo_i)
    # The same draws; ArviZ has one relative efficiency for all, which moves only how many weights are smoothed.
    assert (np.abs(found - ours.pointwise.numpy()) < 0.5 * ours.mcse.numpy()).all()
    # Leaving out rows instead is another question.
    by_row = az.loo(posterior.to_arviz(data))
    assert abs(float(by_row.elpd if _arviz.is_tree() else by_row.elpd_loo) - ours.elpd) > 0.1


# ArviZ 0.23 calls Matplotlib in a way that 3.11 deprecates.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_arviz_works_with_it(sampled):
    import matplotlib.pyplot as plt

    _, posterior, idata = sampled
    table = az.summary(idata)
    assert len(table) == 80 + len(posterior._density().sites)
    assert (table["r_hat"] < 1.05).all()
    result = az.loo(idata)
    assert result.n_data_points == 40
    if not _arviz.is_tree():
        az.plot_energy(idata)
        az.plot_ppc(idata, num_pp_samples=20)
        az.plot_forest(idata, var_names=["reward"], coords={"item": [0, 1]})
        az.plot_trace(idata, var_names=["reward"], coords={"item": [0]})
        az.plot_khat(az.loo(idata, pointwise=True))
        az.plot_bpv(idata)
    plt.close("all")


def test_without_arviz(monkeypatch):
    _arviz.arviz.cache_clear()
    monkeypatch.setitem(sys.modules, "arviz", None)
    try:
        with pytest.raises(EngineError, match="pip install arviz"):
            _arviz.arviz()
    finally:
        _arviz.arviz.cache_clear()
