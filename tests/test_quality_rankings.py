"""The shipped preference set: enough of it, and no shortcut by length or copied text."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from bayesrm.data import load_quality_rankings


@pytest.fixture(scope="module")
def prompts():
    return load_quality_rankings(split="all", hacks=True)


def words(text):
    return len(text.split())


def grams(text, n=8):
    tokens = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def test_size(prompts):
    assert len(prompts) >= 120
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == len(prompts)
    assert len({p.subject for p in prompts}) >= 6
    assert len({p.subject for p in prompts if p.out_of_domain}) == 2
    assert not {p.subject for p in prompts if p.out_of_domain} & {p.subject for p in prompts if not p.out_of_domain}
    assert all(len(p.responses) == 4 == len(set(p.responses)) for p in prompts)
    assert all(len(p.flaws) == 3 and all(p.flaws) for p in prompts)
    assert sum(len(p.hacks) for p in prompts) >= 24


def test_length_does_not_tell_the_rank(prompts):
    correlations, right = [], []
    for p in prompts:
        lengths = [words(r) for r in p.responses]
        if len(set(lengths)) > 1:
            correlations.append(scipy.stats.spearmanr(lengths, range(4)).statistic)
        # Half a point for two responses of one length.
        right += [np.sign(better - worse) / 2 + 0.5 for better, worse in combinations(lengths, 2)]
    assert abs(np.mean(correlations)) < 0.1
    assert abs(np.mean(right) - 0.5) < 0.05


def test_hacks_are_long(prompts):
    median = np.median([words(r) for p in prompts for r in p.responses])
    assert min(words(text) for p in prompts for text, _ in p.hacks) > median
    assert all(kind for p in prompts for _, kind in p.hacks)


def test_no_text_is_copied(prompts):
    owners = defaultdict(set)
    texts = [r for p in prompts for r in p.responses] + [text for p in prompts for text, _ in p.hacks]
    for index, text in enumerate(texts):
        for gram in grams(text):
            owners[gram].add(index)
    assert len(owners) > 10_000
    shared = {" ".join(gram): sorted(found) for gram, found in owners.items() if len(found) > 1}
    assert shared == {}
