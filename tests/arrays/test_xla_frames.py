# SPDX-License-Identifier: MIT
"""What XLA's handlers refuse while a program is traced: of every op one good call, and then each of
its arrays and attributes made wrong alone."""

import re
from math import ceil

import pytest

from kimi_ops._library import _C

SIZES = {"T": 11, "E": 6, "K": 2, "H": 16, "F": 5, "R": 29, "G": 3, "N": 20, "D": 136, "S": 4,
         "B": 9, "C": 7, "M": 13, "Q": 31}  # fmt: skip
# One float dtype for each of x and y; the others are fixed.
DTYPES = {"x": "float32", "y": "float32", "f": "float32", "h": "bfloat16", "e": "float8_e4m3fn",
          "i": "int32", "u": "uint32", "b": "bool"}  # fmt: skip

SCORE = {"score_function": "softmax"}
WEIGHTING = SCORE | {"renormalize": 1, "scaling_factor": 2.5}
CHOICE = WEIGHTING | {"k": 2, "num_groups": 3, "topk_groups": 2, "group_score_topk": 1,
                      "select": "scores"}  # fmt: skip
LAYER = {"activation": "situ", "numbers": [3.0, 2.0]}
FORM = {"b_is_nk": 0, "accumulate": 0}
STORED = FORM | {"b_is_nk": 1}
FLAGS = {"count": 2, "pieces": [0, 2, 2, 3]}
FP8_SCALE, FP8 = "f[G,ceil(N/128),ceil(D/128)]", "e[G,N,D]"
TWO, OTHERS = "x[M,Q] x[C,B]", "y[M,Q] y[C,B]"

