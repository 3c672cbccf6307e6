"""Pairwise preferences, cycles included, in simulation-based calibration and in the report."""

import dataclasses
import re

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.diagnostics._report import examine
from bayesrm.diagnostics._report._evidence import gather
from bayesrm.diagnostics.sbc import simulation_based_calibration
from bayesrm.errors import DataError, LikelihoodError

MODEL = brm.RewardModel(brm.rewards.PairwisePreference(rank=2), brm.likelihoods.BradleyTerry())
CORRECTED = brm.ImportanceSampling(brm.Laplace(), num_samples=500, degrees_of_freedom=10.0)


def comparisons(prompts=12, per_prompt=3, num_features=3, seed=0, **columns):
    """Every pair of the responses of each prompt, their order mixed, in random features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(prompts * per_prompt, num_features))
    rows, prompt = [], np.repeat(np.arange(prompts), per_prompt)
    for p in range(prompts):
        first = p * per_prompt
        rows += [[first + i, first + j] for i in range(per_prompt) for j in range(i)]
    pairs = np.array([row[::-1] if rng.random() < 0.5 else row for row in rows])
    outcome = rng.integers(0, 2, len(pairs))
    return brm.Comparisons.from_arrays(features, candidates=pairs, outcome=outcome, prompt_index=prompt, **columns)


@dataclasses.dataclass(frozen=True)
class Faulty:
    """An engine whose draws are scaled by `scale` about their mean."""

    scale: float

    def fit(self, program, data, *, seed, progress):
        posterior = CORRECTED.fit(program, data, seed=seed, progress=progress)
        mean = posterior.z.mean(0)
        posterior.z = mean + self.scale * (posterior.z - mean)
        return posterior


class TestCalibration:
    @pytest.mark.slow
    def test_a_right_posterior_passes_and_a_narrow_one_is_caught(self):
        design = comparisons(prompts=4)
        right = simulation_based_calibration(MODEL, design, CORRECTED, num_replicates=40)
        first = design.groups()[0].items.tolist()
        assert right.names[0] == f"score[{first[0][0]}, {first[0][1]}]"
        assert right.names[-1] == "log joint"
        assert right.ranks.shape == (40 - len(right.refusals), 4)
        assert right.p_value > 0.01
        narrow = simulation_based_calibration(MODEL, design, Faulty(0.4), num_replicates=40)
        assert narrow.p_value < 0.01
        assert narrow.spread[:3].min() > 1.3

    def test_quantities_of_your_own_are_given_the_scores_of_rows(self):
        """Around a cycle a reward's scores sum to 0; the intransitive part alone does not."""
        design = comparisons(prompts=3)
        items = design.groups()[0].items
        sign = torch.where(items[:3, 0] > items[:3, 1], 1.0, -1.0).double() * torch.tensor([1.0, -1.0, 1.0]).double()
        seen = []

        def cycle(scores, latents):
            seen.append(scores)
            return {"around the cycle": scores[:, :3] @ sign}

        found = simulation_based_calibration(MODEL, design, brm.Laplace(), num_replicates=10, quantities=cycle)
        assert found.names == ("around the cycle",)
        assert seen[0].shape == (1, 9)
        # By hand: what the program draws, on the features of the responses.
        head = MODEL.reward.bind(design)
        f = torch.as_tensor(np.asarray(design.features)).double()
        encoded = head.encode_pairs(f[items[:, 0]], f[items[:, 1]])
        weight, *_ = torch.linalg.lstsq(encoded, seen[0][0][:, None])
        torch.testing.assert_close(encoded @ weight, seen[0][0][:, None], rtol=0, atol=1e-9)
        linear = encoded[:, :3] @ weight[:3, 0]
        assert abs(float(linear[:3] @ sign)) < 1e-9 < 0.01 < abs(float(seen[0][0, :3] @ sign))

    def test_a_checkpoint_knows_the_declared_program(self, tmp_path):
        file, design = tmp_path / "sbc.jsonl", comparisons(prompts=4)
        begun = simulation_based_calibration(MODEL, design, brm.Laplace(), num_replicates=10, checkpoint=file)
        again = simulation_based_calibration(MODEL, design, brm.Laplace(), num_replicates=10, checkpoint=file)
        np.testing.assert_array_equal(begun.ranks, again.ranks)
        assert "PairwisePreference" in file.read_text()

    def test_what_has_no_scores_is_refused(self):
        ratings = brm.Comparisons.load(
            [{"prompt": "p", "response": f"r{i}", "rating": i % 3} for i in range(6)]
        ).with_features(np.eye(6))
        with pytest.raises(DataError, match="a pairwise preference explains choices between two responses"):
            simulation_based_calibration(MODEL, ratings, brm.Laplace(), num_replicates=10)

        def absolute(rewards, comparison):
            return brm.likelihoods.BradleyTerry()(rewards.square(), comparison)

        model = dataclasses.replace(MODEL, likelihood=absolute)
        with pytest.raises(LikelihoodError, match="more than the difference of the two rewards"):
            simulation_based_calibration(model, comparisons(), brm.Laplace(), num_replicates=10)


