# SPDX-License-Identifier: MIT
"""What the planner answers: layouts, memory, remedies, what it hangs on; the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kimi_ops.cli import app
from kimi_ops.models.kimi_k2 import KimiK2Config
from kimi_ops.plan import HARDWARE, plan
from kimi_ops.plan.counts import count
from kimi_ops.plan.estimate import estimate
from kimi_ops.plan.layer import again, moe_layer
from kimi_ops.plan.memory import activation_bytes, memory
from kimi_ops.plan.report import as_text
from kimi_ops.plan.work import Layout, Work

runner = CliRunner()
K2 = count(KimiK2Config.k2())
TRAIN = Work("train", 4096, 4096, 1.0, "bf16", "bf16", 2**26)
H200 = HARDWARE["h200"]


def test_stages_hold_every_layer_once_and_the_ends_fewer():
    for layers, pp in ((61, 16), (61, 1), (61, 61), (7, 3), (8, 4)):
        stages = Layout(1, pp, 1).stages(layers)
        assert [n for stage in stages for n in stage] == list(range(layers))
        sizes = [len(stage) for stage in stages]
        assert max(sizes) - min(sizes) <= 1 and max(sizes[0], sizes[-1]) <= max(sizes)
    assert [len(s) for s in Layout(1, 16, 1).stages(61)] == [3, 3, *[4] * 13, 3]


def test_activations_by_hand():
    """K2's layer with experts, values in bf16 by token: 243 904 without recomputation."""
    attention = 4 * 7168 + 2 * (1536 + 576) + 64 * (192 + 192 + 128) + 64 * 128 + 2 * 64
    experts = 8 * (2 * 7168 + 3 * 2048) + 3 * 2048 + 2 * 384
    assert activation_bytes(K2, TRAIN, "none", sparse=True) == 2 * (attention + experts)
    kept = 2 * 7168 + 1536 + 576 + 64 * 128 + 2 * 64
    kept += 8 * (7168 + 2 * 2048) + 2 * 2048 + 2 * 384
    assert activation_bytes(K2, TRAIN, "selective", sparse=True) == 2 * kept
    assert activation_bytes(K2, TRAIN, "full", sparse=True) == 2 * 7168
    skewed = activation_bytes(K2, replace(TRAIN, skew=2.0), "selective", sparse=True)
    assert skewed == 2 * (kept + 8 * (7168 + 2 * 2048))


def test_a_slice_of_moonlight_fills_a_gpu_of_80_gb():
    """Two sequences of 4096 tokens; two layers more do not fit with one of them."""
    config = KimiK2Config.moonlight_slice()
    chosen = plan("moonlight_slice", "h100", 1, tokens_per_rank=8192).chosen
    assert chosen.fits and chosen.memory.total > 0.9 * HARDWARE["h100"].memory
    deeper = replace(config, num_hidden_layers=config.num_hidden_layers + 2)
    assert not plan(deeper, "h100", 1, tokens_per_rank=4096).chosen.fits
    layer = count(config)
    assert layer.total == 4_263_151_488
    kept = 2 * 2048 + 512 + 64 + 16 * 192 + 16 * 128 + 2 * 16  # queries have no latent
    kept += 6 * (2048 + 2 * 1408) + 4 * 1408 + 2 * 64
    assert activation_bytes(layer, TRAIN, "selective", sparse=True) == 2 * kept


def test_activations_of_a_rank_by_hand():
    """One stage, one micro-batch: 61 inputs, one layer computed again, fp32 logits twice."""
    parts = memory(K2, TRAIN, Layout(1, 1, 1, "full")).parts
    layer = activation_bytes(K2, TRAIN, "none", sparse=True)
    assert parts["activations"] == 4096 * (60 * 14336 + layer + 8 * 163840)
    third = memory(K2, TRAIN, Layout(8, 4, 8, "selective")).parts  # has 16 layers, the most
    sparse = activation_bytes(K2, TRAIN, "selective", sparse=True)
    assert third["activations"] == 4096 * (2 * 16 * sparse + layer - sparse)


def test_optimizer_state_by_hand():
    """Two replicas of everything in one stage: half of 8 bytes for Muon, of 12 for AdamW."""
    tiny = count(KimiK2Config.tiny())
    experts, matrices, rest = tiny.stage(range(3), 1)
    parts = memory(tiny, TRAIN, Layout(1, 1, 2)).parts
    assert parts["optimizer"] == (experts + matrices) / 2 * 8 + rest / 2 * 12
    assert parts["weights"] == 2 * (experts + matrices + rest) == parts["gradients"] / 2
    small = memory(tiny, replace(TRAIN, momentum_bytes=2, offload=True), Layout(1, 1, 2))
    assert small.parts["optimizer"] == 0
    assert small.host == (experts + matrices) / 2 * 6 + rest / 2 * 12


