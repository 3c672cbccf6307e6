"""The graphical model as inline SVG: circles are random, shaded ones observed, boxes repeat what they hold."""

import dataclasses
from collections.abc import Sequence

from ._html import Html, element, join
from ._program import Variable
from ._section import several

_LEFT, _RIGHT, _WIDTH = 130.0, 372.0, 480
_RX, _RY = 68.0, 25.0
_INK, _SHADE, _BOX = "#1d2330", "#cfe0f1", "#7d8794"


@dataclasses.dataclass(frozen=True)
class Node:
    """An ellipse of the drawing.

    Attributes:
        label: First line.
        note: Second line.
        x: Centre from the left.
        y: Centre from the top.
        given: Whether it is observed, and so shaded.
    """

    label: str
    note: str
    x: float
    y: float
    given: bool = False


def draw(variables: Sequence[Variable], *, num_features: int, num_rows: int, pairs: bool = False) -> Html:
    """The model as SVG, about 480 units wide.

    Args:
        variables: What the program declares, see `declared`.
        num_features: Size of the features.
        num_rows: Rows of feedback it was fitted on.
        pairs: Whether pairs of responses have scores, and no response a reward.
    """
    parameters = [v for v in variables if v.name.startswith("reward.") and not v.observed]
    latents = [v for v in variables if not v.name.startswith("reward.") and not v.observed]
    kinds: dict[tuple[str, tuple[str, ...]], list[Variable]] = {}
    for v in variables:
        if v.observed:
            kinds.setdefault((_kind(v.name), v.parents), []).append(v)
    count = sum(_size(v) for v in parameters)
    theta = Node("reward weights", f"{count:,} x {parameters[0].distribution}" if parameters else "fixed", _LEFT, 40.0)
    features = Node("features", f"{num_features:,} numbers", _LEFT, 145.0, given=True)
    reward = Node("score" if pairs else "reward", "of a pair" if pairs else "of an item", _LEFT, 235.0)
    top = 350.0
    feedback = [
        Node("feedback" if kind == "" else kind, _shapes(group), _LEFT, top + 90 * i, given=True)
        for i, ((kind, _), group) in enumerate(kinds.items())
    ]
    bottom = feedback[-1].y
    latent_nodes, boxes = _stack(latents, bottom)
    height = max(bottom + 75, max((n.y for n in latent_nodes.values()), default=0) + 60)
    edges = [_edge(features, reward)]
    # Weights pass the features on their left, so that the arrow ends at the reward.
    edges.append(_around(theta, reward))
    edges += [_around(reward, node) if i else _edge(reward, node) for i, node in enumerate(feedback)]
    for node, (_, parents) in zip(feedback, kinds, strict=True):
        edges += [_edge(latent_nodes[name], node) for name in parents if name in latent_nodes]
    for v in latents:
        edges += [_aside(latent_nodes[name], latent_nodes[v.name]) for name in v.parents if name in latent_nodes]
    plates = [
        _plate(20.0, 105.0, 240.0, 172.0, "pairs" if pairs else "items"),
        _plate(20.0, top - 45, 240.0, bottom - top + 110, several(num_rows, "comparison")),
        *boxes,
    ]
    nodes = [_node(n) for n in (theta, features, reward, *feedback, *latent_nodes.values())]
    marker = element(
        "defs",
        element(
            "marker",
            element("path", d="M0 0 L8 4 L0 8 z", fill=_INK),
            id="arrow", viewBox="0 0 8 8", refX="8", refY="4", markerWidth="8", markerHeight="8", orient="auto",
        ),
    )  # fmt: skip
    words = describe(variables)
    return element(
        "svg",
        element("title", "Graphical model"),
        element("desc", words),
        marker,
        *plates,
        *edges,
        *nodes,
        viewBox=f"0 0 {_WIDTH} {height:.0f}",
        width=str(_WIDTH),
        height=f"{height:.0f}",
        role="img",
        aria_label=f"Graphical model. {words}",
        font_family="system-ui, sans-serif",
        font_size="14",
    )


