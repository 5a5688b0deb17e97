# SPDX-License-Identifier: MIT
"""FP8 blocks and INT4 groups of one matrix [N, K], FP8 rows of activations, in plain torch.

FP8: e4m3 values, one fp32 scale for each 128 x 128 block; W = q * scale, whatever the name
``weight_scale_inv`` of the files says (DeepSeek-V3, README_WEIGHTS). INT4: values -8 .. 7 stored as
unsigned nibbles with 8 added, eight in an int32 word with the first in its lowest bits, one bf16
scale for each 32 neighbours along K (the ``pack-quantized`` format of compressed-tensors). MXFP4:
e2m1 values, two in a byte, and an exponent for each 32 neighbours along K (OCP MX 1.0); read alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
FP8_MAX = 448.0  # largest e4m3 value
INT4_GROUP = 32
INT4_WORD = 8  # nibbles in an int32
MXFP4_GROUP = 32
_MXFP4_TOP, _MXFP4_BOTTOM = 6, -8  # exponents of a group beside its block's, in FP8
INT4_MAX = 7  # -8 stays unused, as in the released checkpoints: the range is symmetric
SMALLEST = 2.0**-126  # smallest normal number of fp32 and bf16: a scale below it has few bits


def blocks(size: int) -> int:
    """How many blocks of FP8 values a side of `size` has; the last may be ragged."""
    return -(-size // FP8_BLOCK)


def fp8_values(data: Tensor) -> Tensor:
    """float32(data) of float8_e4m3fn, on the CPU four times as fast as torch converts it.

    Its bits, put where float16 has sign, exponent and mantissa, are 2^-8 of the value, subnormal
    or not: the biases are 7 and 15. What is NaN, all ones but the sign, gets float16's exponent.
    """
    if data.device.type != "cpu":
        return data.float()
    bits = data.view(torch.int8).to(torch.int16)
    nan = (bits & 0x7F).add_(1).bitwise_and_(0x80).mul_(0xF8)  # 0x7C00 or 0
    bits = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).bitwise_or_(nan)
    return bits.view(torch.float16).float().mul_(256)


def dequantize_fp8(
    weight: Tensor, scale: Tensor, block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)
) -> Tensor:
    """W[i, j] = float32(q[i, j]) * scale[i // block[0], j // block[1]].

    The last block of a row or column may be ragged.

    Parameters
    ----------
    weight : Tensor [N, K] float8_e4m3fn or int8
    scale : Tensor [ceil(N / block[0]), ceil(K / block[1])] float32

    Returns
    -------
    Tensor [N, K] float32
    """
    rows, columns = weight.shape
    values = fp8_values(weight) if weight.dtype == torch.float8_e4m3fn else weight.float()
    by_row = scale.float().repeat_interleave(block[1], 1)[:, :columns]
    return values.mul_(by_row.repeat_interleave(block[0], 0)[:rows])


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q [N, K] float8_e4m3fn and scale [ceil(N / 128), ceil(K / 128)] = max |W| of the block / 448.

    The error of a value is at most 2^-4 of it, or 2^-10 of the scale where that is more.
    """
    rows, columns = weight.shape
    weight = weight.float()
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp(min=SMALLEST)
    q = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return q.to(torch.float8_e4m3fn), scale


def dequantize_rows(data: Tensor, scale: Tensor) -> Tensor:
    """x[r, k] = float32(data[r, k]) * scale[r, k // 128].

    Parameters
    ----------
    data : Tensor [R, K] float8_e4m3fn
    scale : Tensor [R, ceil(K / 128)] float32

    Returns
    -------
    Tensor [R, K] float32
    """
    return fp8_values(data) * scale.repeat_interleave(FP8_BLOCK, 1)[:, : data.shape[1]]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """data [R, K] float8_e4m3fn and scale [R, ceil(K / 128)] = max |x| of 128 columns / 448."""
    columns = x.shape[1]
    blocks = F.pad(x.float(), (0, -columns % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
    scale = (blocks.abs().amax(dim=2) / FP8_MAX).clamp(min=SMALLEST)
    q = (blocks / scale[:, :, None]).flatten(1)[:, :columns]
    return q.to(torch.float8_e4m3fn), scale


def dequantize_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """W[i, j] = (nibble[i, j] - 8) * scale[i, j // 32]; exact in fp32.

    Parameters
    ----------
    packed : Tensor [N, K / 8] int32
    scale : Tensor [N, ceil(K / 32)] bfloat16

    Returns
    -------
    Tensor [N, K] float32
    """
    shifts = torch.arange(0, 4 * INT4_WORD, 4, dtype=torch.int32, device=packed.device)
    nibbles = (packed[:, :, None] >> shifts) & 15
    values = (nibbles - 8).flatten(1).float()
    return values * scale.float().repeat_interleave(INT4_GROUP, 1)[:, : values.shape[1]]


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """packed [N, K / 8] int32 and scale [N, ceil(K / 32)] = max |W| of the group / 7 in bfloat16.

    K is a multiple of 8. The error of a value is at most half the scale.
    """
    columns = weight.shape[1]
    groups = F.pad(weight.float(), (0, -columns % INT4_GROUP)).unflatten(1, (-1, INT4_GROUP))
    scale = (groups.abs().amax(dim=2) / INT4_MAX).clamp(min=SMALLEST).bfloat16()
    q = (groups / scale.float()[:, :, None]).round().clamp(-INT4_MAX, INT4_MAX)
    nibbles = (q.int() + 8).flatten(1)[:, :columns].unflatten(1, (-1, INT4_WORD))
    shifts = torch.arange(0, 4 * INT4_WORD, 4, dtype=torch.int32, device=weight.device)
    return (nibbles << shifts).sum(dim=2, dtype=torch.int32), scale


def dequantize_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """W[i, j] = e2m1[i, j] * 2^(scale[i, j // 32] - 127); exact in fp32.

    Parameters
    ----------
    packed : Tensor [N, K / 2] uint8
        Column 2 j in the low bits of byte j: a sign, then one of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    scale : Tensor [N, K / 32] uint8
        Exponents; 255 is NaN.

    Returns
    -------
    Tensor [N, K] float32
    """
    values, exponents = mxfp4_parts(packed, scale)
    return values * _two_to(exponents).repeat_interleave(MXFP4_GROUP, 1)


def mxfp4_parts(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The e2m1 values [N, K] float32, and the exponents [N, K / 32] float32 of their groups."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
    magnitudes = torch.tensor(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float32, device=packed.device
    )
    values = torch.cat([magnitudes, -magnitudes])[nibbles]
    return values, (scale.float() - 127).masked_fill(scale == 255, torch.nan)


def mxfp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same values as FP8 blocks, data [N, K] and scale; None where they do not fit exactly.

    A block's scale is a power of two that puts its largest exponent at 6: 6 * 2^6 is below 448. As
    the smallest step of e4m3 is 2^-9, exponents down to -8 keep every value: a range of 2^14.
    """
    values, exponents = mxfp4_parts(packed, scale)
    rows, columns = values.shape
    present = values.unflatten(1, (-1, MXFP4_GROUP)).any(dim=2) | exponents.isnan()
    exponents = torch.where(present, exponents, -torch.inf)  # of zeros any will do
    largest = F.pad(exponents, (0, -exponents.shape[1] % 4, 0, -rows % FP8_BLOCK), value=-torch.inf)
    by_block = largest.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK // MXFP4_GROUP))
    block = (by_block.amax(dim=(1, 3)) - _MXFP4_TOP).clamp(min=-126)  # no subnormal scales
    of_group = block.repeat_interleave(FP8_BLOCK, 0)[:rows]
    of_group = of_group.repeat_interleave(FP8_BLOCK // MXFP4_GROUP, 1)[:, : exponents.shape[1]]
    relative = torch.where(present, exponents - of_group, 0.0)
    if bool((~(relative >= _MXFP4_BOTTOM)).any()):  # NaN is no exponent
        return None
    data = values * _two_to(relative).repeat_interleave(MXFP4_GROUP, 1)
    return data.to(torch.float8_e4m3fn), _two_to(block)


def _two_to(exponents: Tensor) -> Tensor:
    """Exactly: in fp32 exp2 is a polynomial."""
    return torch.exp2(exponents.double()).float()
