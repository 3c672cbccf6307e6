"""Puts the sections together and writes the page."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...data import Comparisons, Trajectories
from ...engines import Posterior, TrajectoryPosterior
from ...errors import ArgumentError, PersistenceError
from ._calibration import calibration
from ._comparisons import uncertain_comparisons
from ._data import data_summary
from ._engine import engine
from ._engine_draws import draw_checks
from ._evidence import gather, items
from ._examine_trajectories import examine_trajectories
from ._failures import failures
from ._figures import require_matplotlib
from ._latents import latents
from ._model import declaration, likelihood_name
from ._page import page
from ._predictive import predictive
from ._section import Section, several
from ._uncertainty import uncertainty


def report(
    posterior: Posterior | TrajectoryPosterior,
    data: Comparisons | Trajectories,
    path: str | Path,
    *,
    train: Comparisons | Trajectories | None = None,
    ood: Comparisons | Trajectories | None = None,
    title: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Writes one self-contained HTML file from which a person can judge a posterior.

    Its sections: the data, what was declared (the graphical model, drawn from the program), the engine and its checks,
    calibration, posterior predictive checks, uncertainty in and out of distribution, the most uncertain comparisons,
    suspected failures, and the likelihood's latents. Each opens with a verdict in one sentence. Texts of the data are
    escaped, and the page loads and runs nothing.

    Of a `TrajectoryPosterior` they are the data, what was declared, the engine and its checks, the actions of
    demonstrations and preferences as predicted, rewards by state, and whether these are surer where the fit saw more.

    Args:
        posterior: What to judge.
        data: Comparisons with outcomes, of prompts that the fit has not seen; or trajectories that it has not seen.
        path: File to write, ending in `.html`; a file there is replaced once the new one is complete.
        train: The data of the fit, if at hand: shows whether prompts are shared, what range of rewards is usual, and
            (for engines that approximate) k-hat of their importance weights; of trajectories, how often each state was.
        ood: Comparisons on subjects that the training data do not cover.
        title: Heading of the page.
        seed: Seed of draws and bootstraps; the same seed writes the same numbers.
        progress: Whether to show progress of feature extraction.

    Returns:
        The path.

    Raises:
        ArgumentError: The path does not end in `.html`, no row has a weight, data are of another kind than those of
            the fit, or matplotlib is not installed.
        DataError: The data cannot be encoded.
        LikelihoodError: The feedback is of another kind than the posterior describes, or an annotator is unknown to it.
        PersistenceError: The file cannot be written.

    Example:
        >>> import tempfile, numpy as np, bayesrm as brm
        >>> data = brm.Comparisons.from_arrays(np.eye(4), candidates=[[0, 1], [2, 3]] * 3, outcome=[0, 0, 1, 0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> posterior = brm.fit(model, data, inference=brm.Laplace())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report(posterior, data, folder + "/report.html").read_text()
        >>> "These 6 comparisons are the very data that the posterior was fitted on." in page
        True
    """
    if Path(path).suffix != ".html":
        raise ArgumentError(f"`path` is {str(path)!r}; the name of the page must end in .html")
    sections = examine(posterior, data, train=train, ood=ood, seed=seed, progress=progress)
    return write(posterior, sections, path, title=title)


def examine(
    posterior: Posterior | TrajectoryPosterior,
    data: Comparisons | Trajectories,
    *,
    train: Comparisons | Trajectories | None = None,
    ood: Comparisons | Trajectories | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Section]:
    """The sections of the report, see `report` for the arguments.

    Returns:
        The sections in the order of the page, each with status, verdict and advice.
    """
    require_matplotlib()
    if isinstance(posterior, TrajectoryPosterior):
        if ood is not None:
            raise ArgumentError("`ood` is for comparisons; of trajectories, `train` shows where the fit saw little")
        return examine_trajectories(posterior, data, train=train, seed=seed)
    for name, part in (("data", data), ("train", train), ("ood", ood)):
        if isinstance(part, Trajectories):
            raise ArgumentError(f"`{name}` holds trajectories; this posterior is about comparisons")
    assert isinstance(data, Comparisons)
    assert train is None or isinstance(train, Comparisons)
    assert ood is None or isinstance(ood, Comparisons)
    if not any(bool((g.weight > 0).any()) for g in data.groups()):
        raise ArgumentError("every row of `data` has weight 0; there is no feedback to judge the posterior by")
    evidence = gather(posterior, data, seed=seed, progress=progress)
    away = None if ood is None else gather(posterior, ood, seed=seed, progress=progress)
    usual = None if train is None else items(posterior, train)[2]
    return [
        data_summary(posterior, evidence, data, train, ood),
        declaration(posterior),
        engine(posterior, draw_checks(posterior, evidence, train, seed=seed)),
        calibration(evidence, seed=seed),
        predictive(posterior, evidence, seed=seed),
        uncertainty(evidence, away, seed=seed),
        uncertain_comparisons(evidence),
        failures(evidence, usual, seed=seed),
        latents(posterior, seed=seed),
    ]


def write(
    posterior: Posterior | TrajectoryPosterior,
    sections: Sequence[Section],
    path: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Writes sections as a page, all of it or nothing.

    Args:
        posterior: What the sections are about.
        sections: What `examine` returned.
        path: File to write.
        title: Heading of the page.

    Raises:
        PersistenceError: The file cannot be written.
    """
    fit = posterior.report
    trajectories = isinstance(posterior, TrajectoryPosterior)
    if trajectories:
        what, rows = "Inverse reinforcement learning", several(fit.num_rows, "step")
        fitted = f"{rows} of {several(fit.num_prompts, 'trajectory', 'trajectories')}"
    else:
        what = f"{likelihood_name(posterior.program.likelihood)} likelihood"
        fitted = f"{several(fit.num_rows, 'comparison')} of {several(fit.num_prompts, 'prompt')}"
    lead = f"{what}, {fit.engine['name']}, fitted on {fitted} in {fit.seconds:.1f} s."
    over = "trajectories, or groups of them that depend on each other," if trajectories else "prompts"
    text = page(title or "Can this posterior be trusted?", lead, sections, over=over)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
            part = Path(folder) / target.name
            part.write_text(text, encoding="utf-8")
            os.replace(part, target)
    except OSError as error:
        raise PersistenceError(f"cannot write {target}: {error}") from error
    return target
