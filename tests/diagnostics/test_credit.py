"""Credit of tokens: numbers by quadrature and by draws, and the page parsed back into its text."""

import html.parser
import inspect
import re

import numpy as np
import pytest
import scipy.stats
import torch

from bayesrm.beliefs import RewardBelief
from bayesrm.diagnostics import Credit, credit, credit_html, credit_table, save_credit_html
from bayesrm.diagnostics._credit_html import _NEGATIVE, _POSITIVE, _colour
from bayesrm.errors import ArgumentError, PersistenceError
from bayesrm.token_beliefs import TokenBelief

HOSTILE = "</span></style><script>alert(1)</script><b onclick='x'>&amp; \"q\""
TEXTS = (
    "Two  words,\n\nand a tab\there ",
    "שלום עולם abc",
    HOSTILE,
    "",
)


def belief(texts=TEXTS, *, num_draws=0, size=4, seed=0, std=None):
    """Tokens of four characters, the spaces before `w` left out, and the end of the sequence."""
    rng = np.random.default_rng(seed)
    spans = [[(i, min(i + size, len(t))) for i in range(0, len(t), size)] + [(len(t), len(t))] for t in texts]
    shape = (len(texts), max(map(len, spans)))
    at, mask = torch.zeros(*shape, 2, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, found in enumerate(spans):
        at[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), True
    mean = torch.from_numpy(rng.normal(size=shape))
    around = torch.from_numpy(rng.uniform(0.1, 1.0, size=shape)) if std is None else torch.full(shape, std).double()
    if not num_draws:
        return TokenBelief(tuple(texts), at, mean, torch.where(mask, around, 0.0), mask)
    draws = torch.from_numpy(rng.normal(size=(num_draws, *shape)))
    return TokenBelief(tuple(texts), at, draws.mean(0), torch.where(mask, around, 0.0), mask, draws)


class Page(html.parser.HTMLParser):
    """Elements with attributes; the words of each element that shows a response, without its marks."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.responses, self.tokens, self.cells = [], [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag != "meta":
            self.open.append((tag, (attributes.get("class") or "").split()))
        if "brm-credit-text" in (attributes.get("class") or ""):
            self.responses.append("")
            self.tokens.append([])
        if "brm-credit-token" in (attributes.get("class") or ""):
            self.tokens[-1].append((attributes, []))
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        classes = [name for _, names in self.open for name in names]
        if "td" in [tag for tag, _ in self.open]:
            self.cells[-1] += data
        if "brm-credit-mark" in classes:
            self.tokens[-1][-1][1].append(("mark", data))
        elif "brm-credit-text" in classes:
            self.responses[-1] += data
            if "brm-credit-token" in classes:
                self.tokens[-1][-1][1].append(("text", data))


def test_probability_of_a_positive_reward():
    b = belief()
    found = credit(b)
    assert isinstance(found, Credit)
    assert len(found) == 4
    for row in range(4):
        count = int(b.mask[row].sum())
        expected = scipy.stats.norm.sf(0.0, b.mean[row, :count], b.std[row, :count])
        np.testing.assert_allclose(found.positive[row, :count], expected, rtol=1e-10)
        np.testing.assert_allclose(found.certainty[row, :count], np.abs(2 * expected - 1), rtol=1e-9, atol=1e-12)
        assert found.tokens[row] == tuple(b.tokens(row))
    padding = ~b.mask.numpy()
    assert padding.any()
    for values in (found.mean, found.std, found.positive):
        assert np.isnan(values[padding]).all()
        assert np.isfinite(values[~padding]).all()


def test_draws_are_a_mixture():
    """Against draws from the mixture; a normal distribution with its moments is something else."""
    b = belief(num_draws=2, std=0.1)
    found, rng = credit(b), np.random.default_rng(1)
    chosen = rng.integers(2, size=40_000)
    drawn = b.draws[chosen, 0, :3].numpy() + 0.1 * rng.normal(size=(len(chosen), 3))
    # Four and a half standard errors of a share, 0.5 / 200 at most.
    np.testing.assert_allclose(found.positive[0, :3], (drawn > 0).mean(0), atol=4.5 * 0.5 / len(chosen) ** 0.5)
    np.testing.assert_allclose(found.std[0], np.where(b.mask[0], b.total_std[0], np.nan))
    moments = scipy.stats.norm.sf(0.0, found.mean, found.std)
    assert np.nanmax(np.abs(moments - found.positive)) > 0.1


def test_rewards_that_are_known():
    b = belief(("abcdefgh",), std=0.0)
    b = TokenBelief(b.texts, b.spans, torch.tensor([[2.0, -1.0, 0.0]]), b.std.float(), b.mask)
    assert credit(b).positive.tolist() == [[1.0, 0.0, 0.5]]
    assert credit(b).certainty.tolist() == [[1.0, 1.0, 0.0]]
    assert "'abcd'      +2.000  0.000  1.000            |----------" in credit_table(b)
    assert "(no text)   +0.000" in credit_table(b)


def test_table_has_a_line_for_each_token():
    b = belief()
    lines = credit_table(b).splitlines()
    assert len(lines) == 1 + int(b.mask[0].sum())
    # Line ends are told, not printed.
    assert repr("ds,\n") in lines[3]
    for t, line in enumerate(lines[1:]):
        assert f"{float(b.mean[0, t]):+.3f}" in line
        left, right = line.split("  ")[-1].rsplit("|", 1) if "|" in line else ("", "")
        assert bool(right.strip()) <= (float(b.mean[0, t]) > 0)
        assert bool(left.strip()) <= (float(b.mean[0, t]) < 0)
    assert str(credit(b)).count("P(>0)") == 4


@pytest.mark.parametrize("num_draws", [0, 3])
def test_page_shows_every_character_once(num_draws):
    b = belief(num_draws=num_draws)
    source = credit_html(b, title=f"<i>{HOSTILE}", prompts=["a <b>", "b", "c", "d"])
    page = Page(source)
    assert not page.open
    assert page.responses == list(TEXTS)
    for row, tokens in enumerate(page.tokens):
        assert len(tokens) == int(b.mask[row].sum())
        shown = ["".join(data for kind, data in parts if kind == "text") for _, parts in tokens]
        assert shown == b.tokens(row)
        # The end of the sequence, and nothing else here, is shown by a mark alone.
        assert [parts for _, parts in tokens if not any(kind == "text" for kind, _ in parts)] == [[("mark", "∎")]]
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "img", "object", "base", "form", "b onclick='x'"} & set(tags)
    assert not any(name.startswith("on") or name in ("src", "href") for _, a in page.elements for name in a)
    assert "url(" not in source
    assert "default-src 'none'" in next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert tags.count("h1") == 1


def test_page_tells_numbers_signs_and_directions():
    b = belief()
    page, found = Page(credit_html(b)), credit(b)
    largest = np.nanmax(np.abs(found.mean))
    for row, tokens in enumerate(page.tokens):
        for t, (attributes, _) in enumerate(tokens):
            mean, std, positive = found.mean[row, t], found.std[row, t], found.positive[row, t]
            assert f"{mean:+.3f} ± {std:.3f}, P(> 0) = {positive:.3f}" in attributes["title"]
            assert ("brm-credit-negative" in attributes["class"]) == (mean < 0)
            *parts, opacity = map(float, re.search(r"rgba\((.*)\)", attributes["style"])[1].split(","))
            assert opacity == pytest.approx(found.certainty[row, t], abs=6e-4)
            end = _NEGATIVE if mean < 0 else _POSITIVE
            expected = [255 + abs(mean) / largest * (part - 255) for part in end]
            np.testing.assert_allclose(parts, expected, atol=0.51)
    assert page.cells[:3] == [f"{found.mean[0, 0]:+.3f}", f"{found.std[0, 0]:.3f}", f"{found.positive[0, 0]:.3f}"]
    containers = [a for _, a in page.elements if "brm-credit-text" in (a.get("class") or "")]
    assert all(a["dir"] == "auto" for a in containers)


def test_style_keeps_spaces_and_lines_and_marks_what_is_below_zero():
    source = credit_html(belief())
    assert re.search(r"\.brm-credit-text \{[^}]*white-space: pre-wrap; unicode-bidi: plaintext", source)
    assert re.search(r"\.brm-credit-negative \{[^}]*underline", source)
    assert "certainty of its sign" in source
    assert "below 0" in source


def luminance(colour):
    parts = [p / 255 for p in colour]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_text_stays_readable_on_full_colour():
    """Contrast of at least 4.5 to 1 with the text (WCAG 2.1, AA), underline and background 3 to 1."""
    for end in (_NEGATIVE, _POSITIVE, (255, 255, 255)):
        assert (luminance(end) + 0.05) / (luminance((0x1D, 0x23, 0x30)) + 0.05) > 4.5
    assert (luminance(_NEGATIVE) + 0.05) / (luminance((0x8A, 0x4B, 0)) + 0.05) > 3.0
    assert _colour(2.0, 1.0, 1.0) == "rgba(103,169,207,1.000)"
    assert _colour(0.0, 1.0, 1.0) == "rgba(255,255,255,1.000)"


def test_gaps_overlaps_and_lone_line_ends():
    text = "a b😀\nc"
    # The space belongs to no token, the sign to two, of which the first has the character.
    spans = torch.tensor([[[0, 1], [2, 3], [3, 4], [3, 4], [4, 5], [5, 6]]])
    b = TokenBelief((text,), spans, torch.ones(1, 6), torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool))
    page = Page(credit_html(b))
    assert page.responses == [text]
    parts = [parts for _, parts in page.tokens[0]]
    assert parts[2:5] == [[("text", "😀")], [("mark", "·")], [("mark", "↵"), ("text", "\n")]]


def test_rows_scale_and_notebooks():
    b = belief()
    page = Page(credit_html(b, rows=[2, 0]))
    assert page.responses == [TEXTS[2], TEXTS[0]]
    assert Page(credit(b)._repr_html_()).responses == list(TEXTS)
    assert "<html" not in credit(b)._repr_html_()
    narrow = Page(credit_html(b, scale=1e-3)).tokens[0][0][0]["style"]
    assert "241,163,64" in narrow or "103,169,207" in narrow
    zeros = TokenBelief(b.texts, b.spans, 0 * b.mean, b.std, b.mask)
    assert Page(credit_html(zeros)).responses == list(TEXTS)
    assert Page(credit_html(b, rows=[])).responses == []
    assert Page(credit(b[:0])._repr_html_()).responses == []


def test_what_does_not_fit_is_refused():
    b = belief()
    with pytest.raises(ArgumentError, match="there is no response 4; the belief is about 4"):
        credit_html(b, rows=[4])
    with pytest.raises(ArgumentError, match="there is no response -1"):
        credit_table(b, -1)
    # Checks of types at run time, which tests turn on, would come first.
    page, of = inspect.unwrap(credit_html), inspect.unwrap(credit)
    for rows, message in ((0, "`rows` is 0; give a list of responses, such as"), ("0", "`rows` is '0'"),
                          ([1.5], r"there is no response 1\.5"), ([True], "there is no response True")):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            page(b, rows)
    rewards = RewardBelief(torch.zeros(1, 2), torch.zeros(1, 2, 1))
    for wrong, name in ((rewards, "RewardBelief"), ("text", "str")):
        with pytest.raises(ArgumentError, match=f"`belief` is of type {name}; give a TokenBelief"):
            of(wrong)
    with pytest.raises(ArgumentError, match="`prompts` has 2 entries for 4"):
        credit_html(b, prompts=["a", "b"])
    with pytest.raises(ArgumentError, match=r"`scale` is 0\.0"):
        credit_html(b, scale=0.0)


def test_page_is_written(tmp_path):
    b = belief()
    path = save_credit_html(b, tmp_path / "new" / "credit.html", title="Credit")
    assert path.read_text(encoding="utf-8") == credit_html(b, title="Credit")
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistenceError, match="cannot write"):
        save_credit_html(b, tmp_path / "file" / "credit.html")


def test_what_was_not_read_is_marked():
    text = "one two three"
    spans = torch.tensor([[[0, 3], [3, 7]]])
    b = TokenBelief((text,), spans, torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    page = credit_html(b)
    assert 'class="brm-credit-unread"' in page
    assert "cut here: not read" in page
    whole = torch.tensor([[[0, 3], [3, 13]]])
    assert 'class="brm-credit-unread"' not in credit_html(TokenBelief((text,), whole, b.mean, b.std, b.mask))