# op, arrays of the call -> its results, attributes. A dtype, sizes; `?`: may be missing, `-`: is.
CALLS = [
    ("topk_gate", "x[T,E] ?f[E] ?b[T] -> f[T,K] i[T,K] i[E]", CHOICE),
    ("topk_gate_given", "x[T,E] i[T,K] ?b[T] -> f[T,K] i[T,K] i[E]", WEIGHTING),
    ("topk_gate_backward", "f[T,K] x[T,E] i[T,K] -> x[T,E]", WEIGHTING),
    ("gate_plan", "x[T,E] ?f[E] ?b[T] -> f[T,K] i[T,K] i[E] i[T,K] i[T*K] i[E]", CHOICE),
    ("update_expert_bias", "f[E] i[E] -> f[E]", {"rate": 0.1, "centered": 1}),
    ("sequence_counts", "i[T,K] ?i[S] ?b[T] -> i[S,E] i[S]",
     {"num_experts": 6, "num_sequences": 4}),
    ("sequence_balance_loss", "x[T,E] i[S,E] i[S] ?i[S] ?b[T] -> f[]",
     SCORE | {"k": 2, "coefficient": 0.1}),
    ("sequence_balance_loss_backward", "f[] x[T,E] i[S,E] i[S] ?i[S] ?b[T] -> x[T,E]",
     SCORE | {"k": 2, "coefficient": 0.1}),
    ("quantile_histogram", "i[E,B] x[T,E] f[T] f[2] ?b[T] -> i[E,B]", SCORE),
    ("z_loss", "x[T,E] ?b[T] -> f[] f[T] i[]", {"coefficient": 0.1}),
    ("z_loss_backward", "f[] x[T,E] f[T] i[] -> x[T,E]", {"coefficient": 0.1}),
    ("permute_plan", "i[T,K] -> i[T,K] i[T*K+E*3] i[E] i[E]", {"num_experts": 6, "align": 4}),
    ("permute", "x[T,H] i[T,K] i[R] -> x[R,H]", {}),
    ("unpermute", "x[R,H] i[T,K] ?f[T,K] -> x[T,H]", {}),
    ("unpermute_backward", "x[T,H] x[R,H] i[T,K] i[R] f[T,K] -> x[R,H] f[T,K]", {}),
    ("sort_chunks", "x[R,H] i[C] i[C] -> x[R,H]", {"inverse": 0}),
    ("grouped_gemm", "x[R,D] x[G,D,N] - i[G] ?x[G,N] ?i[G] -> f[R,N]", FORM),
    ("grouped_gemm", "x[R,D] x[G,N,D] - i[G] ?x[G,N] ?i[G] -> f[R,N]", STORED),
    ("grouped_gemm", f"x[R,D] {FP8} {FP8_SCALE} i[G] ?x[G,N] ?i[G] -> f[R,N]", STORED),
    ("grouped_gemm", "x[R,D] i[G,N,D//8] h[G,N,ceil(D/32)] i[G] ?x[G,N] ?i[G] -> f[R,N]", STORED),
    ("grouped_gemm", "x[R,D] x[G,D,N] - i[G] ?x[G,N] ?i[G] f[R,N] -> f[R,N]",
     FORM | {"accumulate": 1}),
    ("grouped_gemm_wgrad", "x[R,D] x[R,N] i[G] ?i[G] -> f[G,D,N]", {"accumulate": 0}),
    ("grouped_gemm_wgrad", "x[R,D] x[R,N] i[G] ?i[G] f[G,D,N] -> f[G,D,N]", {"accumulate": 1}),
    ("grouped_gemm_fp8", f"e[R,D] f[ceil(D/128),Q] {FP8} {FP8_SCALE} i[G] ?y[G,N] -> y[R,N]", {}),
    ("fused_experts",
     "x[T,H] x[E,2*F,H] - x[E,H,F] - ?x[E,2*F] ?x[E,H] f[T,K] i[T,K] i[T*K] i[E] -> "
     "x[T,H] x[T*K,2*F]", LAYER | {"weights_first": 0}),
    ("fused_experts_backward",
     "x[T,H] x[T,H] x[E,2*F,H] - x[E,H,F] - x[E,2*F] x[E,H] f[T,K] i[T,K] i[T*K] i[E] "
     "?x[T*K,2*F] -> x[T,H] x[E,2*F,H] x[E,H,F] f[T,K] x[E,2*F] x[E,H]", LAYER),
    ("matrix_product", "x[M,D] x[D,N] ?x[M,N] -> x[M,N]",
     {"symmetric": 0, "alpha": 1.0, "beta": 1.0}),
    ("matrix_product", "x[M,D] ?x[D,M] ?x[M,M] -> x[M,M]",
     {"symmetric": 1, "alpha": 1.0, "beta": 1.0}),
    ("newton_schulz", "x[G,M,N] -> x[G,M,N]",
     {"dtype": "float32", "method": "gram", "eps": 1e-7, "aol": 0,
      "coefficients": [1.5, -0.5, 0.0] * 2}),
    ("attention_max_logits", "x[B,H,Q,D] x[B,C,R,D] -> f[H]", {"scale": 1.0, "causal": 1}),
    ("clip_rows", "f[3] x[8,C] y[8,C] -> f[3] x[8,C] y[8,C]",
     {"count": 2, "layers": [2, 1, 1, 1], "geometry": [0, 2, 4, 0, 0, 0, 1, 1, 8, 0, 0, 0],
      "powers": [0.5, 1.0], "tau": 9.0}),
    ("muon_momentum", f"{TWO} {OTHERS} u[S,2] -> f[M,Q] f[C,B] {OTHERS}",
     FLAGS | {"momentum": 0.9, "nesterov": 1, "maximize": 0}),
    ("muon_update", f"{TWO} {OTHERS} u[S,2] ?u[2] ?u[2] -> {TWO}",
     FLAGS | {"rates": [0.1, 0.2], "decay": 0.1, "cautious": 1}),
    ("adamw",
     f"{TWO} {OTHERS} {2 * 'f[M,Q] f[C,B] '} f[] f[] u[S,2] ?f[] ?u[2] ?u[2] -> "
     f"{TWO} {2 * 'f[M,Q] f[C,B] '} f[] f[] u[S,2]",
     FLAGS | {"measure": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8,
              "weight_decay": 0.1, "maximize": 0, "cautious": 0}),
    ("squares", "u[S,2] x[M,Q] x[C,B] -> u[S,2]", FLAGS | {"lengths": [400, 3, 63]}),
    ("clip_factor", "u[S,2] -> f[]", FLAGS | {"max_norm": 1.0}),
]  # fmt: skip
NONE = ((0,), "float32")


