"""Fits of correctors: the loss against the trace, members by hand, errors found in a world with known errors."""

import dataclasses

import numpy as np
import pytest
import torch
from pyro import poutine

import bayesrm as brm
from bayesrm.alignment import Policy, align, projections, targets
from bayesrm.alignment.method import Method
from bayesrm.diagnostics import report as write_report
from bayesrm.engines import MAP, Ensemble, Posterior, TokenPosterior, Training
from bayesrm.engines._language_feedback import CorrectorLoss, _anchor, _loaded, _reweighted
from bayesrm.engines._lora_ensemble import Member
from bayesrm.engines._module_training import RowBatches, RowsLoss
from bayesrm.errors import ArgumentError, ConvergenceWarning, EngineError
from bayesrm.programs import LanguageFeedback
from bayesrm.programs.language_feedback import padded_targets
from bayesrm.rewards import Corrector
from bayesrm.rewards._corrector_scores import ScoreRule

from ..alignment import policies
from ..rewards import corrector_models as models


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return models.gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return models.t5(tmp_path_factory.mktemp("t5"))


def declare(path, *, rank=2, dtype="float32", precision=1.0, **settings):
    corrector = Corrector(
        path, rank=rank, dtype=dtype, device="cpu", template=models.TEMPLATE, max_prompt_tokens=16,
        max_response_tokens=12,
    )  # fmt: skip
    return LanguageFeedback(corrector, brm.priors.Gaussian(precision), **settings)


def pairs(rows=9, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        a, b = (" ".join(rng.choice(models.WORDS[:20], size=rng.integers(1, 7))) + f" w{37 - k}" for k in range(2))
        made.append({"prompt": f"w{i % 5}", "responses": [a, b], "choice": "tie" if i % 4 == 3 else int(i % 2)})
    return brm.Comparisons.load(made)


def corrections(rows=6, seed=0):
    prompts, responses, _ = models.texts(rows, seed=seed)
    return brm.Corrections.load(
        [{"prompt": p, "response": f"{r} w1", "corrected": f"{r} w2"} for p, r in zip(prompts, responses, strict=True)]
    )


#: Settings of training as short as can be.
SHORT = Training(epochs=1.0, batch_size=4, learning_rate=5e-3)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("kind", ["comparisons", "corrections"])
def test_loss_over_a_partition_is_the_negative_log_joint_of_the_trace(family, kind, request):
    program = declare(request.getfixturevalue(family), dtype="float64", precision=2.0, identity_weight=0.5)
    data = pairs() if kind == "comparisons" else corrections()
    loss, rewrites = _loaded(program, data, 0)
    network = models.moved(loss.network)
    count = len(rewrites)
    batches = RowBatches(loss.lengths, batch_size=4, step_size=1, group_by_length=True, seed=0)
    assert len(batches) > 2
    module = RowsLoss(network, loss.of_rows, loss.prior, num_rows=count, num_batches=len(batches))
    with torch.no_grad():
        average = float(torch.stack([module(**batches[i]) for i in range(len(batches))]).mean())
    live = poutine.condition(
        dataclasses.replace(program, corrector=network),
        data={f"corrector.{site}": p.detach() for site, p in network.sites.items()},
    )
    weight = torch.from_numpy(rewrites.weight)
    trace = poutine.trace(live).get_trace(loss.readings, padded_targets(loss.targets), weight)
    assert count * average == pytest.approx(-float(trace.log_prob_sum()), rel=1e-12)


def test_the_gradient_norm_is_that_of_the_log_joint(gpt2):
    loss, _ = _loaded(declare(gpt2, dtype="float64", precision=4.0), pairs(), 0)
    models.moved(loss.network)
    whole = loss.of_rows(torch.arange(len(loss.targets))) + loss.prior()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(whole, list(loss.network.sites.values()))])
    assert loss.gradient_norm(3) == pytest.approx(float(gradient.norm()) / 2.0, rel=1e-9)


