# SPDX-License-Identifier: MIT
"""MuonClip as a torch.optim.Optimizer, by the ideas of torch's own tests: schedulers, a default
device, odd groups and parameters."""

import copy
import warnings

import pytest
import torch
from optimizers import make, parameters, rand, same, train
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from kimi_ops import MuonClip, newton_schulz
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

# ---- schedulers


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, base_momentum=[0.6, 0.7], max_momentum=[0.8, 0.85]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, base_momentum=0.7),
}


def advance(scheduler) -> None:
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(1.0) if plateau else scheduler.step()


def test_every_scheduler_of_torch_is_tried():
    base = lr_scheduler.LRScheduler
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base
    }
    assert found - SCHEDULERS.keys() == {"_LRScheduler"} & found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_what_they_do_to_torch(name: str):
    """Rates and momenta after every step, those of torch.optim.Muon and AdamW beside it."""
    params, ours = make()
    twins = parameters()
    theirs = torch.optim.AdamW([{"params": [p]} for p in twins], lr=0.1)
    schedulers = [SCHEDULERS[name](ours), SCHEDULERS[name](theirs)]
    muon, adamw = ours.param_groups
    for _ in range(7):
        beta = theirs.param_groups[0]["betas"][0]
        train(ours, params, 1)
        theirs.step()
        for scheduler in schedulers:
            advance(scheduler)
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        if "Cycl" in name or "Cycle" in name:
            assert muon["momentum"] == beta  # that of the step
            assert adamw["betas"][0] == theirs.param_groups[1]["betas"][0] != 0.9
        else:
            assert muon["momentum"] == 0.95 and adamw["betas"] == (0.9, 0.95)
    assert (muon["momentum"] != 0.95) == ("Cycl" in name or "Cycle" in name)
    state, keys = copy.deepcopy((schedulers[0].state_dict(), ours.state_dict()))
    again, fresh = make()
    resumed = SCHEDULERS[name](fresh)
    resumed.load_state_dict(state)
    fresh.load_state_dict(keys)
    for scheduler in (schedulers[0], resumed):
        advance(scheduler)
    for x, y in zip(ours.param_groups, fresh.param_groups, strict=True):
        assert (x["lr"], x["momentum"], x["betas"]) == (y["lr"], y["momentum"], y["betas"])


def test_a_cycled_momentum_is_the_one_that_steps():
    params, optimizer = make()
    twin = nn.Parameter(params[0].detach().clone())
    other = torch.optim.Muon([twin], lr=0.1)
    schedulers = [
        lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, base_momentum=0.5)
        for o in (optimizer, other)
    ]
    for step in range(5):
        params[0].grad = twin.grad = rand(6, 4, seed=step)
        optimizer.step()
        other.step()
        buffers = optimizer.state[params[0]], other.state[twin]
        assert torch.equal(*(state["momentum_buffer"] for state in buffers))
        for scheduler in schedulers:
            scheduler.step()


def test_betas_of_a_muon_group_without_a_cycle_are_nobodys():
    _, optimizer = make()
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    assert optimizer.param_groups[0]["momentum"] == 0.95


# ---- devices


def test_a_default_device_is_not_where_things_are_made():
    results = []
    ids = torch.arange(12).view(2, 6)
    model = KimiK2(KimiK2Config.tiny())
    for device in ("cpu", "meta"):
        with torch.device(device):
            model.init_weights(3)
            optimizer = MuonClip(
                [{"params": [p], "algorithm": "muon" if p.ndim == 2 else "adamw"}
                 for p in model.parameters()],
                max_grad_norm=1.0,
            )  # fmt: skip
            for _ in range(2):
                optimizer.zero_grad()
                (model(ids).square().mean() + model.auxiliary_loss()).backward()
                optimizer.step()
            assert optimizer.nonfinite_parameters() == []
            optimizer.load_state_dict(optimizer.state_dict())
            results.append([p.detach().clone() for p in model.parameters()])
            results[-1].append(model.generate(ids, max_new_tokens=2))
    assert same(*results)
    steps = [s["step"] for s in optimizer.state.values() if "step" in s]
    assert steps and all(step.device.type == "cpu" for step in steps)


def test_several_devices_in_one_call_are_refused():
    with pytest.raises(ValueError, match="call once for each device"):
        newton_schulz([torch.ones(2, 2), torch.ones(2, 2, device="meta")])


