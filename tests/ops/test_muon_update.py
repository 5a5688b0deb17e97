# SPDX-License-Identifier: MIT
"""A step of MuonClip as a device sees it: what it reads, writes and launches, and its numbers
there."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import MuonClip, QKClip, _native, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.optim import muon_update


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer, param, seed: int) -> None:
    param.grad = rand(*param.shape, seed=seed)
    optimizer.step()


@pytest.mark.parametrize("norm", [0.5, 5000.0, 6e7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipping_does_not_round_its_factor_to_the_gradients(engine, dtype, norm):
    """6e7: a factor of 1.7e-8, which fp16 does not have; 5000: one with three bits there."""
    start = rand(300, seed=1).to(dtype)
    grad = (rand(300, seed=2) * (norm / 300**0.5)).to(dtype).clamp(-6e4, 6e4)
    results = []
    for scale in (None, 1.0):
        param = nn.Parameter(start.clone())
        group = {"params": [param], "algorithm": "adamw", "max_grad_norm": scale, "eps": 1e-2}
        optimizer = MuonClip([group], lr=0.1)
        param.grad = grad if scale else grad.float().div(grad.double().norm() + 1e-6).to(dtype)
        if scale is None and norm < 1:
            param.grad = grad
        optimizer.step()
        results.append(optimizer.state[param]["exp_avg"])
    torch.testing.assert_close(*results, rtol=0.01, atol=1e-4)
    assert results[0].norm() > 0.04 and not torch.equal(param, start)


@pytest.mark.parametrize("place", [0, 39])
def test_a_gradient_that_is_not_finite_counts_as_nothing_when_others_are_clipped(place):
    """All of it: the pieces beside the one with NaN are finite, and large."""
    moved = []
    for bad in (True, False):
        params = [nn.Parameter(rand(40, seed=1)), nn.Parameter(rand(40, seed=2))]
        group = {"params": params[: 1 + bad], "algorithm": "adamw", "max_grad_norm": 0.5}
        optimizer = MuonClip([group], lr=0.1, adamw_eps=1.0)
        params[0].grad = rand(40, seed=3)
        if bad:
            params[1].grad = 1e3 * rand(40, seed=4)
            params[1].grad[place] = math.nan
            with pytest.warns(UserWarning, match="not finite for #1"):
                optimizer.step()
            assert torch.equal(params[1], rand(40, seed=2))
            assert not optimizer.state[params[1]]["step"]
        else:
            optimizer.step()
        moved.append(params[0].detach())
    assert torch.equal(*moved)


class Watch(TorchDispatchMode):
    """Counts what a GPU would have launched beside our kernels; refuses reads of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name and "is_nonzero" not in name, "a read of the host"
        returns = func._schema.returns
        view = returns and returns[0].alias_info and not returns[0].alias_info.is_write
        if not view and not name.startswith(("kimi_ops::", "profiler::")):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


def without_newton_schulz(monkeypatch) -> None:
    monkeypatch.setattr(muon_update, "newton_schulz", lambda cut, **_: [x.clone() for x in cut])


@pytest.fixture
def device_engine(engine):
    """The engines whose tensors are a GPU's."""
    if engine.name not in ("simt", "cuda"):
        pytest.skip("its tensors are the host's")
    return engine


def tiny(device: str, **options):
    model = KimiK2(KimiK2Config.tiny()).to(device)
    optimizer = MuonClip(muon_param_groups(model), max_grad_norm=1.0, **options)
    for i, param in enumerate(model.parameters()):
        param.grad = rand(*param.shape, seed=i).to(device)
    return model, optimizer


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_reads_nothing_and_launches_little(device_engine, monkeypatch, capturable):
    """Newton-Schulz apart, whose stand-in copies each matrix."""
    without_newton_schulz(monkeypatch)
    device = device_engine.device
    lr = torch.tensor(1e-3, device=device) if capturable else 1e-3
    _, optimizer = tiny(device, lr=lr, capturable=capturable)
    optimizer.step()
    before = _native.engine.launches() if device_engine.name == "simt" else 0
    with Watch() as watch:
        optimizer.step()
    ops = [op for op in watch.ops if op != "aten::clone"]
    assert len(ops) <= 1 + capturable * len(optimizer.param_groups), ops
    if device_engine.name == "simt":
        assert _native.engine.launches() - before <= 9
    assert watch.ops.count("aten::clone") > 30  # matrices


