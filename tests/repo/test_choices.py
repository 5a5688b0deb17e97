# SPDX-License-Identifier: MIT
"""Options that are names have them as types: `kimi_ops.choices` and what is accepted are equal."""

import inspect
import re
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

import kimi_ops
from kimi_ops import LocalWorld, choices, nn
from kimi_ops.activations import ActivationName
from kimi_ops.optim import ns_schedule
from kimi_ops.plan import plan
from kimi_ops.train.layout import check_schedule

LOGITS, IDS = torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32)
MATRICES = torch.zeros(8, 8, 4), torch.zeros(8, 4, 4)
WRONG: Any = "no such name"
LINEAR = torch.nn.Sequential(torch.nn.Linear(2, 2))


def expert_parallel(**options: Any) -> None:
    def work(group: Any) -> None:
        kimi_ops.ExpertParallel(
            group, num_experts=1, hidden=4, max_tokens_per_rank=1, device="cpu", **options
        )

    LocalWorld(1).run(work)


def clip(**options: Any) -> None:
    weight = torch.zeros(4, 2)
    options = {"layout": "mha", "head_dim": 2} | options
    kimi_ops.qk_clip_(torch.ones(2), q_weight=weight, k_weight=weight, **options)


# A call of each public function with a wrong name, and the type of that option.
CALLS: dict[str, tuple[Callable[[], Any], Any]] = {
    "topk_gate.score_function": (
        lambda: kimi_ops.topk_gate(LOGITS, 2, score_function=WRONG), choices.ScoreFunction,
    ),
    "topk_gate.select": (lambda: kimi_ops.topk_gate(LOGITS, 2, select=WRONG), choices.Selection),
    "topk_gate.select of ids": (
        lambda: kimi_ops.topk_gate(LOGITS, ids=IDS, select=WRONG), choices.Selection,
    ),
    "gate_plan.score_function": (
        lambda: kimi_ops.gate_plan(LOGITS, 2, score_function=WRONG), choices.ScoreFunction,
    ),
    "gate_plan.select": (lambda: kimi_ops.gate_plan(LOGITS, 2, select=WRONG), choices.Selection),
    "sequence_balance_loss.score_function": (
        lambda: kimi_ops.sequence_balance_loss(LOGITS, IDS, score_function=WRONG),
        choices.ScoreFunction,
    ),
    "quantile_histogram_.score_function": (
        lambda: kimi_ops.quantile_histogram_(
            torch.zeros(8, 4, dtype=torch.int32), LOGITS, 2, bounds=torch.tensor([-1.0, 1.0]),
            score_function=WRONG,
        ),
        choices.ScoreFunction,
    ),
    "normalized_scores.score_function": (
        lambda: kimi_ops.normalized_scores(LOGITS, WRONG), choices.ScoreFunction,
    ),
    "drop_to_capacity.by": (
        lambda: kimi_ops.drop_to_capacity(torch.ones(4, 2), IDS, 8, 1, by=WRONG), choices.DropRule,
    ),
    "fused_experts.activation": (
        lambda: kimi_ops.fused_experts(
            LOGITS[:, :4], *MATRICES, torch.ones(4, 2), IDS, activation=WRONG
        ),
        ActivationName,
    ),
    "newton_schulz.method": (
        lambda: kimi_ops.newton_schulz(LOGITS, method=WRONG), choices.AnyMethod,
    ),
    "newton_schulz.coefficients": (
        lambda: kimi_ops.newton_schulz(LOGITS, coefficients=WRONG), choices.Schedule,
    ),
    "ns_flops.method": (lambda: kimi_ops.ns_flops((2, 3), method=WRONG), choices.Method),
    "MuonClip.ns_method": (
        lambda: kimi_ops.MuonClip([torch.nn.Parameter(LOGITS)], ns_method=WRONG), choices.AnyMethod,
    ),
    "MuonClip.ns_coefficients": (
        lambda: kimi_ops.MuonClip([torch.nn.Parameter(LOGITS)], ns_coefficients=WRONG),
        choices.Schedule,
    ),
    "MuonClip.batch_dims": (
        lambda: kimi_ops.MuonClip([torch.nn.Parameter(LOGITS)], batch_dims=WRONG),
        choices.BatchDims,
    ),
    "muon_param_groups.expert_layout": (
        lambda: kimi_ops.muon_param_groups(LINEAR, expert_layout=WRONG), choices.ExpertLayout,
    ),
    "qk_clip_.layout": (lambda: clip(layout=WRONG), choices.AttentionLayout),
    "qk_clip_.gqa_mode": (lambda: clip(gqa_mode=WRONG), choices.GqaMode),
    "QKClip.gqa_mode": (lambda: kimi_ops.QKClip([LINEAR], gqa_mode=WRONG), choices.GqaMode),
    "ExpertParallel.backend": (lambda: expert_parallel(backend=WRONG), choices.AnyBackend),
    "ExpertParallel.layout": (lambda: expert_parallel(layout=WRONG), choices.DispatchLayout),
    "ExpertParallel.overflow": (lambda: expert_parallel(overflow=WRONG), choices.Overflow),
    "Experts.activation": (lambda: nn.Experts(2, 4, 4, activation=WRONG), ActivationName),
    "MLP.activation": (lambda: nn.MLP(4, 4, activation=WRONG), ActivationName),
    "StoredExperts.form": (lambda: nn.StoredExperts(2, 8, 8, form=WRONG), choices.StoredForm),
    "StoredExperts.activation": (
        lambda: nn.StoredExperts(2, 8, 8, form="fp8", activation=WRONG), ActivationName,
    ),
    "Router.score_function": (
        lambda: nn.Router(8, 4, 2, score_function=WRONG)(LOGITS), choices.ScoreFunction,
    ),
    "plan.mode": (lambda: plan("tiny", "h200", 1, mode=WRONG), choices.PlanMode),
    "plan.wire": (lambda: plan("tiny", "h200", 1, mode="serve", wire=WRONG), choices.Wire),
    "train.schedule": (lambda: check_schedule(WRONG), choices.PipelineSchedule),
}  # fmt: skip
# Forms with numbers, whose functions `kimi_ops.activations` are: no names.
WITH_NUMBERS = {"swiglu"}


