# SPDX-License-Identifier: MIT
"""MXFP4 weights, read as FP8 blocks without a rounding."""

import pytest
import torch
from torch import Tensor

from kimi_ops import Fp8BlockWeight, grouped_gemm
from kimi_ops.formats import dequantize_mxfp4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def stored(experts=2, rows=150, columns=224, low=120, high=134, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator)
    scale = torch.randint(low, high + 1, (experts, rows, columns // 32), generator=generator)
    return packed.byte(), scale.byte()


def value_of(packed: Tensor, scale: Tensor, n: int, k: int) -> float:
    """By the definition, bit by bit."""
    byte = int(packed[n, k // 2])
    nibble = byte >> 4 if k % 2 else byte & 15
    return (-1) ** (nibble >> 3) * VALUES[nibble & 7] * 2.0 ** (int(scale[n, k // 32]) - 127)


def test_every_value_is_what_its_bits_say():
    packed, scale = stored(experts=1)
    wide = dequantize_mxfp4(packed[0], scale[0])
    for n, k in [(0, 0), (0, 1), (149, 223), *((7 * i % 150, 31 * i % 224) for i in range(200))]:
        assert wide[n, k] == value_of(packed[0], scale[0], n, k)
    ends = torch.tensor([[0, 254]]).byte()
    one = dequantize_mxfp4(torch.full((1, 32), 0x22).byte(), ends)
    assert one[0, 0] == 2.0**-127 and one[0, 32] == 2.0**127
    assert dequantize_mxfp4(packed[0][:1, :16], torch.tensor([[255]]).byte()).isnan().all()


@pytest.mark.parametrize(("low", "high"), [(120, 134), (0, 8), (240, 254), (127, 127)])
def test_as_fp8_blocks_no_value_changes(low, high):
    packed, scale = stored(low=low, high=high)
    scale[1, :, :3] = 1  # far below, but
    packed[1, :, :48] = 0x08  # of zeros, one of them negative
    weight = Fp8BlockWeight.from_mxfp4(packed, scale)
    assert weight.shape == (2, 150, 224)
    for e in range(2):
        wide = dequantize_mxfp4(packed[e], scale[e])
        assert torch.equal(weight.expert(e, torch.float32), wide)
    if low < 100 or high > 150:  # sums leave fp32
        return
    x = torch.randn(5, 224)
    y = grouped_gemm(x, weight, torch.tensor([2, 5]))
    wide = torch.stack([dequantize_mxfp4(p, s) for p, s in zip(packed, scale, strict=True)])
    want = grouped_gemm(x, wide.transpose(1, 2), torch.tensor([2, 5]))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=float(want.abs().max()) * 1e-6)


def test_what_does_not_fit_is_refused():
    packed, scale = stored(low=127, high=127)
    packed |= 1  # no zeros
    scale[1, 3, 2] = 127 - 15
    with pytest.raises(ValueError, match=r"within 14 .* got others in expert 1; take kimi_ops"):
        Fp8BlockWeight.from_mxfp4(packed, scale)
    scale[1, 3, 2] = 127 - 14
    Fp8BlockWeight.from_mxfp4(packed, scale)
    scale[0, 0, 0] = 255
    with pytest.raises(ValueError, match="got others in expert 0"):
        Fp8BlockWeight.from_mxfp4(packed, scale)
    for change, error, text in [
        ({"packed": packed.int()}, TypeError, "packed: expected uint8"),
        (
            {"packed": packed[..., :20]},
            ValueError,
            "packed: expected K as a multiple of 32, got 40",
        ),
        ({"scale": scale[..., :2]}, ValueError, r"scale: expected shape \[2, 150, 7\]"),
        ({"scale": scale.float()}, TypeError, "scale: expected uint8"),
    ]:
        with pytest.raises(error, match=f"Fp8BlockWeight.from_mxfp4: {text}"):
            Fp8BlockWeight.from_mxfp4(**({"packed": packed, "scale": scale} | change))
