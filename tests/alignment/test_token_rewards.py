"""Rewards of tokens: the policy gradient against enumeration, the way from a posterior to the policy's tokens, runs."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.alignment import Method, align, projections
from bayesrm.alignment._round import Round
from bayesrm.alignment._run_identity import described
from bayesrm.alignment._token_rewards import _spans, token_rewards
from bayesrm.alignment.projections import PolicyGradient, RewardedTokens, TokenPolicyGradient
from bayesrm.errors import ArgumentError, PersistenceError
from bayesrm.programs import ExponentialTilt, GoodnessPosterior, ScoredCandidates
from bayesrm.token_beliefs import TokenBelief

from . import policies

BETA = 0.3
BASELINES = ("position", "sequence", "none")


class World:
    """All responses of at most three of the tokens 0 (the end), 1 and 2, with a table for each thing there is.

    Attributes:
        log_q: log-probabilities of tokens under the policy, shape `(15, 3)`; `log_p0` under the reference, `log_other`
            under another policy.
        rewards: Rewards of tokens, which depend on what stands before them.
        jacobian: Derivative of `log_q` with respect to the policy's logits, shape `(15, 3, parameters)`.
        gradient: Of the objective, by automatic differentiation of its sum over all responses.
    """

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
        responses = [(*p, 0) for p in prefixes] + list(itertools.product((1, 2), repeat=3))
        shape = (len(responses), 3)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        places = torch.zeros((*shape, 2), dtype=torch.int64)
        for row, tokens in enumerate(responses):
            for t, token in enumerate(tokens):
                self.mask[row, t] = True
                places[row, t] = torch.tensor([prefixes.index(tokens[:t]), token])

        def table():
            return torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64)

        def along(values):
            return torch.where(self.mask, values[places[..., 0], places[..., 1]], 0.0)

        theta = table()
        self.log_p0, self.rewards = along(table().log_softmax(1)), along(table())
        self.log_other = along((theta + 0.5 * table()).log_softmax(1))

        def objective(logits):
            log_q = along(logits.log_softmax(1))
            probability = log_q.sum(1).exp()
            return (probability * (self.rewards - BETA * (log_q - self.log_p0)).sum(1)).sum()

        self.log_q = along(theta.log_softmax(1))
        assert float(self.log_q.sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-12)
        self.jacobian = torch.autograd.functional.jacobian(lambda x: along(x.log_softmax(1)), theta).flatten(2)
        (gradient,) = torch.autograd.grad(objective(theta.requires_grad_()), theta)
        self.gradient = gradient.flatten()
        self.pairs = torch.cartesian_prod(torch.arange(15), torch.arange(15))

    def candidates(self, rows, proposal):
        """The responses at `rows`, shape `(B, n)`, as candidates drawn from the proposal."""
        sums = {name: getattr(self, name)[rows].sum(-1) for name in ("rewards", "log_p0")}
        belief = brm.RewardBelief(sums["rewards"], torch.zeros(*rows.shape, 1, dtype=torch.float64))
        drawn = None if proposal is None else proposal[rows].sum(-1)
        return ScoredCandidates(belief, sums["log_p0"], drawn)

    def tokens(self, rows, **changed):
        values = {"log_probs": self.log_q, "reference": self.log_p0, "rewards": self.rewards, "mask": self.mask}
        return RewardedTokens(**{name: value[rows] for name, value in (values | changed).items()})

    def gradients(self, projection, rows, proposal, **changed):
        """Minus the gradient of each prompt's loss with respect to the policy's logits, shape `(B, parameters)`."""
        tokens = self.tokens(rows, **changed)
        leaf = tokens.log_probs.clone().requires_grad_()
        method = Method(GoodnessPosterior(ExponentialTilt(BETA, maximum=0.0)), projection, num_candidates=rows.shape[1])
        posterior = method.weigh(self.candidates(rows, proposal))
        if method.needs_token_rewards:
            losses = method.loss(dataclasses.replace(tokens, log_probs=leaf), posterior)
        else:
            losses = method.loss(torch.where(tokens.mask, leaf, 0.0).sum(-1), posterior)
        (found,) = torch.autograd.grad(losses.sum(), leaf)
        return -torch.einsum("bnt,bntp->bp", found, self.jacobian[rows])

    def moments(self, projection, proposal=None, **changed):
        """Mean and total variance of the gradient from a pair of independent draws, by going through all pairs."""
        proposal = self.log_q if proposal is None else proposal
        found = self.gradients(projection, self.pairs, proposal, **changed)
        weight = proposal.sum(1)[self.pairs].sum(1).exp()
        mean = (weight[:, None] * found).sum(0)
        return mean, float((weight[:, None] * (found - mean).square()).sum())


@pytest.fixture(scope="module")
def worlds():
    return [World(seed) for seed in range(5)]


@pytest.mark.parametrize("baseline", BASELINES)
def test_gradient_over_all_responses_is_that_of_the_objective(worlds, baseline):
    everything = torch.arange(15)[None]
    for world in worlds:
        (found,) = world.gradients(TokenPolicyGradient(BETA, baseline=baseline), everything, None)
        torch.testing.assert_close(found, world.gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("proposal", ["log_q", "log_other"])
def test_expected_gradient_of_draws_is_that_of_the_objective(worlds, baseline, proposal):
    for world in worlds:
        mean, _ = world.moments(TokenPolicyGradient(BETA, baseline=baseline), getattr(world, proposal))
        torch.testing.assert_close(mean, world.gradient, rtol=1e-10, atol=1e-12)


def test_what_is_not_the_gradient(worlds):
    """Negative controls: a discount, a temperature, a clip, and rewards that come a token too late."""
    world = worlds[0]
    scale = float(world.gradient.norm())

    def miss(projection, proposal=None, **changed):
        return float((world.moments(projection, proposal, **changed)[0] - world.gradient).norm()) / scale

    late = torch.nn.functional.pad(world.rewards[:, :-1], (1, 0))
    assert miss(TokenPolicyGradient(BETA)) < 1e-10
    assert miss(TokenPolicyGradient(BETA, discount=0.8)) > 0.05
    assert miss(TokenPolicyGradient(2 * BETA)) > 0.05
    assert miss(TokenPolicyGradient(BETA, clip=1.0), world.log_other) > 0.05
    assert miss(TokenPolicyGradient(BETA), rewards=torch.where(world.mask, late, 0.0)) > 0.05


def noise(world, shift):
    """Total variance of the gradient from two draws, as a share of that with the reward of whole responses."""
    world = copy.copy(world)
    world.rewards = torch.where(world.mask, world.rewards + shift, 0.0)
    # Its returns are in nats.
    whole = BETA**2 * world.moments(PolicyGradient())[1]
    return {b: world.moments(TokenPolicyGradient(BETA, baseline=b))[1] / whole for b in BASELINES}


def test_rewards_to_go_have_less_noise_than_rewards_of_responses():
    """The variances are exact; they differ between worlds."""
    worlds = [World(seed) for seed in range(20)]
    for world in worlds:
        torch.testing.assert_close(BETA * world.moments(PolicyGradient())[0], world.gradient, rtol=1e-9, atol=1e-11)
    shares = [noise(world, 0.0) for world in worlds]
    # 0.785, 0.556 and 0.988.
    assert np.mean([s["position"] for s in shares]) < 0.82
    assert min(s["position"] for s in shares) < 0.6
    assert max(s["position"] for s in shares) < 1.0
    # Where every token earns 2 more, a response's length decides: 0.89 on average, up to 1.23; without a baseline 1.86.
    shares = [noise(world, 2.0) for world in worlds[:8]]
    assert np.mean([s["position"] for s in shares]) < 0.93
    assert np.mean([s["none"] for s in shares]) > 1.5


def naive(tokens, candidates, settings, b):
    """Coefficients of log q of each token in a prompt's loss, in loops."""
    keep = [i for i in range(candidates.mask.shape[1]) if candidates.mask[b, i]]
    n, returns, ratio, lengths = len(keep), {}, {}, {}
    for i in keep:
        lengths[i] = int(tokens.mask[b, i].sum())
        log_q = tokens.log_probs[b, i].tolist()
        earned = [
            float(tokens.rewards[b, i, t]) - settings.temperature * (log_q[t] - float(tokens.reference[b, i, t]))
            for t in range(lengths[i])
        ]
        returns[i] = [
            sum(settings.discount ** (s - t) * earned[s] for s in range(t, lengths[i])) for t in range(lengths[i])
        ]
        ratio[i] = math.exp(sum(log_q[: lengths[i]]) - float(candidates.log_proposal[b, i]))
        ratio[i] = min(ratio[i], settings.clip or math.inf)

    def at(i, t):
        t = 0 if settings.baseline == "sequence" else t
        return returns[i][t] if t < lengths[i] else 0.0

    found = np.zeros(tokens.mask.shape[1:])
    for i in keep:
        for t in range(lengths[i]):
            baseline = 0.0
            if settings.baseline != "none":
                if candidates.exhaustive:
                    baseline = sum(ratio[j] * at(j, t) for j in keep) / n
                else:
                    baseline = sum(at(j, t) for j in keep if j != i) / (n - 1)
            found[i, t] = -ratio[i] * (returns[i][t] - baseline) / n
    return found


