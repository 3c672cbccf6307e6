"""Rewards of one batch under many weights of a network; what the weights have in common is computed once.

Two savings, both without knowledge of the architecture, and both compared with the full forward pass on the first batch
they see:

- Layers before the first one whose weights vary give the same hidden states under all weights: they run under the first
  and hand out what they returned under the others. So do the modules of that first one that see nothing else yet, such
  as the frozen maps to queries, keys and values.
- The reward is read at one token. In the last layer, linear maps whose other outputs do not reach the reward (all but
  keys and values, usually) run at that token alone; which those are is found by filling the others with NaN.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._typing import Tensor
from ..rewards import LoRANetwork

_LOG = logging.getLogger("bayesrm")
#: Rewards with and without the savings may differ by this share of their scale: rounding in float32.
_TOLERANCE = 1e-4


@contextlib.contextmanager
def swapped_weights(network: LoRANetwork) -> Iterator[Callable[[Tensor], None]]:
    """A function that puts a vector of shape `(P,)` into the trainable weights, which are as before at the end.

    Other threads wait for the network until then.
    """
    weights = list(network.sites.values())
    sizes = [p.numel() for p in weights]
    with network.lock:
        kept = [p.data for p in weights]
        # Views of the vector would save a copy, but rounding depends on how memory is aligned.
        places = [torch.empty_like(data) for data in kept]

        def put(theta: Tensor) -> None:
            for p, place, part in zip(weights, places, theta.split(sizes), strict=True):
                p.data = place.copy_(part.view(p.shape))

        try:
            yield put
        finally:
            for p, data in zip(weights, kept, strict=True):
                p.data = data


class MemberForward:
    """Rewards of collated batches under each of S weights of one network.

    Layers are shared where the transformer has one list of layers that run once each in turn, as those of BERT, GPT-2
    and Llama do. Otherwise, as for encoder-decoders, or where the savings change a reward, every member runs the whole
    network; the log says so.

    Args:
        network: The network; its own weights come back after each call, and threads wait for one another.
        draws: The weights, shape `(S, P)`.
    """

    def __init__(self, network: LoRANetwork, draws: Tensor) -> None:
        self._network, self._draws = network, draws
        layers = _layer_list(network)
        varying = _varying(network, draws)
        count = 0 if layers is None else _first_varying(varying, layers)
        self._shared = [] if layers is None else layers[:count]
        #: Modules of the first layer that varies which may be shared too.
        self._frozen = [] if layers is None else _frozen_modules(varying, layers[count : count + 1])
        self._last: torch.nn.Module | None = None if layers is None else layers[-1]
        self._reading: _Reading | None = None
        self._checked = False

    @property
    def num_shared_layers(self) -> int:
        """Layers that run once for all members."""
        return len(self._shared)

    @property
    def read_modules(self) -> tuple[torch.nn.Module, ...]:
        """Linear maps that run at one token of each sequence; known after the first batch."""
        return () if self._reading is None else tuple(self._reading.modules)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Rewards of a batch, shape `(n, S)`."""
        with torch.no_grad(), swapped_weights(self._network) as put:
            # While training, a network may run a batch in parts.
            self._network.eval()
            if not self._checked:
                self._check(batch, put)
            return self._run(batch, put, self._draws)

    def _run(self, batch: Mapping[str, Tensor], put: Callable[[Tensor], None], draws: Tensor) -> Tensor:
        columns = []
        with contextlib.ExitStack() as stack:
            if self._reading is not None:
                stack.enter_context(self._reading.of(batch))
            shared = _Replay(self._shared, self._frozen) if self._shared and len(draws) > 1 else None
            for number, theta in enumerate(draws):
                put(theta)
                if shared is not None and number == 0:
                    with shared.recording():
                        columns.append(self._network(**batch))
                    stack.enter_context(shared.replaying())
                    continue
                columns.append(self._network(**batch))
        return torch.stack(columns, dim=1)

    def _check(self, batch: Mapping[str, Tensor], put: Callable[[Tensor], None]) -> None:
        """Tries the savings on the longest and the shortest sequence of a batch; keeps those that change nothing."""
        self._checked = True
        lengths = batch["attention_mask"].sum(1)
        rows = torch.stack([lengths.argmax(), lengths.argmin()])
        few = {name: value[rows] for name, value in batch.items()}
        ends = self._draws[[0, -1]]
        full = []
        for theta in ends:
            put(theta)
            full.append(self._network(**few))
        expected = torch.stack(full, dim=1)
        if self._shared and not _same(self._run(few, put, ends), expected):
            _LOG.info("layers are not shared between members: that would change rewards of this network")
            self._shared = []
        if self._last is None:
            _LOG.info("every member runs the whole network: it has no single list of layers")
            return
        put(ends[-1])
        self._reading = _Reading.found(self._network, self._last, few, expected[:, -1])
        if self._reading is not None and not _same(self._run(few, put, ends), expected):
            self._reading = None
        if self._reading is None:
            _LOG.info("the last layer runs at every token: running it where rewards are read would change them")