def test_a_whole_step_is_few_launches(device_engine):
    """Momentum, Newton-Schulz, AdamW and QK-Clip, whatever the number of matrices: those of
    a shape share a launch, and `mini` has few shapes more than `tiny`, whose step this is."""
    model = KimiK2(KimiK2Config.tiny()).to(device_engine.device)
    clip = QKClip(model.attention_layers())
    groups = muon_param_groups(model)
    optimizer = MuonClip(groups, ns_dtype="float16", max_grad_norm=1.0, qk_clip=clip)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = _native.engine.launches() if device_engine.name == "simt" else 0
    with Watch() as watch:
        optimizer.step()
    assert len(watch.ops) <= 6, watch.ops
    if device_engine.name == "simt":
        assert _native.engine.launches() - before <= 19


def test_a_step_writes_where_the_step_before_did(engine, monkeypatch):
    """What a graph has captured stays the state; twenty steps with numbers on the device are those
    with numbers."""
    without_newton_schulz(monkeypatch)
    device, results = engine.device, []
    for capturable in (False, True):
        params = [nn.Parameter(rand(*s, seed=1).to(device)) for s in ((6, 8), (2, 4, 6), (9,))]
        groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
        numbers = {"lr": 0.125, "weight_decay": 0.5}
        if capturable:
            numbers = {k: torch.tensor(v, device=device) for k, v in numbers.items()}
        optimizer = MuonClip(groups, **numbers, capturable=capturable, max_grad_norm=1.0)
        addresses = set()
        for step in range(20):
            for i, param in enumerate(params):
                param.grad = rand(*param.shape, seed=10 * step + i).to(device)
            if step == 10:
                for group in optimizer.param_groups:
                    if capturable:
                        group["lr"].fill_(0.25)
                    else:
                        group["lr"] = 0.25
            optimizer.step()
            states = [optimizer.state[p] for p in params]
            tensors = [*params, *(x for state in states for x in state.values())]
            addresses.add(tuple(x.data_ptr() for x in tensors))
        assert len(addresses) == 1 and float(states[2]["step"]) == 20
        results.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_count_of_any_kind_goes_on():
    """torch has kept numbers, tensors of float64, and tensors on the host."""
    for count in (3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)):
        param = nn.Parameter(rand(5, seed=1))
        optimizer = MuonClip([{"params": [param], "algorithm": "adamw"}])
        step(optimizer, param, 2)
        optimizer.state[param]["step"] = count
        step(optimizer, param, 3)
        assert optimizer.state[param]["step"].dtype == torch.float32
        assert float(optimizer.state[param]["step"]) == 4


def test_numbers_on_a_device_need_capturable():
    lr = torch.empty((), device="meta")
    for key in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=rf"{key}: expected a number .*pass capturable=True"):
            MuonClip([nn.Parameter(torch.ones(2, 2))], **{key: lr})
    with pytest.raises(ValueError, match="adjust_lr_fn: expected a name beside capturable=True"):
        MuonClip(
            [nn.Parameter(torch.ones(2, 2))],
            lr=torch.tensor(0.1),
            capturable=True,
            adjust_lr_fn=lambda lr, shape: lr,
        )
    param = nn.Parameter(rand(4, 4, seed=1))
    optimizer = MuonClip([param], lr=torch.tensor(0.1))  # on a CPU torch takes it too
    step(optimizer, param, 2)
    assert not torch.equal(param, rand(4, 4, seed=1))
