"""Figures as pictures inside the page."""

import base64
import io
from typing import Any

from ...errors import ArgumentError
from ._html import Html, element

#: Pixels an inch; the page shows 100 of them to an inch, so that figures stay sharp on dense screens.
_DPI = 160


def require_matplotlib() -> None:
    """Raises `ArgumentError` where figures cannot be drawn, before any long work starts."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ArgumentError("the report needs matplotlib; run `pip install 'bayesrm[plots]'`") from error


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, known to no global registry, with one pair of axes; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def image(figure: Any, alt: str, caption: str) -> Html:
    """A figure as a picture with a caption.

    Args:
        figure: A matplotlib figure.
        alt: What it shows, with its numbers, for those who cannot see it.
        caption: What it is.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    width, height = (round(float(size) * 100) for size in figure.get_size_inches())
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture = element("img", src=source, alt=alt, width=str(width), height=str(height), loading="lazy")
    return element("figure", picture, element("figcaption", caption))
