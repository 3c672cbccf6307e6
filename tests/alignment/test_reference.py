"""Another model as the reference of a policy: its distribution, the target that it makes, and runs that are resumed."""

import copy

import peft
import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.alignment import Method, Policy, PolicyLoRA, align, projections
from bayesrm.alignment._reference import ReferenceWeights
from bayesrm.errors import ArgumentError, PersistenceError

from . import policies
from .align_script import METHODS, count_reward
from .test_align import Interrupt, InterruptedRunError, all_responses, training

LORA = PolicyLoRA(rank=2, alpha=8.0)
LIMITS = {"device": "cpu", "max_prompt_tokens": 16, "max_new_tokens": 8}
PROMPTS = [f"w{i} w{i + 1}" for i in range(6)]


def log_probs(policy, sequences):
    with torch.no_grad():
        return policy.log_probs(sequences)


@pytest.fixture(params=["gpt2", "llama"])
def folders(request, tmp_path):
    """A model, another of the same kind, and an adapter on the first that does something."""
    policies.policy(request.param).save_pretrained(tmp_path / "base")
    policies.policy(request.param, seed=1).save_pretrained(tmp_path / "other")
    tuned = policies.moved(Policy.from_pretrained(str(tmp_path / "base"), lora=LORA, **LIMITS))
    tuned.save_pretrained(tmp_path / "adapter")
    return {name: str(tmp_path / name) for name in ("base", "other", "adapter")} | {"kind": request.param}


@pytest.mark.parametrize(
    ("policy", "lora", "reference"),
    [
        *(("base", lora, reference) for lora in (None, LORA) for reference in ("other", "adapter", "base")),
        *(("adapter", None, reference) for reference in ("base", "other", "adapter")),
    ],
)
def test_inside_the_block_the_policy_is_the_other_model(policy, lora, reference, folders):
    found = Policy.from_pretrained(folders[policy], reference=folders[reference], lora=lora, **LIMITS)
    sequences = found.encode(*policies.texts(6))
    alone, other = (log_probs(Policy.from_pretrained(folders[k], **LIMITS), sequences) for k in (policy, reference))
    assert torch.equal(log_probs(found, sequences), alone)
    policies.moved(found)
    moved = log_probs(found, sequences)
    with found.using(found.reference):
        torch.testing.assert_close(log_probs(found, sequences), other, rtol=0, atol=1e-4)
    assert torch.equal(log_probs(found, sequences), moved)
    assert all(p.requires_grad for p in found.trainable.values())
    # What the reference shares with the frozen model takes no memory; an adapter has its own modules only.
    if isinstance(found.reference, ReferenceWeights):
        held, frozen = len(found.reference.values), len(list(found.model.get_base_model().named_parameters()))
        assert held == 0 if reference == "base" else held < frozen


def test_what_is_frozen_stays_frozen(folders):
    # peft makes all weights of an adapter trainable when it switches the adapter on again.
    model = Policy.from_pretrained(folders["base"], lora=LORA, **LIMITS).model
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tokenizer = policies.policy("gpt2").tokenizer
    other = Policy.from_pretrained(folders["other"], **LIMITS)
    policy = Policy(model, tokenizer, max_prompt_tokens=16, max_new_tokens=8, reference=other)
    with policy.using(policy.reference):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert set(policy.trainable) == {name for name, learnt in before.items() if learnt}


def test_adapters_that_cannot_be_switched_off_are_refused(folders):
    base = Policy.from_pretrained(folders["base"], **LIMITS)
    own = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=folders["kind"] == "gpt2")
    base.model.add_adapter(own)
    other = Policy.from_pretrained(folders["other"], **LIMITS)
    with pytest.raises(ArgumentError, match=r"adapters can be switched off; wrap its model by `peft\.get_peft_model`"):
        Policy(base.model, base.tokenizer, max_prompt_tokens=16, max_new_tokens=8, reference=other)


def test_draws_and_mixtures_are_those_of_the_reference(folders):
    policy = Policy.from_pretrained(folders["adapter"], reference=folders["other"], **LIMITS)
    other = Policy.from_pretrained(folders["other"], **LIMITS)
    with policy.using(policy.reference):
        drawn = policy.generate(PROMPTS, 3, seed=0)
    assert drawn == other.generate(PROMPTS, 3, seed=0)
    # With all weight on the reference the mixture is the reference.
    sequences = policy.sequences(drawn)
    found = policy.mixture_log_probs(sequences, (policy.reference, 1.0))
    torch.testing.assert_close(found, log_probs(other, sequences), rtol=0, atol=1e-4)