@pytest.fixture(scope="module")
def of_decoder(gpt2):
    return fit_both(gpt2)


@pytest.fixture(scope="module")
def of_two_parts(t5):
    return fit_both(t5)


@pytest.fixture(params=["of_decoder", "of_two_parts"])
def fitted(request):
    return request.getfixturevalue(request.param)


def fit_both(path):
    data = pairs(12)
    single = brm.fit(declare(path), data, inference=MAP(training=SHORT), seed=1)
    members = brm.fit(
        declare(path, scoring="log_ratio"), data, inference=Ensemble(num_members=3, training=SHORT), seed=1
    )
    return data, single, members


PROMPTS = ["w1 w2", "w3"]
CANDIDATES = [["w4 w5", "w6", "w7 w8 w9"], ["w10", "w11 w12"]]


class TestPosterior:
    def test_one_corrector_has_no_uncertainty_and_several_have(self, fitted):
        _, single, members = fitted
        assert isinstance(single, TokenPosterior)
        assert single.head.num_features == 1
        assert members.head.num_features == 3
        tokens = single.predict_tokens(["w1 w2"], ["w4 w5"])
        assert tokens.tokens(0) == ["w4", "w5", ""]
        assert set(tokens.mean[0].tolist()) <= {1.0, -1.0, 0.0}
        assert not tokens.total_std.any()
        uncertain = members.predict_tokens(["w1 w2"], ["w4 w5"])
        assert uncertain.draws.shape == (3, 1, 3)
        assert bool((uncertain.total_std > 0).all())
        assert bool((uncertain.mean <= 0).all())

    def test_rewards_are_the_sums_of_scores_and_decisions_follow(self, fitted):
        for posterior in fitted[1:]:
            belief = posterior.predict(PROMPTS, CANDIDATES)
            assert belief.mean.shape == (2, 3)
            sums, std = posterior.predict_tokens(["w1 w2"] * 3, CANDIDATES[0]).sums()
            torch.testing.assert_close(belief.mean[0], sums)
            torch.testing.assert_close(belief.std[0], std)
            picks = brm.select(belief, rule=brm.selection.LowerConfidenceBound(k=1.0))
            assert len(picks) == 2

    def test_reports_say_what_was_done(self, fitted):
        data, single, members = fitted
        rows = single.report.training
        assert rows["tied_rows"] == 3
        assert rows["corrections"] == 9
        assert rows["identities"] == 9
        assert rows["shortened"] == 0
        assert single.report.gradient_norm > 0
        assert not single.report.converged
        assert members.report.training["steps"] == 3 * rows["steps"]
        assert single.report.num_rows == len(data)
        assert "LanguageFeedback reward" in single.summary()

    def test_saved_and_read_again(self, fitted, tmp_path):
        for posterior in fitted[1:]:
            posterior.save_pretrained(tmp_path / "run")
            again = Posterior.from_pretrained(tmp_path / "run")
            belief, expected = again.predict(PROMPTS, CANDIDATES), posterior.predict(PROMPTS, CANDIDATES)
            assert torch.equal(belief.mean, expected.mean)
            assert dataclasses.replace(again.report, gradient_norm=0.0) == dataclasses.replace(
                posterior.report, gradient_norm=0.0
            )

    def test_it_predicts_choices_and_goes_to_arviz_and_into_the_report(self, of_decoder, tmp_path):
        _, _, members = of_decoder
        held_out = pairs(16, seed=7).select([0, 1, 2, 4, 5, 6, 8, 9])
        prediction = members.predict_feedback(held_out)
        rewards = members.draw(held_out, num_samples=3).rewards
        group = held_out.groups()[0]
        gaps = rewards[:, group.items[:, 0]] - rewards[:, group.items[:, 1]]
        chosen = torch.where(group.outcome == 0, gaps, -gaps).sigmoid().mean(0).log()
        torch.testing.assert_close(prediction.log_prob[group.rows], chosen, rtol=1e-9, atol=1e-9)
        assert members.to_arviz(held_out).posterior["reward"].shape[-1] == held_out.num_items
        page = write_report(members, held_out, tmp_path / "report.html")
        assert page is not None

    def test_a_policy_is_aligned_by_it(self, fitted):
        _, single, _ = fitted
        policy = policies.policy("gpt2", count=20, limits=(8, 4))
        method = Method(targets.BestOfN(2), projections.BestAndWorst(n=2), proposal="reference", num_candidates=2)
        training = Training(epochs=1.0, batch_size=2, learning_rate=1e-3)
        done = align(
            policy, single, ["w1 w2", "w3"], method=method, rounds=1, prompts_per_round=2, training=training, seed=0
        )
        assert done.steps >= 1
        assert isinstance(policy, Policy)


