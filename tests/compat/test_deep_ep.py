# SPDX-License-Identifier: MIT
"""DeepEP's Buffer by its names, over the threads of a LocalWorld, against all ranks' tokens."""

import pytest
import torch
from torch import Tensor

from kimi_ops import Fp8Rows, LocalWorld
from kimi_ops.compat.deep_ep import Buffer
from kimi_ops.parallel.errors import EPMisuse

H, EXPERTS, K = 256, 12, 3


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """None on rank 1; some pairs and one whole token are dropped."""
    generator = torch.Generator().manual_seed(rank)
    count = 0 if rank == 1 else 5 + rank
    x = torch.randn(count, H, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).topk(K, dim=1).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    ids[:1] = -1
    return x, ids, torch.rand(count, K, generator=generator)


def dispatched(group, dtype=torch.float32):
    buffer = Buffer(group, max_tokens_per_rank=16)
    x, ids, weights = tokens_of(group.rank)
    x = x.to(dtype)
    per_rank, per_node, per_expert, inside, event = buffer.get_dispatch_layout(ids, EXPERTS)
    assert per_node is None
    layout = dict(
        num_tokens_per_rank=per_rank, is_token_in_rank=inside, num_tokens_per_expert=per_expert
    )
    rows = buffer.dispatch(
        x, **layout, topk_idx=ids, topk_weights=weights, expert_alignment=4, previous_event=event
    )
    return buffer, x, ids, weights, layout, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_there_and_back(world, dtype):
    own = EXPERTS // world

    def work(group):
        buffer, x, ids, weights, layout, came = dispatched(group, dtype)
        rows, local, row_weights, counts, handle, _ = came
        first = group.rank * own
        here = (ids[..., None] // own == torch.arange(world)) & (ids[..., None] >= 0)
        assert torch.equal(layout["is_token_in_rank"], here.any(1))
        assert layout["num_tokens_per_rank"].tolist() == here.any(1).sum(0).tolist()
        want = torch.bincount(ids[ids >= 0], minlength=EXPERTS)
        assert layout["num_tokens_per_expert"].tolist() == want.tolist()

        want_rows, want_local, want_weights = [], [], []
        for source in range(world):  # by (source rank, source token)
            theirs, chosen, theirs_weights = tokens_of(source)
            mine = (chosen >= first) & (chosen < first + own)
            goes = mine.any(1)
            want_rows.append(theirs[goes].to(dtype))
            want_local.append(torch.where(mine, chosen - first, -1)[goes])
            want_weights.append(torch.where(mine, theirs_weights, 0)[goes])
        assert torch.equal(rows, torch.cat(want_rows)) and rows.dtype == dtype
        assert local.dtype == torch.int64 and torch.equal(local, torch.cat(want_local))
        assert torch.equal(row_weights, torch.cat(want_weights))
        loads = torch.bincount(local[local >= 0], minlength=own).tolist()
        assert counts == [-(-count // 4) * 4 for count in loads]

        for scale in (1, 2):  # as a forward and a gradient would
            y, summed, _ = buffer.combine(rows * scale, handle, row_weights)
            ranks = here.any(1).sum(1, keepdim=True)
            assert y.dtype == dtype
            torch.testing.assert_close(y, (x * scale * ranks).to(dtype))
            torch.testing.assert_close(summed, torch.where(ids >= 0, weights, 0))
        assert torch.equal(buffer.combine(rows, handle)[0], (x * ranks).to(dtype))

        again = buffer.dispatch(x + 1, handle=handle)
        assert again[1:5] == (None, None, None, None)
        assert torch.equal(again[0], torch.cat(want_rows) + 1)
        alone = buffer.dispatch(x, **layout)
        assert torch.equal(alone[0], rows) and alone[1:4] == (None, None, [])
        with pytest.raises(ValueError, match="expected a dispatch with topk_idx"):
            buffer.combine(rows, alone[4], row_weights)
        exchanges = list(buffer._exchanges.values())
        buffer.destroy()
        for exchange in exchanges:
            with pytest.raises(EPMisuse, match="it was closed"):
                exchange.dispatch(x, ids)

    LocalWorld(world).run(work)


def test_fp8_rows_travel_with_their_scales():
    def work(group):
        buffer, x, *_, layout, (rows, *_) = dispatched(group)
        given = Fp8Rows.quantize(x)
        (data, scale), *_, handle, _ = buffer.dispatch((given.data, given.scale), **layout)
        want = Fp8Rows.quantize(rows)
        assert torch.equal(data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(scale, want.scale)
        assert buffer.combine(rows.bfloat16(), handle)[0].dtype == torch.bfloat16

    LocalWorld(2).run(work)


def test_what_is_not_served_is_refused():
    def work(group):
        for name, value in (("low_latency_mode", True), ("enable_shrink", True), ("comm", 1)):
            with pytest.raises(ValueError, match=f"^Buffer: {name}: expected"):
                Buffer(group, **{name: value})
        buffer, x, ids, _, layout, (rows, *_, handle, _) = dispatched(group)
        with pytest.raises(ValueError, match=r"^combine: bias: expected None"):
            buffer.combine(rows, handle, bias=rows)
        with pytest.raises(ValueError, match=r"^dispatch: num_worst_tokens: expected 0, got 8"):
            buffer.dispatch(x, **layout, num_worst_tokens=8)
        with pytest.raises(ValueError, match=r"^dispatch: topk_weights: expected topk_idx and"):
            buffer.dispatch(x, **layout, topk_idx=ids)
        with pytest.raises(TypeError, match=r"^dispatch: num_tokens_per_rank: expected a torch"):
            buffer.dispatch(x)
        with pytest.raises(ValueError, match=r"num_experts: expected a multiple of 2 ranks"):
            buffer.get_dispatch_layout(ids, 13)

    LocalWorld(2).run(work)
