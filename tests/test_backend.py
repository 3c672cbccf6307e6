"""One vocabulary, two libraries: operations agree, constants follow the arrays, recorders and threads keep apart."""

import threading

import jax
import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.backend import PriorRecorder, Recorder, active, convert, dist, following, ops, plate, sample, seeded
from bayesrm.errors import ArgumentError, LikelihoodError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5)) * 3
POSITIVE = np.abs(X) + 0.1
TAILS = np.array([-700.0, -30.0, -1.0, 0.0, 1.0, 30.0, 700.0])
INDICES = RNG.permuted(np.tile(np.arange(5), (4, 1)), axis=1)[:, :3]

OPERATIONS = {
    "exp": lambda a: ops.exp(a(X)),
    "expm1": lambda a: ops.expm1(a(X * 1e-9)),
    "log": lambda a: ops.log(a(POSITIVE)),
    "log1p": lambda a: ops.log1p(a(POSITIVE * 1e-9)),
    "sqrt": lambda a: ops.sqrt(a(POSITIVE)),
    "abs": lambda a: ops.abs(a(X)),
    "tanh": lambda a: ops.tanh(a(X)),
    "relu": lambda a: ops.relu(a(X)),
    "gelu": lambda a: ops.gelu(a(X)),
    "sigmoid": lambda a: ops.sigmoid(a(TAILS)),
    "softplus": lambda a: ops.softplus(a(TAILS)),
    "log_sigmoid": lambda a: ops.log_sigmoid(a(TAILS)),
    "log_ndtr": lambda a: ops.log_ndtr(a(TAILS)),
    "logaddexp": lambda a: ops.logaddexp(a(TAILS), a(TAILS[::-1].copy())),
    "logsumexp": lambda a: ops.logsumexp(a(X), axis=0),
    "logsumexp of two axes": lambda a: ops.logsumexp(a(X), axis=(0, 1)),
    "log_softmax": lambda a: ops.log_softmax(a(X), axis=0),
    "sum": lambda a: ops.sum(a(X)),
    "sum of an axis": lambda a: ops.sum(a(X), axis=1),
    "sum of two axes": lambda a: ops.sum(a(X), axis=(0, 1)),
    "cumsum": lambda a: ops.cumsum(a(X), axis=1),
    "stack": lambda a: ops.stack([a(X), a(POSITIVE)], axis=-1),
    "concatenate": lambda a: ops.concatenate([a(X), a(POSITIVE)], axis=1),
    "where": lambda a: ops.where(a(X) > 0, a(X), 0.0),
    "clip": lambda a: ops.clip(a(X), -1.0, 1.5),
    "clip from below": lambda a: ops.clip(a(X), low=0.5),
    "flip": lambda a: ops.flip(a(X), axis=1),
    "argsort": lambda a: ops.argsort(a(X), axis=1),
    "take_along_axis": lambda a: ops.take_along_axis(a(X), a(INDICES), axis=1),
    "asarray": lambda a: ops.asarray(0.1, like=a(X)),
    "asarray of whole numbers": lambda a: ops.asarray([1, 2], like=a(X)),
}

