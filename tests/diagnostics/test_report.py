import dataclasses
import html.parser
import re

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.backend import dist as distributions
from bayesrm.backend import ops, sample
from bayesrm.diagnostics._report import Status, examine, report
from bayesrm.diagnostics._report._annotators import annotators
from bayesrm.diagnostics._report._calibration import calibration
from bayesrm.diagnostics._report._comparisons import uncertain_comparisons
from bayesrm.diagnostics._report._data import data_summary
from bayesrm.diagnostics._report._engine import engine
from bayesrm.diagnostics._report._evidence import gather
from bayesrm.diagnostics._report._failures import confidently_wrong, length, outlying
from bayesrm.diagnostics._report._html import element, text
from bayesrm.diagnostics._report._latents import intervals, latents
from bayesrm.diagnostics._report._model import declaration
from bayesrm.diagnostics._report._predictive import predictive
from bayesrm.diagnostics._report._program import declared
from bayesrm.diagnostics._report._uncertainty import uncertainty
from bayesrm.errors import ArgumentError, LikelihoodError, PersistenceError

pytest.importorskip("matplotlib")

NAMES = ("data", "model", "engine", "calibration", "predictive", "uncertainty", "uncertain", "failures", "latents")
HOSTILE = "</p></style><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;\x00\u202e"


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of a page."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.words, self.open = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make(prompts=40, likelihood=None, annotators=None, seed=0, rows=4, num_features=3, **truth):
    """A model and simulated pairs of 3 responses a prompt, split into training and test prompts."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(3 * prompts, num_features))
    pairs = np.array([3 * p + rng.choice(3, 2, replace=False) for p in range(prompts) for _ in range(rows)])
    names = None if annotators is None else [annotators[i] for i in rng.integers(len(annotators), size=len(pairs))]
    design = brm.Comparisons.from_arrays(
        features,
        candidates=pairs,
        outcome=np.zeros(len(pairs), int),
        prompt_index=np.repeat(np.arange(prompts), 3),
        annotator=names,
        words=rng.integers(5, 200, size=3 * prompts),
    )
    model = brm.RewardModel(brm.rewards.Linear(), likelihood or brm.likelihoods.BradleyTerry())
    drawn = model.simulate(
        design, seed=seed, parameters={"weight": torch.linspace(1.5, -1.5, num_features)}, latents=truth
    )
    return model, *drawn.data.split_by_prompt(0.5, seed=0)


@pytest.fixture(scope="module")
def davidson():
    model, train, test = make(
        60, brm.likelihoods.RaterReliability(brm.likelihoods.Davidson()), annotators=("ann", "bob", "<i>cy</i>"), rows=5
    )
    return brm.fit(model, train, inference=brm.Laplace()), train, test


@pytest.fixture(scope="module")
def sections(davidson):
    posterior, train, test = davidson
    away = test.with_features(3.0 * np.asarray(test.features))
    return {s.name: s for s in examine(posterior, test, train=train, ood=away)}


def test_every_section_opens_with_a_number(sections):
    assert tuple(sections) == NAMES
    for section in sections.values():
        assert re.search(r"\d", section.verdict), section.verdict
        assert section.verdict.endswith(".")
        # What to do is said where something is wrong, and only there.
        assert bool(section.advice) == (section.status in (Status.CAUTION, Status.PROBLEM))


def test_the_page_is_self_contained_and_accessible(davidson, tmp_path):
    posterior, _, test = davidson
    path = report(posterior, test, tmp_path / "new" / "r.html", title="A <b>title</b>")
    source = path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
    assert path.stat().st_size < 3e6
    page = Page(source)
    assert not page.open
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object", "base", "form", "b>title"} & set(tags)
    assert tags.count("h1") == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert len(attributes["alt"]) > 20
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in ids
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", source)
    assert ("html", {"lang": "en"}) in page.elements
    assert "A <b>title</b>" in page.text
    # The annotator's name is text, wherever it stands.
    assert "<i>cy</i>" in page.text
    assert "i" not in tags


def test_hostile_texts_stay_texts(tmp_path):
    prompts = [f"{HOSTILE} prompt {i}" for i in range(6)]
    data = brm.Comparisons.from_pairs(
        prompts, [f"{HOSTILE} yes" * 30] * 6, [f"{HOSTILE} no"] * 6, annotator=[HOSTILE] * 3 + ["other"] * 3
    )
    rng = np.random.default_rng(0)
    data = data.with_features(rng.normal(size=(data.num_items, 2)))
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.RaterReliability(brm.likelihoods.BradleyTerry()))
    posterior = brm.fit(model, data, inference=brm.Laplace())
    clean = Page(report(posterior, data, tmp_path / "r.html", title=HOSTILE).read_text(encoding="utf-8"))
    assert "script" not in [tag for tag, _ in clean.elements]
    assert all("onerror" not in attributes for _, attributes in clean.elements)
    assert "<script>alert(1)</script>" in clean.text
    assert "\x00" not in clean.text
    # A mark that reverses the writing after it would let a text rewrite the page around it.
    assert "\u202e" not in clean.text
    blocks = [attributes for tag, attributes in clean.elements if attributes.get("class") == "text"]
    assert blocks
    assert all(attributes["dir"] == "auto" for attributes in blocks)
    assert "more characters" in clean.text


def test_escaping_is_the_default():
    assert element("p", "<b>", element("b", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<b>&amp;</b></p>'
    # A lone half of a surrogate pair cannot be written as UTF-8.
    assert text("\ud800<").encode("utf-8") == b"?&lt;"


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        (brm.likelihoods.BradleyTerry(), {"feedback": {"reward.weight"}}),
        (
            brm.likelihoods.RaterReliability(brm.likelihoods.LengthBias(brm.likelihoods.Davidson()), spread=None),
            {
                "feedback": {
                    "reward.weight", "tie_weight", "length_coefficient", "reliability_mean", "reliability_spread",
                    "rater_deviation",
                }
            },
        ),
        (
            brm.likelihoods.LabelNoise(brm.likelihoods.RaoKupper()),
            {"feedback": {"reward.weight", "tie_threshold", "doubled_flip_rate"}},
        ),
    ],
)  # fmt: skip
def test_the_graph_is_that_of_the_program(likelihood, expected):
    model, train, _ = make(12, likelihood, annotators=("a", "b"))
    posterior = brm.fit(model, train, inference=brm.MAP(prior_precision="given"))
    before = torch.random.get_rng_state()
    variables = {v.name: v for v in declared(posterior)}
    assert torch.equal(before, torch.random.get_rng_state())
    assert {name: set(v.parents) for name, v in variables.items() if v.parents} == expected
    assert [name for name, v in variables.items() if v.observed] == ["feedback"]
    assert variables["reward.weight"].shape == (3,)
    if "rater_deviation" in variables:
        assert variables["rater_deviation"].plates == (("raters", 2),)


def test_the_graph_shows_a_latent_of_a_latent_and_one_that_nothing_uses():
    def hierarchical(rewards, comparison):
        scale = sample("scale", distributions.LogNormal(0.0, 0.3))
        shift = sample("shift", distributions.Normal(0.0, scale))
        sample("idle", distributions.Normal(0.0, 1.0))
        d = rewards[:, 0] - rewards[:, 1] + shift
        return distributions.Categorical(logits=ops.stack([ops.log_sigmoid(d), ops.log_sigmoid(-d)], axis=-1))

    model, train, _ = make(12, hierarchical)
    posterior = brm.fit(model, train, inference=brm.MAP(prior_precision="given"))
    parents = {v.name: v.parents for v in declared(posterior)}
    assert parents["shift"] == ("scale",)
    assert set(parents["feedback"]) == {"reward.weight", "shift"}
    drawing = declaration(posterior).body
    assert all(name in drawing for name in ("scale", "shift", "idle"))
    assert "shift depends on scale." in drawing


def test_mixed_kinds(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    index = np.repeat(np.arange(15), 4)
    pairs = brm.Comparisons.from_arrays(
        x, candidates=np.arange(60).reshape(30, 2), outcome=[0, 1, 2] * 10, prompt_index=index
    )
    ranks = brm.Comparisons.from_arrays(
        x, candidates=np.arange(60).reshape(15, 4), outcome=[[3, 1, 0, 2]] * 15, kind="ranking", prompt_index=index
    )
    rates = brm.Comparisons.from_arrays(
        x, outcome=rng.integers(3, size=60), kind="rating", num_levels=3, prompt_index=index
    )
    likes = brm.Comparisons.from_arrays(x, outcome=rng.integers(2, size=60), kind="approval", prompt_index=index)
    data = brm.Comparisons.concatenate([pairs, ranks, rates, likes])
    lk = brm.likelihoods
    model = brm.RewardModel(
        brm.rewards.Linear(),
        {"choice": lk.Davidson(), "ranking": lk.PlackettLuce(), "rating": lk.Ordinal(), "approval": lk.Approval()},
    )
    train, test = data.split_by_prompt(0.5, seed=0)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    page = Page(report(posterior, test, tmp_path / "r.html", train=train).read_text(encoding="utf-8"))
    for words in ("choice of 2", "ranking of 4", "rating", "approval", "rating.first_cutpoint", "level at most 1"):
        assert words in page.text
    # Answers are noise here, so the rewards must not be said to predict them.
    assert calibration(gather(posterior, test, seed=0), seed=0).status != Status.GOOD


def test_calibration_tells_an_honest_posterior_from_an_overconfident_one():
    model, train, test = make(400, seed=1)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    honest = calibration(gather(posterior, test, seed=0), seed=0)
    assert honest.status == Status.GOOD, honest.verdict
    # Four times the rewards: the same order, with far too much confidence.
    posterior.mode = 4.0 * posterior.mode
    boastful = calibration(gather(posterior, test, seed=0), seed=0)
    assert boastful.status == Status.PROBLEM
    assert "over-confident" in boastful.verdict


@pytest.mark.parametrize(("stated", "told"), [(0.95, False), (0.6, True)])
def test_answers_that_are_all_right_are_told_only_where_that_is_improbable(monkeypatch, stated, told):
    """One answer in each of 20 prompts, all right: stated 95% it happens in 36% of cases, 60% in one of 27,000."""
    model, train, test = make(40, seed=1)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    evidence = gather(posterior, test, seed=0)
    rows = np.unique(evidence.prompt, return_index=True)[1]
    assert len(rows) == 20
    monkeypatch.setattr(
        "bayesrm.diagnostics._report._calibration.top_choice", lambda _: (np.full(20, stated), np.ones(20), rows)
    )
    found = calibration(evidence, seed=0)
    assert ("under-confident by 40 points" in found.verdict) == told
    assert ("no miscalibration shows" in found.verdict) != told
    assert "right in 100% [84%, 100%]" in found.verdict


def test_predictive_checks_notice_ties_that_the_likelihood_cannot_draw():
    model, train, test = make(120, brm.likelihoods.Davidson(), tie_weight=torch.tensor(0.5))
    posterior = brm.fit(model, train, inference=brm.Laplace())
    assert predictive(posterior, gather(posterior, test, seed=0), seed=0).status == Status.GOOD
    # Half of the test pairs become ties, whatever their rewards.
    outcome = test.groups()[0].outcome.clone()
    outcome[::2] = 2
    changed = predictive(posterior, gather(posterior, test.with_outcomes([outcome]), seed=0), seed=0)
    assert changed.status == Status.CAUTION
    assert "tie rate" in changed.verdict


def test_a_point_is_called_a_point():
    model, train, test = make(30)
    posterior = brm.fit(model, train, inference=brm.MAP(prior_precision="given"))
    evidence = gather(posterior, test, seed=0)
    unsure = uncertainty(evidence, evidence, seed=0)
    assert unsure.status == Status.PROBLEM
    assert "standard deviation of 0" in unsure.verdict
    assert engine(posterior, []).status == Status.CAUTION
    assert uncertain_comparisons(evidence).status == Status.CAUTION


def test_data_of_the_fit_are_recognised(davidson):
    posterior, train, test = davidson
    own = data_summary(posterior, gather(posterior, train, seed=0), train, None, None)
    assert own.status == Status.PROBLEM
    assert "the very data" in own.verdict
    # Two rows of the training data among the test rows share their prompts.
    mixed = brm.Comparisons.concatenate([test, train.select([0, 1])])
    shared = data_summary(posterior, gather(posterior, mixed, seed=0), mixed, train, None)
    assert shared.status == Status.PROBLEM
    num_shared = len(np.unique(train.prompt_of_row[[0, 1]]))
    assert f"{num_shared} of the {mixed.num_prompts} prompts are also in the training data" in shared.verdict


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, Status.GOOD, "passed"),
        ({"converged": False}, Status.PROBLEM, "no mode"),
        (
            {"structure_check": {"variance_ratio": 1.0, "rank_correlation": 0.99, "num_probes": 9.0}},
            Status.GOOD,
            "passed",
        ),
        (
            {"structure_check": {"variance_ratio": 0.3, "rank_correlation": 0.99, "num_probes": 9.0}},
            Status.PROBLEM,
            "0.30",
        ),
        (
            {"structure_check": {"variance_ratio": 1.1, "rank_correlation": 0.8, "num_probes": 9.0}},
            Status.CAUTION,
            "0.80",
        ),
        ({"training": {"steps": 5, "planned_steps": 9}}, Status.CAUTION, "5 of 9"),
        (
            {
                "refinement": {
                    "reward_change": 3.0,
                    "reward_scale": 4.0,
                    "log_joint_gain": 1.0,
                    "distance": 1.0,
                    "trained_gradient_norm": 0.1,
                }
            },
            Status.CAUTION,
            "75% of their scale",
        ),
        ({"diagnostics": {"k_hat": 0.3, "ess": 500.0}}, Status.GOOD, "passed"),
        ({"diagnostics": {"k_hat": 0.9, "ess": 5.0}}, Status.CAUTION, "k-hat is 0.90"),
        ({"diagnostics": {"r_hat": 1.003, "ess": 900.0, "divergences": 0}}, Status.GOOD, "passed"),
        ({"diagnostics": {"r_hat": 1.2, "ess": 900.0, "divergences": 0}}, Status.PROBLEM, "R-hat is 1.200"),
        ({"diagnostics": {"r_hat": 1.0, "ess": 30.0, "divergences": 0}}, Status.CAUTION, "size is 30"),
        ({"diagnostics": {"r_hat": 1.0, "ess": 900.0, "divergences": 7}}, Status.PROBLEM, "7 transitions diverged"),
    ],
)
def test_engine_checks(davidson, change, status, words):
    posterior, *_ = davidson
    copy = object.__new__(type(posterior))
    copy.__dict__.update(posterior.__dict__)
    copy.report = dataclasses.replace(posterior.report, **change)
    section = engine(copy, [])
    assert section.status == status
    assert words in section.verdict


def with_report(posterior, num_chains=1, **change):
    copy = object.__new__(type(posterior))
    copy.__dict__.update(posterior.__dict__ | {"_num_chains": num_chains})
    copy.report = dataclasses.replace(posterior.report, **change)
    return copy


def test_one_chain_shows_no_agreement(davidson):
    found = {"r_hat": float("nan"), "ess": 900.0, "divergences": 0}
    section = engine(with_report(davidson[0], diagnostics=found), [])
    assert section.status == Status.CAUTION
    assert "1 chain cannot show whether chains agree" in section.verdict
    assert "nan" not in section.verdict + section.body
    short = engine(with_report(davidson[0], num_chains=4, diagnostics=found | {"ess": float("nan")}), [])
    assert short.status == Status.CAUTION
    assert "nan" not in short.verdict + short.body


def test_enough_draws_are_those_of_the_fit(davidson):
    def status(num_chains, ess, r_hat=1.0):
        found = {"r_hat": r_hat, "ess": ess, "divergences": 0}
        return engine(with_report(davidson[0], num_chains, diagnostics=found), []).status

    assert status(2, 250.0) == Status.GOOD
    assert status(4, 250.0) == Status.CAUTION
    # The largest R-hat of many quantities passes 1.01 by chance, where there are draws enough.
    assert status(4, 500.0, r_hat=1.03) == Status.GOOD
    assert status(4, 250.0, r_hat=1.03) == Status.CAUTION
    assert status(4, 500.0, r_hat=1.06) == Status.PROBLEM


def test_k_hat_is_judged_by_the_number_of_draws(davidson):
    few = with_report(davidson[0], diagnostics={"k_hat": 0.6, "ess": 50.0})
    assert engine(few, []).status == Status.GOOD
    few._default_draws = 100
    assert engine(few, []).status == Status.CAUTION


# Whether it has settled is set below.
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
def test_the_bound_of_svi_is_shown_instead_of_a_gradient():
    model, train, _ = make(10)
    posterior = brm.fit(model, train, inference=brm.SVI(num_steps=400, learning_rate=0.05))
    settled = {"converged": True, "diagnostics": {"elbo": -12.5, "elbo_std_error": 0.1}}
    section = engine(with_report(posterior, **settled), [])
    assert section.status == Status.GOOD
    assert "-12.50 nats after 400 steps" in section.body
    assert "gradient norm" not in section.body
    rising = engine(with_report(posterior, **settled | {"converged": False}), [])
    assert rising.status == Status.CAUTION
    assert "still rose" in rising.verdict


def test_trained_members_have_no_gradient_to_show(davidson):
    settings = {"name": "Ensemble", "settings": {}}
    trained = with_report(davidson[0], engine=settings, training={"steps": 9, "planned_steps": 9}, gradient_norm=3.0)
    section = engine(trained, [])
    assert section.status == Status.GOOD
    assert "passed its one check" in section.verdict


# Short chains are the point.
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
@pytest.mark.parametrize("num_samples", [2, 6, 20])
def test_short_chains_are_reported(num_samples):
    model, train, test = make(20)
    chain = brm.NUTS(num_chains=1, num_warmup=10, num_samples=num_samples, backend="pyro")
    posterior = brm.fit(model, train, inference=chain)
    found = {s.name: s for s in examine(posterior, test, train=train)}["engine"]
    assert found.status in (Status.CAUTION, Status.PROBLEM)
    assert "1 chain cannot show" in found.verdict


@pytest.mark.parametrize("prompts", [3, 20])
def test_a_gaussian_process_reads_raw_features_once(prompts, tmp_path):
    # With 3 prompts and 9 features the process has as many coordinates as there are features.
    _, train, test = make(2 * prompts, num_features=3 * prompts)
    reward = brm.rewards.GaussianProcess(standardize=False)
    posterior = brm.fit(brm.RewardModel(reward, brm.likelihoods.BradleyTerry()), train, inference=brm.Laplace())
    evidence = gather(posterior, test, seed=0)
    belief = posterior.predict_items(test)
    order = np.argsort(np.asarray(test.prompt_of_item), kind="stable")
    np.testing.assert_array_equal(evidence.mean[order], belief.mean[belief.valid])
    np.testing.assert_array_equal(evidence.prediction.log_prob, posterior.predict_feedback(test, seed=0).log_prob)
    page = Page(report(posterior, test, tmp_path / "r.html", train=train, ood=test).read_text(encoding="utf-8"))
    assert "Rewards come from GaussianProcess(rbf" in page.text


def test_rankings_are_judged_by_the_first_place():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    design = brm.Comparisons.from_arrays(
        x,
        candidates=np.arange(400).reshape(100, 4),
        outcome=np.tile(np.arange(4), (100, 1)),
        kind="ranking",
        prompt_index=np.repeat(np.arange(100), 4),
    )
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.PlackettLuce())
    data = model.simulate(design, seed=0, parameters={"weight": torch.tensor([1.0, -1.0])}).data
    train, test = data.split_by_prompt(0.5, seed=0)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    evidence = gather(posterior, test, seed=0)
    [group] = evidence.prediction.groups
    # By hand: the probability of each candidate in first place, summed over the orders.
    first = torch.stack([group.probs[:, group.outcomes[:, 0] == j].sum(1) for j in range(4)], dim=1)
    right = (first.argmax(1) == group.outcomes[group.observed][:, 0]).double().mean()
    verdict = calibration(evidence, seed=0).verdict
    assert f"{float(first.amax(1).mean()):.0%} sure of the first place and right in {float(right):.0%}" in verdict


def test_a_likelihood_without_latents_says_so():
    model, train, _ = make(12)
    section = latents(brm.fit(model, train, inference=brm.Laplace()), seed=0)
    assert section.verdict == f"From {len(train)} comparisons only the reward was learnt: BradleyTerry has no latents."


def test_sure_and_wrong_is_counted_and_judged():
    model, train, test = make(200)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    fair = confidently_wrong(gather(posterior, test, seed=0), seed=0)
    assert fair.status == Status.GOOD
    # By hand: turn a quarter of the answers round.
    group = test.groups()[0]
    outcome = group.outcome.clone()
    outcome[::4] = 1 - outcome[::4]
    evidence = gather(posterior, test.with_outcomes([outcome]), seed=0)
    found = confidently_wrong(evidence, seed=0)
    probs = evidence.prediction.groups[0].probs.numpy()
    sure = probs.max(1) >= 0.9
    wrong = (probs.argmax(1) != outcome.numpy())[sure].sum()
    assert f"Of {sure.sum()} comparisons" in found.sentence
    assert f"{wrong} went otherwise; {(1 - probs.max(1))[sure].sum():.1f} should" in found.sentence
    assert found.status == Status.PROBLEM


def test_far_rewards_are_found_and_others_are_not():
    model, train, test = make(60)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    usual = gather(posterior, train, seed=0).deviation
    assert outlying(gather(posterior, test, seed=0), usual).status == Status.GOOD
    features = np.array(test.features)
    features[5] = [40.0, 0.0, -40.0]
    evidence = gather(posterior, test.with_features(features), seed=0)
    for reference in (usual, None):
        found = outlying(evidence, reference)
        assert found.status == Status.CAUTION
        assert "Item 5:" in found.body


def test_length_is_found_in_the_reward_and_in_the_answers():
    # Feature 0 is the length, and the reward loves it, while answers are coin flips.
    rng = np.random.default_rng(0)
    words = rng.integers(10, 300, size=400)
    x = np.stack([(words - 155) / 80, rng.normal(size=400)], axis=1)
    pairs = np.arange(400).reshape(200, 2)
    longer = np.where(words[pairs[:, 0]] > words[pairs[:, 1]], 0, 1)
    design = {"candidates": pairs, "words": words, "prompt_index": np.repeat(np.arange(100), 4)}
    train = brm.Comparisons.from_arrays(x, outcome=longer, **design)
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
    posterior = brm.fit(model, train, inference=brm.Laplace())
    coin = brm.Comparisons.from_arrays(x, outcome=rng.integers(2, size=200), **design)
    assert length(gather(posterior, train, seed=0), seed=0).status == Status.GOOD
    evidence = gather(posterior, coin, seed=0)
    found = length(evidence, seed=0)
    assert found.status == Status.CAUTION
    unequal = pairs[words[pairs[:, 0]] != words[pairs[:, 1]]].T
    share = np.mean((np.diff(evidence.mean[unequal], axis=0) > 0) == (np.diff(words[unequal], axis=0) > 0))
    assert share > 0.95
    assert f"The reward prefers the longer response in {share:.0%} of {unequal.shape[1]}" in found.sentence
    # The other way round: the reward looks at the second feature alone, the answers at the length.
    posterior.mode = posterior.mode * torch.tensor([0.0, 1.0], dtype=torch.float64) + torch.tensor([0.0, 1.0])
    other = length(gather(posterior, train, seed=0), seed=0)
    assert other.status == Status.CAUTION
    assert "Annotators favour length more" in other.advice


def test_a_contrary_annotator_is_found_and_a_noisy_crowd_is_not():
    names = ("a", "b", "c", "d", "contrary")
    model, train, test = make(120, annotators=names)
    posterior = brm.fit(model, train, inference=brm.Laplace())
    assert annotators(gather(posterior, test, seed=0)).status == Status.GOOD
    group = test.groups()[0]
    theirs = group.comparison.annotator == list(test.annotators).index("contrary")
    outcome = torch.where(theirs, 1 - group.outcome, group.outcome)
    found = annotators(gather(posterior, test.with_outcomes([outcome]), seed=0))
    assert found.status == Status.CAUTION
    assert found.sentence.startswith("1 of 5 annotators follows")
    assert "contrary in" in found.sentence
    assert annotators(gather(posterior, make(30)[2], seed=0)) is None


def test_intervals_of_latents_are_those_of_posterior_and_prior(davidson):
    posterior, *_ = davidson
    found = {i.name: i for i in intervals(posterior, seed=3)}
    draws = posterior.latents(2000, seed=3)
    low, mid, high = np.quantile(draws["tie_weight"].numpy(), [0.05, 0.5, 0.95])
    assert (found["tie_weight"].low, found["tie_weight"].median, found["tie_weight"].high) == (low, mid, high)
    # log nu ~ N(log 0.5, 1); 400 draws put the ends within some 20%.
    assert found["tie_weight"].prior_low == pytest.approx(0.5 * np.exp(-1.645), rel=0.3)
    assert found["tie_weight"].prior_high == pytest.approx(0.5 * np.exp(1.645), rel=0.3)
    assert found["tie_weight"].informed > 0.3
    eta = posterior.program.likelihood.reliability(draws)[:, list(posterior.schema.annotators).index("bob")]
    assert found["reliability bob"].median == pytest.approx(float(eta.median()), abs=1e-3)


def test_what_is_known_least_is_ranked_by_the_spread_of_the_preference(davidson):
    posterior, _, test = davidson
    evidence = gather(posterior, test, seed=0)
    mean, std, pair = evidence.contrasts()
    items = test.groups()[0].items
    belief = posterior.predict(candidates=[np.asarray(test.features)[row] for row in items.tolist()]).differences(1)
    assert np.allclose(mean, belief.mean[:, 0], atol=1e-6)
    assert np.allclose(std, belief.std[:, 0], atol=1e-6)
    assert np.array_equal(pair, items)
    draws = torch.sigmoid(belief.sample(20_000, seed=0)[:, :, 0])
    # Monte Carlo error of a standard deviation: about 1 / sqrt(40,000) of it.
    assert np.allclose(evidence.doubt(), draws.std(0), rtol=0.03, atol=1e-4)


@pytest.mark.slow
def test_same_seed_same_page_and_no_global_state(davidson, tmp_path):
    posterior, _, test = davidson
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = report(posterior, test, tmp_path / "a.html", seed=5).read_bytes()
    assert first == report(posterior, test, tmp_path / "b.html", seed=5).read_bytes()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_bad_arguments_leave_nothing_behind(davidson, tmp_path):
    posterior, _, test = davidson
    with pytest.raises(ArgumentError, match=r"must end in \.html"):
        report(posterior, test, tmp_path / "r.txt")
    masked = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1]], outcome=[0], weight=[0.0])
    with pytest.raises(ArgumentError, match="every row of `data` has weight 0"):
        report(posterior, masked, tmp_path / "r.html")
    stranger = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1]], outcome=[0], annotator=["nobody"])
    with pytest.raises(LikelihoodError, match="annotator 'nobody'"):
        report(posterior, stranger, tmp_path / "r.html")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PersistenceError, match="cannot write"):
        report(posterior, test, tmp_path / "file" / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
