# SPDX-License-Identifier: MIT
"""Numbers, options and keys of a group, checked when it is added and before anything moves."""

import math
from collections import UserList

import pytest
import torch
from optimizers import make, parameters, rand, same, train, values
from torch import nn

import kimi_ops
from kimi_ops import MuonClip
from kimi_ops.optim import group_checks

INF, NAN = math.inf, math.nan


# ---- numbers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, bad) for key in ("lr", "weight_decay") for bad in (INF, NAN, -1.0)),
        *((key, bad) for key in ("adamw_eps", "eps") for bad in (INF, NAN, -1.0)),
        *(("momentum", bad) for bad in (NAN, 1.0, "0.9")),
        *(("betas", bad) for bad in ((0.9, NAN), (0.9,), 0.9, (0.9, 1.0))),
        *(("max_grad_norm", bad) for bad in (INF, NAN, 0.0)),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", torch.tensor(INF)),
        ("lr", "0.1"),
        ("nesterov", None),
        ("maximize", 1),
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_before_anything_moves(key: str, value):
    with pytest.raises((ValueError, TypeError), match=f"MuonClip: {key}: expected"):
        make(**{key: value})
    params, optimizer = make()
    train(optimizer, params)
    last = optimizer.param_groups[-1]
    if key in ("momentum", "eps", "nesterov"):
        last = optimizer.param_groups[0]
        optimizer.param_groups.reverse()  # what is wrong comes last
    last[key] = value
    before = values(params, optimizer)
    with pytest.raises((ValueError, TypeError), match=f"MuonClip: {key}: expected"):
        train(optimizer, params, 1)
    assert same(before, values(params, optimizer))


@pytest.mark.parametrize(
    ("param", "keys", "text"),
    [
        (
            torch.ones(6, 4),
            {"split_sizes": "22"},
            "split_sizes: expected a sequence of ints, got '22'",
        ),
        (
            torch.ones(6, 4),
            {"split_sizes": [3.0, 3.0]},
            "split_sizes: expected a sequence of ints, got",
        ),
        (torch.ones(6, 4), {"foreach": "yes"}, "foreach: expected True, False or None, got 'yes'"),
        (
            torch.ones(1, 4).expand(6, 4),
            {},
            "expected memory of its own for each element, got shape",
        ),
        (nn.parameter.UninitializedParameter(), {}, "expected one with a shape, got a lazy one"),
    ],
)
def test_a_group_that_no_step_could_serve_is_refused(param, keys, text):
    lazy = isinstance(param, nn.parameter.UninitializedParameter)
    with pytest.raises((ValueError, TypeError), match=f"MuonClip: .*{text}"):
        MuonClip([{"params": [param if lazy else nn.Parameter(param)], **keys}])


@pytest.mark.parametrize("key", ["ns_steps", "ns_method", "split_sizes", "adjust_lr_fn"])
def test_options_changed_between_steps_are_checked_before_anything_moves(key: str):
    wrong = {"ns_steps": 0, "ns_method": "svd", "split_sizes": (5, 5)}
    wrong["adjust_lr_fn"] = lambda lr, shape: NAN
    params = [nn.Parameter(rand(6, 4, seed=i)) for i in range(2)]
    optimizer = MuonClip([{"params": [p]} for p in params])
    train(optimizer, params)
    optimizer.param_groups[1][key] = wrong[key]
    before = values(params, optimizer)
    with pytest.raises(ValueError, match=key.removeprefix("ns_")):
        train(optimizer, params, 1)
    assert same(before, values(params, optimizer))


def _shrink_a_split(group: dict) -> None:
    group["split_sizes"][0] = 2


def _append_a_vector(group: dict) -> None:
    group["params"].append(nn.Parameter(rand(3, seed=1)))


def _replace_by_a_vector(group: dict) -> None:
    group["params"][0] = nn.Parameter(rand(3, seed=1))


def _make_complex(group: dict) -> None:
    group["params"][0].data = group["params"][0].data.to(torch.complex64)


def _leave_gaps(group: dict) -> None:
    group["params"][0].data = rand(6, 4, 5, seed=1)[..., :3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_shrink_a_split, r"split_sizes: \(2, 3\) must be positive and add up to the 6 rows"),
        (_append_a_vector, "parameter #1: expected a matrix"),
        (_replace_by_a_vector, "parameter #0: expected a matrix"),
        (_make_complex, "parameter #0: expected a dense real floating-point tensor"),
        (_leave_gaps, "batch_dims: 'flatten' needs a parameter without gaps"),
    ],
)
def test_a_group_changed_where_it_lies_is_checked_again(change, text: str):
    flat = change is _leave_gaps
    param = nn.Parameter(rand(6, 4, 3, seed=0) if flat else rand(6, 4, seed=0))
    keys = {"batch_dims": "flatten"} if flat else {"split_sizes": [3, 3]}
    optimizer = MuonClip([{"params": [param], **keys}])
    train(optimizer, [param])
    change(optimizer.param_groups[0])
    before = values([param], optimizer)
    param.grad = torch.ones_like(param)
    with pytest.raises((TypeError, ValueError), match=text):
        optimizer.step()
    assert same(before, values([param], optimizer))


