"""Per-sample derivatives of rewards in the adapter weights: one forward and one backward pass for a whole batch.

A reward depends on its own sequence alone, so that the backward pass of the *summed* rewards brings to the output of
every adapted module the derivative of each sequence's own reward. With the module's input this gives the derivative in
its weight, sum_t g_t x_t', before the sum over the sequences is taken. Goodfellow, "Efficient per-example gradient
computations", 1510.01799, applied to adapters.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float

from .._typing import Tensor
from ..errors import EngineError
from ._flat_weights import site_of
from .lora_network import LoRANetwork


class _Tap(torch.autograd.Function):
    """The identity on a module's output, which hands its gradient and the module's input to a function.

    The input is a saved tensor, so that gradient checkpointing drops and recomputes it like any other. `anchor` needs a
    gradient and so starts the graph here where nothing below does: no derivative of a weight is ever formed.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.sink(inputs, gradients[0])
        return gradients[0], None, None, None


def per_sample_jacobian(
    network: LoRANetwork, batch: Mapping[str, Tensor], *, sites: Sequence[str] | None = None, out: Tensor | None = None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n parameters"]]:
    """Rewards of a batch and their derivatives in the trainable parameters.

    Threads may share the network: it is held by `network.lock` meanwhile.

    Args:
        network: The network; its present weights count.
        batch: What `network.collate` returns, n sequences.
        sites: Parameter sites to differentiate in, in the order of `network.sites`; all by default. The backward pass
            ends at the lowest of them: that of the last layer costs next to nothing.
        out: Where to write the derivatives, shape `(n, P)`.

    Returns:
        Rewards, shape `(n,)`, and derivatives, shape `(n, P)`, both float32 (float64 for a network in float64), P being
        the size of the given sites.

    Raises:
        EngineError: A trainable parameter is in a module of another kind than `Linear`, `Conv1D` and `LayerNorm`.
    """
    chosen = list(network.sites) if sites is None else list(sites)
    parameters = [network.sites[site] for site in chosen]
    n = len(batch["input_ids"])
    if out is None:
        out = torch.empty(n, sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=network.device)
    out.zero_()
    anchor = torch.zeros((), device=network.device, requires_grad=True)
    starts, start = {}, 0
    for site, parameter in zip(chosen, parameters, strict=True):
        starts[site] = start
        start += parameter.numel()
    with contextlib.ExitStack() as stack:
        stack.enter_context(network.lock)
        stack.enter_context(_frozen(network))
        for module, names in _owners(network, chosen):
            write = _writer(
                module, {kind: (starts[site], network.sites[site].shape) for kind, site in names.items()}, out
            )
            handle = module.register_forward_hook(_hook(anchor, write, n))
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        rewards = network(**batch)
        rewards.sum().backward()
    return rewards.detach(), out


def _hook(anchor: Tensor, write: Callable[[Tensor, Tensor], None], n: int) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if inputs[0].shape[0] != n:
            raise EngineError(
                f"{type(module).__name__} sees {inputs[0].shape[0]} rows for {n} sequences: it mixes the tokens of "
                "different sequences, so that derivatives cannot be told apart; choose other `target_modules`"
            )
        tapped: Tensor = _Tap.apply(output, inputs[0].detach(), anchor, write)
        return tapped

    return hook


def _writer(
    module: torch.nn.Module, places: Mapping[str, tuple[int, torch.Size]], out: Tensor
) -> Callable[[Tensor, Tensor], None]:
    """A function of a module's input and its output's gradient that adds the derivatives to their columns of `out`."""

    def write(inputs: Tensor, gradient: Tensor) -> None:
        n = len(inputs)
        x = inputs.to(out.dtype).reshape(n, -1, inputs.shape[-1])
        g = gradient.to(out.dtype).reshape(n, -1, gradient.shape[-1])
        if "weight" in places:
            start, shape = places["weight"]
            block = out[:, start : start + shape.numel()].view(n, *shape)
            if isinstance(module, torch.nn.LayerNorm):
                unit = torch.nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
                block += (unit * g).sum(1)
            elif isinstance(module, torch.nn.Linear):
                block.baddbmm_(g.transpose(1, 2), x)
            else:
                block.baddbmm_(x.transpose(1, 2), g)
        if "bias" in places:
            start, shape = places["bias"]
            out[:, start : start + shape.numel()] += g.sum(1)

    return write


def _owners(network: LoRANetwork, sites: Sequence[str]) -> Iterator[tuple[torch.nn.Module, dict[str, str]]]:
    """Modules that own the given sites, each with the sites of its `weight` and `bias`."""
    from transformers.pytorch_utils import Conv1D

    wanted = set(sites)
    found: set[str] = set()
    for module_name, module in network.model.named_modules():
        names = {}
        for kind, parameter in module.named_parameters(recurse=False):
            site = site_of(f"{module_name}.{kind}")
            if site in wanted and parameter is network.sites[site]:
                names[kind] = site
        if names:
            if not isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | Conv1D) or set(names) - {"weight", "bias"}:
                raise EngineError(
                    f"the trainable parameters of {module_name!r} are in a {type(module).__name__}; derivatives are "
                    "known for Linear, Conv1D and LayerNorm. Choose other `target_modules`"
                )
            found.update(names.values())
            yield module, names
    if found != wanted:
        raise EngineError(f"no module was found for the parameter sites {sorted(wanted - found)}")


@contextlib.contextmanager
def _frozen(network: LoRANetwork) -> Iterator[None]:
    """Evaluation mode with no trainable weights, so that backward passes form activations' gradients alone."""
    training = network.training
    parameters = list(network.sites.values())
    needed = [parameter.requires_grad for parameter in parameters]
    network.eval()
    if network.settings.gradient_checkpointing and not network.settings.base_dropout:
        # transformers checkpoints in training mode alone; without dropout the two modes compute the same.
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, needed, strict=True):
            parameter.requires_grad_(flag)
        network.train(training)
