# SPDX-License-Identifier: MIT
"""Which parameters of a model Muon takes, and which go to AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kimi_ops import _check
from kimi_ops.choices import ExpertLayout
from kimi_ops.optim.learning_rate import AdjustLr
from kimi_ops.optim.muon_cuts import EXPERT_LAYOUTS, WHOLE, Cut, cut_of
from kimi_ops.optim.muon_roles import Role, Survey

_USUAL = ("embed_tokens", "lm_head", "gate")  # may be named for a model that has none of them


def muon_param_groups(
    model: nn.Module,
    *,
    adamw_modules: Sequence[str] = (),
    muon_modules: Sequence[str] = (),
    expert_layout: ExpertLayout | None = None,
    adjust_lr_fn: AdjustLr = "match_rms_adamw",
    per_head: bool = False,
    strict: bool = True,
    adamw: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The parameters of `model` as groups for :class:`MuonClip`, with their names.

    Muon takes the weights of hidden linear layers and the stacks of experts, gate and up as two
    matrices of an expert. AdamW takes all vectors (norms, biases) and

    - embeddings and heads, because their rows are tokens that a batch may not touch and not the two
      sides of a linear map of activations;
    - routers, because each row scores one expert on its own, and an orthogonal update moves the
      rows of idle experts as much as those of busy ones.

    A head is told by a weight that an embedding shares, by as many outputs as the vocabulary has
    entries, by being the last layer of the model, or by its name (lm_head, head, output,
    classifier, score, ...); a router by experts beside it, as many as it has outputs, or by its
    name (gate, router, switch, ...). Where these contradict each other the role is not known.
    Parameters without requires_grad are left out.

    Parameters
    ----------
    model : nn.Module
        Any module; tied parameters appear once.
    adamw_modules, muon_modules : sequence of str
        Names that decide before all else: a part of a module's path, a whole path, or the name of a
        parameter. Vectors stay with AdamW; a convolution with Muon is a matrix [first, all others].
    expert_layout : str, optional
        Of fused stacks: ``"rows"`` [E, 2F, H], gate rows first (Kimi K2); ``"columns"`` [E, H, 2F];
        ``"rows_interleaved"``, ``"columns_interleaved"``: gate and up alternate, as in gpt-oss.
        None: told by the shape of the down stack, rows where there is none; columns also need the
        module to say whether they alternate, as transformers' do.
    adjust_lr_fn
        Of the Muon groups; the default lets both algorithms share one lr and one weight decay.
    per_head : bool
        Orthogonalise each head of latent attention on its own: rows of ``q_b_proj`` (``q_proj``),
        key rows and value rows of ``kv_b_proj``, columns of ``o_proj``. An eighth of the operations
        for Kimi K2's ``q_b_proj``; a head with a large gradient no longer sets the scale of others.
    strict : bool
        A parameter whose role is not known raises; with False it goes to AdamW.
    adamw : dict, optional
        Extra keys of the AdamW group, such as ``lr``.

    Returns
    -------
    list of dict
        Muon matrices, one group for each way to cut them, AdamW. Empty ones are left out.

    Raises
    ------
    ValueError
        Strict, and a parameter whose role is not known; a layout that contradicts the shapes; a
        name that is in both lists or in none of the model's; no parameter at all.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    >>> [(g["algorithm"], [name for name, _ in g["params"]]) for g in muon_param_groups(model)]
    [('muon', ['0.weight']), ('adamw', ['0.bias', '1.weight', '1.bias'])]
    """
    if expert_layout is not None:
        _check.choice("muon_param_groups", "expert_layout", expert_layout, EXPERT_LAYOUTS)
    survey = Survey(model)
    forced = _forced(model, adamw_modules, muon_modules)
    muon: dict[Cut, list[tuple[str, Tensor]]] = {WHOLE: []}
    rest: list[tuple[str, Tensor]] = []
    unknown: list[str] = []
    doubtful: list[Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        role = survey.role(name, param)
        if param in forced:
            role = Role(forced[param] and param.ndim > 1)
        cut: Cut | str = (
            cut_of(survey, name, param, expert_layout, per_head) if role.muon else WHOLE
        )
        if isinstance(cut, str):
            role = Role(False, cut)
        elif role.muon:
            muon.setdefault(cut, []).append((name, param))
        if not role.muon:
            rest.append((name, param))
        if role.doubt:
            unknown.append(f"{name} ({role.doubt})")
            doubtful.append(param)
    if unknown and (strict or not forced.keys().isdisjoint(doubtful)):
        raise ValueError(
            f"muon_param_groups: model: Muon or AdamW is not known for {', '.join(unknown)}; "
            "name their modules in adamw_modules or muon_modules, build the groups by hand, or "
            "pass strict=False for AdamW"
        )
    groups = []
    for key, params in muon.items():
        group = {"params": params, "algorithm": "muon", "adjust_lr_fn": adjust_lr_fn}
        groups.append({**group, **(key._asdict() if key != WHOLE else {})})
    groups.append({"params": rest, "algorithm": "adamw", **(adamw or {})})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "muon_param_groups: model: expected trainable parameters, got none; set requires_grad"
        )
    return groups


def _forced(
    model: nn.Module, adamw_modules: Sequence[str], muon_modules: Sequence[str]
) -> dict[Tensor, bool]:
    """Whether Muon takes the parameters that the caller names, under any of their names."""
    every = list(model.named_parameters(remove_duplicate=False))
    forced: dict[Tensor, bool] = {}
    for argument, entries in (("adamw_modules", adamw_modules), ("muon_modules", muon_modules)):
        if isinstance(entries, str):
            raise TypeError(
                f"muon_param_groups: {argument}: expected a sequence of names, got one string; "
                f"pass ({entries!r},)"
            )
        for entry in entries:
            found = [(name, param) for name, param in every if f".{entry}." in f".{name}."]
            if not found and entry not in _USUAL:
                raise ValueError(
                    f"muon_param_groups: {argument}: expected names in the model, got {entry!r}; "
                    "take them from model.named_parameters()"
                )
            for name, param in found:
                if forced.setdefault(param, argument == "muon_modules") == (argument[0] == "a"):
                    raise ValueError(
                        f"muon_param_groups: {argument}: expected names that adamw_modules has "
                        f"not, got {entry!r} for {name}; leave it out of one of them"
                    )
    return forced