@pytest.fixture(scope="module")
def posterior():
    return brm.fit(MODEL, comparisons(prompts=40, seed=1), inference=brm.Laplace())


class TestReport:
    def test_scores_of_rows_are_those_of_the_preferences(self, posterior):
        data = comparisons(prompts=5)
        evidence = gather(posterior, data, seed=0)
        mean, std, pair = evidence.contrasts()
        f = np.asarray(data.features)
        for group in data.groups():
            for row, (first, second) in zip(group.rows.tolist(), group.items.tolist(), strict=True):
                scores = posterior.predict_preferences(candidates=[f[[first, second]]]).scores
                assert mean[row] == pytest.approx(float(scores.mean[0, 1]), abs=1e-9)
                assert std[row] == pytest.approx(float(scores.std[0, 1]), abs=1e-9)
                assert pair[row].tolist() == [first, second]

    def test_items_have_the_mean_score_against_their_prompt(self, posterior):
        data = comparisons(prompts=5, per_prompt=4)
        evidence = gather(posterior, data, seed=0)
        f, prompt = np.asarray(data.features), np.asarray(data.prompt_of_item)
        for item in range(len(f)):
            own = torch.as_tensor(f[[item]]).expand(4, -1)
            against = torch.as_tensor(f[prompt == prompt[item]])
            encoded = posterior.program.reward.encode_pairs(own, against).mean(0)
            belief = posterior._belief(encoded[None], [1], None)
            assert evidence.deviation[item] == pytest.approx(float(belief.mean), abs=1e-9)
            assert evidence.spread[item] == pytest.approx(float(belief.std), abs=1e-9)

    def test_every_section_speaks_of_preferences(self, posterior, tmp_path):
        data, train, away = comparisons(prompts=40, seed=2), comparisons(prompts=40, seed=1), comparisons(seed=3)
        sections = examine(posterior, data, train=train, ood=away, seed=0)
        said = {s.name: f"{s.verdict} {s.body}" for s in sections}
        assert "Scores of pairs come from the features of both responses, intransitive in 2 directions" in said["model"]
        assert "the preference score is within one standard deviation" in said["uncertain"]
        assert "mean preference score" in said["uncertainty"]
        assert not re.search(r"[Rr]eward (of a response|difference)", said["uncertain"] + said["uncertainty"])
        page = brm.diagnostics.report(posterior, data, tmp_path / "report.html")
        assert "of a pair" in page.read_text()

    def test_annotators_are_judged_by_the_scores(self):
        """One who always follows the believed preference, one who never does, in data with cycles."""
        data = comparisons(prompts=60, seed=4)
        f, items = torch.as_tensor(np.asarray(data.features)).double(), data.groups()[0].items
        angle = torch.atan2(f[:, 1], f[:, 0])
        wins = (torch.sin(angle[items[:, 0]] - angle[items[:, 1]]) > 0).long()
        annotated = comparisons(prompts=60, seed=4, annotator=[i % 2 for i in range(len(data))])
        posterior = brm.fit(MODEL, data.with_outcomes([1 - wins]), inference=brm.Laplace())
        from bayesrm.diagnostics._report._annotators import _agreement

        answers = torch.where(torch.arange(len(data)) % 2 == 0, 1 - wins, wins)
        evidence = gather(posterior, annotated.with_outcomes([answers]), seed=0)
        hits, codes = _agreement(evidence)
        followed = (evidence.contrasts()[0] > 0) == (answers == 0).numpy()
        np.testing.assert_array_equal(hits, followed[data.groups()[0].rows.numpy()])
        assert hits[codes == 0].mean() > 0.6 > 0.4 > hits[codes == 1].mean()

    def test_chains_are_judged_too(self):
        data = comparisons(prompts=8)
        posterior = brm.fit(MODEL, data, inference=brm.NUTS(num_samples=200, num_warmup=200, num_chains=2))
        (found,) = [s for s in examine(posterior, data, train=data, seed=0) if s.name == "engine"]
        assert "R-hat" in str(found.body)
