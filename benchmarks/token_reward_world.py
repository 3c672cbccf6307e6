"""Does AVRIL on a language model recover the rewards of tokens, in a world where they are known?

A world has ten words with a normal reward each, and one word (`w0`, a quarter of all words) that turns the sign of the
next word's reward, so that the reward of a token depends on what stands before it. Responses are draws of five to nine
words, human answers follow Bradley-Terry on the sums, demonstrations the soft-optimal policy of the true rewards for
six words. A GPT-2 of two small layers learns from

- preferences (AVA-p) with the weight of the temporal-difference term at 1 (AVRIL's code), 0.1 and 0, and both choices
  of the next value;
- demonstrations (AVA-d).

On tokens of fresh responses: rank correlation with the true rewards, and that of words behind `w0` alone; coverage of
the central 50% and 90% intervals, the slope of the truth on the posterior mean (above 1: rewards are shrunk), and the
correlation of whole responses' rewards. Beside it stand a linear model of word counts, whose posterior by Laplace is
close to exact but cannot know of `w0`, and the rewards shuffled among the tokens of a response.

Usage: python benchmarks/token_reward_world.py [--json FILE] [--quick]
"""

import dataclasses
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
import transformers
from _common import Claim, main
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers

import bayesrm as brm
from bayesrm.diagnostics import Estimate

WORDS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "AVA-p, weight 1": {"constraint_weight": 1.0},
    "AVA-p, weight 0.1": {"constraint_weight": 0.1},
    "AVA-p, weight 0.1, soft": {"constraint_weight": 0.1, "next_value": "soft"},
    "AVA-p, weight 0": {"constraint_weight": 0.0},
    "AVA-d, weight 1": {"constraint_weight": 1.0},
    "AVA-d, weight 0.1, soft": {"constraint_weight": 0.1, "next_value": "soft"},
}


@dataclasses.dataclass(frozen=True)
class World:
    """Rewards of words, and what is observed of them."""

    rewards: np.ndarray
    pairs: list[dict[str, str]]
    demonstrations: list[dict[str, str]]
    fresh: list[np.ndarray]

    def tokens(self, words: np.ndarray) -> np.ndarray:
        """True reward of each word of a response."""
        turned = np.concatenate([[False], words[:-1] == 0])
        values: np.ndarray = np.where(turned, -1.0, 1.0) * self.rewards[words]
        return values


def make_world(seed: int, num_pairs: int) -> World:
    """Draws a world."""
    rng = np.random.default_rng([3, seed])
    rewards = rng.normal(size=WORDS)
    rewards[0] = 0.0
    world = World(rewards, [], [], [])

    often = np.full(WORDS, 0.75 / (WORDS - 1))
    often[0] = 0.25

    def response() -> np.ndarray:
        return rng.choice(WORDS, size=rng.integers(5, 10), p=often)

    while len(world.pairs) < num_pairs:
        first, second = response(), response()
        if first.tolist() == second.tolist():
            continue
        gap = world.tokens(first).sum() - world.tokens(second).sum()
        better, worse = (first, second) if rng.random() < 1.0 / (1.0 + np.exp(-gap)) else (second, first)
        world.pairs.append({"prompt": "w0", "chosen": text(better), "rejected": text(worse)})
    world.demonstrations.extend(
        {"prompt": "w0", "completion": text(words)} for words in soft_optimal(rewards, 6, num_pairs, rng)
    )
    world.fresh.extend(response() for _ in range(200))
    return world


