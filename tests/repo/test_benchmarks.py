# SPDX-License-Identifier: MIT
"""The peers of the benchmarks do the work that they are compared for."""

import copy
import inspect
import json
import re
import time
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
import kimi_ops
from benchmarks import (
    bench_call_overhead,
    bench_fused_experts,
    bench_generate,
    bench_grouped_gemm,
    bench_train_step,
    cases,
    measure,
)
from benchmarks.measure import GpuSampler, Time, roof_rate
from benchmarks.options import BENCHMARKS, parse, parser
from benchmarks.report import Row, Table
from benchmarks.session import Session
from kimi_ops.models.kimi_k2.config import KimiK2Config
from kimi_ops.nn import Router
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


def test_small_calls_give_what_their_peers_give_and_know_their_targets():
    for call in bench_call_overhead.calls():
        ours = call.ours()
        assert bool(call.times_peer) == bool(call.peer) != bool(call.microseconds)
        if call.name.startswith("topk_gate T"):
            assert torch.equal(ours.indices, call.peer().indices)
        elif call.peer:
            mine, other = (x if isinstance(x, torch.Tensor) else x[0] for x in (ours, call.peer()))
            assert error(other, mine) < 1e-2, call
    peers = {"torch": Time(2e-6, 2e-6, 2e-6)}
    assert call.target(peers) == pytest.approx(1 / (1.2 * 2e-6))
    assert bench_call_overhead.Call("alone", call.ours, microseconds=4).target({}) == 250e3


def test_every_op_has_a_cost():
    named = {str(call).split()[0] for call in bench_call_overhead.calls()}
    for call in bench_call_overhead.every_op():
        named.add(str(call).split(".")[0])
        call.ours()
    for name in sorted(set(kimi_ops.__all__) - named):
        value = getattr(kimi_ops, name)
        assert inspect.isclass(value) or name in HOST, f"every_op: add {name}"


# Functions that do no work of a step.
HOST = {
    "eplb", "expert_capacity", "get_cmake_dir", "get_include", "get_pkgconfig_dir", "info",
    "is_batch_invariant", "join_gate_up_", "move_experts", "muon_param_groups", "ns_flops",
    "release_kept_memory", "set_batch_invariant", "tune_ns_restarts",
}  # fmt: skip


def test_small_calls_are_counted_by_the_million(capsys):
    threads = torch.get_num_threads()
    session = benchmarks.__main__.main(
        ["--only", "call_overhead", "--quick", "--cases", "permute_plan", "--threads", "1"]
    )
    (row,) = session.tables[0].rows
    assert "Mcall/s" in capsys.readouterr().out and row.rate() == 1 / row.time.median
    assert row.roof == pytest.approx(1e6 / 6)
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("case", cases.generate_cases(quick=True), ids=str)
def test_generation_and_its_peers_compute_the_same(case):
    pytest.importorskip("transformers")
    named = bench_generate.functions(case, bench_generate.build(case, "cpu"))
    assert list(named) == ["kimi_ops", *bench_generate.PEERS]
    for _ in range(2):  # a call leaves the cache as it found it
        ours, *theirs = (function().float() for function in named.values())
        for other in theirs:
            torch.testing.assert_close(ours, other, rtol=0.05, atol=0.02)


def test_a_step_reads_the_experts_that_its_tokens_choose():
    """All weights but those of the embedding, and of no expert that nobody chose."""
    case = next(case for case in cases.generate_cases(quick=True) if not case.prompt)
    model = bench_generate.build(case, "cpu")
    with torch.no_grad():  # every token to the same experts
        for part in model.modules():
            if isinstance(part, Router):
                part.e_score_correction_bias[: model.config.num_experts_per_tok] = 9.0
    ours = bench_generate.functions(case, model)["kimi_ops"]
    chosen = ours.experts()
    assert chosen == [model.config.num_experts_per_tok] * len(chosen) and chosen
    expert = sum(
        parameter[0].numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and "shared" not in name
    )
    unread = (model.config.n_routed_experts - model.config.num_experts_per_tok) * expert
    read = sum(parameter.numel() for parameter in model.parameters()) - unread
    embedding = model.config.vocab_size * model.config.hidden_size
    assert bench_generate.decode_bytes(ours) == 2.0 * (read - embedding)


