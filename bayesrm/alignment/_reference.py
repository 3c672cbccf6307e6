"""Another model as the reference of a policy: the policy's architecture with other weights, its adapters off."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .._typing import Tensor
from ..errors import ArgumentError
from ..rewards._causal_lm import base_of_adapter, load_model, with_adapters, without_dropout
from ..rewards._encoder import Encoder
from ..rewards._tokens import TokenSequences
from ._weights import Snapshot, swapped

if TYPE_CHECKING:
    from .policy import Policy

#: What peft puts into the name of a weight that it wraps.
_WRAPPED = (".base_layer", ".original_module")


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceWeights:
    """Weights of a reference model, for a policy that cannot hold them as a `Snapshot` since it has adapters.

    Attributes:
        values: A tensor for each weight in which the reference differs from the model below the adapters, or that the
            policy trains there, by its name in the model without adapters. Empty where the reference is that model.
    """

    values: Mapping[str, Tensor]

    @contextlib.contextmanager
    def inside(self, model: Any) -> Iterator[None]:
        """Inside the block the model has these weights and no adapters."""
        parameters = _without_adapters(model)
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
        learnt = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            with off, swapped({name: parameters[name] for name in self.values}, Snapshot(self.values)):
                yield
        finally:
            # peft switches adapters on again by making all of their weights trainable.
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learnt[name])


def load_reference(
    policy: "Policy", path: str, *, dtype: str, attention: str | None, trust_remote_code: bool
) -> Snapshot | ReferenceWeights:
    """The weights of the model (or of the model with adapter) at `path` as a reference of the policy.

    Raises:
        ArgumentError: It cannot be loaded, or its vocabulary or architecture are others than the policy's.
    """
    base = base_of_adapter(path)
    source = Encoder(
        base or path, revision=None, pooling="last", layer=-1, device=None, dtype=dtype,
        trust_remote_code=trust_remote_code, watch_files=False,
    )  # fmt: skip
    try:
        tokenizer = source.tokenizer
        model, new = load_model(source, attention=attention, seed=0)
        if base is not None:
            model = with_adapters(model, None, path, 0).merge_and_unload()
    except ArgumentError as error:
        raise ArgumentError(f"`reference` {path!r} cannot be loaded: {error}") from error
    if new:
        raise ArgumentError(f"`reference` {path!r} has no language-model head, and a random one is no reference")
    without_dropout(model)
    return reference_weights(policy, model.eval(), tokenizer, name=f"`reference` {path!r}", keep=False)


def reference_weights(
    policy: "Policy", model: Any, tokenizer: Any, *, name: str, keep: bool = True
) -> Snapshot | ReferenceWeights:
    """The weights of another model as a reference of the policy.

    Args:
        policy: The policy.
        model: The reference.
        tokenizer: Its tokenizer.
        name: What messages call it.
        keep: The model will go on to be used, so that its weights must be copied.

    Raises:
        ArgumentError: Vocabulary or architecture are others than the policy's.
    """
    if hasattr(policy.model, "peft_config") and not hasattr(policy.model, "disable_adapter"):
        raise ArgumentError(
            f"{name} needs a policy whose adapters can be switched off; wrap its model by `peft.get_peft_model`, "
            "not by the model's own `add_adapter`"
        )
    _check_vocabulary(policy.tokenizer.get_vocab(), tokenizer.get_vocab(), name)
    plain = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    theirs, own = dict(plain.named_parameters()), _without_adapters(policy.model)
    missing = sorted(set(theirs) ^ set(own)) or [n for n, p in theirs.items() if p.shape != own[n].shape]
    if missing:
        raise ArgumentError(
            f"{name} is of another architecture than the policy: {missing[0]!r} is not in both, or has another shape "
            f"({len(missing)} weights differ); a reference has the policy's architecture"
        )
    values = {}
    for weight, parameter in own.items():
        value = theirs[weight].detach().to(parameter)
        if parameter.requires_grad or not torch.equal(value, parameter.detach()):
            values[weight] = value.clone() if keep and plain is model else value
    whole = not hasattr(policy.model, "disable_adapter") and values.keys() == policy.trainable.keys()
    reference = Snapshot(values) if whole else ReferenceWeights(values)
    _check_function(policy, reference, plain, name)
    return reference


def _without_adapters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights below the adapters of a model, by their names in the model without adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = set(getattr(model, "peft_config", ()))
    found = {}
    for name, parameter in base.named_parameters():
        # What belongs to an adapter stands under the adapter's name.
        if adapters.isdisjoint(name.split(".")):
            for part in _WRAPPED:
                name = name.replace(part, "")
            found[name] = parameter
    return found


def _check_vocabulary(own: Mapping[str, int], theirs: Mapping[str, int], name: str) -> None:
    different = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ArgumentError(
            f"{name} has another vocabulary than the policy: token {token!r} has number {theirs.get(token)} there and "
            f"{own.get(token)} here ({len(different)} tokens differ); a reference reads the policy's tokens"
        )


def _check_function(policy: "Policy", reference: Snapshot | ReferenceWeights, model: Any, name: str) -> None:
    """Settings that no weight shows (heads, positions, scales) must agree too."""
    count = policy.model.get_input_embeddings().weight.shape[0]
    tokens = tuple(token % count for token in range(6))
    sequence = TokenSequences((tokens[:3],), (tokens[3:],), (False,))
    ids = torch.tensor([tokens], device=policy.device)
    with torch.no_grad():
        with policy.using(reference):
            found = float(policy.log_probs(sequence)[0])
        training, home = model.training, next(model.parameters()).device
        try:
            logits = model.eval().to(policy.device)(input_ids=ids).logits[0, 2:-1].double()
        finally:
            model.to(home).train(training)
    own = float(logits.log_softmax(-1)[torch.arange(3), ids[0, 3:]].sum())
    half = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    allowed = 0.3 if half or torch.get_float32_matmul_precision() != "highest" else 3e-3
    if not abs(found - own) <= allowed:
        raise ArgumentError(
            f"{name} has the policy's weights by name and shape, and other settings: its own log-probability of a "
            f"short text is {own:.4f}, and {found:.4f} in the policy's architecture; give a model with the policy's "
            "config.json"
        )