def soft_optimal(rewards: np.ndarray, length: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Responses of the Boltzmann policy that is soft-optimal for responses of `length` words."""
    # values[t][turned]: log sum over continuations with t words left.
    table = np.stack([rewards, -rewards])
    value, policies = np.zeros(2), []
    for _ in range(length):
        action_values = table + value[np.where(np.arange(WORDS) == 0, 1, 0)][None]
        value = np.log(np.exp(action_values).sum(1))
        policies.append(np.exp(action_values - value[:, None]))
    found = []
    for _ in range(count):
        words: list[int] = []
        for policy in reversed(policies):
            words.append(int(rng.choice(WORDS, p=policy[int(bool(words) and words[-1] == 0)])))
        found.append(np.array(words))
    return found


def text(words: np.ndarray) -> str:
    """A response as text."""
    return " ".join(f"w{word}" for word in words)


def save_model(folder: str, seed: int) -> None:
    """A small untrained language model."""
    vocabulary = {"<eos>": 0, "<pad>": 1, **{f"w{i}": 2 + i for i in range(WORDS)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        pad_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def judge(world: World, mean: list[np.ndarray], std: list[np.ndarray]) -> dict[str, float]:
    """What is reported of token rewards of the fresh responses."""
    truth = [world.tokens(words) for words in world.fresh]
    every, guess, spread = np.concatenate(truth), np.concatenate(mean), np.concatenate(std)
    turned = np.concatenate([np.concatenate([[False], words[:-1] == 0]) for words in world.fresh])
    away = np.abs(every - guess)
    rng = np.random.default_rng(0)
    shuffled = np.concatenate([rng.permutation(part) for part in mean])
    return {
        "rank correlation": float(spearmanr(every, guess).statistic),
        "rank correlation behind w0": float(spearmanr(every[turned], guess[turned]).statistic),
        "shuffled in responses": float(spearmanr(every, shuffled).statistic),
        "correlation of responses": float(np.corrcoef([t.sum() for t in truth], [m.sum() for m in mean])[0, 1]),
        "slope": float(np.polyfit(guess, every, 1)[0]),
        "coverage 50%": float((away < 0.6745 * spread).mean()),
        "coverage 90%": float((away < 1.6449 * spread).mean()),
        "mean std": float(spread.mean()),
    }


def fitted(world: World, name: str, seed: int, epochs: float) -> dict[str, float]:
    """Fits one of the settings and judges it."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, seed)
        reward = brm.rewards.TokenReward(folder, rank=0, max_prompt_tokens=4, max_new_tokens=12, device="cpu")
        training = brm.Training(epochs=epochs, batch_size=32, learning_rate=3e-3, schedule="linear")
        engine = brm.AVRIL(**SETTINGS[name], training=training)
        data: Any = (
            brm.Comparisons.load(world.pairs)
            if name.startswith("AVA-p")
            else brm.Demonstrations.load(world.demonstrations)
        )
        posterior = brm.fit(brm.InverseRL(reward), data, inference=engine, seed=seed)
        tokens = posterior.predict_tokens(["w0"] * len(world.fresh), [text(words) for words in world.fresh])
        mean = [tokens.mean[row, : len(words)].numpy() for row, words in enumerate(world.fresh)]
        std = [tokens.std[row, : len(words)].numpy() for row, words in enumerate(world.fresh)]
    return judge(world, mean, std)


def counted(world: World) -> dict[str, float]:
    """The linear model of word counts."""
    texts = list(dict.fromkeys(pair[side] for pair in world.pairs for side in ("chosen", "rejected")))
    place = {response: i for i, response in enumerate(texts)}
    counts = np.array([[response.split().count(f"w{i}") for i in range(WORDS)] for response in texts], dtype=float)
    data = brm.Comparisons.from_arrays(
        counts, candidates=[[place[p["chosen"]], place[p["rejected"]]] for p in world.pairs],
        outcome=[0] * len(world.pairs),
    )  # fmt: skip
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), brm.likelihoods.BradleyTerry())
    belief = brm.fit(model, data, inference=brm.Laplace()).predict(candidates=[np.eye(WORDS)])
    mean, std = belief.mean[0].numpy(), belief.std[0].numpy()
    return judge(world, [mean[words] for words in world.fresh], [std[words] for words in world.fresh])


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Fits every setting in every world."""
    seeds, pairs, epochs = (1, 200, 3.0) if quick else (3, 3000, 8.0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*SETTINGS, "word counts")}
    for seed in range(seeds):
        world = make_world(seed, pairs)
        for name in found:
            result = counted(world) if name == "word counts" else fitted(world, name, seed, epochs)
            found[name].append(result)
            print(f"world {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items()), flush=True)
    claims = []
    for name, results in found.items():
        for measure in results[0]:
            values = np.array([result[measure] for result in results])
            # Worlds are few: the range over them, not a standard error.
            estimate = Estimate(float(values.mean()), float(values.min()), float(values.max()), 1.0)
            minimum = None
            if name == "AVA-p, weight 0.1":
                minimum = {"rank correlation": 0.6, "rank correlation behind w0": 0.6, "coverage 90%": 0.85}.get(
                    measure
                )
            claims.append(Claim(f"{name}: {measure}", estimate, minimum=minimum))
    return claims, {"results": found}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sys.exit(main(__doc__.partition("\n")[0], run))