def test_cases_have_names_of_their_own_and_fit():
    for quick in (True, False):
        every = [cases.quantized_cases(quick), cases.fp8_cases(quick), cases.step_cases(quick)]
        for device in ("cpu", "cuda"):
            every += [
                cases.gate_cases(quick, device), cases.permute_cases(quick, device),
                cases.gemm_cases(quick, device), cases.experts_cases(quick, device),
            ]  # fmt: skip
        for chosen in every:
            assert chosen and len({str(case) for case in chosen}) == len(chosen)
        for case in cases.gemm_cases(quick, "cuda"):
            assert case.weight_bytes <= 24e9  # of 80
        for case in cases.gemm_cases(quick):
            assert case.flops <= 500e9 and case.weight_bytes <= 3e9
    mini = KimiK2Config.mini()
    hidden, width = mini.hidden_size, mini.moe_intermediate_size
    assert cases.GEMM_SHAPES["mini gate+up"] == (hidden, 2 * width)
    assert cases.GEMM_SHAPES["mini down"] == (width, hidden)


def test_the_binding_roof_and_the_summary(capsys):
    assert roof_rate(100.0, 1.0, 10.0, 1.0) == 10.0  # 10 s of arithmetic, 1 s of memory
    assert roof_rate(100.0, 50.0, 10.0, 1.0) == 2.0
    table = Table("op", "cpu", peers=("a", "b", "dense"), reference="dense")
    times = {second: Time(second, second, second) for second in (1.0, 2.0, 8.0)}
    table.add(Row("one", times[1.0], 1.0, "TFLOP/s", 1.0, {"a": times[2.0], "dense": times[1.0]}))
    table.add(Row("two", times[1.0], 1.0, "TFLOP/s", 1.0, {"a": times[8.0], "b": times[1.0]}))
    assert table.summary() == {
        "a": {"geomean": pytest.approx(4.0), "worst": 2.0, "worst_case": "one"},
        "b": {"geomean": 1.0, "worst": 1.0, "worst_case": "two"},
    }
    table.print_summary()
    assert "against a: geomean 4.00x, worst 2.00x (one)" in capsys.readouterr().out


def test_a_peer_that_fails_or_is_slow_is_left_out_with_a_word_and_ours_may_not_fail(
    capsys, monkeypatch
):
    def fails():
        raise NotImplementedError("serves float64 only")

    monkeypatch.setattr("benchmarks.report.MOST_SECONDS", 0.05)
    table = Table("op", "cpu", quick=True, memory="good")
    named = {"kimi_ops": lambda: None, "bad": fails, "good": lambda: None}
    named["slow"] = lambda: time.sleep(0.1)
    row = table.compare("case", named, 1.0, "GB/s", lambda times: 1.0 / times["good"].median)
    assert set(row.peers) == {"good"} and row.roof == 1.0 / row.peers["good"].median
    assert row.left_out == {"bad": "serves float64 only", "slow": "0 s a call"}
    assert "case: without bad: serves float64 only" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):
        table.compare("case", {"kimi_ops": fails}, 1.0, "GB/s", 1.0)


class FakeCuda:
    """The calls of torch.cuda that a sample makes, in order; a wait takes 1 ms."""

    def __init__(self, monkeypatch):
        self.calls = []
        names = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                names.calls.append("event")

            def synchronize(self):
                names.calls.append("synchronize")

            def elapsed_time(self, other):
                return 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda n: self.calls.append(("wait", n)))
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda n, device: ones(4))
        monkeypatch.setattr(torch.Tensor, "sum", lambda x: self.calls.append("read"))