def test_a_policy_object_is_copied():
    other = policies.policy("gpt2", seed=1, lora=LORA)
    policies.moved(other)
    start = policies.policy("gpt2")
    policy = Policy(start.model, start.tokenizer, max_prompt_tokens=16, max_new_tokens=8, reference=other)
    sequences = policy.encode(*policies.texts(6))
    before = log_probs(other, sequences)
    policies.moved(other, seed=3)
    with policy.using(policy.reference):
        torch.testing.assert_close(log_probs(policy, sequences), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_is_the_prior_of_the_target(lora):
    """BRAIn from one policy with the prior of another comes near p_other exp(reward) / Z, not p_start exp(reward)."""
    settings = {"count": 4, "limits": (4, 2), "spread": 0.3}
    other = policies.policy("gpt2", seed=5, **settings)
    start = policies.policy("gpt2", lora=lora, **settings)
    policy = Policy(start.model, start.tokenizer, max_prompt_tokens=4, max_new_tokens=2, reference=other)
    prompts = ["w1", "w2 w3"]
    method = Method(brm.GoodnessPosterior(), projections.ListwiseCrossEntropy(), num_candidates=32)

    def kl(prior):
        total = []
        for prompt in prompts:
            sequences, texts = all_responses(policy, prompt)
            log_q, log_p0 = log_probs(policy, sequences).double(), log_probs(prior, sequences).double()
            log_target = (log_p0 + count_reward([prompt], [texts]).mean[0]).log_softmax(0)
            total.append(float((log_target.exp() * (log_target - log_q)).sum()))
        return sum(total)

    own = copy.deepcopy(policy)
    before = kl(other)
    rate = 2e-2 if lora is None else 1e-1
    report = align(
        policy, count_reward, prompts, method=method, rounds=15,
        training=training(epochs=4.0, batch_size=2, learning_rate=rate),
    )  # fmt: skip
    assert kl(other) < 0.25 * before
    assert kl(own) > 2.0 * kl(other)
    # The first round is drawn from the start: its divergence from the other model is not 0.
    exact, variance = 0.0, 0.0
    for prompt in prompts:
        sequences, _ = all_responses(own, prompt)
        log_q, log_p0 = log_probs(own, sequences).double(), log_probs(other, sequences).double()
        mean = float((log_q.exp() * (log_q - log_p0)).sum())
        exact += mean / 2
        variance += float((log_q.exp() * (log_q - log_p0 - mean).square()).sum()) / 32 / 4
    assert abs(report.rounds[0].kl_to_reference - exact) < 4.5 * variance**0.5 < exact


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)])
def test_a_run_is_resumed_with_its_reference_and_no_other(lora, tmp_path):
    def started(reference, **settings):
        base = policies.policy("gpt2", lora=lora)
        policy = Policy(
            base.model, base.tokenizer, max_prompt_tokens=16, max_new_tokens=8,
            reference=None if reference is None else policies.policy("gpt2", seed=reference),
        )  # fmt: skip
        report = align(
            policy,
            count_reward,
            PROMPTS,
            method=METHODS["brain"],
            rounds=3,
            training=training(save_steps=1, **settings),
        )
        return torch.cat([p.detach().reshape(-1) for p in policy.trainable.values()]), report

    whole, first = started(1)
    place = {"output_dir": str(tmp_path / "run")}
    with pytest.raises(InterruptedRunError):
        started(1, callbacks=(Interrupt(3),), **place)
    for other in (None, 2):
        with pytest.raises(PersistenceError, match=r"policy\.reference"):
            started(other, **place)
    resumed, second = started(1, **place)
    assert second.resumed_from is not None
    assert torch.equal(whole, resumed)
    assert second.rounds == first.rounds
    assert not torch.equal(whole, started(2)[0])


def test_adapters_on_another_model_are_another_run(tmp_path):
    for seed in (0, 1):
        policy = policies.policy("gpt2", lora=LORA)
        with torch.no_grad():
            policy.model.get_input_embeddings().weight.mul_(1.0 + seed)
        if seed:
            # New adapters begin alike on both: the weights below them tell the runs apart.
            with pytest.raises(PersistenceError, match=r"policy\.frozen"):
                align(policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=1, training=run(tmp_path))
        else:
            align(policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=1, training=run(tmp_path))


def run(folder):
    return training(output_dir=str(folder / "run"))


class TestWhatIsNoReference:
    def make(self, reference, **settings):
        start = policies.policy("gpt2")
        return Policy(start.model, start.tokenizer, max_new_tokens=8, reference=reference, **settings)

    def test_another_vocabulary(self):
        with pytest.raises(ArgumentError, match="another vocabulary than the policy: token 'w20'"):
            self.make(policies.policy("gpt2", count=21))

    def test_another_architecture(self):
        for other in (policies.policy("llama"), policies.policy("gpt2", width=8)):
            with pytest.raises(ArgumentError, match="another architecture"):
                self.make(other)

    def test_settings_that_no_weight_shows(self):
        start = policies.policy("gpt2")
        config = copy.deepcopy(start.model.config)
        config.activation_function = "relu"
        model = transformers.GPT2LMHeadModel(config).eval()
        model.load_state_dict(start.model.state_dict())
        with pytest.raises(ArgumentError, match="other settings"):
            self.make(Policy(model, start.tokenizer, max_new_tokens=8))

    def test_what_cannot_be_loaded(self, tmp_path):
        policies.policy("gpt2").save_pretrained(tmp_path / "base")
        with pytest.raises(ArgumentError, match=r"`reference` '/no/such/model' cannot be loaded"):
            Policy.from_pretrained(str(tmp_path / "base"), reference="/no/such/model", device="cpu", max_new_tokens=8)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ArgumentError, match=r"`reference` .*empty"):
            Policy.from_pretrained(
                str(tmp_path / "base"), reference=str(tmp_path / "empty"), device="cpu", max_new_tokens=8
            )
