# SPDX-License-Identifier: MIT
"""MuonClip: Muon for matrices, AdamW for the rest, QK-Clip after the update, in one
``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kimi_ops.muon_groups import muon_param_groups
from kimi_ops.newton_schulz import Coefficients, newton_schulz, schedule
from kimi_ops.qk_clip import qk_clip_
from kimi_ops.reference.muon_clip import AdjustLr, adamw_, muon_, zeros_like_state

__all__ = ["MuonClip", "QKClip", "muon_param_groups"]

_ADJUST = (None, "original", "match_rms_adamw")
_ALGORITHMS = ("muon", "adamw")


@dataclass
class QKClip:
    """Which attention layers MuonClip clips, and the last maxima it saw.

    Each layer is an MLA module with ``q_b_proj`` (``q_proj`` where the query is not compressed),
    ``kv_b_proj``, the head dimensions and a buffer
    ``max_logits`` [heads] that its forward fills while ``track_max_logits`` is set, which this
    class does. After every step the buffers are back at -inf.

    Parameters
    ----------
    layers : sequence of nn.Module
        ``model.attention_layers()``.
    tau, alpha : float
        As in :func:`kimi_ops.qk_clip_`.

    Attributes
    ----------
    max_logits, gamma : Tensor [layers, heads] or None
        Of the last step, before the clip.
    """

    layers: Sequence[nn.Module]
    tau: float = 100.0
    alpha: float = 0.5
    max_logits: Tensor | None = field(default=None, init=False)
    gamma: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.layers = list(self.layers)
        if not self.layers:
            raise ValueError(
                "QKClip: layers: expected at least one attention layer, got none; "
                "give model.attention_layers()"
            )
        if not 0 < self.tau < float("inf"):
            raise ValueError(
                f"QKClip: tau: expected a positive finite number, got {self.tau}; Kimi K2 used 100"
            )
        for layer in self.layers:
            for name in (
                "q_proj" if hasattr(layer, "q_proj") else "q_b_proj",
                "kv_b_proj",
                "max_logits",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            ):
                if not hasattr(layer, name):
                    raise TypeError(
                        f"QKClip: layers: expected MLA attention modules, got a "
                        f"{type(layer).__name__} without {name}; give model.attention_layers()"
                    )
            layer.track_max_logits = True  # type: ignore[assignment]

    @torch.no_grad()
    def step(self) -> None:
        """Clip every layer by the maxima since the last step, remember them, and reset the
        buffers."""
        maxima, gammas = [], []
        for layer in self.layers:
            module: Any = layer
            query = module.q_proj if hasattr(module, "q_proj") else module.q_b_proj
            maxima.append(module.max_logits.clone())
            gammas.append(
                qk_clip_(
                    module.max_logits,
                    q_weight=query.weight,
                    k_weight=module.kv_b_proj.weight,
                    tau=self.tau,
                    alpha=self.alpha,
                    layout="mla",
                    qk_nope_head_dim=module.qk_nope_head_dim,
                    qk_rope_head_dim=module.qk_rope_head_dim,
                    v_head_dim=module.v_head_dim,
                )
            )
            module.max_logits.fill_(float("-inf"))
        self.max_logits, self.gamma = torch.stack(maxima), torch.stack(gammas)


class MuonClip(torch.optim.Optimizer):
    r"""The optimizer that trained Kimi K2.

    A group with ``algorithm="muon"`` (the default) takes
    :math:`B \leftarrow \mu B + (1-\mu) g`, :math:`u = (1-\mu) g + \mu B`,
    :math:`W \leftarrow W (1 - \eta\lambda) - \mathrm{adjust}(\eta)\, \mathrm{NS}(u)`: keys, state
    and numbers are those of ``torch.optim.Muon``, whose checkpoints load here. A group with
    ``algorithm="adamw"`` is ``torch.optim.AdamW``. Then QK-Clip rescales the heads whose logits
    passed tau.

    Muon does not see the scale of a gradient, so clipping gradients acts on AdamW groups only; do
    not clip the update.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) or of groups
        A Muon parameter is a matrix [rows, in] or a stack [..., rows, in] whose matrices are taken
        one by one.
        Group keys: all arguments below, ``algorithm``, and ``split_sizes``: row counts of matrices
        that a parameter fuses (for a gate-up stack [E, 2F, H]: ``(F, F)``).
        :func:`muon_param_groups` writes them for a model.
    lr, weight_decay : float
        Both algorithms; the decay is decoupled and multiplies the plain lr.
    momentum, nesterov, ns_coefficients, eps, ns_steps
        Muon; ``ns_coefficients`` is a triple, a list of triples or a name of
        :func:`kimi_ops.newton_schulz`. ``eps`` bounds the norm from below as torch does; 0 guards
        only exact zeros.
    adjust_lr_fn : None, "original", "match_rms_adamw" or callable(lr, (rows, in)) -> float
        ``match_rms_adamw`` is Moonlight's and Kimi K2's 0.2 sqrt(max(rows, in)).
    ns_method, ns_dtype, ns_restarts
        As `method`, `dtype`, `restarts` of :func:`kimi_ops.newton_schulz`. `ns_dtype` also by name,
        "bfloat16".
    maximize : bool
        Both algorithms.
    betas, adamw_eps
        AdamW. A group with ``algorithm="adamw"`` may write ``eps`` for ``adamw_eps``.
    qk_clip : QKClip, optional
        Applied after each update.

    Raises
    ------
    TypeError, ValueError
        For a parameter that Muon cannot take (fewer than two dimensions, complex) and for bad
        numbers, before anything changes. A sparse gradient raises TypeError in ``step``.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> bias = {"params": [layer.bias], "algorithm": "adamw"}
    >>> optimizer = MuonClip([{"params": [layer.weight]}, bias], lr=0.01)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()

    Notes
    -----
    arXiv 2507.20534 (Kimi K2), arXiv 2502.16982 (Moonlight).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr = None,
        *,
        ns_method: str = "auto",
        ns_dtype: torch.dtype | str | None = None,
        ns_restarts: str | Sequence[int] = "auto",
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        qk_clip: QKClip | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_method": ns_method,
            "ns_dtype": ns_dtype,
            "ns_restarts": ns_restarts,
            "maximize": maximize,
            "betas": betas,
            "adamw_eps": adamw_eps,
            "algorithm": "muon",
            "split_sizes": None,
        }
        if qk_clip is not None and not isinstance(qk_clip, QKClip):
            raise TypeError(
                f"MuonClip: qk_clip: expected a QKClip, got {type(qk_clip).__name__}; "
                "wrap the attention layers in one"
            )
        self.qk_clip = qk_clip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "qk_clip": self.qk_clip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = list(self.__dict__.get("param_groups", []))
        super().__setstate__(state)
        self.__dict__.setdefault("qk_clip", None)
        # a checkpoint of torch.optim.Muon or AdamW has only torch's keys: the others stay
        current += [self.defaults] * (len(self.param_groups) - len(current))
        for group, old in zip(self.param_groups, current, strict=True):
            algorithm = group.get("algorithm", old["algorithm"])
            if algorithm == "adamw" and "adamw_eps" not in group and "eps" in group:
                group["adamw_eps"] = group["eps"]
            for key in self.defaults:
                group.setdefault(key, old.get(key, self.defaults[key]))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it is checked as a whole first, and a refused group leaves the optimizer as
        it was."""
        adamw = isinstance(param_group, dict) and param_group.get("algorithm") == "adamw"
        if adamw and "eps" in param_group:  # torch.optim.AdamW's name; adamw_eps comes before it
            param_group = {"adamw_eps": param_group["eps"], **param_group}
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then clip. Returns the closure's value, if
        one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise TypeError(
                        "MuonClip: gradient: expected a dense one, got a sparse one; use "
                        "sparse=False"
                    )
        for group in self.param_groups:
            update = self._muon if group["algorithm"] == "muon" else self._adamw
            for param in group["params"]:
                if param.grad is not None:
                    update(group, param, -param.grad if group["maximize"] else param.grad)
        if self.qk_clip is not None:
            self.qk_clip.step()
        return loss

    def _muon(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_like_state(grad)
        dtype = group["ns_dtype"]

        def orthogonalize(matrices: Tensor) -> Tensor:
            return newton_schulz(
                matrices,
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                method=group["ns_method"],
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                restarts=group["ns_restarts"],
                eps=group["eps"],
            )

        muon_(
            param,
            grad,
            state["momentum_buffer"],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            adjust=group["adjust_lr_fn"],
            split_sizes=group["split_sizes"] or (param.shape[-2],),
            orthogonalize=orthogonalize,
        )

    def _adamw(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(
                0.0
            )  # on the host, as torch.optim.AdamW keeps it: reading it costs no sync
            state["exp_avg"] = zeros_like_state(param)
            state["exp_avg_sq"] = zeros_like_state(param)
        state["step"] += 1
        adamw_(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["adamw_eps"],
            weight_decay=group["weight_decay"],
        )

    def routing_summary(self) -> str:
        """One line for each group, then each parameter: who gets Muon, who gets AdamW.

        Examples
        --------
        >>> import torch
        >>> print(MuonClip([("w", torch.nn.Parameter(torch.ones(2, 3)))]).routing_summary())
        muon   1 tensors, 6 parameters
          w [2, 3]
        """
        lines = []
        for group in self.param_groups:
            params = group["params"]
            split = f", rows split {tuple(group['split_sizes'])}" if group["split_sizes"] else ""
            count = sum(p.numel() for p in params)
            lines.append(
                f"{group['algorithm']:<6} {len(params)} tensors, {count} parameters{split}"
            )
            names = group.get("param_names") or [f"#{i}" for i in range(len(params))]
            lines += [f"  {name} {list(p.shape)}" for name, p in zip(names, params, strict=True)]
        return "\n".join(lines)


def _check_group(group: dict[str, Any]) -> None:
    """Raise for a group that ``step`` could not serve."""
    for key in ("lr", "weight_decay", "momentum", "eps", "adamw_eps"):
        if not float(group[key]) >= 0:
            raise ValueError(f"MuonClip: {key}: expected a number >= 0, got {group[key]}; raise it")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(
            f"MuonClip: betas: expected two numbers in [0, 1), got {group['betas']}; "
            "AdamW's habit is (0.9, 0.95)"
        )
    if group["algorithm"] not in _ALGORITHMS:
        raise ValueError(
            f"MuonClip: algorithm: expected one of {_ALGORITHMS}, got {group['algorithm']!r}; "
            "choose one"
        )
    if group["algorithm"] == "adamw":
        return
    if not callable(group["adjust_lr_fn"]) and group["adjust_lr_fn"] not in _ADJUST:
        raise ValueError(
            f"MuonClip: adjust_lr_fn: expected one of {_ADJUST} or a callable, got "
            f"{group['adjust_lr_fn']!r}; choose one"
        )
    schedule(group["ns_coefficients"], group["ns_steps"])
    dtype = group["ns_dtype"]
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"MuonClip: ns_dtype: expected a torch dtype or its name, got {dtype!r}; "
            "give 'float32' or 'bfloat16'"
        )
    # a dry run on one element: options that no engine serves are refused here and not in the first
    # step
    newton_schulz(
        torch.zeros(1, 1),
        steps=group["ns_steps"],
        coefficients=group["ns_coefficients"],
        method=group["ns_method"],
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        restarts=group["ns_restarts"],
        eps=group["eps"],
    )
    names = group.get("param_names") or [f"#{i}" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        if not param.is_floating_point():
            raise TypeError(
                f"MuonClip: parameter {name}: expected a real floating-point tensor, got "
                f"{param.dtype}; convert it"
            )
        if param.ndim < 2:
            raise ValueError(
                f"MuonClip: parameter {name}: expected a matrix [..., rows, in], got shape "
                f"{tuple(param.shape)}; "
                'give it algorithm="adamw"'
            )
        if group["split_sizes"] and sum(group["split_sizes"]) != param.shape[-2]:
            raise ValueError(
                f"MuonClip: split_sizes: {tuple(group['split_sizes'])} must add up to the "
                f"{param.shape[-2]} rows of {name}"
            )
