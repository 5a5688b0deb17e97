# SPDX-License-Identifier: MIT
"""MuonClip against torch.optim.Muon and torch.optim.AdamW, and what they do not do: stacks, groups,
QK-Clip."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops import MuonClip, QKClip, _native, muon_param_groups, newton_schulz
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.optim import muon_update


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(optimizer, params, steps: int, seed: int = 0):
    """Feed the same gradients; yields after every step."""
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = rand(*param.shape, seed=1000 * seed + 10 * step + i)
        optimizer.step()
        yield step


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize(("weight_decay", "nesterov"), [(0.0, True), (0.1, True), (0.1, False)])
def test_twenty_steps_of_torch_muon(adjust, weight_decay, nesterov):
    shapes = [(24, 48), (48, 24), (16, 16)]
    ours = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.02, weight_decay=weight_decay, nesterov=nesterov, adjust_lr_fn=adjust)
    a, b = MuonClip(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in zip(run(a, ours, 20), run(b, theirs, 20), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(a.state[x]["momentum_buffer"], b.state[y]["momentum_buffer"])
    for i, (x, y, shape) in enumerate(zip(ours, theirs, shapes, strict=True)):
        start = rand(*shape, seed=i)
        # both round to bf16 inside Newton-Schulz, in another place
        assert (x - y).norm() < 0.03 * (y - start).norm()


def test_updates_equal_torch_muon_when_both_compute_in_fp32(monkeypatch):
    """torch's iteration with its cast to bf16 taken out is an exact oracle for everything around
    it."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours = [nn.Parameter(rand(24, 40, seed=1)), nn.Parameter(rand(40, 24, seed=2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    a = MuonClip(ours, ns_dtype="float32", **options)
    b = torch.optim.Muon(theirs, **options)
    for _ in zip(run(a, ours, 20), run(b, theirs, 20), strict=True):
        pass
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_bf16_parameters_without_nesterov_keep_their_momentum():
    param = nn.Parameter(rand(8, 8, seed=1).bfloat16())
    optimizer = MuonClip([param], nesterov=False, lr=0.01)
    norms = []
    for step in range(3):
        param.grad = rand(8, 8, seed=step).bfloat16() * 10
        optimizer.step()
        norms.append(float(optimizer.state[param]["momentum_buffer"].norm()))
    assert 2 < norms[0] < norms[1] < norms[2]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_groups_are_torch_adamw(weight_decay):
    shapes = [(7,), (5, 9), (3, 2, 4)]
    ours = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = MuonClip(
        [{"params": ours, "algorithm": "adamw"}],
        lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
    )
    b = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay)
    for _ in zip(run(a, ours, 100), run(b, theirs, 100), strict=True):
        pass
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.state[x]["exp_avg_sq"], b.state[y]["exp_avg_sq"])


