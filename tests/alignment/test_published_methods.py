"""The published methods: each builds with its paper's settings and runs on candidates of its own sources."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import bayesrm as brm
from bayesrm import _ready_files
from bayesrm.alignment import projections, targets
from bayesrm.alignment.projections import RewardedTokens, TokenPaths
from bayesrm.alignment.utilities import UtilityName, make_scores, make_utility
from bayesrm.errors import ArgumentError
from bayesrm.programs import ExponentialTilt, GoodnessPosterior, LogisticGoodness, ScoredCandidates
from bayesrm.selection import LowerConfidenceBound, RiskAverse, Thompson

FOLDER = Path(__file__).resolve().parents[2] / "inference" / "alignment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
GAMES = {"inpo", "mtpo", "nash_md", "wind"}
SCORES = {"best_of_n_sft", "bonbon", "bond", "chi_squared", "j_bond"}
TOKENS = {"token_policy_gradient"}
each = pytest.mark.parametrize("name", NAMES)


def build(name, **settings):
    return _ready_files.load_build("inference", str(FOLDER / f"{name}.py"))(**settings)


def test_all_are_there():
    assert set(NAMES) == GAMES | SCORES | TOKENS | {
        "brain", "dpo", "exo", "gdc", "lire", "rlhf", "sail", "soft_q_learning",
    }  # fmt: skip
    # They are methods and no engines.
    assert not set(NAMES) & set(_ready_files.names("inference"))


@each
def test_file_is_short_cited_and_documented(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 50
    assert re.search(r"\b\d{4}\.\d{5}\b|ACL Findings 2024", ast.get_docstring(ast.parse(text)))
    function = _ready_files.load_build("inference", str(FOLDER / f"{name}.py"))
    assert inspect.signature(function).return_annotation is brm.alignment.Method
    for argument in inspect.signature(function).parameters.values():
        assert argument.kind is argument.KEYWORD_ONLY
        assert argument.annotation is not argument.empty
        assert argument.default is not argument.empty
        assert f"\n    {argument.name}: " in inspect.getdoc(function)


def candidates_of(method, prompts=3, seed=0):
    """Candidates drawn as the method says, with log-probabilities of all the policies there are."""
    generator = torch.Generator().manual_seed(seed)
    n = method.num_candidates

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    policies = {name: normal(prompts, n) - 20.0 for name in ("reference", "policy", "anchor", "mixture")}
    places = enumerate(method.sources)
    proposal = torch.stack([policies[source][:, place] for place, source in places], 1)
    belief = brm.RewardBelief(normal(prompts, n), 0.4 * normal(prompts, n, 3))
    candidates = ScoredCandidates(belief, policies["reference"], proposal, policies["anchor"], sources=method.sources)
    return candidates, policies["policy"]


def step(method):
    """One loss and its gradient with respect to what the policy says of the candidates."""
    candidates, log_q = candidates_of(method)
    posterior = method.weigh(candidates)
    if method.needs_tokens or method.needs_token_rewards:
        leaf = (log_q[..., None] / 4).expand(*log_q.shape, 4).clone().requires_grad_()
        mask = torch.ones_like(leaf, dtype=torch.bool)
        fixed = (candidates.reference[..., None] / 4).expand(leaf.shape)
        rewards = torch.linspace(-1.0, 1.0, leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape)
        policy = RewardedTokens(leaf, fixed, rewards, mask)
        if method.needs_tokens:
            policy = TokenPaths(leaf, torch.zeros_like(leaf), mask)
    else:
        policy = leaf = log_q.clone().requires_grad_()
    losses = method.loss(policy, posterior)
    (gradient,) = torch.autograd.grad(losses.mean(), leaf)
    return losses.detach(), gradient


@each
def test_one_step(name):
    method = build(name)
    losses, gradient = step(method)
    assert losses.shape == (3,)
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient != 0).any(-1).all())


@pytest.mark.parametrize("name", sorted(set(NAMES) - GAMES - TOKENS))
@pytest.mark.parametrize("utility", [str(member.value) for member in UtilityName])
def test_every_utility(name, utility):
    if name in SCORES and utility == "marginal":
        with pytest.raises(ArgumentError, match="`utility` is 'marginal', which integrates the reward out"):
            build(name, utility=utility)
        return
    settings = {}
    if name in {"dpo", "sail"} and utility in {"lower_bound", "risk_averse", "marginal"}:
        # Penalties on the deviation from the mean of two candidates cancel between them.
        with pytest.raises(ArgumentError, match="`num_candidates` is 2: both deviate"):
            build(name, utility=utility)
        settings = {"num_candidates": 3}
    losses, gradient = step(build(name, utility=utility, **settings))
    assert bool(torch.isfinite(losses).all() & torch.isfinite(gradient).all())
    plain = step(build(name, **settings))[1]
    # The order alone counts for BoNBoN and J-BOND, and may be the same.
    if name not in {"bonbon", "j_bond"}:
        assert torch.equal(gradient, plain) == (utility == "mean")


def test_settings_that_are_confirmed():
    bond, j_bond, bonbon = build("bond"), build("j_bond"), build("bonbon")
    assert bond.target == targets.BestOfN(8)
    assert bond.projection == projections.Jeffreys(0.5)
    assert bond.num_candidates == 16
    assert j_bond.sources == ("policy", "anchor", "anchor")
    assert j_bond.anchor_rate == 0.02
    assert j_bond.projection.weight == 0.5
    assert j_bond.projection.penalty == pytest.approx(2.772588722)
    assert bonbon.projection == projections.BestAndWorst(n=8, alpha=0.005)
    assert bonbon.sources == ("reference",) * 8
    # The README's beta*, and the target's margin that follows from it.
    assert 1 / (2 * bonbon.projection.margin) == pytest.approx(0.0275482094, abs=5e-11)
    lire = build("lire")
    assert lire.projection == projections.LinearListwise(2.0)
    assert lire.num_candidates == 6
    inpo = build("inpo")
    assert inpo.target.step / 2 == pytest.approx(66.7, abs=0.05)
    assert inpo.target.regularisation == pytest.approx(0.0025)
    assert inpo.projection == projections.SquaredLogRatio("preference")
    nash = build("nash_md")
    assert nash.target == targets.MirrorDescent(15.625, 0.008, opponent="mixture")
    assert build("dpo").projection.beta == 0.1
    assert build("dpo").num_candidates == 2
    soft = build("soft_q_learning")
    assert soft.projection == projections.PathConsistency(0.5, 0.5, reference=False)
    assert sorted(soft.sources) == ["policy"] * 4 + ["reference"] * 4
    assert build("exo").target.goodness == ExponentialTilt(0.1)


def test_settings_reach_their_places():
    brain = build("brain", beta=0.5, goodness="logistic", threshold=0.2, proposal="reference", num_candidates=4)
    assert brain.target == GoodnessPosterior(LogisticGoodness(0.5, 0.2))
    assert brain.sources == ("reference",) * 4
    assert build("gdc", baseline=False).projection == projections.DistributionalPolicyGradient(baseline=False)
    assert build("rlhf", clip=2.0).projection == projections.PolicyGradient(2.0)
    assert build("chi_squared", strength=0.3, utility="lower_bound").target == targets.ChiSquaredPessimism(
        0.3, LowerConfidenceBound(1.0)
    )
    assert build("wind", eta=1.0, tau=0.25).target == targets.MirrorDescent(0.8, 0.25)
    assert build("wind", loss="nce").projection == projections.NoiseContrastive()
    assert build("soft_q_learning", num_candidates=3).sources == ("policy", "policy", "reference")
    with pytest.raises(ArgumentError, match="`goodness` is 'great'"):
        build("brain", goodness="great")
    with pytest.raises(ArgumentError, match="`loss` is 'mean'"):
        build("wind", loss="mean")


def test_brain_and_rlhf_have_one_target():
    brain, rlhf, tokens = (build(name, beta=0.3) for name in ("brain", "rlhf", "token_policy_gradient"))
    assert brain.target == rlhf.target == tokens.target
    assert tokens.projection == projections.TokenPolicyGradient(temperature=0.3)


def test_nash_md_gradient_is_the_papers():
    """step (P(y > opponent) - tau log pi / mu), less the other draws' mean, where the anchor is the policy itself."""
    method = build("nash_md")
    candidates, _ = candidates_of(method)
    log_q = candidates.anchor
    on_policy = ScoredCandidates(candidates.belief, candidates.reference, log_q, log_q)
    posterior = method.weigh(on_policy)
    leaf = log_q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(leaf, posterior).sum(), leaf)
    mixture = torch.softmax(0.125 * (candidates.reference - log_q), 1)
    wins = torch.einsum("bij,bj->bi", candidates.belief.preference_matrix(), mixture)
    returns = wins - 0.008 * (log_q - candidates.reference)
    baseline = (returns.sum(1, keepdim=True) - returns) / 7
    torch.testing.assert_close(gradient, -0.125 / 0.008 * (returns - baseline) / 8)


def test_utilities_by_name():
    assert make_utility("risk_averse") == RiskAverse(b=1.0)
    assert make_utility("lower_bound", 2.5) == LowerConfidenceBound(k=2.5)
    assert make_utility("thompson") == Thompson(seed=0)
    assert make_utility("thompson", 7.0) == Thompson(seed=7)
    assert make_utility() is brm.beliefs.expected is make_scores("mean")
    assert make_utility("marginal") == "marginal"
    with pytest.raises(ArgumentError, match="`utility` is 'median'"):
        make_utility("median")
    for name in ("mean", "marginal"):
        with pytest.raises(ArgumentError, match=r"`strength` is 1\.0, and the utility"):
            make_utility(name, 1.0)
    for seed in (0.5, -1.0):
        with pytest.raises(ArgumentError, match="a seed"):
            make_utility("thompson", seed)
    with pytest.raises(ArgumentError, match="`utility` is 'marginal'"):
        make_scores("marginal")
    with pytest.raises(ArgumentError, match="`k` is -1"):
        make_utility("lower_bound", -1.0)
