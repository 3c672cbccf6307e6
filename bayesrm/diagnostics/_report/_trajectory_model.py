"""What was declared for trajectories: the graphical model, found by running the program, and its settings."""

from typing import Any

import pyro
import torch

from ...backend import seeded
from ...engines import TrajectoryPosterior
from ...engines._schema import FeedbackSchema
from ...programs import Steps
from ._graph import _LEFT, _WIDTH, Node, _around, _edge, _node, _plate, _stack
from ._html import Html, element, join, paragraph, table
from ._model import likelihood_name
from ._program import Variable, _distribution_name
from ._section import Section, Status, several


def trajectory_declaration(posterior: TrajectoryPosterior) -> Section:
    """The section on the program."""
    program, reward = posterior.program, posterior.state_reward
    variables = declared_variables(posterior)
    of = "each state and action" if reward.by_action else "each state"
    values = "those of the soft-optimal policy in known dynamics" if program.has_dynamics else "a network's"
    verdict = (
        f"The reward of {of} is drawn from its prior; whoever demonstrates takes actions by a Boltzmann policy of the "
        f"action values, which are {values}, and preferences come from {likelihood_name(program.likelihood)}."
    )
    caption = (
        "The declared model, found by running the program. Ellipses are random variables, shaded ones are known; a box "
        "repeats what it holds. Action values are a function of the rewards."
    )
    picture = element("figure", draw_trajectories(variables, posterior), element("figcaption", caption))
    rows = [(v.name, v.distribution, "observed" if v.observed else "latent", v.plates[-1][0] if v.plates else "-")
            for v in variables]  # fmt: skip
    tables = element(
        "div",
        table("Random variables of the program", ["site", "distribution", "is", "one for each of"], rows),
        _settings(posterior),
    )
    words = " ".join(f"{v.name} depends on {', '.join(v.parents)}." for v in variables if v.parents)
    body = join([element("div", picture, tables, class_="columns"), paragraph("In words: ", words, class_="tag")])
    return Section("model", "What was declared", Status.NOTE, verdict, "", body)


def declared_variables(posterior: TrajectoryPosterior) -> list[Variable]:
    """The random variables, from a run of the program on one made-up step and preference."""
    program, reward = posterior.program, posterior.state_reward
    groups = FeedbackSchema.unseen().example_groups()
    steps = Steps(
        torch.zeros(1, reward.num_actions, dtype=torch.float64), torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64),
    )  # fmt: skip
    with seeded(0), torch.no_grad():
        trace = pyro.poutine.trace(program).get_trace(steps, groups)
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not pyro.poutine.util.site_is_subsample(site)
    }
    latents = [name for name, site in sites.items() if not site["is_observed"] and name != "reward"]
    parents = {"action": ("reward",), "feedback": ("reward", *latents)}
    # Rewards belong to states: the program repeats those of equal steps.
    plates = {"reward": "states", "action": "steps", "feedback": "preferences"}
    return [
        Variable(
            name, _distribution_name(site["fn"]), tuple(site["value"].shape), ((plates[name], 1),) if name in plates
            else tuple((frame.name, int(frame.size)) for frame in site["cond_indep_stack"]),
            parents.get(name, ()), bool(site["is_observed"]),
        )
        for name, site in sites.items()
    ]  # fmt: skip


def draw_trajectories(variables: list[Variable], posterior: TrajectoryPosterior) -> Html:
    """The model as SVG."""
    found = {v.name: v for v in variables}
    latents = [v for v in variables if v.name not in ("reward", "action", "feedback")]
    report = posterior.report
    reward = Node("reward", found["reward"].distribution, _LEFT, 70.0)
    values = Node("action values", "of the rewards", _LEFT, 185.0)
    action = Node("action", found["action"].distribution, _LEFT, 300.0, given=True)
    judged = Node("preference", found["feedback"].distribution, _LEFT, 430.0, given=True)
    placed, boxes = _stack(latents, judged.y)
    plates = [
        _plate(20.0, 28.0, 240.0, 222.0, f"{several(report.num_items, 'distinct state')}"),
        _plate(20.0, 262.0, 240.0, 95.0, "steps of demonstrations"),
        _plate(20.0, 385.0, 240.0, 105.0, "preferences"),
        *boxes,
    ]
    edges = [_edge(reward, values), _edge(values, action), _around(reward, judged)]
    edges += [_edge(node, judged) for node in placed.values()]
    marker = element(
        "defs",
        element(
            "marker",
            element("path", d="M0 0 L8 4 L0 8 z", fill="#1d2330"),
            id="arrow", viewBox="0 0 8 8", refX="8", refY="4", markerWidth="8", markerHeight="8", orient="auto",
        ),
    )  # fmt: skip
    nodes = [_node(n) for n in (reward, values, action, judged, *placed.values())]
    return element(
        "svg", element("title", "Graphical model"), marker, *plates, *edges, *nodes,
        viewBox=f"0 0 {_WIDTH} 505", width=str(_WIDTH), height="505", role="img",
        aria_label="Graphical model: rewards of states make action values, which make actions; sums of rewards make "
        "preferences.",
        font_family="system-ui, sans-serif", font_size="14",
    )  # fmt: skip


def _settings(posterior: TrajectoryPosterior) -> Html:
    program, reward = posterior.program, posterior.state_reward
    hidden = " x ".join(map(str, reward.hidden)) or "none: a table"
    states = f"{reward.num_states:,}, numbered" if reward.num_states is not None else "features"
    rows: list[tuple[str, Any]] = [
        ("states", states),
        ("actions", f"{reward.num_actions:,}"),
        ("prior precision of a reward", f"{program.reward_precision:.4g}"),
        ("discount", f"{program.discount:.4g}"),
        ("rationality", f"{program.rationality:.4g}"),
        ("dynamics", "known" if program.has_dynamics else "unknown"),
    ]
    if not program.has_dynamics:
        rows.append(("hidden layers", hidden))
    return table("Priors and settings", ["of", "value"], rows)
