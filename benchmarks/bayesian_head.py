"""Does averaging over the posterior of a reward head predict preferences better than its own mode does?

Data: responses of 60 models to 569 prompts (AlpacaEval 2) with a judge's win rate against a reference; a pair's label
is the response with the higher logit. A linear Bradley-Terry reward on MiniLM features (response, response x prompt,
log length), prior precision tuned by the evidence, is fitted to pairs of responses to the training prompts. Scored on
pairs of responses to 220 held-out prompts: the posterior predictive of Laplace's approximation, and the plug-in
prediction of the same fit's mode. Models that shift style on purpose or cheat the judge are left out on both sides.
With noisy labels, 25% of the training labels are flipped, and scores are expectations over test labels flipped at the
same rate: what is predicted is the recorded answer. Each seed draws prompts, pairs and flips anew; intervals redraw
seeds, and prompts inside each seed.

Usage: python benchmarks/bayesian_head.py [--json FILE] [--quick]
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from _common import Claim, data_folder, main
from numpy.typing import NDArray
from safetensors.numpy import load_file

import bayesrm as brm
from bayesrm.diagnostics import Estimate, reliability

LEFT_OUT = ("NullModel", "gpt4_gamed")
LEFT_OUT_STYLES = ("_verbose", "_concise")
NUM_TEST_PROMPTS = 220
PAIRS_A_TEST_PROMPT = 20
#: Unit embeddings beside a standardised log length, and embeddings with entries of order one, as length has.
BLOCK_LENGTHS = (1.0, 384**0.5)
#: Bounds on gains, by (block length, flip rate, pairs); the intervals at 200 pairs are too wide for one.
MINIMUM_GAIN = {(1.0, 0.0, 1000): 0.0, (1.0, 0.0, 4000): 0.0}
INFERENCE = brm.Laplace(structure="full", prior_precision="marginal_likelihood")
#: Points of the posterior predictive; its integration error, about 1e-4 with 512, is far below a gain of interest.
NUM_SAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Responses that may be compared.

    Attributes:
        prompt: Prompt of each, from 0, shape `(n,)`.
        quality: Logit of the judge's win rate, clipped to [1e-6, 1 - 1e-6], shape `(n,)`.
        features: Response embedding, its product with the prompt's, log length; shape `(n, 769)`.
    """

    prompt: NDArray[np.int64]
    quality: NDArray[np.float64]
    features: NDArray[np.float32]


def load(folder: Path, *, block_length: float = 1.0) -> Candidates:
    """The responses of all models that neither game the judge nor shift style on purpose.

    Args:
        folder: Where the data are.
        block_length: Length of the response's embedding, and about that of its product with the prompt's. All weights
            share one prior, so this sets how far the prior lets embeddings count beside length.
    """
    table = pq.read_table(folder / "alpaca_eval_candidates.parquet", columns=["prompt_id", "model", "response", "gold"])
    arrays = load_file(folder / "alpaca_eval_features.safetensors")
    models = table["model"].to_pylist()
    keep = np.array([m not in LEFT_OUT and not m.endswith(LEFT_OUT_STYLES) for m in models])
    prompt = np.searchsorted(arrays["prompt_id"], np.asarray(table["prompt_id"]))
    gold = np.clip(np.asarray(table["gold"]), 1e-6, 1 - 1e-6)
    words = np.array([len(text.split()) for text in table["response"].to_pylist()])
    response = _unit(arrays["response"])
    product = response * _unit(arrays["prompt"])[prompt] * np.float32(response.shape[1] ** 0.5)
    length = np.log((words + 1) / 100).astype(np.float32)
    blocks = np.concatenate([response, product], axis=1) * np.float32(block_length)
    features = np.concatenate([blocks, length[:, None]], axis=1)
    return Candidates(prompt[keep], np.log(gold / (1 - gold))[keep], features[keep])


