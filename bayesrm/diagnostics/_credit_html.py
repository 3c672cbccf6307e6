"""The page of credit of tokens: coloured text, a legend, and tables of the numbers."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ._report._html import Html, element, join, paragraph, table

if TYPE_CHECKING:
    from .credit import Credit

#: Ends of the scale, tellable apart without red or green and light enough for black text (PuOr of ColorBrewer).
_NEGATIVE, _POSITIVE = (241, 163, 64), (103, 169, 207)
#: Stands for a token without characters, and for one that only breaks the line.
_END, _BREAK = "∎", "↵"

# Every class has a prefix: in a notebook the rules stand beside those of others.
_STYLE = """
.brm-credit { color: #1d2330; background: #fff; font: 16px/1.7 system-ui, sans-serif; padding: .4rem .6rem;
  overflow-wrap: anywhere }
.brm-credit-text { white-space: pre-wrap; unicode-bidi: plaintext; text-align: start; margin: .4rem 0;
  padding: .6rem .8rem; border: 1px solid #c9ced6; border-radius: 4px }
.brm-credit-prompt { white-space: pre-wrap; unicode-bidi: plaintext; font-weight: 600; margin: 1.2rem 0 .2rem }
.brm-credit-token { border-radius: 2px; padding-block: .1em }
.brm-credit-token:hover { outline: 1px solid #4d5563 }
.brm-credit-negative { text-decoration: underline solid #8a4b00 2px; text-underline-offset: .2em }
.brm-credit-unread { color: #6b7280; text-decoration: line-through }
.brm-credit-mark { color: #4d5563; font-size: .8em; user-select: none }
.brm-credit-legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; align-items: center; font-size: .87rem;
  color: #4d5563; margin: .4rem 0 }
.brm-credit-legend b { font-weight: 500; color: #1d2330; padding: .1em .5em }
.brm-credit-sum { font-size: .87rem; color: #4d5563; margin: .2rem 0 }
.brm-credit details { font-size: .87rem; margin: .2rem 0 1.4rem }
.brm-credit table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.brm-credit caption { text-align: start }
.brm-credit th, .brm-credit td { text-align: start; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #e2e5ea;
  white-space: pre }
.brm-credit .scroll { overflow-x: auto; max-height: 24rem }
"""
_PAGE_STYLE = """
:root { color-scheme: light }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; background: #fff; color: #1d2330 }
h1 { font: 600 1.6rem/1.3 system-ui, sans-serif; padding: 0 .6rem; overflow-wrap: anywhere }
footer { font: .87rem system-ui, sans-serif; color: #4d5563; padding: 0 .6rem }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, content: Html) -> Html:
    """The whole document."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(_PAGE_STYLE)),
    )
    footer = element("footer", paragraph(f"Written by bayesrm {importlib.metadata.version('bayesrm')}."))
    body = element("body", element("h1", title, dir="auto"), element("main", content), footer)
    return join([Html("<!doctype html>\n"), element("html", head, body, lang="en")])


def fragment(credit: "Credit", rows: Sequence[int], scale: float, prompts: Sequence[str] | None = None) -> Html:
    """Responses with a legend, for a page or a notebook."""
    return element(
        "div",
        element("style", Html(_STYLE)),
        _legend(scale),
        *([] if credit.has_uncertainty else [element("p", _DOUBTLESS)]),
        *(_response(credit, row, scale, None if prompts is None else prompts[row]) for row in rows),
        class_="brm-credit",
    )


def _response(credit: "Credit", row: int, scale: float, prompt: str | None) -> Html:
    count = len(credit.tokens[row])
    total = float(credit.mean[row, :count].sum())
    numbers = [
        (
            element("span", credit.tokens[row][t], dir="auto") if credit.tokens[row][t] else "(no text)",
            f"{credit.mean[row, t]:+.3f}",
            f"{credit.std[row, t]:.3f}",
            f"{credit.positive[row, t]:.3f}",
        )
        for t in range(count)
    ]
    caption = f"Tokens of response {row}"
    return element(
        "section",
        None if prompt is None else element("div", prompt, class_="brm-credit-prompt", dir="auto"),
        element("div", *_text(credit, row, scale), class_="brm-credit-text", dir="auto"),
        element("p", f"Response {row}: {count} tokens, mean rewards sum to {total:+.3f}", class_="brm-credit-sum"),
        element(
            "details",
            element("summary", "Numbers"),
            table(caption, ("token", "mean", "std", "P(> 0)"), numbers),
        ),
    )


def _text(credit: "Credit", row: int, scale: float) -> Iterator[Html | str]:
    """The response from its first character to its last, each once, in pieces with the colours of tokens."""
    text, done = credit.texts[row], 0
    for t, (start, stop) in enumerate(credit.spans[row, : len(credit.tokens[row])].tolist()):
        if start > done:
            yield text[done:start]
        # Of tokens that share a character, which then has parts, the first one shows it.
        piece = text[max(start, done) : stop]
        done = max(done, stop)
        yield _token(credit, row, t, piece, scale)
    unread = text[done:]
    yield element("span", unread, class_="brm-credit-unread", title="cut here: not read") if unread.strip() else unread


def _token(credit: "Credit", row: int, t: int, piece: str, scale: float) -> Html:
    mean, std, positive = (float(values[row, t]) for values in (credit.mean, credit.std, credit.positive))
    told = f"{mean:+.3f} ± {std:.3f}, P(> 0) = {positive:.3f}"
    mark = None
    if not piece:
        last = t == len(credit.tokens[row]) - 1
        told = f"{'end' if last else 'token without characters'}: {told}"
        mark = element("span", _END if last else "·", class_="brm-credit-mark", aria_label="end" if last else "no text")
    elif not piece.strip("\r\n"):
        mark = element("span", _BREAK, class_="brm-credit-mark", aria_hidden="true")
    return element(
        "span", mark, piece, title=told, style=f"background:{_colour(mean, float(credit.certainty[row, t]), scale)}",
        class_="brm-credit-token brm-credit-negative" if mean < 0 else "brm-credit-token",
    )  # fmt: skip


def _colour(mean: float, certainty: float, scale: float) -> str:
    """The mean on the scale from orange over white to blue, as opaque as its sign is certain."""
    end, share = (_NEGATIVE if mean < 0 else _POSITIVE), min(1.0, abs(mean) / scale)
    mixed = [round(255 + share * (part - 255)) for part in end]
    return f"rgba({mixed[0]},{mixed[1]},{mixed[2]},{certainty:.3f})"


#: A mode has no standard deviations, and full colour would look like certainty.
_DOUBTLESS = "There is no uncertainty in this belief: colours show means alone, not how sure their signs are."


def _legend(scale: float) -> Html:
    steps = [
        element(
            "b",
            f"{share * scale:+.3g}" if share else "0",
            style=f"background:{_colour(share, 1.0, 1.0)}",
            class_="brm-credit-negative" if share < 0 else None,
        )
        for share in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    certain = [element("b", f"{sure:.0%}", style=f"background:{_colour(1.0, sure, 1.0)}") for sure in (1.0, 0.5, 0.1)]
    return element(
        "div",
        element("span", "mean reward ", *steps),
        element("span", "certainty of its sign ", *certain),
        element("span", element("b", "underlined", class_="brm-credit-negative"), " below 0"),
        element("span", element("b", _END), " end of the response"),
        class_="brm-credit-legend",
    )
