"""What every engine owes every likelihood: one declared density, reproducible fits, threads, disk, proper beliefs.

One test runs every cell of engine x likelihood on tiny data with settings too small to converge: what is claimed here
holds of any run. That the answers are right is shown in `tests/reference`.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pytest
import torch

import bayesrm as brm
from bayesrm.engines._jax_density import arrays_of, density_of, double_precision
from bayesrm.engines._problem import make_problem
from bayesrm.errors import EngineError
from bayesrm.rewards.heads import unflatten

from .conftest import CASES, make_data

L = brm.likelihoods
ROWS, WIDTH = 12, 2

#: Fewer draws and steps than anybody should use.
ENGINES = {
    "map": brm.MAP(),
    "laplace": brm.Laplace(structure="full"),
    "svi": brm.SVI(guide="full_rank", num_steps=30, num_particles=4),
    "nuts": brm.NUTS(num_chains=2, num_warmup=20, num_samples=20),
    "ensemble": brm.Ensemble(num_members=5),
    "corrected_laplace": brm.ImportanceSampling(brm.Laplace(), num_samples=100, max_k_hat=100.0),
}
#: Those whose result depends on the seed.
RANDOM = {"svi", "nuts", "ensemble", "corrected_laplace"}
LIKELIHOODS = {
    **CASES,
    "noisy_length_bias": (L.LabelNoise(L.LengthBias(L.RaoKupper()), flip_rate=None), {}),
}


COMPILED = {"davidson", "rater_reliability", "noisy_length_bias"}


def model_and_data(name, seed=3):
    likelihood, design = LIKELIHOODS[name]
    design = dict(design) | {"rows": ROWS, "num_features": WIDTH}
    if "annotator" in design:
        design["annotator"] = [f"rater {i % 2}" for i in range(ROWS)]
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), likelihood, brm.priors.Gaussian(precision=0.5))
    return model, model.simulate(make_data(**design), seed=seed).data


def draws_of(posterior):
    """Up to three draws of x = (z, unconstrained latents), shape `(S, R + Q)`."""
    if isinstance(posterior, brm.engines.DrawsPosterior):
        return torch.cat([posterior.z, posterior.unconstrained_latents], dim=1)[:3]
    return posterior.coordinate_draws(3, torch.Generator().manual_seed(0))[0]


def program_log_joint(model, data, posterior, x):
    """The log joint of the Pyro program itself at one x, in the density's measure: whitened, unconstrained."""
    whitening, density = posterior._whitening, posterior._density_of(data)
    theta = whitening.to_parameters(x[: whitening.size])
    unconstrained = x[whitening.size :]
    latents = density.constrain(unconstrained)
    condition = pyro.condition(model, data={"reward.weight": theta} | latents)
    features = torch.as_tensor(np.asarray(data.features)).double()
    total = pyro.poutine.trace(condition).get_trace(features, data.groups()).log_prob_sum()
    for site in density.sites:
        u = unconstrained[site.start : site.stop].reshape(site.unconstrained_shape)
        total = total + site.transform.log_abs_det_jacobian(u, latents[site.name]).sum()
    return total + whitening.scale.log().sum()


