# SPDX-License-Identifier: MIT
"""The pictures of the pages: ``python docs/site/figures.py`` draws docs/figures/*.svg anew."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.drawing import BLUE, EXPERTS, GREEN, GREY, ORANGE, PALE, PINK, SKY, YELLOW, Drawing

FOLDER = Path(__file__).resolve().parents[1] / "figures"


def topk_gate() -> Drawing:
    d = Drawing(720, 200, "Scores, biased scores, the chosen experts and their weights")
    scores = [0.30, 0.82, 0.45, 0.66, 0.15, 0.58, 0.72, 0.38]
    bias = [0.02, -0.26, 0.05, 0.04, 0.0, 0.20, -0.02, 0.03]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    chosen = sorted(range(8), key=lambda e: (-biased[e], e))[:3]
    for e in range(8):
        color = EXPERTS[chosen.index(e)] if e in chosen else PALE
        d.box(20 + 25 * e, 150 - 110 * scores[e], 20, 110 * scores[e], PALE)
        d.box(270 + 25 * e, 150 - 110 * biased[e], 20, 110 * biased[e], color)
        d.text(280 + 25 * e, 166, str(e), anchor="middle")
    d.text(20, 24, "s = score(logits)")
    d.text(270, 24, "c = s + bias: chooses")
    d.text(270, 188, "k = 3 largest; equal: the lower id", fill=GREY)
    d.arrow(226, 100, 262, 100)
    d.arrow(476, 100, 512, 100)
    d.text(520, 24, "w = s / sum of the chosen s")
    total = sum(scores[e] for e in chosen)
    for j, e in enumerate(chosen):
        width = 140 * scores[e] / total
        d.box(580, 50 + 34 * j, width, 22, EXPERTS[j])
        d.text(520, 66 + 34 * j, f"expert {e}")
        d.text(586 + width, 66 + 34 * j, f"{scores[e] / total:.2f}")
    d.text(520, 166, "the bias weighs nothing", fill=GREY)
    return d


def balance() -> Drawing:
    d = Drawing(
        720, 190, "The bias of an expert follows the sign of its load's distance from the mean"
    )
    for panel, loads in enumerate(((9, 2, 6, 4, 3), (6, 4, 5, 5, 4))):
        left, mean = 20 + 370 * panel, sum(loads) / len(loads)
        for e, n in enumerate(loads):
            color = ORANGE if n > mean else BLUE
            d.box(left + 44 * e, 140 - 11 * n, 34, 11 * n, color)
            d.text(left + 17 + 44 * e, 156, f"n{e}", anchor="middle")
            if not panel:
                d.text(
                    left + 17 + 44 * e,
                    176,
                    "- rate" if n > mean else "+ rate",
                    anchor="middle",
                    size=10,
                )
        d.line(left - 6, 140 - 11 * mean, left + 220, 140 - 11 * mean, dash=True)
        d.text(left + 224, 144 - 11 * mean, "mean")
    d.text(20, 24, "tokens of each expert in a step")
    d.text(390, 24, "some steps later")
    d.arrow(300, 60, 370, 60)
    d.text(285, 50, "bias += rate sign(mean - n)", size=10)
    return d


def permute() -> Drawing:
    d = Drawing(720, 250, "Tokens, their rows sorted by expert, and the weighted way back")
    ids = [(0, 2), (1, 0), (2, 3), (0, 1)]
    pairs = sorted((e, t, k) for t, row in enumerate(ids) for k, e in enumerate(row))
    for t in range(4):
        for x in (20, 560):
            d.box(x, 60 + 46 * t, 140 if x == 20 else 120, 26, PALE, f"token {t}")
        for k, e in enumerate(ids[t]):
            d.box(164 + 24 * k, 60 + 46 * t, 22, 26, EXPERTS[e], str(e))
    for r, (e, t, _) in enumerate(pairs):
        y = 38 + 25 * r
        d.box(310, y, 110, 22, EXPERTS[e], f"token {t}")
        d.line(212, 73 + 46 * t, 308, y + 11, EXPERTS[e], width=1.5)
        d.line(422, y + 11, 558, 73 + 46 * t, EXPERTS[e], width=1.5)
    d.text(20, 24, "x [T, H] and ids [T, K]")
    d.text(310, 24, "permute: rows by (expert, token, slot)")
    d.text(560, 48, "unpermute: sum of w y")
    return d


def grouped_gemm() -> Drawing:
    d = Drawing(720, 210, "Rows of each group times the matrix of their expert")
    y = 40
    for e, rows in enumerate((3, 1, 4)):
        height = 18 * rows
        d.box(20, y, 150, height, EXPERTS[e], f"{rows} rows of expert {e}")
        d.box(490, y, 180, height, EXPERTS[e], f"a b[{e}]")
        d.line(180, y + height, 250, y + height, dash=True)
        d.text(184, y + height - 4, f"offsets[{e}] = {(3, 4, 8)[e]}", size=10)
        d.box(290 + 14 * e, 60 + 22 * e, 110, 70, EXPERTS[e], f"b[{e}]" if e == 2 else "")
        y += height
    d.box(20, y, 150, 18, PALE, "rows past the last")
    d.box(490, y, 180, 18, PALE, "zero")
    d.text(20, 26, "a [R, K]")
    d.text(290, 26, "b [E, K, N], where it lies")
    d.text(490, 26, "c [R, N]")
    d.text(262, 110, "x", size=18)
    d.text(454, 110, "=", size=18)
    return d


def fused_experts() -> Drawing:
    d = Drawing(720, 150, "One op: gather, gate and up, activation, down, weighted sum")
    steps = [
        ("x [T, H]", PALE), ("gather", SKY), ("gate | up", BLUE), ("act(g) u", GREEN),
        ("down", BLUE), ("sum of w", ORANGE), ("y [T, H]", PALE),
    ]  # fmt: skip
    for i, (name, color) in enumerate(steps):
        d.box(14 + 101 * i, 50, 82, 36, color, name)
        if i:
            d.arrow(97 + 101 * (i - 1), 68, 113 + 101 * (i - 1), 68)
    d.line(115, 104, 398, 104, GREY, width=2)
    d.text(256, 122, "while it is in the cache", anchor="middle", fill=GREY)
    d.line(418, 104, 602, 104, GREY, width=2)
    d.text(510, 122, "by columns, in slot order, rounded once", anchor="middle", fill=GREY)
    d.text(14, 30, "[T K, H] gathered rows never exist in memory (CPU)", fill=GREY)
    return d


def newton_schulz() -> Drawing:
    d = Drawing(720, 300, "Singular values after one to five steps of the quintic polynomial")
    left, bottom, wide, high = 50, 262, 460, 220

    def place(s: float, v: float) -> tuple[float, float]:
        return left + wide * (math.log10(s) + 3) / 3, bottom - high * v / 1.25

    for power in range(-3, 1):
        x, _ = place(10.0**power, 0)
        d.line(x, bottom, x, bottom - high, PALE)
        d.text(x, bottom + 16, f"{10.0**power:g}", anchor="middle")
    for v in (0.0, 0.5, 1.0):
        _, y = place(1.0, v)
        d.line(left, y, left + wide, y, GREY if v == 1 else PALE, dash=v == 1)
        d.text(left - 6, y + 4, f"{v:g}", anchor="end")
    places = [10 ** (-3 + 3 * i / 300) for i in range(301)]
    values = list(places)
    for step, color in enumerate((SKY, PINK, GREEN, ORANGE, BLUE), 1):
        values = [3.4445 * v - 4.775 * v**3 + 2.0315 * v**5 for v in values]
        d.curve([place(s, v) for s, v in zip(places, values, strict=True)], color)
        d.line(530, 30 + 22 * step, 556, 30 + 22 * step, color, width=2)
        d.text(562, 34 + 22 * step, f"after {step} step{'s' * (step > 1)}")
    d.text(left, 24, "singular value of X after the steps")
    d.text(left + wide, bottom + 32, "singular value of G / |G|", anchor="end")
    d.text(530, 34, "quintic")
    return d


def muon_clip() -> Drawing:
    d = Drawing(
        720,
        190,
        "Matrices: Newton-Schulz; the rest: AdamW; queries and keys: QK-Clip behind both",
    )
    d.box(14, 80, 84, 36, PALE, "gradients")
    for i, (name, color) in enumerate(
        (("momentum", SKY), ("Newton-Schulz", BLUE), ("W -= lr o", GREEN))
    ):
        d.box(150 + 140 * i, 36, 110, 36, color, name)
        if i:
            d.arrow(121 + 140 * i, 54, 148 + 140 * i, 54)
    d.box(150, 124, 390, 36, YELLOW, "AdamW: embeddings, head, router, vectors")
    d.arrow(98, 92, 148, 58)
    d.arrow(98, 106, 148, 140)
    d.text(150, 26, "hidden matrices, expert stacks, heads", fill=GREY)
    d.box(590, 36, 116, 36, ORANGE, "QK-Clip")
    d.arrow(541, 54, 588, 54)
    d.text(590, 92, "heads above tau:", fill=GREY, size=11)
    d.text(590, 108, "rows by gamma^1/2", fill=GREY, size=11)
    return d


def all_to_all() -> Drawing:
    d = Drawing(720, 260, "Tokens of two ranks travel to the ranks of their experts and come home")
    ids = [(0, 2), (1, 3), (3, 0), (2, 1)]
    where: dict[int, list[int]] = {e: [t for t in range(4) if e in ids[t]] for e in range(4)}
    for r in range(2):
        top = 40 + 110 * r
        d.box(10, top - 6, 160, 98, "#FFFFFF")
        d.box(290, top - 6, 150, 98, "#FFFFFF")
        d.box(560, top - 6, 150, 98, "#FFFFFF")
        d.text(16, top + 88, f"rank {r}", fill=GREY)
        d.text(296, top + 88, f"rank {r}: experts {2 * r}, {2 * r + 1}", fill=GREY)
        for t in (2 * r, 2 * r + 1):
            y = top + 36 * (t - 2 * r)
            d.box(18, y, 80, 26, PALE, f"token {t}")
            d.box(570, y, 130, 26, PALE, f"sum of token {t}")
            for k, e in enumerate(ids[t]):
                d.box(104 + 26 * k, y, 24, 26, EXPERTS[e], str(e))
    for e, tokens in where.items():
        for i, t in enumerate(tokens):
            y = 40 + 110 * (e // 2) + 36 * (e % 2)
            d.box(300 + 66 * i, y, 62, 26, EXPERTS[e], f"token {t}")
            home = 53 + 110 * (t // 2) + 36 * (t % 2)
            d.line(158, home, 298, y + 13, EXPERTS[e], width=1.4)
            d.line(430, y + 13, 568, home, EXPERTS[e], width=1.4)
    d.text(196, 22, "dispatch")
    d.text(466, 22, "combine")
    return d


def call() -> Drawing:
    d = Drawing(720, 250, "The way of a call from Python to an engine")
    d.box(20, 20, 200, 34, YELLOW, "kimi_ops.topk_gate(x, k)")
    ways = [
        ("nothing watches", "straight", PALE),
        ("a gradient is wanted", "autograd.Function", SKY),
        ("compile, export, modes", "torch.ops.kimi_ops.*", SKY),
    ]
    for i, (when, what, color) in enumerate(ways):
        y = 84 + 40 * i
        d.text(20, y + 20, when, fill=GREY)
        d.box(190, y, 160, 30, color, what)
        d.arrow(352, y + 15, 398, 139)
    d.arrow(120, 54, 120, 82)
    d.box(400, 118, 110, 42, GREEN, "_C.topk_gate")
    d.text(400, 178, "checks, outputs", size=11, fill=GREY)
    d.arrow(511, 139, 548, 139)
    d.box(550, 118, 150, 42, BLUE, "kimi_topk_gate()")
    d.text(550, 178, "pointers, sizes, stream", size=11, fill=GREY)
    for i, engine in enumerate(("portable", "AVX2", "AVX-512", "CUDA")):
        d.box(400 + 78 * i, 206, 70, 28, PALE, engine)
    d.arrow(692, 160, 692, 203)
    return d


FIGURES = (
    topk_gate, balance, permute, grouped_gemm, fused_experts, newton_schulz, muon_clip, all_to_all,
    call,
)  # fmt: skip


def drawn() -> dict[str, str]:
    return {f"{figure.__name__}.svg": figure().svg() for figure in FIGURES}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawn().items():
        (FOLDER / name).write_text(text)
