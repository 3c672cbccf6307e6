"""A worker that fits peers in an environment of their own, for `engine_peers.py`, which starts it and talks to it.

It reads one JSON object a line: `{"method", "input", "output", "seed", "settings"}`. `input` is an `.npz` file with
`train_first`, `train_second`, `test_first`, `test_second` of shape `(pairs, num_features)`, the first response of a
training pair being the better one. It writes to `output`

- `mean`, `deviation`: mean and standard deviation of the reward of the first test response minus the second, under the
  joint distribution that the model keeps;
- `bounds`: sum of the standard deviations of the two rewards, each as the model publishes it;
- `probability`: the probability that the first is better, as the package itself computes it;

and answers with `{"fit_seconds", "predict_seconds", "notes"}` on one line.

Needs: `pip install rewarduq==0.1.0 "transformers<5" "datasets<4.5" "peft<0.18" "accelerate<1.13" "pandas<3" botorch`
(rewarduq 0.1.0 pins trl 0.23, which is older than transformers 5, and leaves the others open).
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


def backbone(folder: Path, width: int) -> str:
    """A network of `width` hidden units that is never run: RewardUQ's models load one, and read its width.

    Features are precomputed; they go to the heads by the `chosen_features` and `rejected_features` that RewardUQ itself
    adds to its training data.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", padding_side="right"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = BertConfig(
        vocab_size=5, hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def training_data(arrays: Arrays) -> Any:
    """Comparisons as RewardUQ's trainers read them: texts that stand for nothing, and the features."""
    from datasets import Dataset

    count = len(arrays["train_first"])
    return Dataset.from_dict(
        {
            "prompt": ["a"] * count,
            "chosen": ["a"] * count,
            "rejected": ["b"] * count,
            "chosen_features": arrays["train_first"].astype(np.float32).tolist(),
            "rejected_features": arrays["train_second"].astype(np.float32).tolist(),
        }
    )


