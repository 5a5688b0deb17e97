# SPDX-License-Identifier: MIT
"""The peers of the benchmarks do the work that they are compared for."""

import copy

import pytest
import torch

from benchmarks import bench_fused_experts, bench_grouped_gemm, bench_train_step, cases
from benchmarks.measure import Time, roof_rate
from benchmarks.report import Report, Row
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer


def error(value, expected) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("what", ["fwd", "dgrad", "wgrad", "wgrad acc"])
@pytest.mark.parametrize(
    ("rows", "skew", "dtype"),
    [(5, "balanced", "float32"), (40, "hot", "bfloat16"), (2, "decode", "bfloat16")],
)
def test_all_ways_of_a_grouped_product_agree(what, rows, skew, dtype):
    torch.manual_seed(0)
    case = cases.GemmCase("mini gate+up", 32, rows, what, skew, dtype)
    weight = bench_grouped_gemm.make_weight(case, "cpu")
    with torch.no_grad():
        setting = bench_grouped_gemm.Setting(case, weight)
        assert len(setting.a) == case.total == int(setting.offsets[-1])
        assert setting.active == len(setting.groups)
        before, results = torch.zeros(weight.shape), {}
        for way, function in setting.functions().items():
            result = function()
            if what == "wgrad acc":  # all ways add to one buffer
                results[way], before = result - before, result.clone()
            else:
                results[way] = result.clone()
    bound = 1e-5 if dtype == "float32" else 2e-2
    for way in ("grouped_mm", "mm loop"):
        assert error(results[way], results["kimi_ops"]) < bound, way


@pytest.mark.parametrize("backward", [False, True])
def test_all_experts_of_transformers_agree(backward):
    pytest.importorskip("transformers")
    case = cases.ExpertsCase("small", 16, 64, 32, 12, backward, k=4)
    weights = bench_fused_experts.make_weights(case, "cpu")
    named = bench_fused_experts.Setting(case, weights).functions()
    assert list(named) == ["kimi_ops", *bench_fused_experts.PEERS]
    results = {way: function() for way, function in named.items()}
    for way in bench_fused_experts.PEERS:
        ours, theirs = results["kimi_ops"], results[way]
        for mine, other in zip(ours, theirs, strict=True) if backward else [(ours, theirs)]:
            assert error(other, mine) < 2e-2, way


def test_peers_that_write_too_much_are_left_out():
    pytest.importorskip("transformers")
    case = cases.ExpertsCase("small", 8, 64, 32, 12, backward=True)
    weights = bench_fused_experts.make_weights(case, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_fused_experts, "MOST_BYTES", 1)
        named = bench_fused_experts.Setting(case, weights).functions()
    assert list(named) == ["kimi_ops", "grouped_mm"]


@pytest.mark.parametrize("way", bench_train_step.PEERS)
def test_a_step_of_the_peer_moves_every_weight_as_ours_does(way):
    """The same roles and scales: Newton-Schulz in bf16 and the balance loss leave small angles."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = TrainSettings(preset="tiny", sequences=4, window=32, warmup=0.0)
    trainer = Trainer(settings)
    before = copy.deepcopy(trainer.model.state_dict())
    peer = bench_train_step.Peer(trainer.model, way, settings)
    batch = torch.randint(0, 64, (4, 33))
    trainer.step(batch, 0)
    peer.step(batch)
    theirs = dict(peer.model.named_parameters())
    for name, mine in trainer.model.named_parameters():
        mine, other = mine.detach(), theirs[name].detach()
        a, b = (mine - before[name]).flatten(), (other - before[name]).flatten()
        assert a.any() and b.any(), name
        assert torch.cosine_similarity(a, b, dim=0) > 0.95, name
        assert 0.8 < float(b.norm() / a.norm()) < 1.25, name


def test_cases_have_names_of_their_own_and_fit():
    for quick in (True, False):
        every = [
            cases.gemm_cases(quick), cases.quantized_cases(quick), cases.experts_cases(quick),
            cases.step_cases(quick),
        ]  # fmt: skip
        for chosen in every:
            assert len({str(case) for case in chosen}) == len(chosen)
        for case in cases.gemm_cases(quick):
            assert case.flops <= 500e9 and case.weight_bytes <= 3e9
    mini = KimiK2Config.mini()
    hidden, width = mini.hidden_size, mini.moe_intermediate_size
    assert cases.GEMM_SHAPES["mini gate+up"] == (hidden, 2 * width)
    assert cases.GEMM_SHAPES["mini down"] == (width, hidden)


def test_the_binding_roof_and_the_summary(capsys):
    assert roof_rate(100.0, 1.0, 10.0, 1.0) == 10.0  # 10 s of arithmetic, 1 s of memory
    assert roof_rate(100.0, 50.0, 10.0, 1.0) == 2.0
    options = cases.arguments("").parse_args([])
    report = Report("op", "cpu", options, peers=("a", "b", "dense"), reference="dense")
    times = {second: Time(second, second, second) for second in (1.0, 2.0, 8.0)}
    report.add(Row("one", times[1.0], 1.0, "TFLOP/s", 1.0, {"a": times[2.0], "dense": times[1.0]}))
    report.add(Row("two", times[1.0], 1.0, "TFLOP/s", 1.0, {"a": times[8.0], "b": times[1.0]}))
    assert report.summary() == {
        "a": {"geomean": pytest.approx(4.0), "worst": 2.0, "worst_case": "one"},
        "b": {"geomean": 1.0, "worst": 1.0, "worst_case": "two"},
    }
    report.print_summary()
    assert "against a: geomean 4.00x, worst 2.00x (one)" in capsys.readouterr().out


def test_cases_are_chosen_by_name():
    options = cases.arguments("").parse_args(["--cases", "E 24"])
    chosen = cases.select(cases.gemm_cases(False), options)
    assert chosen and all("E 24" in str(case) for case in chosen)
    options.cases = "no such case"
    with pytest.raises(SystemExit, match="no case is named like 'no such case'"):
        cases.select(chosen, options)