def sizes_of(written):
    return [size for size in written.lstrip("?")[2:-1].split(",") if size]


def sides(arrays):
    """Of arguments and results: what was written, and the array."""
    for side in arrays.split("->"):
        yield [(w, NONE if w == "-" else (
            tuple(eval(size, {"ceil": ceil}, SIZES) for size in sizes_of(w)),
            DTYPES[w.lstrip("?")[0]])) for w in side.split()]  # fmt: skip


def traced(op, arguments, results, attributes):
    return _C.xla_traced(op, False, arguments, results, attributes | {"threads": 1})


def changed(values, at, value):
    return [*values[:at], value, *values[at + 1 :]]


def wrong(arrays):
    """(what, arguments, results): one array is none, or of another rank, dtype or size, where more
    than that array has it."""
    both = list(sides(arrays))
    names = re.findall(r"[A-Z]", arrays)
    kinds = re.findall(r"[xy]", arrays)
    for s, side in enumerate(both):
        for at, (written, (shape, dtype)) in enumerate(side):
            if written == "-":
                continue
            new = [("rank", ((*shape, 2), dtype))]
            if s == 0 and not written.startswith("?"):
                new.append(("none", NONE))
            if (kind := written.lstrip("?")[0]) not in kinds or kinds.count(kind) > 1:
                new.append(("dtype", (shape, "float16")))
            for i, size in enumerate(sizes_of(written)):
                if names.count(size) != 1:
                    new.append((f"size {i}", (tuple(changed(shape, i, shape[i] + 1)), dtype)))
            for what, array in new:
                found = [[array for _, array in one] for one in both]
                found[s] = changed(found[s], at, array)
                yield f"{'argument' if s == 0 else 'result'} {at} {written}: {what}", *found
        found = [[array for _, array in one] for one in both]
        yield f"side {s} without its last", *changed(found, s, found[s][:-1])
        yield f"side {s} and one more", *changed(found, s, [*found[s], NONE])


@pytest.mark.parametrize(("op", "arrays", "attributes"), CALLS, ids=[c[0] for c in CALLS])
def test_what_an_op_takes(op, arrays, attributes):
    arguments, results = ([array for _, array in side] for side in sides(arrays))
    traced(op, arguments, results, attributes)
    for at, written in enumerate(arrays.split("->")[0].split()):
        if written.startswith("?"):
            traced(op, changed(arguments, at, NONE), results, attributes)
    taken = []
    for what, *changes in wrong(arrays):
        try:
            traced(op, *changes, attributes)
            taken.append(what)
        except ValueError as error:
            assert str(error).startswith(f"{op}: ")
    for name, value in attributes.items():
        others = [attributes | {name: 1 if isinstance(value, float) else 0.5}]
        others.append({key: other for key, other in attributes.items() if key != name})
        if isinstance(value, list):
            others.append(attributes | {name: [*value, 1.0]})
        if isinstance(value, int):
            others.append(attributes | {name: value + 2**32})
        for bad in others:
            try:
                traced(op, arguments, results, bad)
                taken.append(f"{name}: {bad.get(name)}")
            except ValueError as error:
                assert str(error).startswith(f"{op}: ")
    assert taken == []


MUON = FLAGS | {"momentum": 0.9, "nesterov": 1, "maximize": 0}
MATRICES = FLAGS | {"rates": [0.1, 0.2], "decay": 0.1, "cautious": 1}
CLIPPED = {
    "count": 1,
    "layers": [3, 1],
    "geometry": [0, 3, 1, 0, 0, 0],
    "powers": [0.5],
    "tau": 9.0,
}
SUMMED = FLAGS | {"lengths": [400, 3, 63]}
PLANNED = "f[T,K] i[T,K] i[T*K] i[E]"

