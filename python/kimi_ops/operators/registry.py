# SPDX-License-Identifier: MIT
"""The operator library ``torch.ops.kimi_ops`` and the definition of an operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("kimi_ops", "DEF")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Defines ``kimi_ops::<schema>`` for CPU and CUDA tensors and returns a callable.

    A functional op gets a twin ``<name>_forward`` without autograd, taken where no gradient can be
    asked for: that saves 5 us of autograd's Python a call. One without a `backward` refuses to be
    differentiated; so do all in forward mode.
    """
    name = schema[: schema.index("(")]
    op = define(schema, implementation, fake)
    if "(a!)" in schema:
        return op

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name}: expected to be differentiated once at most, got a second derivative; "
            f"kimi_ops.reference is plain torch and has them all"
        )

    torch.library.register_autograd(
        f"kimi_ops::{name}", backward or refuse, setup_context=setup_context, lib=library
    )
    plain = define(f"{name}_forward{schema[len(name) :]}", implementation, fake)

    def dispatch(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_duals(name, arguments)
        wanted = torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        )
        return op(*arguments) if wanted else plain(*arguments)

    return dispatch


def _refuse_duals(op: str, arguments: tuple[Any, ...]) -> None:
    """Without a forward-mode formula torch would carry a zero tangent on in silence."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: expected reverse-mode differentiation, got a forward-mode tangent; "
            "kimi_ops.reference is plain torch and has both"
        )


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``kimi_ops::<schema>`` for CPU and CUDA tensors, without autograd."""
    name = schema[: schema.index("(")]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    torch.library.register_fake(f"kimi_ops::{name}", fake, lib=library)
    return getattr(torch.ops.kimi_ops, name).default