@pytest.mark.parametrize(
    "randomisation", ["both", *(pytest.param(r, marks=pytest.mark.slow) for r in ("anchored", "bootstrap"))]
)
def test_members_are_those_that_are_trained_by_hand(gpt2, randomisation):
    data, program = pairs(8), declare(gpt2, precision=2.0)
    training = Training(max_steps=2, batch_size=4, learning_rate=5e-3)
    engine = Ensemble(num_members=2, randomisation=randomisation, training=training)
    posterior = brm.fit(program, data, inference=engine, seed=3)
    scorer = posterior.head.scorer
    for number in range(2):
        member = Member.of(3, number)
        loss, rewrites = _loaded(program, data, 3)
        network = loss.network
        if randomisation != "bootstrap":
            network.set_initial(_anchor(member, loss, network.initial_theta()))
        if randomisation != "anchored":
            loss = _reweighted(member, loss, rewrites, data.num_prompts)
        loss.train(training, seed=member.order_seed, progress=False)
        assert torch.equal(scorer.draws[number], network.theta())
    start = program.corrector.load(3).theta()
    assert torch.equal(scorer.network.initial_theta(), start)


def test_perturbations_of_members_are_those_that_are_declared(gpt2):
    program = dataclasses.replace(declare(gpt2), prior=brm.priors.Gaussian({"*.lora_A": 4.0, "*": 0.25}))
    loss, rewrites = _loaded(program, pairs(40), 0)
    center = loss.network.initial_theta()
    anchors = torch.stack([_anchor(Member.of(0, i), loss, center) - center for i in range(200)])
    for site, part in zip(
        loss.network.sites, anchors.split([p.numel() for p in loss.network.sites.values()], dim=1), strict=True
    ):
        spread = program.prior.of(site) ** -0.5
        assert float(part.std()) == pytest.approx(spread, rel=4.5 / (2 * part.numel()) ** 0.5)
    factors = np.stack(
        [(_reweighted(Member.of(0, i), loss, rewrites, 5).weight / loss.weight).numpy() for i in range(400)]
    )
    # Five prompts: as many different weights, each Exp(1).
    assert all(len(np.unique(row.round(9))) == 5 for row in factors)
    assert np.allclose(factors.mean(0), 1.0, atol=4.5 / 20)


def test_a_run_goes_on_where_it_stopped(gpt2, tmp_path):
    training = dataclasses.replace(SHORT, epochs=2.0, output_dir=str(tmp_path / "run"))
    whole = brm.fit(
        declare(gpt2), pairs(), inference=MAP(training=dataclasses.replace(training, output_dir=None)), seed=2
    )
    first = brm.fit(declare(gpt2), pairs(), inference=MAP(training=training), seed=2)
    again = brm.fit(declare(gpt2), pairs(), inference=MAP(training=training), seed=2)
    for posterior in (first, again):
        assert torch.equal(posterior.head.scorer.draws, whole.head.scorer.draws)
    assert again.report.training["resumed_from"] == str(tmp_path / "run")