@pytest.mark.parametrize("drawn", [False, True], ids=["all", "drawn"])
@pytest.mark.parametrize(
    "settings",
    [
        TokenPolicyGradient(),
        TokenPolicyGradient(0.0, 0.7),
        TokenPolicyGradient(0.4, 0.9, "sequence", clip=1.2),
        TokenPolicyGradient(0.4, 1.0, "none"),
    ],
    ids=["plain", "discounted", "sequence", "none"],
)
def test_gradient_is_that_of_a_loop(settings, drawn):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    real = torch.tensor([[True] * 4, [True, True, False, True]])
    lengths = torch.tensor([[3, 1, 5, 2], [4, 5, 2, 1]])
    mask = torch.arange(5) < lengths[..., None]
    inside = mask & real[..., None]
    # What counts for nothing is not a number.
    log_q = torch.where(inside, -normal(2, 4, 5).abs(), torch.nan).requires_grad_()
    reference, rewards = (torch.where(inside, normal(2, 4, 5), torch.nan) for _ in range(2))
    sums = torch.where(real, torch.where(inside, log_q.detach(), 0.0).sum(-1), torch.nan)
    belief = brm.RewardBelief(normal(2, 4), torch.zeros(2, 4, 1).double(), real)
    candidates = ScoredCandidates(belief, sums, sums + 0.3 * normal(2, 4) if drawn else None)
    tokens = RewardedTokens(log_q, reference, rewards, mask)
    posterior = Method(GoodnessPosterior(), settings, num_candidates=4).weigh(candidates)
    losses = settings(tokens, posterior)
    (gradient,) = torch.autograd.grad(losses.sum(), log_q)
    for b in range(2):
        expected = naive(dataclasses.replace(tokens, log_probs=log_q.detach()), candidates, settings, b)
        np.testing.assert_allclose(gradient[b], expected, rtol=1e-10, atol=1e-12)
        value = np.nansum(expected * np.nan_to_num(log_q.detach()[b].numpy()))
        assert float(losses[b].detach()) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"discount": 0.0}, "discount"),
        ({"discount": 1.1}, "discount"),
        ({"baseline": "value"}, "baseline"),
        ({"k": -1.0}, "k"),
        ({"clip": 0.5}, "clip"),
    ],
)
def test_settings_are_checked(settings, name):
    with pytest.raises(ArgumentError, match=f"`{name}` is"):
        TokenPolicyGradient(**settings)