@pytest.mark.parametrize("option", CALLS)
def test_what_is_accepted_is_the_type(option):
    call, kind = CALLS[option]
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    text = str(caught.value)
    listed = re.search(r"expected (?:one of )?(.*?)(?:, got|, a triple)", text)
    assert listed, text
    names = set(re.findall(r"[\w-]+", re.sub(r"\bor\b", " ", listed[1])))
    assert names - WITH_NUMBERS == set(get_args(kind)), text


def named(kind: Any) -> set[str]:
    """The names that an annotation holds."""
    if get_origin(kind) is Literal:
        return {name for name in get_args(kind) if isinstance(name, str)}
    return set().union(*(named(part) for part in get_args(kind)))


def signatures() -> dict[str, dict[str, Any]]:
    public = {name: getattr(kimi_ops, name) for name in kimi_ops.__all__}
    public |= {name: getattr(nn, name) for name in nn.__all__} | {"plan": plan}
    found = {}
    for name, value in public.items():
        function = value.__init__ if inspect.isclass(value) else value
        if callable(function) and hasattr(function, "__annotations__"):
            found[name] = get_type_hints(function)
    return found


def is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) in (Union, UnionType) and str in get_args(kind))


# Names of other things than options, or what is accepted depends on another option.
OTHERS = {"device", "ns_dtype", "momentum_dtype", "adjust_lr_fn", "plan.model", "plan.hardware"}
UNTRIED = {"plan.weights"}


def test_every_option_that_is_a_name_has_a_type_and_is_tried():
    for function, hints in signatures().items():
        for option, kind in hints.items():
            place = f"{function}.{option}"
            if is_text(kind) and option != "return" and not {option, place} & OTHERS:
                pytest.fail(f"{place}: expected a type of kimi_ops.choices, got {kind}")
            if named(kind) - {"auto"} and place not in UNTRIED:
                assert place in CALLS, f"add a call with a wrong {option}"


def test_schedules_are_the_type():
    assert set(get_args(choices.Schedule)) == {*ns_schedule.SCHEDULES, ns_schedule.AOL}
