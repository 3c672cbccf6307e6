"""AVRIL on language models: the written objective against the program's trace, sharing, resume, and what comes out."""

import math
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions
import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.engines import AVRIL, TokenPosterior, Training
from bayesrm.engines._avril_text import DemonstrationObjective, PreferenceObjective, distinct_steps
from bayesrm.errors import ArgumentError, DataError, EngineError
from bayesrm.programs import InverseRL, Steps
from bayesrm.rewards import TokenReward

sys.path.insert(0, str(Path(__file__).parents[1] / "alignment"))
import policies

ROWS = [
    {"prompt": "w1 w2", "chosen": "w3 w4 w5", "rejected": "w3 w4 w0 w1"},
    {"prompt": "w1 w2", "chosen": "w3 w4 w5", "rejected": "w2"},
    {"prompt": "w5", "chosen": "w6 w7", "rejected": "w6 w6 w0 w0 w0 w0"},
]
DEMONSTRATIONS = [
    {"prompt": "w1 w2", "completion": "w3 w4 w5"},
    {"prompt": "w1 w2", "completion": "w3 w4 w0"},
    {"prompt": "w5", "completion": "w6 w7 w6 w6 w6 w6", "weight": 2.0},
]


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gpt2"), "gpt2")


def saved(folder, family):
    tokenizer = policies.tokenizer(encoder=family == "bert", count=8, pad=family == "gpt2")
    policies.model(family, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def program(folder, *, rank=2, values="head", most=6, dtype="float64", **settings):
    reward = TokenReward(folder, rank=rank, values=values, max_prompt_tokens=8, max_new_tokens=most, dtype=dtype)
    return InverseRL(reward, **settings)


def moved(program, seed=0):
    """The network of a program, its weights moved at random."""
    network = program.reward.load(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.sites.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return network


def plain(network, prompt, response):
    """log p of each token, its state's logits and the heads behind each position, one unpadded sequence at a time."""
    found = network.model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    logits = found.logits[0, len(prompt) - 1 : -1].double()
    layer = network.model.get_output_embeddings()
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.model(input_ids=torch.tensor([[*prompt, *response]]))
    handle.remove()
    heads = network.heads(seen[0][0].to(network.heads.weight.dtype))
    return logits, heads[len(prompt) - 1 : -1, 2], heads[len(prompt) :, 0], heads[len(prompt) :, 1]


@pytest.mark.parametrize("values", ["head", "logits"])
def test_steps_equal_one_sequence_at_a_time(folder, values):
    network = moved(program(folder, values=values, most=8))
    sequences = network.encode(*policies.texts(7, count=8, longest=(6, 7)))
    with torch.no_grad():
        steps = network.steps(sequences)
        for row, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
            logits, of_state, mean, log_std = plain(network, prompt, response)
            count = len(response)
            expected = logits.log_softmax(-1)[torch.arange(count), torch.tensor(response)]
            torch.testing.assert_close(steps.log_probs[row, :count], expected, rtol=1e-9, atol=1e-9)
            soft = of_state if values == "head" else logits.logsumexp(-1)
            torch.testing.assert_close(steps.values[row, :count], soft, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(steps.mean[row, :count], mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(steps.log_std[row, :count], log_std, rtol=1e-9, atol=1e-9)
            assert steps.mask[row].tolist() == [place < count for place in range(steps.mask.shape[1])]


def test_rewards_need_no_policy(folder):
    network = moved(program(folder, most=8))
    sequences = network.encode(*policies.texts(5, count=8, longest=(6, 7)))
    with torch.no_grad():
        whole, rewards = network.steps(sequences), network.steps(sequences, policy=False)
    assert torch.equal(whole.mean, rewards.mean)
    assert torch.equal(whole.log_std, rewards.log_std)
    assert rewards.log_probs.abs().max() == rewards.values.abs().max() == 0 < whole.values.abs().max()


def test_rewards_begin_at_the_prior(gpt2):
    network = program(gpt2).reward.load(0)
    network.start_at(0.5)
    steps = network.steps(network.encode(["w1"], ["w2 w3"]))
    assert steps.mean.abs().max() == 0
    torch.testing.assert_close(steps.log_std.exp(), torch.full_like(steps.log_std, 0.5))


def written_out(program, network, sequences, engine):
    """Steps of the program, q's mean and std, and the constraint, by loops over distinct steps.

    A step from which responses go on differently has several temporal differences: the constraint is their average.
    """
    nodes = distinct_steps(sequences)
    count = 1 + max(int(n.max()) for n in nodes)
    rows, densities = {}, {node: [] for node in range(count)}
    mean, std = torch.zeros(count).double(), torch.zeros(count).double()
    actions = torch.zeros(count, dtype=torch.int64)
    beta, discount = program.rationality, program.discount
    visits = torch.zeros(len(sequences), count, dtype=torch.float64)
    for item, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
        logits, of_state, m, s = plain(network, prompt, response)
        if program.reward.values == "logits":
            table = logits / beta
        else:
            table = logits.log_softmax(-1) / beta + of_state[:, None]
        for place, node in enumerate(nodes[item].tolist()):
            visits[item, node] += 1
            rows[node], actions[node] = table[place], response[place]
            mean[node], std[node] = m[place], s[place].clamp_min(math.log(engine.min_std)).exp()
            last = place == len(response) - 1
            after = 0.0
            if not last:
                after = table[place + 1, response[place + 1]]
                if engine.next_value == "soft":
                    after = torch.logsumexp(beta * table[place + 1], 0) / beta
            difference = table[place, response[place]] - discount * after
            known = not last or sequences.ended[item]
            density = pyro.distributions.Normal(mean[node], std[node]).log_prob(difference)
            densities[node].append(float(density) if known else 0.0)
    table = torch.stack([rows[node] for node in range(count)])
    return table, actions, visits, mean, std, densities


def traced(program, steps, rewards, groups, latents=None):
    """Log joint of the program's trace at given rewards."""
    given = {"reward": rewards, **({} if latents is None else latents)}
    trace = pyro.poutine.trace(pyro.poutine.condition(program, given)).get_trace(steps, groups)
    return trace.log_prob_sum()


@pytest.mark.parametrize("next_value", ["trajectory", "soft"])
@pytest.mark.parametrize("values", ["head", "logits"])
def test_objective_of_demonstrations_is_trace_minus_guide_plus_constraint(folder, values, next_value):
    declared = program(folder, values=values, discount=0.9, rationality=1.7, prior=brm.priors.Gaussian(2.5))
    network = moved(declared)
    data = brm.Demonstrations.load(DEMONSTRATIONS)
    engine = AVRIL(next_value=next_value)
    with torch.no_grad():
        objective = DemonstrationObjective.of(engine, declared, network, data, 0)
        found = -float(objective.loss(torch.arange(3), 0))
        table, actions, visits, mean, std, densities = written_out(declared, network, objective.sequences, engine)
    # One of the responses is cut: nothing is known of what comes after its last token.
    assert not all(objective.sequences.ended)
    demonstrated = torch.tensor([1.0, 1.0, 2.0]).double() @ visits
    steps = Steps(table, actions, demonstrated, visits)
    q = pyro.distributions.Normal(mean, std)
    # log p(R) - log q(R) is quadratic in R: its mean under q is that over these two points.
    expected = sum(0.5 * (traced(declared, steps, at, ()) - q.log_prob(at).sum()) for at in (mean - std, mean + std))
    constraint = sum(np.mean(found) for found in densities.values())
    assert found == pytest.approx(float(expected + constraint), rel=1e-9)


def test_objective_of_preferences_is_trace_minus_guide_plus_constraint(folder):
    declared = program(folder, likelihood=brm.likelihoods.Davidson())
    network = moved(declared)
    rows = [*ROWS, {"prompt": "w5", "responses": ["w6 w7", "w1"], "tie": True}][:3]
    data = brm.Comparisons.load(rows)
    engine = AVRIL(num_particles=6)
    with torch.no_grad():
        objective = PreferenceObjective.of(engine, declared, network, data, 3)
        objective.latents = objective.initial_latents + 0.2
        found = -float(objective.loss(torch.arange(3), 5) + objective.prior_loss())
        table, actions, visits, mean, std, densities = written_out(declared, network, objective.sequences, engine)
        steps = Steps(table, actions, torch.zeros(len(actions)).double(), visits)
        groups = [g.map_arrays(lambda a: a.double() if a.is_floating_point() else a) for g in data.groups()]
        latents = objective.density.constrain(objective.latents)
        # Of the constrained density; that of the unconstrained latents has the Jacobian beside.
        jacobian = objective.density.log_priors(objective.latents[None])[0] - sum(
            site["fn"].log_prob(site["value"]).sum()
            for name, site in pyro.poutine.trace(pyro.poutine.condition(declared, {**latents, "reward": mean}))
            .get_trace(steps, groups).nodes.items()
            if name in latents
        )  # fmt: skip
        draws = particles(objective, mean, std)
        expected = sum(traced(declared, steps, at, groups, latents) for at in draws) / len(draws)
        # The draws have the mean and the variance of q in the limit alone; divergence is exact on both sides.
        prior = pyro.distributions.Normal(0.0, 1.0)
        expected = expected - sum(prior.log_prob(at).sum() for at in draws) / len(draws)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        # The chosen response of the first two rows goes through its steps twice.
        occurrences = weights_of(objective)
        constraint = sum(np.average(found, weights=occurrences[node]) for node, found in densities.items())
    assert found == pytest.approx(float(expected + jacobian - divergence + constraint), rel=1e-9)


def weights_of(objective):
    """How often each item that has a step is met in the rows, by step, in the order of the items."""
    times = np.zeros(len(objective.nodes))
    for group, row in objective.places:
        for item in objective.rows[group][row]:
            times[item] += 1
    found = {}
    for item, nodes in enumerate(objective.nodes):
        for node in nodes.tolist():
            found.setdefault(node, []).append(times[item])
    return found


def particles(objective, mean, std):
    """The mirrored draws of the objective for micro-batch 5, with seed 3."""
    from bayesrm.engines._avril_text import _mixed

    items = np.unique(np.concatenate([objective.rows[g][r] for g, r in objective.places]))
    nodes = [objective.nodes[item] for item in items]
    padded = np.zeros((len(items), max(map(len, nodes))), dtype=np.int64)
    for place, own in enumerate(nodes):
        padded[place, : len(own)] = own
    distinct = np.unique(padded)
    noise = torch.randn(3, len(distinct), generator=torch.Generator().manual_seed(_mixed(3, 5))).double()
    placed = torch.zeros(3, len(mean)).double()
    placed[:, torch.from_numpy(distinct)] = noise
    return [mean + sign * std * part for sign in (1, -1) for part in placed]


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_a_partition_of_the_rows_adds_up(gpt2, kind):
    declared = program(gpt2)
    network = moved(declared)
    with torch.no_grad():
        if kind == "demonstrations":
            data = brm.Demonstrations.load(DEMONSTRATIONS)
            objective = DemonstrationObjective.of(AVRIL(), declared, network, data, 0)
        else:
            objective = PreferenceObjective.of(AVRIL(), declared, network, brm.Comparisons.load(ROWS), 0)
            # Draws belong to a micro-batch; without noise its number does not count.
            network.heads.weight[1], network.heads.bias[1] = 0.0, -20.0
        whole = float(objective.loss(torch.arange(3), 0))
        parts = sum(float(objective.loss(torch.tensor([row]), 1 + row)) for row in range(3))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_a_shared_beginning_counts_once(gpt2):
    declared = program(gpt2)
    network = moved(declared)
    with torch.no_grad():
        objective = PreferenceObjective.of(AVRIL(), declared, network, brm.Comparisons.load(ROWS), 0)
    # w3 w4 of the first prompt stand in three candidates, the whole chosen one in two rows.
    assert len({int(node) for nodes in objective.nodes for node in nodes}) == 4 + 3 + 2 + 3 + 5
    assert objective.evaluate(2)["steps"] == pytest.approx(4 + 3 + 2 + 3 + 5)
    assert objective.evaluate(3)["kl"] == pytest.approx(objective.evaluate(1)["kl"], rel=1e-6)


def fitted(folder, data=None, *, declared=None, **training):
    data = brm.Comparisons.load(ROWS) if data is None else data
    settings = Training(**{"epochs": 2.0, "batch_size": 2, "learning_rate": 1e-2} | training)
    return brm.fit(declared or program(folder, dtype="float32"), data, inference=AVRIL(training=settings), seed=1)


def test_posterior_predicts_selects_and_is_saved(folder, tmp_path):
    posterior = fitted(folder)
    assert isinstance(posterior, TokenPosterior)
    prompts, candidates = ["w1 w2", "w5"], [["w3 w4 w5", "w3 w4 w0 w1", "w2"], ["w6 w7"]]
    belief = posterior.predict(prompts, candidates)
    tokens = posterior.predict_tokens([prompts[0]] * 3, candidates[0])
    mean, std = tokens.sums()
    torch.testing.assert_close(belief.mean[0], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(belief.std[0], std, rtol=1e-5, atol=1e-6)
    # The rewards of the shared w3 w4 cancel in the difference of the first two candidates.
    variance = tokens.std.square()
    apart = variance[0, 2:].sum() + variance[1, 2:].sum()
    assert float(belief[0].differences(baseline=1).variance[0, 0]) == pytest.approx(float(apart), rel=1e-4)
    assert brm.select(belief).shape == (2,)
    posterior.save_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(again.predict(prompts, candidates).mean, belief.mean)
    torch.testing.assert_close(again.predict(prompts, candidates).covariance, belief.covariance)
    assert "AVRIL" in again.summary()


def test_predicted_feedback_is_that_of_draws_of_the_belief(gpt2):
    posterior, data = fitted(gpt2), brm.Comparisons.load(ROWS)
    found = posterior.predict_feedback(data, num_samples=20000, seed=0).log_prob.exp()
    belief = posterior.predict_items(data)
    for row, group in ((0, 0), (2, 1)):
        texts = [data.text(i) for i in range(data.num_items)]
        own = [i for i, (prompt, _) in enumerate(texts) if prompt == ROWS[row]["prompt"]]
        at = {texts[i][1]: place for place, i in enumerate(own)}
        draws = belief.sample(20000, seed=1)[:, group]
        gap = draws[:, at[ROWS[row]["chosen"]]] - draws[:, at[ROWS[row]["rejected"]]]
        # Two averages of 20,000 probabilities, each of standard error below 0.5 / sqrt(20,000).
        assert float(found[row]) == pytest.approx(float(torch.sigmoid(gap).mean()), abs=4.5 * 0.0036 * 2**0.5)


def test_same_seed_same_posterior_and_resume_is_exact(gpt2, tmp_path):
    whole = fitted(gpt2, epochs=3.0, batch_size=1, output_dir=str(tmp_path / "whole"), save_steps=2)
    again = fitted(gpt2, epochs=3.0, batch_size=1)

    class Dies(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(gpt2, epochs=3.0, batch_size=1, output_dir=str(tmp_path / "cut"), save_steps=2, callbacks=(Dies(),))
    resumed = fitted(gpt2, epochs=3.0, batch_size=1, output_dir=str(tmp_path / "cut"), save_steps=2)
    assert resumed.report.training["resumed_from"].endswith("checkpoint-4")
    finished = fitted(gpt2, epochs=3.0, batch_size=1, output_dir=str(tmp_path / "cut"), save_steps=2)
    own = whole.head.scorer.sites
    for other in (again, resumed, finished):
        for name, parameter in other.head.scorer.sites.items():
            assert torch.equal(parameter, own[name]), name


def test_action_values_are_a_policy(gpt2, tmp_path):
    declared = program(gpt2, dtype="float32", most=8)
    posterior = fitted(gpt2, brm.Demonstrations.load(DEMONSTRATIONS), declared=declared, epochs=20.0)
    network = posterior.head.scorer
    network.save_policy(tmp_path / "policy")
    policy = brm.alignment.Policy.from_pretrained(str(tmp_path / "policy"), max_prompt_tokens=8, max_new_tokens=8)
    prompts, responses = ["w1 w2", "w5"], ["w3 w4 w5", "w6 w7"]
    with torch.no_grad():
        found = policy.log_probs(policy.encode(prompts, responses))
        expected = network.steps(network.encode(prompts, responses)).log_probs.sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = brm.alignment.Policy.from_pretrained(gpt2, max_prompt_tokens=8, max_new_tokens=8)
    with torch.no_grad():
        assert bool((expected > before.log_probs(before.encode(prompts, responses)) + 1.0).all())


def test_latents_have_a_learning_rate_of_their_own(gpt2):
    declared = program(gpt2, dtype="float32", likelihood=brm.likelihoods.Davidson())
    widths = []
    for rate in (1e-6, 0.5):
        posterior = fitted(gpt2, declared=declared, latent_learning_rate=rate)
        widths.append(float(posterior.unconstrained_latents[0, 0]))
    start = fitted(gpt2, declared=declared, epochs=0.0).unconstrained_latents[0, 0]
    assert widths[0] == pytest.approx(float(start), abs=1e-3)
    # No row is a tie.
    assert widths[1] < float(start) - 0.3


def test_what_is_cut_is_said(gpt2, caplog):
    posterior = fitted(gpt2)
    belief = posterior.predict_tokens(["w5"], ["w6 w7 w6 w6 w6 w6 w6 w6"])
    assert "1 of 1 responses have more than 6 tokens" in caplog.text
    assert "(cut here: 6 more characters were not read)" in str(brm.diagnostics.credit(belief))


def test_the_default_engine_keeps_the_entropy(gpt2, caplog):
    from bayesrm.engines.base import _default_engine

    data = brm.Comparisons.load(ROWS)
    assert _default_engine(program(gpt2), data).constraint_weight == 0.1
    fitted(gpt2)
    assert "the posterior loses its entropy" in caplog.text


def test_what_is_refused(gpt2):
    comparisons = brm.Comparisons.load(ROWS)
    with pytest.raises(DataError, match="InverseRL explains Comparisons or Demonstrations"):
        brm.fit(program(gpt2), brm.Corrections.load([{"prompt": "a", "response": "b", "corrected": "c"}]))
    with pytest.raises(EngineError, match=r"Laplace cannot serve an InverseRL; use AVRIL\(\)$"):
        brm.fit(program(gpt2), comparisons, inference=brm.Laplace())
    with pytest.raises(EngineError, match=r"AVRIL cannot serve a RewardModel"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry()), comparisons, inference=AVRIL())
    with pytest.raises(ArgumentError, match="`discount` is 0"):
        program(gpt2, discount=0.0)
    with pytest.raises(ArgumentError, match="even number"):
        AVRIL(num_particles=3)
    with pytest.raises(ArgumentError, match="`kl_weight` is inf"):
        AVRIL(kl_weight=math.inf)
    with pytest.raises(ArgumentError, match="must be a program"):
        brm.fit(InverseRL, comparisons)
    settings = program(gpt2, dtype="float32").reward.to_config() | {"on_long": "raise"}
    strict = TokenReward.from_config(settings).load()
    with pytest.raises(DataError, match="row 6: the response") as refused:
        strict.encode(["w1", "w1"], ["w2", "w2 w2 w2 w2 w2 w2 w2"], start=5)
    assert "row 1" not in str(refused.value)
    with pytest.raises(ArgumentError, match="reads texts"):
        fitted(gpt2).predict(candidates=[np.eye(2)])
