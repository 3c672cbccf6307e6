"""What does a policy learn from rewards of tokens? AVA, sequence-to-sequence and Bradley-Terry rewards at equal budget.

Human choices between replies to red-teaming questions (HH-RLHF harmless), openings of 30 words. A MiniLM made into a
decoder and fine-tuned on chosen replies is the policy, and the backbone of the two token-level reward models; it is a
22M-parameter model whose text is not coherent, so that numbers compare rewards, not assistants.

- Bradley-Terry: `RewardModel` with adapters on the MiniLM encoder, MAP; policy gradient on the reward of the response.
- AVA-p: `InverseRL` on the same pairs; policy gradient on rewards-to-go of tokens.
- seq2seq: `LanguageFeedback` on the same pairs; policy gradient on rewards-to-go of tokens.

Each reward is divided by its standard deviation among the reference policy's candidates of a prompt, so that one
KL coefficient means the same for all; rounds, prompts, candidates, learning rate and steps are equal. Judged on prompts
that nothing was trained on: gain of an independent posterior (a Laplace posterior of a linear head on features of the
MiniLM encoder, fitted on other pairs), of the proxy itself, KL to the reference, length, refusals (a list of phrases);
and on prompts of another source (AlpacaEval) an independent posterior of that source.

Usage: python benchmarks/token_reward_policy.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, fitted rewards and finished runs are kept, and an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _alignment_texts import (
    ENCODER,
    MAX_NEW_TOKENS,
    MAX_PROMPT_TOKENS,
    Texts,
    accuracy,
    alpaca,
    fine_tuned,
    hh_harmless,
    measure,
    reward,
)
from _common import Claim, data_folder, main
from scipy.stats import spearmanr

import bayesrm as brm
from bayesrm.alignment import Method, Policy, align, projections
from bayesrm.diagnostics import Estimate, bootstrap

#: KL coefficient, in standard deviations of the reward for a nat.
TEMPERATURE = 0.1
REFUSAL = re.compile(
    r"\b(i('m| am) (not (sure|able|comfortable|going)|sorry)|sorry|i (can ?not|can't|won't)"
    r"|i don't (know|think|want|understand)"
    r"|unable to|not appropriate|against the law|illegal)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done."""

    pairs: int = 800
    steps: int = 125
    epochs: float = 2.0
    held_out: int = 64
    draws: int = 8
    rounds: int = 6
    prompts_per_round: int = 32
    candidates: int = 8


QUICK = Size(pairs=24, steps=3, epochs=1.0, held_out=6, draws=2, rounds=1, prompts_per_round=4, candidates=2)


def bradley_terry(policy: str, pairs: Sequence[dict[str, str]], training: brm.Training) -> brm.Posterior:
    """The usual reward model."""
    model = brm.RewardModel(
        brm.rewards.LoRA(ENCODER, rank=8, max_length=MAX_PROMPT_TOKENS + MAX_NEW_TOKENS), brm.likelihoods.BradleyTerry()
    )
    return brm.fit(model, brm.Comparisons.load(list(pairs)), inference=brm.MAP(training=training), seed=0)


def ava(policy: str, pairs: Sequence[dict[str, str]], training: brm.Training) -> brm.Posterior:
    """AVA-p."""
    reward = brm.rewards.TokenReward(policy, rank=8, max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=MAX_NEW_TOKENS)
    engine = brm.AVRIL(constraint_weight=0.1, training=training)
    return brm.fit(brm.InverseRL(reward), brm.Comparisons.load(list(pairs)), inference=engine, seed=0)


def seq2seq(policy: str, pairs: Sequence[dict[str, str]], training: brm.Training) -> brm.Posterior:
    """The sequence-to-sequence reward model."""
    corrector = brm.rewards.Corrector(
        policy, rank=8, max_prompt_tokens=2 * MAX_NEW_TOKENS + MAX_PROMPT_TOKENS, max_response_tokens=MAX_NEW_TOKENS,
        template="{prompt} [SEP] {response} [SEP]",
    )  # fmt: skip
    program = brm.programs.LanguageFeedback(corrector)
    return brm.fit(program, brm.Comparisons.load(list(pairs)), inference=brm.MAP(training=training), seed=0)


REWARDS: dict[str, Callable[[str, Sequence[dict[str, str]], brm.Training], brm.Posterior]] = {
    "Bradley-Terry": bradley_terry,
    "AVA-p": ava,
    "seq2seq": seq2seq,
}


def fitted(name: str, policy: str, texts: Texts, size: Size, folder: Path) -> brm.Posterior:
    """A reward, read from the cache where it is there."""
    kept = folder / f"reward-{name.lower()}"
    if kept.exists():
        return brm.Posterior.from_pretrained(kept)
    rate = 3e-3 if name == "Bradley-Terry" else 1e-3
    training = brm.Training(
        epochs=size.epochs, batch_size=8, learning_rate=rate, output_dir=str(folder / f"fit-{name.lower()}")
    )
    posterior = REWARDS[name](policy, texts.pairs[0][: size.pairs], training)
    posterior.save_pretrained(kept)
    return posterior