def test_a_stack_is_a_batch_and_a_fused_stack_two_matrices():
    stack = rand(4, 12, 10, seed=1)
    fused = nn.Parameter(stack.clone())
    singles = [nn.Parameter(m.clone()) for m in stack.reshape(8, 6, 10)]
    a = MuonClip(
        [{"params": [fused], "split_sizes": (6, 6)}], lr=0.1, adjust_lr_fn="match_rms_adamw"
    )
    b = MuonClip(singles, lr=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        fused.grad = rand(4, 12, 10, seed=step)
        for param, grad in zip(singles, fused.grad.reshape(8, 6, 10), strict=True):
            param.grad = grad.clone()
        a.step()
        b.step()
    assert torch.equal(fused.reshape(8, 6, 10), torch.stack(list(singles)))


def test_match_rms_gives_an_update_of_rms_two_tenths():
    param = nn.Parameter(torch.zeros(32, 96))
    optimizer = MuonClip([param], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    param.grad = rand(32, 96, seed=0)
    optimizer.step()
    assert 0.16 < float(param.detach().square().mean().sqrt()) < 0.23


def test_callable_adjustment_and_maximize():
    shape_seen = []
    param = nn.Parameter(torch.zeros(3, 5))
    grad = rand(3, 5, seed=4)
    param.grad = grad.clone()
    optimizer = MuonClip(
        [param],
        lr=0.5,
        maximize=True,
        adjust_lr_fn=lambda lr, shape: shape_seen.append(shape) or lr * 2,
    )
    optimizer.step()
    assert set(shape_seen) == {(3, 5)}
    expected = newton_schulz(grad * (0.05 * (1 + 0.95)))
    torch.testing.assert_close(param.detach(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(param.grad, grad)  # a gradient is never written


def test_gradient_scale_does_not_matter_to_muon():
    results = []
    for scale in (1.0, 2.0**-12):
        param = nn.Parameter(rand(6, 6, seed=1))
        optimizer = MuonClip([param], lr=0.1)
        for step in range(3):
            param.grad = rand(6, 6, seed=step) * scale
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def mixed(seed: int):
    params = [nn.Parameter(rand(8, 6, seed=seed)), nn.Parameter(rand(6, seed=seed + 1))]
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    return params, MuonClip(groups, lr=0.05, adjust_lr_fn="match_rms_adamw")


def test_resume_from_a_state_dict_is_bitwise(tmp_path):
    params, optimizer = mixed(1)
    list(run(optimizer, params, 5))
    torch.save(
        {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()},
        tmp_path / "state.pt",
    )
    list(run(optimizer, params, 5, seed=1))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, fresh = mixed(9)
    with torch.no_grad():
        for param, value in zip(again, saved["params"], strict=True):
            param.copy_(value)
    fresh.load_state_dict(saved["optimizer"])
    list(run(fresh, again, 5, seed=1))
    for x, y in zip(params, again, strict=True):
        assert torch.equal(x, y)


def test_checkpoints_of_torch_muon_load_both_ways():
    ours, theirs = nn.Parameter(rand(8, 12, seed=1)), nn.Parameter(rand(8, 12, seed=1))
    muon = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="match_rms_adamw")
    list(run(muon, [theirs], 4))
    with torch.no_grad():
        ours.copy_(theirs)
    clip = MuonClip([ours], lr=9.0)
    clip.load_state_dict(copy.deepcopy(muon.state_dict()))
    assert clip.param_groups[0]["lr"] == 0.02 and clip.param_groups[0]["algorithm"] == "muon"
    start = ours.detach().clone()
    for _ in zip(run(clip, [ours], 3, seed=2), run(muon, [theirs], 3, seed=2), strict=True):
        pass
    assert torch.equal(clip.state[ours]["momentum_buffer"], muon.state[theirs]["momentum_buffer"])
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()
    torch.optim.Muon([nn.Parameter(torch.ones(8, 12))]).load_state_dict(clip.state_dict())


def test_parameters_without_gradients_schedulers_and_closures():
    params, optimizer = mixed(3)
    old = params[0].detach().clone()
    params[1].grad = torch.ones(6)
    optimizer.step()
    assert torch.equal(params[0], old) and params[0] not in optimizer.state
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    params[0].grad = torch.ones(8, 6)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.025]


class Attention(nn.Module):
    """The part of an MLA layer that QK-Clip sees."""

    def __init__(self) -> None:
        super().__init__()
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = 4, 2, 3
        self.q_b_proj = nn.Linear(5, 2 * 6, bias=False)
        self.kv_b_proj = nn.Linear(5, 2 * 7, bias=False)
        self.register_buffer("max_logits", torch.full((2,), -math.inf), persistent=False)


def test_qk_clip_after_the_update():
    layer, twin = Attention(), Attention()
    twin.load_state_dict(layer.state_dict())
    clip = QKClip([layer], tau=10.0)
    assert layer.track_max_logits is True
    a = MuonClip(layer.parameters(), lr=0.1, qk_clip=clip)
    b = MuonClip(twin.parameters(), lr=0.1)
    layer.max_logits.copy_(torch.tensor([5.0, 40.0]))
    for module in (layer, twin):
        for i, param in enumerate(module.parameters()):
            param.grad = rand(*param.shape, seed=i)
    a.step()
    b.step()
    assert torch.equal(layer.q_b_proj.weight[:6], twin.q_b_proj.weight[:6])
    torch.testing.assert_close(layer.q_b_proj.weight[6:10], twin.q_b_proj.weight[6:10] * 0.5)
    torch.testing.assert_close(layer.q_b_proj.weight[10:], twin.q_b_proj.weight[10:] * 0.25)
    torch.testing.assert_close(layer.kv_b_proj.weight[7:11], twin.kv_b_proj.weight[7:11] * 0.5)
    assert torch.equal(layer.kv_b_proj.weight[11:], twin.kv_b_proj.weight[11:])
    assert clip.max_logits.tolist() == [[5.0, 40.0]] and clip.gamma.tolist() == [[1.0, 0.25]]
    assert layer.max_logits.tolist() == [-math.inf] * 2


def test_qk_clip_of_a_query_without_compression():
    layer = Attention()
    layer.q_proj = layer.q_b_proj
    del layer.q_b_proj
    before = layer.q_proj.weight.detach().clone()
    layer.max_logits.copy_(torch.tensor([5.0, 40.0]))
    QKClip([layer], tau=10.0).step()
    factor = torch.tensor([1.0] * 6 + [0.5] * 4 + [0.25] * 2)[:, None]
    assert torch.equal(layer.q_proj.weight, before * factor)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_step_and_clip(clone):
    layer = Attention()
    optimizer = MuonClip(layer.parameters(), lr=0.1, qk_clip=QKClip([layer], tau=10.0))
    twin, again = clone((layer, optimizer))
    assert again.qk_clip.layers[0] is twin
    for module, its in ((layer, optimizer), (twin, again)):
        module.max_logits.copy_(torch.tensor([5.0, 40.0]))
        for _ in run(its, list(module.parameters()), 1):
            pass
        assert its.qk_clip.gamma.tolist() == [[1.0, 0.25]]
    for x, y in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_state_of_torch_muon_keeps_what_torch_does_not_know():
    shapes = [(12, 10), (10, 6), (6,)]
    plain = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
    muon = torch.optim.Muon([{"params": plain[:1]}, {"params": plain[1:2]}], lr=0.02)
    list(run(muon, plain[:2], 2))
    ours = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
    clip = MuonClip(
        [{"params": ours[:1], "split_sizes": (6, 6)}, {"params": ours[1:2], "algorithm": "adamw"}]
    )
    saved = muon.state_dict()
    saved["state"].pop(1)  # its momentum is no state of AdamW
    clip.load_state_dict(saved)
    first, second = clip.param_groups
    assert first["split_sizes"] == (6, 6) and first["lr"] == 0.02
    assert second["algorithm"] == "adamw"


def test_a_state_of_torch_adamw_brings_its_eps():
    ours, theirs = nn.Parameter(rand(6, seed=1)), nn.Parameter(rand(6, seed=1))
    adamw = torch.optim.AdamW([theirs], lr=0.02, eps=0.5, betas=(0.9, 0.95), weight_decay=0.1)
    list(run(adamw, [theirs], 2))
    clip = MuonClip([{"params": [ours], "algorithm": "adamw"}], lr=9.0)
    with torch.no_grad():
        ours.copy_(theirs)
    clip.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for _ in zip(run(clip, [ours], 3, seed=2), run(adamw, [theirs], 3, seed=2), strict=True):
        pass
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_eps_of_an_adamw_group_is_its_own():
    results = []
    for keys in ({"eps": 0.5}, {"adamw_eps": 0.5}, {"eps": 1e-7, "adamw_eps": 0.5}, {}):
        param = nn.Parameter(rand(6, seed=1))
        optimizer = MuonClip([{"params": [param], "algorithm": "adamw", **keys}], lr=0.1)
        list(run(optimizer, [param], 2))
        results.append(param.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])
    with pytest.raises(ValueError, match="eps"):
        MuonClip([{"params": [torch.ones(2)], "algorithm": "adamw", "eps": -1.0}])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.o_proj = nn.Linear(4, 4, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.ones(3, 6, 4))
        self.experts.down_proj = nn.Parameter(torch.ones(3, 4, 3))
        self.gate = nn.Linear(4, 3, bias=False)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_routing():
    model = Tiny()
    groups = muon_param_groups(model)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [
        ["o_proj.weight", "experts.down_proj"],
        ["experts.gate_up_proj"],
        ["embed_tokens.weight", "norm.weight", "gate.weight", "lm_head.weight"],
    ]
    assert groups[1]["split_sizes"] == (3, 3)
    summary = MuonClip(groups).routing_summary()
    assert "adamw  4 tensors" in summary and "experts.gate_up_proj [3, 6, 4]" in summary
    model.mystery = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="mystery"):
        muon_param_groups(model)
    assert muon_param_groups(model, strict=False)[-1]["params"][0][0] == "mystery"


