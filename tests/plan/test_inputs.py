# SPDX-License-Identifier: MIT
"""Odd questions to the planner: it answers what was asked, or says what cannot be."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.plan import HARDWARE, Hardware, plan
from kimi_ops.plan.counts import count
from kimi_ops.plan.estimate import estimate
from kimi_ops.plan.layer import moe_layer
from kimi_ops.plan.memory import memory
from kimi_ops.plan.report import as_text
from kimi_ops.plan.traffic import starts
from kimi_ops.plan.work import Layout, Work

runner = CliRunner()
K2 = count(KimiK2Config.k2())
TRAIN = Work("train", 4096, 4096, 1.0, "bf16", "bf16", 2**26)
H200 = HARDWARE["h200"]


def test_a_batch_has_a_micro_batch_for_every_rank():
    made = plan("k2", "h200", 64, batch_tokens=2**17)  # of 32 ranks
    assert {e.layout.dp for e in made.estimates} == {2, 4, 8, 16, 32}
    with pytest.raises(ValueError, match="batch_tokens: expected at least 8192, a micro-batch of"):
        plan("k2", "h200", 64, batch_tokens=8191)
    assert plan("k2", "h200", 64, batch_tokens=8192).chosen.layout.pp == 32
    assert plan("k2", "h200", 2**40, mode="serve").chosen.fits  # no batch there


def test_tokens_of_a_step_are_those_of_the_batch():
    """100 000 on 4 ranks: 7 micro-batches of each, of which the last are in part empty."""
    found = plan("tiny", "h200", 4, batch_tokens=100_000).chosen
    assert found.layout.dp == 4 and found.micro_batches == 7 and found.tokens == 100_000


def test_a_sequence_trains_on_one_rank():
    with pytest.raises(ValueError, match="context: expected at most tokens_per_rank, 4096, got 81"):
        plan("k2", "h200", 256, tokens_per_rank=4096, context=8192)
    assert plan("k2", "h200", 256, context=8192).work.tokens == 8192
    short = plan("k2", "h200", 256, tokens_per_rank=1024)
    assert short.work.context == 1024
    assert "tokens a rank x 0.5" not in {row.change for row in short.sensitivity}
    half = plan("k2", "h200", 16, context=2048)
    assert half.work.tokens == 4096
    assert half.remedies[-1].changes[-1] == "half the tokens of a micro-batch"


def test_a_context_is_what_the_model_has():
    assert plan("tiny", "h200", 1).work.context == 128
    with pytest.raises(ValueError, match="context: expected 1..131072, the model's positions, got"):
        plan("k2", "h200", 16, mode="decode", context=131073)


def test_a_prompt_may_be_longer_than_a_step():
    made = plan("k2", "h200", 16, mode="prefill", context=131072)
    parts, short = made.chosen.memory.parts, plan("k2", "h200", 16, mode="prefill").chosen.memory
    assert parts["latent cache"] == 131072 * 70272
    expanded = 2 * (131072 - 4096) * 64 * (192 + 128)
    assert parts["activations"] - short.parts["activations"] == expanded


def test_the_head_reads_the_last_token_of_a_prompt():
    work = Work("prefill", 8192, 4096, 1.0, "fp8", "fp8", 2**26)
    found = estimate(H200, K2, work, Layout(16, 1, 16))
    layers = 60 * sum(p.seconds for p in found.layer)
    whole = 2 * 8192 * 7168 * 163840 / (H200.bf16 * H200.gemm)
    assert 0 < found.stage_seconds - layers < 0.5 * whole  # a dense layer, and two tokens' logits
    parts = memory(K2, work, Layout(16, 1, 16)).parts
    assert parts["activations"] < 4 * 163840 * 8192


def test_how_many_sequences_fit():
    """128K of context on 16 H200: 63.1 GB beside the weights, 9.2 GB each."""
    made = plan("k2", "h200", 16, mode="decode", context=131072)
    assert not made.chosen.fits and made.most == made.most_tokens(Layout(16, 1, 16)) == 6
    assert plan("k2", "h200", 16, mode="decode", context=131072, tokens_per_rank=6).chosen.fits
    assert not plan("k2", "h200", 16, mode="decode", context=131072, tokens_per_rank=7).chosen.fits
    assert [r.changes[-1] for r in made.remedies] == [
        "INT4 experts", "sequences of 131,072 a rank: 8, the most",
    ]  # fmt: skip
    assert "6 sequences of 131,072 a rank are the most that fit" in as_text(made)
    fits = plan("k2", "h200", 16, mode="decode")
    assert fits.most_tokens(fits.chosen.layout) == 218 and "a rank that fit: 218" in as_text(fits)
    tight = plan("k2", "h100", 8, mode="decode", weights="int4")
    assert tight.most == 0 and "are the most that fit" not in as_text(tight)


def test_groups_that_do_not_fill_nodes():
    """EP 5 on 100 GPUs in nodes of 8: some groups lie on two nodes."""
    assert starts(5, 8, 5) == [0] and starts(4, 8, 100) == [0, 4] and starts(16, 8, 64) == [0]
    assert starts(5, 8, 100) == list(range(8)) and starts(12, 8, 96) == [0, 4]
    alone, among = (moe_layer(H200, K2, TRAIN, 5, gpus=n)[3] for n in (5, 100))
    assert alone.name == "dispatch" and alone.bound == "NVLink" and alone.network_bytes == 0
    assert among.bound == "network" and among.seconds > 1.8 * alone.seconds
    for ep in (1, 2, 4, 8, 16, 32):
        assert moe_layer(H200, K2, TRAIN, ep, gpus=1024) == moe_layer(H200, K2, TRAIN, ep)


def test_stages_on_several_nodes_send_over_the_network():
    """Four ranks a stage: every other stage hands on to another node."""
    inside, across = (
        estimate(HARDWARE["nvl72" if pp == 2 else "h200"], K2, TRAIN, Layout(4, pp, 4))
        for pp in (2, 4)
    )
    for found, pp, link in ((inside, 2, HARDWARE["nvl72"].nvlink), (across, 4, H200.network)):
        machine = HARDWARE["nvl72"] if pp == 2 else H200
        head = 3 * 2 * 4096 * 7168 * 163840 / (machine.bf16 * machine.gemm)
        layers = len(Layout(4, pp, 4).stages(61)[-1]) * sum(p.seconds for p in found.layer)
        rest = found.stage_seconds - layers - head
        assert rest == pytest.approx(4 * 4096 * 7168 / link, rel=1e-6)


def test_reductions_by_hand():
    gb = 1e9
    assert H200.collective(gb, 1, 1) == 0
    assert H200.collective(gb, 8, 1) == gb * 7 / 8 / 280e9
    assert H200.collective(gb, 16, 1) == gb * 15 / 16 / 280e9  # 8 NICs have 360
    assert H200.collective(gb, 2, 4) == gb / 2 / 280e9
    assert H200.collective(gb, 4, 4) == gb * 3 / 4 / 90e9  # two of a node
    assert H200.collective(gb, 4, 16) == gb * 3 / 4 / 45e9


def test_a_model_whose_choice_is_limited_to_groups():
    limited = replace(KimiK2Config.k2(), n_group=8, topk_group=4)
    ours, free = (moe_layer(H200, count(c), TRAIN, 64) for c in (limited, KimiK2Config.k2()))
    ratio = ours[3].network_bytes / free[3].network_bytes
    assert 0.6 < ratio < 0.75  # at most 4 of 8 nodes in place of 5.28


def test_a_machine_from_a_file(tmp_path):
    path = tmp_path / "slow.json"
    path.write_text('{"like": "h100", "network": 2.5e10}')
    slow = Hardware.from_file(path)
    assert slow.network == 25e9 and slow.measured and slow.name == "slow"
    assert slow.memory == 80e9 and str(path) in slow.source
    assert plan("k2", path, 256).chosen.seconds > plan("k2", "h100", 256).chosen.seconds
    result = runner.invoke(app, ["plan", "--model=tiny", "--gpus=2", f"--hardware={path}"])
    assert result.exit_code == 0 and str(path) in result.output
    path.write_text('{"like": "h100", "bf16": 5e14}')
    assert not Hardware.from_file(path).measured  # the rates of another chip
    values = {k: v for k, v in asdict(H200).items() if k not in ("measured", "copy")}
    path.write_text(json.dumps(values))
    assert Hardware.from_file(path) == H200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON, got"),
        ("[]", "got no object"),
        ('{"like": "h200", "nvlnk": 1}', "got nvlnk; leave the rest out"),
        ('{"like": "h201"}', "like: expected one of h800"),
        ('{"name": "x"}', "got none of gpu, domain, memory, "),
        ('{"like": "h200", "measured": true}', "got measured"),
        ('{"like": "h200", "memory": 0}', "memory: expected more than 0, got 0"),
        ('{"like": "h200", "network": -1}', "network: expected more than 0"),
        ('{"like": "h200", "gemm": 1.5}', "gemm: expected a share above 0, 1 at most, got 1.5"),
        ('{"like": "h200", "domain": 0}', "domain: expected 1.."),
        ('{"like": "h200", "domain": 8.0}', "domain: expected an int, got float"),
        ('{"like": "h200", "hbm": "4.8e12"}', "hbm: expected a number, got str"),
        ('{"like": "h200", "hbm": NaN}', "hbm: expected a finite number, got nan"),
        ('{"like": "h200", "gpu": 5}', "gpu: expected a str, got 5"),
    ],
)
def test_a_file_that_is_no_machine(tmp_path, content, message):
    path = tmp_path / "machine.json"
    path.write_text(content)
    result = runner.invoke(app, ["plan", "--model=tiny", "--gpus=2", f"--hardware={path}"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.output.startswith("error: Hardware: ") and message in result.output


def test_what_is_no_machine_at_all(tmp_path):
    with pytest.raises(TypeError, match="measured: expected a bool"):
        replace(H200, measured=1)
    with pytest.raises(ValueError, match="plan: hardware: expected one of"):
        plan("tiny", 5, 2)  # type: ignore[arg-type]
    result = runner.invoke(app, ["plan", f"--hardware={tmp_path / 'absent.json'}"])
    assert result.exit_code == 1 and "No such file" in result.output


@pytest.mark.parametrize("memory", [1e6, 1e30])
def test_tiny_and_huge_memories(memory):
    made = plan("k2", replace(H200, memory=memory), 16, mode="decode")
    assert made.chosen.fits == (memory > 1e9)
    text = as_text(made)
    assert ("fewest" in text or "no number tried is enough" in text) == (memory < 1e9)


@pytest.mark.parametrize(
    "arguments",
    [["--model=tiny", "--gpus=4"], ["--tokens-per-rank=4000000"], ["--skew=99"]],
)
def test_columns_do_not_touch(arguments):
    result = runner.invoke(app, ["plan", "--gpus=16", *arguments])
    rows = [line.split() for line in result.output.split("micro-batch and layer\n")[1].splitlines()]
    rows = rows[: rows.index([])]
    assert len({len(row) - (row[0] == ">") for row in rows}) == 1
    assert all(row[-1].replace(",", "").isdigit() for row in rows)


def test_fewer_than_a_node_may_be_enough():
    assert plan("k2", "nvl72", 2, mode="serve", weights="int4").fewest_gpus() == 8
    assert plan("k2", "nvl72", 2, mode="serve").fewest_gpus(remedies=True) == 4


def test_a_step_that_would_not_fit_is_said_so():
    made = plan("k2", "h200", 16, mode="serve")
    rows = {row.change: row for row in made.sensitivity}
    assert rows["skew x 2"].fits and not rows["tokens a rank x 2"].fits
    assert "none fits; the chosen one does not fit" in as_text(made)


def test_bf16_gradients_move_fewer_bytes():
    """One rank with all experts: adding to their gradients is what it waits for."""
    wide, narrow = (
        moe_layer(H200, K2, replace(TRAIN, gradient_bytes=n), 1, backward=True)[5] for n in (4, 2)
    )
    assert wide.bound == narrow.bound == "memory"
    saved = 4 * 384 * K2.expert / (H200.hbm * H200.stream)
    assert wide.seconds - narrow.seconds == pytest.approx(saved, rel=1e-6)


def test_loads_and_replicas_that_cannot_be():
    for loads, told in (
        ([1.0] * 383, "expected shape"),
        ([[1.0] * 384] * 2 + [[0.0] * 384], "some in each layer"),
        ([-1.0] + [1.0] * 383, "at least 0"),
        ([float("nan")] * 384, "finite counts"),
        (torch.zeros(0, 384), "finite counts"),
    ):
        with pytest.raises(ValueError, match=f"plan: loads: .*{told}"):
            plan("k2", "h200", 16, loads=loads)
    with pytest.raises(TypeError, match="plan: loads: expected a matrix of numbers"):
        plan("k2", "h200", 16, loads={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="redundant: expected 0 to train, got 8"):
        plan("k2", "h200", 16, redundant=8)
    with pytest.raises(ValueError, match="redundant: expected 0..384, got 385"):
        plan("k2", "h200", 16, mode="serve", redundant=385)
