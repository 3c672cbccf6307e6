"""The demo's page: one HTML file with its figures inside."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bayesrm import diagnostics
from bayesrm.engines import Posterior

if TYPE_CHECKING:
    from .demo import HeldOut

_BLUE, _ORANGE, _GREY = "#2563a8", "#d9772b", "#8a8f98"

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2330; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin-top: 2.4rem }
p.lead { color: #545c6b; margin-top: 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #e2e5ea; vertical-align: top }
th { color: #545c6b; font-weight: 600 }
.scroll { overflow-x: auto }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto }
blockquote { margin: .8rem 0; padding: .6rem 1rem; border-left: 3px solid #d5d9e0; background: #f7f8fa }
blockquote p { margin: .3rem 0 }
.tag { color: #545c6b; font-size: .85rem }
pre { background: #f7f8fa; padding: .8rem; overflow-x: auto }
"""


def write_page(
    output: Path,
    judged: "list[HeldOut]",
    away: "list[HeldOut]",
    scores: dict[tuple[str, str], dict[str, diagnostics.Estimate]],
    auroc: diagnostics.Estimate,
    uncertainty: tuple[NDArray[np.float64], NDArray[np.float64]],
    uncertain: list[dict[str, Any]],
    selection: dict[str, dict[str, Any]],
    bait_selection: dict[str, dict[str, Any]],
    posterior: Posterior,
) -> Path:
    """Writes the page and returns its path."""
    num_bait = sum(bool(h.prompt.hacks) for h in judged + away)
    sections = [
        "<h1>A reward model that knows what it does not know</h1>",
        f"<p class='lead'>{len(judged)} prompts, each judged by a model that has not seen it; "
        f"{len(away)} more on subjects no model has seen.</p>",
        "<h2>What was fitted</h2>",
        f"<pre>{html.escape(posterior.summary())}</pre>",
        "<h2>Which of two responses is better?</h2>",
        _score_table(scores),
        _figure(
            _reliability(judged),
            "Stated confidence against how often it was right, held-out prompts on familiar subjects",
        ),
        "<h2>Is it less sure away from its training data?</h2>",
        f"<p>The posterior standard deviation tells unfamiliar subjects from familiar ones with AUROC {auroc}; "
        "0.5 would be chance.</p>",
        _figure(_uncertainty(*uncertainty), "Uncertainty of each prompt's responses"),
        "<h2>Where is it guessing?</h2>",
        *(_pair(row) for row in uncertain),
        "<h2>Best-of-n, with reward-hacking responses among the candidates</h2>",
        _selection_table(selection, bait_selection, num_bait),
        _figure(_selection(selection), "Mean rank of the response picked (1 is best, a hack counts 5), 95% intervals"),
        _figure(_candidates(judged), "Reward and uncertainty of ranked responses and of hacks"),
    ]
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>bayesrm demo</title><style>{_STYLE}</style><body>{''.join(sections)}</body></html>"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _score_table(scores: dict[tuple[str, str], dict[str, diagnostics.Estimate]]) -> str:
    rows = "".join(
        f"<tr><td>{where}</td><td>{how}</td>"
        + "".join(f"<td>{s[m]}</td>" for m in ("accuracy", "nll", "brier", "ece"))
        + "</tr>"
        for (where, how), s in scores.items()
    )
    head = "<tr><th>prompts<th>prediction<th>accuracy<th>NLL<th>Brier<th>ECE</tr>"
    return (
        f"<div class='scroll'><table>{head}{rows}</table></div><p class='tag'>95% bootstrap intervals over prompts.</p>"
    )


def _selection_table(table: dict[str, dict[str, Any]], bait: dict[str, dict[str, Any]], num_bait: int) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{row['rank']}</td><td>{row['best']}</td><td>{bait[name]['hacked']}</td></tr>"
        for name, row in table.items()
    )
    head = f"<tr><th>rule<th>mean rank<th>share of best<th>hacks picked, of {num_bait} on all subjects</tr>"
    return f"<div class='scroll'><table>{head}{rows}</table></div>"


def _pair(row: dict[str, Any]) -> str:
    return (
        f"<blockquote><p class='tag'>{row['subject']} &middot; P(first better) {row['probability']:.2f} "
        f"&middot; std of the difference {row['std']:.2f}</p>"
        f"<p><b>{html.escape(row['prompt'])}</b></p><p>{html.escape(row['better'])}</p>"
        f"<p class='tag'>by hand better than</p><p>{html.escape(row['worse'])}</p></blockquote>"
    )


def _figure(picture: str, caption: str) -> str:
    return (
        f"<figure><img alt='{caption}' src='data:image/png;base64,{picture}'>"
        f"<figcaption class='tag'>{caption}</figcaption></figure>"
    )


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _reliability(judged: "list[HeldOut]") -> str:
    figure, axes = _axes(6, 4)
    axes.plot([0.5, 1], [0.5, 1], color=_GREY, lw=1, label="perfect")
    for field, colour, label in (("plug_in", _ORANGE, "MAP"), ("probs", _BLUE, "posterior predictive")):
        better = np.concatenate([getattr(h, field) for h in judged])
        curve = diagnostics.reliability(np.maximum(better, 1 - better), (better > 0.5).astype(float))
        axes.plot(curve.confidence, curve.frequency, "o-", color=colour, ms=5, label=f"{label} (ECE {curve.ece:.3f})")
    axes.set(xlabel="stated confidence", ylabel="share right")
    axes.legend(frameon=False)
    return _png(figure)


def _uncertainty(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> str:
    figure, axes = _axes(6, 3)
    bins = np.histogram_bin_edges(np.concatenate([inside, outside]), 24)
    axes.hist(inside, bins, color=_BLUE, alpha=0.65, label="familiar subjects, held-out prompts", density=True)
    axes.hist(outside, bins, color=_ORANGE, alpha=0.65, label="unfamiliar subjects", density=True)
    axes.set(xlabel="posterior std of a response's deviation from its prompt's mean", ylabel="density")
    axes.legend(frameon=False)
    return _png(figure)


def _selection(table: dict[str, dict[str, Any]]) -> str:
    figure, axes = _axes(7, 3.2)
    names = list(table)[::-1]
    for y, name in enumerate(names):
        rank = table[name]["rank"]
        colour = _GREY if name in ("random", "longest response") else _BLUE
        axes.plot([rank.low, rank.high], [y, y], color=colour, lw=2)
        axes.plot(rank.value, y, "o", color=colour)
    axes.set(xlabel="mean rank of the pick", yticks=range(len(names)), yticklabels=names)
    return _png(figure)


def _candidates(judged: "list[HeldOut]") -> str:
    figure, axes = _axes(7, 3.6)
    for k, label, colour in ((0, "best", _BLUE), (3, "worst", _GREY), (4, "hack", _ORANGE)):
        points = [
            (float(d.mean[0, k]), float(d.std[0, k]))
            for h in judged
            if len(h.candidates) > k
            for d in [h.belief.differences()]
        ]
        axes.plot(*np.array(points).T, "o", color=colour, ms=4, alpha=0.7, label=label)
    axes.set(xlabel="expected reward, relative to the prompt's mean", ylabel="posterior std")
    axes.legend(frameon=False)
    return _png(figure)
