"""Beliefs about tokens: redistribution against Gaussian conditioning, moves between tokenizers by hand, bad input."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from bayesrm.errors import ArgumentError
from bayesrm.token_beliefs import TokenBelief

TEXTS = ("one two", "a bc.", "é ü")
#: A token of two words, one that leaves a space out, and the end of the sequence.
SPANS = (((0, 3), (3, 7), (7, 7)), ((0, 1), (2, 4), (4, 5), (5, 5)), ((0, 3),))


def belief(num_draws=0, *, std=True, seed=0):
    """Three responses of 3, 4 and 1 tokens; what stands at padding is not a number."""
    rng = np.random.default_rng(seed)
    shape = (len(TEXTS), max(map(len, SPANS)))
    mask = torch.tensor([[t < len(s) for t in range(shape[1])] for s in SPANS])
    spans = torch.zeros(*shape, 2, dtype=torch.int64)
    for row, found in enumerate(SPANS):
        spans[row, : len(found)] = torch.tensor(found)

    def numbers(values):
        return torch.where(mask, torch.from_numpy(values), torch.nan)

    around = numbers(rng.uniform(0.2, 1.5, size=shape)) if std else torch.zeros(shape, dtype=torch.float64)
    if not num_draws:
        return TokenBelief(TEXTS, spans, numbers(rng.normal(size=shape)), torch.where(mask, around, 0.0), mask)
    # Draws share much: their spread along the response is of the same sign.
    draws = rng.normal(size=(num_draws, *shape)) + 2.0 * rng.normal(size=(num_draws, len(TEXTS), 1))
    draws = torch.stack([numbers(d) for d in draws])
    return TokenBelief(TEXTS, spans, draws.mean(0), torch.where(mask, around, 0.0), mask, draws)


def covariance(b, row):
    """Dense covariance of a response's token rewards, in a loop over its tokens."""
    count = int(b.mask[row].sum())
    found = np.diag(b.std[row, :count].numpy() ** 2)
    if b.draws is not None:
        found += np.atleast_2d(np.cov(b.draws[:, row, :count].numpy(), rowvar=False))
    return found


kinds = pytest.mark.parametrize("num_draws", [0, 5], ids=["independent", "draws"])


@kinds
def test_sums_are_those_of_the_dense_covariance(num_draws):
    b = belief(num_draws)
    mean, std = b.sums()
    for row in range(len(b)):
        ones = np.ones(int(b.mask[row].sum()))
        assert float(mean[row]) == pytest.approx(b.mean[row].sum().item(), rel=1e-12)
        assert float(std[row]) == pytest.approx(np.sqrt(ones @ covariance(b, row) @ ones), rel=1e-12)
        np.testing.assert_allclose(b.total_std[row, : len(ones)], np.sqrt(np.diag(covariance(b, row))), rtol=1e-12)
        assert not b.total_std[row, len(ones) :].any()


@kinds
def test_redistribution_is_conditioning_on_the_sum(num_draws):
    b, totals = belief(num_draws), torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    found = b.redistribute(totals)
    for row in range(len(b)):
        count = int(b.mask[row].sum())
        sigma, mean, ones = covariance(b, row), b.mean[row, :count].numpy(), np.ones(count)
        gain = sigma @ ones / (ones @ sigma @ ones)
        left = sigma - np.outer(gain, ones @ sigma)
        np.testing.assert_allclose(found.mean[row, :count], mean + gain * (float(totals[row]) - mean.sum()), rtol=1e-10)
        # Variances of tokens that the sum settles are 0 up to rounding.
        np.testing.assert_allclose(found.std[row, :count].square(), np.diag(left), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.sums()[0], totals, rtol=1e-12, atol=1e-12)
    assert found.draws is None
    assert torch.equal(found.mask, b.mask)
    assert not found.mean[~b.mask].any()
    # The one token of the last response is its total.
    assert float(found.std[2, 0]) == pytest.approx(0.0, abs=1e-7)


def test_what_draws_share_counts_in_the_redistribution():
    """Ignoring the covariance of tokens, as if draws were independent, gives another answer."""
    b = belief(5)
    alone = TokenBelief(b.texts, b.spans, b.mean, b.total_std, b.mask)
    totals = torch.full((3,), 4.0, dtype=torch.float64)
    assert float((b.redistribute(totals).mean - alone.redistribute(totals).mean).abs().max()) > 0.05