def trainer_settings(folder: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What the configurations of RewardUQ's repository have in common (`train.yaml`, `method/base.yaml`).

    `bf16=True` there is left out: on a processor float32 is the default. No evaluation, log or checkpoint on the way.
    """
    common = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "max_length": 2048,
        "precompute_features": True,
        "precompute_features_path": folder,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    return common | settings


def features_of(arrays: Arrays) -> torch.Tensor:
    """Features of the test responses: all the first ones, then all the second ones."""
    return torch.from_numpy(np.concatenate([arrays["test_first"], arrays["test_second"]]).astype(np.float32))


def published(rewards: torch.Tensor, beta: float) -> dict[str, np.ndarray]:
    """Differences and probabilities from RewardUQ's (reward, lower, upper), by its `metrics.compute_pref_probs`."""
    from rewarduq.metrics import compute_pref_probs

    first, second = rewards.double().chunk(2)
    pairs = torch.stack([first, second], dim=1).numpy()
    half = (first[:, 2] - first[:, 1] + second[:, 2] - second[:, 1]) / (2 * beta)
    return {
        "mean": (first[:, 0] - second[:, 0]).numpy(),
        "bounds": half.numpy(),
        "probability": compute_pref_probs(pairs)[:, 0],
    }


def bayesian_linear_head(arrays: Arrays, seed: int, settings: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """RewardUQ's Bayesian linear head."""
    from rewarduq.methods.bayesian_linear_head import (
        BayesianLinearHeadModelConfig,
        BayesianLinearHeadPipeline,
        BayesianLinearHeadTrainerConfig,
    )

    defaults = {"learning_rate": 0.01, "l2_reg": 1e-5, "final_hessian_mode": "unweighted"}
    beta = 0.5
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        options = defaults | settings
        # The configuration sets `lambda_reg: ${trainer.l2_reg}`.
        config = BayesianLinearHeadModelConfig(
            base_model_name_or_path=backbone(Path(folder), arrays["train_first"].shape[1]),
            lambda_reg=options["l2_reg"],
            std_beta=beta,
        )
        pipeline = BayesianLinearHeadPipeline(
            config, BayesianLinearHeadTrainerConfig(**trainer_settings(folder, seed, options))
        )
        data = training_data(arrays)
        begin = time.perf_counter()
        pipeline.train(data)
        fitted = time.perf_counter()
        trained = pipeline.trainer.state.log_history[-1]["train_runtime"]
        features = features_of(arrays)
        pipeline.model.eval()
        with torch.no_grad():
            rewards = pipeline.model(features=features)["rewards"]
        done = time.perf_counter()
        found = published(rewards, beta)
        inverse, precision = pipeline.model._H_inv.double(), pipeline.model.H.double()
        z = (features[: len(features) // 2] - features[len(features) // 2 :]).double()
        found["deviation"] = (z @ inverse * z).sum(1).clamp_min(0.0).sqrt().numpy()
        exact = torch.linalg.inv(precision)
        ratio = (z @ inverse * z).sum(1) / (z @ exact * z).sum(1)
        eigenvalues = torch.linalg.eigvalsh(precision)
        notes = {
            "train_seconds": trained,
            "weight_norm": float(pipeline.model.head.linear.weight.norm()),
            # The pseudo-inverse drops directions whose eigenvalue is small beside the largest one.
            "directions_kept": int(torch.linalg.matrix_rank(inverse.float())),
            "directions": len(inverse),
            "condition": float(eigenvalues[-1] / eigenvalues[0]),
            "variance_over_exact_inverse": float(ratio.median()),
        }
    return found, {"fit_seconds": fitted - begin, "predict_seconds": done - fitted, "notes": notes}


def mlp_head_ensemble(arrays: Arrays, seed: int, settings: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """RewardUQ's ensemble of 20 MLP heads."""
    from rewarduq.methods.mlp_head_ensemble import (
        MLPHeadEnsembleModelConfig,
        MLPHeadEnsemblePipeline,
        MLPHeadEnsembleTrainerConfig,
    )

    defaults = {
        "learning_rate": 1e-4,
        "regularization_towards_initial_weights": 0.1,
        "center_rewards_coefficient": 0.01,
    }
    beta = 2.0
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        config = MLPHeadEnsembleModelConfig(
            base_model_name_or_path=backbone(Path(folder), arrays["train_first"].shape[1]),
            head_initialization_kwargs={"gain": 1.0},
            bounds_function_std_beta=beta,
        )
        pipeline = MLPHeadEnsemblePipeline(
            config, MLPHeadEnsembleTrainerConfig(**trainer_settings(folder, seed, defaults | settings))
        )
        data = training_data(arrays)
        begin = time.perf_counter()
        pipeline.train(data)
        fitted = time.perf_counter()
        trained = pipeline.trainer.state.log_history[-1]["train_runtime"]
        pipeline.model.eval()
        with torch.no_grad():
            output = pipeline.model(features=features_of(arrays), output_individual_rewards=True)
        done = time.perf_counter()
        found = published(output["rewards"], beta)
        first, second = output["individual_rewards"].double().chunk(2)
        found["deviation"] = (first - second).std(dim=1).numpy()
        found["member_probability"] = torch.sigmoid(first - second).mean(1).numpy()
    return found, {"fit_seconds": fitted - begin, "predict_seconds": done - fitted, "notes": {"train_seconds": trained}}


def pairwise_gp(arrays: Arrays, seed: int, settings: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """BoTorch's PairwiseGP with the logistic likelihood, whose utilities are in the unit of Bradley-Terry rewards.

    `kernel="default"`: what the class makes by itself, a lengthscale for every feature, on features scaled to [0, 1] as
    its documentation does. `kernel="shared"`: one lengthscale for all features, which are divided by the root of their
    number, with the prior that the class gives to each lengthscale.
    """
    import warnings

    from botorch.fit import fit_gpytorch_mll
    from botorch.models.likelihoods.pairwise import PairwiseLogitLikelihood
    from botorch.models.pairwise_gp import PairwiseGP, PairwiseLaplaceMarginalLogLikelihood
    from botorch.models.transforms.input import Normalize
    from gpytorch.constraints import GreaterThan, Interval
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.priors import GammaPrior, SmoothedBoxPrior

    torch.manual_seed(seed)
    items = np.concatenate([arrays["train_first"], arrays["train_second"]]).astype(np.float64)
    count, width = len(arrays["train_first"]), items.shape[1]
    test = np.stack([arrays["test_first"], arrays["test_second"]], axis=1).astype(np.float64)
    shared = settings.get("kernel", "default") == "shared"
    options: dict[str, Any] = {"likelihood": PairwiseLogitLikelihood()}
    if shared:
        items, test = items / width**0.5, test / width**0.5
        prior = GammaPrior(2.4, 2.7)
        constraint = GreaterThan(1e-4, transform=None, initial_value=1.4 / 2.7)
        options["covar_module"] = ScaleKernel(
            RBFKernel(lengthscale_prior=prior, lengthscale_constraint=constraint),
            outputscale_prior=SmoothedBoxPrior(1e-2, 1e2),
            outputscale_constraint=Interval(0.5e-2, 2e2, initial_value=1.0),
        ).double()
    else:
        options["input_transform"] = Normalize(d=width)
    comparisons = torch.stack([torch.arange(count), torch.arange(count) + count], dim=1)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PairwiseGP(torch.from_numpy(items), comparisons, **options)
        fit_gpytorch_mll(
            PairwiseLaplaceMarginalLogLikelihood(model.likelihood, model),
            optimizer_kwargs={"options": {"maxiter": settings.get("max_iterations", 200)}},
        )
        fitted = time.perf_counter()
        means, variances = [], []
        with torch.no_grad():
            for part in torch.from_numpy(test).split(settings.get("prediction_pairs", 16)):
                # One joint posterior over the responses of a few pairs: batches of pairs copy the training covariance.
                belief = model.posterior(part.flatten(0, 1))
                mean, covariance = belief.mean[..., 0], belief.distribution.covariance_matrix
                i = torch.arange(0, len(mean), 2)
                means.append(mean[i] - mean[i + 1])
                variances.append(covariance[i, i] + covariance[i + 1, i + 1] - 2 * covariance[i, i + 1])
        done = time.perf_counter()
    mean, deviation = torch.cat(means), torch.cat(variances).clamp_min(0.0).sqrt()
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    grid = mean[:, None] + deviation[:, None] * torch.from_numpy(nodes)
    probability = (torch.sigmoid(grid) * torch.from_numpy(weights / weights.sum())).sum(1)
    lengthscale = model.covar_module.base_kernel.lengthscale.detach()
    notes = {
        "lengthscale": [float(lengthscale.min()), float(lengthscale.max())],
        "output_scale": float(model.covar_module.outputscale),
    }
    found = {
        "mean": mean.numpy(),
        "deviation": deviation.numpy(),
        "bounds": deviation.numpy(),
        "probability": probability.numpy(),
    }
    return found, {"fit_seconds": fitted - begin, "predict_seconds": done - fitted, "notes": notes}


METHODS: dict[str, Callable[[Arrays, int, dict[str, Any]], tuple[Arrays, dict[str, Any]]]] = {
    "bayesian_linear_head": bayesian_linear_head,
    "mlp_head_ensemble": mlp_head_ensemble,
    "pairwise_gp": pairwise_gp,
}


def serve() -> None:
    """Answers requests until the input ends."""
    # What the packages print goes to the error stream; the output carries answers alone.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            with np.load(request["input"]) as file:
                arrays = dict(file)
            with contextlib.redirect_stdout(sys.stderr):
                found, answer = METHODS[request["method"]](arrays, request["seed"], request["settings"])
            np.savez(request["output"], **found)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    serve()