def test_what_does_not_fit_is_refused(worlds):
    world = worlds[0]
    one, two = torch.tensor([[3]]), torch.tensor([[3, 4]])
    method = Method(GoodnessPosterior(ExponentialTilt(BETA, maximum=0.0)), TokenPolicyGradient(), num_candidates=2)
    assert method.needs_token_rewards
    assert not method.needs_tokens
    alone, pair = (method.weigh(world.candidates(rows, world.log_q)) for rows in (one, two))
    with pytest.raises(ArgumentError, match="at least 2 candidates"):
        method.loss(world.tokens(one), alone)
    assert method.loss(world.tokens(one), method.weigh(world.candidates(one, None))).shape == (1,)
    with pytest.raises(ArgumentError, match=r"`tokens` are of \(1, 1\) candidates"):
        method.loss(world.tokens(one), pair)
    with pytest.raises(ArgumentError, match=r"`policy` is a Tensor; TokenPolicyGradient takes RewardedTokens"):
        method.loss(torch.zeros(1, 2), pair)
    with pytest.raises(ArgumentError, match=r"`policy` is a RewardedTokens; PolicyGradient takes log-probabilities"):
        dataclasses.replace(method, projection=PolicyGradient()).loss(world.tokens(two), pair)
    with pytest.raises(ArgumentError, match="not finite"):
        method.loss(world.tokens(two, rewards=world.rewards + torch.inf), pair)
    with pytest.raises(ArgumentError, match="`rewards` requires gradients"):
        dataclasses.replace(world.tokens(two), rewards=world.rewards[two].requires_grad_())
    with pytest.raises(ArgumentError, match="`mask` has gaps"):
        dataclasses.replace(world.tokens(two), mask=world.mask[None, :2].flip(-1))
    with pytest.raises((ArgumentError, TypeError), match="reference"):
        dataclasses.replace(world.tokens(two), reference=world.log_p0[one])


