# SPDX-License-Identifier: MIT
"""Who gets Muon and who AdamW: told by use and shape, then by name, and never in silence where they
contradict each other; layouts of expert stacks."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from kimi_ops import MuonClip, muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

CUTS = ("num_heads", "head_dim", "split_sizes", "interleave", "transposed", "batch_dims")


def routes(model: nn.Module, **options) -> dict[str, bool]:
    """Whether Muon takes each matrix."""
    return {
        name: group["algorithm"] == "muon"
        for group in muon_param_groups(model, **options)
        for name, param in group["params"]
        if param.ndim > 1
    }


def cuts(model: nn.Module, **options) -> dict[str, dict]:
    """How each parameter of Muon is cut, but for what is usual."""
    usual = (None, 0, False, "leading")
    return {
        name: {key: group[key] for key in CUTS if group.get(key) not in usual}
        for group in muon_param_groups(model, **options)
        for name, _ in group["params"]
        if group["algorithm"] == "muon"
    }


class Language(nn.Module):
    """A model of two layers whose head has a name of its own."""

    def __init__(self, head: str, vocabulary: int = 24, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(16, 40), "back": nn.Linear(40, 16)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)
        setattr(self, head, nn.Linear(16, vocabulary, bias=False))
        if tied:
            getattr(self, head).weight = self.embedding.weight


@pytest.mark.parametrize("head", ["lm_head", "head", "output", "classifier", "score", "whatever"])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_by_name_by_vocabulary_and_by_tie(head: str, tied: bool):
    found = routes(Language(head, tied=tied))
    assert [name for name, muon in found.items() if muon] == [
        f"layers.{i}.{name}.weight" for i in range(2) for name in ("mix", "back")
    ]


def test_a_tied_head_that_comes_first():
    model = nn.Module()
    model.out = nn.Linear(8, 24, bias=False)
    model.middle = nn.Linear(8, 8)
    model.table = nn.Embedding(24, 8)
    model.table.weight = model.out.weight
    assert not routes(model)["out.weight"] and routes(model)["middle.weight"]


@pytest.mark.parametrize("name", ["gate", "router", "switch", "pick"])
@pytest.mark.parametrize("stacked", [False, True])
def test_routers_by_name_and_by_the_experts_beside(name: str, stacked: bool):
    moe = nn.Module()
    setattr(moe, name, nn.Linear(8, 4, bias=False))
    if stacked:
        moe.experts = nn.Module()
        moe.experts.up_proj = nn.Parameter(torch.ones(4, 6, 8))
        moe.experts.down_proj = nn.Parameter(torch.ones(4, 8, 6))
    else:
        moe.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(4)
        )
    found = routes(nn.Sequential(moe, nn.LayerNorm(8)))
    assert not found.pop(f"0.{name}.weight") and found and all(found.values())


def test_a_router_of_another_class_and_a_router_of_several_layers():
    model = KimiK2(KimiK2Config.tiny(), device="meta")
    assert not any(muon for name, muon in routes(model).items() if ".gate." in name)
    moe = nn.Module()
    moe.router = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    moe.proj = nn.Linear(8, 8)
    assert [name for name, muon in routes(moe).items() if not muon] == [
        "router.0.weight",
        "router.1.weight",
    ]


@pytest.mark.parametrize(
    ("layers", "muon"),
    [
        ([nn.Linear(9, 5), nn.LayerNorm(5)], ["0.weight"]),
        ([nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)], ["0.weight"]),
        ([nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 9)], ["0.weight"]),  # an autoencoder
        ([nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)], ["0.weight", "2.weight"]),
        ([nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)], ["1.weight"]),
        ([nn.Linear(9, 5), nn.Linear(5, 1)], ["0.weight"]),
        ([nn.Conv2d(3, 9, 2), nn.Linear(9, 5), nn.Linear(5, 4)], ["0.weight", "1.weight"]),
    ],
)
def test_the_last_layer_of_a_model(layers: list[nn.Module], muon: list[str]):
    convolution = isinstance(layers[0], nn.Conv2d)
    found = routes(nn.Sequential(*layers), muon_modules=("0",) if convolution else ())
    assert sorted(name for name, taken in found.items() if taken) == muon


def test_two_heads_end_a_model_and_attention_heads_do_not():
    model = nn.Module()
    model.trunk = nn.Linear(6, 8)
    model.mid = nn.Linear(8, 8)
    model.policy, model.worth = nn.Linear(8, 5), nn.Linear(8, 3)
    assert [n for n, muon in routes(model).items() if muon] == ["trunk.weight", "mid.weight"]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.query = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    bare = nn.Module()
    bare.q_proj, bare.kv_b_proj = nn.Linear(8, 24), nn.Linear(4, 28)
    assert all(routes(bare).values())
    attention = nn.Module()
    attention.heads = nn.ModuleList([Head(), Head()])
    attention.proj = nn.Linear(8, 8)
    assert all(routes(nn.Sequential(attention, nn.LayerNorm(8))).values())


def doubtful(kind: str) -> nn.Module:
    model = nn.Module()
    if kind == "vocabulary":  # as wide as the vocabulary, somewhere in the middle
        model.embed, model.mix = nn.Embedding(8, 8), nn.Linear(8, 8)
        model.back, model.end = nn.Linear(8, 6), nn.Linear(6, 8)
    elif kind == "name":  # called like a hidden layer, used like a head
        model.up_proj, model.down_proj = nn.Linear(6, 8), nn.Linear(8, 3)
    elif kind == "repeated":  # called like a head, repeated like a hidden layer
        model.layers = nn.ModuleList(nn.ModuleDict({"output": nn.Linear(8, 8)}) for _ in range(2))
    elif kind == "gate":  # called like a router, wide like the gate of an MLP
        model.gate, model.down = nn.Linear(8, 24), nn.Linear(24, 8)
    elif kind == "several":  # several maps in one, or a head
        model.fused, model.mid = nn.Linear(8, 24), nn.Linear(8, 8)
        model.norm = nn.LayerNorm(8)
    elif kind == "convolution":
        model.patches = nn.Conv2d(3, 8, 2)
    return model


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("vocabulary", "mix", "as many outputs as the vocabulary"),
        ("name", "down_proj", "nothing takes its outputs"),
        ("repeated", "layers.1.output", "layers repeat it"),
        ("gate", "gate", "called like a router"),
        ("several", "fused", "nothing takes its 24 outputs"),
        ("convolution", "patches", "a Conv2d holds it"),
    ],
)
def test_doubt_raises_and_says_how_to_decide(kind: str, name: str, why: str):
    model = doubtful(kind)
    with pytest.raises(ValueError, match=rf"{name}.weight \(.*{why}.*muon_modules"):
        muon_param_groups(model)
    assert not routes(model, strict=False)[f"{name}.weight"]
    everything = tuple({name.rpartition(".")[0] for name, _ in model.named_parameters()})
    assert routes(model, muon_modules=everything)[f"{name}.weight"]
    assert not routes(model, adamw_modules=everything)[f"{name}.weight"]


def test_names_that_the_caller_gives():
    model = Language("lm_head")
    assert not routes(model, adamw_modules=("mix",))["layers.0.mix.weight"]
    assert not routes(model, adamw_modules=("mix",))["lm_head.weight"]  # more, not instead
    found = routes(model, adamw_modules=("layers.0", "layers.1.back.weight"))
    assert [n for n, muon in found.items() if muon] == ["layers.1.mix.weight"]
    found = routes(model, muon_modules=("lm_head", "norm", "embedding"))
    assert found["lm_head.weight"] and found["embedding.weight"]
    routes(model, adamw_modules=("embed_tokens", "lm_head", "gate"))
    for options, kind, text in (
        ({"adamw_modules": ("mixx",)}, ValueError, "adamw_modules: expected names in the model"),
        ({"muon_modules": "mix"}, TypeError, "muon_modules: expected a sequence"),
        ({"adamw_modules": ("mix",), "muon_modules": ("layers",)}, ValueError, "one of them"),
    ):
        with pytest.raises(kind, match=text):
            muon_param_groups(model, **options)


def test_vectors_in_disguise_and_tables():
    model = nn.Module()
    model.pos_embed = nn.Parameter(torch.ones(1, 9, 4))
    model.experts = nn.Module()
    model.experts.w1 = nn.Parameter(torch.ones(2, 3, 4))
    model.experts.w1_bias = nn.Parameter(torch.ones(2, 3))
    model.layers = nn.ModuleList(
        nn.ModuleDict({"shared_expert_gate": nn.Linear(4, 1, bias=False)}) for _ in range(2)
    )
    assert [n for n, muon in routes(model).items() if muon] == ["experts.w1"]


def test_attention_of_torch_and_gpt2():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
    )
    found = cuts(model)
    assert found["layers.0.self_attn.in_proj_weight"] == {"split_sizes": (8, 8, 8)}
    assert found["layers.0.self_attn.out_proj.weight"] == {}
    other = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    assert set(cuts(other)) == {f"{x}_proj_weight" for x in "qkv"} | {"out_proj.weight"}
    config = transformers.GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    found = cuts(transformers.GPT2LMHeadModel(config))
    assert found.pop("transformer.h.0.attn.c_attn.weight") == {"transposed": True}
    assert len(found) == 3 and all(cut == {"transposed": True} for cut in found.values())


def experts(gate_up: tuple[int, ...], down: tuple[int, ...] | None, **said) -> nn.Module:
    model = nn.Module()
    model.gate_up_proj = nn.Parameter(torch.ones(gate_up))
    if down is not None:
        model.down_proj = nn.Parameter(torch.ones(down))
    for key, value in said.items():
        setattr(model, key, value)
    return model


ROWS, COLUMNS = ((2, 12, 8), (2, 8, 6)), ((2, 8, 12), (2, 6, 8))
HALVES = {"head_dim": 1, "split_sizes": (6, 6), "transposed": True}
TURNS = {"head_dim": 1, "interleave": 2, "transposed": True}


@pytest.mark.parametrize(
    ("shapes", "said", "layout", "expected"),
    [
        (ROWS, {}, None, {"split_sizes": (6, 6)}),
        (ROWS, {}, "rows", {"split_sizes": (6, 6)}),
        (ROWS, {}, "rows_interleaved", {"interleave": 2}),
        ((ROWS[0], None), {}, None, {"split_sizes": (6, 6)}),
        ((COLUMNS[0], None), {}, "columns", HALVES),
        (COLUMNS, {"is_concatenated": True}, None, HALVES),
        (COLUMNS, {"is_concatenated": False}, None, TURNS),
        (COLUMNS, {}, "columns", HALVES),
        (COLUMNS, {}, "columns_interleaved", TURNS),
    ],
)
def test_layouts_of_experts(shapes, said, layout, expected):
    found = cuts(experts(*shapes, **said), expert_layout=layout)
    assert found["gate_up_proj"] == expected
    if shapes[1] is not None:
        assert found["down_proj"] == ({"transposed": True} if shapes == COLUMNS else {})


@pytest.mark.parametrize(
    ("shapes", "layout", "text"),
    [
        (COLUMNS, "rows", r"expert_layout: expected .* got 'rows' for \[2, 8, 12\]"),
        (ROWS, "columns_interleaved", "expert_layout"),
        (((2, 12, 8), (2, 8, 5)), None, "choose what fits"),
        (((2, 11, 8), None), "rows", "expert_layout"),
        (((2, 11, 8), None), None, "expert_layout"),
        (COLUMNS, None, "halves or by turns: give expert_layout"),
        (ROWS, "halves", "expert_layout: expected one of rows, columns"),
    ],
)
def test_layouts_that_are_wrong_or_not_known(shapes, layout, text):
    with pytest.raises(ValueError, match=text):
        muon_param_groups(experts(*shapes), expert_layout=layout)
    with pytest.raises(ValueError, match=text):  # insisting does not help, saying it does
        muon_param_groups(
            experts(*shapes), expert_layout=layout, muon_modules=("gate_up_proj",), strict=False
        )


def test_w1_is_gate_and_up_where_it_is_as_wide():
    model = experts(*ROWS)
    model.w1, model.w2 = model.gate_up_proj, model.down_proj
    del model.gate_up_proj, model.down_proj
    assert cuts(model) == {"w2": {}, "w1": {"split_sizes": (6, 6)}}
    model.w1, model.w3 = (nn.Parameter(torch.ones(2, 6, 8)) for _ in range(2))
    assert cuts(model) == {"w2": {}, "w1": {}, "w3": {}}


def test_columns_of_experts_step_as_rows_do():
    """gpt-oss's layout and Kimi K2's are one model: the same matrices, the same bits."""
    generator = torch.Generator().manual_seed(1)
    gate, up, down = (
        torch.randn(2, *shape, generator=generator) for shape in ((6, 8), (6, 8), (8, 6))
    )

    def columns(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack((gate, up), 2).flatten(1, 2).mT.contiguous(), down.mT.contiguous()

    def rows(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((gate, up), 1), down

    results = []
    for lay, said in ((rows, {}), (columns, {"is_concatenated": False})):
        model = experts(*(COLUMNS if said else ROWS), **said)
        with torch.no_grad():
            for param, value in zip(model.parameters(), lay(gate, up, down), strict=True):
                param.copy_(value)
        groups = muon_param_groups(model, adjust_lr_fn="original")
        optimizer = MuonClip(groups, lr=0.1, ns_dtype="float32")
        for seed in (3, 4):
            noise = torch.Generator().manual_seed(seed)
            grads = [torch.randn(x.shape, generator=noise) for x in (gate, up, down)]
            for param, grad in zip(model.parameters(), lay(*grads), strict=True):
                param.grad = grad
            optimizer.step()
        results.append((model, optimizer))
    (a, _), (b, optimizer) = results
    assert torch.equal(a.down_proj, b.down_proj.mT)
    assert torch.equal(a.gate_up_proj[:, :6], b.gate_up_proj[..., ::2].mT)
    assert torch.equal(a.gate_up_proj[:, 6:], b.gate_up_proj[..., 1::2].mT)
    assert "columns dealt out to 2, transposed" in optimizer.routing_summary()
