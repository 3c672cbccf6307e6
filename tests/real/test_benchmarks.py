"""The benchmarks' own functions on reduced size, and on claims that hold with a wide margin at that size."""

import numpy as np
import pytest

from bayesrm.diagnostics import Estimate

pytestmark = pytest.mark.slow


def test_bayesian_head_beats_its_plug_in(benchmark_module, real_file):
    benchmark = benchmark_module("bayesian_head")
    candidates = benchmark.load(real_file("alpaca_eval_candidates.parquet").parent)
    trials = [benchmark.trial(candidates, num_pairs=1000, flip_rate=0.0, seed=seed) for seed in range(2)]
    assert all(t.fit["converged"] for t in trials)
    # docs/results.md has +0.0045 [+0.0009, +0.0086] for three seeds; here only its sign is claimed.
    assert np.mean([t.gain.mean() for t in trials]) > 0
    # Both predictions learn something: a coin has log 2.
    assert max(t.scores[f"{kind}.nll"] for t in trials for kind in ("predictive", "plug_in")) < np.log(2)


def test_pairs_of_test_prompts_share_no_item_with_training_and_have_a_better_side(benchmark_module, real_file):
    benchmark = benchmark_module("bayesian_head")
    candidates = benchmark.load(real_file("alpaca_eval_candidates.parquet").parent)
    pairs = benchmark.draw_pairs(candidates, np.repeat(np.arange(20), 10), np.random.default_rng(0))
    assert (candidates.prompt[pairs] == np.repeat(np.arange(20), 10)[:, None]).all()
    assert (candidates.quality[pairs[:, 0]] != candidates.quality[pairs[:, 1]]).all()


def test_nested_interval_is_wider_than_one_over_prompts_alone_when_seeds_differ(benchmark_module):
    benchmark = benchmark_module("bayesian_head")
    noise = np.random.default_rng(0).normal(size=(3, 100))
    same = benchmark.nested_interval(list(noise - noise.mean(1, keepdims=True)))
    apart = benchmark.nested_interval(list(noise - noise.mean(1, keepdims=True) + np.array([[-1.0], [0.0], [1.0]])))
    # Means of three seeds drawn from {-1, 0, 1} with repetition reach -1 and 1 with probability 1/27 > 2.5% each.
    assert apart.high - apart.low > 1.5
    # Standard error of the mean of 300 standard normal numbers: 0.058; its 95% interval is 4 of these wide.
    assert same.high - same.low == pytest.approx(4 * 300**-0.5, rel=0.2)


@pytest.fixture
def ties(benchmark_module, real_file, minilm):
    """A benchmark, and its held-out predictions on the similarity features of 120 questions."""
    benchmark = benchmark_module("preferences_with_ties")
    data, references = benchmark.load(real_file("qa_feedback.parquet").parent, 120)
    return benchmark, benchmark.cross_validate(
        benchmark.with_similarity(data, references), standardize=True, num_folds=3
    )


def test_every_comparison_is_predicted_by_models_that_did_not_see_its_question(ties):
    _, held_out = ties
    assert len(held_out.outcome) == 6 * 120
    assert all(np.isfinite(values).all() and (values < 0).all() for values in held_out.log_prob.values())
    assert all(fit["converged"] for fit in held_out.fits)


def test_models_of_ties_are_about_as_good_as_a_constant_tie_rate(ties):
    benchmark, held_out = ties
    for model in benchmark.LIKELIHOODS:
        # docs/results.md has intervals of half width 0.004 for 400 questions, so 0.008 for 120; the benchmark's margin
        # of 0.01 is added to it.
        assert held_out.gain(model, "constant_tie_rate").low > -0.008 - benchmark.MARGIN


@pytest.mark.parametrize(
    ("value", "low", "minimum", "holds"), [(1.0, 0.5, 0.4, True), (1.0, 0.3, 0.4, False), (1.0, -9.0, None, True)]
)
def test_a_claim_holds_by_its_interval_not_by_its_value(benchmark_module, value, low, minimum, holds):
    claim = benchmark_module("_common").Claim("gain", Estimate(value, low, 2.0), minimum=minimum)
    assert claim.holds is holds
    assert ("MISSED" in claim.line) is not holds


