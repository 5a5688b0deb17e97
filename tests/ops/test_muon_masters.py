# SPDX-License-Identifier: MIT
"""fp32 masters of 16-bit parameters: the bits of a run in fp32, rounded once a step."""

import math

import pytest
import torch
from optimizers import make, train

from kimi_ops import MuonClip, QKClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config


def pair(**options) -> list[tuple[KimiK2, MuonClip]]:
    """A model in bf16 with masters and one in fp32, of equal values, with QK-Clip that acts."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        model = KimiK2(KimiK2Config.tiny()).bfloat16().to(dtype)
        clip = QKClip(model.attention_layers(), tau=1.0)
        groups = muon_param_groups(model)
        optimizer = MuonClip(groups, lr=0.02, qk_clip=clip, master_weights=True, **options)
        for number, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            param.grad_dtype = torch.float32
            param.grad = torch.randn(param.shape, generator=generator)
        made.append((model, optimizer))
    return made


def step(model: KimiK2, optimizer: MuonClip, number: int) -> None:
    for attention in model.attention_layers():
        attention.max_logits.copy_(torch.tensor([0.5, 3.0]))
    for param in model.parameters():
        param.grad = param.grad.roll(number)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "bfloat16"}, {"foreach": False}])
def test_a_master_is_what_the_parameter_would_be_in_fp32(options):
    (half, ours), (whole, theirs) = pair(**options)
    rounded = 0
    for number in range(3):
        step(half, ours, number)
        step(whole, theirs, number)
        assert (ours.qk_clip.gamma < 1).any()
        clipped = {
            id(p)
            for layer in half.attention_layers()
            for p in (layer.q_b_proj.weight, layer.kv_b_proj.weight)
        }
        for param, twin in zip(half.parameters(), whole.parameters(), strict=True):
            master = ours.state[param]["master"]
            assert param.dtype == torch.bfloat16 and master.dtype == torch.float32
            assert torch.equal(master, twin)
            if id(param) in clipped:  # rounded, scaled and rounded again until the next step
                torch.testing.assert_close(param.float(), twin, rtol=2**-7, atol=0)
            else:
                assert torch.equal(param, twin.bfloat16())
            rounded += not torch.equal(param.float(), twin)
    assert rounded > 10
    assert not any("master" in state for state in theirs.state.values())  # fp32 needs none


def test_updates_below_the_last_bit_add_up():
    moved = []
    for masters in (False, True):
        param = torch.nn.Parameter(torch.full((4, 4), 8.0, dtype=torch.bfloat16))
        group = {"params": [param], "algorithm": "adamw", "master_weights": masters}
        optimizer = MuonClip([group], lr=1e-3, weight_decay=0.0)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved.append(float(8 - param.detach().float().mean()))
    assert moved[0] == 0 and 0.09 < moved[1] < 0.13


def test_a_saved_state_goes_on_with_the_same_bits():
    params, ours = make(torch.bfloat16, master_weights=True, momentum_dtype="bfloat16")
    train(ours, params)
    again, fresh = make(torch.bfloat16, master_weights=True, momentum_dtype="bfloat16")
    fresh.load_state_dict(ours.state_dict())
    for param, twin in zip(params, again, strict=True):
        twin.data.copy_(param)
        assert fresh.state[twin]["master"].dtype == torch.float32
        assert not torch.equal(fresh.state[twin]["master"], param.float())
    train(ours, params)
    train(fresh, again)
    for param, twin in zip(params, again, strict=True):
        assert torch.equal(param, twin)
        assert torch.equal(ours.state[param]["master"], fresh.state[twin]["master"])


def test_what_is_written_to_a_parameter_reaches_its_master():
    """As a checkpoint that is loaded into the model behind a step."""
    (model, optimizer), _ = pair()
    step(model, optimizer, 0)
    kept, changed = list(model.named_parameters())[1], model.lm_head.weight
    before = optimizer.state[kept[1]]["master"].clone()
    with torch.no_grad():
        changed.fill_(0.5)
        kept[1].copy_(kept[1].clone())  # nothing new: the master keeps what the parameter has not
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 1)
    assert torch.equal(optimizer.state[changed]["master"], torch.full_like(changed, 0.5).float())
    assert torch.equal(optimizer.state[kept[1]]["master"], before)
    assert not torch.equal(before, kept[1].float())


def test_what_is_written_to_a_clipped_head_reaches_its_master_and_nothing_else_does():
    """The 16-bit rows were rounded twice: what their master rounds to is not what they show."""
    (model, optimizer), _ = pair()
    step(model, optimizer, 0)
    weights = [layer.q_b_proj.weight for layer in model.attention_layers()]
    before = [optimizer.state[weight]["master"].clone() for weight in weights]
    assert all((m.bfloat16() != w).any() for m, w in zip(before, weights, strict=True))
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.clone())
        weights[0][5, 3] = 0.5
    before[0][5, 3] = 0.5
    optimizer.qk_clip = None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for weight, master in zip(weights, before, strict=True):
        assert torch.equal(optimizer.state[weight]["master"], master)
        assert torch.equal(weight, master.bfloat16())


def test_a_clipped_head_whose_gradient_is_nan_keeps_its_master():
    """And its 16-bit rows become what that rounds to, as at every step."""
    (model, optimizer), _ = pair()
    step(model, optimizer, 0)
    weight = model.attention_layers()[0].kv_b_proj.weight
    master = optimizer.state[weight]["master"].clone()
    assert not torch.equal(weight, master.bfloat16())
    optimizer.qk_clip = None
    weight.grad = torch.full_like(weight.grad, math.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["master"], master)
    assert torch.equal(weight, master.bfloat16())


def test_masters_go_where_the_option_does():
    (model, optimizer), _ = pair()
    step(model, optimizer, 0)
    for group in optimizer.param_groups:
        group["master_weights"] = False
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 1)
    assert not any("master" in state for state in optimizer.state.values())
    assert not model.lm_head.weight.any()


def test_a_gradient_that_is_not_finite_leaves_parameter_and_master_alone():
    params, optimizer = make(torch.bfloat16, master_weights=True)
    train(optimizer, params, 1)
    before = [(p.detach().clone(), optimizer.state[p]["master"].clone()) for p in params]
    params[0].grad = torch.full_like(params[0], math.inf)
    params[1].grad = torch.ones_like(params[1])
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    after = [(p.detach(), optimizer.state[p]["master"]) for p in params]
    assert all(map(torch.equal, before[0], after[0]))
    assert not any(map(torch.equal, before[1], after[1]))


def test_a_switch_is_a_bool():
    with pytest.raises(TypeError, match="MuonClip: master_weights: expected"):
        make(master_weights=1)