EXPECTED = {
    "softplus": np.logaddexp(0, TAILS),
    "log_sigmoid": -np.logaddexp(0, -TAILS),
    "logsumexp": np.log(np.exp(X).sum(0)),
    "logaddexp": np.logaddexp(TAILS, TAILS[::-1]),
    "cumsum": np.cumsum(X, 1),
    "take_along_axis": np.take_along_axis(X, INDICES, 1),
    "argsort": np.argsort(X, 1),
    "clip": np.clip(X, -1.0, 1.5),
    "asarray": np.float64(0.1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree(name):
    of_torch = OPERATIONS[name](torch.as_tensor)
    with jax.enable_x64(True):
        of_jax = np.asarray(OPERATIONS[name](jax.numpy.asarray))
    assert of_jax.dtype == of_torch.numpy().dtype
    np.testing.assert_allclose(of_torch.numpy(), of_jax, rtol=1e-12, atol=1e-12)
    if name in EXPECTED:
        np.testing.assert_allclose(of_torch.numpy(), EXPECTED[name], rtol=1e-12, atol=1e-12)


def test_every_operation_is_tested():
    public = {name for name in dir(ops) if not name.startswith("_")}
    assert public == {name.split(" of ")[0].split(" from ")[0] for name in OPERATIONS}


def test_the_backend_follows_the_arrays():
    assert active().name == "torch"
    with following(torch.zeros(1, dtype=torch.float64)) as outer:
        assert (outer.name, outer.dtype, outer.device) == ("torch", torch.float64, torch.device("cpu"))
        with following(jax.numpy.zeros(1)) as inner:
            assert (active(), inner.name, inner.device) == (inner, "jax", None)
        assert active() is outer
    assert active().dtype == torch.get_default_dtype()
    with pytest.raises(RuntimeError), following(torch.zeros(1, dtype=torch.float64)):
        raise RuntimeError
    assert active().dtype == torch.get_default_dtype()
    with (
        pytest.raises(ArgumentError, match=r"`array` is a ndarray; a torch or JAX array is needed"),
        following(np.zeros(1)),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_have_the_dtype_of_the_program(dtype):
    with following(torch.zeros(1, dtype=dtype)):
        assert dist.Normal(0.0, 1.0).loc.dtype == dtype
        assert dist.LogNormal(loc=0.1, scale=1.0).scale.dtype == dtype
        assert float(dist.Normal(0.1, 1.0).loc) == float(torch.tensor(0.1, dtype=dtype))
    # An argument that is a tensor decides over the program.
    with following(torch.zeros(1, dtype=torch.float32)):
        assert dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).scale.dtype == torch.float64


def test_whole_number_constants_have_the_dtype_of_the_program():
    with following(torch.zeros(1, dtype=torch.float64)):
        assert dist.Normal(0, 1).loc.dtype == torch.float64


def test_distributions_are_those_of_the_active_library():
    with following(jax.numpy.zeros(1)):
        assert type(dist.Normal(0.0, 1.0)).__module__.startswith("numpyro")
    assert type(dist.Normal(0.0, 1.0)).__module__.startswith("pyro")
    with pytest.raises(AttributeError, match="Nrmal"):
        dist.Nrmal(0.0, 1.0)


def test_convert():
    like = torch.zeros(1, dtype=torch.float64)
    assert convert(np.float32([1, 2]), like).dtype == torch.float64
    assert convert(np.array([1, 2]), like).dtype == torch.int64
    with jax.enable_x64(True):
        array = convert(torch.tensor([0.1], dtype=torch.float64), jax.numpy.zeros(1, dtype="float64"))
        assert (array.dtype, float(array[0])) == ("float64", 0.1)


# ----------------------------------------------------------------------------------------------------------- recorders


def test_a_recorder_gives_and_keeps_values():
    with Recorder({"a": torch.tensor(2.0), "b": torch.zeros(3)}) as recorder:
        a = sample("a", dist.Normal(0.0, 1.0))
        with plate("threes", 3):
            sample("b", dist.Normal(a, 1.0))
        assert torch.equal(sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(9.0)), torch.tensor(9.0))
    assert list(recorder.sites) == ["a", "b"]
    fn, value = recorder.sites["b"]
    assert fn.batch_shape == (3,)
    # -(0 - 2)^2 / 2 - log sqrt(2 pi)
    torch.testing.assert_close(fn.log_prob(value), torch.full((3,), -2.0 - 0.9189385332046727))


def test_nested_plates_broadcast_from_the_right():
    with Recorder({"x": torch.zeros(2, 3)}) as recorder, plate("threes", 3), plate("twos", 2):
        sample("x", dist.Normal(0.0, 1.0))
    assert recorder.sites["x"][0].batch_shape == (2, 3)


def test_a_recorder_refuses_unknown_and_repeated_sites():
    with Recorder({"a": torch.tensor(0.0)}):
        with pytest.raises(LikelihoodError, match=r"site `b` is not among the known latents \['a'\]"):
            sample("b", dist.Normal(0.0, 1.0))
        sample("a", dist.Normal(0.0, 1.0))
        with pytest.raises(LikelihoodError, match="site `a` is declared twice"):
            sample("a", dist.Normal(0.0, 1.0))


def test_a_prior_recorder_draws_what_is_missing():
    with seeded(0), PriorRecorder({"a": torch.tensor(5.0)}) as recorder:
        assert sample("a", dist.Normal(0.0, 1.0)) == 5.0
        drawn = sample("b", dist.Normal(100.0, 1.0))
    with seeded(0):
        assert drawn == dist.Normal(100.0, 1.0).sample()
    assert set(recorder.sites) == {"a", "b"}


def test_seeded_restores_the_generator():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.rand(4), first)
    before = torch.get_rng_state()
    with pytest.raises(LikelihoodError, match="unknown"), seeded(3):
        raise LikelihoodError(f"unknown {torch.rand(1)}")
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------- threads


def test_two_threads_run_one_program_under_two_libraries():
    import pyro
    from numpyro.infer.util import log_density

    features = RNG.normal(size=(6, 2))
    data = brm.Comparisons.from_arrays(
        features, candidates=[[0, 1], [2, 3], [4, 5]], outcome=[0, 2, 1], annotator=["a", "b", "a"], words=range(1, 7)
    )
    likelihood = brm.likelihoods.RaterReliability(brm.likelihoods.LengthBias(brm.likelihoods.Davidson()))
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    truth = model.simulate(data, seed=0)
    values = {"reward.weight": truth.parameters["weight"]} | truth.latents
    groups, rounds = data.groups(), 40

    def under_torch(results):
        for _ in range(rounds):
            conditioned = pyro.poutine.condition(model, data=values)
            trace = pyro.poutine.trace(conditioned).get_trace(torch.as_tensor(features), groups)
            results.append(float(trace.log_prob_sum()))
            assert active().name == "torch"

    def under_jax(results):
        with jax.enable_x64(True):
            arrays = {k: jax.numpy.asarray(v.numpy()) for k, v in values.items()}
            for _ in range(rounds):
                results.append(float(log_density(model, (jax.numpy.asarray(features), groups), {}, arrays)[0]))
                assert active().name == "torch"

    def under_a_recorder(results):
        # An engine's way to run a program, beside the other two.
        for _ in range(rounds):
            with following(torch.as_tensor(features)), Recorder(truth.latents):
                (d,) = model.feedback([truth.rewards[groups[0].items]], [groups[0].comparison])
                results.append(float(d.log_prob(groups[0].outcome).sum()))

    tasks = [under_torch, under_jax, under_a_recorder]
    alone: list = [[] for _ in tasks]
    for task, results in zip(tasks, alone, strict=True):
        task(results)
    together: list = [[] for _ in tasks]
    barrier = threading.Barrier(len(tasks))
    failures = []

    def run(task, results):
        try:
            barrier.wait()
            task(results)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(tasks, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert together == alone
    assert len(set(alone[0])) == 1
    assert abs(alone[0][0] - alone[1][0]) < 1e-9
    assert not jax.config.jax_enable_x64