def test_a_step_is_its_pieces():
    layout = Layout(16, 16, 16, "full")
    found = estimate(H200, K2, TRAIN, layout)
    once = moe_layer(H200, K2, TRAIN, 16) + moe_layer(H200, K2, TRAIN, 16, backward=True)
    once += moe_layer(H200, K2, TRAIN, 16)
    assert sum(p.seconds for p in found.layer) == pytest.approx(sum(p.seconds for p in once))
    pipe = 4 * 4096 * 7168 / H200.network
    head = 3 * 2 * 4096 * 7168 * 163840 / (H200.bf16 * H200.gemm)  # costs more than a layer
    assert found.stage_seconds == pytest.approx(3 * sum(p.seconds for p in once) + head + pipe)
    slots = found.micro_batches + 15
    assert found.micro_batches == 2**26 // (16 * 4096)
    assert found.seconds == pytest.approx(slots * found.stage_seconds + sum(found.outside.values()))
    assert found.bubble == 15 / slots and found.overlapped < found.seconds


def test_the_backward_and_what_is_repeated():
    wire = replace(TRAIN, wire="fp8")
    forward, backward = (
        {p.name: p for p in moe_layer(H200, K2, wire, 16, backward=b)} for b in (False, True)
    )
    ratios = {n: backward[n].seconds / p.seconds for n, p in forward.items()}
    assert ratios["attention"] == 2.5 and ratios["projections"] == ratios["experts"] == 2
    assert ratios["permute"] == ratios["combine"] == 1
    assert backward["dispatch"].nvlink_bytes == backward["combine"].nvlink_bytes  # bf16 gradients
    share = forward["dispatch"].nvlink_bytes / forward["combine"].nvlink_bytes
    assert share == pytest.approx(7392 / 14336)
    pieces = list(forward.values())
    assert again(H200, K2, wire, pieces, "none") == []
    assert again(H200, K2, wire, pieces, "full") == pieces
    expand, down = again(H200, K2, wire, pieces, "selective")
    assert down.seconds == forward["experts"].seconds / 3
    up = 1536 * 64 * 192 + 512 * 64 * 256
    assert expand.seconds == pytest.approx(2 * 4096 * up / (H200.bf16 * H200.gemm))


def test_few_tokens_read_few_experts():
    """One token, eight experts: 0.7 GB of bf16 at the rate that few rows reach."""
    experts = moe_layer(H200, K2, replace(TRAIN, tokens=1), 1)[5]
    assert experts.name == "experts" and experts.bound == "memory"
    read = 8 * 3 * 7168 * 2048 * 2
    assert experts.seconds == pytest.approx(read / (H200.hbm * H200.stream), rel=1e-3)


def test_outside_of_the_micro_batches():
    """Newton-Schulz of owned matrices, gradients to owners and weights back, state on the host."""
    work = replace(TRAIN, offload=True)
    layout = Layout(16, 16, 64)  # four replicas of each expert, 64 of the rest
    found = estimate(H200, K2, work, layout)
    stages = [K2.stage(s, 16) for s in layout.stages(61)]
    experts, matrices, rest = max(stages, key=sum)
    # a replica's copies are on other nodes; of 64 ranks eight at a time share their NICs
    moved = experts * 6 * 3 / 4 / H200.network + (matrices + rest) * 6 * 63 / 64 / H200.nvlink
    assert found.outside["gradients and weights"] == pytest.approx(moved)
    assert found.outside["state from and to the host"] == 2 * found.memory.host / 50e9
    flops = 3 * 5 * (3 * 2048**2 * 7168 + 2048**3)  # symmetric form, five steps, three matrices
    owned = (experts / 4 + matrices / 64) / (3 * 2048 * 7168)
    passes = (experts / 4 + (matrices + rest) / 64) * 22 / (H200.hbm * H200.copy)
    assert found.outside["optimizer"] == pytest.approx(
        owned * flops / (H200.bf16 * H200.gemm) + passes
    )


