# SPDX-License-Identifier: MIT
"""The model as one graph: torch.compile without a break, torch.export with sizes that vary."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.compiler.reset()
    return KimiK2(KimiK2Config.tiny())


def loss(logits, model):
    return logits.square().sum() + model.auxiliary_loss()


def test_a_training_step_is_one_graph(model):
    loss(model(IDS), model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loads = [moe.tokens_per_expert.clone() for moe in model.moe_layers()]
    model.zero_grad()
    model.reset_statistics()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss(compiled(IDS), model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    for moe, counts in zip(model.moe_layers(), loads, strict=True):
        assert torch.equal(moe.tokens_per_expert, counts)


def test_a_compiled_layer_that_is_repeated_counts_once(model):
    moe = model.moe_layers()[0]
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 6, 32, requires_grad=True)
    checkpoint(compiled, x, use_reentrant=False).sum().backward()
    assert int(moe.tokens_per_expert.sum()) == 6 * model.config.num_experts_per_tok


def test_an_exported_model_takes_other_sizes(model):
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", max=100)
    with torch.no_grad():
        exported = torch.export.export(
            model.eval(), (IDS,), dynamic_shapes={"input_ids": {0: batch, 1: length}}
        ).module()
        for ids in (IDS, IDS[:1, :4], IDS.repeat(3, 5)):
            assert torch.equal(exported(ids), model(ids))


def test_a_default_device_is_not_asked_where_one_is_given():
    with torch.device("meta"):
        model = KimiK2(KimiK2Config.tiny(), device="cpu")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert torch.equal(model(IDS), KimiK2(KimiK2Config.tiny())(IDS))
