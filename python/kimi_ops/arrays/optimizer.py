# SPDX-License-Identifier: MIT
"""What the optimizer multiplies, and its passes over lists of arrays.

A pass changes arrays of NumPy where they lie. Those of JAX never change: it returns new ones, in
the memory of those that are donated. `squares` [N] are float64 sums of squares of pieces of
gradients; JAX, which has no float64 unless asked, holds their bits as uint32 [N, 2].
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from kimi_ops import _arguments as check
from kimi_ops._forms import fastest_method
from kimi_ops.arrays.door import Door, name_of
from kimi_ops.choices import AnyMethod
from kimi_ops.optim.ns_schedule import METHODS, Coefficients, checked_restarts, has_aol, schedule

Pieces = Sequence[tuple[int, int]]  # of each array: its first piece and the one behind its last


class Optimizer(Door):
    def newton_schulz(
        self,
        g: Any,
        *,
        steps: int = 5,
        coefficients: Coefficients = "quintic",
        method: AnyMethod = "auto",
        dtype: Any = None,
        restarts: Literal["auto"] | Sequence[int] = "auto",
        eps: float = 0.0,
    ) -> Any:
        """`kimi_ops.newton_schulz`: matrices [..., M, N], or a list of such arrays, with singular
        values near 1. Not differentiable.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.newton_schulz(np.eye(3, 5, dtype=np.float32)).shape
        (3, 5)
        """
        op = "newton_schulz"
        options: dict[str, Any] = {
            "steps": steps, "coefficients": coefficients, "method": method, "dtype": dtype,
            "restarts": restarts, "eps": eps,
        }  # fmt: skip
        if isinstance(g, (list, tuple)):
            return [self.newton_schulz(x, **options) for x in g]
        check.choice(op, "method", method, get_args(AnyMethod))
        if not check.number(op, "eps", eps) >= 0:
            raise ValueError(f"{op}: eps: expected a number >= 0, got {eps}; 0 guards exact zeros")
        rows = schedule(coefficients, steps)
        g = _matrices(op, self.array(g), "g")
        m, n = g.shape[-2:]
        if dtype is None:
            fine = "float16" if self.on_gpu else "float32"
            dtype = fine if method == "gram" else "bfloat16"
        found = list(checked_restarts(rows, method, restarts))
        form = fastest_method(m, n, name_of(dtype), self.on_gpu) if method == "auto" else method
        if form != "gram":
            found = []
        if g.size == 0:
            return g
        numbers = [number for row in rows for number in row]
        code, aol = METHODS.index(form), has_aol(coefficients)
        stack = g.reshape(-1, m, n) if g.ndim > 2 else g[None]
        x = self.run(
            op, self.matrices(stack), numbers, found, code, self.dtype(dtype), float(eps), aol
        )
        return self.array(x).reshape(g.shape)

    def matrices(self, stack: Any) -> Any:
        """The matrices of a stack, as the native function takes them."""
        return stack

    def syrk(self, a: Any, *, c: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
        """`kimi_ops.syrk`: alpha a a^T + beta c [..., M, M], of a [..., M, K] and symmetric c, bit
        for bit symmetric. Not differentiable.

        Examples
        --------
        >>> import numpy as np
        >>> import kimi_ops.numpy as kn
        >>> kn.syrk(np.array([[1, 2], [3, 4]], np.float32))
        array([[ 5., 11.],
               [11., 25.]], dtype=float32)
        """
        a = _matrices("syrk", self.array(a))
        return self._products("syrk", a, a.swapaxes(-1, -2), c, alpha, beta)

    def symmetric_matmul(
        self, a: Any, b: Any, *, c: Any = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Any:
        """`kimi_ops.symmetric_matmul`: alpha a b + beta c of symmetric matrices [..., M, M], of
        which a and b commute: bit for bit symmetric. Not differentiable."""
        op, a = "symmetric_matmul", self.array(a)
        if _matrices(op, a).shape[-1] != a.shape[-2]:
            raise ValueError(
                f"{op}: a: expected [..., m, m], got shape {tuple(a.shape)}; give a square matrix"
            )
        return self._products(op, a, self.array(b), c, alpha, beta)

    def _products(self, op: str, a: Any, b: Any, c: Any, alpha: float, beta: float) -> Any:
        check.number(op, "alpha", alpha)
        if check.number(op, "beta", beta) != 0 and c is None:
            raise ValueError(f"{op}: beta: {beta} needs a matrix c, got none; give c or leave it 0")
        size, xp = a.shape[-2], self.space(a)
        shape = *a.shape[:-1], size
        check.shape(op, "b", b, (*a.shape[:-2], a.shape[-1], size))
        stacks = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
        if c is not None:
            check.shape(op, "c", c, shape)
            stacks.append(self.array(c).reshape(-1, size, size))
        images = [
            self.run("matrix_product", *matrices, *[None] * (c is None), float(alpha), float(beta),
                     True)
            for matrices in zip(*stacks, strict=True)
        ]  # fmt: skip
        return xp.stack(images).reshape(shape) if images else xp.zeros(shape, a.dtype)

    def attention_max_logits(self, q: Any, k: Any, scale: float, *, causal: bool = True) -> Any:
        """`kimi_ops.attention_max_logits`: [heads] float32 of q, k [B, heads, S, D]. Not
        differentiable."""
        return self.run("attention_max_logits", q, k, float(scale), bool(causal))

    # ---- passes

    def clip_rows(
        self, weights: Sequence[Any], max_logits: Any, layers: Sequence[int],
        geometry: Sequence[int], powers: Sequence[float], tau: float,
    ) -> Any:  # fmt: skip
        """What `kimi_ops.qk_clip_` does to projections [rows, in], for the heads of all layers at
        once: gamma [H] = min(1, tau / max_logits), and rows scaled by its powers.

        `layers` has (heads, members) of each layer, `geometry` (layer, blocks, block_rows,
        first_row, shared, whole) of each weight: of each of its blocks the first `shared` rows take
        gamma ** power and the `whole` next ones gamma.

        NumPy changes `weights` and returns gamma; JAX returns gamma and the new weights.
        """
        lists = [int(x) for x in layers], [int(x) for x in geometry], [float(x) for x in powers]
        return self.run("clip_rows_", list(weights), max_logits, *lists, float(tau))

    def muon_momentum(
        self, grads: Sequence[Any], buffers: Sequence[Any], momentum: float,
        nesterov: bool = True, maximize: bool = False, squares: Any = None, pieces: Pieces = (),
    ) -> Any:  # fmt: skip
        """buffers = momentum buffers + (1 - momentum) grads, and what Newton-Schulz takes of each:
        the buffer, or with `nesterov` momentum buffer + (1 - momentum) grad, float32. `maximize`
        negates the gradients. An array whose `pieces` of `squares` are not all finite is left
        alone, and its update is zero.

        NumPy changes `buffers` and returns the updates; JAX returns the updates and new buffers.
        """
        flags = squares, _edges(pieces)
        return self.run(
            "muon_momentum_", list(grads), list(buffers), float(momentum), bool(nesterov),
            bool(maximize), *flags,
        )  # fmt: skip

    def muon_update(
        self, params: Sequence[Any], directions: Sequence[Any], rates: Sequence[float],
        decay: float = 0.0, cautious: bool = False, squares: Any = None, pieces: Pieces = (),
        lr: Any = None, weight_decay: Any = None,
    ) -> Any:  # fmt: skip
        """params = (1 - decay) params - rates directions, matrices [m, n]; `decay` is the learning
        rate times the weight decay. `cautious` decays where the step goes towards zero alone. `lr`
        is a factor [] of rates and decay, `weight_decay` one of decay, both arrays.

        NumPy changes `params`; JAX returns new ones.
        """
        flags = squares, _edges(pieces)
        return self.run(
            "muon_update_", list(params), list(directions), [float(x) for x in rates],
            float(decay), bool(cautious), *flags, lr, weight_decay,
        )  # fmt: skip

    def adamw(
        self, params: Sequence[Any], grads: Sequence[Any], exp_avgs: Sequence[Any],
        exp_avg_sqs: Sequence[Any], steps: Sequence[Any], lr: float = 1e-3, beta1: float = 0.9,
        beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0, maximize: bool = False,
        cautious: bool = False, squares: Any = None, pieces: Pieces = (), measure: bool = False,
        scale: Any = None, lr_factor: Any = None, weight_decay_factor: Any = None,
    ) -> Any:  # fmt: skip
        """One update of `torch.optim.AdamW` of each parameter: states float32 of its shape, steps
        [] float32 of each. `scale` [] is a factor of the gradients, `lr_factor` [] and
        `weight_decay_factor` [] of the two numbers. `measure` finds out by itself which gradients
        are finite, and says so in the first piece of each.

        NumPy changes params, states, steps and squares; JAX returns the four lists, and the squares
        where they are measured.
        """
        lists = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps)]
        numbers = [float(x) for x in (lr, beta1, beta2, eps, weight_decay)]
        flags = squares, _edges(pieces), bool(measure)
        return self.run(
            "adamw_", *lists, *numbers, bool(maximize), bool(cautious), *flags, scale, lr_factor,
            weight_decay_factor,
        )  # fmt: skip

    def squares(
        self, squares: Any, x: Sequence[Any], pieces: Pieces, lengths: Sequence[int]
    ) -> Any:
        """The sum of squares of every piece of arrays, to its place in `squares`: the pieces of an
        array are runs of `lengths` elements.

        NumPy changes `squares`; JAX returns new ones.
        """
        return self.run("squares_", squares, list(x), _edges(pieces), [int(n) for n in lengths])

    def clip_factor(self, squares: Any, pieces: Pieces, max_norm: float) -> Any:
        """min(1, max_norm / norm) [] float32 of the gradients whose `pieces` of `squares` are
        finite."""
        return self.run("clip_factor", squares, _edges(pieces), float(max_norm))


def _matrices(op: str, x: Any, name: str = "a") -> Any:
    if x.ndim < 2:
        raise ValueError(
            f"{op}: {name}: expected [..., m, n], got shape {tuple(x.shape)}; give it as a matrix"
        )
    return x


def _edges(pieces: Pieces) -> list[int]:
    return [int(edge) for piece in pieces for edge in piece]
