# SPDX-License-Identifier: MIT
"""The busiest rank: of a number, of measured loads, and of replicas that even them out."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.plan import plan
from kimi_ops.plan.counts import count
from kimi_ops.plan.memory import memory
from kimi_ops.plan.skew import busiest, checked_loads
from kimi_ops.plan.work import Layout, Work
from tests.routing import zipf_loads

runner = CliRunner()
CONFIG = KimiK2Config.k2()
SERVE = Work("decode", 128, 4096, 1.0, "fp8", "fp8", 2**26)


def test_a_rank_has_no_more_than_all_tokens():
    """One rank has everything; of P at most P times the mean, and K rows of a token."""

    def at(skew, ep):
        return busiest(CONFIG, replace(SERVE, skew=skew), ep, 8)

    assert [at(9.0, ep) for ep in (1, 2, 8, 16)] == [1, 2, 8, 9]
    assert at(1e9, 16) == 16 and at(1e9, 48) == 48 and at(1e9, 96) == 48  # 4 of 8 choices
    assert at(1.0, 256) == pytest.approx(4 / 3) and at(2.0, 256) == pytest.approx(8 / 3)


def test_loads_by_hand():
    """Six experts, two layers; [5 1 | 0 2 | 3 1] and [1 1 | 1 1 | 1 1] on three ranks."""
    tiny = replace(KimiK2Config.tiny(), n_routed_experts=6, num_experts_per_tok=2)
    loads = checked_loads(tiny, [[5, 1, 0, 2, 3, 1], [1, 1, 1, 1, 1, 1]])
    work = replace(SERVE, loads=loads)
    assert busiest(tiny, work, 3, 8) == pytest.approx((6 / 4 + 1) / 2)
    assert busiest(tiny, work, 1, 8) == 1
    assert busiest(tiny, work, 4, 8) == pytest.approx((6 / 3 + 2 / 1.5) / 2)  # 2, 2, 1, 1 experts
    assert busiest(tiny, replace(work, skew=1.2), 3, 8) == pytest.approx(1.2 * 1.25)
    # three more replicas: 5 as 2 x 2.5 ... on three ranks of three, 4 each at best
    spread = busiest(tiny, replace(work, redundant=3), 3, 8)
    assert 1 <= spread < 1.05
    assert checked_loads(tiny, torch.arange(1, 7)) == ((1, 2, 3, 4, 5, 6),)


def test_measured_loads_say_the_skew_of_every_size():
    """Zipf loads: more ranks, more skew; a replica a rank takes nearly all of it."""
    loads = zipf_loads(0.8, 0)
    made = plan("k2", "h200", 64, mode="serve", loads=loads)
    skews = [found.skew for found in made.by_ep]
    assert skews[0] == 1 and skews == sorted(skews) and 4 < skews[-1] < 6
    even = plan("k2", "h200", 64, mode="serve", loads=loads, redundant=64)
    assert max(found.skew for found in even.by_ep) < 1.06
    assert even.chosen.tokens_per_gpu > made.chosen.tokens_per_gpu
    assert made.chosen.layout.ep < even.chosen.layout.ep
    same = plan("k2", "h200", 64, mode="serve", skew=skews[-1]).by_ep[-1]
    assert same.seconds == pytest.approx(made.by_ep[-1].seconds)


def test_replicas_take_room_and_divide():
    """96 of them on 96 ranks, as SGLang serves K2: five experts a rank in place of four."""
    with_, without = (
        memory(count(CONFIG), replace(SERVE, redundant=n), Layout(96, 1, 96)) for n in (96, 0)
    )
    expert = 60 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert with_.parts["weights"] - without.parts["weights"] == pytest.approx(expert)
    sizes = {e.layout.ep for e in plan("k2", "h200", 64, mode="serve", redundant=16).estimates}
    assert sizes == {1, 2, 4, 8, 16}  # 400 on 32 ranks do not fill them alike


def test_the_command_reads_loads(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps([zipf_loads(0.5, 0, tokens=2048).tolist()] * 2))
    arguments = ["plan", "--gpus=32", "--mode=serve", f"--loads={path}"]
    result = runner.invoke(app, [*arguments, "--redundant=32"])
    assert result.exit_code == 0, result.output
    assert "skew 1 x that of the loads" in result.output
    assert "32 redundant experts" in result.output
    found = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert found["work"]["loads"] is True and found["chosen"]["skew"] > 1.2
    path.write_text("[1, 2]")
    result = runner.invoke(app, arguments)
    assert (
        result.exit_code == 1
        and "plan: loads: expected shape [L, 384], got [1, 2]" in result.output
    )
    path.write_text("[1, 2")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "plan: loads: expected JSON, got" in result.output