class SaysWord:
    """A posterior that rewards each `w1` with 1; its tokens are pieces of two characters and the end.

    Attributes:
        std: Standard deviation of every token's reward.
    """

    def __init__(self, std=0.0, word="w1"):
        self.std, self.word = std, word
        self.asked = []

    def predict(self, prompts, candidates):
        most = max(map(len, candidates))
        mean, mask = torch.zeros(len(candidates), most), torch.zeros(len(candidates), most, dtype=torch.bool)
        for row, responses in enumerate(candidates):
            for place, response in enumerate(responses):
                mean[row, place], mask[row, place] = response.split().count(self.word), True
        return brm.RewardBelief(mean, 0.1 * torch.eye(most).expand(len(candidates), -1, -1), mask)

    def predict_tokens(self, prompts, responses):
        self.asked.append(list(zip(prompts, responses, strict=True)))
        pieces = [[(i, min(i + 2, len(r))) for i in range(0, len(r), 2)] + [(len(r), len(r))] for r in responses]
        shape = (len(responses), max(map(len, pieces)))
        mean, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        spans = torch.zeros(*shape, 2, dtype=torch.int64)
        for row, (response, found) in enumerate(zip(responses, pieces, strict=True)):
            spans[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), True
            by_character, place = np.zeros(len(response)), 0
            for word in response.split():
                place = response.index(word, place)
                by_character[place : place + len(word)] = (word == self.word) / len(word)
                place += len(word)
            mean[row, : len(found)] = torch.tensor([by_character[a:b].sum() for a, b in found])
        return TokenBelief(tuple(responses), spans, mean, torch.where(mask, self.std, 0.0), mask)


def rewards_of(policy, projection, texts, reward=None):
    sequences = policy.encode(["w5"] * sum(map(len, texts)), [text for row in texts for text in row])
    prompts = [f"w5 {'w6 ' * row}".strip() for row in range(len(texts))]
    return token_rewards(reward or SaysWord(), projection, policy, prompts, texts, sequences), sequences


def test_rewards_arrive_at_the_policys_tokens():
    policy, texts = policies.policy("gpt2"), [["w1 w2 w1", "w12"], ["w1", "w1"]]
    reward = SaysWord()
    found, _ = rewards_of(policy, TokenPolicyGradient(), texts, reward)
    # Pieces `w1`, ` w`, `2 `, `w1`: the spaces belong to the words after them.
    expected = [[[1.0, 0.0, 1.0, 0.0], [0.0] * 4], [[1.0, 0.0, 0.0, 0.0]] * 2]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    # What was drawn twice is read once.
    assert reward.asked == [[("w5", "w1 w2 w1"), ("w5", "w12"), ("w5 w6", "w1")]]


def test_doubt_is_taken_off_before_tokens_are_matched():
    policy, texts = policies.policy("gpt2"), [["w1 w2 w1", "w3"]]
    found, sequences = rewards_of(policy, TokenPolicyGradient(k=2.0), texts, SaysWord(std=0.25))
    # Four pieces and the end, each 0.5 less; and two pieces.
    torch.testing.assert_close(found.sum(2), torch.tensor([[2.0 - 2.5, -1.0]]))
    assert sequences.lengths.tolist() == [4, 2]
    # `w1` is the first piece; ` w2` has half of its two pieces' four characters and one more.
    torch.testing.assert_close(found[0, 0], torch.tensor([0.5, -0.75, 0.25, -0.5]))


