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
from typing import Literal, get_args

__all__ = ["GPT_OSS", "Activation", "ActivationName", "of", "situ", "swiglu", "ungated"]

ActivationName = Literal["silu", "gelu", "situ", "gelu_tanh", "relu2"]

# The numbers of the forms that have some, in the order of kimi_activation_numbers.
_NUMBERS = {
    "situ": ("gate_bound", "up_bound"),
    "swiglu": ("alpha", "shift", "gate_limit", "silu_limit", "up_limit"),
}
_SIGNED = ("alpha", "shift")  # others are above 0
_FINITE = ("gate_bound", *_SIGNED)  # of others infinity is none


@dataclass(frozen=True)
class Activation:
    """A name with its numbers; the functions of this module make them."""

    name: str
    numbers: tuple[float, ...] = ()
    gated: bool = True  # False: h = a(g), without an up projection

    def __post_init__(self) -> None:
        names = _NUMBERS.get(self.name, ())
        if len(self.numbers) != len(names):
            raise ValueError(
                f"Activation: numbers: expected {len(names)} of {self.name}, got "
                f"{len(self.numbers)}; kimi_ops.activations makes them"
            )
        for name, number in zip(names, self.numbers, strict=True):
            signed, finite = name in _SIGNED, name in _FINITE
            if math.isnan(number) or (finite and math.isinf(number)) or not (signed or number > 0):
                wanted = " and ".join(["above 0"] * (not signed) + ["finite"] * finite)
                raise ValueError(
                    f"{self.name}: {name}: expected {wanted}, got {number}; "
                    + ("pass a finite one" if finite else "None is no limit")
                )


def situ(gate_bound: float = 4.0, up_bound: float | None = 25.0) -> Activation:
    """``B tanh(g / B) sigmoid(g) * C tanh(u / C)``, bounded by B C: Kimi K3's SiTU-GLU.

    Parameters
    ----------
    gate_bound : float
        B, above 0 and finite.
    up_bound : float, optional
        C, above 0; None leaves u as it is.

    Raises
    ------
    ValueError
        Another bound.

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
        A clamp that is neither, a limit that is not above 0, an alpha or shift that is infinite.

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
    return _NAMED.get(activation) or Activation(activation)


def _limit(limit: float | None) -> float:
    return math.inf if limit is None else float(limit)


_NAMED = {name: Activation(name) for name in get_args(ActivationName) if name not in _NUMBERS}
_NAMED["situ"] = situ()
GPT_OSS = swiglu(7.0, alpha=1.702, shift=1.0)
