"""A head on the features of a language model, from settings that a command line can give."""

from .features import FeatureExtractor
from .heads import Head
from .linear import Linear
from .mlp import MLP


def text_head(
    *,
    encoder: str | None = None,
    inputs: tuple[str, ...] = ("response", "product"),
    pooling: str = "mean",
    max_length: int = 512,
    normalize: bool = True,
    on_long: str = "shorten",
    hidden: tuple[int, ...] | list[int] = (),
    activation: str = "tanh",
    standardize: bool = False,
) -> Head:
    """The reward function that the ready programs share: frozen features, then a linear head or a perceptron.

    Args:
        encoder: Folder of a language model, or its id on the Hugging Face hub, that turns texts into features. None if
            the data carry features.
        inputs: What the features describe: any of joint, response, product, prompt, length.
        pooling: How the tokens of a text become one vector: mean, cls, last (for decoders) or max.
        max_length: Most tokens of a text.
        normalize: Scale every block of features to entries of order one.
        on_long: What to do with a longer text: shorten or raise.
        hidden: Width of each hidden layer; none for a linear head.
        activation: Nonlinearity of the hidden layers: tanh, relu or gelu.
        standardize: Centre features and scale them to unit variance over the training items.

    Returns:
        A `Linear` or an `MLP`.

    Raises:
        ArgumentError: A setting has a value that is not accepted.

    Example:
        >>> text_head(), text_head(hidden=(32,))  # doctest: +ELLIPSIS
        (Linear(features=None, standardize=False), MLP(features=None, standardize=False, hidden=(32,), ...))
    """
    features = None
    if encoder is not None:
        features = FeatureExtractor(
            encoder, inputs=inputs, pooling=pooling, max_length=max_length, normalize=normalize, on_long=on_long
        )
    if not hidden:
        return Linear(features, standardize)
    return MLP(features, standardize, tuple(hidden), activation)
