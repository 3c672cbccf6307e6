"""A posterior on disk: `posterior.json`, `posterior.safetensors` and `manifest.json` with the digests of all files.

That of a language-model reward also holds `adapter/`, the trained adapter and head as peft saves them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from .._typing import Tensor
from ..errors import LikelihoodChangedWarning, PersistenceError
from ..likelihoods import base as likelihoods
from ..priors import Gaussian
from ..programs import RewardModel
from ..rewards import MLP, FeatureExtractor, KernelHead, Linear, LoRA, PairwiseHead, TokenRewardHead
from ..rewards._subspaces import subspace_from
from ..rewards.heads import head_config
from ..rewards.tangent import Tangent
from ._kron import DiagCovariance, KronCovariance
from ._saved_run import new_run, read_run, write_run
from ._schema import FeedbackSchema
from .draws_posterior import DrawsPosterior
from .gaussian_posterior import GaussianPosterior
from .network_posterior import NetworkDraws, NetworkPosterior
from .posterior import Posterior
from .report import FitReport
from .token_posterior import TokenPosterior

_ADAPTER, _SCORER = "adapter", "scorer"
_HEADS = {"Linear": Linear, "MLP": MLP, "PairwiseHead": PairwiseHead}
_COVARIANCES: dict[str, Any] = {"KronCovariance": KronCovariance, "DiagCovariance": DiagCovariance}
_POSTERIORS: dict[str, Any] = {
    "GaussianPosterior": GaussianPosterior,
    "DrawsPosterior": DrawsPosterior,
    "NetworkPosterior": NetworkPosterior,
    "TokenPosterior": TokenPosterior,
}


def save(posterior: Posterior, path: str | Path) -> None:
    """Writes `posterior` to folder `path`; an existing run there is replaced only when the new one is complete."""
    tensors = posterior._state()
    settings: dict[str, Any] = {
        "type": type(posterior).__name__,
        "schema": dataclasses.asdict(posterior.schema),
        "report": dataclasses.asdict(posterior.report),
    }
    with new_run(path) as folder:
        head = posterior.program.head
        scored = {"reward": _save_scorer(head, folder)} if isinstance(head, TokenRewardHead) else {}
        settings["program"] = _program_config(posterior.program, **scored)
        write_run(folder, settings, tensors)
        if isinstance(head, Tangent | NetworkDraws):
            head.network.save_adapter(folder / _ADAPTER)


def load(path: str | Path, likelihood: Any = None) -> Posterior:
    """Reads the posterior in folder `path`, after checking its files against the manifest."""
    import warnings

    folder = Path(path)
    settings, tensors = read_run(folder)
    if settings["type"] == "TrajectoryPosterior":
        from ._trajectory_persistence import load as load_trajectories

        # Registered as a virtual subclass, which type checkers do not see.
        return cast(Posterior, load_trajectories(folder, likelihood))
    program, changed = _program(settings["program"], likelihood, folder, tensors)
    for name in changed:
        warnings.warn(
            f"the source of likelihood '{name}' has changed since the posterior in {folder} was fitted",
            LikelihoodChangedWarning,
            stacklevel=3,
        )
    schema = FeedbackSchema(tuple(settings["schema"]["kinds"]), tuple(settings["schema"]["annotators"]))
    report = FitReport(**settings["report"])
    cls = _POSTERIORS[settings["type"]]
    posterior: Posterior = cls._restore(program, schema, report, tensors)
    return posterior


def _program_config(program: RewardModel, reward: dict[str, Any] | None = None) -> dict[str, Any]:
    if isinstance(program.likelihood, Mapping):
        likelihood: Any = {"kinds": {kind: likelihoods.to_config(value) for kind, value in program.likelihood.items()}}
    else:
        likelihood = likelihoods.to_config(program.likelihood)
    if reward is not None:
        return {"reward": reward, "likelihood": likelihood, "prior": _prior_config(program.prior)}
    if isinstance(program.head, Tangent):
        return {"reward": _tangent_config(program.head), "likelihood": likelihood, "prior": {"precision": 1.0}}
    if isinstance(program.head, NetworkDraws):
        reward = {
            "type": "NetworkDraws",
            "lora": program.head.network.settings.to_config() | {"device": None},
            "batch_size": program.head.batch_size,
        }
        return {"reward": reward, "likelihood": likelihood, "prior": _prior_config(program.prior)}
    if isinstance(program.head, KernelHead):
        return {"reward": program.head.to_config(), "likelihood": likelihood, "prior": _prior_config(program.prior)}
    if type(program.head).__name__ not in _HEADS:
        raise PersistenceError(
            f"a reward function of type {type(program.head).__name__} cannot be saved; use one of {sorted(_HEADS)}"
        )
    return {"reward": head_config(program.head), "likelihood": likelihood, "prior": _prior_config(program.prior)}


def _save_scorer(head: TokenRewardHead, folder: Path) -> dict[str, Any]:
    (folder / _SCORER).mkdir()
    name = type(head.scorer).__name__
    _scorer_type(name)
    return {"type": "TokenRewardHead", "scorer": name, "settings": head.scorer.save(folder / _SCORER)}


def _scorer_type(name: str) -> Any:
    """The class of a scorer of ours; nothing else is looked up by a name in a file."""
    from .. import rewards

    scorers = {s.__name__: s for s in (rewards.CorrectorScorer, rewards.TokenRewardNetwork)}
    if name not in scorers:
        raise PersistenceError(f"a token reward of type {name} cannot be saved; use one of {sorted(scorers)}")
    return scorers[name]


def _prior_config(prior: Gaussian) -> dict[str, Any]:
    precision = prior.precision
    return {"precision": dict(precision) if isinstance(precision, Mapping) else precision}


def _tangent_config(tangent: Tangent) -> dict[str, Any]:
    return {
        "type": "Tangent",
        # The network is loaded onto what the machine at hand has.
        "lora": tangent.network.settings.to_config() | {"device": None},
        "sites": list(tangent.sites),
        "rest": None if tangent.rest is None else type(tangent.rest).__name__,
        "uncertain_rest": tangent.uncertain_rest,
        "batch_size": tangent.batch_size,
    }


def _tangent(config: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> Tangent:
    network = LoRA.from_config(config["lora"] | {"adapter": str(folder / _ADAPTER)}).load()
    own = {name.removeprefix("tangent."): value for name, value in tensors.items() if name.startswith("tangent.")}
    rest = None
    if config["rest"] is not None:
        held = {name.removeprefix("rest."): value.to(network.device) for name, value in own.items()}
        shapes = {site: tuple(network.sites[site].shape) for site in config["sites"]}
        rest = _COVARIANCES[config["rest"]].from_state(held, shapes)
    network.set_initial(own["initial"])
    placed = {name: value.to(network.device) for name, value in own.items()}
    return Tangent(
        network,
        tuple(config["sites"]),
        placed["center"],
        placed["scale"],
        subspace_from(placed),
        rest,
        config["uncertain_rest"],
        config["batch_size"],
    )


def _network_draws(config: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> NetworkDraws:
    network = LoRA.from_config(config["lora"] | {"adapter": str(folder / _ADAPTER)}).load()
    network.set_initial(tensors["initial"])
    return NetworkDraws(network, tensors["draws"], config["batch_size"])


def _program(
    config: dict[str, Any], given: Any, folder: Path, tensors: dict[str, Tensor]
) -> tuple[RewardModel, list[str]]:
    reward = config["reward"]
    head: Any
    if reward["type"] == "Tangent":
        head = _tangent(reward, folder, tensors)
    elif reward["type"] == "KernelHead":
        own = {k.removeprefix("kernel."): v for k, v in tensors.items() if k.startswith("kernel.")}
        head = KernelHead.from_config(reward, own)
    elif reward["type"] == "TokenRewardHead":
        head = TokenRewardHead(_scorer_type(reward["scorer"]).restore(reward["settings"], folder / _SCORER))
    elif reward["type"] == "NetworkDraws":
        head = _network_draws(reward, folder, tensors)
    else:
        extractor = None if reward["features"] is None else FeatureExtractor.from_config(reward["features"])
        # JSON has no tuples.
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in reward["settings"].items()}
        head = _HEADS[reward["type"]](features=extractor, **values)
    changed: list[str] = []
    if given is not None:
        likelihood = given
        stored = config["likelihood"].get("source")
        if stored and not isinstance(given, Mapping) and stored != likelihoods.source_hash(given):
            changed.append(getattr(given, "__name__", type(given).__name__))
    elif "kinds" in config["likelihood"]:
        likelihood = {}
        for kind, value in config["likelihood"]["kinds"].items():
            likelihood[kind], inner = likelihoods.from_config(value)
            changed += inner
    else:
        likelihood, changed = likelihoods.from_config(config["likelihood"])
    return RewardModel(head, likelihood, Gaussian(**config["prior"])), changed