class TestRefusals:
    def test_engines_that_cannot_serve_it_name_those_that_can(self, gpt2):
        with pytest.raises(EngineError, match=r"Laplace cannot serve a LanguageFeedback; use .*MAP\(\)"):
            brm.fit(declare(gpt2), pairs(), inference=brm.Laplace())

    def test_settings_without_meaning_here(self, gpt2):
        with pytest.raises(EngineError, match="prior_precision='given'"):
            brm.fit(declare(gpt2), pairs(), inference=MAP(prior_precision="marginal_likelihood"))
        with pytest.raises(ArgumentError, match="`training` has 0 epochs"):
            brm.fit(declare(gpt2), pairs(), inference=Ensemble(num_members=2, training=Training(epochs=0.0)))
        program = dataclasses.replace(declare(gpt2), prior=brm.priors.Gaussian({"*": 1.0, "head": 2.0}))
        with pytest.raises(ArgumentError, match="fits no parameter site"):
            brm.fit(program, pairs(), inference=MAP(training=SHORT))
        loaded = dataclasses.replace(declare(gpt2), corrector=declare(gpt2).corrector.load())
        with pytest.raises(ArgumentError, match="`corrector` is a loaded network"):
            brm.fit(loaded, pairs(), inference=MAP(training=SHORT))

    def test_a_run_that_a_callback_stops_warns(self, gpt2):
        import transformers

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = True

        training = dataclasses.replace(SHORT, callbacks=(Stop(),))
        with pytest.warns(ConvergenceWarning, match="training stopped after 1 of"):
            brm.fit(declare(gpt2), pairs(), inference=MAP(training=training))


def errors_world(rows, seed):
    """Words above w20 are errors for the word 20 below; a response has one or none at each place."""
    rng = np.random.default_rng(seed)
    made, places = [], []
    for _ in range(rows):
        good = rng.integers(0, 8, size=4)
        wrong = rng.random(4) < 0.4
        wrong[rng.integers(4)] = True
        made.append(
            {
                "prompt": "w30",
                "response": " ".join(f"w{w + 20 * e}" for w, e in zip(good, wrong, strict=True)),
                "corrected": " ".join(f"w{w}" for w in good),
            }
        )
        places.append(wrong)
    return made, np.stack(places)


@pytest.mark.slow
def test_errors_are_found_in_a_world_with_known_errors(tmp_path):
    """Scores of held-out responses rank right words above errors; those of an untrained corrector do not."""
    program = declare(models.gpt2(tmp_path, width=32, spread=0.1), rank=0, precision=0.1)
    data = brm.Corrections.load(errors_world(400, seed=0)[0])
    held_out, places = errors_world(60, seed=1)
    prompts, responses = [r["prompt"] for r in held_out], [r["response"] for r in held_out]
    training = Training(max_steps=130, batch_size=32, learning_rate=1e-2)
    found = {}
    for name, settings in (("trained", training), ("untrained", Training(epochs=0.0))):
        posterior = brm.fit(program, data, inference=MAP(training=settings), seed=0)
        for scoring in ("divergence", "log_ratio"):
            scorer = dataclasses.replace(posterior.head.scorer, rule=ScoreRule(scoring))
            scores = torch.stack([s.draws[0, :4] for s in scorer.score(prompts, responses)]).numpy()
            right, wrong = scores[~places], scores[places]
            higher, equal = right[:, None] > wrong, right[:, None] == wrong
            found[name, scoring] = float(higher.mean() + 0.5 * equal.mean())
    assert found["trained", "log_ratio"] > 0.95
    assert found["trained", "divergence"] > 0.9
    assert abs(found["untrained", "log_ratio"] - 0.5) < 0.25
    assert abs(found["untrained", "divergence"] - 0.5) < 0.1


def test_the_loss_reads_what_the_program_declares(gpt2):
    loss, rewrites = _loaded(declare(gpt2), corrections(), 0)
    assert isinstance(loss, CorrectorLoss)
    assert len(loss.targets) == len(rewrites)
    assert loss.identity() == _loaded(declare(gpt2), corrections(), 0)[0].identity()
    assert loss.identity() != _loaded(declare(gpt2), corrections(seed=1), 0)[0].identity()
