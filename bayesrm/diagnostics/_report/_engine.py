"""The engine and its checks: did it find what it looked for, and is its approximation good enough?"""

import dataclasses
import math
from collections.abc import Mapping

from ...engines import FitReport, Posterior, TrajectoryPosterior
from ...engines._chains import ESS_PER_CHAIN, R_HAT_OF_MANY, r_hat_limit
from ...engines.laplace import SMALLEST_PRIOR_SHARE
from ...engines.psis import MIN_DRAWS, k_hat_threshold
from ._html import Html, element, join, table
from ._section import Section, Status, badge, several, worst

#: With more coordinates than this k-hat is seldom small, however good single predictions are.
_MANY = 50


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of an engine.

    Attributes:
        name: What was checked.
        value: What was found.
        wanted: What is accepted.
        status: How it turned out.
        finding: What a failure means, in one sentence with its number; empty for a pass.
        advice: What to do then.
    """

    name: str
    value: str
    wanted: str
    status: Status
    finding: str = ""
    advice: str = ""


def engine(posterior: Posterior | TrajectoryPosterior, extra: list[Check]) -> Section:
    """The section on the engine.

    Args:
        posterior: The posterior.
        extra: Checks that needed more than the report of the fit, such as those of the chains.
    """
    report = posterior.report
    name = report.engine["name"]
    checks = [*_point(report), *_optimum(report), *_training(report), *_structure(report), *_refinement(report),
              *_linearisation(report), *_weights(posterior), *_chains(posterior), *extra]  # fmt: skip
    failed = [c for c in checks if c.status in (Status.CAUTION, Status.PROBLEM)]
    status = worst([c.status for c in checks])
    if failed:
        first = max(failed, key=lambda c: c.status == Status.PROBLEM)
        verdict = f"{name} failed {len(failed)} of {several(len(checks), 'check')}: {first.finding}"
    else:
        verdict = (
            f"{name} passed {'its one check' if len(checks) == 1 else f'all of its {len(checks)} checks'} after "
            f"{report.seconds:.1f} s."
        )
    rows = [(c.name, badge(c.status), c.value, c.wanted) for c in checks]
    body = [table("Checks", ["check", "result", "found", "accepted"], rows)]
    if len(failed) > 1:
        body.append(element("ul", *(element("li", c.finding) for c in failed)))
    body.append(_facts(report))
    body.append(
        element("details", element("summary", "Summary as the program prints it"), element("pre", posterior.summary()))
    )
    return Section(
        "engine",
        "Engine and its checks",
        status,
        verdict,
        " ".join(dict.fromkeys(c.advice for c in failed if c.advice)),
        join(body),
    )


def judged(name: str, value: str, wanted: str, failed: Status | None, finding: str, advice: str) -> Check:
    """A check that passed (`failed` is `None`), or that failed in a way that means `finding`."""
    if failed is None:
        return Check(name, value, wanted, Status.GOOD)
    return Check(name, value, wanted, failed, finding, advice)


def k_hat_check(k_hat: float, ess: float | None, threshold: float, num_coordinates: int) -> Check:
    """Whether importance weights of the approximation against the posterior have a tail that can be averaged over."""
    many = num_coordinates > _MANY
    return judged(
        "importance weights",
        f"k-hat {k_hat:.2f}" + ("" if ess is None else f", {ess:.0f} effective draws"),
        f"k-hat at most {threshold:.2f}",
        None if k_hat <= threshold else Status.CAUTION,
        f"k-hat is {k_hat:.2f}: over all coordinates together the approximation is further from the posterior than "
        f"weighting can mend{', which with so many is common even where predictions are fine' if many else ''}.",
        "Run NUTS on the same program and compare predictions; without that, rely on the calibration below.",
    )


def _point(report: FitReport) -> list[Check]:
    finding = "MAP is a single point, so every standard deviation is 0 and probabilities are too extreme."
    advice = "Fit the same program with Laplace, NUTS or an ensemble to see what the point hides."
    if report.engine["name"] != "MAP":
        return []
    return [Check("uncertainty", "none", "a posterior", Status.CAUTION, finding, advice)]


def _optimum(report: FitReport) -> list[Check]:
    trained = report.training is not None and report.refinement is None and report.engine["name"] != "MAP"
    if trained or "r_hat" in report.diagnostics:
        # Minibatches end at no gradient that means something, and chains at none at all.
        return []
    if "elbo" in report.diagnostics:
        return [_bound(report)]
    tolerance = report.engine.get("settings", {}).get("gradient_tolerance")
    return [
        judged(
            "optimiser",
            f"gradient norm {report.gradient_norm:.1e} after {several(report.iterations, 'step')}",
            "converged" if tolerance is None else f"at most {tolerance:.0e}",
            None if report.converged else Status.PROBLEM,
            f"the optimiser stopped at a gradient norm of {report.gradient_norm:.1e}, which is no mode.",
            "Raise `num_steps` or `learning_rate`."
            if report.engine["name"] == "AVRIL"
            else "Raise `max_iterations`; if that does not help, look for a latent without a proper prior.",
        )
    ]


def _bound(report: FitReport) -> Check:
    steps = several(report.iterations, "step")
    return judged(
        "bound",
        f"{report.diagnostics['elbo']:.2f} nats after {steps}",
        "no longer rising",
        None if report.converged else Status.CAUTION,
        f"the bound still rose when the optimiser stopped after {steps}, at {report.diagnostics['elbo']:.2f} nats.",
        "Raise `num_steps` or `learning_rate`.",
    )


def _training(report: FitReport) -> list[Check]:
    if report.training is None:
        return []
    steps, planned = report.training["steps"], report.training["planned_steps"]
    return [
        judged(
            "training",
            f"{steps:,} of {planned:,} steps",
            "all steps",
            Status.CAUTION if steps < planned else None,
            f"training stopped after {steps:,} of {planned:,} steps.",
            "That is fine if it was meant (early stopping); the mode is refined afterwards.",
        )
    ]


def _structure(report: FitReport) -> list[Check]:
    check = report.structure_check
    if check is None:
        return []
    ratio, rank = check["variance_ratio"], check["rank_correlation"]
    far = not 0.5 <= ratio <= 2.0 or rank < 0.7
    near = 0.8 <= ratio <= 1.25 and not rank < 0.9
    return [
        judged(
            "structure against full",
            f"variance ratio {ratio:.2f}, rank correlation {rank:.2f} ({check['num_probes']:.0f} comparisons)",
            "0.8 to 1.25, at least 0.9",
            None if near else Status.PROBLEM if far else Status.CAUTION,
            f"its variances are {ratio:.2f} times those of the full posterior, and ranks correlate {rank:.2f}.",
            "Use structure='full' (or a sketch of higher rank): what is uncertain, and how much, is not right here.",
        )
    ]


def _refinement(report: FitReport) -> list[Check]:
    move = report.refinement
    if move is None:
        return []
    share = move["reward_change"] / move["reward_scale"] if move["reward_scale"] else float("inf")
    return [
        judged(
            "trained weights against the mode",
            f"rewards move by {share:.1%} of their scale, {move['log_joint_gain']:.2f} nats gained",
            "at most 25%",
            Status.CAUTION if share > 0.25 else None,
            f"between the trained weights and the mode of the linear model rewards move by {share:.0%} of their scale.",
            "Train longer, or at a lower rate towards the end: far from the trained weights the linear model is worse.",
        )
    ]


def _linearisation(report: FitReport) -> list[Check]:
    share = report.diagnostics.get("linearised_prior_share")
    if share is None:
        return []
    return [
        judged(
            "linear model at the mode",
            f"{float(share):.2g} of the prior's standard deviation of reward differences",
            f"at least {SMALLEST_PRIOR_SHARE}",
            None if share >= SMALLEST_PRIOR_SHARE else Status.PROBLEM,
            "at the mode the network hardly reacts to its weights, so that its linear model takes for certain what the "
            "feedback leaves open.",
            "Use an ensemble, NUTS or importance sampling, whose target is the network itself.",
        )
    ]


def _weights(posterior: Posterior | TrajectoryPosterior) -> list[Check]:
    found = posterior.report.diagnostics
    if found.get("k_hat") is None:
        return []
    ess = None if found.get("ess") is None else float(found["ess"])
    threshold = k_hat_threshold(max(posterior._default_draws, MIN_DRAWS))
    return [k_hat_check(float(found["k_hat"]), ess, threshold, posterior.report.num_coordinates)]


def _chains(posterior: Posterior | TrajectoryPosterior) -> list[Check]:
    found, num_chains = posterior.report.diagnostics, posterior._num_chains
    checks = []
    if found.get("r_hat") is not None and found.get("ess") is not None:
        r_hat, ess, needed = float(found["r_hat"]), float(found["ess"]), ESS_PER_CHAIN * num_chains
        if math.isnan(r_hat):
            single = num_chains == 1
            checks.append(
                Check(
                    "chains agree",
                    "1 chain" if single else "chains too short",
                    "at least 2 chains" if single else "R-hat",
                    Status.CAUTION,
                    "1 chain cannot show whether chains agree."
                    if single
                    else f"{num_chains} chains of so few draws cannot show whether they agree.",
                    "Run at least 2 chains, better 4." if single else "Draw more samples.",
                )
            )
        else:
            limit = r_hat_limit(ess, num_chains)
            grave = Status.PROBLEM if r_hat > R_HAT_OF_MANY else Status.CAUTION
            checks.append(
                judged(
                    "chains agree",
                    f"R-hat {r_hat:.3f}",
                    f"at most {limit}",
                    None if r_hat <= limit else grave,
                    f"the largest R-hat is {r_hat:.3f}: the chains have not found the same distribution.",
                    "Run longer chains with a longer warm-up.",
                )
            )
        if not math.isnan(ess):
            checks.append(
                judged(
                    "effective draws",
                    f"{ess:.0f}",
                    f"at least {needed}",
                    None if ess >= needed else Status.CAUTION,
                    f"the smallest effective sample size is {ess:.0f}, so that tails are noisy.",
                    "Draw more samples.",
                )
            )
    if found.get("divergences") is not None:
        count = int(found["divergences"])
        checks.append(
            judged(
                "divergences",
                f"{count:,}",
                "0",
                Status.PROBLEM if count else None,
                f"{several(count, 'transition')} diverged: part of the posterior was not reached.",
                "Raise the target acceptance rate, or declare the latents in a non-centred form.",
            )
        )
    return checks


def _facts(report: FitReport) -> Html:
    rows: list[tuple[str, object]] = [
        ("engine", report.engine["name"]),
        (
            "settings",
            ", ".join(f"{k} = {v}" for k, v in report.engine.get("settings", {}).items() if not isinstance(v, Mapping))
            or "none",
        ),
        ("seed", str(report.seed)),
        ("time", f"{report.seconds:.1f} s"),
        ("parameters", f"{report.num_parameters:,} in {report.num_coordinates:,} coordinates"),
    ]
    if report.curvature is not None:
        rows.append(("curvature", report.curvature))
    if report.log_evidence is not None:
        rows.append(("log evidence", f"{report.log_evidence:.2f} nats"))
    known = ("k_hat", "ess", "r_hat", "divergences", "problems")
    rows += [
        (k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in report.diagnostics.items() if k not in known
    ]
    return table("The fit", ["setting", "value"], rows)