def test_the_host_may_be_full_too():
    """64 H200 with the optimizer on hosts of 50 GB a GPU: that is what is missing."""
    small = replace(H200, host_memory=50e9)
    work = replace(TRAIN, offload=True, momentum_bytes=2)
    found = estimate(small, K2, work, Layout(8, 8, 8, "full"))
    assert found.memory.total < found.capacity and not found.fits
    assert found.missing == found.memory.host - 50e9


def test_a_tied_table_is_there_once():
    tied = count(replace(KimiK2Config.tiny(), tie_word_embeddings=True))
    assert tied.stage(range(3), 1)[2] == count(KimiK2Config.tiny()).stage(range(3), 1)[2] - 64 * 32


def test_bytes_by_link():
    """EP 16 on two nodes: every token goes to the other node about once, forwarded inside it."""
    dispatch = next(p for p in moe_layer(H200, K2, TRAIN, 16) if p.name == "dispatch")
    assert dispatch.network_bytes == pytest.approx(4096 * 0.996 * 14336, rel=1e-3)
    assert dispatch.nvlink_bytes == pytest.approx(4096 * 6.499 * 7 / 8 * 14336, rel=1e-3)
    assert dispatch.bound == "network"
    alone = next(p for p in moe_layer(H200, K2, TRAIN, 1) if p.name == "dispatch")
    assert alone.seconds == alone.nvlink_bytes == alone.network_bytes == 0


def test_skew_scales_rows_and_links():
    def times(work, ep=16):
        return {p.name: p.seconds for p in moe_layer(H200, K2, work, ep)}

    even, skewed = times(TRAIN), times(replace(TRAIN, skew=1.5))
    latency = H200.network_latency
    assert skewed["dispatch"] - latency == pytest.approx(1.5 * (even["dispatch"] - latency))
    assert skewed["experts"] == pytest.approx(1.5 * even["experts"])
    assert skewed["attention"] == even["attention"]


def test_experts_that_do_not_divide_are_skew():
    """256 ranks, 384 experts: some have two, a third more than the mean."""
    found = estimate(H200, K2, TRAIN, Layout(256, 1, 256))
    same = moe_layer(H200, K2, replace(TRAIN, skew=4 / 3), 256)
    forward = next(p for p in same if p.name == "unpermute")
    assert found.piece("unpermute").seconds == pytest.approx(2 * forward.seconds)


def test_256_gpus_train_k2_as_its_makers_did():
    made = plan("k2", "h200", 256)
    assert made.chosen.fits and (made.chosen.layout.ep, made.chosen.layout.pp) == (16, 16)
    assert made.chosen.bound == "tensor" and made.remedies == []
    assert {e.layout.ep for e in made.by_ep} == {2**n for n in range(9)}
    best = max((e for e in made.estimates if e.fits), key=lambda e: e.tokens_per_gpu)
    assert best == made.chosen
    rows = {row.change: row for row in made.sensitivity}
    assert rows["skew x 2"].ratio < rows["skew x 1.5"].ratio < 1
    assert rows["network x 0.8"].ratio < 1 < rows["network x 1.25"].ratio
    assert rows["NVLink x 0.8"].ratio < 1
    assert rows["skew x 2"].layout != made.chosen.layout  # its rows need memory, too


def test_64_gpus_need_the_host():
    made = plan("k2", "h200", 64)
    assert not made.chosen.fits and made.chosen.missing == pytest.approx(104.6e9, rel=0.01)
    assert [r.best.fits for r in made.remedies] == [False, True]
    assert made.remedies[-1].changes[-1] == "optimizer state in the host's memory"
    assert made.remedies[-1].best.memory.host < 250e9
    assert made.fewest_gpus() == 128 and made.fewest_gpus(remedies=True) == 64
    text = as_text(made)
    missing = f"does not fit: {made.chosen.missing / 1e9:.1f} GB a GPU are missing"
    assert missing in text and "128 GPUs are enough" in text


def test_16_gpus_cannot_train_k2():
    made = plan("k2", "h200", 16)
    assert not any(r.best.fits for r in made.remedies) and len(made.remedies) == 3
    assert made.chosen.missing > 700e9  # 14 TB of states on 2.3 TB


def test_2048_gpus():
    made = plan("k2", "h100", 2048)
    assert made.chosen.fits and 10 < made.chosen.seconds < 40
    assert "measured on an H100" in as_text(made)
    few, many = (plan("k2", "h200", gpus).chosen for gpus in (256, 2048))
    assert many.memory.parts["optimizer"] < few.memory.parts["optimizer"] / 2  # shared by more
    assert many.layout.pp < few.layout.pp  # what that leaves saves bubbles
    assert many.seconds < few.seconds / 7


