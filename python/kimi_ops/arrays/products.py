# SPDX-License-Identifier: MIT
"""Products of every expert's group of rows."""

from typing import Any

from kimi_ops import _arguments as check
from kimi_ops._forms import check_accumulate, check_form
from kimi_ops.arrays.door import Door, name_of
from kimi_ops.arrays.formats import Fp8BlockWeight, Fp8Rows, Quantized, named


class Products(Door):
    def grouped_gemm(
        self,
        a: Any,
        b: Any,
        offsets: Any = None,
        *,
        starts: Any = None,
        counts: Any = None,
        bias: Any = None,
        out: Any = None,
        out_dtype: Any = None,
        accumulate: bool = False,
    ) -> Any:
        """`kimi_ops.grouped_gemm` in all its forms: a [R, K] by b [E, K, N], rows up to offsets [E]
        for each expert (from starts [E] on), or a, b of [E, M, K], [E, K, N] (the first counts [E]
        rows); [E, M, K], [K, N]; [M, K], [K, N]. b may be quantised, then a may be `Fp8Rows`.

        NumPy writes to `out`. JAX gives a new array, in the memory of one that is donated:
        ``accumulate=True`` adds to `out`, and without it `out` says the dtype alone.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> a, b = np.ones((3, 4), np.float32), np.ones((2, 4, 5), np.float32)
        >>> kn.grouped_gemm(a, b, np.array([1, 3])).shape
        (3, 5)
        """
        plain = not isinstance(a, Fp8Rows) and not isinstance(b, Quantized)
        if accumulate:
            check_accumulate(out, plain)
        form = (a.ndim, b.ndim) if plain else (2, 3)
        check_form(form, plain, a, b, offsets, starts, counts, bias)
        given = {"out": out, "out_dtype": out_dtype, "accumulate": accumulate}
        if form == (3, 2):  # with rows and columns exchanged
            given["out"] = None if out is None else out.T
            return self.grouped_gemm(b.T, self.array(a).swapaxes(1, 2), offsets, **given).T
        if form == (2, 2):
            return self._wgrad(a.T, b, offsets, None, **given)
        if form == (3, 3):
            return self._whole(a, b, counts, bias, given)
        if isinstance(a, Fp8Rows) and not isinstance(b, Fp8BlockWeight):
            raise TypeError(
                f"grouped_gemm: b: expected a Fp8BlockWeight beside FP8 rows, got "
                f"{type(b).__name__}; quantize it, or pass a.dequantize(dtype)"
            )
        wanted = self._result(a, out, out_dtype)
        ends, dtype = self.ids(offsets), self.dtype(wanted)
        if isinstance(a, Fp8Rows):
            return self._placed(self.fp8_product(a, b, ends, bias, wanted), out)
        if not plain:
            return self._placed(self.run("quantized_gemm", a, *b, ends, bias, dtype), out)
        starts = self.optional_ids(starts)
        if out is None or not self.writes(accumulate):
            return self.run("grouped_gemm", a, b, ends, bias, dtype, starts)
        return self.run("grouped_gemm_out", a, b, ends, bias, out, accumulate, starts)

    def _result(self, a: Any, out: Any, out_dtype: Any) -> str:
        if out is None:
            default = "bfloat16" if isinstance(a, Fp8Rows) else a.dtype
            return name_of(default if out_dtype is None else out_dtype)
        if out_dtype is not None and name_of(out_dtype) != name_of(out.dtype):
            raise TypeError(
                f"grouped_gemm: out: expected {name_of(out_dtype)}, got {name_of(out.dtype)}; "
                "leave out_dtype away"
            )
        return name_of(out.dtype)

    def _whole(self, a: Any, b: Any, counts: Any, bias: Any, given: dict[str, Any]) -> Any:
        """A matrix for each expert: groups that begin every M rows of [E * M, K]."""
        a, out = self.array(a), given["out"]
        experts, rows, depth = a.shape
        if b.shape[0] != experts:
            raise ValueError(
                f"grouped_gemm: b: expected {experts} matrices as a, got {b.shape[0]}; pass one "
                "for each"
            )
        sizes = experts, rows, b.shape[2]
        if out is not None:
            check.shape("grouped_gemm", "out", out, sizes)
            given["out"] = self.flat(out)
        starts = self.space(a).arange(experts, dtype="int32") * rows
        ends, firsts = starts + rows, None
        if counts is not None:
            check.shape("grouped_gemm", "counts", counts, (experts,))
            ends, firsts = starts + self.array(self.ids(counts)), starts
        c = self.grouped_gemm(
            a.reshape(-1, depth), b, ends.astype("int32"), starts=firsts, bias=bias, **given
        )
        return self.array(c).reshape(sizes)

    def grouped_gemm_wgrad(
        self,
        a: Any,
        dc: Any,
        offsets: Any,
        *,
        starts: Any = None,
        out: Any = None,
        accumulate: bool = False,
        out_dtype: Any = None,
    ) -> Any:
        """`kimi_ops.grouped_gemm_wgrad`: [E, K, N] of rows a [R, K] and dc [R, N]; `out` and
        `accumulate` as in `grouped_gemm`, `out_dtype` float32 or that of a."""
        if accumulate and out is None:
            raise ValueError(
                "grouped_gemm_wgrad: accumulate: expected out beside it, got none; pass the array "
                "to add to"
            )
        return self._wgrad(a, dc, offsets, starts, out, out_dtype, accumulate)

    def _wgrad(
        self, a: Any, dc: Any, offsets: Any, starts: Any, out: Any, out_dtype: Any,
        accumulate: bool,
    ) -> Any:  # fmt: skip
        dtype = self.dtype(self._result(a, out, out_dtype))
        bounds = self.ids(offsets), self.optional_ids(starts)
        if out is None or not self.writes(accumulate):
            return self.run("grouped_gemm_wgrad", a, dc, bounds[0], dtype, bounds[1])
        return self.run("grouped_gemm_wgrad_out", a, dc, bounds[0], out, accumulate, bounds[1])

    def writes(self, accumulate: bool) -> bool:
        """Whether a product that is given `out` needs it; arrays that never change are read only
        where they are added to."""
        return True

    def _placed(self, result: Any, out: Any) -> Any:
        return result if out is None else self.placed(result, out)

    def placed(self, result: Any, out: Any) -> Any:
        """`out` with the values of a result."""
        return result

    def fp8_product(self, a: Any, b: Any, offsets: Any, bias: Any, dtype: str) -> Any:
        """Of FP8 rows and FP8 blocks, where no kernel has it: the rows are dequantised."""
        wide = None if bias is None else self.array(bias).astype("float32")
        rows, kind = a.dequantize(), self.dtype("float32")
        return self.array(self.run("quantized_gemm", rows, *b, offsets, wide, kind)).astype(
            named(dtype)
        )

    def flat(self, out: Any) -> Any:
        """[E * M, N] in the memory of out [E, M, N]."""
        return out.reshape(-1, out.shape[2])