def test_on_a_gpu_the_host_runs_ahead_and_the_clock_stands_beside_the_time(monkeypatch):
    fake = FakeCuda(monkeypatch)
    sampler = GpuSampler()
    seconds, mhz = sampler.sample(lambda: fake.calls.append("call"), host=1e-3)
    first, *order, last = fake.calls
    assert first[0] == "wait" and first[1] > 2e-3 * 1.9e9  # longer than the host takes
    assert order == ["read", "event", "call", "event", ("wait", sampler.CYCLES), "event"]
    assert last == "synchronize"
    assert seconds == 1e-3 and mhz == pytest.approx(sampler.CYCLES / 1e-3 / 1e6)
    sampler.sample(lambda: None, host=60.0)
    assert fake.calls[len(order) + 2] == ("wait", sampler.LONGEST)
    fake.calls.clear()
    named = {"ours": lambda: fake.calls.append("ours"), "peer": lambda: fake.calls.append("peer")}
    times = measure.measure(named, "cuda", quick=True)
    turns = [call for call in fake.calls if call in named][6:]
    assert turns == ["ours", "peer"] * (len(turns) // 2) and len(turns) >= 6
    assert times["ours"].mhz == pytest.approx(200.0)


def options(*arguments):
    return parse(parser("benchmarks", ""), list(arguments))


def test_cases_are_chosen_by_name(capsys):
    session = Session(options("--cases", "E 24"))
    chosen = session.select(cases.gemm_cases(False))
    assert chosen and all("E 24" in str(case) for case in chosen)
    session = Session(options("--cases", "no such case"))
    assert not session.select(chosen)
    with pytest.raises(SystemExit, match="no case is named like 'no such case'") as error:
        session.finish()
    assert str(chosen[0]) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only"], "--only: expected one or more of all_to_all, .*, two_batches, got nothing"),
        (["--only", "topk"], "--only: expected one or more of .*topk_gate.*, got topk"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--json", "."], "--json: expected a file, got the folder ."),
        (["--plot", "/dev/null/x.svg"], "--plot: the folder of /dev/null/x.svg cannot be made"),
        (["--device", "tpu"], "--device: invalid choice"),
        (["--jason", "x"], "unrecognized arguments: --jason"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        benchmarks.__main__.main(arguments)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert re.match(f"benchmarks: (argument )?{sentence}", said) and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_named(capsys, monkeypatch):
    for version, reason in ((None, "is a CPU build"), ("13.0", "torch finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(SystemExit):
            options("--device", "cuda")
        assert re.match(f"benchmarks: --device: cuda: .*{reason}", capsys.readouterr().err)


def test_help_names_every_benchmark_and_every_default(capsys):
    with pytest.raises(SystemExit) as error:
        benchmarks.__main__.main(["--help"])
    assert not error.value.code
    said = capsys.readouterr().out
    assert set(BENCHMARKS) == {
        path.stem[6:] for path in Path(benchmarks.__file__).parent.glob("bench_*.py")
    }
    for name, line in BENCHMARKS.items():
        assert f"  {name} " in said and line in said
    flags = re.findall(r"^  (--[\w-]+)", said, re.MULTILINE)
    texts = re.split(r"^  --[\w-]+", said.split("names:")[0], flags=re.MULTILINE)[1:]
    assert len(flags) == 8
    for flag, text in zip(flags, texts, strict=True):
        assert "default:" in " ".join(text.split()), flag


def test_one_json_and_one_plot_hold_all_tables(tmp_path, capsys, monkeypatch):
    found = tmp_path / "new" / "all.json"
    chart = tmp_path / "all.svg"
    monkeypatch.setattr("benchmarks.session.read_bandwidth", lambda device: 1e9)
    arguments = ["--only", "topk_gate", "threads", "--quick", "--no-compile", "--cases", "a torch"]
    benchmarks.__main__.main([*arguments, "--json", str(found)])
    assert [table["op"] for table in json.loads(found.read_text())["tables"]] == ["threads"]
    arguments[-1] = "T 1"
    benchmarks.__main__.main([*arguments[:-2], "--json", str(found), "--plot", str(chart)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.svg", "new"]
    assert [path.name for path in found.parent.iterdir()] == ["all.json"]
    report = json.loads(found.read_text())
    assert [table["op"] for table in report["tables"]] == ["topk_gate", "threads"]
    assert report["tables"][0]["engine"] == report["info"]["engines"]["topk_gate"]["cpu"]
    assert report["roofs"] == {"bandwidth": 1e9} and report["device"] == "cpu"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"]) and report["command"]
    assert report["info"]["torch"] == torch.__version__ and report["info"]["cpu"]["processor"]
    row = report["tables"][0]["rows"][0]
    assert row["time"]["median"] > 0 and row["ratios"]["torch"] > 0 and row["unit"] == "GB/s"
    assert chart.read_text().count("against torch") == 1
