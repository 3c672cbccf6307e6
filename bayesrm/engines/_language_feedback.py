"""Fits of `LanguageFeedback`: one corrector at a mode, or an ensemble of correctors on one backbone."""

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from .._typing import Tensor
from ..data import Comparisons, Corrections
from ..errors import ArgumentError, ConvergenceWarning, EngineError
from ..likelihoods import BradleyTerry
from ..programs import LanguageFeedback, RewardModel, Rewrites
from ..rewards import Corrector, CorrectorNetwork, CorrectorScorer, TokenRewardHead
from ..rewards._corrector_tokens import Reading
from ._digest import feedback_digest
from ._lora_ensemble import Member, _member_folder
from ._module_training import train_module
from ._schema import FeedbackSchema
from ._settings import settings_of
from .report import FitReport
from .token_posterior import TokenPosterior
from .training import Training, TrainingReport

if TYPE_CHECKING:
    from .ensemble import Ensemble
    from .map import MAP

_LOG = logging.getLogger("bayesrm")


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectorLoss:
    """Minus the log joint of a `LanguageFeedback` program, for the weights that its network has.

    Attributes:
        program: The program.
        network: The corrector.
        readings: What is read, N rows.
        targets: Token ids of what is written.
        weight: Weights of the rows, shape `(N,)`, float64.
    """

    program: LanguageFeedback
    network: CorrectorNetwork
    readings: Sequence[Reading]
    targets: Sequence[tuple[int, ...]]
    weight: Tensor

    @classmethod
    def of(cls, program: LanguageFeedback, network: CorrectorNetwork, rewrites: Rewrites) -> "CorrectorLoss":
        """The loss of all rows; texts are tokenized here."""
        readings = network.encode(rewrites.prompts, rewrites.responses)
        written = network.encode(rewrites.prompts, rewrites.targets)
        return cls(program, network, readings, [r.response for r in written], torch.from_numpy(rewrites.weight))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, read and written."""
        return [len(r.tokens) + len(t) for r, t in zip(self.readings, self.targets, strict=True)]

    def of_rows(self, rows: Tensor, number: int = 0) -> Tensor:
        """Minus the weighted log-likelihood of some rows, a float64 scalar."""
        chosen = rows.tolist()
        batch = self.network.collate([self.readings[i] for i in chosen], [self.targets[i] for i in chosen])
        log_likelihood = self.network(**batch)
        loss: Tensor = -(self.weight[chosen].to(log_likelihood) * log_likelihood).sum()
        return loss

    def prior(self) -> Tensor:
        """Minus the log density of the weights under the prior, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.network.device)
        for site, p in self.network.sites.items():
            precision = self.program.prior.of(site)
            away = (p - self.network.initial[site].to(p)).square().sum(dtype=torch.float64)
            total = total + 0.5 * precision * away - 0.5 * p.numel() * math.log(precision / (2.0 * math.pi))
        return total

    def gradient_norm(self, batch_size: int) -> float:
        """Norm of the gradient of the whole loss, weights in units of their prior standard deviation."""
        sites = self.network.sites
        squares = {site: torch.zeros_like(p, dtype=torch.float64) for site, p in sites.items()}

        def add(loss: Tensor) -> None:
            for site, gradient in zip(sites, torch.autograd.grad(loss, list(sites.values())), strict=True):
                squares[site] += gradient

        order = torch.tensor(np.argsort(self.lengths, kind="stable"))
        for rows in order.split(batch_size):
            add(self.of_rows(rows))
        add(self.prior())
        return math.sqrt(sum(float(g.square().sum()) / self.program.prior.of(site) for site, g in squares.items()))

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of a training run, JSON values; the network stands at its starting point."""
        network, digest = self.network, xxhash.xxh3_128()
        for reading, target in zip(self.readings, self.targets, strict=True):
            for tokens in (reading.tokens, target):
                digest.update(np.array([len(tokens), *tokens], dtype=np.int64).tobytes())
        digest.update(self.weight.numpy().tobytes())
        start = xxhash.xxh3_128()
        for vector in (network.theta(), network.initial_theta()):
            start.update(vector.cpu().numpy().tobytes())
        corrector = {f"corrector.{k}": v for k, v in network.settings.to_config().items() if k != "device"}
        prior = {f"prior.{site}": self.program.prior.of(site) for site in network.sites}
        return corrector | prior | {"data": digest.hexdigest(), "starting point": start.hexdigest()}

    def train(self, training: Training, *, seed: int, progress: bool) -> TrainingReport:
        """Trains the network in place."""
        return train_module(
            self.network, self.of_rows, self.lengths, training, seed=seed, progress=progress, identity=self.identity(),
            prior_loss=self.prior,
        )  # fmt: skip


def fit_mode(
    engine: "MAP", program: LanguageFeedback, data: Comparisons | Corrections, *, seed: int, progress: bool
) -> TokenPosterior:
    """The posterior of one corrector, trained by stochastic gradient descent: scores without uncertainty."""
    begin = time.perf_counter()
    if engine.prior_precision != "given":
        raise EngineError("`prior_precision='marginal_likelihood'` needs a curvature; use prior_precision='given'")
    loss, rewrites = _loaded(program, data, seed)
    run = loss.train(engine.training, seed=seed, progress=progress)
    norm = loss.gradient_norm(2 * engine.training.batch_size)
    if run.stopped_early:
        warnings.warn(
            f"training stopped after {run.steps} of {run.planned_steps} steps (gradient norm {norm:.1e}): the weights "
            "are no mode of the declared posterior",
            ConvergenceWarning,
            # The line that called `bayesrm.fit`.
            stacklevel=4,
        )
    report = dataclasses.replace(
        _report(engine, loss, rewrites, data, [run], seed),
        converged=norm <= engine.gradient_tolerance,
        gradient_norm=norm,
        seconds=time.perf_counter() - begin,
    )
    return _posterior(loss, loss.network.theta().cpu()[None], report, engine.training)


def fit_members(
    engine: "Ensemble", program: LanguageFeedback, data: Comparisons | Corrections, *, seed: int, progress: bool
) -> TokenPosterior:
    """An ensemble: each member a mode of the declared log joint, perturbed in its own way, as those of a `LoRA` reward.

    Members start from the same weights. They differ by the order of their data, by their prior's centre where
    anchored, and by the weights of the prompts where bootstrapped.
    """
    begin = time.perf_counter()
    training = engine.training
    if training.epochs == 0 and training.max_steps is None:
        raise ArgumentError("`training` has 0 epochs, which leaves all members where they start; set `epochs`")
    loss, rewrites = _loaded(program, data, seed)
    network = loss.network
    start, center = network.theta(), network.initial_theta()
    weights, runs = [], []
    try:
        for number in range(engine.num_members):
            member = Member.of(seed, number)
            network.set_theta(start)
            network.set_initial(_anchor(member, loss, center) if engine.anchored else center)
            own = _reweighted(member, loss, rewrites, data.num_prompts) if engine.bootstrap else loss
            _LOG.info("member %d of %d", number + 1, engine.num_members)
            folder = _member_folder(training, number)
            runs.append(
                own.train(dataclasses.replace(training, output_dir=folder), seed=member.order_seed, progress=progress)
            )
            weights.append(network.theta().cpu())
    finally:
        network.set_initial(center)
    network.set_theta(weights[0].to(start))
    stopped_early = any(run.stopped_early for run in runs)
    if stopped_early:
        warnings.warn(
            "training of a member stopped before its planned steps: the ensemble had not come to its end; leave out "
            "the callback that stopped it, or train anew",
            ConvergenceWarning,
            stacklevel=4,
        )
    report = dataclasses.replace(
        _report(engine, loss, rewrites, data, runs, seed),
        converged=not stopped_early,
        seconds=time.perf_counter() - begin,
    )
    return _posterior(loss, torch.stack(weights), report, training)


def _loaded(program: LanguageFeedback, data: Comparisons | Corrections, seed: int) -> tuple[CorrectorLoss, Rewrites]:
    # What the data lack shows before a model is loaded.
    rewrites = program.rewrites(data)
    if not isinstance(program.corrector, Corrector):
        raise ArgumentError("`corrector` is a loaded network, which a fit would change; give the Corrector(...) itself")
    network = program.corrector.load(seed)
    program.prior.check(network.sites)
    return CorrectorLoss.of(program, network, rewrites), rewrites


def _anchor(member: Member, loss: CorrectorLoss, center: Tensor) -> Tensor:
    """A draw of the weights from the declared prior around `center`, shape `(P,)`."""
    generator = torch.Generator().manual_seed(member.anchor_seed)
    sites, prior = loss.network.sites, loss.program.prior
    spread = [torch.full((p.numel(),), prior.of(site) ** -0.5) for site, p in sites.items()]
    noise = torch.randn(len(center), generator=generator)
    return center + (noise * torch.cat(spread)).to(center)


def _reweighted(member: Member, loss: CorrectorLoss, rewrites: Rewrites, num_prompts: int) -> CorrectorLoss:
    """The loss with each row's weight times the weight of its prompt, drawn from Exp(1)."""
    by_prompt = np.random.default_rng(member.weight_seed).exponential(size=num_prompts)
    return dataclasses.replace(loss, weight=loss.weight * torch.from_numpy(by_prompt[rewrites.prompt_index]))