class _Replay:
    """What layers and modules after them return under one member, to be returned under the others.

    Args:
        layers: Layers that give the same hidden states under all members. The last one's output is kept, and returned
            by all: what those before return goes no further.
        modules: Modules with the same weights under all members. The output is kept of those that see nothing but the
            hidden states, or what another one has made of them.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], modules: Sequence[torch.nn.Module]) -> None:
        self._layers, self._modules = layers, modules
        self._outputs: dict[torch.nn.Module, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        known: list[Tensor] = []

        def keep(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module is self._layers[-1] or (len(inputs) == 1 and any(inputs[0] is tensor for tensor in known)):
                self._outputs[module] = output
                known.append(output[0] if isinstance(output, tuple) else output)

        with contextlib.ExitStack() as stack:
            for module in (self._layers[-1], *self._modules):
                stack.callback(module.register_forward_hook(keep).remove)
            yield

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        last = self._outputs[self._layers[-1]]
        with contextlib.ExitStack() as stack:
            for module, output in (self._outputs | dict.fromkeys(self._layers, last)).items():
                stack.enter_context(_replaced_forward(module, _returning(output)))
            yield


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


class _Reading:
    """Where the reward is read, and the linear maps of the last layer that count there alone.

    Attributes:
        at_end: Whether it is read at the last token that is not padding, or at the first.
        modules: The linear maps.
    """

    def __init__(self, at_end: bool, modules: Sequence[torch.nn.Module]) -> None:
        self.at_end, self.modules = at_end, modules

    @classmethod
    def found(
        cls, network: LoRANetwork, layer: torch.nn.Module, batch: Mapping[str, Tensor], expected: Tensor
    ) -> "_Reading | None":
        """The reading of a network, whose rewards of the batch are `expected`; `None` where nothing can be saved."""
        for at_end in (False, True):
            modules = []
            for module in _linear_maps(layer):
                with cls(at_end, [module]).of(batch, fill=float("nan")):
                    if _same(network(**batch), expected):
                        modules.append(module)
            if modules:
                return cls(at_end, modules)
        return None

    @contextlib.contextmanager
    def of(self, batch: Mapping[str, Tensor], *, fill: float = 0.0) -> Iterator[None]:
        """Inside the block the maps run at the tokens of this batch that are read, and return `fill` at others."""
        mask = batch["attention_mask"]
        rows = torch.arange(len(mask), device=mask.device)
        tokens = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        tokens = tokens if self.at_end else torch.zeros_like(tokens)
        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(_replaced_forward(module, _at_tokens(module.forward, mask, rows, tokens, fill)))
            yield


def _at_tokens(
    forward: Callable[..., Tensor], mask: Tensor, rows: Tensor, tokens: Tensor, fill: float
) -> Callable[..., Tensor]:
    def apply(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != mask.shape:
            return forward(hidden)
        part = forward(hidden[rows, tokens])
        whole = part.new_full((*mask.shape, part.shape[-1]), fill)
        whole[rows, tokens] = part
        return whole

    return apply


@contextlib.contextmanager
def _replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another `forward`; what was set on the instance before comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _linear_maps(layer: torch.nn.Module) -> list[torch.nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return [m for m in layer.modules() if isinstance(m, torch.nn.Linear | Conv1D) and not list(m.children())]


def _layer_list(network: LoRANetwork) -> list[torch.nn.Module] | None:
    """The transformer's layers, in the order of their calls; `None` where there is not exactly one list of them."""
    depth = getattr(network.model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        list(module) for name, module in network.model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and len({type(m) for m in module}) == 1
    ]  # fmt: skip
    return lists[0] if len(lists) == 1 else None


def _varying(network: LoRANetwork, draws: Tensor) -> set[int]:
    """Identities of the parameters that differ between draws."""
    weights = list(network.sites.values())
    differs = (draws != draws[0]).any(0).split([p.numel() for p in weights])
    return {id(p) for p, d in zip(weights, differs, strict=True) if bool(d.any())}


def _first_varying(varying: set[int], layers: Sequence[torch.nn.Module]) -> int:
    """Number of layers before the first one whose weights differ between draws."""
    return next((i for i, m in enumerate(layers) if any(id(p) in varying for p in m.parameters())), len(layers))


def _frozen_modules(varying: set[int], layers: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Innermost modules with weights that do not differ between draws."""
    inner = [m for layer in layers for m in layer.modules() if not list(m.children()) and list(m.parameters())]
    return [m for m in inner if not any(id(p) in varying for p in m.parameters())]


def _same(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) + 1e-6
    # Written so that NaN is different.
    return bool(((found - expected).abs() <= _TOLERANCE * scale).all())
