"""What likelihoods refuse, and how they are named, saved and found again."""

import dataclasses
import json

import pytest
import torch

from bayesrm.backend import Recorder
from bayesrm.errors import ArgumentError, LikelihoodError
from bayesrm.likelihoods import (
    Approval,
    BradleyTerry,
    Davidson,
    LabelNoise,
    LengthBias,
    Likelihood,
    Ordinal,
    PlackettLuce,
    RaoKupper,
    RaterReliability,
    Thurstone,
    base,
    outcome,
    register,
)

from .cases import CASES, Case

KINDS = {
    "choice": Case("choice", None),
    "ranking": Case("ranking", None, "ranking", 3, depth=3),
    "rating": Case("rating", None, "rating", 1, num_levels=3),
    "approval": Case("approval", None, "approval", 1),
}
PAIRWISE = [BradleyTerry(), Thurstone(), Davidson(), RaoKupper()]
DESCRIBES = [(like, {"choice"}) for like in PAIRWISE] + [
    (PlackettLuce(), {"choice", "ranking"}),
    (Ordinal(), {"rating"}),
    (Approval(), {"approval"}),
]


def call(likelihood, case, **changes):
    return likelihood(case.rewards(2), dataclasses.replace(case.comparison(2), **changes))


@pytest.mark.parametrize(("likelihood", "kinds"), DESCRIBES, ids=lambda x: type(x).__name__)
def test_feedback_of_another_kind(likelihood, kinds):
    for kind in KINDS.keys() - kinds:
        with pytest.raises(LikelihoodError, match=rf"{type(likelihood).__name__} describes .*, not '{kind}'; "):
            call(likelihood, KINDS[kind])


@pytest.mark.parametrize("likelihood", PAIRWISE, ids=lambda x: type(x).__name__)
def test_more_than_two_candidates(likelihood):
    with pytest.raises(LikelihoodError, match=r"compares 2 candidates, these rows have 3; use PlackettLuce"):
        call(likelihood, Case("choice", None, num_candidates=3))


def test_missing_circumstances():
    pair = KINDS["choice"]
    with pytest.raises(LikelihoodError, match=r"RaterReliability needs the annotator of every row"):
        call(RaterReliability(BradleyTerry()), pair, annotator=None)
    with pytest.raises(LikelihoodError, match=r"RaterReliability needs the annotator of every row"):
        call(RaterReliability(BradleyTerry()), pair, annotator=torch.tensor([0, -1]))
    with pytest.raises(LikelihoodError, match=r"LengthBias needs response lengths; give `words`"):
        call(LengthBias(BradleyTerry()), pair, lengths=None)
    with pytest.raises(LikelihoodError, match=r"Ordinal needs at least 2 rating levels, the data declare 1"):
        call(Ordinal(), KINDS["rating"], num_levels=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BradleyTerry(temperature=0.0), r"`temperature` is 0.0; it must be positive"),
        (lambda: BradleyTerry(temperature=float("nan")), r"`temperature` is nan; it must be positive"),
        (lambda: PlackettLuce(temperature=-1.0), r"`temperature` is -1.0; it must be positive"),
        (lambda: Thurstone(noise=0.0), r"`noise` is 0.0; it must be positive"),
        (lambda: LengthBias(BradleyTerry(), unit=0.0), r"`unit` is 0.0; it is a positive number of words"),
        (lambda: LabelNoise(BradleyTerry(), flip_rate=0.5), r"`flip_rate` is 0.5; a known rate lies in \[0, 0.5\)"),
        (lambda: LabelNoise(BradleyTerry(), flip_rate=-0.1), r"`flip_rate` is -0.1; a known rate lies in \[0, 0.5\)"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_an_outcome_needs_draws_or_a_list():
    with pytest.raises(ArgumentError, match=r"give `sample`, `support`, or both"):
        outcome(log_prob=lambda y: y, batch_shape=(1,), like=torch.zeros(1))


def test_reliabilities_of_raters():
    case = next(c for c in CASES if c.name == "rater_reliability(bradley_terry)")
    latents = case.latents(seed=1)
    eta = case.likelihood.reliability(latents)
    comparison = dataclasses.replace(case.comparison(3), annotator=torch.arange(3))
    # A sure thing is answered as meant with probability eta.
    d = case.distribution(torch.tensor([[700.0, 0.0]] * 3).double(), comparison, latents)
    torch.testing.assert_close(d.log_prob(torch.zeros(3, dtype=torch.long)).exp(), eta)
    assert ((eta > 0.5) & (eta < 1)).all()


# ------------------------------------------------------------------------------------------------------- configurations


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_configurations_make_the_round_trip(case):
    config = json.loads(json.dumps(base.to_config(case.likelihood)))
    rebuilt, changed = base.from_config(config)
    assert rebuilt == case.likelihood
    assert changed == []
    assert isinstance(rebuilt, Likelihood)


def test_nested_settings_are_kept():
    likelihood = RaterReliability(LengthBias(Davidson(log_tie_weight_mean=0.25), unit=7.0), mean_scale=0.5)
    config = base.to_config(likelihood)
    assert config["settings"]["base"]["likelihood"]["settings"]["unit"] == 7.0
    rebuilt, _ = base.from_config(config)
    assert rebuilt == likelihood != RaterReliability(LengthBias(Davidson()))


def test_a_changed_source_is_named_however_deep():
    config = base.to_config(RaterReliability(LengthBias(Davidson())))
    config["settings"]["base"]["likelihood"]["settings"]["base"]["likelihood"]["source"] = "0" * 16
    assert base.from_config(config)[1] == ["davidson"]


def test_register(registry):
    @register("mine")
    def mine(rewards, comparison):
        return BradleyTerry()(rewards, comparison)

    assert base.from_config(base.to_config(mine)) == (mine, [])
    wrapped = LabelNoise(mine, flip_rate=0.25)
    assert base.from_config(base.to_config(wrapped)) == (wrapped, [])
    with pytest.raises(ArgumentError, match=r"a likelihood named 'mine' is registered already"):
        register("mine")(BradleyTerry)
    del base._REGISTRY["mine"]
    assert base.to_config(mine)["name"] is None
    with pytest.raises(LikelihoodError, match=r"was saved unregistered; pass it as `Posterior\.from_pretrained"):
        base.from_config(base.to_config(mine))
    with pytest.raises(LikelihoodError, match=r"no likelihood is registered as 'mine'; import the module"):
        base.from_config({"name": "mine", "settings": {}, "source": ""})


def test_latents_have_the_documented_names():
    names = {c.name: set(c.latents()) for c in CASES}
    assert names["davidson"] == {"tie_weight"}
    assert names["rao_kupper"] == {"tie_threshold"}
    assert names["ordinal-2"] == {"first_cutpoint"}
    assert names["ordinal-5"] == {"first_cutpoint", "cutpoint_gaps"}
    assert names["approval"] == {"approval_offset"}
    assert names["label_noise-known(bradley_terry)"] == set()
    assert names["label_noise-learnt(bradley_terry)"] == {"doubled_flip_rate"}
    assert names["rater_reliability(length_bias(davidson))"] == {
        "tie_weight",
        "length_coefficient",
        "reliability_mean",
        "reliability_spread",
        "rater_deviation",
    }
    with pytest.raises(LikelihoodError, match=r"site `tie_weight` is not among the known latents \[\]"), Recorder({}):
        call(Davidson(), KINDS["choice"])
