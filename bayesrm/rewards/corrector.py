"""A language model that rewrites a response into a better one: settings."""

import dataclasses
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from ._checks import check_integer
from ._network_settings import NetworkSettings

if TYPE_CHECKING:
    from .corrector_network import CorrectorNetwork

#: Words, so that a tokenizer that drops line breaks still tells the parts apart.
_TEMPLATE = "{prompt}\n\nResponse:\n{response}\n\nCorrected response:\n"


@dataclasses.dataclass(frozen=True)
class Corrector(NetworkSettings):
    """p(corrected response | prompt, response): what a sequence-to-sequence reward model is made of (2409.00162).

    A model of two parts (`transformers.AutoModelForSeq2SeqLM`: its encoder reads prompt and response, its decoder
    writes) or a decoder alone, which reads and goes on (`AutoModelForCausalLM`; an encoder such as BERT becomes one by
    seeing only the tokens before). The prior of its weights is centred at their initialisation: adapters that change
    nothing, or the model as it is on disk.

    The object holds settings only; `load` makes the network. Prompt and response are put into `template` (message lists
    after the tokenizer's chat template). The response's tokens, read and written, are those of its text alone, closed
    by the end-of-sequence token where they are written.

    Attributes:
        model: Folder of a model, or its id on the Hugging Face hub.
        rank: Rank of low-rank adapters (Hu et al., 2106.09685, through peft); 0 trains the whole model.
        alpha: Adapters are multiplied by `alpha / rank`.
        dropout: Dropout on the input of the adapters while training.
        target_modules: Names (endings) of the modules that get adapters, or "all-linear"; by default what peft knows
            for the architecture (query and value projections for most).
        adapter: Folder of an adapter that peft has saved, from which to start; its rank and targets replace the
            settings here. The prior is then centred at its A matrices, with B at 0.
        template: The text that is read; it holds `{prompt}` and, after it, `{response}`, once each.
        max_prompt_tokens: Most tokens of what stands before the response; lowered to what the model can read.
        max_response_tokens: Most tokens of a response, the end-of-sequence token included, where it is read and where
            it is written.
        on_long: `"shorten"` cuts the start of the prompt and the end of responses; `"raise"` refuses them.
        revision: Branch, tag or commit on the hub.
        base_dropout: Keep the dropout that the model's configuration asks for while training.
        gradient_checkpointing: Recompute activations in backward passes, for memory.
        attention: Implementation of attention (`"sdpa"`, `"eager"`, ...); by default the model's.
        device: Where the network lives; by default a GPU if there is one.
        dtype: Number format of the weights; adapters are in float32 (or float64).
        trust_remote_code: Run code that comes with the model.

    Raises:
        ArgumentError: A setting has a value that cannot be used. Whether the model exists shows in `load`.

    Example:
        >>> Corrector("any/model", rank=4, template="{prompt} [SEP] {response} [SEP]").rank
        4
    """

    model: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    adapter: str | None = None
    template: str = _TEMPLATE
    max_prompt_tokens: int = 512
    max_response_tokens: int = 256
    on_long: str = "shorten"
    revision: str | None = None
    base_dropout: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None
    device: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._check_network(least_rank=0)
        check_integer("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_integer("max_response_tokens", self.max_response_tokens, 2)
        if not isinstance(self.template, str):
            raise ArgumentError(f"`template` is {self.template!r}; it is a text")
        _ = self.template_parts
        if self.adapter is not None and self.rank == 0:
            raise ArgumentError("`rank` is 0 (the whole model is trained) and `adapter` is given; leave one out")

    @property
    def template_parts(self) -> tuple[str, str, str]:
        """The template's texts before the prompt, between it and the response, and after the response."""
        before, first, rest = self.template.partition("{prompt}")
        between, second, after = rest.partition("{response}")
        repeated = any(name in part for name in ("{prompt}", "{response}") for part in (before, between, after))
        if not (first and second) or repeated:
            raise ArgumentError(
                f"`template` is {self.template!r}; it must hold {{prompt}} and, after it, {{response}}, once each"
            )
        return before, between, after

    def load(self, seed: int = 0) -> "CorrectorNetwork":
        """The network at its initialisation.

        Args:
            seed: Seed of what is drawn at random in it: the A matrices of new adapters.

        Raises:
            ArgumentError: The model, its tokenizer or the adapter cannot be loaded, or have no use here; the message
                says why.
        """
        from .corrector_network import CorrectorNetwork

        return CorrectorNetwork(self, seed=seed)