def method_of(name: str, scale: float, candidates: int) -> Method:
    """Policy gradient with the KL coefficient in the reward's own units."""
    temperature = TEMPERATURE * scale
    tilt = brm.GoodnessPosterior(brm.programs.ExponentialTilt(temperature=temperature))
    if name == "Bradley-Terry":
        return Method(tilt, projections.PolicyGradient(), num_candidates=candidates)
    projection: Any = projections.TokenPolicyGradient(temperature=temperature)
    return Method(tilt, projection, num_candidates=candidates)


def refusals(policy: Policy, prompts: Sequence[str], draws: int) -> np.ndarray:
    """Share of refusing draws for each prompt."""
    drawn = policy.generate(prompts, draws, seed=7, batch_size=128)
    return np.array([np.mean([bool(REFUSAL.search(r.text)) for r in group]) for group in drawn])


def run(quick: bool, cache: Path | None) -> tuple[list[Claim], dict[str, Any]]:
    """Fits the rewards, trains the policies, judges them."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if cache is None else cache
        texts = hh_harmless(data_folder(), num_held_out=size.held_out, seed=0)
        other = alpaca(
            data_folder(), num_pairs=400 if quick else 2000, num_demonstrations=10, num_held_out=size.held_out, seed=0
        )
        policy, facts = fine_tuned(texts, folder / "policy", steps=size.steps, batch_size=16, seed=0)
        independent, foreign = reward(texts.pairs[1], seed=1), reward(other.pairs[1], seed=1)
        agreement = accuracy(independent, texts.pairs[0])
        print(
            f"policy {facts}; the independent posterior agrees with {agreement:.3f} of the training pairs", flush=True
        )
        claims: list[Claim] = []
        found: dict[str, Any] = {"policy": facts, "agreement": agreement}
        for name in REWARDS:
            begin = time.perf_counter()
            proxy = fitted(name, str(folder / "policy"), texts, size, folder)
            seconds = {"fit": time.perf_counter() - begin}
            policy.assign(policy.reference)
            drawn = policy.generate(texts.prompts[:32], size.candidates, seed=5, batch_size=128)
            candidates = [list(dict.fromkeys(r.text for r in group if r.text.strip())) for group in drawn]
            rows = [row for row, group in enumerate(candidates) if len(group) > 1]
            belief = proxy.predict([texts.prompts[row] for row in rows], [candidates[row] for row in rows])
            spread = float(np.mean([belief[i].mean.std() for i in range(len(rows))]))
            words = [len(c.split()) for row in rows for c in candidates[row]]
            means = [float(m) for i in range(len(rows)) for m in belief[i].mean[0]]
            facts_of = {
                "accuracy on held-out pairs": accuracy(proxy, texts.pairs[1]),
                "standard deviation within prompts": spread,
                "rank correlation with length": float(spearmanr(words, means).statistic),
            }
            before = {
                "own": measure(policy, texts.held_out, proxy, independent, draws=size.draws, seed=99),
                "foreign": measure(policy, other.held_out, proxy, foreign, draws=size.draws, seed=99),
                "refusals": refusals(policy, texts.held_out, size.draws),
            }
            begin = time.perf_counter()
            training = brm.Training(
                epochs=1.0, batch_size=max(1, 32 // size.candidates), learning_rate=2e-5, schedule="constant",
                warmup_ratio=0.0, output_dir=str(folder / f"align-{name.lower()}"),
            )  # fmt: skip
            report = align(
                policy, proxy, texts.prompts, method=method_of(name, spread, size.candidates), rounds=size.rounds,
                prompts_per_round=size.prompts_per_round, training=training, generation_batch=128, seed=0,
            )  # fmt: skip
            seconds["align"] = time.perf_counter() - begin
            after = {
                "own": measure(policy, texts.held_out, proxy, independent, draws=size.draws, seed=99),
                "foreign": measure(policy, other.held_out, proxy, foreign, draws=size.draws, seed=99),
                "refusals": refusals(policy, texts.held_out, size.draws),
            }
            numbers = {
                "gain of the independent reward": after["own"].reward - before["own"].reward,
                "gain of the proxy, its standard deviations": (after["own"].proxy - before["own"].proxy) / spread,
                "KL to the reference, nats": after["own"].kl,
                "change of length, tokens": after["own"].length - before["own"].length,
                "change of the refusal rate": after["refusals"] - before["refusals"],
                "gain of the independent reward, other source": after["foreign"].reward - before["foreign"].reward,
                "KL to the reference, other source": after["foreign"].kl,
            }
            estimates = {key: _mean(values) for key, values in numbers.items()}
            claims += [Claim(f"{name}: {key}", estimate) for key, estimate in estimates.items()]
            found[name] = {
                **facts_of,
                "seconds": seconds,
                "steps": report.steps,
                "refusal rate": [float(before["refusals"].mean()), float(after["refusals"].mean())],
                "distinct pairs": [before["own"].distinct_2, after["own"].distinct_2],
                "samples": after["own"].samples,
                "numbers": {key: dataclasses.asdict(estimate) for key, estimate in estimates.items()},
            }
            shown = ", ".join(f"{key} {estimate}" for key, estimate in estimates.items())
            print(f"{name}: {facts_of}; {shown}; {seconds}", flush=True)
    return claims, found


def _mean(values: np.ndarray) -> Estimate:
    return bootstrap(lambda rows: float(values[rows].mean()), np.arange(len(values)), seed=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    own, rest = parser.parse_known_args()
    sys.exit(main((__doc__ or "").partition("\n")[0], lambda quick: run(quick, own.cache), rest))