@pytest.mark.parametrize(
    ("group", "kind", "text"),
    [
        ({"params": [torch.ones(3)]}, ValueError, 'algorithm="adamw"'),
        ({"params": [torch.ones(2, 2, dtype=torch.complex64)]}, TypeError, "complex"),
        ({"params": [torch.ones(2, 2)], "lr": -1.0}, ValueError, "lr"),
        ({"params": [torch.ones(2, 2)], "algorithm": "sgd"}, ValueError, "algorithm"),
        ({"params": [torch.ones(2, 2)], "adjust_lr_fn": "mean"}, ValueError, "adjust_lr_fn"),
        ({"params": [torch.ones(2, 2)], "ns_coefficients": "no"}, ValueError, "coefficients"),
        ({"params": [torch.ones(2, 2)], "ns_method": "svd"}, ValueError, "method"),
        ({"params": [torch.ones(2, 2)], "ns_dtype": "float33"}, ValueError, "ns_dtype"),
        ({"params": [torch.ones(4, 2)], "split_sizes": (1, 2)}, ValueError, "split_sizes"),
        ({"params": [torch.ones(2)], "algorithm": "adamw", "betas": (1, 0)}, ValueError, "betas"),
    ],
)
def test_bad_groups_are_refused_as_a_whole(group, kind, text):
    optimizer = MuonClip([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(kind, match=text):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(kind, match=text):
        MuonClip([group])


def test_sparse_gradients_and_bad_clip_specs():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = MuonClip([{"params": embedding.parameters(), "algorithm": "adamw"}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    with pytest.raises(TypeError, match="QKClip"):
        MuonClip([nn.Parameter(torch.ones(2, 2))], qk_clip=True)
    with pytest.raises(TypeError, match="q_b_proj"):
        QKClip([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="tau"):
        QKClip([Attention()], tau=0.0)


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
        if not view and not name.startswith("kimi_ops::") and "detach" not in name:
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
    assert len(ops) <= 8 + 2 * capturable * len(optimizer.param_groups), ops
    if device_engine.name == "simt":
        assert _native.engine.launches() - before <= 20
    assert watch.ops.count("aten::clone") > 30  # matrices
    print(ops, _native.engine.launches() - before, watch.ops.count("aten::clone"))


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
    for step in (3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)):
        param = nn.Parameter(rand(5, seed=1))
        optimizer = MuonClip([{"params": [param], "algorithm": "adamw"}])
        list(run(optimizer, [param], 1))
        optimizer.state[param]["step"] = step
        list(run(optimizer, [param], 1))
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
    list(run(optimizer, [param], 1))
    assert not torch.equal(param, rand(4, 4, seed=1))