def test_a_missed_bound_is_the_exit_status(benchmark_module, tmp_path, capsys):
    common = benchmark_module("_common")

    def run(quick):
        return [common.Claim("gain", Estimate(0.1, -0.1, 0.3), minimum=0.0)], {"table": []}

    file = tmp_path / "out.json"
    assert common.main("test", run, ["--json", str(file)]) == 1
    assert capsys.readouterr().out == "gain: +0.1000 [-0.1000, +0.3000] (lower end >= 0, MISSED)\n"
    assert '"holds": false' in file.read_text()
    assert common.main("test", run, ["--quick"]) == 0


def test_best_of_n_trains_on_clean_styles_and_a_quarter_of_wrong_labels(benchmark_module, real_file):
    benchmark = benchmark_module("best_of_n")
    responses = benchmark.load(real_file("alpaca_eval_candidates.parquet").parent)
    train = responses.prompts_of(*benchmark.TRAIN_SOURCES)
    assert not set(train) & set(responses.prompts_of(benchmark.TEST_SOURCE))
    pairs, answers = benchmark.draw_pairs(responses, train, 4000, np.random.default_rng(0))
    assert np.isin(responses.prompt[pairs], train).all()
    assert (responses.prompt[pairs[:, 0]] == responses.prompt[pairs[:, 1]]).all()
    assert responses.trainable[pairs].all()
    assert not responses.gamed[pairs].any()
    wrong = (responses.gold[pairs].argmax(1) != answers).mean()
    assert abs(wrong - 0.25) < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    # Scales come from the training items alone: their length has mean 0 and standard deviation 1.
    values = benchmark.features(responses, np.unique(pairs), "style")
    length = values[np.unique(pairs), 768]
    assert abs(length.mean()) < 1e-9
    assert abs(length.std() - 1) < 1e-6


def test_crossed_interval_covers_when_seeds_share_prompts(benchmark_module):
    benchmark = benchmark_module("best_of_n")
    nested = benchmark_module("bayesian_head").nested_interval
    rng = np.random.default_rng(0)
    covered = {"crossed": 0, "nested": 0}
    for _ in range(200):
        # What makes a prompt hard does so for every seed.
        values = list(rng.normal(size=100) + 0.3 * rng.normal(size=(5, 100)))
        found = {
            "crossed": benchmark.crossed_interval(values, num_resamples=200),
            "nested": nested(values, num_resamples=200),
        }
        for name, interval in found.items():
            covered[name] += interval.low <= 0 <= interval.high
    # 95% of 200 is 190, with standard deviation 3.1; redrawing prompts anew inside each seed covers far less.
    assert covered["crossed"] > 176
    assert covered["nested"] < 160


def test_adaptive_best_of_n_needs_fewer_candidates_where_prompts_differ(benchmark_module):
    benchmark = benchmark_module("adaptive_best_of_n")
    claims, _ = benchmark.run(None, True)
    ratios = [claim.estimate.value for claim in claims if claim.maximum is not None]
    # docs/results.md has 0.60 to 0.70 for 1,000 prompts.
    assert len(ratios) == 4
    assert max(ratios) < 0.9


def test_sampled_gradients_of_alignment_methods_are_those_of_the_expected_losses(benchmark_module):
    benchmark = benchmark_module("alignment_worlds")
    claims = benchmark.descend_their_losses(benchmark.QUICK)
    assert len(claims) == 5
    assert all(claim.holds for claim in claims)


def test_brain_comes_as_near_to_its_target_as_derived(benchmark_module):
    benchmark = benchmark_module("alignment_worlds")
    world = benchmark.make_world(range(5))
    entry = benchmark.entries()[0]
    schedule = entry.schedule(300)
    bound = benchmark.expected_end(world, entry, schedule, num_sets=50, seed=1)
    # On every set of candidates the target itself is at rest, so that nothing but unlearnt differences is left.
    assert bound.noise < 1e-20
    gaps = benchmark.to_target(world, benchmark.train(world, entry.method, schedule, seed=0), entry.own_target(world))
    assert (gaps[-1] < bound.bound).all()
    assert (gaps[0] > 10 * gaps[-1]).all()
