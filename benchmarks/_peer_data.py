"""Pairs for the comparison with peers: AlpacaEval's responses and its models, judged or with simulated choices."""

import bayesian_head
import numpy as np
import pyarrow.parquet as pq
from _common import data_folder
from _contenders import Pairs
from numpy.typing import NDArray

#: Pairs drawn for each AlpacaEval prompt, and the spread of their true differences where these are simulated.
PAIRS_A_PROMPT, TRUE_SPREAD = 3, 2.0


def load_alpaca(*, simulated: bool, seed: int = 0) -> Pairs:
    """Pairs of responses to AlpacaEval prompts, the better one first."""
    candidates = bayesian_head.load(data_folder())
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.unique(candidates.prompt), PAIRS_A_PROMPT)
    drawn = bayesian_head.draw_pairs(candidates, prompts, rng)
    used, index = np.unique(drawn, return_inverse=True)
    features = candidates.features[used].astype(np.float64)
    pairs = index.reshape(drawn.shape)
    if not simulated:
        better = np.argmax(candidates.quality[drawn], axis=1)
        return Pairs(features, _ordered(pairs, better), prompts)
    scale = features.std(0)
    values = (features - features.mean(0)) / np.where(scale > 0, scale, 1.0)
    reward = values @ rng.normal(size=values.shape[1])
    difference = reward[pairs[:, 0]] - reward[pairs[:, 1]]
    reward *= TRUE_SPREAD / difference.std()
    difference = reward[pairs[:, 0]] - reward[pairs[:, 1]]
    better = (rng.random(len(pairs)) > 1 / (1 + np.exp(-difference))).astype(np.int64)
    ordered = _ordered(pairs, better)
    return Pairs(features, ordered, prompts, reward[ordered[:, 0]] - reward[ordered[:, 1]])


def _ordered(pairs: NDArray[np.int64], better: NDArray[np.int64]) -> NDArray[np.int64]:
    rows = np.arange(len(pairs))
    return np.stack([pairs[rows, better], pairs[rows, 1 - better]], axis=1)


def load_items(*, simulated: bool, seed: int = 0) -> Pairs:
    """Comparisons of models, an indicator feature for each; two a prompt."""
    columns = ["prompt_id", "model", "gold"]
    table = pq.read_table(data_folder() / "alpaca_eval_candidates.parquet", columns=columns).to_pandas()
    left_out = table["model"].isin(bayesian_head.LEFT_OUT) | table["model"].str.endswith(bayesian_head.LEFT_OUT_STYLES)
    table = table[~left_out].drop_duplicates(["prompt_id", "model"])
    models = np.unique(table["model"])
    rng = np.random.default_rng(seed)
    strength = rng.normal(size=len(models))
    pairs, prompts = [], []
    for number, (_, answers) in enumerate(table.groupby("prompt_id")):
        model = np.searchsorted(models, answers["model"].to_numpy())
        gold = answers["gold"].to_numpy()
        for _ in range(2):
            a, b = rng.choice(len(model), size=2, replace=False)
            difference = strength[model[a]] - strength[model[b]]
            wins = rng.random() < 1 / (1 + np.exp(-difference)) if simulated else gold[a] > gold[b]
            pairs.append((model[a], model[b]) if wins else (model[b], model[a]))
            prompts.append(number)
    found = np.array(pairs)
    truth = strength[found[:, 0]] - strength[found[:, 1]] if simulated else None
    return Pairs(np.eye(len(models)), found, np.array(prompts), truth, across_prompts=True)
