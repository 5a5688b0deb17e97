# SPDX-License-Identifier: MIT
"""Lists of experts as stacks: named as other libraries do, told from what only looks like it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kimi_ops.activations import swiglu, ungated
from kimi_ops.nn import MLP, Experts, MoE, Router
from tests.nn.parts import EXPERTS, HIDDEN, TOP_K, WIDTH, Mixtral, Phi

CLASSES = {
    "gate_proj": (lambda: MLP(HIDDEN, WIDTH), "silu"),
    "w1": (Mixtral, "silu"),
    "gelu": (lambda: Mixtral(F.gelu), "gelu"),
    "gelu_tanh": (lambda: Mixtral(nn.GELU("tanh")), "gelu_tanh"),
    "relu2": (lambda: Mixtral(lambda g: F.relu(g).square()), "relu2"),
    "biases": (lambda: Mixtral(bias=True), "silu"),
    "module": (lambda: Mixtral(nn.SiLU()), "silu"),
    "situ": (lambda: MLP(HIDDEN, WIDTH, activation="situ"), "situ"),
    "fused": (Phi, "silu"),
}


@pytest.fixture(params=CLASSES)
def experts(request):
    make, activation = CLASSES[request.param]
    torch.manual_seed(0)
    return nn.ModuleList(make() for _ in range(EXPERTS)), activation


def test_a_list_of_experts_gives_what_its_loop_gives(experts):
    modules, activation = experts
    gate = Router(HIDDEN, EXPERTS, TOP_K, score_function="softmax", expert_bias=False)
    shared = MLP(HIDDEN, WIDTH)
    moe = MoE.from_experts(modules, gate, shared, z_coefficient=0.1)
    assert moe.experts.activation == activation and moe.z_coefficient == 0.1
    assert moe.shared_experts is shared and moe.gate is gate
    x = torch.randn(9, HIDDEN)
    _, choice, _ = gate(x)
    loop = shared(x)
    for e, module in enumerate(modules):
        token, slot = (choice.indices == e).nonzero(as_tuple=True)
        part = choice.weights[token, slot, None] * module(x[token])
        loop = loop.index_add(0, token, part)
    torch.testing.assert_close(moe(x), loop, rtol=1e-4, atol=1e-5)


def test_weights_of_zero_do_not_hide_the_activation():
    expert = Mixtral(F.gelu)
    for parameter in expert.parameters():
        nn.init.zeros_(parameter)
    assert Experts.from_experts([expert]).activation == "gelu"
    assert not any(parameter.any() for parameter in expert.parameters()), "the expert itself"


@pytest.mark.parametrize("frozen", [True, False])
def test_dtype_device_and_training_are_those_of_the_list(frozen):
    modules = nn.ModuleList(Mixtral() for _ in range(3)).bfloat16().requires_grad_(not frozen)
    made = Experts.from_experts(modules, recompute=True)
    assert made.recompute
    assert {(p.dtype, p.requires_grad) for p in made.parameters()} == {(torch.bfloat16, not frozen)}
    assert torch.equal(made.gate_up_proj[1, :WIDTH], modules[1].w1.weight)
    meta = Experts.from_experts(modules.to("meta"))
    assert meta.gate_up_proj.is_meta and meta.down_proj.shape == (3, HIDDEN, WIDTH)


def test_other_names_are_told():
    class Other(Mixtral):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = self.w1, self.w3, self.w2
            del self.w1, self.w3, self.w2

        def forward(self, x):
            return self.third(F.silu(self.first(x)) * self.second(x))

    with pytest.raises(ValueError, match="named gate_proj.*w1, w3, w2.*a Other with first, s"):
        Experts.from_experts([Other()])
    made = Experts.from_experts([Other()], names=("first", "second", "third"))
    assert made.down_proj.shape == (1, HIDDEN, WIDTH)
    with pytest.raises(ValueError, match="which gives something else"):  # gate and up exchanged
        Experts.from_experts([Other()], names=("second", "first", "third"))


def test_an_activation_with_numbers_is_told():
    def act(gate):
        return gate.clamp(max=1.5) * torch.sigmoid(1.7 * gate.clamp(max=1.5))

    class Clamped(Mixtral):
        def forward(self, x):
            return self.w2(act(self.w1(x)) * (self.w3(x).clamp(-1.5, 1.5) + 1))

    form = swiglu(1.5, alpha=1.7, shift=1.0)
    made = Experts.from_experts([Clamped()], activation=form)
    assert made.activation == form
    with pytest.raises(ValueError, match="which gives something else"):
        Experts.from_experts([Clamped()])


class Doubled(Mixtral):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "error,text,experts,options",
    [
        (ValueError, "experts: expected one module or more, got none", [], {}),
        (ValueError, "no biases, as in expert 0, got one at 1",
         [Mixtral(), Mixtral(bias=True)], {}),
        (ValueError, "activation: expected one with a gate, got Activation", [Mixtral()],
         {"activation": ungated("silu")}),
        (ValueError, "got Doubled, which gives something else", [Doubled()], {}),
        (ValueError, "with silu or gelu or .*which gives something else", [Mixtral(F.relu)], {}),
        (ValueError, "with gelu, got Mixtral", [Mixtral()], {"activation": "gelu"}),
        (ValueError, "activation: expected one of silu.*got 'relu'", [Mixtral()],
         {"activation": "relu"}),
        (TypeError, "one class, got Mixtral at 0 and Doubled at 1", [Mixtral(), Doubled()], {}),
        (ValueError, r"as of expert 0, got .*\(8, 24\).* at 1", [Mixtral(), Mixtral(width=8)], {}),
        (ValueError, "names: expected w2 and w3 from H to F and w1 back", [Mixtral()],
         {"names": ("w2", "w3", "w1")}),
        (TypeError, "expected gate_proj of expert 0 as a linear layer .*got Embedding4",
         [nn.ModuleDict(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), nn.Identity()))], {}),
    ],
)  # fmt: skip
def test_what_is_no_gated_expert_is_refused(error, text, experts, options):
    with pytest.raises(error, match="from_experts: .*" + text.replace("Embedding4", "Identity")):
        Experts.from_experts(experts, **options)