def test_certain_tokens_share_a_surplus_equally():
    b = belief(std=False)
    found = b.redistribute(b.sums()[0] + 6.0)
    for row, count in enumerate((3, 4, 1)):
        torch.testing.assert_close(found.mean[row, :count], b.mean[row, :count] + 6.0 / count)
    assert not found.std.any()
    unmoved = belief().redistribute(belief().sums()[0])
    torch.testing.assert_close(unmoved.mean, belief().mean)
    assert bool((unmoved.std < belief().std)[belief().mask].all())


def test_redistribution_of_one_token_with_all_the_uncertainty():
    b = belief()
    b = dataclasses.replace(b, std=torch.zeros_like(b.std).index_put_((torch.tensor(0), torch.tensor(1)), b.std[0, 1]))
    found = b.redistribute(torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.mean[0, [0, 2]], b.mean[0, [0, 2]])
    assert float(found.mean[0].sum()) == pytest.approx(9.0)


def onto(b, spans):
    most = max(map(len, spans))
    to, mask = torch.zeros(len(b), most, 2, dtype=torch.int64), torch.zeros(len(b), most, dtype=torch.bool)
    for row, found in enumerate(spans):
        to[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), True
    return b.onto(to, mask)


def by_character(b, row, spans):
    """Means on other tokens, collected character by character; tokens without characters go to the last."""
    found = np.zeros(len(spans))
    for (start, stop), value in zip(
        b.spans[row, : int(b.mask[row].sum())].tolist(), b.mean[row].tolist(), strict=False
    ):
        for place in range(start, stop):
            covering = [i for i, (s, e) in enumerate(spans) if s <= place < e]
            before = [i for i, (s, e) in enumerate(spans) if s < e <= place]
            owner = covering[-1] if covering else before[-1] if before else 0
            found[owner] += value / (stop - start)
        if stop == start:
            found[-1] += value
    return found


OTHERS = {
    "characters": (tuple((i, i + 1) for i in range(7)), tuple((i, i + 1) for i in range(5)), ((0, 1), (1, 2), (2, 3))),
    "whole": (((0, 7),), ((0, 5),), ((0, 3),)),
    "with ends": (((0, 5), (5, 7), (7, 7)), ((0, 5), (5, 5)), ((0, 3), (3, 3))),
    "gaps": (((1, 2), (4, 6)), ((1, 2), (3, 4)), ((1, 2),)),
    "overlapping": (((0, 4), (2, 7)), ((0, 3), (1, 5), (4, 5)), ((0, 2), (0, 3))),
    "empty between": (((0, 3), (3, 3), (3, 7)), ((0, 1), (1, 1), (1, 5)), ((0, 0), (0, 3))),
}


@kinds
@pytest.mark.parametrize("name", OTHERS)
def test_onto_other_tokens_collects_characters(name, num_draws):
    b, spans = belief(num_draws), OTHERS[name]
    found = onto(b, spans)
    for row, to in enumerate(spans):
        np.testing.assert_allclose(found.mean[row, : len(to)], by_character(b, row, to), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sums()[0], b.sums()[0], rtol=1e-12, atol=1e-12)
    if num_draws:
        torch.testing.assert_close(found.draws.sum(2), b.draws.sum(2), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.draws.mean(0), found.mean, rtol=1e-12, atol=1e-12)


def test_onto_its_own_tokens_changes_nothing():
    b = belief(4)
    found = b.onto(b.spans, b.mask)
    for name in ("mean", "std", "draws"):
        torch.testing.assert_close(getattr(found, name), getattr(b, name), rtol=1e-12, atol=0.0)


def test_standard_deviations_of_joined_and_divided_tokens():
    b = belief()
    joined = onto(b, OTHERS["whole"])
    torch.testing.assert_close(joined.std[:, 0], b.sums()[1])
    divided = onto(b, OTHERS["characters"])
    # The second token has four characters, which vary as one.
    torch.testing.assert_close(divided.std[0, 3:6], b.std[0, 1].expand(3) / 4)
    # The end of the sequence, which has none, goes to the last character.
    assert float(divided.std[0, 6]) == pytest.approx(float((b.std[0, 1] / 4).square() + b.std[0, 2].square()) ** 0.5)


def test_a_response_without_characters():
    def end(count):
        return torch.zeros(1, count, 2, dtype=torch.int64), torch.ones(1, count, dtype=torch.bool)

    spans, mask = end(2)
    b = TokenBelief(("",), spans, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), mask)
    found = b.onto(*end(3))
    assert found.mean.tolist() == [[0.0, 0.0, 3.0]]
    assert found.std.tolist() == [[0.0, 0.0, 5.0]]
    assert b.tokens(0) == ["", ""]


