# SPDX-License-Identifier: MIT
"""The activations of `fused_experts`: names, and names with numbers.

| activation | h of gate g and up u |
|---|---|
| ``"silu"`` | ``silu(g) u``, SwiGLU |
| ``"gelu"`` | ``g Phi(g) u``, the exact GELU |
| ``"gelu_tanh"`` | ``0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) u`` |
| ``"relu2"`` | ``max(g, 0)^2 u`` |
| ``situ(B, C)``, ``"situ"`` | ``B tanh(g / B) sigmoid(g) C tanh(u / C)`` |
| ``swiglu(L, ...)`` | SwiGLU with limits, a steeper sigmoid, a shifted u |
| ``ungated(name)`` | ``a(g)`` alone: no up projection |
"""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["GPT_OSS", "Activation", "ActivationName", "of", "situ", "swiglu", "ungated"]

ActivationName = Literal["silu", "gelu", "situ", "gelu_tanh", "relu2"]


@dataclass(frozen=True)
class Activation:
    """A name with its numbers; the functions of this module make them."""

    name: str
    numbers: tuple[float, ...] = ()
    gated: bool = True  # False: h = a(g), without an up projection


def situ(gate_bound: float = 4.0, up_bound: float | None = 25.0) -> Activation:
    """``B tanh(g / B) sigmoid(g) * C tanh(u / C)``, bounded by B C: Kimi K3's SiTU-GLU.

    Parameters
    ----------
    gate_bound : float
        B, above 0 and finite.
    up_bound : float, optional
        C, above 0; None leaves u as it is.

    Examples
    --------
    >>> from kimi_ops.activations import situ
    >>> situ(4.0, None).numbers
    (4.0, inf)
    """
    return Activation("situ", (float(gate_bound), _limit(up_bound)))


def swiglu(
    limit: float | None = None,
    *,
    clamp: Literal["before", "after"] = "before",
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Activation:
    """``g sigmoid(alpha g) (u + shift)`` with limits on its factors.

    Parameters
    ----------
    limit : float, optional
        L: u is kept within -L .. L, and the gate below L. None: no limits.
    clamp : {"before", "after"}
        What of the gate is kept below L: g (DeepSeek-V4, gpt-oss), or ``g sigmoid(alpha g)``
        (Step-3.7).
    alpha, shift : float
        gpt-oss has 1.702 and 1: `GPT_OSS`.

    Raises
    ------
    ValueError
        A clamp that is neither.

    Examples
    --------
    >>> from kimi_ops.activations import GPT_OSS, swiglu
    >>> swiglu(7.0, alpha=1.702, shift=1.0) == GPT_OSS
    True
    """
    if clamp not in ("before", "after"):
        raise ValueError(f"swiglu: clamp: expected one of before, after, got {clamp!r}")
    most = _limit(limit)
    before, after = (most, math.inf) if clamp == "before" else (math.inf, most)
    return Activation("swiglu", (float(alpha), float(shift), before, after, most))


def ungated(activation: "ActivationName | Activation") -> Activation:
    """``h = a(g)``: experts with one matrix [E, F, H] in place of gate and up, as Nemotron-H's
    squared ReLU. The value is that of the gated form where its factor of u is 1.

    Examples
    --------
    >>> from kimi_ops.activations import ungated
    >>> ungated("relu2")
    Activation(name='relu2', numbers=(), gated=False)
    """
    gated = of(activation)
    return Activation(gated.name, gated.numbers, gated=False)


def of(activation: "str | Activation") -> Activation:
    """The activation of a name, or itself. Names are checked where they are used."""
    if isinstance(activation, Activation):
        return activation
    return _SITU if activation == "situ" else Activation(activation)


def _limit(limit: float | None) -> float:
    return math.inf if limit is None else float(limit)


_SITU = situ()
GPT_OSS = swiglu(7.0, alpha=1.702, shift=1.0)
