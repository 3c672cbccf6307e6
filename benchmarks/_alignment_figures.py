"""Figures of the alignment worlds."""

from pathlib import Path
from typing import Any

import numpy as np

#: Where the curves end, in nats, and the utilities that need not get there.
FAR = 2.5
SHORT = ("risk-averse, b = beta",)


def draw_worlds(path: Path, details: dict[str, Any]) -> None:
    """Distance to the own target, exploitability, equal reward calls, and what few candidates do."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 8))
    reached = details["reached"]
    for name, found in reached.items():
        style = "--" if "exploitability" in found else "-"
        axes[0, 0].plot(found["reward_calls"], found["divergence"], style, label=name)
        if "exploitability" in found:
            axes[0, 1].plot(found["rounds"], found["exploitability"], "--", label=name)
    talk = details["conversations"]
    axes[0, 1].plot(talk["rounds"], talk["exploitability"], "-", color="k", label="MTPO, two turns")
    axes[0, 0].set(xscale="log", yscale="log", xlabel="reward calls a prompt", ylabel="KL(policy || own target), nats")
    axes[0, 1].set(xscale="log", yscale="log", xlabel="rounds", ylabel="exploitability of the last iterate")

    equal = details["equal_calls"]
    axes[0, 2].plot(*zip(*equal["frontier"], strict=True), color="0.6", label="exact tilts")
    for name in ("BRAIn", "DPO", "RLOO", "BOND"):
        axes[0, 2].plot(equal[name]["kl_reference"], equal[name]["reward"], ".-", ms=4, lw=0.8, label=name)
        axes[1, 0].plot(equal[name]["reward_calls"], equal[name]["to_own_target"], label=name)
    axes[0, 2].set(xlabel="KL(policy || reference), nats", ylabel="expected true reward")
    axes[1, 0].set(xscale="log", yscale="log", xlabel="reward calls a prompt", ylabel="KL(policy || own target), nats")

    few = details["few_candidates"]
    for proposal, colour in (("reference", "C0"), ("policy", "C1")):
        chosen = {int(k.split()[1]): v for k, v in few.items() if k.endswith(proposal)}
        counts = sorted(chosen)
        axes[1, 1].plot(counts, [chosen[n]["step"] for n in counts], "o-", color=colour, label=f"from the {proposal}")
        axes[1, 2].plot(counts, [chosen[n]["excess"] for n in counts], "o-", color=colour, label=f"from the {proposal}")
    axes[1, 1].set(xscale="log", ylim=(0, 1.05), xlabel="candidates", ylabel="BRAIn's expected step over the KL's")
    axes[1, 2].set(xscale="log", xlabel="candidates", ylabel="restricted policy: KL(target || .) over the least")
    for ax in axes[1, 1:]:
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.minorticks_off()
    for ax in axes.flat:
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_uncertain(path: Path, details: dict[str, Any]) -> None:
    """True reward against KL for each utility, with 95% bands over the worlds in which all but `SHORT` get to `FAR`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(details), figsize=(4.6 * len(details), 4.2), sharey=True)
    for ax, (truth, utilities) in zip(axes, details.items(), strict=True):
        curves = {name: np.array(found["reward"]) for name, found in utilities.items()}
        grid = np.array(utilities["mean"]["grid"])
        # The same worlds along all curves, so that none bends because another world has left it.
        far = np.searchsorted(grid, FAR - 1e-9)
        kept = np.all([~np.isnan(c[far]) for name, c in curves.items() if name not in SHORT], axis=0)
        for colour, (name, curve) in enumerate(curves.items()):
            y = curve[:, kept]
            enough = ~np.isnan(y).any(1) & (grid <= FAR + 1e-9)
            y = y[enough]
            middle, error = y.mean(1), y.std(1, ddof=1) / np.sqrt(y.shape[1])
            ax.plot(grid[enough], middle, color=f"C{colour}", label=name)
            low, high = middle - 1.96 * error, middle + 1.96 * error
            ax.fill_between(grid[enough], low, high, color=f"C{colour}", alpha=0.15, lw=0)
        count = f"{kept.sum()} of {len(kept)} worlds"
        ax.set(title=f"{truth}\n({count})", xlabel="KL(policy || reference), nats")
        ax.axhline(0.0, color="0.8", lw=0.8, zorder=0)
    axes[0].set_ylabel("true expected reward, SD of the reference")
    axes[0].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
