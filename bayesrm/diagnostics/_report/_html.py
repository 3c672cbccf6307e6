"""HTML that escapes by default: whatever is not `Html` already is text, and text cannot become markup."""

import html
import re
from collections.abc import Iterable, Sequence

#: Characters that HTML forbids, and those that reverse the writing around them; line ends and tabs stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """A string that is markup; made by the functions of this module alone."""

    __slots__ = ()


def text(value: object) -> Html:
    """Any value as escaped text; control characters and halves of surrogate pairs become the replacement character.

    Example:
        >>> text("<b>" + chr(0))
        '&lt;b&gt;�'
    """
    if isinstance(value, Html):
        return value
    clean = str(value).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(_CONTROL.sub("\ufffd", clean)))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element. Children that are no `Html` are escaped, `None` is left out; so are attributes that are `None`.

    Args:
        tag: Name of the element.
        children: What is inside.
        attributes: `class_` stands for `class`, and `_` for `-` in other names.

    Example:
        >>> element("p", "a < b ", element("b", 1), class_="x")
        '<p class="x">a &lt; b <b>1</b></p>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another, `None` left out."""
    return Html("".join(text(part) for part in parts if part is not None))


def paragraph(*children: object, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table with a caption, in a box that scrolls where the page is narrower than the table."""
    body = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell, class_="short" if _is_short(cell) else None) for cell in rest),
        )
        for first, *rest in rows
    ]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *body),
    )
    return element("div", content, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _is_short(cell: object) -> bool:
    # What a reader sees of markup is far less than its source.
    return isinstance(cell, Html) or len(str(cell)) <= 22


def quote(value: str, limit: int = 900) -> Html:
    """An untrusted text as a block of its own, cut beyond `limit` characters."""
    cut = len(value) - limit
    shown = value if cut <= 0 else value[:limit].rstrip() + " …"
    rest = None if cut <= 0 else element("span", f" ({cut:,} more characters)", class_="tag")
    # `dir=auto` sets a text in the direction of its own language.
    return element("div", shown, rest, class_="text", dir="auto")