# ---- parameters


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_gradients", [torch.contiguous_format, torch.channels_last])
def test_convolutions_in_any_order_of_memory(memory, of_gradients):
    start, flat = rand(6, 3, 2, 2, seed=1), nn.Parameter(rand(6, 12, seed=1))
    flat.data = start.flatten(1).clone()
    param = nn.Parameter(start.to(memory_format=memory))
    keys = {"lr": 0.1, "ns_dtype": "float32"}
    optimizer = MuonClip([{"params": [param], "batch_dims": "flatten"}], **keys)
    other = MuonClip([flat], **keys)
    for seed in (2, 3):
        grad = rand(6, 3, 2, 2, seed=seed)
        param.grad = grad.to(memory_format=of_gradients)
        flat.grad = grad.flatten(1)
        optimizer.step()
        other.step()
    assert param.is_contiguous(memory_format=memory)
    torch.testing.assert_close(param.flatten(1), flat, rtol=1e-4, atol=1e-5)
    if memory == torch.contiguous_format:
        assert torch.equal(param.flatten(1), flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_dtypes_and_directions(dtype, maximize):
    params, optimizer = make(dtype, maximize=maximize, weight_decay=0.0, lr=0.01)
    start = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, old in zip(params, start, strict=True):
        assert param.dtype == dtype and ((param - old).sum() > 0) == maximize


def test_a_fit_of_a_line_is_found():
    """torch's own test of every optimizer: the loss falls, under a scheduler, with a closure."""
    weight, bias = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3))
    x, goal = rand(64, 4, seed=1), rand(3, 4, seed=2)
    groups = [{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}]
    optimizer = MuonClip(groups, lr=0.05, weight_decay=0.0)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 120)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (x @ weight.T + bias - x @ goal.T - 1).square().mean()
        loss.backward()
        return loss.detach()

    first = float(optimizer.step(closure))
    for _ in range(119):
        last = float(optimizer.step(closure))
        scheduler.step()
    assert last < 0.01 * first


def test_groups_without_parameters_or_gradients_and_groups_that_come_later():
    params, optimizer = make()
    optimizer.step()
    assert not optimizer.state and optimizer.nonfinite_parameters() == []
    optimizer.add_param_group({"params": []})
    late = nn.Parameter(rand(3, 3, seed=5))
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.5]
    train(optimizer, [*params, late], 3)
    assert optimizer.state[params[1]]["step"] == 3 and late in optimizer.state
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 3
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [late]})
    with pytest.raises(ValueError, match="empty parameter list"):
        MuonClip([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        MuonClip(torch.ones(2, 2))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    "shape", [(0, 4), (4, 0), (2, 0, 4), (2, 4, 0), (0, 4, 4), (1, 1), (900, 1)]
)
def test_parameters_with_few_elements_or_none(shape, adjust):
    params = [nn.Parameter(rand(*shape, seed=1)), nn.Parameter(rand(*shape, seed=2))]
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    optimizer = MuonClip(groups, lr=0.1, adjust_lr_fn=adjust)
    start = [p.detach().clone() for p in params]
    train(optimizer, params, 2)
    for param, old in zip(params, start, strict=True):
        assert param.isfinite().all() and torch.equal(param, old) == (param.numel() == 0)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_a_group_has_twice_is_refused():
    param = nn.Parameter(rand(3, 3, seed=1))
    param.grad = torch.ones_like(param)
    optimizer = MuonClip([param, param], lr=0.1)
    with pytest.raises(ValueError, match="params: expected each parameter once, got one several"):
        optimizer.step()
    assert torch.equal(param, rand(3, 3, seed=1)) and not optimizer.state


def test_zero_grad_names_and_repr():
    params, optimizer = make()
    train(optimizer, params, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#MuonClip.step" in {event.key for event in profile.key_averages()}
    assert "MuonClip" in repr(optimizer) and "momentum: 0.95" in repr(optimizer)


def test_accumulated_gradients_and_averaged_weights():
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = MuonClip(
            [{"params": [model.weight]}, {"params": [model.bias], "algorithm": "adamw"}], lr=0.1
        )
        average = swa_utils.AveragedModel(model)
        for step in range(3):
            optimizer.zero_grad()
            for x in rand(8, 4, seed=step).chunk(parts):
                (model(x).square().sum() / 8).backward()
            optimizer.step()
            average.update_parameters(model)
        results.append([*model.parameters(), *average.module.parameters()])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    assert not torch.equal(results[0][0], results[0][2])


def test_nothing_warns_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, optimizer = make(max_grad_norm=1.0)
        train(optimizer, params)
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
