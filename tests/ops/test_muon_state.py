# SPDX-License-Identifier: MIT
"""Copies, pickles and checkpoints of MuonClip: the keys of the original, every dtype kept, hooks
with the last word, and nothing taken over where something is wrong."""

import copy
import functools
import math
import pickle

import pytest
import torch
from optimizers import make, rand, same, train, values
from torch import nn

from kimi_ops import MuonClip

INF, NAN = math.inf, math.nan


def doubled(lr: float, shape: tuple[int, int]) -> float:
    return 2 * lr


# ---- copies


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("function", [None, doubled, functools.partial(doubled)])
def test_a_copy_has_the_keys_of_the_original_and_goes_on(clone, function):
    params, optimizer = make(adjust_lr_fn=function)
    train(optimizer, params)
    twins, twin = clone((params, optimizer))
    assert twin.defaults.keys() == optimizer.defaults.keys()
    for ours, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert ours.keys() == theirs.keys()
        assert callable(theirs["adjust_lr_fn"]) == (function is not None)
    train(optimizer, params)
    train(twin, twins)
    assert same(values(params, optimizer), values(twins, twin))


def test_a_lambda_is_copied_and_pickle_names_it():
    params, optimizer = make(adjust_lr_fn=lambda lr, shape: lr)
    twins, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params)
    train(twin, twins)
    assert same(params, twins)
    with pytest.raises(TypeError, match="adjust_lr_fn: .*lambda.*top of a module"):
        pickle.dumps(optimizer)


def test_a_state_holds_no_function_and_asks_for_one(tmp_path):
    params, optimizer = make(adjust_lr_fn=lambda lr, shape: lr)
    train(optimizer, params)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    again, fresh = make(adjust_lr_fn=doubled)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["adjust_lr_fn"] is doubled
    bare, other = make()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="adjust_lr_fn: .*give this one the function"):
        other.load_state_dict(saved)
    assert other.state_dict() == before


# ---- checkpoints


def test_a_loaded_state_has_the_keys_of_the_original():
    params, optimizer = make()
    train(optimizer, params)
    again, fresh = make(lr=0.2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.defaults.keys() == optimizer.defaults.keys()
    for ours, theirs in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert ours.keys() == theirs.keys() and theirs["lr"] == 0.1
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_loaded_state_is_a_copy_in_the_dtype_of_the_arithmetic(dtype):
    params, optimizer = make(dtype)
    train(optimizer, params)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    again, fresh = make(dtype)
    fresh.load_state_dict(saved)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(params, again, strict=True):
        for key, value in optimizer.state[p].items():
            mine = fresh.state[q][key]
            assert torch.equal(mine, value) and mine.data_ptr() != value.data_ptr()
            assert mine.dtype == (torch.float32 if key == "step" else wide)
    train(fresh, again)  # moves nothing of the caller's
    assert torch.equal(saved["state"][1]["step"], kept["state"][1]["step"])
    assert torch.equal(saved["state"][0]["momentum_buffer"], kept["state"][0]["momentum_buffer"])


def test_hooks_before_loading_have_the_last_word():
    params, optimizer = make(torch.bfloat16)
    train(optimizer, params)
    saved = optimizer.state_dict()
    again, fresh = make(torch.bfloat16)

    def only_adamw(_, state_dict):
        state = {1: {**state_dict["state"][1], "exp_avg": torch.full((5,), 0.3)}}
        return {**state_dict, "state": state}

    seen = []
    handle = fresh.register_load_state_dict_pre_hook(only_adamw)
    fresh.register_load_state_dict_post_hook(
        lambda self: seen.append(self.state[again[1]]["exp_avg"].clone())
    )
    fresh.load_state_dict(saved)
    assert again[0] not in fresh.state and len(saved["state"]) == 2
    assert torch.equal(fresh.state[again[1]]["exp_avg"], torch.full((5,), 0.3))  # fp32, not bf16
    assert torch.equal(seen[0], torch.full((5,), 0.3))
    handle.remove()
    fresh.load_state_dict(saved)
    assert again[0] in fresh.state


def test_hooks_of_state_dicts_and_steps():
    params, optimizer = make()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda self: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda self, state: {**state, "extra": 1})
    optimizer.register_step_pre_hook(lambda self, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda self, args, kwargs: calls.append("after"))
    train(optimizer, params, 1)
    assert optimizer.state_dict()["extra"] == 1
    assert calls == ["before", "after", "before saving"]
    optimizer.state["mine"] = 3  # torch keeps what belongs to no parameter
    again, fresh = make()
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["mine"] == 3


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s["param_groups"][1].update(lr=INF), "lr: expected a finite number"),
        (lambda s: s["param_groups"][0].update(momentum=NAN), "momentum"),
        (lambda s: s["param_groups"][1].update(amsgrad=True), "amsgrad: expected False"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.ones(4, 4)), "expected shape .6, 4."),
        (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_a_refused_state_changes_nothing(spoil, text):
    params, optimizer = make()
    train(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    before, groups = values(params, optimizer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(saved)
    assert same(before, values(params, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups["param_groups"]


def test_checkpoints_from_and_to_torch():
    """Twenty steps, each side loading the other's state after ten."""
    shapes = [(6, 4), (5,)]
    for i, (kind, keys) in enumerate(((torch.optim.Muon, {}), (torch.optim.AdamW, {"eps": 1e-3}))):
        algorithm = ("muon", "adamw")[i]
        theirs, ours = (nn.Parameter(rand(*shapes[i], seed=1)) for _ in range(2))
        options = {"lr": 0.02, "weight_decay": 0.1, **keys}
        a = MuonClip([{"params": [ours], "algorithm": algorithm, **options}])
        b = kind([theirs], **options)
        for first, second in (((a, ours), (b, theirs)), ((b, theirs), (a, ours))):
            train(*((first[0], [first[1]])), 10)
            with torch.no_grad():
                second[1].copy_(first[1])
            second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
            for key in ("lr", "weight_decay", "eps"):
                assert second[0].param_groups[0][key] == options.get(key, 1e-7)
        assert "amsgrad" not in a.param_groups[0]
        train(a, [ours], 3)
        train(b, [theirs], 3)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-2 if i == 0 else 1e-6)
