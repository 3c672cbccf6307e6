"""BoNBoN: likelihood of the best candidate, and its log-ratio to the worst (Gui et al., 2406.00832)."""

import dataclasses
import math

from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._pairs import best_and_worst
from ._projection import inside


@dataclasses.dataclass(frozen=True)
class BestAndWorst:
    """`- alpha log q(y_b) + (1 - alpha) (log q(y_b)/q(y_w) - log p0(y_b)/p0(y_w) - margin)^2`.

    y_b and y_w are the best and the worst of n candidates of the reference. Under the best-of-n distribution the
    expected log-ratio of the two is `margin = (n - 1) H_{n-1}`, with H the harmonic numbers: the paper's
    `1 / (2 beta*_n)`. The paper's equation, which the released code does not run as shipped.

    Attributes:
        n: Candidates of each prompt, of which the best and the worst count.
        alpha: Weight of the likelihood.

    Raises:
        ArgumentError: `n` is below 2 or `alpha` not between 0 and 1; or, when called, a prompt has not n candidates.

    Example:
        >>> round(1 / (2 * BestAndWorst(n=8).margin), 10)
        0.0275482094
    """

    n: int = 8
    alpha: float = 0.005

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 2:
            raise ArgumentError(f"`n` is {self.n!r}; it is a whole number of candidates, at least 2")
        if not 0.0 <= self.alpha <= 1.0 or math.isnan(self.alpha):
            raise ArgumentError(f"`alpha` is {self.alpha}; it lies between 0 and 1")

    @property
    def margin(self) -> float:
        """Expected log-ratio of best to worst under the best-of-n distribution, in nats."""
        return (self.n - 1) * math.fsum(1.0 / k for k in range(1, self.n))

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """Exactly n, of which the best and the worst count."""
        return self.n, self.n

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        counts = posterior.candidates.mask.sum(1)
        if bool((counts != self.n).any()):
            raise ArgumentError(f"`n` is {self.n}, and a prompt has {int(counts[counts != self.n][0])} candidates")
        best, worst = best_and_worst(posterior)
        log_q = inside(log_probs, posterior)
        tilt = log_q - inside(posterior.candidates.reference, posterior)

        def at(values: Tensor, places: Tensor) -> Tensor:
            return values.gather(1, places[:, None])[:, 0]

        squared = (at(tilt, best) - at(tilt, worst) - self.margin).square()
        return -self.alpha * at(log_q, best) + (1.0 - self.alpha) * squared
