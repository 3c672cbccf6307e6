"""A language model as reward function: low-rank adapters and a scalar head on frozen weights."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from ._checks import check_choice, check_integer
from ._network_settings import NetworkSettings

if TYPE_CHECKING:
    from .lora_network import LoRANetwork


@dataclasses.dataclass(frozen=True)
class LoRA(NetworkSettings):
    """r(x, y) = head(language model with low-rank adapters)(prompt and response in one sequence).

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2106.09685, through peft; any model that
    `transformers.AutoModelForSequenceClassification` loads: encoders, decoders, encoder-decoders. The prior is centred
    at the initialisation: adapters that change nothing, and a new head at zero, so that all rewards are zero there. A
    head that the checkpoint brings along is kept and centred where it is.

    The object holds settings only; `load` makes the network. Sequences are built as by `FeatureExtractor` (chat
    template for messages, special tokens once, the start of the prompt cut first); those of a model whose tokenizer
    ends none by itself are closed by the end-of-sequence token, where decoders read the reward, so that padding on
    either side gives the same reward.

    Attributes:
        model: Folder of a model, or its id on the Hugging Face hub.
        rank: Rank of the adapters.
        alpha: Adapters are multiplied by `alpha / rank`.
        dropout: Dropout on the input of the adapters while training.
        target_modules: Names (endings) of the modules that get adapters, or "all-linear"; by default what peft knows
            for the architecture (query and value projections for most).
        layers: Numbers of the transformer layers that get adapters, from 0; all by default. With the last few alone,
            ensembles and draws of the weights share the computation of those before.
        adapter: Folder of an adapter that peft has saved, from which to start: an already trained reward model. Its
            rank and targets replace the settings here. The prior is then centred at its A matrices, with B and new
            heads at 0.
        max_length: Most tokens of a sequence, special ones included; lowered to what the model can read.
        on_long: `"shorten"` cuts the start of the prompt, then the end of the response; `"raise"` refuses.
        revision: Branch, tag or commit on the hub.
        base_dropout: Keep the dropout that the model's configuration asks for while training.
        gradient_checkpointing: Recompute activations in backward passes, for memory.
        attention: Implementation of attention (`"sdpa"`, `"eager"`, ...); by default the model's.
        padding_side: Side on which shorter sequences are padded.
        device: Where the network lives; by default a GPU if there is one.
        dtype: Number format of the frozen weights; adapters, head and all curvature are in float32 (or float64).
        trust_remote_code: Run code that comes with the model.

    Raises:
        ArgumentError: A setting has a value that cannot be used. Whether the model exists shows in `load`.

    Example:
        >>> LoRA("any/model", rank=4).rank
        4
    """

    model: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    adapter: str | None = None
    max_length: int = 512
    on_long: str = "shorten"
    revision: str | None = None
    base_dropout: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None
    padding_side: str = "right"
    device: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._check_network(least_rank=1)
        check_integer("max_length", self.max_length, 1)
        check_choice("padding_side", self.padding_side, ("right", "left"))
        object.__setattr__(self, "layers", _checked_layers(self.layers, self.target_modules))

    def load(self, seed: int = 0) -> "LoRANetwork":
        """The network at its initialisation.

        Args:
            seed: Seed of what is drawn at random in it: the A matrices of new adapters.

        Raises:
            ArgumentError: The model, its tokenizer or the adapter cannot be loaded, or have no use here; the message
                says why.
        """
        from .lora_network import LoRANetwork

        return LoRANetwork(self, seed=seed)


def _checked_layers(layers: object, targets: object) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ArgumentError(f"`layers` is {layers!r}; give the numbers of layers, such as (4, 5), or None for all")
    for layer in layers:
        check_integer("layers", layer, 0)
    if isinstance(targets, str):
        raise ArgumentError(
            f"`layers` is {layers!r} and `target_modules` {targets!r}; layers can be chosen where `target_modules` "
            "is None or names modules, such as ('query', 'value')"
        )
    return tuple(layers)
