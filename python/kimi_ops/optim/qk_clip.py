# SPDX-License-Identifier: MIT
"""QK-Clip: the largest attention logit of each head, and the rescaling of its projections that
bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from kimi_ops._autocast import no_autocast
from kimi_ops.choices import AttentionLayout, GqaMode
from kimi_ops.optim import engine
from kimi_ops.reference.qk_clip import Layer, Rows

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention_max_logits(q: Tensor, k: Tensor, scale: float, *, causal: bool = True) -> Tensor:
    r"""Largest input of the attention softmax, one value a head.

    :math:`S_h = \max_{b,\, i,\, j \text{ visible from } i} \text{scale} \cdot q_{b,h,i} \cdot
    k_{b,h,j}`

    Parameters
    ----------
    q : Tensor [B, heads, Sq, D]
        Queries after rotary embedding, fp32, bf16, fp16 or fp64.
    k : Tensor [B, kv_heads, Sk, D]
        Keys, same dtype and device; `kv_heads` divides `heads`.
    scale : float
        Positive softmax scale (for MLA with YaRN it includes mscale squared).
    causal : bool
        Query i sees keys 0 .. i + Sk - Sq.

    Returns
    -------
    Tensor [heads]
        fp32 (fp64 for fp64 input), -inf where nothing is visible, NaN where a logit is NaN. Without
        gradient.
        The scores exist only in blocks of queries, never as [Sq, Sk].

    Raises
    ------
    TypeError
        Dtypes that differ or are not floating point.
    ValueError
        Wrong shapes, devices that differ, a scale that is not positive, or more causal queries than
        keys.

    Examples
    --------
    >>> import torch
    >>> attention_max_logits(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0.5)
    tensor([2., 2.])

    Notes
    -----
    Kimi K2 technical report, arXiv 2507.20534. The plain maximum, not that of the absolute value.
    """
    for name, tensor in (("q", q), ("k", k)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"attention_max_logits: {name}: expected a floating-point tensor, got {got}; "
                "convert it"
            )
        if tensor.ndim != 4:
            raise ValueError(
                f"attention_max_logits: {name}: expected [B, heads, S, D], got shape "
                f"{tuple(tensor.shape)}"
            )
    if q.dtype != k.dtype:
        raise TypeError(
            f"attention_max_logits: k: expected q's dtype {q.dtype}, got {k.dtype}; cast one of "
            f"them"
        )
    if q.device != k.device:
        raise ValueError(
            f"attention_max_logits: k: expected q's device {q.device}, got {k.device}; move one "
            f"of them"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention_max_logits: k: expected B and D of q, {q.shape[0]} and {q.shape[3]}, "
            f"got shape {tuple(k.shape)}; "
            "make them agree"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"attention_max_logits: k: its {k.shape[1]} heads must divide q's {q.shape[1]}; "
            f"repeat or regroup the heads"
        )
    if not (scale > 0 and scale < float("inf")):
        raise ValueError(
            f"attention_max_logits: scale: expected a positive finite number, got {scale}; "
            "1 / sqrt(D) is usual"
        )
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"attention_max_logits: q: {q.shape[2]} causal queries but only {k.shape[2]} keys; "
            f"pass causal=False"
        )
    with torch.no_grad(), no_autocast(q.device.type):  # it would round the logits
        return engine.attention_max_logits(q, k, float(scale), causal)


class Share(NamedTuple):
    """What gamma does to the rows of a projection [blocks * block_rows, in]: of each head's block
    the first `shared` take gamma^power, the `whole` next ones gamma."""

    blocks: int
    block_rows: int
    shared: int
    whole: int
    power: float


def shares(
    op: str, heads: int, layout: str, alpha: float, gqa_mode: str, **sizes: int | None
) -> tuple[Layer, Share, Share]:
    """The layer, the share of its query projection and that of its key projection."""
    check_bounds(op, None, alpha)
    if layout not in get_args(AttentionLayout):
        raise ValueError(
            f"{op}: layout: expected 'mla', 'mha' or 'gqa', got {layout!r}; choose one"
        )
    if gqa_mode not in get_args(GqaMode):
        raise ValueError(
            f"{op}: gqa_mode: expected 'query_only' or 'group_max', got {gqa_mode!r}; choose one"
        )

    def size(name: str) -> int:
        value = sizes.get(name)
        if value is None or value < 1:
            raise ValueError(
                f"{op}: {name}: layout {layout!r} needs a positive int, got {value}; "
                "give the model's"
            )
        return value

    if layout == "mla":
        nope, rope, v = map(size, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        query = Share(heads, nope + rope, nope, rope, alpha)
        return Layer(heads), query, Share(heads, nope + v, nope, 0, 1 - alpha)
    dim = size("head_dim")
    if layout == "mha":
        return Layer(heads), Share(heads, dim, dim, 0, alpha), Share(heads, dim, dim, 0, 1 - alpha)
    key_heads = size("num_kv_heads")
    if heads % key_heads != 0:
        raise ValueError(
            f"{op}: num_kv_heads: expected a divisor of {heads}, got {key_heads}; "
            "check the geometry"
        )
    if gqa_mode == "query_only":
        return Layer(heads), Share(heads, dim, 0, dim, 1.0), Share(key_heads, dim, 0, 0, 1.0)
    query, key = Share(heads, dim, dim, 0, alpha), Share(key_heads, dim, dim, 0, 1 - alpha)
    return Layer(heads, heads // key_heads), query, key


def check_bounds(op: str, tau: float | None, alpha: float) -> None:
    if tau is not None and not 0 < tau < float("inf"):
        raise ValueError(
            f"{op}: tau: expected a positive finite number, got {tau}; Kimi K2 used 100"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha: expected 0 to 1, got {alpha}; 0.5 shares evenly")


def check_rows(op: str, name: str, weight: Any, share: Share) -> None:
    """A weight [rows, in] or a bias [rows] that has the rows of `share`."""
    if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: {name}: expected floating-point tensors, got {got}; convert them")
    if weight.ndim not in (1, 2) or weight.shape[0] != share.blocks * share.block_rows:
        raise ValueError(
            f"{op}: {name}: expected [{share.blocks} heads * {share.block_rows} rows, in], got "
            f"shape {tuple(weight.shape)}; "
            "check the numbers of heads and the head dimensions"
        )


def qk_clip_(
    max_logits: Tensor,
    *,
    q_weight: Tensor | Sequence[Tensor],
    k_weight: Tensor | Sequence[Tensor],
    tau: float = 100.0,
    alpha: float = 0.5,
    layout: AttentionLayout = "mla",
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    gqa_mode: GqaMode = "query_only",
) -> Tensor:
    r"""Scale the query and key projections in place so that no head's largest logit passes `tau`.

    :math:`\gamma_h = \min(1, \tau / S_h)`. A head's logits are bilinear in its query and key rows,
    so ``mha`` multiplies them by :math:`\gamma^\alpha` and :math:`\gamma^{1-\alpha}`. In ``mla``
    the rotary key is shared by all heads: it stays, the rotary query takes the whole
    :math:`\gamma`, and the position-free parts share it as above.
    In ``gqa`` the key is shared by a group: ``query_only`` puts all of :math:`\gamma_h` on the
    query (exact for each head), ``group_max`` clips the whole group by its largest logit.

    Parameters
    ----------
    max_logits : Tensor [heads]
        :func:`attention_max_logits` of the batch, fp32 or fp64. A value <= tau (also <= 0),
        infinite or NaN leaves its head alone, bit for bit.
    q_weight, k_weight : Tensor [rows, in] or sequence
        A sequence holds what belongs to one projection: copies (fp32 master, bf16 weight), and
        its bias [rows], which scales with its rows.
        ``mla``: ``q_b_proj`` [heads * (nope + rope), in] and ``kv_b_proj`` [heads * (nope + v),
        in]; value rows untouched.
        ``mha``: [heads * head_dim, in] both. ``gqa``: keys have kv_heads * head_dim rows.
    tau : float
        Largest logit allowed, > 0. Kimi K2 used 100.
    alpha : float
        Share of the query, between 0 and 1.
    layout : str
        ``"mla"``, ``"mha"`` or ``"gqa"``.
    num_heads, num_kv_heads, head_dim, qk_nope_head_dim, qk_rope_head_dim, v_head_dim : int
        The geometry the layout needs; `num_heads` defaults to the length of `max_logits`.
    gqa_mode : str
        ``"query_only"`` or ``"group_max"``.

    Returns
    -------
    Tensor [heads]
        gamma, on the device of `max_logits`; nothing is read on the host.

    Raises
    ------
    TypeError, ValueError
        Before any weight is changed: wrong dtypes, shapes that do not fit the geometry, tau <= 0,
        unknown names.

    Examples
    --------
    >>> import torch
    >>> q, k = torch.ones(4, 3), torch.ones(4, 3)
    >>> qk_clip_(torch.tensor([50.0, 400.0]), q_weight=q, k_weight=k, layout="mha", head_dim=2)
    tensor([1.0000, 0.2500])
    >>> q[:, 0]
    tensor([1.0000, 1.0000, 0.5000, 0.5000])

    Notes
    -----
    Kimi K2 technical report, arXiv 2507.20534, section 2.1.
    """
    if not isinstance(max_logits, Tensor) or max_logits.dtype not in (torch.float32, torch.float64):
        got = max_logits.dtype if isinstance(max_logits, Tensor) else type(max_logits).__name__
        raise TypeError(
            f"qk_clip_: max_logits: expected an fp32 or fp64 tensor, got {got}; convert it"
        )
    heads = max_logits.numel() if num_heads is None else num_heads
    if max_logits.ndim != 1 or max_logits.shape[0] != heads or heads < 1:
        raise ValueError(
            f"qk_clip_: max_logits: expected [{heads} heads], got shape {tuple(max_logits.shape)}; "
            "give one layer's, one value a head"
        )
    check_bounds("qk_clip_", tau, alpha)
    layer, query, key = shares(
        "qk_clip_",
        heads,
        layout,
        alpha,
        gqa_mode,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=v_head_dim,
    )
    weights: list[Tensor] = []
    of_weights: list[Share] = []
    for name, given, share in (("q_weight", q_weight, query), ("k_weight", k_weight, key)):
        copies = [given] if isinstance(given, Tensor) else list(given)
        for copy in copies:
            check_rows("qk_clip_", name, copy, share)
        if share.shared or share.whole:
            weights += copies
            of_weights += [share] * len(copies)
    for weight in weights:
        if weight.device != max_logits.device:
            raise ValueError(
                f"qk_clip_: max_logits: expected the weights' device {weight.device}, "
                f"got {max_logits.device}; move one of them"
            )
    rows = [Rows(0, of.blocks, of.block_rows, 0, of.shared, of.whole) for of in of_weights]
    with torch.no_grad():
        return engine.clip_rows_(
            weights, max_logits, [layer], rows, [of.power for of in of_weights], tau
        )
