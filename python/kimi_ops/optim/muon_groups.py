# SPDX-License-Identifier: MIT
"""Which parameters of a model Muon takes, and which go to AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kimi_ops.optim.learning_rate import AdjustLr

_Cut = tuple[int | None, int, tuple[int, ...] | None]  # num_heads, head_dim, split_sizes
_WHOLE: _Cut = (None, 0, None)


def muon_param_groups(
    model: nn.Module,
    *,
    adamw_modules: Sequence[str] = ("embed_tokens", "lm_head", "gate"),
    adjust_lr_fn: AdjustLr = "match_rms_adamw",
    per_head: bool = False,
    strict: bool = True,
    adamw: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The parameters of `model` as groups for :class:`MuonClip`, with their names.

    Muon takes the weights of ``nn.Linear`` modules and 3-D expert stacks, where ``gate_up_proj``
    [E, 2F, H] counts as two matrices an expert. AdamW takes all vectors (norms, biases) and the
    modules named in `adamw_modules`: embeddings and the head, because their rows are tokens that a
    batch may not touch and not the two sides of a linear map of activations; and the router,
    because each row scores one expert on its own, and an orthogonal update moves the rows of idle
    experts as much as those of busy ones. Parameters without requires_grad are left out.

    Parameters
    ----------
    model : nn.Module
        Any module; tied parameters appear once.
    adamw_modules : sequence of str
        Last component of the module's name.
    adjust_lr_fn
        Of the Muon groups; the default lets both algorithms share one lr and one weight decay.
    per_head : bool
        Orthogonalise each head of latent attention on its own: rows of ``q_b_proj`` (``q_proj``),
        key rows and value rows of ``kv_b_proj``, columns of ``o_proj``. An eighth of the operations
        for Kimi K2's ``q_b_proj``; a head with a large gradient no longer sets the scale of others.
    strict : bool
        A matrix that is neither of these raises; with False it goes to AdamW.
    adamw : dict, optional
        Extra keys of the AdamW group, such as ``lr``.

    Returns
    -------
    list of dict
        Muon matrices, one group for each way to cut them, AdamW. Empty ones are left out.

    Raises
    ------
    ValueError
        Strict, and a matrix whose role is not known; or no parameter at all.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> [(g["algorithm"], [name for name, _ in g["params"]]) for g in muon_param_groups(model)]
    [('muon', ['0.weight']), ('adamw', ['0.bias', '1.weight', '1.bias'])]
    """
    muon: dict[_Cut, list[tuple[str, Tensor]]] = {_WHOLE: []}
    rest: list[tuple[str, Tensor]] = []
    unknown: list[str] = []
    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        outer, _, module = owner.rpartition(".")
        linear = leaf == "weight" and isinstance(modules[owner], nn.Linear)
        stack = param.ndim == 3 and leaf in ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
        if param.ndim < 2 or module in adamw_modules or isinstance(modules[owner], nn.Embedding):
            rest.append((name, param))
        elif linear or stack:
            cut = _head_cut(modules[outer], module) if linear and per_head else _WHOLE
            if leaf == "gate_up_proj":
                cut = (None, 0, (param.shape[-2] // 2,) * 2)
            muon.setdefault(cut, []).append((name, param))
        else:
            unknown.append(name)
            rest.append((name, param))
    if strict and unknown:
        raise ValueError(
            f"muon_param_groups: model: Muon or AdamW is not known for {', '.join(unknown)}; "
            f"name their modules in "
            "adamw_modules, build the groups by hand, or pass strict=False for AdamW"
        )
    groups = []
    for cut, params in muon.items():
        group = {"params": params, "algorithm": "muon", "adjust_lr_fn": adjust_lr_fn}
        keys = zip(("num_heads", "head_dim", "split_sizes"), cut, strict=True)
        groups.append({**group, **{key: value for key, value in keys if cut != _WHOLE}})
    groups.append({"params": rest, "algorithm": "adamw", **(adamw or {})})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "muon_param_groups: model: expected trainable parameters, got none; set requires_grad"
        )
    return groups


def _head_cut(attention: nn.Module, projection: str) -> _Cut:
    """How the weight of a projection of latent attention falls into heads."""
    heads = getattr(attention, "num_heads", None)
    if heads is None or not hasattr(attention, "kv_b_proj"):
        return _WHOLE
    if projection == "kv_b_proj":
        return heads, 0, (attention.qk_nope_head_dim, attention.v_head_dim)  # type: ignore[return-value]
    if projection in ("q_b_proj", "q_proj"):
        return heads, 0, None
    return (heads, 1, None) if projection == "o_proj" else _WHOLE
