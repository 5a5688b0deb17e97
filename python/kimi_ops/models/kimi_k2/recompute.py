# SPDX-License-Identifier: MIT
"""What a layer keeps for its backward, how it is stored, and what is computed a second time.

    none        what autograd keeps: every input of a product, a norm or an activation
    selective   norms, products that expand latents and SwiGLU are computed again from the inputs
                and results of other products and of attention, which are kept
    full        the layer's input is kept, the whole layer computed again

The routed experts keep x and gate_up in `none` and `selective` (SwiGLU and the down product never):
in FP8, in rows of 128 values with a scale, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kimi_ops import Fp8Rows
from kimi_ops.choices import Recompute

__all__ = ["RECOMPUTE", "Recomputes", "fp8_storage", "set_storage"]

RECOMPUTE = get_args(Recompute)
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_cheap = ContextVar("cheap", default=False)
_nothing = nullcontext()


@contextmanager
def _cheaply() -> Iterator[None]:
    token = _cheap.set(True)
    try:
        yield
    finally:
        _cheap.reset(token)


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = op in _ATTENTION or (op in _PRODUCTS and not _cheap.get())
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)


class Recomputes(nn.Module):
    """A module with parts that its backward may compute again."""

    _recompute, _fp8_activations = "none", False

    @property
    def recompute(self) -> str:
        """One of `RECOMPUTE`, of this module and all that are in it, which are told when it is
        set."""
        return self._recompute

    @recompute.setter
    def recompute(self, way: str) -> None:
        set_storage(self, way, self.fp8_activations)

    @property
    def fp8_activations(self) -> bool:
        """Whether experts in this module keep FP8, likewise."""
        return self._fp8_activations

    @fp8_activations.setter
    def fp8_activations(self, wanted: bool) -> None:
        set_storage(self, self.recompute, wanted)

    def cheap(self) -> AbstractContextManager[None]:
        """Products in the body are computed again rather than kept."""
        return _cheaply() if self.recompute == "selective" else _nothing

    def again(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs), which keeps its inputs and, if the module recomputes selectively, the
        results of products that are not `cheap`, and of attention."""
        if self.recompute != "selective" or not torch.is_grad_enabled():
            return function(*inputs)
        return _checkpointed(function, *inputs, context_fn=_selective)

    def whole(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """function(*inputs), which keeps its inputs alone where all is to be computed again."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            return function(*inputs)
        return _checkpointed(function, *inputs)


def _checkpointed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def set_storage(model: nn.Module, recompute: str, fp8_activations: bool) -> None:
    """Tell every part of a model, or raise a ValueError."""
    check_storage("KimiK2", recompute, fp8_activations)
    for module in model.modules():
        if isinstance(module, Recomputes):
            module._recompute, module._fp8_activations = recompute, fp8_activations


def check_storage(op: str, recompute: str, fp8_activations: bool) -> None:
    """Raise a ValueError for a way that is not known, or one that leaves nothing to store."""
    if recompute not in RECOMPUTE:
        raise ValueError(
            f"{op}: recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute}; choose one"
        )
    if fp8_activations and recompute == "full":
        raise ValueError(
            f"{op}: fp8_activations: expected off beside recompute full, got on: the experts keep "
            "nothing then; choose recompute selective"
        )


def fp8_storage(*widths: int) -> saved_tensors_hooks:
    """Rows [R, K], K among `widths`, that autograd keeps in the body are kept as `Fp8Rows`."""

    def pack(tensor: Tensor) -> Any:
        if tensor.dim() != 2 or tensor.shape[1] not in widths or not tensor.is_floating_point():
            return tensor
        return Fp8Rows.quantize(tensor.detach()), tensor.dtype

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].dequantize(kept[1])

    return saved_tensors_hooks(pack, unpack)