def test_rows_and_tokens():
    b = belief(3)
    assert len(b) == 3
    assert [b.tokens(row) for row in range(3)] == [["one", " two", ""], ["a", "bc", ".", ""], ["é ü"]]
    last = b[[2, 0]]
    assert last.texts == (TEXTS[2], TEXTS[0])
    assert last.mean.shape == (2, 3)
    assert last.draws.shape == (3, 2, 3)
    torch.testing.assert_close(last.sums(), tuple(part[[2, 0]] for part in b.sums()))
    assert b[1:].texts == TEXTS[1:]
    assert len(b[:0]) == 0
    assert b[[]].mean.shape == (0, 0)


def test_padding_counts_for_nothing():
    b = belief(3)
    for name in ("mean", "std", "draws"):
        assert not getattr(b, name)[..., ~b.mask].any()
    changed = dataclasses.replace(b, spans=torch.where(b.mask[..., None], b.spans, -7))
    totals = torch.ones(3, dtype=torch.float64)
    assert torch.equal(changed.redistribute(totals).mean, b.redistribute(totals).mean)
    assert torch.equal(onto(changed, OTHERS["gaps"]).mean, onto(b, OTHERS["gaps"]).mean)


def changed(**parts):
    return lambda b: dataclasses.replace(b, **{name: change(b) for name, change in parts.items()})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(texts=lambda b: b.texts[:2]), "`texts` holds 2 responses, `mean` is about 3"),
        (changed(mask=lambda b: b.mask.flip(1)), "`mask` has gaps"),
        (changed(mean=lambda b: b.mean + torch.inf), "`mean` has entries that are not finite"),
        (changed(draws=lambda b: b.draws * torch.nan), "`draws` has entries that are not finite"),
        (changed(draws=lambda b: b.draws[:1]), "at least 2"),
        (changed(std=lambda b: -b.std), "`std` has negative entries"),
        (
            changed(spans=lambda b: b.spans + 1),
            r"`spans` has \[4, 8\] for token 1 of response 0, which has 7 characters",
        ),
        (changed(spans=lambda b: b.spans.flip(-1)), r"`spans` has \[3, 0\] for token 0 of response 0"),
        (changed(spans=lambda b: b.spans - 1), r"`spans` has \[-1, 2\]"),
        (lambda b: b.redistribute(torch.zeros(2)), r"`totals` has shape \(2,\); give 3 numbers, one for each response"),
        (lambda b: b.redistribute([1.0]), r"`totals` has shape \(1,\); give 3 numbers"),
        (
            lambda b: inspect.unwrap(TokenBelief.redistribute)(b, ["a"] * 3),
            r"`totals` is \['a', 'a', 'a'\]; give 3 numb",
        ),
        (lambda b: b.redistribute(torch.full((3,), torch.nan)), "`totals` is nan for response 0; give finite numbers"),
        (lambda b: b.onto(b.spans[:2], b.mask[:2]), "`spans` and `mask` have shapes"),
        (lambda b: b.onto(b.spans, torch.zeros_like(b.mask)), "at least one token in each response"),
        (
            lambda b: dataclasses.replace(b, mask=b.mask & torch.tensor([[True], [False], [True]])).redistribute(
                torch.zeros(3)
            ),
            "response 1 has no tokens",
        ),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ArgumentError, match=match):
        change(belief(3))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("std", lambda b: b.std[:, :2]),
        ("mask", lambda b: b.mask[:2]),
        ("spans", lambda b: b.spans[..., :1].expand(-1, -1, 3)),
        ("draws", lambda b: b.draws[:, :2]),
    ],
)
def test_shapes_that_disagree(name, change):
    # The type checks of the test run see it first.
    with pytest.raises((ArgumentError, TypeError), match=name):
        changed(**{name: change})(belief(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_vary_while_their_sum_does_not_share_equally(dtype):
    """Scores of matches F, T, T and T, F, F sum to -1; rounding of their mean in thirds must not decide the shares."""
    draws = torch.tensor([[-1, 0, 0], [1, -1, -1], [-1, 0, 0]], dtype=dtype)[:, None]
    spans, mask = torch.tensor([[[0, 1], [1, 3], [3, 3]]]), torch.ones(1, 3, dtype=torch.bool)
    b = TokenBelief(("a b",), spans, draws.mean(0), torch.zeros(1, 3, dtype=dtype), mask, draws)
    shared = b.redistribute(torch.tensor([2.0], dtype=dtype)).mean
    torch.testing.assert_close(shared, draws.mean(0) + 1.0)


def test_masks_are_no_rows():
    with pytest.raises(ArgumentError, match="give the numbers of responses"):
        belief()[[True, False, True]]
