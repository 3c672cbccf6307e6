"""Gaussian-process rewards over features, through the dual form: a linear head on the training items."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._typing import Array, Tensor
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from ..errors import ArgumentError, DataError
from ._checks import as_member, check_item
from ._kernels import Kernel, covariance, median_distance, pivoted_root, variances
from .features import FeatureExtractor
from .heads import SelfFeaturedHead
from .tangent import TangentFeatures

#: The `lengthscale` that the marginal likelihood chooses.
TUNED = "marginal_likelihood"


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
    """r ~ GP(0, k / precision): rewards are alike where features are; see `Head` for the first attributes.

    Chu and Ghahramani, "Preference learning with Gaussian processes", ICML 2005. The prior precision of the program is
    1 / amplitude^2, so that `Laplace(prior_precision="marginal_likelihood")` tunes the amplitude. At a fit the process
    is restricted to the training items, which loses nothing: with K = L L' their covariance, rewards are L z, z ~
    N(0, I), a linear head that every engine serves (`KernelHead`); those of new items follow jointly.

    Work and memory grow with the square of the number of training items (the cube for the factor): some thousands.

    Attributes:
        kernel: A `Kernel`: `"rbf"`, `"matern52"` or `"linear"`.
        lengthscale: Distance of features, as standardised, over which rewards change. `None` takes the median distance
            between training items, `"marginal_likelihood"` the value with the largest evidence. Not for `"linear"`.

    Raises:
        ArgumentError: A setting is not one of those accepted.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.arange(5.0)[:, None], candidates=[[0, 2], [4, 2]], outcome=[1, 1])
        >>> model = brm.RewardModel(GaussianProcess(kernel="rbf"), brm.likelihoods.BradleyTerry())
        >>> belief = brm.fit(model, data).predict(candidates=[data.features])
        >>> belief.mean.argmax().item()
        2
    """

    features: FeatureExtractor | None = None
    standardize: bool = True
    kernel: str = "rbf"
    lengthscale: float | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", as_member(Kernel, "kernel", self.kernel).value)
        value = self.lengthscale
        if self.kernel == "linear" and value is not None:
            raise ArgumentError(f"`lengthscale` is {value!r}, and kernel='linear' has none; leave it out")
        if value in (None, TUNED):
            return
        if isinstance(value, bool | str) or value is None or not 0.0 < value < math.inf:
            raise ArgumentError(
                f"`lengthscale` is {value!r}; give a positive number, None (the median distance) or {TUNED!r}"
            )

    @property
    def is_linear(self) -> bool:
        """Always true, once it is restricted to the training items."""
        return True

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Unknown before there are training items.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "a Gaussian process has as many parameters as there are training items: `bayesrm.fit` restricts it to them "
            "before the engine starts; elsewhere, call its `bind`"
        )

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Unknown before there are training items.

        Raises:
            ArgumentError: Always.
        """
        self.parameter_shapes(features.shape[-1])

    def bind(
        self, features: Tensor, center: Tensor, spread: Tensor, *, lengthscale: float | None = None
    ) -> "KernelHead":
        """The process restricted to items.

        Args:
            features: Features of the items, shape `(n, D)`.
            center: Subtracted from features, shape `(D,)`; see `RewardModel.standardisation`.
            spread: Features are divided by it, shape `(D,)`.
            lengthscale: Instead of the declared one.

        Raises:
            ArgumentError: The lengthscale is to be tuned, which is the work of `bayesrm.fit`.
            DataError: The kernel is zero at every item: features without length for a linear kernel.
        """
        kernel = Kernel(self.kernel)
        if kernel is not Kernel.LINEAR and not self.standardize:
            # Distances stay; products of features far from the origin would lose digits.
            center = features.double().mean(0)
        x = (features.double() - center) / spread
        if lengthscale is None and isinstance(self.lengthscale, str):
            raise ArgumentError(
                f"`lengthscale` is {self.lengthscale!r}, which takes feedback; give a number or None here"
            )
        if lengthscale is None and not isinstance(self.lengthscale, str):
            lengthscale = self.lengthscale
        if lengthscale is None:
            lengthscale = 1.0 if kernel is Kernel.LINEAR else median_distance(x)
        root = pivoted_root(covariance(kernel, lengthscale, x, x))
        if not len(root.pivots):
            raise DataError(
                "every item has the same features or none, so that the process sees no difference between items"
            )
        return KernelHead(self, lengthscale, center, spread, x[root.pivots], root.factor, root.tolerance)


