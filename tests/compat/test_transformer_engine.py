# SPDX-License-Identifier: MIT
"""TransformerEngine's permutation and router by its names, against their meaning in plain torch."""

import pytest
import torch
from torch import Tensor

from kimi_ops.compat import transformer_engine as te

DTYPES = (torch.float32, torch.bfloat16)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
H = 6


def mask_of(tokens: int, experts: int, topk: int, empty: bool = False) -> Tensor:
    """topk experts of each token; with `empty` the first expert and the first token have none."""
    scores = torch.rand(tokens, experts)
    if empty:
        scores[:, 0] = -1
    mask = torch.zeros(tokens, experts, dtype=torch.bool)
    mask.scatter_(1, scores.topk(topk, dim=1).indices, True)
    if empty:
        mask[:1] = False
    return mask


def pairs(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token and expert of each row, in the order (expert, token)."""
    expert, token = mask.T.nonzero(as_tuple=True)
    return token, expert


def close(got: Tensor, want: Tensor, dtype: torch.dtype, times: float = 1) -> None:
    bound = BOUND[dtype] * times
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=bound)


def same_gradients(mine, want, leaves, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    given = torch.randn(mine.shape).to(mine.dtype)
    for got, exact in zip(
        torch.autograd.grad(mine, leaves, given),
        torch.autograd.grad(want, leaves, given.to(want.dtype)),
        strict=True,
    ):
        assert got.dtype == exact.dtype
        close(got, exact, dtype, 4)


SHAPES = [(9, 5, 2), (1, 4, 1), (12, 40, 33), (7, 3, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_there_and_back(shape, empty, dtype):
    torch.manual_seed(0)
    topk = min(shape[2], shape[1] - empty)
    mask = mask_of(*shape[:2], topk, empty and shape[0] > 1)
    x = torch.randn(shape[0], H).to(dtype).requires_grad_()
    token, expert = pairs(mask)
    rows, row_id_map = te.moe_permute(x, mask.int(), len(token))
    assert torch.equal(rows, x[token])
    same_gradients(rows, x[token].float(), (x,), dtype)

    assert row_id_map.shape == (shape[0], 2 * shape[1] + 1) and row_id_map.dtype == torch.int32
    for t in range(shape[0]):  # the form: rows and experts from the last expert to the first
        n = int(row_id_map[t, -1])
        mine = (token == t).nonzero().flatten().flip(0)
        assert n == len(mine) and row_id_map[t, :n].tolist() == mine.tolist()
        assert row_id_map[t, shape[1] : shape[1] + n].tolist() == expert[mine].tolist()

    for probs in (None, torch.rand(mask.shape).requires_grad_()):
        y = torch.randn(rows.shape).to(dtype).requires_grad_()
        back = te.moe_unpermute(y, row_id_map, probs, x.shape)
        weights = 1 if probs is None else probs[token, expert].unsqueeze(1)
        want = torch.zeros(x.shape).index_add(0, token, y.float() * weights)
        close(back, want, dtype)
        same_gradients(back, want.to(dtype), (y,) if probs is None else (y, probs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 18, 25])
def test_dropped_and_missing_rows(rows, dtype):
    """`num_out_tokens` below the routed pairs drops the last experts'; above it rows are zero."""
    torch.manual_seed(0)
    mask, x = mask_of(9, 5, 2), torch.randn(9, H).to(dtype).requires_grad_()
    y, row_id_map = te.moe_permute(x, mask, rows)
    token, _ = pairs(mask)
    kept = token[:rows]
    assert len(y) == rows and torch.equal(y[: len(kept)], x[kept]) and not y[len(kept) :].any()
    assert row_id_map[:, -1].tolist() == torch.bincount(kept, minlength=9).tolist()
    back = te.moe_unpermute(y, row_id_map)
    close(back, x * torch.bincount(kept, minlength=9)[:, None], dtype)
    same_gradients(back, x * torch.bincount(kept, minlength=9)[:, None], (x,), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prob_dtype", DTYPES, ids=str)
def test_probs_travel_and_zero_is_padding(dtype, prob_dtype):
    torch.manual_seed(0)
    mask = mask_of(9, 5, 2)
    probs = torch.rand(mask.shape).to(prob_dtype)
    probs[3:5] = 0  # routed, but padding
    probs.requires_grad_()
    x = torch.randn(9, H).to(dtype).requires_grad_()
    token, expert = pairs(mask)
    rows, row_probs, row_id_map = te.moe_permute_with_probs(x, probs, mask, len(token))
    assert row_probs.dtype == prob_dtype and torch.equal(row_probs, probs[token, expert])
    want = x[token] * (probs[token, expert] != 0).unsqueeze(1)
    assert torch.equal(rows, want)
    same_gradients(rows, want, (x,), dtype)
    same_gradients(row_probs, probs[token, expert], (probs,), prob_dtype)
    assert torch.equal(row_id_map, te.moe_permute(x, mask, len(token))[1])


@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("empty", [False, True])
def test_padding_there_and_back(align, empty):
    torch.manual_seed(0)
    mask = mask_of(9, 5, 2, empty)
    probs = torch.rand(mask.shape, requires_grad=True)
    x = torch.randn(9, H, requires_grad=True)
    counts = mask.sum(0)
    rows, row_probs, row_id_map, pad_offsets, padded = te.moe_permute_and_pad_with_probs(
        x, probs, mask, counts, align
    )
    assert padded.tolist() == [-(-int(n) // align) * align for n in counts]
    assert (pad_offsets is None) == torch.equal(padded, counts)
    starts = padded.cumsum(0) - padded
    expected, expected_probs = torch.zeros(int(padded.sum()), H), torch.zeros(int(padded.sum()))
    for e in range(5):
        token = mask[:, e].nonzero().flatten()
        place = slice(int(starts[e]), int(starts[e]) + len(token))
        expected[place], expected_probs[place] = x.detach()[token], probs.detach()[token, e]
    assert torch.equal(rows, expected) and torch.equal(row_probs, expected_probs)
    back = te.moe_unpermute(rows, row_id_map, probs, x.shape, pad_offsets=pad_offsets)
    want = x * (probs * mask).sum(1, keepdim=True)
    close(back, want, torch.float32)
    same_gradients(back, want, (x, probs), torch.float32)


@pytest.mark.parametrize("out", [0, 5])
@pytest.mark.parametrize("topk", [1, 3])
def test_index_map(topk, out):
    torch.manual_seed(0)
    x = torch.randn(6, H, requires_grad=True)
    indices = torch.stack([torch.randperm(4)[:topk] for _ in range(6)]).int()
    rows, row_id_map = te.moe_permute(x, indices, out, map_type="index")
    order = indices.flatten().argsort(stable=True)[: out or None]
    assert torch.equal(rows, x[order // topk]) and row_id_map.shape == (6 * topk,)
    probs = torch.rand(6, topk, requires_grad=True)
    back = te.moe_unpermute(rows, row_id_map, probs, map_type="index")
    kept = torch.zeros(6 * topk).index_fill(0, order, 1).view(6, topk)
    want = x * (probs * kept).sum(1, keepdim=True)
    close(back, want, torch.float32)
    same_gradients(back, want, (x, probs), torch.float32)
    with pytest.raises(ValueError, match="one of probs and merging_probs"):
        te.moe_unpermute(rows, row_id_map, probs, map_type="index", probs=probs)


def test_no_tokens():
    x, mask = torch.empty(0, H), torch.empty(0, 4, dtype=torch.bool)
    rows, row_id_map = te.moe_permute(x, mask, 0)
    assert rows.shape == (0, H) and row_id_map.shape == (0, 9)
    assert te.moe_unpermute(rows, row_id_map, torch.empty(0, 4), x.shape).shape == (0, H)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(dtype):
    x = torch.randn(9, H).to(dtype).requires_grad_()
    probs = torch.rand(9, requires_grad=True)
    sizes, order = torch.tensor([2, 0, 4, 3]), torch.tensor([2, 0, 3, 1])
    rows, row_probs = te.moe_sort_chunks_by_index_with_probs(x, probs, sizes, order)
    take = torch.cat([torch.arange(9).split([2, 0, 4, 3])[i] for i in order])
    assert torch.equal(rows, x[take]) and torch.equal(row_probs, probs[take])
    assert torch.equal(te.moe_sort_chunks_by_index(x, sizes, order), rows)
    same_gradients(rows, x[take], (x,), dtype)
    same_gradients(row_probs, probs[take], (probs,), torch.float32)


# ---- the router


def choose(scores: Tensor, topk: int, groups: int | None, kept: int | None) -> Tensor:
    """The ids of the topk best, of the best groups where there are some."""
    if kept:
        by_group = scores.view(len(scores), groups, -1)
        strength = by_group.sort(2, descending=True).values[..., : topk // kept].sum(2)
        best = strength.topk(kept, dim=1).indices
        inside = torch.zeros_like(strength, dtype=torch.bool).scatter(1, best, True)
        scores = by_group.masked_fill(~inside[..., None], -torch.inf).flatten(1)
    return scores.topk(topk, dim=1).indices


def routed(logits, topk, pre, groups, kept, scaling, function, bias):
    """Dense weights and mask, from the definition."""
    z = logits.float()
    scores = {
        "softmax": lambda: z.softmax(1) if pre else z,
        "sigmoid": z.sigmoid,
        "sqrtsoftplus": lambda: torch.nn.functional.softplus(z).sqrt(),
    }[function]()
    ids = choose(scores.detach() + (0 if bias is None else bias), topk, groups, kept)
    w = scores.gather(1, ids)
    if function == "softmax":
        w = w if pre else w.softmax(1)
    elif topk > 1:
        w = w / w.sum(1, keepdim=True)
    mask = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True)
    return torch.zeros_like(z).scatter(1, ids, w * (scaling or 1)).to(logits.dtype), mask, ids


def distinct(tokens: int, experts: int) -> Tensor:
    """Logits apart by more than bf16 rounds, whose sums do not tie."""
    ladder = 1.1 ** torch.arange(experts) / 4 - 2
    return torch.stack([ladder[torch.randperm(experts)] for _ in range(tokens)])


CASES = [
    ("softmax", False, None, None, None, 4), ("softmax", True, None, None, 2.5, 4),
    ("softmax", False, 4, 2, 1.5, 4), ("softmax", True, 8, 4, None, 4),
    ("sigmoid", False, None, None, 2.827, 8), ("sigmoid", False, 8, 2, None, 4),
    ("sigmoid", False, None, None, None, 1), ("softmax", False, None, None, None, 1),
    ("sqrtsoftplus", False, None, None, None, 3), ("sqrtsoftplus", False, 4, 4, 0.5, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_router(case, biased, dtype):
    function, pre, groups, kept, scaling, topk = case
    if biased and function == "softmax":
        pytest.skip("a bias goes with sigmoid and sqrtsoftplus")
    torch.manual_seed(0)
    logits = distinct(20, 32).to(dtype).requires_grad_()
    bias = torch.randn(32) / 16 if biased else None
    arguments = topk, pre, groups, kept, scaling, function, bias
    probs, mask = te.fused_topk_with_score_function(logits, *arguments)
    want, want_mask, ids = routed(logits, *arguments)
    assert probs.dtype == dtype and mask.dtype == torch.bool and torch.equal(mask, want_mask)
    close(probs, want, dtype)
    same_gradients(probs, want, (logits,), dtype)

    out = torch.empty(20, topk, dtype=torch.int16)
    again, given = te.fused_topk_with_score_function(logits, *arguments, topk_indices=out)
    assert given is out and torch.equal(again, probs)
    assert torch.equal(out.sort(1).values.long(), ids.sort(1).values)


def test_leading_dimensions_and_bitmaps():
    logits = torch.randn(3, 2, 11)
    arguments = 3, False, None, None, None, "sigmoid", None
    probs, mask = te.fused_topk_with_score_function(logits, *arguments)
    assert probs.shape == mask.shape == logits.shape
    flat, _ = te.fused_topk_with_score_function(logits.view(6, 11), *arguments)
    assert torch.equal(probs.view(6, 11), flat)
    for name in ("bitmap_u8", 1, te.RoutingMapFormat.BITMAP_U8):
        _, bits = te.fused_topk_with_score_function(logits, *arguments, name)
        assert bits.shape == (3, 2, 2) and bits.dtype == torch.uint8
        unpacked = [bits[..., e // 8] >> (e % 8) & 1 for e in range(11)]
        assert torch.equal(torch.stack(unpacked, -1).bool(), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_scores_of_the_auxiliary_loss(function, dtype):
    torch.manual_seed(0)
    logits = distinct(12, 16).to(dtype).requires_grad_()
    mask, scores = te.fused_compute_score_for_moe_aux_loss(logits, 3, function)
    z = logits.float()
    raw = {"softmax": z.exp, "sigmoid": z.sigmoid}.get(
        function, lambda: torch.nn.functional.softplus(z).sqrt()
    )()
    want = raw / raw.sum(1, keepdim=True)
    assert scores.dtype == torch.float32
    close(scores, want, torch.float32)
    same_gradients(scores, want, (logits,), dtype)
    _, want_mask, _ = routed(z, 3, False, None, None, None, "sigmoid", None)
    assert torch.equal(mask, want_mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [24, torch.tensor(24)], ids=["host", "device"])
def test_auxiliary_loss(total, count_dtype, dtype):
    torch.manual_seed(0)
    probs = torch.rand(12, 8).to(dtype).requires_grad_()  # half of the tokens that are counted
    counts = torch.randint(0, 24, (8,)).to(count_dtype)
    loss = te.fused_moe_aux_loss(probs, counts, total, 8, 2, 0.3)
    want = 0.3 * 8 / (2 * 24**2) * (probs.float().sum(0) * counts.float()).sum()
    assert loss.dtype == dtype and loss.shape == ()
    close(loss, want, dtype)
    same_gradients(loss, want.to(dtype), (probs,), dtype)


def test_a_layer_compiles_without_a_break():
    def layer(x, logits):
        probs, mask = te.fused_topk_with_score_function(
            logits, 2, False, None, None, None, "sigmoid", None
        )
        rows, row_probs, row_id_map = te.moe_permute_with_probs(x, probs, mask, 18)
        return te.moe_unpermute(rows * row_probs[:, None], row_id_map, restore_shape=x.shape)

    torch._dynamo.reset()
    x, logits = torch.randn(9, H), torch.randn(9, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), layer(x, logits))


X, MASK = torch.zeros(3, 4), torch.ones(3, 2, dtype=torch.bool)
MAP = te.moe_permute(X, MASK, 6)[1]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: te.moe_permute(X, MASK, -1), "num_out_tokens: expected 0"),
        (lambda: te.moe_permute(X, MASK, 6, map_type="bits"), "map_type: expected one of"),
        (lambda: te.moe_permute(X, MASK[:2], 6), r"routing_map: expected shape \[3, E\]"),
        (lambda: te.moe_permute(X, MASK[0], 6), "routing_map: expected shape"),
        (lambda: te.moe_permute_with_probs(X, X, MASK, 6), "probs: expected shape"),
        (lambda: te.moe_permute_and_pad_with_probs(X, X[:, :2], MASK, MASK[0], 0), "align"),
        (lambda: te.moe_unpermute(X, MAP, restore_shape=(2, 4)), "restore_"),
        (lambda: te.moe_unpermute(X, MAP, map_type="index", pad_offsets=X), "pad_offsets: exp"),
        (lambda: te.moe_unpermute(X, MAP, X), "merging_probs: expected"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_quantile_histogram():
    """alpha is the (k+1)-th largest of s + b; r = alpha - s; bins by multiplication, clamped."""
    logits, bias, bounds = torch.randn(50, 12), torch.randn(12) / 4, torch.tensor([-0.8, 1.1])
    histogram = torch.zeros(12, 40, dtype=torch.int32)
    probs, _ = te.fused_topk_with_score_function(
        logits, 3, False, None, None, None, "sigmoid", bias, qb_histogram=histogram,
        qb_bin_bounds=bounds, qb_histogram_mode="fused_atomic",
    )  # fmt: skip
    s = logits.sigmoid()
    alpha = (s + bias).topk(4).values[:, 3:]
    bins = ((alpha - s - bounds[0]) * (40 / (bounds[1] - bounds[0]))).floor().clamp(0, 39).long()
    want = torch.nn.functional.one_hot(bins, 40).sum(0)
    assert (histogram - want).abs().sum() <= 4 and histogram.sum() == 600  # rounded at an edge
    plain = te.fused_topk_with_score_function(logits, 3, False, None, None, None, "sigmoid", bias)
    assert torch.equal(probs, plain[0])


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(qb_histogram=torch.zeros(4, 8)), "qb_bin_bounds: expected a tensor beside"),
        (
            dict(qb_histogram=1, qb_bin_bounds=1),
            "score_function: expected 'sigmoid', got 'softmax'",
        ),
        (
            dict(qb_histogram_mode="one"),
            "qb_histogram_mode: expected one of two_kernel, fused_atom",
        ),
        (dict(expert_bias=torch.zeros(4)), "expert_bias: expected None"),
        (dict(score_function="tanh"), "score_function: expected one of"),
        (dict(routing_map_format="bits"), "routing_map_format: expected"),
        (dict(group_topk=2), "num_groups: expected a divisor"),
        (dict(num_groups=3, group_topk=1), "num_groups: expected a divisor"),
        (dict(num_groups=4, group_topk=4), "topk // group_topk: expected 1"),
    ],
)
def test_the_router_refuses(changes, message):
    good = dict(
        logits=torch.zeros(3, 4), topk=2, use_pre_softmax=False, num_groups=None, group_topk=None,
        scaling_factor=None, score_function="softmax", expert_bias=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^fused_topk_with_score_function: {message}"):
        te.fused_topk_with_score_function(**{**good, **changes})