def _unit(embeddings: NDArray[np.float16]) -> NDArray[np.float32]:
    wide = embeddings.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def draw_pairs(candidates: Candidates, prompts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """One pair of responses of different quality for each entry of `prompts`, shape `(len(prompts), 2)`."""
    order = np.argsort(candidates.prompt, kind="stable")
    starts = np.searchsorted(candidates.prompt[order], np.arange(candidates.prompt.max() + 2))
    pairs = np.empty((len(prompts), 2), np.int64)
    for row, prompt in enumerate(prompts):
        members = order[starts[prompt] : starts[prompt + 1]]
        while True:
            pair = rng.choice(members, size=2, replace=False)
            # Equal qualities are answers at the floor of the judge's scale; neither is better.
            if candidates.quality[pair[0]] != candidates.quality[pair[1]]:
                break
        pairs[row] = pair
    return pairs


def comparisons(candidates: Candidates, pairs: NDArray[np.int64], outcome: NDArray[np.int64]) -> brm.Comparisons:
    """Choices between the given responses, holding only the items that they use."""
    used, index = np.unique(pairs, return_inverse=True)
    prompt = np.unique(candidates.prompt[used], return_inverse=True)[1]
    return brm.Comparisons.from_arrays(
        candidates.features[used], candidates=index.reshape(pairs.shape), outcome=outcome, prompt_index=prompt
    )


@dataclasses.dataclass(frozen=True)
class Trial:
    """Scores of one fit on held-out prompts.

    Attributes:
        gain: Mean log probability of the predictive minus that of the plug-in, by test prompt, shape `(prompts,)`.
        scores: NLL, accuracy and ECE by kind of prediction.
        fit: What the fit reported.
    """

    gain: NDArray[np.float64]
    scores: dict[str, float]
    fit: dict[str, Any]


def trial(
    candidates: Candidates, *, num_pairs: int, flip_rate: float, seed: int, num_test_prompts: int = NUM_TEST_PROMPTS
) -> Trial:
    """Fits to pairs on random training prompts and scores on the others."""
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.unique(candidates.prompt))
    test_prompts, train_prompts = prompts[:num_test_prompts], prompts[num_test_prompts:]
    test_pairs = draw_pairs(candidates, np.repeat(test_prompts, PAIRS_A_TEST_PROMPT), rng)
    train_pairs = draw_pairs(candidates, rng.choice(train_prompts, size=num_pairs), rng)
    better = [np.argmax(candidates.quality[pairs], axis=1) for pairs in (train_pairs, test_pairs)]
    flipped = rng.random(num_pairs) < flip_rate
    # Log length is standardised by the training responses alone.
    length = candidates.features[np.unique(train_pairs), -1]
    standardised = candidates.features.copy()
    standardised[:, -1] = (standardised[:, -1] - length.mean()) / length.std()
    candidates = dataclasses.replace(candidates, features=standardised)
    model = brm.RewardModel(reward=brm.rewards.Linear(), likelihood=brm.likelihoods.BradleyTerry())
    data = comparisons(candidates, train_pairs, np.where(flipped, 1 - better[0], better[0]))
    posterior = brm.fit(model, data, inference=INFERENCE, seed=seed)
    test = comparisons(candidates, test_pairs, better[1])
    log_prob, scores = {}, {}
    for name, p in (("predictive", posterior), ("plug_in", posterior.plug_in())):
        (group,) = p.predict_feedback(test, num_samples=NUM_SAMPLES).groups
        assert group.probs is not None
        probs = group.probs.numpy()
        chance = np.where(np.arange(2) == better[1][:, None], 1 - flip_rate, flip_rate)
        log_prob[name] = (chance * np.log(probs)).sum(1)
        top = probs.argmax(1)
        occurred = chance[np.arange(len(top)), top]
        scores[f"{name}.nll"] = float(-log_prob[name].mean())
        scores[f"{name}.ece"] = reliability(probs.max(1), occurred, num_bins=10).ece
        scores[f"{name}.accuracy"] = float(occurred.mean())
    gain = (log_prob["predictive"] - log_prob["plug_in"]).reshape(num_test_prompts, -1).mean(1)
    kept = ("seconds", "converged", "gradient_norm", "prior_precision", "log_evidence", "num_coordinates")
    return Trial(gain, scores, {k: getattr(posterior.report, k) for k in kept})


def nested_interval(values: Sequence[NDArray[np.float64]], *, num_resamples: int = 4000, seed: int = 0) -> Estimate:
    """Mean with a 95% bootstrap interval over seeds and, inside each seed, over its prompts.

    Args:
        values: For each seed one number a test prompt.
        num_resamples: Number of resamples.
        seed: Seed of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for b in range(num_resamples):
        chosen = [values[s] for s in rng.integers(len(values), size=len(values))]
        draws[b] = np.mean([v[rng.integers(len(v), size=len(v))].mean() for v in chosen])
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(np.mean([v.mean() for v in values])), float(low), float(high))


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    sizes = (200,) if quick else (200, 1000, 4000)
    settings = [(block_length, flip_rate) for block_length in BLOCK_LENGTHS for flip_rate in (0.0, 0.25)]
    claims, table = [], []
    for block_length, flip_rate in settings:
        candidates = load(data_folder(), block_length=block_length)
        for num_pairs in sizes:
            one = functools.partial(trial, candidates, num_pairs=num_pairs, flip_rate=flip_rate)
            trials = [one(seed=seed) for seed in range(2 if quick else 3)]
            labels = f"{num_pairs} {'25% flipped' if flip_rate else 'clean'} pairs"
            gain = nested_interval([t.gain for t in trials])
            name = f"{labels}, embeddings of length {block_length:.3g}: predictive over plug-in"
            claims.append(Claim(name, gain, minimum=MINIMUM_GAIN.get((block_length, flip_rate, num_pairs))))
            print(claims[-1].line, file=sys.stderr, flush=True)
            means = {key: float(np.mean([t.scores[key] for t in trials])) for key in trials[0].scores}
            setting = {"num_pairs": num_pairs, "flip_rate": flip_rate, "block_length": block_length}
            table.append(setting | means | {"fits": [t.fit for t in trials]})
    return claims, {"table": table}


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], run))
