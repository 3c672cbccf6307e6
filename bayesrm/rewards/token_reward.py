"""Rewards of tokens from a language model: settings."""

import dataclasses
import enum
from typing import TYPE_CHECKING

from ._checks import check_choice, check_integer
from ._network_settings import NetworkSettings

if TYPE_CHECKING:
    from .token_reward_network import TokenRewardNetwork


class StateValues(enum.StrEnum):
    """Where the soft value V(s) = log sum_a exp Q(s, a) of a state comes from; Q(s, a) = log pi(a | s) + V(s)."""

    HEAD = "head"
    """A head on the hidden state, which starts at 0: the level of pretrained logits means nothing."""
    LOGITS = "logits"
    """The language model's own logits are the action values."""


@dataclasses.dataclass(frozen=True)
class TokenReward(NetworkSettings):
    """r(x, y) = sum over the tokens of y of a reward of each token, from a causal language model.

    The state is the prompt with the tokens so far, the action the next token. The model's distribution of the next
    token is the policy, its action values are Q(s, a) = log pi(a | s) + V(s), and a head on the hidden state behind a
    token gives mean and standard deviation of that token's reward. The end-of-sequence token of a response that ended
    is its last step. At the start all rewards are 0 with the prior's standard deviation.

    The object holds settings only; `load` makes the network. Texts become tokens as in `alignment.Policy`, so that a
    posterior's model is a policy too, see `TokenRewardNetwork.save_policy`.

    Attributes:
        model: Folder of a causal language model, or its id on the Hugging Face hub.
        rank: Rank of low-rank adapters; 0 trains the whole model.
        alpha: Adapters are multiplied by `alpha / rank`.
        dropout: Dropout on the input of the adapters while training.
        target_modules: Names (endings) of the modules that get adapters, or "all-linear"; by default what peft knows
            for the architecture.
        values: A `StateValues`.
        max_prompt_tokens: Most tokens of a prompt, whose start is cut.
        max_new_tokens: Most tokens of a response.
        on_long: `"shorten"` cuts the end of longer responses, `"raise"` refuses them.
        revision: Branch, tag or commit on the hub.
        gradient_checkpointing: Recompute activations in backward passes, for memory.
        attention: Implementation of attention (`"sdpa"`, `"eager"`, ...); by default the model's.
        device: Where the network lives; by default a GPU if there is one.
        dtype: Number format of the weights; heads are in float32 (or float64).
        trust_remote_code: Run code that comes with the model.

    Raises:
        ArgumentError: A setting has a value that cannot be used. Whether the model exists shows in `load`.

    Example:
        >>> TokenReward("any/model", rank=4).values
        'head'
    """

    model: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None
    values: str = "head"
    max_prompt_tokens: int = 384
    max_new_tokens: int = 256
    on_long: str = "shorten"
    revision: str | None = None
    gradient_checkpointing: bool = False
    attention: str | None = None
    device: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._check_network(least_rank=0)
        for name in ("max_prompt_tokens", "max_new_tokens"):
            check_integer(name, getattr(self, name), 1)
        check_choice("values", self.values, tuple(StateValues))

    def load(self, seed: int = 0) -> "TokenRewardNetwork":
        """The network at its initialisation.

        Args:
            seed: Seed of what is drawn at random in it: the A matrices of new adapters.

        Raises:
            ArgumentError: The model or its tokenizer cannot be loaded, or have no use here; the message says why.
        """
        from .token_reward_network import TokenRewardNetwork

        return TokenRewardNetwork(self, seed=seed)