def test_responses_without_words_get_the_lowest_sum():
    policy = policies.policy("gpt2")
    texts = [["w1 w1", "", "w1"], ["", "", ""]]
    found, _ = rewards_of(policy, TokenPolicyGradient(), texts)
    assert found[0].tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert not found[1].any()


def byte_tokenizer():
    """Every byte is a token, after the end of the sequence and the pair `ab`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", "ab", *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def test_spans_of_drawn_tokens():
    policy = policies.policy("gpt2", tokens=byte_tokenizer())
    tokenizer = policy.tokenizer

    def spans(text, ids=None):
        ids = [*tokenizer(text)["input_ids"], 0] if ids is None else ids
        return _spans(policy, ids, text).tolist()

    assert spans("xab") == [[0, 1], [1, 3], [3, 3]]
    # The same text in tokens that the tokenizer would not choose, cut before its end.
    a, b = (tokenizer.convert_tokens_to_ids(t) for t in "ab")
    assert spans("ab", [a, b]) == [[0, 1], [1, 2]]
    # Two bytes of a letter, four of a sign: the last one completes it.
    assert spans("éx") == [[0, 0], [0, 1], [1, 2], [2, 2]]
    assert spans("x😀") == [[0, 1], [1, 1], [1, 1], [1, 1], [1, 2], [2, 2]]
    # A draw may end in the middle of a sign.
    half = tokenizer("😀")["input_ids"][:2]
    text = policy.decode([half])[0]
    assert spans(text, half)[-1][1] == len(text)
    with pytest.raises(ArgumentError, match="cannot be found in the response 'zz'"):
        spans("zz", [a, b])


def test_spans_where_the_tokenizer_changes_the_text():
    from tokenizers import normalizers

    tokens = policies.tokenizer()
    tokens.backend_tokenizer.normalizer = normalizers.Lowercase()
    policy = policies.policy("gpt2", tokens=tokens)
    (ids,) = policy.encode(["w1"], ["W1  w2"]).responses
    assert _spans(policy, ids, "W1  w2").tolist() == [[0, 2], [4, 6], [6, 6]]


METHOD = Method(
    GoodnessPosterior(ExponentialTilt(0.1)), TokenPolicyGradient(0.1, k=0.5), proposal="policy", num_candidates=4
)
PROMPTS = [f"w{i} w{i + 1}" for i in range(10)]


def run(reward=None, method=METHOD, rounds=4, policy=None, **settings):
    policy = policies.policy("gpt2") if policy is None else policy
    training = brm.Training(**{"epochs": 2.0, "batch_size": 2, "learning_rate": 5e-3} | settings)
    report = align(
        policy, reward or SaysWord(std=0.1), PROMPTS, method=method, rounds=rounds, prompts_per_round=8, seed=3,
        training=training, keep_rounds=None,
    )  # fmt: skip
    return policy, torch.cat([p.detach().reshape(-1) for p in policy.trainable.values()]), report


class InterruptedRunError(Exception):
    pass


class Interrupt(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 13:
            raise InterruptedRunError


def test_a_policy_learns_to_say_the_word():
    method = brm.alignment.load_method("token_policy_gradient")
    _, _, report = run(rounds=3, method=method, learning_rate=1e-2)
    # At most 8 words; 0.5 of them at the start, and 8.0 at the end.
    assert report.rounds[0].reward < 1.5
    assert report.final.reward > 6.0
    assert report.final.kl_to_reference > 1.0


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    place = {"output_dir": str(tmp_path / "run"), "save_steps": 3}
    _, whole, report = run(save_steps=3)
    with pytest.raises(InterruptedRunError):
        run(**place, callbacks=(Interrupt(),))
    _, resumed, second = run(**place)
    assert second.resumed_from == str(tmp_path / "run" / "checkpoint-12")
    assert torch.equal(whole, resumed)
    assert second.rounds == report.rounds
    assert second.final == report.final
    file = tmp_path / "run" / "round-00001.safetensors"
    found = Round.load(file)
    found.save(tmp_path / "again.safetensors")
    again = Round.load(tmp_path / "again.safetensors")
    for name in ("token_rewards", "token_reference"):
        assert torch.equal(getattr(again, name), getattr(found, name))
        assert getattr(found, name).shape == (8, 4, int(found.sequences.lengths.max()))
    torch.testing.assert_close(found.token_reference.sum(2), found.candidates.reference)
    assert found.target_values is None
    with pytest.raises(PersistenceError, match="k"):
        run(**place, method=dataclasses.replace(METHOD, projection=TokenPolicyGradient(0.1, k=0.7)))


def test_two_parts_of_a_round_are_joined():
    from bayesrm.alignment._propose import Proposer, _joined
    from bayesrm.engines._processes import Processes

    policy = policies.policy("gpt2")

    def part(index, count):
        processes = dataclasses.replace(Processes.current(policy.device), index=index, count=count)
        own = [i for i in range(5) if i % count == index]
        proposer = Proposer(policy, METHOD, SaysWord(), None, None, None, 1.0, 64, processes)
        return proposer._part([PROMPTS[i] for i in own], own, None, 7)

    whole, joined = part(0, 1), _joined([part(0, 2), part(1, 2)], 5)
    assert joined.texts == whole.texts
    torch.testing.assert_close(joined.token_rewards, whole.token_rewards)
    torch.testing.assert_close(joined.token_reference, whole.token_reference, rtol=0, atol=1e-5)


def test_given_responses_are_rewarded_too():
    policy, reward = policies.policy("gpt2"), SaysWord()
    given = [["w1 w1", "w2", "w3 w1 w4", "w5"]] * 10
    report = align(
        policy, reward, PROMPTS, method=METHOD, candidates=given, rounds=3,
        training=brm.Training(epochs=1.0, batch_size=5, learning_rate=1e-2),
    )  # fmt: skip
    assert report.rounds[-1].reward > report.rounds[0].reward


def test_a_reward_must_predict_tokens():
    with pytest.raises(ArgumentError, match="does not predict rewards of tokens, and TokenPolicyGradient takes them"):
        run(lambda prompts, candidates: SaysWord().predict(prompts, candidates))

    class Other(SaysWord):
        def predict_tokens(self, prompts, responses):
            return super().predict_tokens(prompts, [response + " " for response in responses])

    with pytest.raises(ArgumentError, match="a belief about other responses"):
        run(Other())

    class Wrong(SaysWord):
        def predict_tokens(self, prompts, responses):
            return self.predict(prompts, [[response] for response in responses])

    with pytest.raises(ArgumentError, match="returned a RewardBelief"):
        run(Wrong())


def test_methods_of_whole_responses_ask_for_no_tokens():
    reward = SaysWord()
    method = Method(GoodnessPosterior(), projections.ListwiseCrossEntropy(), num_candidates=2)
    run(reward, method=method, rounds=1)
    assert not reward.asked


def test_a_token_posterior_rewards_what_it_predicts(tmp_path):
    """The rewards that arrive sum to the rewards of whole responses, which the same posterior predicts."""
    tokens = policies.tokenizer()
    tokens.save_pretrained(tmp_path / "model")
    policies.model("gpt2", len(tokens)).save_pretrained(tmp_path / "model")
    program = brm.InverseRL(brm.rewards.TokenReward(str(tmp_path / "model"), rank=0, device="cpu", max_new_tokens=16))
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w1 w{i}"} for i in range(4)]
    engine = brm.AVRIL(training=brm.Training(epochs=2.0, batch_size=2, learning_rate=1e-2))
    posterior = brm.fit(program, brm.Demonstrations.load(rows), inference=engine)
    place = tmp_path / "run"
    run(posterior, method=dataclasses.replace(METHOD, projection=TokenPolicyGradient(0.1)), rounds=1,
        output_dir=str(place))  # fmt: skip
    found = Round.load(place / "round-00000.safetensors")
    words = torch.tensor([[bool(text) for text in texts] for texts in found.texts])
    sums = found.token_rewards.sum(2)
    assert float(sums[words].std()) > 0.01
    torch.testing.assert_close(sums[words], found.candidates.belief.mean.float()[words], rtol=1e-4, atol=1e-4)
    # A run is known by the network, not by the latents of the likelihood alone, of which there are none here.
    before = described(posterior)
    assert described(posterior) == before
    with torch.no_grad():
        posterior.head.scorer.heads.bias += 1.0
    assert described(posterior) != before


def test_networks_count_by_their_weights():
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    assert described(one) != described(other)
    other.load_state_dict(one.state_dict())
    assert described(one) == described(other)