def describe(variables: Sequence[Variable]) -> str:
    """The graph in words, for those who cannot see it.

    Example:
        >>> describe([Variable("reward.weight", "Normal", (3,), (), (), False),
        ...           Variable("feedback", "Categorical", (1,), (("comparisons", 1),), ("reward.weight",), True)])
        'feedback depends on reward.weight.'
    """
    said = [f"{v.name} depends on {', '.join(v.parents)}." for v in variables if v.parents]
    return " ".join(said)


def _kind(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def _shapes(group: Sequence[Variable]) -> str:
    sizes = [v.name.split(".")[2] for v in group if len(v.name.split(".")) > 2]
    unique = list(dict.fromkeys(sizes))
    if not unique or unique == ["1"]:
        return group[0].distribution
    return f"among {', '.join(unique[:4])}" + (", …" if len(unique) > 4 else "")


def _size(variable: Variable) -> int:
    total = 1
    for n in variable.shape:
        total *= n
    return total


def _stack(latents: Sequence[Variable], bottom: float) -> tuple[dict[str, Node], list[Html]]:
    """Latents under each other on the right, ending level with the feedback; plates around those that have one."""
    gaps = [112 if v.plates else 78 for v in latents]
    y = max(40.0, bottom - sum(gaps) / 2)
    nodes, boxes = {}, []
    for v, gap in zip(latents, gaps, strict=True):
        center = y + gap / 2 - 14
        size = "" if v.plates or not v.shape else f" x {_size(v)}"
        nodes[v.name] = Node(v.name, v.distribution + size, _RIGHT, center)
        if v.plates:
            name, number = v.plates[-1]
            boxes.append(_plate(_RIGHT - 92, center - 38, 184.0, 92.0, f"{number:,} {name}"))
        y += gap
    return nodes, boxes


def _node(node: Node) -> Html:
    label = node.label if len(node.label) <= 18 else node.label[:17] + "…"
    size = "14" if len(label) <= 14 else "11.5"
    return element(
        "g",
        element("title", f"{node.label}: {node.note}"),
        element(
            "ellipse",
            cx=node.x,
            cy=node.y,
            rx=_RX,
            ry=_RY,
            fill=_SHADE if node.given else "#fff",
            stroke=_INK,
            stroke_width="1.4",
        ),
        element("text", label, x=node.x, y=node.y - 2, text_anchor="middle", fill=_INK, font_size=size),
        element("text", node.note, x=node.x, y=node.y + 13, text_anchor="middle", fill="#4d5563", font_size="11.5"),
    )


def _plate(x: float, y: float, width: float, height: float, label: str) -> Html:
    return join(
        [
            element("rect", x=x, y=y, width=width, height=height, rx="8", fill="none", stroke=_BOX, stroke_width="1.1"),
            element(
                "text", label, x=x + width - 9, y=y + height - 8, text_anchor="end", fill="#4d5563", font_size="12"
            ),
        ]
    )


def _edge(start: Node, end: Node) -> Html:
    """A straight arrow from the rim of one ellipse to that of the other."""
    (x0, y0), (x1, y1) = _rim(start, end), _rim(end, start)
    return _path(f"M {x0:.1f} {y0:.1f} L {x1:.1f} {y1:.1f}")


def _around(start: Node, end: Node) -> Html:
    """An arrow between two ellipses of the left column, around those that lie between them."""
    x, rim = start.x - 50, end.x - 58
    return _path(f"M {x} {start.y + 18} C 12 {start.y + 70}, 12 {end.y - 50}, {rim} {end.y - 15}")


def _aside(start: Node, end: Node) -> Html:
    """An arrow between two latents, around those that lie between them."""
    x = _RIGHT + _RX
    return _path(f"M {x - 8} {start.y + 8} C {x + 40} {start.y + 20}, {x + 40} {end.y - 20}, {x - 8} {end.y - 8}")


def _rim(node: Node, towards: Node) -> tuple[float, float]:
    dx, dy = towards.x - node.x, towards.y - node.y
    scale = 1.0 / ((dx / (_RX + 2)) ** 2 + (dy / (_RY + 2)) ** 2) ** 0.5
    return node.x + scale * dx, node.y + scale * dy


def _path(d: str) -> Html:
    return element("path", d=d, fill="none", stroke=_INK, stroke_width="1.3", marker_end="url(#arrow)")
