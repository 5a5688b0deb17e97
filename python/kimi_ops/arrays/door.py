# SPDX-License-Identifier: MIT
"""What a framework of arrays brings: its calls of the kernels, and functions of numbers."""

import sys
from abc import ABC, abstractmethod
from typing import Any, NamedTuple


class Gate(NamedTuple):
    """weights [..., K] float32, indices [..., K] int32, tokens_per_expert [E] int32."""

    weights: Any
    indices: Any
    tokens_per_expert: Any


class DenseGate(NamedTuple):
    """probs [..., E] in the dtype of the logits, routing_map [..., E] bool, tokens_per_expert [E]
    int32."""

    probs: Any
    routing_map: Any
    tokens_per_expert: Any


class Counts(NamedTuple):
    """tokens_per_expert [N, E] and sequence_tokens [N] of sequences; both int32."""

    tokens_per_expert: Any
    sequence_tokens: Any


class Plan(NamedTuple):
    """row_map [T, K], source [R], offsets [E], tokens_per_expert [E]; all int32."""

    row_map: Any
    source: Any
    offsets: Any
    tokens_per_expert: Any


class Door(ABC):
    """A framework. Its arrays have ``astype``, its namespace the functions of NumPy."""

    @abstractmethod
    def run(self, op: str, *arguments: Any) -> Any:
        """The native function `op` (csrc/bindings), with its gradient where there is autograd."""

    @abstractmethod
    def array(self, x: Any) -> Any:
        """`x` as an array of the framework, or of another that has a namespace."""

    @abstractmethod
    def space(self, x: Any) -> Any:
        """The namespace of an array."""

    @abstractmethod
    def dtype(self, dtype: Any) -> Any:
        """A dtype, whoever's it is, or its name, as native functions take it."""

    @abstractmethod
    def sigmoid(self, x: Any) -> Any: ...

    @abstractmethod
    def softplus(self, x: Any) -> Any: ...

    @abstractmethod
    def erf(self, x: Any) -> Any: ...

    @abstractmethod
    def constant(self, x: Any) -> Any:
        """`x` without a gradient."""

    @abstractmethod
    def order(self, x: Any) -> Any:
        """The places of numbers [N] as they ascend; equal ones stay in their order."""

    autograd = False
    on_gpu = False  # whether arrays lie on one, where that matters for a choice

    def ids(self, x: Any) -> Any:
        """Ids as the kernels take them, int32; one beyond stays out of every range."""
        if name_of(x.dtype) != "int64":
            return x
        x = self.array(x)
        return self.space(x).clip(x, -(2**31), 2**31 - 1).astype("int32")

    def optional_ids(self, x: Any) -> Any:
        return None if x is None else self.ids(x)

    def as_weights(self, x: Any) -> Any:
        """Weights of pairs as the kernels take them, float32."""
        short = name_of(x.dtype) in ("bfloat16", "float16")
        return self.array(x).astype("float32") if short else x


def namespace(x: Any) -> Any:
    """The functions of an array's library, or None: those of CuPy had no name for long."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules.get("cupy") if type(x).__module__.startswith("cupy") else None


def name_of(dtype: Any) -> str:
    """The name of a dtype, whoever's it is."""
    if isinstance(dtype, str):
        return dtype
    named = getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    return named if isinstance(named, str) else str(dtype).removeprefix("torch.")