@dataclasses.dataclass(frozen=True, eq=False)
class KernelHead(SelfFeaturedHead):
    """A `GaussianProcess` restricted to items: r(x) = phi(x) . z + rest, phi(x) = L^-1 k(items, x), z ~ N(0, I).

    What z does not determine has the covariance k(x, x') - phi(x) . phi(x'), joint over the candidates of a prompt; it
    is nothing at the training items. `bayesrm.fit` makes one: `posterior.program.reward`.

    Attributes:
        process: The process as declared.
        lengthscale: The lengthscale that was used, in units of standardised features.
        center: Subtracted from features, shape `(D,)`.
        spread: Features are divided by it, shape `(D,)`.
        items: Standardised features of training items that determine all others, shape `(R, D)`.
        factor: Lower Cholesky factor of their covariance, shape `(R, R)`.
        tolerance: Variance that training items may have left, of a prior of unit precision.
        uncertain_rest: Whether the rest enters predictions.
    """

    process: GaussianProcess
    lengthscale: float
    center: Tensor
    spread: Tensor
    items: Tensor
    factor: Tensor
    tolerance: float
    uncertain_rest: bool = True

    @property
    def title(self) -> str:
        """Kernel and lengthscale."""
        kernel = self.process.kernel
        return (
            f"GaussianProcess({kernel})" if kernel == "linear" else f"GaussianProcess({kernel}, {self.lengthscale:.3g})"
        )

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """`{"weight": (R,)}`."""
        return {"weight": (num_features,)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Rewards, shape `(...,)`, of features phi of shape `(..., R)`."""
        return features @ parameters["weight"]

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> np.ndarray:
        """Coordinates of prompts and responses, shape `(items, R)`."""
        raw = self._extractor().extract(prompts, responses, progress=progress)
        values: np.ndarray = self.encode_features(torch.as_tensor(raw), None).values.numpy()
        return values

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> np.ndarray:
        """Coordinates of the items of comparisons, shape `(items, R)`."""
        values: np.ndarray = self.encode_features(self._raw(data, progress), None).values.numpy()
        return values

    def encode_items(self, data: Comparisons, *, progress: bool = False) -> TangentFeatures:
        """Coordinates of the items of comparisons, and what it leaves open."""
        prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
        order = torch.argsort(prompt, stable=True)
        sizes = torch.unique(prompt, return_counts=True)[1].tolist()
        found = self.encode_features(self._raw(data, progress)[order], sizes)
        back = torch.argsort(order)
        return TangentFeatures(found.values[back], None if found.outside is None else found.outside[back])

    def encode_texts(
        self, prompts: Sequence[Content], responses: Sequence[Content], sizes: Sequence[int], *, start: int = 0
    ) -> TangentFeatures:
        """Coordinates of prompts and responses, and what it leaves open; see `ProjectedHead`."""
        extractor = self._extractor()
        for item, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start):
            check_item(item, prompt, response)
        return self.encode_features(torch.as_tensor(extractor.extract(prompts, responses)), sizes)

    def encode_features(self, features: Tensor, sizes: Sequence[int] | None) -> TangentFeatures:
        """Coordinates of items with features `(n, D)`, and what it leaves open.

        Args:
            features: Features as the data have them.
            sizes: Number of items of each prompt in turn; `None` leaves out the rest.

        Raises:
            ArgumentError: The features have another width than those of the training items.
            DataError: A feature is not finite.
        """
        x = self._standardised(features)
        kernel = Kernel(self.process.kernel)
        products = covariance(kernel, self.lengthscale, self.items, x)
        phi = torch.linalg.solve_triangular(self.factor, products, upper=False).T.contiguous()
        if sizes is None or not self.uncertain_rest or not bool(self._open(x, phi).any()):
            return TangentFeatures(phi, None)
        outside = phi.new_zeros(len(x), max(sizes))
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            rest = covariance(kernel, self.lengthscale, x[part], x[part]) - phi[part] @ phi[part].T
            outside[part, :size] = _root(rest, self.tolerance)
            start += size
        return TangentFeatures(phi, outside)

    def left_open(self, data: Comparisons) -> Tensor:
        """Whether each item of comparisons has variance that the coordinates do not hold, shape `(items,)`."""
        raw = self._raw(data, False)
        return self._open(self._standardised(raw), self.encode_features(raw, None).values)

    def without_rest(self) -> "KernelHead":
        """The same head with no covariance outside its coordinates."""
        return dataclasses.replace(self, uncertain_rest=False)

    def to_config(self) -> dict[str, Any]:
        """Settings as JSON values; `state` has the tensors."""
        process = self.process
        extractor = None if process.features is None else process.features.to_config()
        declared = {"standardize": process.standardize, "kernel": process.kernel, "lengthscale": process.lengthscale}
        return {
            "type": "KernelHead",
            "process": declared,
            "features": extractor,
            "lengthscale": self.lengthscale,
            "tolerance": self.tolerance,
            "uncertain_rest": self.uncertain_rest,
        }

    def state(self) -> dict[str, Tensor]:
        """Tensors to save beside the settings."""
        return {"center": self.center, "spread": self.spread, "items": self.items, "factor": self.factor}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "KernelHead":
        """Makes the head that `to_config` and `state` described."""
        extractor = None if config["features"] is None else FeatureExtractor.from_config(config["features"])
        return cls(
            GaussianProcess(extractor, **config["process"]),
            config["lengthscale"],
            state["center"],
            state["spread"],
            state["items"],
            state["factor"],
            config["tolerance"],
            config["uncertain_rest"],
        )

    def _extractor(self) -> FeatureExtractor:
        if self.process.features is None:
            raise ArgumentError(
                "this posterior was fitted on precomputed features; give `candidates` as arrays of the same features"
            )
        return self.process.features

    def _raw(self, data: Comparisons, progress: bool) -> Tensor:
        if data.features is not None:
            return torch.as_tensor(np.asarray(data.features))
        if self.process.features is None:
            raise DataError(
                "the data carry no features and the Gaussian process has no feature extractor; "
                "use `data.with_features(array)`"
            )
        return torch.as_tensor(self.process.features.extract_items(data, progress=progress))

    def _open(self, x: Tensor, phi: Tensor) -> Tensor:
        # Within rounding of the factor an item is one of those that the coordinates determine.
        left: Tensor = variances(Kernel(self.process.kernel), x) - phi.square().sum(1) > 100.0 * self.tolerance
        return left

    def _standardised(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] != len(self.center):
            raise ArgumentError(
                f"features have shape {tuple(features.shape)}; the process was fitted on (items, {len(self.center)})"
            )
        bad = ~torch.isfinite(features).all(1)
        if bool(bad.any()):
            raise DataError(f"features of item {int(bad.nonzero()[0, 0])} are not finite")
        return (features.double() - self.center) / self.spread


def _root(rest: Tensor, tolerance: float) -> Tensor:
    """A root of a difference of covariances, in which eigenvalues below zero by rounding count as zero."""
    values, vectors = torch.linalg.eigh(rest)
    if float(values[0]) < -1e4 * tolerance:
        raise DataError(
            f"the covariance left at new items has eigenvalue {float(values[0]):.1e} < 0: their features are so far "
            "from those of the training items that the kernel loses its digits; standardise the features"
        )
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root
