"""Shared annotations."""

from typing import Any, TypeAlias

import torch

#: A torch or a JAX array. JAX is optional, so the alias cannot name its type.
Array: TypeAlias = Any

Tensor: TypeAlias = torch.Tensor
