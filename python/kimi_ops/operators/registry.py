# SPDX-License-Identifier: MIT
"""How an operator is built, and the way that a call of it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from kimi_ops import _native

library = torch.library.Library("kimi_ops", "DEF")

Function = Callable[..., Any]


class Operator:
    """``torch.ops.kimi_ops.<name>`` for CPU and CUDA tensors, to be called with its arguments.

    An eager call on plain tensors goes straight to the native function, with a gradient wanted by
    a `torch.autograd.Function`. Whatever watches (a compiler, a mode, a transform of torch.func, a
    subclass, another device) sees the operator, whose implementation is the same function.

    Parameters
    ----------
    schema : str
        As `torch.library.Library.define` takes it.
    fake : callable
        Empty outputs of the right shapes; arguments are checked in the native function.
    setup_context, backward : callable, optional
        As `torch.library.register_autograd` takes them. A functional operator without them refuses
        to be differentiated; all refuse a second derivative and forward mode.
    native : str
        The native function, where it has another name.
    otherwise : callable, optional
        Computes in torch what the native function has checked and leaves (NotImplemented).
    differentiable : bool
        False leaves autograd out (lists of tensors).
    """

    def __init__(
        self,
        schema: str,
        fake: Function,
        setup_context: Function | None = None,
        backward: Function | None = None,
        *,
        native: str = "",
        otherwise: Function | None = None,
        differentiable: bool = True,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.native, self.otherwise = native or self.name, otherwise
        self.op = define(self.name, schema, self.forward, fake)
        self.plain, self.function, self.transformed = self.op, None, None
        if not differentiable or "(a!)" in schema:
            return
        backward = backward or _refuse_derivative(self.name)
        torch.library.register_autograd(
            f"kimi_ops::{self.name}", backward, setup_context=setup_context, lib=library
        )
        self.function = _function(self.name, self.forward, setup_context, backward)
        self.transformed = _transformed(self.function, self.forward, setup_context)
        # Without autograd: what compilers see where no gradient can be asked for.
        twin = f"{self.name}_forward"
        self.plain = define(twin, twin + schema[len(self.name) :], self.forward, fake)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._dispatch(arguments)
        try:
            result = getattr(_native.engine.eager, self.native)(*arguments)
        except TypeError:
            alive = unwrap_dead_wrappers(arguments)  # of a transform that is over: a vjp's pullback
            if all(a is b for a, b in zip(alive, arguments, strict=True)):
                raise
            return self(*alive)
        return result if type(result) is not int else self._way(result, arguments)

    def forward(self, *arguments: Any) -> Any:
        """The implementation, on plain tensors."""
        result = getattr(_native.engine, self.native)(*arguments)
        return result if result is not NotImplemented else self.otherwise(*arguments)  # type: ignore[misc]

    def _way(self, way: int, arguments: tuple[Any, ...]) -> Any:
        """What eager mode does where the native function has not done it: framework.h's `Way`."""
        if way == _native.OTHERWISE:
            return self.otherwise(*arguments)  # type: ignore[misc]
        if way == _native.GRADIENT:
            return (self.function.apply if self.function else self.forward)(*arguments)
        if forward_ad._current_level >= 0:
            _refuse_duals(self.name, arguments)
        transform = torch._C._functorch.peek_interpreter_stack()
        if self.transformed and transform and transform.key() == TransformType.Grad:
            return self.transformed.apply(*arguments)
        return self._dispatch(arguments)

    def _dispatch(self, arguments: tuple[Any, ...]) -> Any:
        wanted = torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        )
        return self.op(*arguments) if wanted else self.plain(*arguments)


def define(name: str, schema: str, forward: Function, fake: Function) -> Any:
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, forward, key)
    op = getattr(torch.ops.kimi_ops, name).default

    def shapes(*arguments: Any) -> Any:
        _check_devices(name.removesuffix("_forward"), op, arguments)
        return fake(*arguments)

    torch.library.register_fake(f"kimi_ops::{name}", shapes, lib=library)
    return op


def _check_devices(name: str, op: Any, arguments: tuple[Any, ...]) -> None:
    named = zip(op._schema.arguments, arguments, strict=False)
    tensors = [(argument.name, value) for argument, value in named if isinstance(value, Tensor)]
    for given, value in tensors[1:]:
        like, first = tensors[0]
        if value.device != first.device:
            raise ValueError(
                f"{name}: {given}: expected on {first.device} as {like}, got {value.device}; "
                f"move it with .to({like}.device)"
            )


def _function(
    name: str, native: Function, setup_context: Function | None, gradient: Function
) -> type[torch.autograd.Function]:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = native(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradient(ctx, *gradients)

    Differentiable.__name__ = Differentiable.__qualname__ = name
    return Differentiable


def _transformed(
    function: type[torch.autograd.Function], native: Function, setup_context: Function | None
) -> type[torch.autograd.Function]:
    """`function` as torch.func wants it: each call of such a one costs some 50 us more."""

    class Transformed(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return native(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        vmap = staticmethod(refuse_batch(function.__name__))

    Transformed.__name__ = Transformed.__qualname__ = function.__name__
    return Transformed


def refuse_batch(name: str) -> Function:
    """The vmap rule of an `autograd.Function`: torch.vmap of a gradient."""

    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"{name}: expected one call in a gradient, got a batch of them by torch.vmap; take the "
            "gradient of the sum over the batch, or loop"
        )

    return refuse


def wanted(ctx: Any, index: int) -> bool:
    """Whether a backward has to give the gradient of input `index`, with tensors alone before it:
    it requires one, and `torch.autograd.grad` has not asked for those of other inputs only."""
    if not ctx.needs_input_grad[index] or torch.compiler.is_compiling():
        return bool(ctx.needs_input_grad[index])
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # of leaves that torch.autograd.grad asks for, torch does not tell
        return True


def _refuse_derivative(name: str) -> Function:
    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{name}: expected to be differentiated once at most, got a second derivative; "
            f"kimi_ops.reference is plain torch and has them all"
        )

    return refuse


def _refuse_duals(op: str, arguments: tuple[Any, ...]) -> None:
    """Without a forward-mode formula torch would carry a zero tangent on in silence."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: expected reverse-mode differentiation, got a forward-mode tangent; "
            "kimi_ops.reference is plain torch and has both"
        )