def same_state(a, b):
    left, right = a._state(), b._state()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def together(*fits):
    """Results of functions that run at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(fits))

    def run(fit):
        barrier.wait()
        return fit()

    with ThreadPoolExecutor(len(fits)) as pool:
        return [future.result() for future in [pool.submit(run, fit) for fit in fits]]


# Chains of 20 draws and 30 steps of an optimiser are no evidence of convergence, and say so.
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    ("likelihood_name", "engine_name"),
    # Chains are compiled anew for each likelihood: three stand for all of them where time is short.
    [
        pytest.param(name, engine, marks=[pytest.mark.slow] if engine == "nuts" and name not in COMPILED else [])
        for name in LIKELIHOODS
        for engine in ENGINES
    ],
)
def test_contract(likelihood_name, engine_name, tmp_path):
    engine = ENGINES[engine_name]
    model, data = model_and_data(likelihood_name)
    _, other = model_and_data(likelihood_name, seed=4)
    first = brm.fit(model, data, inference=engine, seed=0)
    second = brm.fit(model, other, inference=engine, seed=1)

    # The log joint is the program's.
    x = draws_of(first)
    expected = torch.stack([program_log_joint(model, data, first, one) for one in x])
    problem = make_problem(model, data, seed=0, progress=False, memory_gib=1.0)
    torch.testing.assert_close(problem.log_joints(x), expected, rtol=1e-10, atol=1e-10)
    if engine_name == "nuts":
        potential = first.sample_stats["potential_energy"][: len(x)]
        torch.testing.assert_close(-potential, expected, rtol=1e-9, atol=1e-9)
        with double_precision():
            density, _ = density_of(problem)
            tree = arrays_of(problem).tree()
            found = [float(density(one.numpy(), tree)) for one in x]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    if engine_name in ("laplace", "svi"):
        covariance = torch.cholesky_inverse(first.factor)
        log_q = torch.distributions.MultivariateNormal(first.mode, covariance).log_prob(x)
        log_ratio = first.draw(data, num_samples=3, seed=0).log_ratio
        torch.testing.assert_close(log_ratio, expected - log_q, rtol=1e-8, atol=1e-8)
    if engine_name in ("map", "laplace"):
        mode = first.mode.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(program_log_joint(model, data, first, mode), [mode])
        assert slope.norm() <= 1e-6

    # Seeds reproduce, and two fits at once are what they are one by one.
    again = together(
        lambda: brm.fit(model, data, inference=engine, seed=0),
        lambda: brm.fit(model, other, inference=engine, seed=1),
    )
    assert same_state(first, again[0])
    assert same_state(second, again[1])
    if engine_name in RANDOM:
        assert not same_state(first, brm.fit(model, data, inference=engine, seed=2))

    # Disk keeps it.
    first.save_pretrained(tmp_path / "run")
    restored = brm.Posterior.from_pretrained(tmp_path / "run")
    assert same_state(first, restored)
    candidates = [np.random.default_rng(1).normal(size=(3, WIDTH)), np.eye(WIDTH)]
    belief, kept = first.predict(candidates=candidates), restored.predict(candidates=candidates)
    torch.testing.assert_close(kept.mean, belief.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.covariance, belief.covariance, rtol=1e-12, atol=1e-12)
    predicted, read = first.predict_feedback(data, num_samples=16), restored.predict_feedback(data, num_samples=16)
    torch.testing.assert_close(read.log_prob, predicted.log_prob, rtol=1e-12, atol=1e-12)

    # Beliefs are proper.
    assert torch.isfinite(predicted.log_prob).all()
    covariance = belief.covariance[1, :2, :2]
    eigenvalues = torch.linalg.eigvalsh(covariance)
    if engine_name == "map":
        assert eigenvalues.abs().max() == 0
    else:
        # Two rewards of two independent features: nothing is known exactly.
        assert eigenvalues.min() > 1e-4
        assert torch.linalg.eigvalsh(belief.covariance[0]).min() >= -1e-12
        difference = torch.tensor([1.0, -1.0], dtype=torch.float64)
        apart = belief.differences(1)
        torch.testing.assert_close(apart.variance[1, 0], difference @ covariance @ difference, rtol=1e-9, atol=1e-12)


#: A network that reacts to its weights at the mode, and a kernel.
HEADS = {
    "network": brm.rewards.MLP(hidden=(3,), standardize=False),
    "kernel": brm.rewards.GaussianProcess(lengthscale=1.0),
}


@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
@pytest.mark.parametrize("engine_name", [name for name in ENGINES if name != "nuts"])
@pytest.mark.parametrize("head_name", list(HEADS))
def test_contract_of_other_rewards(head_name, engine_name, tmp_path):
    engine, prior = ENGINES[engine_name], brm.priors.Gaussian(precision=0.1)
    if engine_name == "corrected_laplace":
        # Twelve rows leave a network far from its linear model; what is checked holds of any weights.
        engine = brm.ImportanceSampling(brm.Laplace(), num_samples=2000, max_k_hat=1e6)
    model = brm.RewardModel(HEADS[head_name], L.Davidson(), prior)
    data, other = (model.simulate(make_data(rows=ROWS, num_features=WIDTH), seed=seed).data for seed in (3, 4))
    first = brm.fit(model, data, inference=engine, seed=0)
    second = brm.fit(model, other, inference=engine, seed=1)
    if head_name == "network" and engine_name != "laplace":
        x, shapes = draws_of(first), model.head.parameter_shapes(WIDTH)
        problem = make_problem(model, data, seed=0, progress=False, memory_gib=1.0, find_mode=False)
        features, size = torch.as_tensor(np.asarray(data.features)).double(), first._whitening.size
        for one, found in zip(x, problem.log_joints(x), strict=True):
            parameters = unflatten(first._whitening.to_parameters(one[:size]), shapes)
            given = {f"reward.{site}": value for site, value in parameters.items()}
            given["tie_weight"] = one[size:].exp()[0]
            trace = pyro.poutine.trace(pyro.condition(model, data=given)).get_trace(features, data.groups())
            expected = trace.log_prob_sum() + one[size:].sum() + first._whitening.scale.log().sum()
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    again = together(
        lambda: brm.fit(model, data, inference=engine, seed=0),
        lambda: brm.fit(model, other, inference=engine, seed=1),
    )
    assert same_state(first, again[0])
    assert same_state(second, again[1])
    first.save_pretrained(tmp_path / "run")
    restored = brm.Posterior.from_pretrained(tmp_path / "run")
    assert same_state(first, restored)
    candidates = [np.random.default_rng(1).normal(size=(3, WIDTH))]
    belief, kept = first.predict(candidates=candidates), restored.predict(candidates=candidates)
    torch.testing.assert_close(kept.mean, belief.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.covariance, belief.covariance, rtol=1e-12, atol=1e-12)
    spread = belief.differences().std[0, 1:]
    assert (spread == 0).all() if engine_name == "map" else (spread > 1e-2).all()


def test_what_an_engine_cannot_serve_is_refused_by_naming_those_that_can():
    data = make_data(rows=4, num_features=2)
    adapter = brm.RewardModel(brm.rewards.LoRA("no-model-is-read-before-the-refusal", rank=2), L.BradleyTerry())
    network = brm.RewardModel(brm.rewards.MLP(hidden=(2,)), L.BradleyTerry())
    linear = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    refusals = [
        (adapter, brm.NUTS(), r"NUTS cannot sample .* use SVI\(\.\.\.\) or Ensemble\(\.\.\.\)"),
        (adapter, brm.SVI(guide="full_rank"), r"SVI\(guide='mean_field'\)"),
        (adapter, brm.SVI(guide="mean_field", batch_size=2), r"`batch_size` is for heads"),
        (network, brm.NUTS(mass_matrix="laplace"), r"use mass_matrix='diagonal'"),
        (linear, brm.ImportanceSampling(brm.MAP()), r"use Laplace\(\.\.\.\) or SVI"),
        (linear, brm.ImportanceSampling(brm.Ensemble()), r"use Laplace\(\.\.\.\) or SVI"),
        (linear, brm.NUTS(memory_gib=1e-9), r"raise `memory_gib`"),
        (linear, brm.SVI(memory_gib=1e-9), r"raise `memory_gib`"),
        (linear, brm.Ensemble(memory_gib=1e-9), r"raise `memory_gib`"),
    ]
    for model, engine, message in refusals:
        with pytest.raises(EngineError, match=message):
            brm.fit(model, data, inference=engine)
