"""Priors over the parameters of a reward function."""

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping

from .errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent normal priors N(0, 1/precision) on the parameters of a reward function.

    For a reward function with its own starting point (LoRA adapters) the prior is centred there instead of at zero.

    Attributes:
        precision: Total prior precision (inverse variance) of every parameter; never per example. A mapping gives one
            precision for each parameter site, by the site's name without the prefix `reward.`, or by a shell pattern
            (`"*.lora_A"`); a name goes before patterns, and the first pattern that matches counts.

    Raises:
        ArgumentError: A precision is not a positive finite number.

    Example:
        >>> Gaussian(precision=2.0).of("weight")
        2.0
    """

    precision: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        values = self.precision.values() if isinstance(self.precision, Mapping) else [self.precision]
        for value in values:
            if not 0.0 < float(value) < float("inf"):
                raise ArgumentError(f"`precision` is {value}; a prior precision is a positive finite number")

    def of(self, site: str) -> float:
        """The prior precision of parameter site `site`."""
        if not isinstance(self.precision, Mapping):
            return float(self.precision)
        if site in self.precision:
            return float(self.precision[site])
        for pattern, value in self.precision.items():
            if fnmatch.fnmatchcase(site, pattern):
                return float(value)
        raise ArgumentError(f"`precision` names {sorted(self.precision)} but not the parameter site '{site}'")

    def check(self, sites: Collection[str]) -> None:
        """Raises `ArgumentError` unless every site has a precision and every name or pattern fits a site."""
        for site in sites:
            self.of(site)
        for pattern in self.precision if isinstance(self.precision, Mapping) else ():
            if not any(site == pattern or fnmatch.fnmatchcase(site, pattern) for site in sites):
                raise ArgumentError(
                    f"`precision` names {pattern!r}, which fits no parameter site; there are {', '.join(sorted(sites))}"
                )

    def scaled(self, factor: float) -> "Gaussian":
        """The same prior with every precision multiplied by `factor`."""
        if isinstance(self.precision, Mapping):
            return Gaussian({site: value * factor for site, value in self.precision.items()})
        return Gaussian(self.precision * factor)
