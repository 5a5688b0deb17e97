# SPDX-License-Identifier: MIT
"""Calls that `kimi_ops`, `kimi_ops.numpy` and `kimi_ops.jax` write alike: every option of every op
that all have. A case takes the module and its arrays by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_ops.activations import GPT_OSS, situ, ungated

T, H, F, E, K = 12, 32, 24, 4, 2
RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    function: Callable[..., Any]
    inputs: dict[str, np.ndarray]
    wrt: tuple[str, ...]  # what has a gradient
    tolerance: float  # 0: the same bits
    jax: bool = True  # False: said by another case there, where each is a program to compile


CASES: dict[str, Case] = {}


def case(
    name: str, *wrt: str, tolerance: float = 0.0, jax: bool = True, **inputs: np.ndarray
) -> Any:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        assert name not in CASES
        CASES[name] = Case(function, inputs, wrt, tolerance, jax)
        return function

    return register


def f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


def i(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


LOGITS, IDS = f(T, E), np.argsort(f(T, E), axis=1)[:, :K].astype(np.int32)
IDS[3, 1], IDS[5, 0] = -1, E
WEIGHTS = np.abs(f(T, K))
VALID = np.arange(T) % 5 > 0
MASK = RANDOM.random((T, E)) > 0.3
X, UP, DOWN = f(T, H), f(E, 2 * F, H) / 4, f(E, H, F) / 4
BIASES = {"b_gate_up": f(E, 2 * F), "b_down": f(E, H)}
A, B, ENDS = f(10, 8), f(3, 8, 5), i(4, 4, 9)

# ---- the router

for _score in ("sigmoid", "softmax", "sqrtsoftplus"):
    _options = {"score_function": _score, "scaling_factor": 2.5}
    case(f"topk_gate {_score}", "z", z=LOGITS)(lambda k, z, o=_options: k.topk_gate(z, K, **o))
    case(f"topk_gate {_score} of ids", "z", z=LOGITS, ids=IDS.astype(np.int64))(
        lambda k, z, ids, o=_options: k.topk_gate(z, ids=ids, **o)
    )
    case(f"normalized_scores {_score}", "z", tolerance=1e-6, z=LOGITS)(
        lambda k, z, s=_score: k.normalized_scores(z, s)
    )
case("topk_gate with options", "z", z=f(T, 8), bias=f(8), valid=VALID)(
    lambda k, z, bias, valid: k.topk_gate(
        z, 3, expert_bias=bias, num_groups=4, topk_groups=2, group_score_topk=1, valid=valid,
        renormalize=False, select="logits",
    )
)  # fmt: skip
case("topk_gate of ids and valid tokens", "z", z=LOGITS, ids=IDS, valid=VALID)(
    lambda k, z, ids, valid: k.topk_gate(z, ids=ids, valid=valid, renormalize=False)
)
case("topk_gate with a mask", "z", z=LOGITS.reshape(3, 4, E), mask=MASK.reshape(3, 4, E))(
    lambda k, z, mask: k.topk_gate(z, K, mask=mask)
)
case("topk_gate with a mask of experts", "z", z=LOGITS, mask=MASK[0], valid=VALID)(
    lambda k, z, mask, valid: k.topk_gate(z, K, mask=mask, valid=valid)
)
case("gate_plan", "z", z=LOGITS, bias=f(E), valid=VALID)(
    lambda k, z, bias, valid: k.gate_plan(z, K, expert_bias=bias, valid=valid)
)
case("dense_gate", "z", tolerance=1e-6, z=LOGITS.reshape(3, 4, E))(lambda k, z: k.dense_gate(z, K))
case("dense_gate of ids", "z", tolerance=1e-6, z=LOGITS, ids=IDS)(
    lambda k, z, ids: k.dense_gate(z, ids=ids)
)

# ---- balance

case("sequence_counts", ids=IDS, ends=i(5, 5, 11), valid=VALID)(
    lambda k, ids, ends, valid: k.sequence_counts(ids, E, offsets=ends, valid=valid)
)
case("sequence_balance_loss", "z", z=LOGITS, ids=IDS)(
    lambda k, z, ids: k.sequence_balance_loss(z, ids, num_sequences=3)
)
case("sequence_balance_loss of lengths", "z", z=LOGITS, ids=IDS, ends=i(5, 5, 11), valid=VALID)(
    lambda k, z, ids, ends, valid: k.sequence_balance_loss(
        z, ids, offsets=ends, valid=valid, score_function="softmax", coefficient=0.5
    )
)
case(
    "sequence_balance_loss of counts", "z", z=LOGITS, ids=IDS, counts=i([9, 4, 3, 8]), tokens=i(24)
)(
    lambda k, z, ids, counts, tokens: k.sequence_balance_loss(
        z, ids, tokens_per_expert=counts, sequence_tokens=tokens
    )
)
case("z_loss", "z", z=LOGITS, valid=VALID)(lambda k, z, valid: k.z_loss(z, valid=valid))
case("quantile_bias", tolerance=1e-6, histogram=RANDOM.integers(0, 90, (E, 64), np.int32),
     bounds=np.array([-1, 1], np.float32))(
    lambda k, histogram, bounds: k.quantile_bias(histogram, K, bounds=bounds)
)  # fmt: skip
for _by in ("weights", "position"):
    case(f"drop_to_capacity by {_by}", "weights", weights=WEIGHTS, ids=IDS)(
        lambda k, weights, ids, by=_by: k.drop_to_capacity(weights, ids, E, 4, by=by)
    )

_FAULTY = np.where(np.arange(T * K).reshape(T, K) % 3 == 0, np.nan, WEIGHTS)
_FAULTY[::5] = -np.inf  # in the order of the pairs among NaN
case("drop_to_capacity of NaN", weights=_FAULTY, ids=IDS)(
    lambda k, weights, ids: k.drop_to_capacity(weights, ids, E, 4).indices
)

# ---- rows

for _name, _options in {
    "align": {"align": 4}, "capacity": {"capacity": 3}, "wide capacity": {"capacity": 9},
    "few rows": {"num_out_tokens": 9}, "many rows": {"num_out_tokens": 40},
}.items():  # fmt: skip
    case(f"permute_plan {_name}", ids=IDS.astype(np.int64))(
        lambda k, ids, o=_options: k.permute_plan(ids, E, **o)
    )
case("permute_plan of a map", there=MASK)(lambda k, there: k.permute_plan(there, E))
case("there and back", "x", "weights", x=X, weights=WEIGHTS, ids=IDS)(
    lambda k, x, weights, ids: k.unpermute(
        k.permute(x, plan := k.permute_plan(ids, E, capacity=5)), plan, weights
    )
)
case("permute_weights", "weights", weights=WEIGHTS, ids=IDS)(
    lambda k, weights, ids: k.permute_weights(weights, k.permute_plan(ids, E, align=3))
)
case("permute of bytes", x=RANDOM.integers(0, 255, (T, 5)).astype(np.uint8), ids=IDS)(
    lambda k, x, ids: k.permute(x, k.permute_plan(ids, E))
)
case("sort_chunks", "x", x=A, sizes=i(2, 4, 3), order=i(2, 0, 1))(
    lambda k, x, sizes, order: k.sort_chunks(x, sizes, order)
)

# ---- products

case("grouped_gemm", "a", "b", "bias", a=A, b=B, ends=ENDS, bias=f(3, 5))(
    lambda k, a, b, ends, bias: k.grouped_gemm(a, b, ends, bias=bias)
)
case("grouped_gemm with gaps", "a", "b", "bias", a=A, b=B, ends=ENDS, starts=i(1, 4, 6),
     bias=f(3, 5))(
    lambda k, a, b, ends, starts, bias: k.grouped_gemm(a, b, ends, starts=starts, bias=bias)
)  # fmt: skip
case("grouped_gemm of matrices", "a", "b", a=f(3, 6, 8), b=B, bias=f(3, 5))(
    lambda k, a, b, bias: k.grouped_gemm(a, b, bias=bias)
)
case("grouped_gemm of counts", "a", "b", a=f(3, 6, 8), b=B, counts=i(6, 0, 2))(
    lambda k, a, b, counts: k.grouped_gemm(a, b, counts=counts)
)
case("grouped_gemm of columns", "a", "b", tolerance=1e-6, a=f(3, 6, 8), b=f(8, 10), ends=ENDS)(
    lambda k, a, b, ends: k.grouped_gemm(a, b, ends)
)
case("grouped_gemm of depths", "a", "b", a=f(6, 10), b=f(10, 5), ends=ENDS)(
    lambda k, a, b, ends: k.grouped_gemm(a, b, ends)
)
case("grouped_gemm added", a=A, b=B, ends=ENDS, starts=i(1, 4, 6), out=f(10, 5))(
    lambda k, a, b, ends, starts, out: k.grouped_gemm(
        a, b, ends, starts=starts, out=out, accumulate=True
    )
)
case("grouped_gemm added to matrices", a=f(3, 6, 8), b=B, counts=i(6, 0, 2), out=f(3, 6, 5))(
    lambda k, a, b, counts, out: k.grouped_gemm(a, b, counts=counts, out=out, accumulate=True)
)
case("grouped_gemm to out", a=A, b=B, ends=ENDS, out=f(10, 5))(
    lambda k, a, b, ends, out: k.grouped_gemm(a, b, ends, out=out)
)
case("grouped_gemm_wgrad", "a", "dc", a=A, dc=f(10, 5), ends=ENDS, starts=i(1, 4, 6))(
    lambda k, a, dc, ends, starts: k.grouped_gemm_wgrad(a, dc, ends, starts=starts)
)
case("grouped_gemm_wgrad added", a=A, dc=f(10, 5), ends=ENDS, out=f(3, 8, 5))(
    lambda k, a, dc, ends, out: k.grouped_gemm_wgrad(a, dc, ends, out=out, accumulate=True)
)
for _form in ("Fp8BlockWeight", "Int4GroupWeight"):
    case(f"{_form} quantize", w=f(2, 150, 136))(
        lambda k, w, form=_form: tuple(map(getattr(k, form).quantize(w).__getattribute__,
                                           ("packed" if "Int4" in form else "data", "scale")))
    )  # fmt: skip
    case(
        f"grouped_gemm with {_form}", "a", a=f(10, 136), w=f(3, 20, 136), ends=ENDS, tolerance=1e-6
    )(lambda k, a, w, ends, form=_form: k.grouped_gemm(a, getattr(k, form).quantize(w), ends))
    case(f"fused_experts with {_form}", "x", "weights", x=X, up=UP, down=DOWN, weights=WEIGHTS,
         ids=IDS, tolerance=1e-5)(
        lambda k, x, up, down, weights, ids, form=_form: k.fused_experts(
            x, getattr(k, form).quantize(up), getattr(k, form).quantize(down), weights, ids
        )
    )  # fmt: skip
case("Fp8Rows quantize", x=f(7, 200))(
    lambda k, x: (k.Fp8Rows.quantize(x).data, k.Fp8Rows.quantize(x).scale)
)
case("grouped_gemm of FP8 rows", a=f(10, 136), w=f(3, 20, 136), ends=ENDS, bias=f(3, 20))(
    lambda k, a, w, ends, bias: k.grouped_gemm(
        k.Fp8Rows.quantize(a), k.Fp8BlockWeight.quantize(w), ends, bias=bias, out_dtype=bias.dtype
    )
)

# ---- experts

_LAYER = {"x": X, "up": UP, "down": DOWN, "weights": WEIGHTS, "ids": IDS}
for _name, _activation in {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu2": "relu2", "situ": "situ",
    "numbers": situ(2.0, None), "limits": GPT_OSS,
}.items():  # fmt: skip
    case(f"fused_experts {_name}", "x", "up", "down", "weights", **_LAYER)(
        lambda k, x, up, down, weights, ids, a=_activation: k.fused_experts(
            x, up, down, weights, ids, activation=a
        )
    )
    case(f"fused_experts {_name} without a gate", "x", "up", "down", "weights", tolerance=1e-5,
         jax=_name in ("gelu", "relu2", "numbers"), **(_LAYER | {"up": UP[:, :F]}))(
        lambda k, x, up, down, weights, ids, a=_activation: k.fused_experts(
            x, up, down, weights, ids, activation=ungated(a)
        )
    )  # fmt: skip
    case(f"fused_experts {_name} of two", "x", "w1", "w3", "down", "weights", tolerance=1e-5,
         jax=_name in ("gelu_tanh", "situ", "limits"), x=X, w1=UP[:, :F], w3=UP[:, F:], down=DOWN,
         weights=WEIGHTS, ids=IDS, **BIASES)(
        lambda k, x, w1, w3, down, weights, ids, b_gate_up, b_down, a=_activation: k.fused_experts(
            x, (w1, w3), down, weights, ids, b_gate_up=b_gate_up, b_down=b_down, activation=a
        )
    )  # fmt: skip
for _recompute in (False, True):
    case(f"fused_experts with biases, recompute={_recompute}", "x", "up", "down", "weights",
         "b_gate_up", "b_down", **_LAYER, **BIASES)(
        lambda k, x, up, down, weights, ids, b_gate_up, b_down, r=_recompute: k.fused_experts(
            x, up, down, weights, ids, b_gate_up=b_gate_up, b_down=b_down, recompute=r
        )
    )  # fmt: skip
for _alone in BIASES:
    case(f"fused_experts with {_alone} alone", "x", "up", "down", "weights", "bias",
         **_LAYER, bias=BIASES[_alone])(
        lambda k, x, up, down, weights, ids, bias, a=_alone: k.fused_experts(
            x, up, down, weights, ids, **{a: bias}
        )
    )  # fmt: skip
case("fused_experts weights_first", "x", "up", "down", "weights", **_LAYER)(
    lambda k, x, up, down, weights, ids: k.fused_experts(
        x, up, down, weights, ids, weights_first=True, plan=k.permute_plan(ids, E)
    )
)
case("fused_experts weights_first with biases", "x", "up", "down", "weights", "b_down",
     tolerance=1e-5, **_LAYER, b_down=BIASES["b_down"])(
    lambda k, x, up, down, weights, ids, b_down: k.fused_experts(
        x, up, down, weights, ids, weights_first=True, b_down=b_down
    )
)  # fmt: skip

# ---- the optimizer

for _name, _options in {
    "quintic": {}, "aol": {"coefficients": "aol", "steps": 4},
    "gram": {"method": "gram", "coefficients": "polar_express"},
    "restarts": {"method": "gram", "restarts": (1, 3)}, "auto": {"dtype": "float32"},
    "standard": {"method": "standard"}, "symmetric": {"method": "symmetric"},
    "triples": {"coefficients": [(1.5, -0.5, 0.0)] * 8, "steps": 8, "eps": 20.0},
}.items():  # fmt: skip
    case(f"newton_schulz {_name}", g=f(2, 5, 9))(
        lambda k, g, o=_options: k.newton_schulz(
            g, **({**o, "dtype": g.dtype} if "dtype" in o else o)
        )
    )
case("newton_schulz of a list", g=f(5, 9), h=f(2, 4, 4))(lambda k, g, h: k.newton_schulz([g, h]))
case("syrk", a=f(2, 5, 9), c=f(2, 5, 5))(
    lambda k, a, c: k.syrk(a, c=c + c.swapaxes(1, 2), alpha=0.5, beta=2.0)
)
case("symmetric_matmul", tolerance=1e-6, a=f(5, 5))(
    lambda k, a: k.symmetric_matmul(s := a @ a.T, s)
)
case("attention_max_logits of a few queries", q=f(2, 4, 3, 8), k=f(2, 2, 6, 8))(
    lambda ops, **x: ops.attention_max_logits(x["q"], x["k"], 0.25)
)
case("attention_max_logits", q=f(2, 4, 6, 8), k=f(2, 2, 6, 8))(
    lambda ops, **x: ops.attention_max_logits(x["q"], x["k"], 0.25, causal=False)
)