@pytest.mark.parametrize("gpus", [16, 64, 256, 2048])
def test_serving_k2(gpus):
    made = plan("k2", "h200", gpus, mode="serve")
    assert made.chosen.fits and made.chosen.layout.pp == 1
    cache = made.chosen.memory.parts["latent cache"]
    assert cache == 128 * 4096 * 70272
    assert gpus == 16 or made.chosen.layout.ep == 64  # a larger group sends more than it saves
    tight = plan("k2", "h100", 16, mode="serve")
    assert [r.changes[-1] for r in tight.remedies][0] == "INT4 experts"
    assert tight.remedies[-1].best.fits


def test_prefill_sends_once_to_a_rank_and_decode_by_choice():
    prefill, decode = (
        plan("k2", "h200", 8, mode=mode, tokens_per_rank=128).estimates[-1].piece("combine")
        for mode in ("prefill", "decode")
    )
    assert decode.nvlink_bytes == pytest.approx(128 * 7 * 14336)
    assert prefill.nvlink_bytes == pytest.approx(128 * 5.28 * 7 / 8 * 14336, rel=1e-3)
    made = plan("k2", "h200", 16, mode="prefill")
    assert made.chosen.fits and made.chosen.memory.parts["latent cache"] == 4096 * 70272


def test_a_machine_and_a_model_of_ones_own(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(KimiK2Config.mini().to_dict()))
    machine = replace(H200, name="one", memory=1e9)
    made = plan(tmp_path, machine, 4, tokens_per_rank=256, batch_tokens=2**16)
    assert made.counts.total == count(KimiK2Config.mini()).total and made.chosen.fits
    assert made.chosen.layout.ep == 1  # so small a model is bound by what a call costs


def test_the_command():
    result = runner.invoke(app, ["plan", "--model=k2", "--hardware=h200", "--gpus=256"])
    assert result.exit_code == 0, result.output
    assert "predicted by a model, not measured" in result.output
    assert "chosen: EP 16, PP 16, DP 16, recompute selective; bound: tensor" in result.output
    assert "what the choice hangs on" in result.output
    assert max(map(len, result.output.splitlines())) < 180


def test_the_command_as_json_and_as_a_picture(tmp_path: Path):
    out = tmp_path / "plan.svg"
    arguments = ["plan", "--gpus=16", "--mode=serve", "--hardware=h100", "--json"]
    result = runner.invoke(app, [*arguments, f"--plot={out}"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["label"].startswith("predicted by a model") and found["fits"] is False
    assert found["parameters"] == 1_026_408_232_448
    assert [e["layout"]["ep"] for e in found["by_ep"]] == [1, 2, 4, 8, 16]
    assert found["chosen"]["missing"] > 0 and found["remedies"][-1]["fits"]
    assert found["fewest_gpus"]["as_asked"] == 64
    assert "</svg>" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware=a100"], "plan: hardware: expected one of h800, h100, h200, b200, nvl72, got"),
        (["--model=k9"], "slice, mini, tiny or a config.json, got k9; name one"),
        (["--model=absent/config.json"], "expected a config.json, got"),
        (["--gpus=0"], "plan: gpus: expected 1..1099511627776, got 0"),
        (["--skew=0.5"], "plan: skew: expected at least 1, busiest rank by mean, got 0.5"),
        (["--skew=nan"], "plan: skew: expected a finite number, got nan"),
        (
            ["--mode=dream"],
            "plan: mode: expected one of train, serve, prefill, decode, got 'dream'",
        ),
        (["--weights=fp8"], "plan: weights: expected one of bf16, got 'fp8'"),
        (["--wire=int4"], "plan: wire: expected one of bf16, fp8, got 'int4'"),
        (["--tokens-per-rank=0"], "plan: tokens_per_rank: expected 1.."),
        (["--plot=absent/x.png", "--model=tiny", "--gpus=1"], "No such file or directory"),
    ],
)
def test_what_it_does_not_know(arguments, message):
    result = runner.invoke(app, ["plan", *arguments])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in result.output


def test_a_model_without_experts_is_refused():
    dense = replace(KimiK2Config.tiny(), first_k_dense_replace=3)
    with pytest.raises(ValueError, match="plan: model: expected layers with experts"):
        plan(dense, "h100", 8)
