# SPDX-License-Identifier: MIT
"""The routed experts of a layer: their matrices stacked, as parameters or in a stored form."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kimi_ops.activations import of
from kimi_ops.choices import StoredForm
from kimi_ops.moe.fused_experts import fused_experts
from kimi_ops.moe.quantized import QuantizedWeight
from kimi_ops.moe.topk_gate import TopkGate
from kimi_ops.nn.checks import Activated, check_activation
from kimi_ops.nn.convert import stacked
from kimi_ops.nn.stored import StoredWeight, stored_kind
from kimi_ops.routing import PermutePlan

__all__ = ["Experts", "RoutedExperts", "StoredExperts"]


class RoutedExperts(nn.Module):
    """What `Experts` and `StoredExperts` share: two stacks, and the way of tokens through them."""

    gate_up_proj: Tensor | QuantizedWeight  # [E, 2F, H], gate rows before up rows
    down_proj: Tensor | QuantizedWeight  # [E, H, F]
    gate_up_proj_bias: nn.Parameter | None  # [E, 2F]
    down_proj_bias: nn.Parameter | None  # [E, H]

    def __init__(self, activation: Activated, recompute: bool) -> None:
        super().__init__()
        self.activation = check_activation(type(self).__name__, activation)
        self.recompute = recompute

    def _add_biases(self, experts: int, rows: int, hidden: int, **factory: Any) -> None:
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, rows, **factory))
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden, **factory))

    def forward(self, x: Tensor, gate: TopkGate, plan: PermutePlan | None = None) -> Tensor:
        """[T, H]: the weighted sum of the experts of x [T, H], as `kimi_ops.fused_experts`."""
        return fused_experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            gate.weights,
            gate.indices,
            b_gate_up=self.gate_up_proj_bias,
            b_down=self.down_proj_bias,
            activation=self.activation,
            recompute=self.recompute,
            plan=plan,
        )

    def extra_repr(self) -> str:
        experts, hidden, width = self.down_proj.shape
        return f"{experts}, {hidden}, {width}, activation={self.activation}"


class Experts(RoutedExperts):
    """The experts' matrices as two stacked parameters.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, H and F.
    bias : bool
        Biases of both products, drawn as 0.
    activation : {"silu", "gelu", "gelu_tanh", "relu2", "situ"} or Activation
        Of `kimi_ops.activations`.
    recompute : bool
        Compute the first product again in the backward instead of keeping it.
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    gate_up_proj : Parameter [E, 2F, H]
        The gate rows of an expert before its up rows; [E, F, H] for an activation without a gate.
    down_proj : Parameter [E, H, F]
    gate_up_proj_bias, down_proj_bias : Parameter [E, 2F] and [E, H], or None

    Raises
    ------
    ValueError
        Another activation.

    Examples
    --------
    >>> import torch
    >>> from kimi_ops import topk_gate
    >>> from kimi_ops.nn import Experts
    >>> experts = Experts(4, 8, 16)
    >>> experts(torch.randn(5, 8), topk_gate(torch.randn(5, 4), 2)).shape
    torch.Size([5, 8])
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: Activated = "silu",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, recompute)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = (1 + of(activation).gated) * intermediate_size
        down = (hidden_size, intermediate_size)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, rows, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, *down, **factory))
        self.gate_up_proj_bias = self.down_proj_bias = None
        if bias:
            self._add_biases(num_experts, rows, hidden_size, **factory)
        self.reset_parameters()

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[nn.Module] | nn.ModuleList,
        *,
        names: Sequence[str] | None = None,
        activation: Activated | None = None,
        recompute: bool = False,
    ) -> Self:
        """The experts of an `nn.ModuleList`, one gated MLP each, copied into stacks.

        Parameters
        ----------
        experts : ModuleList
            Modules of one class.
        names : sequence of str, optional
            Of the layers: (gate, up, down), or (gate and up in one, down). Where absent
            ``gate_proj, up_proj, down_proj``, ``w1, w3, w2`` and ``gate_up_proj, down_proj`` are
            looked for.
        activation : str or Activation, optional
            Where absent the one by name with which the first expert's class gives what ours does.
        recompute : bool
            As the class takes it.

        Returns
        -------
        Experts
            On the device and in the dtype of the first expert; trained where its weights are.

        Raises
        ------
        TypeError, ValueError
            Experts that are no gated MLPs, differ in shape, or whose class computes something
            else: a copy of the first, with weights drawn anew, is compared with ours.

        Examples
        --------
        >>> from torch import nn
        >>> from kimi_ops.nn import MLP, Experts
        >>> Experts.from_experts(nn.ModuleList(MLP(8, 16, activation="gelu") for _ in range(4)))
        Experts(4, 8, 16, activation=gelu)
        """
        found = stacked(experts, names, activation)
        result = cls(
            *found.down.shape, activation=found.activation, recompute=recompute, device="meta"
        )
        result.gate_up_proj = nn.Parameter(found.gate_up, found.trained)
        result.down_proj = nn.Parameter(found.down, found.trained)
        if found.gate_up_bias is not None and found.down_bias is not None:
            result.gate_up_proj_bias = nn.Parameter(found.gate_up_bias, found.trained)
            result.down_proj_bias = nn.Parameter(found.down_bias, found.trained)
        return result

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every matrix as `torch.nn.Linear` does; biases become 0."""
        for stack in (self.gate_up_proj, self.down_proj):
            if not stack.is_meta:
                bound = stack.shape[2] ** -0.5
                stack.uniform_(-bound, bound)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                bias.zero_()

    def stored(self, form: StoredForm) -> "StoredExperts":
        """These experts quantised, for inference: see `StoredExperts`.

        Parameters
        ----------
        form : {"fp8", "int4"}
        """
        kind = stored_kind("Experts.stored", form)
        result = StoredExperts(
            *self.down_proj.shape,
            form=form,
            activation=self.activation,
            device="meta",
        )
        result.gate_up = StoredWeight(kind.quantize(self.gate_up_proj))
        result.down = StoredWeight(kind.quantize(self.down_proj))
        result.gate_up_proj_bias, result.down_proj_bias = (
            self.gate_up_proj_bias,
            self.down_proj_bias,
        )
        return result.train(self.training)


class StoredExperts(RoutedExperts):
    """Experts that stay in a quantised form: read only, of half or a quarter of the bytes, served
    on the CPU.

    Gradients flow to the tokens and the router, never to the matrices: these are buffers
    (`StoredWeight`), which move with the module, are in its state dict and stay as they are under
    `.to(bfloat16)`.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, H and F.
    form : {"fp8", "int4"}
        `kimi_ops.Fp8BlockWeight` or `kimi_ops.Int4GroupWeight`.
    bias, activation
        As `Experts` takes them.
    dtype : optional
        Of the biases.
    device : optional
        The memory is not set: load a state dict, or take `Experts.stored`.

    Attributes
    ----------
    form : str
    gate_up_proj, down_proj : Fp8BlockWeight or Int4GroupWeight
        [E, 2F, H] with gate rows before up rows, and [E, H, F].

    Raises
    ------
    ValueError
        Another form or activation; sizes that the form does not hold.

    Examples
    --------
    >>> from kimi_ops.nn import Experts, StoredExperts
    >>> stored = Experts(4, 32, 64).stored("int4")
    >>> again = StoredExperts(4, 32, 64, form="int4")
    >>> again.load_state_dict(stored.state_dict())
    <All keys matched successfully>
    >>> sorted(again.state_dict())[:2]
    ['down.weight_packed', 'down.weight_scale']
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        form: StoredForm,
        bias: bool = False,
        activation: Activated = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, recompute=False)
        kind = stored_kind("StoredExperts", form)
        device = device or torch.get_default_device()
        rows = (1 + of(activation).gated) * intermediate_size
        gate_up = kind.empty(num_experts, rows, hidden_size, device=device)
        down = kind.empty(num_experts, hidden_size, intermediate_size, device=device)
        self.form = form
        self.gate_up, self.down = StoredWeight(gate_up), StoredWeight(down)
        self.gate_up_proj_bias = self.down_proj_bias = None
        if bias:
            self._add_biases(num_experts, rows, hidden_size, device=device, dtype=dtype)

    @property
    def gate_up_proj(self) -> QuantizedWeight:  # type: ignore[override]
        return self.gate_up.value

    @property
    def down_proj(self) -> QuantizedWeight:  # type: ignore[override]
        return self.down.value
