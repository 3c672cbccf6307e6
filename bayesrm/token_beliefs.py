"""What is believed about the rewards of the tokens of responses."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import ArgumentError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBelief:
    """A belief about the reward of each token of N responses, padded to the longest of T tokens.

    Given the draws, if there are any, tokens are independent with standard deviations `std`; without draws they are
    independent normal variables. The reward of a response is the sum over its tokens.

    Attributes:
        texts: The responses.
        spans: Where each token stands in its response, offsets of its first character and the one after its last, shape
            `(N, T, 2)`; a token without characters, such as the end of the sequence, has an empty span at the end.
        mean: Expected rewards, shape `(N, T)`, 0 at padding.
        std: Standard deviations, shape `(N, T)`, 0 at padding; with `draws` those around each draw.
        mask: True at tokens, the first ones of each row, shape `(N, T)`.
        draws: Expected rewards under S draws of what all tokens share (a network's weights), shape `(S, N, T)`.

    Raises:
        ArgumentError: Shapes disagree, a number is not finite, a standard deviation is negative, or a span lies outside
            its response.

    Example:
        >>> belief = TokenBelief(
        ...     texts=("so so",), spans=torch.tensor([[[0, 2], [2, 5]]]), mean=torch.tensor([[1.0, -2.0]]),
        ...     std=torch.tensor([[0.3, 0.4]]), mask=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> belief.sums()
        (tensor([-1.]), tensor([0.5000]))
    """

    texts: tuple[str, ...]
    spans: Int[Tensor, "responses tokens 2"]
    mean: Float[Tensor, "responses tokens"]
    std: Float[Tensor, "responses tokens"]
    mask: Bool[Tensor, "responses tokens"]
    draws: Float[Tensor, "draws responses tokens"] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.mean.shape)
        if len(self.texts) != shape[0]:
            raise ArgumentError(f"`texts` holds {len(self.texts)} responses, `mean` is about {shape[0]}")
        if tuple(self.std.shape) != shape or tuple(self.mask.shape) != shape or tuple(self.spans.shape) != (*shape, 2):
            raise ArgumentError(
                f"`mean`, `std`, `mask` and `spans` have shapes {shape}, {tuple(self.std.shape)}, "
                f"{tuple(self.mask.shape)} and {tuple(self.spans.shape)}; the last has one more axis, of 2"
            )
        if self.draws is not None and (tuple(self.draws.shape[1:]) != shape or len(self.draws) < 2):
            raise ArgumentError(f"`draws` has shape {tuple(self.draws.shape)}; it is (at least 2, *{shape})")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise ArgumentError("`mask` has gaps; the tokens of a response are the first ones of its row")
        for name in ("mean", "std", "draws"):
            value = getattr(self, name)
            if value is None:
                continue
            if not bool(torch.isfinite(value[..., self.mask]).all()):
                raise ArgumentError(f"`{name}` has entries that are not finite")
            object.__setattr__(self, name, torch.where(self.mask, value, 0.0))
        if bool((self.std < 0).any()):
            raise ArgumentError("`std` has negative entries")
        starts, stops = self.spans.unbind(-1)
        lengths = torch.tensor([len(text) for text in self.texts], dtype=torch.int64)[:, None].to(stops)
        outside = ((starts < 0) | (stops < starts) | (stops > lengths)) & self.mask
        if bool(outside.any()):
            row, token = (int(i) for i in torch.nonzero(outside)[0])
            raise ArgumentError(
                f"`spans` has {self.spans[row, token].tolist()} for token {token} of response {row}, which has "
                f"{len(self.texts[row])} characters"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence[int]) -> "TokenBelief":
        wanted = list(range(len(self)))[rows] if isinstance(rows, slice) else list(rows)
        if any(isinstance(row, bool | np.bool_) for row in wanted):
            raise ArgumentError(f"`rows` is {wanted}; give the numbers of responses, such as np.flatnonzero(mask)")
        longest = max((int(self.mask[row].sum()) for row in wanted), default=0)
        return TokenBelief(
            tuple(self.texts[row] for row in wanted), self.spans[wanted, :longest], self.mean[wanted, :longest],
            self.std[wanted, :longest], self.mask[wanted, :longest],
            None if self.draws is None else self.draws[:, wanted, :longest],
        )  # fmt: skip

    @property
    def total_std(self) -> Float[Tensor, "responses tokens"]:
        """Standard deviation of each token's reward, draws included, shape `(N, T)`."""
        if self.draws is None:
            return self.std
        return (self.std.square() + self.draws.var(0)).sqrt()

    def tokens(self, row: int) -> list[str]:
        """The texts of a response's tokens; those without characters are empty."""
        text, count = self.texts[row], int(self.mask[row].sum())
        return [text[start:stop] for start, stop in self.spans[row, :count].tolist()]

    def sums(self) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"]]:
        """Mean and standard deviation of the responses' rewards, each of shape `(N,)`."""
        variance = self.std.square().sum(1)
        if self.draws is not None:
            variance = variance + self.draws.sum(2).var(0)
        return self.mean.sum(1), variance.sqrt()

    def redistribute(self, totals: Float[Tensor, "responses"] | Sequence[float]) -> "TokenBelief":
        """The belief once the rewards of whole responses are known: how a total is shared out among its tokens.

        Conditions normal variables on their sum S: with c_t the covariance of a token's reward with S (its variance,
        and with draws what it has in common with the other tokens), `m_t + c_t / var S (total - E S)` and variance
        `v_t - c_t^2 / var S`. Where nothing is uncertain the surplus is shared equally. The sum of the means is the
        total. The tokens are then dependent, as their sum is certain; the belief has their standard deviations, not
        their correlation.

        Args:
            totals: Rewards of the responses, shape `(N,)`, for instance from a reward model of whole responses.

        Raises:
            ArgumentError: The totals are of another shape or not finite, or a response has no tokens.

        Example:
            >>> belief = TokenBelief(
            ...     texts=("so so",), spans=torch.tensor([[[0, 2], [2, 5]]]), mean=torch.tensor([[1.0, -2.0]]),
            ...     std=torch.tensor([[1.0, 2.0]]), mask=torch.ones(1, 2, dtype=torch.bool),
            ... )
            >>> belief.redistribute(torch.tensor([4.0])).mean
            tensor([[2., 2.]])
        """
        try:
            given = torch.as_tensor(totals, dtype=self.mean.dtype)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"`totals` is {totals!r}; give {len(self)} numbers, one for each response") from None
        if tuple(given.shape) != (len(self),):
            raise ArgumentError(
                f"`totals` has shape {tuple(given.shape)}; give {len(self)} numbers, one for each response"
            )
        if not bool(torch.isfinite(given).all()):
            row = int((~torch.isfinite(given)).nonzero()[0])
            raise ArgumentError(f"`totals` is {float(given[row])} for response {row}; give finite numbers")
        if not bool(self.mask.any(1).all()):
            raise ArgumentError(f"response {int((~self.mask.any(1)).nonzero()[0])} has no tokens to share its reward")
        shared = self.std.square()
        if self.draws is not None:
            around = self.draws - self.draws.mean(0)
            shared = shared + (around * around.sum(2, keepdim=True)).sum(0) / (len(around) - 1)
        whole = shared.sum(1, keepdim=True)
        equal = self.mask.to(self.mean) / self.mask.sum(1, keepdim=True)
        # Tokens may vary while their sum does not: what rounding leaves of its variance is none.
        least = 100 * torch.finfo(self.mean.dtype).eps * self.total_std.square().sum(1, keepdim=True)
        varies = whole > least * self.mask.sum(1, keepdim=True)
        share = torch.where(varies, shared / torch.where(varies, whole, 1.0), equal)
        surplus = (given.to(self.mean) - self.mean.sum(1))[:, None]
        # Rounding alone makes it negative.
        left = (self.total_std.square() - shared * share).clamp_min(0.0)
        return TokenBelief(self.texts, self.spans, self.mean + share * surplus, left.sqrt(), self.mask)

    def onto(self, spans: Int[Tensor, "responses others 2"], mask: Bool[Tensor, "responses others"]) -> "TokenBelief":
        """The same rewards on the tokens of another tokenizer, by the characters they share; sums are kept.

        A token's reward is spread evenly over its characters, and each new token collects those it covers; of two that
        cover the same ones, the later does. What no new token covers goes to the nearest one before it (to the first
        where there is none), what has no characters to the last.

        Args:
            spans: Spans of the other tokens, shape `(N, T', 2)`.
            mask: True at them, shape `(N, T')`; each response has at least one.

        Returns:
            A belief about T' tokens. New tokens that share an old one are dependent; the belief has their standard
            deviations, not their correlation.
        """
        if tuple(mask.shape) != tuple(spans.shape[:2]) or len(mask) != len(self) or not bool(mask.any(1).all()):
            raise ArgumentError(
                f"`spans` and `mask` have shapes {tuple(spans.shape)} and {tuple(mask.shape)}; they are "
                f"({len(self)}, T', 2) and ({len(self)}, T'), with at least one token in each response"
            )
        shares = torch.zeros(len(self), mask.shape[1], self.mask.shape[1], dtype=torch.float64)
        for row in range(len(self)):
            count, others = int(self.mask[row].sum()), int(mask[row].sum())
            shares[row, :others, :count] = torch.from_numpy(
                _shares(self.spans[row, :count].numpy(), spans[row, :others].numpy(), len(self.texts[row]))
            )
        to = shares.to(self.mean)
        draws = None if self.draws is None else torch.einsum("nut,snt->snu", to, self.draws)
        return TokenBelief(
            self.texts, spans, torch.einsum("nut,nt->nu", to, self.mean),
            torch.einsum("nut,nt->nu", to.square(), self.std.square()).sqrt(), mask, draws,
        )  # fmt: skip


def _shares(old: np.ndarray, new: np.ndarray, length: int) -> np.ndarray:
    """Share of each old token's reward that each new token takes, shape `(new, old)`; columns sum to 1."""
    owner = np.zeros(length, dtype=np.int64)
    for place, (start, stop) in enumerate(new):
        # Later tokens overwrite; characters between tokens stay with the one before.
        if stop > start:
            owner[start:] = place
    shares = np.zeros((len(new), len(old)))
    for place, (start, stop) in enumerate(old):
        if stop <= start:
            shares[-1, place] = 1.0
        else:
            shares[:, place] = np.bincount(owner[start:stop], minlength=len(new)) / (stop - start)
    return shares
