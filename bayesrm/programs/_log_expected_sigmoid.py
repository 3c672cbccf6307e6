"""The logarithm of a logistic function's expectation under a normal distribution, also where it is tiny."""

import math

import numpy as np
import torch
from torch import Tensor

from ..beliefs import _expected_sigmoid

#: Terms of the alternating series; the error of its acceleration falls by 5.8 with each.
_TERMS = 12


def log_expected_sigmoid(mean: Tensor, std: Tensor) -> Tensor:
    """Log E[sigmoid(x)] for x ~ N(mean, std^2), to about 1e-5 whatever the mean.

    Gauss-Hermite in logarithms where the normal is narrow beside the logistic. Where it is wide: the expectation itself
    for means above 0, where it is no small number; for means below -std^2 the same after
    `sigmoid(x) = exp(x) sigmoid(-x)`, which moves the mean to `mean + std^2`; in between a series of Mills ratios.
    """
    m, s = mean.double(), std.double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    terms = [
        math.log(weight) + torch.nn.functional.logsigmoid(m + float(node) * s)
        for node, weight in zip(nodes, weights / weights.sum(), strict=True)
    ]
    narrow = torch.logsumexp(torch.stack(terms), 0)
    above = _expected_sigmoid(m.clamp_min(0.0), s).log()
    shifted = m + s.square()
    below = m + 0.5 * s.square() + _expected_sigmoid((-shifted).clamp_min(0.0), s).log()
    wide = torch.where(m >= 0.0, above, torch.where(shifted <= 0.0, below, _between(m, s.clamp_min(1.0))))
    return torch.where(s < 2.0, narrow, wide).to(mean)


def _between(mean: Tensor, std: Tensor) -> Tensor:
    """For `-std^2 < mean < 0`.

    The geometric series of the logistic function on either side of 0, integrated term by term:
    `phi(a) (R(a) + sum_{k >= 1} (-1)^(k + 1) (R(k std - a) - R(k std + a)))` with `a = -mean / std`, phi the normal
    density and R = (1 - Phi) / phi Mills' ratio. The terms are moments of a positive measure, so that the sum of few is
    exact after the acceleration of Cohen, Rodriguez Villegas & Zagier (2000, algorithm 1).
    """
    a = (-mean / std).clamp_min(0.0).minimum(std)
    total = _mills(a)
    d = 0.5 * ((3.0 + math.sqrt(8.0)) ** _TERMS + (3.0 + math.sqrt(8.0)) ** -_TERMS)
    b, c = -1.0, -d
    for k in range(_TERMS):
        c = b - c
        total = total + (c / d) * (_mills((k + 1) * std - a) - _mills((k + 1) * std + a))
        b = (k + _TERMS) * (k - _TERMS) * b / ((k + 0.5) * (k + 1))
    return total.log() - 0.5 * a.square() - 0.5 * math.log(2.0 * math.pi)


def _mills(x: Tensor) -> Tensor:
    ratio: Tensor = math.sqrt(0.5 * math.pi) * torch.special.erfcx(x / math.sqrt(2.0))
    return ratio