def test_only_numbers_are_checked_where_nothing_else_changes(monkeypatch):
    seen = []
    check = group_checks.check_group
    monkeypatch.setattr(group_checks, "check_group", lambda g: (seen.append(g), check(g)))
    params, optimizer = make(ns_coefficients=[(3.0, -4.0, 2.0)] * 5)
    train(optimizer, params)
    assert len(seen) == 2
    optimizer.param_groups[0].update(lr=0.2, momentum=0.5, weight_decay=0.0, betas=(0.5, 0.5))
    train(optimizer, params)
    assert len(seen) == 2
    optimizer.param_groups[0]["ns_coefficients"] = UserList([(3.0, -4.0, 2.0)] * 5)
    train(optimizer, params)  # what may change in ways of its own is checked each time
    assert len(seen) == 4


LOGITS = torch.ones(2, 4)


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rate", lambda x: kimi_ops.update_expert_bias_(LOGITS[0], torch.arange(4), x)),
        ("coefficient", lambda x: kimi_ops.z_loss(LOGITS, coefficient=x)),
        ("scaling_factor", lambda x: kimi_ops.topk_gate(LOGITS, 2, scaling_factor=x)),
        ("eps", lambda x: kimi_ops.newton_schulz(LOGITS, eps=x)),
        ("alpha", lambda x: kimi_ops.syrk(LOGITS, alpha=x)),
        ("perturbation", lambda x: kimi_ops.tune_ns_restarts([(3.0, -4.0, 2.0)] * 3, 1, x)),
    ],
)
def test_no_op_takes_a_number_that_is_not_finite(name: str, call, bad: float):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number, got {bad}"):
        call(bad)
    assert (LOGITS == 1).all()


def test_a_tensor_as_rate():
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        params, optimizer = make(lr=lr)
        train(optimizer, params)
        results.append(values(params, optimizer))
    torch.testing.assert_close(results[0], results[1])
    assert same(results[1], results[2])


# ---- keys


@pytest.mark.parametrize(
    ("key", "value", "kind", "text"),
    [
        ("learning_rate", 1.0, TypeError, "learning_rate: expected a key of a group"),
        ("wieght_decay", 1.0, TypeError, "'weight_decay' is meant"),
        ("use_muon", True, TypeError, "'algorithm' is meant"),
        ("head_dims", 1, TypeError, "'head_dim' is meant"),
        ("amsgrad", True, ValueError, "amsgrad: expected False"),
        ("differentiable", True, ValueError, "differentiable: expected False"),
        ("initial_lr", 0.1, None, ""),
        ("fused", True, None, ""),
        ("amsgrad", False, None, ""),
        ("name", "matrices", None, ""),
        ("_mine", 3, None, ""),
    ],
)
def test_a_key_that_nobody_reads_is_named(key, value, kind, text):
    group = {"params": [nn.Parameter(torch.ones(2, 2))], key: value}
    if kind is None:
        assert MuonClip([group]).param_groups[0][key] == value
        return
    with pytest.raises(kind, match=text):
        MuonClip([group])


def test_a_vector_in_a_muon_group_names_the_way():
    with pytest.raises(ValueError, match=r"muon_param_groups\(model\)"):
        MuonClip(nn.Linear(2, 2).parameters())


# ---- max_grad_norm, which AdamW groups alone read


def test_a_muon_group_does_not_clip_gradients():
    refused = {"match": "^MuonClip: max_grad_norm: expected None without a group of AdamW"}
    matrix, vector = parameters()
    adamw = {"params": [vector], "algorithm": "adamw"}
    for params in ([matrix], [{"params": [matrix]}], [("w", matrix)]):
        with pytest.raises(ValueError, **refused):
            MuonClip(params, max_grad_norm=1.0)
    with pytest.raises(ValueError, **refused):
        MuonClip([{"params": [matrix], "max_grad_norm": 1.0}, adamw], max_grad_norm=1.0)
    optimizer = MuonClip([{"params": [matrix]}, adamw], max_grad_norm=1.0)
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [None, 1.0]
    late = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, **refused):
        optimizer.add_param_group({"params": [late], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [late], "max_grad_norm": None})
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = matrix.detach().clone()
    matrix.grad = torch.ones_like(matrix)
    with pytest.raises(ValueError, **refused):
        optimizer.step()
    assert torch.equal(matrix, before)


def test_a_state_whose_muon_groups_have_a_max_grad_norm():
    """As earlier versions wrote where the constructor was given one: it loads where that clips
    AdamW groups."""
    params, optimizer = make(max_grad_norm=0.5)
    train(optimizer, params)
    state = optimizer.state_dict()
    state["param_groups"][0]["max_grad_norm"] = 0.5
    _, other = make()
    other.load_state_dict(state)
    assert [group["max_grad_norm"] for group in other.param_groups] == [None, 0.5]
    alone = MuonClip(parameters()[:1])
    state = alone.state_dict()
    alone.load_state_dict(state)
    assert alone.param_groups[0]["max_grad_norm"] is None
    state["param_groups"][0]["max_grad_norm"] = 0.5
    with pytest.raises(ValueError, match="max_grad_norm: expected None without a group of AdamW"):
        alone.load_state_dict(state)
