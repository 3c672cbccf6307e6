"""The program against its log joint summed by hand, and what data ask a corrector to write."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from pyro import poutine

import bayesrm as brm
from bayesrm.errors import ArgumentError, DataError
from bayesrm.programs import LanguageFeedback
from bayesrm.programs.language_feedback import padded_targets
from bayesrm.rewards import Corrector

from ..rewards import corrector_models as models

PROGRAM = LanguageFeedback(Corrector("any/model"))


def mappings(rewrites):
    """Weight of each (prompt, response, target)."""
    texts = zip(rewrites.prompts, rewrites.responses, rewrites.targets, strict=True)
    return dict(zip(texts, rewrites.weight.tolist(), strict=True))


class TestRewrites:
    def test_a_pair_is_a_correction_and_an_identity(self):
        data = brm.Comparisons.from_pairs(["q"], ["good"], ["bad"], weight=[2.0])
        program = dataclasses.replace(PROGRAM, identity_weight=0.25, correction_weight=3.0)
        found = program.rewrites(data)
        assert mappings(found) == {("q", "bad", "good"): 6.0, ("q", "good", "good"): 0.5}
        assert (len(found), found.corrections, found.tied_rows, found.masked_rows) == (2, 1, 0, 0)

    def test_a_response_that_was_left_as_it_is_is_an_identity_alone(self):
        rows = [
            {"prompt": "q", "response": "good", "corrected": "good"},
            {"prompt": "q", "response": "b", "corrected": "c"},
        ]
        program = dataclasses.replace(PROGRAM, identity_weight=0.25, correction_weight=3.0)
        found = program.rewrites(brm.Corrections.load(rows))
        assert mappings(found) == {("q", "good", "good"): 0.25, ("q", "b", "c"): 3.0, ("q", "c", "c"): 0.25}
        assert found.corrections == 1

    @pytest.mark.parametrize("settings", [{"identity_weight": float("inf")}, {"agreement": -1.0, "departure": 1.0}])
    def test_settings_are_checked(self, settings):
        with pytest.raises(ArgumentError, match=f"`{next(iter(settings))}` is"):
            dataclasses.replace(PROGRAM, **settings)

    def test_several_candidates_are_pairs_with_the_best(self):
        choice = {"prompt": "q", "responses": ["a", "b", "c"], "choice": 1}
        found = mappings(PROGRAM.rewrites(brm.Comparisons.load([choice])))
        assert found == {("q", "a", "b"): 1.0, ("q", "c", "b"): 1.0, ("q", "b", "b"): 2.0}
        ranking = {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranking": [2, 0]}
        found = mappings(PROGRAM.rewrites(brm.Comparisons.load([ranking])))
        assert found == {("q", x, "c"): 1.0 for x in "abd"} | {("q", "c", "c"): 3.0}

    def test_equal_mappings_are_merged_and_ties_and_masked_rows_counted(self):
        rows = [
            {"prompt": "q", "responses": ["a", "b"], "choice": 0},
            {"prompt": "q", "responses": ["a", "c"], "choice": 0},
            {"prompt": "q", "responses": ["b", "c"], "choice": "tie"},
            {"prompt": "p", "responses": ["b", "c"], "choice": 0, "weight": 0.0},
        ]
        found = PROGRAM.rewrites(brm.Comparisons.load(rows))
        assert mappings(found) == {("q", "b", "a"): 1.0, ("q", "a", "a"): 2.0, ("q", "c", "a"): 1.0}
        assert (found.tied_rows, found.masked_rows) == (1, 1)
        assert found.prompt_index.tolist() == [0, 0, 0]

    def test_human_corrections_are_targets(self):
        rows = [
            {"prompt": "q", "response": "5", "corrected": "4"},
            {"prompt": "p", "response": "5", "corrected": "4", "weight": 2.0},
            {"prompt": "p", "response": "6", "corrected": "4"},
        ]
        found = PROGRAM.rewrites(brm.Corrections.load(rows))
        expected = {("q", "5", "4"): 1.0, ("q", "4", "4"): 1.0}
        expected |= {("p", "5", "4"): 2.0, ("p", "6", "4"): 1.0, ("p", "4", "4"): 3.0}
        assert mappings(found) == expected
        assert found.prompt_index.tolist() == [0, 0, 1, 1, 1]
        assert found.corrections == 3

    def test_one_mapping_alone(self):
        data = brm.Comparisons.from_pairs(["q"], ["good"], ["bad"])
        only = dataclasses.replace(PROGRAM, identity_weight=0.0).rewrites(data)
        assert mappings(only) == {("q", "bad", "good"): 1.0}

    def test_what_names_no_better_response_is_refused(self):
        rated = brm.Comparisons.load([{"prompt": "q", "response": "a", "rating": 3}], levels=(1, 5))
        with pytest.raises(DataError, match="row 0 is a rating, which names no better response"):
            PROGRAM.rewrites(rated)
        ties = brm.Comparisons.load([{"prompt": "q", "responses": ["a", "b"], "choice": "tie"}])
        with pytest.raises(DataError, match=r"1 of 1 rows are ties"):
            PROGRAM.rewrites(ties)
        arrays = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]], outcome=[0])
        with pytest.raises(DataError, match="features without texts"):
            PROGRAM.rewrites(arrays)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"identity_weight": -1.0}, "`identity_weight` is -1.0"),
            ({"identity_weight": 0.0, "correction_weight": 0.0}, "leaves nothing to learn"),
            ({"scoring": "paper"}, "`scoring`"),
            ({"agreement": math.inf}, "`agreement`"),
        ],
    )
    def test_settings_that_cannot_be_used_are_refused(self, settings, message):
        with pytest.raises(ArgumentError, match=message):
            LanguageFeedback(**({"corrector": PROGRAM.corrector} | settings))

    def test_settings_alone_do_not_run(self):
        with pytest.raises(ArgumentError, match="holds settings alone"):
            PROGRAM([], torch.zeros(0, 1, dtype=torch.int64), torch.ones(0))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_log_joint_is_prior_plus_weighted_likelihood(family, tmp_path):
    corrector = Corrector(
        models.FAMILIES[family](tmp_path), rank=2, dtype="float64", device="cpu", template=models.TEMPLATE,
        max_prompt_tokens=24, max_response_tokens=12,
    )  # fmt: skip
    network = corrector.load(0)
    prior = brm.priors.Gaussian({"*.lora_A": 2.0, "*": 0.5})
    program = LanguageFeedback(network, prior)
    prompts, responses, targets = models.texts(4)
    readings = network.encode(prompts, responses)
    written = padded_targets([reading.response for reading in network.encode(prompts, targets)])
    assert bool((written == -1).any())
    weight = torch.tensor([1.0, 0.0, 2.5, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    theta = network.theta() + 0.3 * torch.randn(network.num_parameters, generator=generator, dtype=torch.float64)
    values = network.split(theta)
    conditioned = poutine.condition(program, data={f"corrector.{site}": v for site, v in values.items()})
    trace = poutine.trace(conditioned).get_trace(readings, written, weight)
    expected = 0.0
    for site, value in values.items():
        spread = prior.of(site) ** -0.5
        expected += float(torch.distributions.Normal(network.initial[site], spread).log_prob(value).sum())
    with network.weights(theta), torch.no_grad():
        for row, factor in enumerate(weight.tolist()):
            one = network.log_likelihood([prompts[row]], [responses[row]], [targets[row]])
            expected += factor * float(one)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, rel=1e-12)
    assert {name for name in trace.nodes if name.startswith("corrector.")} == {f"corrector.{s}" for s in values}
    assert trace.nodes["target"]["is_observed"]


def test_nothing_is_drawn(tmp_path):
    network = Corrector(models.gpt2(tmp_path), rank=2, device="cpu", template=models.TEMPLATE, max_prompt_tokens=24,
                        max_response_tokens=12).load(0)  # fmt: skip
    program = poutine.uncondition(LanguageFeedback(network))
    readings = network.encode(["w1"], ["w2"])
    with pytest.raises(ArgumentError, match="are not drawn by the program"):
        program(readings, padded_targets([readings[0].response]), torch.ones(1))
