# SPDX-License-Identifier: MIT
"""Buffers that keep their precision, and quantised weights as such buffers."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.choices import StoredForm
from kimi_ops.moe.quantized import Fp8BlockWeight, Int4GroupWeight, QuantizedWeight

__all__ = ["FORMS", "FixedBuffers", "StoredWeight"]

# form -> class, and the name of each of its tensors in a checkpoint, and so in a state dict
FORMS: dict[StoredForm, tuple[type[QuantizedWeight], dict[str, str]]] = {
    "fp8": (Fp8BlockWeight, {"data": "weight", "scale": "weight_scale_inv"}),
    "int4": (Int4GroupWeight, {"packed": "weight_packed", "scale": "weight_scale"}),
}


class FixedBuffers(nn.Module):
    """A module whose floating buffers keep their dtype when `.to(bfloat16)` casts its parameters.

    The router's bias moves by 1e-3 a step and the largest logits are compared with a threshold:
    bf16 would lose both. FP8 weights mean nothing without their scales.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {k: v for k, v in self._buffers.items() if v is not None and v.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != value.dtype:
                kept = torch.empty_like(after, dtype=value.dtype) if value.is_meta else value
                self._buffers[name] = kept.to(after.device)
        return self


class StoredWeight(FixedBuffers):
    """A quantised weight that moves with its module and is in its state dict.

    Its tensors are buffers: no optimizer sees them and no cast changes them.

    Parameters
    ----------
    weight : Fp8BlockWeight or Int4GroupWeight
        [E, N, K]; its tensors are taken as they are.

    Attributes
    ----------
    form : {"fp8", "int4"}
    value : Fp8BlockWeight or Int4GroupWeight
        For `grouped_gemm` and `fused_experts`; of the buffers where they are now.

    Raises
    ------
    TypeError
        No quantised weight.

    Notes
    -----
    The buffers are named as in a released checkpoint: ``weight`` and ``weight_scale_inv`` for FP8,
    ``weight_packed`` and ``weight_scale`` for INT4.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import Int4GroupWeight
    >>> from kimi_ops.nn import StoredWeight
    >>> layer = StoredWeight(Int4GroupWeight.quantize(torch.randn(2, 4, 32)))
    >>> sorted(layer.bfloat16().state_dict())
    ['weight_packed', 'weight_scale']
    >>> layer.to("meta").value
    Int4GroupWeight(shape=[2, 4, 32], device='meta')
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        forms = [form for form, (kind, _) in FORMS.items() if type(weight) is kind]
        if not forms:
            known = " or ".join(kind.__name__ for kind, _ in FORMS.values())
            raise TypeError(
                f"StoredWeight: weight: expected {known}, got {type(weight).__name__}; quantize "
                "makes one from a tensor"
            )
        self.form = forms[0]
        for part, tensor in weight.tensors().items():
            self.register_buffer(FORMS[self.form][1][part], tensor)

    @property
    def value(self) -> QuantizedWeight:
        kind, names = FORMS[self.form]
        return kind(**{part: getattr(self, name) for part, name in names.items()})

    def extra_repr(self) -> str:
        return f"{self.form}, shape={list(self.value.shape)}"


def stored_kind(op: str, form: StoredForm) -> type[QuantizedWeight]:
    """The class of a form, or a ValueError."""
    _check.choice(op, "form", form, tuple(FORMS))
    return FORMS[form][0]
