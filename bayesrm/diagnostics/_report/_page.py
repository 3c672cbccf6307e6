"""The page around the sections: nothing in it is fetched, and nothing in it runs."""

import importlib.metadata
from collections.abc import Sequence

from ._html import Html, element, join, paragraph
from ._section import Section, badge

_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2330; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1.5rem 1.1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .6rem 0 .2rem }
h2 { font-size: 1.25rem; margin: 0 0 .6rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem }
section { border-top: 1px solid #dfe3e8; padding-top: 1.6rem; margin-top: 2.2rem }
a { color: #0a4f8a }
p { margin: .5rem 0 }
.lead, .tag, figcaption, caption { color: #4d5563 }
.tag, figcaption, caption { font-size: .87rem }
.verdict { font-size: 1.06rem; padding: .7rem .9rem; border-left: 5px solid; background: #f6f7f9; margin: 0 }
.verdict.good { border-color: #1b7f4d } .verdict.caution { border-color: #b36b00 }
.verdict.problem { border-color: #b3261e } .verdict.note { border-color: #66707f }
.badge { display: inline-block; font-size: .8rem; font-weight: 600; line-height: 1.5; padding: 0 .5em; color: #fff;
  border-radius: 1em; white-space: nowrap }
.badge.good { background: #1b7f4d } .badge.caution { background: #8f5600 } .badge.problem { background: #b3261e }
.badge.note { background: #5b6472 }
.advice { padding: 0 .9rem }
nav ol { list-style: none; margin: 1rem 0; padding: 0 }
nav li { display: grid; grid-template-columns: 9.2rem 1fr; gap: .1rem 1rem; padding: .5rem 0;
  border-bottom: 1px solid #eceef1 }
nav li a { font-weight: 600 }
nav li > span:last-child { grid-column: 2 }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 60% }
caption { text-align: left; padding-bottom: .3rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid #e2e5ea; vertical-align: top;
  overflow-wrap: normal }
thead th { color: #4d5563; font-weight: 600 }
tbody th { font-weight: 500; min-width: 7.5rem }
td { min-width: 8.5rem }
td.short { white-space: nowrap; min-width: 0 }
td svg { display: block }
figure { margin: 1.2rem 0 }
figure img, figure svg { max-width: 100%; height: auto; display: block }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem }
.columns > * { min-width: 0 }
.comparison { border: 1px solid #dfe3e8; border-radius: 6px; padding: .7rem .9rem; margin: .9rem 0 }
.comparison p { margin: .2rem 0 }
.text { white-space: pre-wrap; background: #f6f7f9; padding: .5rem .7rem; margin: .25rem 0 .6rem; border-radius: 4px }
.prompt { font-weight: 600 }
pre { white-space: pre-wrap; background: #f6f7f9; padding: .7rem .9rem; font-size: .85rem; line-height: 1.45 }
footer { margin-top: 3rem; border-top: 1px solid #dfe3e8; padding-top: .6rem }
@media (max-width: 34rem) {
  nav li { grid-template-columns: 1fr } nav li > span:last-child { grid-column: 1 }
  body { padding-inline: .9rem }
}
@media print { section { break-inside: avoid-page } .scroll { overflow: visible } }
"""

# A second lock besides escaping: a browser that honours it loads nothing and runs nothing, whatever the texts hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, lead: str, sections: Sequence[Section], *, over: str = "prompts") -> Html:
    """The whole document.

    Args:
        title: Heading and title of the window.
        lead: One line under the heading.
        sections: Sections in their order; their verdicts make the summary at the top.
        over: What intervals are over.
    """
    overview = element(
        "nav",
        element(
            "ol",
            *(
                element(
                    "li",
                    element("span", badge(section.status)),
                    element("a", section.title, href=f"#{section.name}"),
                    element("span", section.verdict),
                )
                for section in sections
            ),
        ),
        aria_label="Verdicts",
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    version = importlib.metadata.version("bayesrm")
    body = element(
        "body",
        element("header", element("h1", title), paragraph(lead, class_="lead")),
        element("main", overview, *(section.render() for section in sections)),
        element(
            "footer",
            paragraph(
                f"Written by bayesrm {version}. Intervals are 95% over {over} unless said otherwise.", class_="tag"
            ),
        ),
    )
    return join([Html("<!doctype html>\n"), element("html", head, body, lang="en")])
