"""A reward function on a language model, from settings that a command line can give."""

from ..errors import ArgumentError
from .features import FeatureExtractor
from .heads import Head
from .linear import Linear
from .lora import LoRA
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
    lora_rank: int | None = None,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    lora_targets: tuple[str, ...] | list[str] | None = None,
) -> Head | LoRA:
    """The reward function that the ready programs share: frozen features with a head, or a model with trained adapters.

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
        lora_rank: Train low-rank adapters of this rank and a scalar head on the encoder, which then reads prompt and
            response as one sequence; the settings of features and heads do not apply.
        lora_alpha: Adapters are multiplied by lora_alpha / lora_rank.
        lora_dropout: Dropout on the input of the adapters while training.
        lora_targets: Names of the modules that get adapters; None for the usual ones of the architecture.

    Returns:
        A `Linear`, an `MLP` or a `LoRA`.

    Raises:
        ArgumentError: A setting has a value that is not accepted.

    Example:
        >>> text_head(), text_head(hidden=(32,))  # doctest: +ELLIPSIS
        (Linear(features=None, standardize=False), MLP(features=None, standardize=False, hidden=(32,), ...))
    """
    if lora_rank is not None:
        given = {
            "inputs": tuple(inputs) != ("response", "product"),
            "pooling": pooling != "mean",
            "hidden": bool(hidden),
        }
        given |= {"normalize": not normalize, "activation": activation != "tanh", "standardize": standardize}
        if strange := [name for name, changed in given.items() if changed]:
            raise ArgumentError(f"`{strange[0]}` is a setting of frozen features; leave it out with `lora_rank`")
        if encoder is None:
            raise ArgumentError(
                "`lora_rank` needs an `encoder`: the folder or hub id of the model that gets the adapters"
            )
        return LoRA(
            encoder, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, max_length=max_length, on_long=on_long,
            target_modules=None if lora_targets is None else tuple(lora_targets),
        )  # fmt: skip
    features = None
    if encoder is not None:
        features = FeatureExtractor(
            encoder, inputs=inputs, pooling=pooling, max_length=max_length, normalize=normalize, on_long=on_long
        )
    if not hidden:
        return Linear(features, standardize)
    return MLP(features, standardize, tuple(hidden), activation)
