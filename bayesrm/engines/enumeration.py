"""Enumeration: the exact posterior over responses where all of them are at hand."""

import dataclasses
from typing import Any

import torch

from ..errors import EngineError
from ..programs import GoodnessPosterior, ScoredCandidates
from .response_posterior import ResponsePosterior, response_posterior


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """The posterior of a `GoodnessPosterior` by summing over every response.

    Attributes:
        tolerance: How far the reference's probabilities of the candidates of a prompt may sum from 1.

    Raises:
        EngineError: When fitting: the candidates are draws, or not all there are; or the program is another.

    Example:
        >>> import bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> candidates = brm.programs.ScoredCandidates(belief, reference=torch.tensor([[0.5, 0.5]]).log())
        >>> brm.fit(brm.GoodnessPosterior(), candidates, inference=Enumeration()).log_evidence
        tensor([-0.3799])
    """

    #: Programs that the engine serves.
    programs = (GoodnessPosterior,)

    tolerance: float = 1e-5

    def fit(self, program: Any, data: Any, *, seed: int, progress: bool) -> ResponsePosterior:
        """The exact posterior, see `bayesrm.fit`; nothing in it is random."""
        if not isinstance(program, GoodnessPosterior) or not isinstance(data, ScoredCandidates):
            raise EngineError(
                f"Enumeration sums over responses and cannot serve a {type(program).__name__}; use Laplace, NUTS, SVI, "
                "Ensemble or MAP"
            )
        if not data.exhaustive:
            raise EngineError(
                "the candidates carry `proposal`, so they are draws and not all responses; use ImportanceSampling()"
            )
        total = torch.where(data.mask, data.reference.double().exp(), 0.0).sum(1)
        wrong = (total - 1.0).abs() > self.tolerance
        if bool(wrong.any()):
            prompt = int(torch.nonzero(wrong)[0])
            raise EngineError(
                f"the reference gives the candidates of prompt {prompt} probability {float(total[prompt]):.6g} in "
                "all, not 1: they are not all responses; draw them, give `proposal`, and use ImportanceSampling()"
            )
        return response_posterior(program, data)
