# SPDX-License-Identifier: MIT
"""What calls say and give is what was recorded (tests/repo/*.json)."""

import pytest

import kimi_ops
from tests.repo import interfaces, messages, outputs, record

MESSAGES = record.load("messages")
BY_OP = {}
for case in MESSAGES:
    BY_OP.setdefault(case.split("(")[0], []).append(case)


@pytest.mark.parametrize("op", BY_OP)
def test_messages_are_the_recorded_ones(op):
    said = {case: messages.say(case) for case in BY_OP[op]}
    assert said == {case: MESSAGES[case] for case in BY_OP[op]}, f"if wanted: {record.COMMAND}"


def test_every_op_has_messages():
    operators = {f"ops.{name}" for name in interfaces.operators() if not name.endswith("_forward")}
    plain = {"DenseGate", "ExpertPlacement", "PermutePlan", "SequenceCounts", "TopkGate"}
    plain |= {"info", "is_batch_invariant"}
    plain |= {"get_cmake_dir", "get_include", "get_pkgconfig_dir"}
    plain |= {"release_kept_memory"}
    public = set(kimi_ops.__all__) - plain  # which refuse nothing
    inside = {"ops.count_once_", "ops.quantized_gemm_dgrad"}  # called by the model, a backward
    assert not ((operators - inside) | public) - BY_OP.keys()


@pytest.mark.parametrize("gemm_engine", outputs.CPU + outputs.SIMT, indirect=True)
def test_outputs_are_the_recorded_bits(gemm_engine):
    recorded = record.load_outputs().get(gemm_engine.name)
    if not recorded:
        pytest.skip(f"no record of {gemm_engine.name} yet: {record.COMMAND}")
    assert outputs.digests(gemm_engine.name) == recorded, f"if wanted: {record.COMMAND}"


@pytest.mark.parametrize("name", ["schemas", "layouts", "states"])
def test_interfaces_are_the_recorded_ones(name):
    assert getattr(interfaces, name)() == record.load(name), f"if wanted: {record.COMMAND}"