def _report(
    engine: Any, loss: CorrectorLoss, rewrites: Rewrites, data: Comparisons | Corrections,
    runs: Sequence[TrainingReport], seed: int,
) -> FitReport:  # fmt: skip
    summed = ("steps", "planned_steps", "epochs", "seconds")
    totals = {name: sum(getattr(run, name) for run in runs) for name in summed}
    texts = zip([*rewrites.prompts] * 2, [*rewrites.responses, *rewrites.targets], strict=True)
    return FitReport(
        engine={"name": type(engine).__name__, "settings": settings_of(engine)},
        seed=seed,
        seconds=0.0,
        num_rows=len(data),
        num_items=data.num_items if isinstance(data, Comparisons) else len({repr(text) for text in texts}),
        num_prompts=data.num_prompts,
        num_parameters=loss.network.num_parameters,
        num_coordinates=loss.network.num_parameters,
        converged=False,
        gradient_norm=float("nan"),
        iterations=totals["steps"],
        prior_precision=loss.program.prior.precision,
        training=totals
        | {
            "stopped_early": any(run.stopped_early for run in runs),
            "resumed_from": next((run.resumed_from for run in reversed(runs) if run.resumed_from), None),
            "final_loss": max((float(run.log[-1]["loss"]) for run in runs if run.log), default=None),
            "corrections": rewrites.corrections,
            "identities": len(rewrites) - rewrites.corrections,
            "tied_rows": rewrites.tied_rows,
            "masked_rows": rewrites.masked_rows,
            "shortened": sum(r.shortened for r in loss.readings),
        },
        data_digest=feedback_digest(data) if isinstance(data, Comparisons) else None,
    )


def _posterior(loss: CorrectorLoss, draws: Tensor, report: FitReport, training: Training) -> TokenPosterior:
    scorer = CorrectorScorer(loss.network, draws, loss.program.rule, 2 * training.batch_size)
    return TokenPosterior(RewardModel(TokenRewardHead(scorer), BradleyTerry()), FeedbackSchema.unseen(), report)
