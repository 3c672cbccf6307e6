"""Turns pairwise preferences into a linear model on features of pairs before an engine starts."""

import dataclasses

import numpy as np

from ..data import Comparisons
from ..errors import LikelihoodError
from ..programs import RewardModel
from ..rewards import PairwiseHead, PairwisePreference
from ..rewards.pairwise_preference import check_choices
from ._density import FeedbackDensity


def bound_pairs(program: RewardModel, data: Comparisons, *, progress: bool) -> tuple[RewardModel, Comparisons]:
    """The program as a linear model of pairs, and the data as comparisons of pairs with nothing.

    Raises:
        DataError: A row is no choice between two responses.
        LikelihoodError: The likelihood needs more than the difference of two rewards.
    """
    head = program.reward
    assert isinstance(head, PairwisePreference | PairwiseHead)
    if isinstance(head, PairwiseHead) and data.features is not None and data.features.shape[1] == head.num_features:
        return program, data
    # Refuses feedback that cannot be served before the long work of encoding texts.
    check_choices(data)
    groups = data.groups()
    density = FeedbackDensity(program, groups)
    if not density.only_differences():
        raise LikelihoodError(
            "the likelihood depends on more than the difference of the two rewards, and a pairwise preference has no "
            "reward of a single response; use BradleyTerry(), Davidson() or the like, or a reward such as Linear()"
        )
    bare = [dataclasses.replace(g, comparison=dataclasses.replace(g.comparison, lengths=None)) for g in groups]
    try:
        FeedbackDensity(program, bare)
    except LikelihoodError as error:
        raise LikelihoodError(
            "the likelihood needs the lengths of the responses, which it does not see with a pairwise preference; "
            "take lengths into the features"
        ) from error
    if isinstance(head, PairwisePreference):
        data = data.with_features(np.asarray(program.encode(data, progress=progress)))
        head = head.bind(data)
        program = dataclasses.replace(program, reward=head)
    return program, head.pairs(data, progress=progress)
