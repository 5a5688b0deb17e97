# SPDX-License-Identifier: MIT
"""Two micro-batches side by side: the formula against the schedule, and what a plan makes of it."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.plan import HARDWARE, plan
from kimi_ops.plan.counts import count
from kimi_ops.plan.estimate import estimate
from kimi_ops.plan.layer import COMMUNICATION, Piece, moe_layer
from kimi_ops.plan.memory import memory
from kimi_ops.plan.pairs import pair_seconds
from kimi_ops.plan.report import as_text
from kimi_ops.plan.skew import busiest
from kimi_ops.plan.work import Layout, Work

K2 = count(KimiK2Config.k2())
TRAIN = Work("train", 4096, 4096, 1.0, "bf16", "bf16", 2**26)
PAIRS = replace(TRAIN, overlap=True)
H200 = HARDWARE["h200"]
PAGE = Path(__file__).parents[2].joinpath("docs/plan.md").read_text()
NAMES = {"a": "attention", "d": "dispatch", "e": "experts", "c": "combine"}


def ends(times: dict[str, float], layers: int, order: str, batches: str) -> float:
    """When the schedule is through: two queues in order, every part behind that before it."""
    done: dict[tuple[str, int], float] = {}
    free = {"computes": 0.0, "travels": 0.0}
    parts = order * layers  # of a batch, one behind the other
    turns = sorted(
        (number, batch, number, part) for number, part in enumerate(parts) for batch in range(2)
    )
    for _, batch, number, part in turns:
        queue = "travels" if part in "dc" else "computes"
        begin = max(free[queue], done.get((batches[batch], number - 1), 0.0))
        done[batches[batch], number] = free[queue] = begin + times[part]
    return max(done.values())


@pytest.mark.parametrize("seed", range(50))
def test_the_formula_is_the_schedule(seed: int):
    choose = random.Random(seed)
    times = {part: choose.choice((0.0, choose.random(), 3 * choose.random())) for part in "adec"}
    layers = choose.randint(1, 5)
    pieces = [Piece(NAMES[part], seconds, "memory") for part, seconds in times.items()]
    forward = ends(times, layers, "adec", "AB")
    assert pair_seconds(pieces, layers) == pytest.approx(forward)
    # gradients of combined rows go as a dispatch, those of dispatched rows as a combine
    backward = ends(times, layers, "deca", "BA")
    assert pair_seconds(pieces, layers, backward=True) == pytest.approx(backward)


def test_the_table_of_the_page():
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == [2**n for n in range(3, 9)]
    for ep, *told in rows:
        work = replace(TRAIN, skew=busiest(K2.config, TRAIN, int(ep), H200.domain))
        passes = [moe_layer(H200, K2, work, int(ep), backward=b) for b in (False, True)]
        times = [p.seconds for pieces in passes for p in pieces]
        sent = sum(p.seconds for pieces in passes for p in pieces if p.name in COMMUNICATION)
        pair = sum(pair_seconds(p, 15, backward=b) for b, p in enumerate(passes)) / 15
        found = 2 * sum(times), 2 * sent, pair, 2 * max(sent, sum(times) - sent)
        assert [f"{1e3 * seconds:.1f}" for seconds in found] == told


def test_a_step_in_twos_is_its_pairs():
    """Four stages; two micro-batches have the time of a pair, and go through the stages as one."""
    layout = Layout(16, 4, 16, "none")
    apart, pairs = (estimate(H200, K2, work, layout) for work in (TRAIN, PAIRS))
    forward = moe_layer(H200, K2, TRAIN, 16, gpus=64)
    backward = moe_layer(H200, K2, TRAIN, 16, gpus=64, backward=True)
    layers = 15  # of the last stage, which has the head and no dense layer
    assert len(layout.stages(61)[-1]) == layers
    rest = apart.stage_seconds - layers * sum(p.seconds for p in [*forward, *backward])
    pair = pair_seconds(forward, layers) + pair_seconds(backward, layers, backward=True)
    assert pairs.stage_seconds == pytest.approx(pair / 2 + rest)
    assert apart.stage_overlapped < pairs.stage_seconds < apart.stage_seconds
    turns = 2**26 // (16 * 4096) // 2 + 3
    assert pairs.bubble == 3 / turns > apart.bubble
    after = sum(pairs.outside.values())
    assert pairs.seconds == pytest.approx(2 * turns * pairs.stage_seconds + after)


def test_what_is_repeated_is_side_by_side_too():
    times = {
        (recompute, work.overlap): estimate(H200, K2, work, Layout(16, 4, 16, recompute))
        for recompute in ("none", "selective")
        for work in (TRAIN, PAIRS)
    }
    for overlap in (False, True):
        assert times["none", overlap].stage_seconds < times["selective", overlap].stage_seconds
    saved = {r: times[r, False].stage_seconds - times[r, True].stage_seconds for r, _ in times}
    assert saved["selective"] > 0.99 * saved["none"]


def test_layers_that_are_computed_again_as_a_whole_are_no_choice():
    made = plan("k2", "h200", 256, overlap=True)
    assert {one.layout.recompute for one in made.estimates} == {"none", "selective"}


def test_two_micro_batches_have_the_memory_of_two():
    apart, pairs = (memory(K2, work, Layout(16, 4, 16, "none")).parts for work in (TRAIN, PAIRS))
    for name in ("activations", "EP buffers"):
        assert pairs[name] == pytest.approx(2 * apart[name])
    assert pairs["weights"] == apart["weights"] and pairs["optimizer"] == apart["optimizer"]
    one = replace(PAIRS, batch_tokens=2**17)  # a pair a rank: nothing more in flight
    assert memory(K2, one, Layout(16, 4, 16, "none")).parts["activations"] < pairs["activations"]


def test_pairs_gain_where_memory_is_left_for_them():
    best = r"EP (\d+), PP (\d+), (\w+): (.*)"
    rows = re.findall(rf"^\| (\d+) \| {best} \| {best} \|", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [256, 512, 1024, 2048]
    for gpus, *told in rows:
        for overlap, (ep, pp, way, rate) in zip((False, True), (told[:4], told[4:]), strict=True):
            made = plan("k2", "h200", int(gpus), tokens_per_rank=2048, overlap=overlap).chosen
            layout = made.layout
            assert made.fits and [layout.ep, layout.pp, layout.recompute] == [int(ep), int(pp), way]
            assert round(made.tokens_per_gpu, -1) == int(rate.replace(" ", ""))
    many = [plan("k2", "h200", 2048, overlap=overlap).chosen for overlap in (False, True)]
    assert many[1].tokens_per_gpu < many[0].tokens_per_gpu and many[1].bubble > many[0].bubble


def test_the_command_and_what_it_refuses():
    result = CliRunner().invoke(app, ["plan", "--gpus=128", "--overlap"])
    assert result.exit_code == 0 and "micro-batches in twos, side by side" in result.output
    assert "side by side" not in as_text(plan("k2", "h200", 128))
    with pytest.raises(ValueError, match="overlap: expected False to serve, got True in mode 'dec"):
        plan("k2", "h200", 16, mode="serve", overlap=True)
    least = "batch_tokens: expected at least 16384, two micro-batches of 4096 tokens on each rank"
    with pytest.raises(ValueError, match=least):
        plan("k2", "h200", 64, batch_tokens=16383, overlap=True)