# Arrays that agree with each other, and numbers of a good type, that mean nothing.
REFUSED = [
    ("grouped_gemm", "x[R,D] e[G,D,N] f[G,ceil(D/128),ceil(N/128)] i[G] - - -> f[R,N]", FORM,
     "b: expected quantised weights as [E, N"),
    ("grouped_gemm", "x[R,D] e[G,N,D] - i[G] - - -> f[R,N]", STORED, "b: expected the scale"),
    ("grouped_gemm", "x[R,M] i[G,N,1] h[G,N,1] i[G] - - -> f[R,N]", STORED,
     "b: expected a multiple of 8 columns beside INT4 weights, got 13"),
    ("grouped_gemm", "x[R,D] x[G,D,N] - i[G] x[0,N] - -> f[R,N]", FORM,
     "bias: expected shape [3, 20]"),
    ("fused_experts", f"x[T,H] x[E,F,H] - x[E,H,2] - - - {PLANNED} -> x[T,H] x[0,F]",
     LAYER | {"weights_first": 0}, "w_gate_up: expected shape [E, 2F, H]"),
    ("fused_experts", f"x[T,H] x[E,2*F,H] - x[E,H,F] - - - {PLANNED} -> x[T,H] x[T,2*F]",
     LAYER | {"weights_first": 0}, "gate_up: expected a row for each pair, or none"),
    ("fused_experts", f"x[T,H] x[E,2*F,H] - x[E,H,F] - - - {PLANNED} -> x[T,H] x[0,2*F]",
     LAYER | {"weights_first": 0, "numbers": [3.0]}, "activation: expected 2 numbers, got 1"),
    ("fused_experts_backward",
     f"h[T,H] x[T,H] x[E,2*F,H] - x[E,H,F] - - - {PLANNED} - -> x[T,H] x[E,2*F,H] x[E,H,F] f[T,K]",
     LAYER, "dy: expected the shape and dtype of x"),
    ("newton_schulz", "x[G,M,N] -> x[G,M,N]",
     {"dtype": "float32", "method": "gram", "eps": 1e-7, "aol": 0, "coefficients": []},
     "coefficients: expected three numbers a step"),
    ("muon_update", "x[M,Q,2] x[C,B] y[M,Q,2] y[C,B] u[S,2] - - -> x[M,Q,2] x[C,B]", MATRICES,
     "params: expected matrices"),
    ("adamw", "x[M] x[M] f[M] f[M] f[2] - - - - -> x[M] f[M] f[M] f[2]",
     {"count": 1, "measure": 0, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8,
      "weight_decay": 0.1, "maximize": 0, "cautious": 0},
     "steps: expected a number for each array"),
    ("clip_rows", "f[3] x[3,C,2] -> f[3] x[3,C,2]", CLIPPED, "weights[0]: expected [rows, in]"),
    ("clip_rows", "f[3] x[] -> f[3] x[]", CLIPPED, "weights[0]: expected [rows, in]"),
    ("squares", "u[S,2] -> u[S,2]", SUMMED | {"count": 0}, "x: expected at least one array"),
    ("clip_factor", "- -> f[]", FLAGS | {"max_norm": 1.0, "pieces": []},
     "pieces: expected two numbers for each array, got none"),
    *[(op, arrays, attributes | {"pieces": pieces}, "pieces: expected first < end within 0..4")
      for op, arrays, attributes in (
          ("muon_momentum", f"{TWO} {OTHERS} u[S,2] -> f[M,Q] f[C,B] {OTHERS}", MUON),
          ("clip_factor", "u[S,2] -> f[]", FLAGS | {"max_norm": 1.0}))
      for pieces in ([-1, 2, 2, 3], [0, 0, 2, 3], [0, 2, 3, 2], [0, 2, 2, 5], [0, 2])],
    *[("squares", f"u[S,2] {TWO} -> u[S,2]", SUMMED | wrong, "pieces, lengths: expected first, end")
      for wrong in ({"pieces": [-1, 1, 2, 3]}, {"pieces": [0, 2, 4, 5]}, {"lengths": [400, 3, 62]},
                    {"lengths": [400, 4, 63]}, {"lengths": [404, -1, 63]}, {"lengths": [400, 3]},
                    {"pieces": [0, 2, 2, 2]}, {"pieces": [0, 2]})],
]  # fmt: skip


@pytest.mark.parametrize(("op", "arrays", "attributes", "message"), REFUSED)
def test_what_means_nothing(op, arrays, attributes, message):
    given = ([array for _, array in side] for side in sides(arrays))
    with pytest.raises(ValueError, match=f"^{op}: {re.escape(message)}"):
        traced(op, *given, attributes)
