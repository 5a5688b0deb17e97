# SPDX-License-Identifier: MIT
"""What MuonClip does beyond torch.optim.Muon: heads and splits, stacks, 16-bit parameters, cautious
decay, clipping of AdamW gradients, gradients that are not finite, batches of parameters."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kimi_ops import MuonClip, muon_param_groups, newton_schulz
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.optim.muon_blocks import blocks


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer: MuonClip, params: list[nn.Parameter], count: int, scale: float = 1.0) -> None:
    for step in range(count):
        for i, param in enumerate(params):
            param.grad = (scale * rand(*param.shape, seed=10 * step + i)).to(param.dtype)
        optimizer.step()


def cut(param: torch.Tensor, **keys) -> list[torch.Tensor]:
    defaults = {"batch_dims": "leading", "num_heads": None, "head_dim": 0, "split_sizes": None}
    defaults |= {"interleave": None, "transposed": False}
    return blocks(param, {**defaults, **keys})


CUTS = [
    ((12, 10), {"num_heads": 3}),
    ((10, 12), {"num_heads": 3, "head_dim": 1}),
    ((12, 10), {"num_heads": 2, "split_sizes": (4, 2)}),
    ((10, 12), {"split_sizes": (5, 7), "head_dim": 1}),
    ((2, 3, 8, 5), {"split_sizes": (3, 5)}),
    ((2, 8, 6), {"num_heads": 2}),
    ((4, 3, 2, 2), {"batch_dims": "flatten"}),
    ((12, 5), {"interleave": 2}),
    ((2, 5, 12), {"interleave": 3, "head_dim": 1, "transposed": True}),
    ((2, 5, 12), {"split_sizes": (4, 8), "head_dim": 1, "transposed": True}),
    ((12, 5), {"num_heads": 2, "interleave": 3}),
    ((3, 7, 1), {}),
]


def test_where_the_matrices_of_a_parameter_lie():
    x = rand(10, 12, seed=1)
    (heads,) = cut(x, num_heads=2)
    assert heads.shape == (2, 5, 12) and torch.equal(heads[1], x[5:])
    (heads,) = cut(x, num_heads=3, head_dim=1)
    assert heads.shape == (3, 10, 4) and torch.equal(heads[2], x[:, 8:])
    keys, values = cut(x, num_heads=2, split_sizes=(2, 3))
    assert torch.equal(keys[1], x[5:7]) and torch.equal(values[1], x[7:])
    left, right = cut(x, split_sizes=(5, 7), head_dim=1)
    assert torch.equal(left, x[:, :5]) and torch.equal(right, x[:, 5:])
    stack = rand(2, 6, 4, seed=2)
    (heads,) = cut(stack, num_heads=2, head_dim=1)
    assert heads.shape == (2, 2, 6, 2) and torch.equal(heads[1, 1], stack[1, :, 2:])
    (flat,) = cut(rand(4, 3, 2, 2, seed=3), batch_dims="flatten")
    assert flat.shape == (4, 12)
    gate, up = cut(stack, head_dim=1, interleave=2, transposed=True)
    assert torch.equal(gate, stack[..., ::2].mT) and torch.equal(up, stack[..., 1::2].mT)
    for part in (*cut(x, num_heads=3, head_dim=1), *cut(stack, split_sizes=(2, 4)), heads):
        assert part.untyped_storage().data_ptr() in (
            x.untyped_storage().data_ptr(),
            stack.untyped_storage().data_ptr(),
        )


@pytest.mark.parametrize(("shape", "keys"), CUTS)
def test_every_matrix_of_a_parameter_is_an_update_of_its_own(shape: tuple, keys: dict):
    """The same step on separate parameters, one for each matrix; the rule sees their shapes."""
    start = rand(*shape, seed=3)
    whole = nn.Parameter(start.clone())
    options = {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32"}
    steps_whole = MuonClip([{"params": [whole], **keys}], **options)
    singles = [
        nn.Parameter(matrix.clone())
        for part in cut(start, **keys)
        for matrix in part.reshape(-1, *part.shape[-2:])
    ]
    steps_singles = MuonClip(singles, **options)
    for step in range(3):
        grad = rand(*shape, seed=step)
        whole.grad = grad.clone()
        parts = [m for part in cut(grad, **keys) for m in part.reshape(-1, *part.shape[-2:])]
        for param, matrix in zip(singles, parts, strict=True):
            param.grad = matrix.clone()
        steps_whole.step()
        steps_singles.step()
    got = [m for part in cut(whole.detach(), **keys) for m in part.reshape(-1, *part.shape[-2:])]
    assert sum(m.numel() for m in got) == whole.numel() and not torch.equal(whole, start)
    for matrix, param in zip(got, singles, strict=True):
        assert torch.equal(matrix, param)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 129, 576]),
    columns=st.sampled_from([1, 2, 7, 129]),
    stack=st.sampled_from([(), (1,), (3,)]),
    nesterov=st.booleans(),
)
def test_a_step_is_its_formula(rows: int, columns: int, stack: tuple, nesterov: bool):
    start, first, second = (rand(*stack, rows, columns, seed=i) for i in range(3))
    param = nn.Parameter(start.clone())
    optimizer = MuonClip([param], lr=0.1, nesterov=nesterov, weight_decay=0.2, ns_dtype="float32")
    param.grad = first
    optimizer.step()
    once = param.detach().clone()
    param.grad = second
    optimizer.step()
    buffer = 0.95 * (0.05 * first) + 0.05 * second
    update = 0.05 * second + 0.95 * buffer if nesterov else buffer
    step = newton_schulz(update, dtype=torch.float32, eps=1e-7)
    expected = once * (1 - 0.1 * 0.2) - 0.1 * max(1.0, rows / columns) ** 0.5 * step
    torch.testing.assert_close(param.detach(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_fp32_state_and_round_once(dtype: torch.dtype, tmp_path):
    def make() -> tuple[list[nn.Parameter], MuonClip]:
        params = [
            nn.Parameter(rand(8, 6, seed=1).to(dtype)),
            nn.Parameter(rand(6, seed=2).to(dtype)),
        ]
        groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
        return params, MuonClip(groups, lr=0.01)

    params, optimizer = make()
    twins = [nn.Parameter(p.detach().float()) for p in params]
    groups = [{"params": twins[:1]}, {"params": twins[1:], "algorithm": "adamw"}]
    wide = MuonClip(groups, lr=0.01)
    for p, t in zip(params, twins, strict=True):
        p.grad = rand(*p.shape, seed=7).to(dtype)
        t.grad = p.grad.float()
    optimizer.step()
    wide.step()
    for p, t in zip(params, twins, strict=True):
        assert torch.equal(p, t.to(dtype))
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32 and torch.equal(value, wide.state[t][key])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, fresh = make()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(params, again, strict=True):  # torch's own loader would round to 16 bits
        for key, value in optimizer.state[p].items():
            assert torch.equal(fresh.state[q][key], value)


def test_a_momentum_of_16_bits_is_stored_so_and_kept_out_of_newton_schulz():
    param = nn.Parameter(rand(8, 6, seed=1))
    optimizer = MuonClip([param], momentum_dtype="bfloat16", nesterov=False)
    exact = torch.zeros(8, 6)
    for step in range(4):
        param.grad = rand(8, 6, seed=step)
        optimizer.step()
        exact = exact.lerp(param.grad, 0.05).bfloat16().float()
        buffer = optimizer.state[param]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16 and torch.equal(buffer.float(), exact)


def test_a_checkpoint_of_torch_muon_with_bf16_parameters_becomes_fp32():
    theirs = nn.Parameter(rand(8, 6, seed=1).bfloat16())
    muon = torch.optim.Muon([theirs])
    theirs.grad = rand(8, 6, seed=2).bfloat16()
    muon.step()
    ours = nn.Parameter(theirs.detach().clone())
    clip = MuonClip([ours])
    clip.load_state_dict(muon.state_dict())
    buffer = clip.state[ours]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, muon.state[theirs]["momentum_buffer"].float())
    steps(clip, [ours], 1)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_cautious_decay_acts_where_the_step_shrinks_the_parameter(algorithm: str):
    moved = []
    for weight_decay, cautious in ((0.0, False), (0.5, False), (0.5, True)):
        param = nn.Parameter(rand(6, 9, seed=1))
        group = {"params": [param], "algorithm": algorithm}
        optimizer = MuonClip(
            [group], lr=0.1, weight_decay=weight_decay, cautious_weight_decay=cautious
        )
        steps(optimizer, [param], 1)
        moved.append(param.detach())
    start = rand(6, 9, seed=1)
    shrinks = (start - moved[0]) * start > 0
    assert shrinks.any() and not shrinks.all()
    assert torch.equal(moved[2], torch.where(shrinks, moved[1], moved[0]))


def test_gradient_clipping_acts_on_adamw_groups_alone():
    def moved(max_grad_norm: float | None, scale: float) -> list[torch.Tensor]:
        params = [nn.Parameter(rand(6, 6, seed=1))] + [
            nn.Parameter(rand(5, seed=i)) for i in (2, 3)
        ]
        groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
        # an eps that AdamW's own invariance does not hide behind
        optimizer = MuonClip(groups, lr=0.1, adamw_eps=1.0, max_grad_norm=max_grad_norm)
        grads = []
        for i, param in enumerate(params):
            param.grad = scale * rand(*param.shape, seed=i)
            grads.append(param.grad.clone())
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        return [p.detach() for p in params]

    norm = float(torch.cat([rand(5, seed=1), rand(5, seed=2)]).norm())
    clipped = moved(norm / 4, 1.0)
    for ours, expected in zip(clipped[1:], moved(None, 0.25)[1:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(clipped[0], moved(None, 1.0)[0])
    assert torch.equal(moved(norm * 1.01, 1.0)[1], moved(None, 1.0)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_reported_and_changes_nothing(bad: float):
    def make() -> tuple[list[nn.Parameter], MuonClip]:
        shapes = [(6, 4), (3, 6, 4), (6,), (5,)]
        params = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
        named = list(zip("abcd", params, strict=True))
        groups = [
            {"params": named[:2]},
            {"params": named[2:], "algorithm": "adamw", "max_grad_norm": 1.0},
        ]
        return params, MuonClip(groups, lr=0.1)

    params, optimizer = make()
    steps(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    values = [p.detach().clone() for p in params]
    for i, param in enumerate(params):
        param.grad = rand(*param.shape, seed=i) * 1e30  # huge is fine
    params[1].grad[1, 2, 3] = bad
    params[2].grad[0] = bad
    with pytest.warns(UserWarning, match="not finite for b, c"):
        optimizer.step()
    assert optimizer.nonfinite_parameters() == ["b", "c"]
    for i in (1, 2):
        assert torch.equal(params[i], values[i])
        for key, value in saved[i].items():
            assert torch.equal(optimizer.state[params[i]][key], value)
    for i in (0, 3):
        assert torch.isfinite(params[i]).all() and not torch.equal(params[i], values[i])
    steps(optimizer, params, 1)
    assert optimizer.nonfinite_parameters() == []
    assert all(torch.isfinite(p).all() for p in params)


def test_without_host_reads_a_dead_gradient_changes_nothing():
    """The road of devices, on which the flag stays a tensor."""
    from kimi_ops.reference.muon_clip import adamw_, apply_, momentum_

    param, grad = rand(4, 3, seed=1), torch.full((4, 3), float("nan"))
    for alive in (torch.tensor(False), torch.tensor(True)):
        target, buffer, square = param.clone(), rand(4, 3, seed=2), rand(4, 3, seed=3).square()
        before = buffer.clone(), square.clone()
        clean = grad if not alive else rand(4, 3, seed=4)
        update = momentum_(clean, buffer, momentum=0.9, nesterov=True, alive=alive)
        apply_(target, update, lr=0.1, rate=0.1, weight_decay=0.1, alive=alive)
        assert torch.equal(target, param) == torch.equal(buffer, before[0]) == (not alive)
        target, buffer = param.clone(), before[0].clone()
        options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        step = torch.tensor(3.0)
        adamw_(target, clean, buffer, square, step, **options, alive=alive)
        assert step == 3 + int(alive)
        assert torch.equal(target, param) == torch.equal(square, before[1]) == (not alive)


@pytest.mark.parametrize("keys", [{"foreach": False}, {"ns_max_batch": 1}, {"ns_max_batch": 5}])
def test_batches_of_parameters_change_no_bit(keys: dict):
    results = []
    for options in ({}, keys):
        params = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate([(6, 4), (3, 6, 4), (9, 9)])]
        optimizer = MuonClip(params, lr=0.1, **options)
        steps(optimizer, params, 3)
        results.append([p.detach() for p in params])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_batches_hold_what_they_are_told(monkeypatch: pytest.MonkeyPatch):
    from kimi_ops.optim import muon_update

    seen: list[int] = []
    original = muon_update.newton_schulz

    def spy(matrices, **options):
        seen.append(sum(m.shape[:-2].numel() for m in matrices))
        return original(matrices, **options)

    monkeypatch.setattr(muon_update, "newton_schulz", spy)
    for keys, expected in (
        ({}, [6]),
        ({"foreach": False}, [1, 3, 1, 1]),
        ({"ns_max_batch": 2}, [1, 3, 2]),
        ({"ns_max_batch": 4}, [4, 2]),
    ):
        shapes = [(6, 4), (3, 6, 4), (9, 9), (2, 2)]
        params = [nn.Parameter(rand(*s, seed=i)) for i, s in enumerate(shapes)]
        seen.clear()
        steps(MuonClip(params, **keys), params, 1)
        assert seen == expected, keys


def test_a_grad_scaler_unscales_and_skips():
    results = []
    for scaled in (False, True):
        params = [nn.Parameter(rand(6, 4, seed=1)), nn.Parameter(rand(4, seed=2))]
        groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
        optimizer = MuonClip(groups, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(3):
            optimizer.zero_grad()
            loss = ((params[0] @ params[1]) * rand(6, seed=step)).sum()
            scaler.scale(loss).backward()
            if step == 1:
                params[1].grad[0] = float("inf")
                if not scaled:
                    continue
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in params])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_routing_of_heads():
    model = KimiK2(KimiK2Config.tiny())
    groups = muon_param_groups(model, per_head=True)
    config = model.config
    by_cut = {
        (g.get("num_heads"), g.get("head_dim"), g.get("split_sizes")): [n for n, _ in g["params"]]
        for g in groups
        if g["algorithm"] == "muon"
    }
    kv = (config.qk_nope_head_dim, config.v_head_dim)
    assert len(by_cut) == 5
    assert all(n.endswith("q_b_proj.weight") for n in by_cut[2, 0, None])
    assert all(n.endswith("kv_b_proj.weight") for n in by_cut[2, 0, kv])
    assert all(n.endswith("o_proj.weight") for n in by_cut[2, 1, None])
    assert [len(by_cut[key]) for key in ((2, 0, None), (2, 0, kv), (2, 1, None))] == [3, 3, 3]
    optimizer = MuonClip(groups)
    assert "columns of 2 heads" in optimizer.routing_summary()
    assert "rows of 2 heads, rows split (16, 12)" in optimizer.routing_summary()
    total = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert total == sum(p.numel() for p in model.parameters())
    ids = torch.arange(8)[None]
    model(ids).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


MATRIX = [torch.ones(4, 6)]


@pytest.mark.parametrize(
    ("group", "kind", "text"),
    [
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of the 4 rows"),
        ({"num_heads": 4, "head_dim": 1}, ValueError, "divisor of the 6 columns"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 2.0}, TypeError, "num_heads"),
        ({"head_dim": 2}, ValueError, "head_dim"),
        ({"num_heads": 2, "split_sizes": (3, 1)}, ValueError, "2 rows of #0 in a head"),
        ({"split_sizes": (4, 0)}, ValueError, "split_sizes"),
        ({"split_sizes": ()}, ValueError, "split_sizes"),
        ({"interleave": 3}, ValueError, "interleave: expected a divisor of the 4 rows"),
        ({"interleave": 0}, ValueError, "interleave"),
        ({"interleave": 2.0}, TypeError, "interleave"),
        ({"interleave": 2, "split_sizes": (2, 2)}, ValueError, "beside split_sizes"),
        ({"transposed": 1}, TypeError, "transposed: expected True or False"),
        ({"batch_dims": "last"}, ValueError, "batch_dims"),
        ({"ns_max_batch": 0}, ValueError, "ns_max_batch"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"momentum_dtype": "int32"}, ValueError, "momentum_dtype"),
        ({"ns_method": "gram", "ns_restarts": (7,)}, ValueError, "restarts"),
        ({"ns_restarts": (2,)}, ValueError, "restarts"),
        ({"ns_steps": 5, "ns_coefficients": "deepseek_v4"}, ValueError, "pass steps=10"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"params": [torch.ones(4, 4).to_sparse()]}, TypeError, "dense"),
        (
            {"params": [torch.ones(2, 3, 4, 2)[:, :, ::2]], "batch_dims": "flatten"},
            ValueError,
            "without gaps",
        ),
    ],
)
def test_bad_groups(group: dict, kind: type, text: str):
    with pytest.raises(kind, match=text):
        MuonClip([{"params": MATRIX, **group}])
    for name in ("process_group", "stages"):
        with pytest.raises(TypeError, match=f"MuonClip: {name}: expected .*ProcessGroup, got int"):
            MuonClip([nn.Parameter(torch.ones(2, 2))], **{name: 3})
