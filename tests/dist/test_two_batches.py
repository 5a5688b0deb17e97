# SPDX-License-Identifier: MIT
"""Two batches side by side: the bits of one after the other, on every backend and number of ranks;
the order of what computes and what travels."""

import dataclasses
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from kimi_ops import LocalWorld
from kimi_ops.models.kimi_k2 import ExpertRanks, KimiK2, KimiK2Config, backward_two, forward_two
from tests.dist.world import launch

CONFIG = KimiK2Config.tiny()
SIZES = (7, 5, 6, 6)  # tokens of a sequence in each batch
AUXILIARY = dataclasses.replace(CONFIG, aux_loss_alpha=0.1)


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 64, (2, size), generator=generator) for size in SIZES]


def loss_of(logits: torch.Tensor, auxiliary: torch.Tensor) -> torch.Tensor:
    return logits.float().square().mean() + auxiliary


def one_by_one(model: KimiK2, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    found = []
    for ids in batches(rank):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(ids)
        loss = loss_of(logits, model.auxiliary_loss())
        loss.backward()
        found += [logits.detach(), loss.detach()]
    return found


def side_by_side(
    model: KimiK2, rank: int, dtype: torch.dtype, repeated: bool
) -> list[torch.Tensor]:
    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return tuple(tensor for output in forward_two(model, a, b) for tensor in output)

    found, given = [], batches(rank)
    for pair in (given[:2], given[2:]):
        made = checkpoint(both, *pair, use_reentrant=False) if repeated else both(*pair)
        losses = [loss_of(*made[:2]), loss_of(*made[2:])]
        backward_two(model, losses)
        for logits, loss in zip(made[::2], losses, strict=True):
            found += [logits.detach(), loss.detach()]
    return found


def same_bits(
    group,
    rank: int,
    dtype=torch.float32,
    repeated: bool = False,
    backend: str = "reference",
    recompute: str = "none",
) -> None:
    """Logits, losses, gradients and statistics of four batches, in twos and one by one."""
    options: dict[str, Any] = {"max_tokens": 14, "batches": 2, "backend": backend}
    with ExpertRanks(group, AUXILIARY, **options) as ranks:
        assert ranks.backend == backend
        models = [KimiK2(AUXILIARY, expert_ranks=ranks).train() for _ in range(2)]
        models[1].recompute = recompute
        for model in models:
            for layer in model.attention_layers():
                layer.track_max_logits = True
        apart = one_by_one(models[0], rank, dtype)
        together = side_by_side(models[1], rank, dtype, repeated)
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
        for (name, a), b in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
            assert torch.equal(a, b), name
        assert sum(moe.tokens_per_expert.sum() for moe in models[1].moe_layers()) > 0


@pytest.mark.parametrize(
    ("world", "dtype", "repeated"),
    [
        *((world, torch.float32, False) for world in (1, 2, 4)),
        (2, torch.bfloat16, False),
        (4, torch.float32, True),
    ],
)
def test_the_bits_of_one_after_the_other(world: int, dtype: torch.dtype, repeated: bool):
    LocalWorld(world).run(lambda group: same_bits(group, group.rank, dtype, repeated))


def test_norms_and_expansions_may_be_computed_again():
    LocalWorld(2).run(lambda group: same_bits(group, group.rank, recompute="selective"))


def test_layers_may_not():
    def work(group):
        with ExpertRanks(group, AUXILIARY, max_tokens=14, batches=2) as ranks:
            model = KimiK2(AUXILIARY, expert_ranks=ranks)
            model.recompute = "full"
            with pytest.raises(ValueError, match="expected recompute none or selective, got full"):
                forward_two(model, torch.tensor([[1]]), torch.tensor([[2]]))

    LocalWorld(2).run(work)


class Planned(Exception):
    pass


def step(model: KimiK2, rank: int) -> list[torch.Tensor]:
    model.zero_grad()
    model.reset_statistics()
    outputs = forward_two(model, *batches(rank)[:2])
    backward_two(model, [loss_of(*output) for output in outputs])
    return [parameter.grad for parameter in model.parameters()]


def fail(module: torch.nn.Module, call: int, backward: bool) -> None:
    """Let a call of the module raise, or the backward of what it gave."""
    calls = []

    def stop(*_: object) -> None:
        raise Planned

    def hook(module, given, output) -> None:
        calls.append(output)
        if len(calls) == call:
            output.register_hook(stop) if backward else stop()

    module.register_forward_hook(hook)


def goes_on(group, rank: int, backend: str = "reference") -> None:
    """After an error anywhere, the objects of the failed step still there, the next one works."""
    options: dict[str, Any] = {"max_tokens": 14, "batches": 2, "backend": backend}
    with ExpertRanks(group, AUXILIARY, **options) as ranks:
        expected = step(KimiK2(AUXILIARY, expert_ranks=ranks).train(), rank)
        kept = []
        for backward in (False, True):
            for place, call in (("1.post_attention_layernorm", 2), ("2.self_attn.o_proj", 1)):
                model = KimiK2(AUXILIARY, expert_ranks=ranks).train()
                fail(model.get_submodule(f"model.layers.{place}"), call, backward)
                with pytest.raises(Planned) as caught:
                    step(model, rank)
                kept.append(caught.value)  # with it the frames, and the graph of the backward
                found = step(model, rank)
                assert all(map(torch.equal, expected, found)), (backward, place)


def processes(rank: int, folder: str) -> None:
    for world in (1, 2, 4):
        group = dist.new_group(list(range(world)))
        for backend in ("shm", "gloo") if rank < world else ():
            same_bits(group, rank, backend=backend)
            if world == 2:
                goes_on(group, rank, backend)


def test_a_step_that_fails_is_not_the_last():
    LocalWorld(2).run(lambda group: goes_on(group, group.rank))


def test_processes_have_the_bits_of_one_after_the_other(tmp_path: Path):
    launch(processes, tmp_path, 4)


def trace() -> list[tuple[str, int]]:
    """(what, 1 where it begins and -1 where it ends) of a step on one of two ranks, by time."""

    def work(group):
        with ExpertRanks(group, CONFIG, max_tokens=14, batches=2) as ranks:
            model = KimiK2(CONFIG, expert_ranks=ranks)
            first, second = batches(group.rank)[:2]
            with profile() if group.rank == 0 else nullcontext() as profiler:
                outputs = forward_two(model, first, second)
                backward_two(model, [output.logits.mean() for output in outputs])
            return [] if profiler is None else profiler.events()

    named = "(batch .|dispatch|combine|gradient of .*): .*"
    steps = [event for event in LocalWorld(2).run(work)[0] if re.fullmatch(named, event.name)]
    moments = [(event.time_range.start, event.name, 1) for event in steps]
    moments += [(event.time_range.end, event.name, -1) for event in steps]
    return [(name, edge) for _, name, edge in sorted(moments)]


def test_the_messages_of_one_travel_while_the_other_computes():
    found = trace()
    began = [name for name, edge in found if edge == 1]
    assert began[: began.index("gradient of combine: begin")] == [
        "batch 2: attention 0", "batch 1: attention 0",  # a dense layer
        "batch 2: attention 1", "dispatch: begin", "batch 1: attention 1", "dispatch: begin",
        "batch 2: experts 1", "dispatch: wait", "combine: begin",
        "batch 1: experts 1", "dispatch: wait", "combine: begin",
        "batch 2: attention 2", "combine: wait", "dispatch: begin",
        "batch 1: attention 2", "combine: wait", "dispatch: begin",
        "batch 2: experts 2", "dispatch: wait", "combine: begin",
        "batch 1: experts 2", "dispatch: wait", "combine: begin",
        "batch 2: head", "combine: wait", "batch 1: head", "combine: wait",
    ]  # fmt: skip
    # batch 1's tokens leave before batch 2's experts begin, and are awaited when those have ended
    left = [n for n, moment in enumerate(found) if moment == ("dispatch: begin", -1)][1]
    ended = found.index(("batch 2: experts 1", -1))
    awaited = [n for n, moment in enumerate(found) if moment == ("dispatch: wait", 1)][1]
    assert left < found.index(("batch 2: experts 1", 1)) < ended < awaited
    # the backward: that of batch 1 leads, and each gradient travels beside the other's products
    back = [name.removeprefix("gradient of ") for name in began if name.startswith("gradient")]
    layer = [
        "combine: begin", "combine: begin", "combine: wait", "dispatch: begin", "combine: wait",
        "dispatch: begin",
    ]  # fmt: skip
    between = ["dispatch: wait", "combine: begin"] * 2
    assert back == [*layer, *between, *layer[2:], *["dispatch: wait"] * 2]


def test_gradients_that_are_there_are_added_to_where_they_lie():
    layer = torch.nn.Linear(64, 64)
    inputs = [torch.randn(3, 64) for _ in range(3)]
    layer(inputs[0]).square().sum().backward()
    before = layer.weight.grad.data_ptr()
    backward_two(layer, [layer(x).square().sum() for x in inputs[1:]])
    assert layer.weight.grad.data_ptr() == before
    wanted = sum(2 * layer(x).detach().T @ x for x in inputs)
    torch.testing.assert_close(layer.weight.grad, wanted)


def test_what_cannot_be_side_by_side_is_refused():
    def work(group):
        first, second = batches(group.rank)[:2]
        for config, count, wrong in (
            (CONFIG, 1, "expected ExpertRanks of batches=2, got batches=1; there is nothing"),
            (dataclasses.replace(CONFIG, tie_word_embeddings=True), 2, "got tie_word_embeddings"),
        ):
            with (
                ExpertRanks(group, config, max_tokens=14, batches=count) as ranks,
                pytest.raises(ValueError, match=f"forward_two: model: .*{wrong}"),
            ):
                forward_two(KimiK2(config, expert_ranks=ranks), first, second)
        with ExpertRanks(group, CONFIG, max_tokens=14, batches=2) as ranks:
            model = KimiK2(CONFIG, expert_ranks=ranks)
            with pytest.raises(ValueError, match="save_pretrained: expert_ranks: .* a LocalWorld"):
                ranks.to_first(torch.zeros(1), 0)
            with pytest.raises(ValueError, match="input_ids: expected ids in 0 .. 63"):
                forward_two(model, first, second + 64)
            with pytest.raises(TypeError, match="KimiK2: dtype: expected bfloat16, .*got .*64"):
                forward_two(model.double(), first, second)
            model.float()
            return [output.logits.shape[1] for output in forward_two(model, first, second)]

    assert LocalWorld(2).run(work) == [list(SIZES[:2])] * 2
    with pytest.raises(ValueError, match="got no expert_ranks"):
        forward_two(KimiK2(CONFIG), *batches(0)[:2])


def test_hooks_of_gradients_are_refused():
    """They would be given those that are there already, too."""

    def work(group):
        with ExpertRanks(group, CONFIG, max_tokens=14, batches=2) as ranks:
            model = KimiK2(CONFIG, expert_ranks=ranks)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            model.lm_head.weight.register_hook(lambda grad: grad)
            loss = model.lm_head.weight.sum()
            with pytest.raises(ValueError, match="expected parameters without hooks"):
                backward_two(model, [loss, loss])

    LocalWorld(1).run(work)


def test_rows_of_other_ranks_are_kept_in_fp8():
    """The experts' gradients are those of one process that keeps FP8, where all tokens are."""

    def gradients(model: KimiK2, *given: torch.Tensor) -> list[torch.Tensor]:
        for ids in given:
            model(ids).square().sum().backward()
        return [p.grad for moe in model.moe_layers() for p in moe.experts.parameters()]

    def work(group):
        with ExpertRanks(group, CONFIG, max_tokens=14) as ranks:
            model = KimiK2(CONFIG, expert_ranks=ranks)
            plain = gradients(model, batches(group.rank)[0])
            model.zero_grad()
            model.fp8_activations = True
            return ranks.experts, plain, gradients(model, batches(group.rank)[0])

    model = KimiK2(CONFIG)
    model.fp8_activations = True
    wanted = gradients(model, *(batches(rank)[0] for rank in range(2)))
    for experts, plain, found in LocalWorld(2).run(work):
        for a, b, c in zip(wanted, plain, found, strict=True):
            whole = a[experts.start : experts.stop]
            assert torch.linalg.norm(c - whole) < 1e-3 * torch.linalg.norm(whole)
            assert torch.linalg.norm(c - b) > 1e-2 * torch.linalg.norm(b)


def on_a_gpu(rank: int, folder: str) -> None:
    """Logits have the same bits; gradients of attention are added up in any order there."""
    options: dict[str, Any] = {"max_tokens": 14, "batches": 2, "backend": "cuda"}
    with ExpertRanks(dist.group.WORLD, CONFIG, device="cuda:0", **options) as ranks:
        models = [KimiK2(CONFIG, device="cuda:0", expert_ranks=ranks) for _ in range(2)]
        given = [ids.cuda() for ids in batches(rank)[:2]]
        apart = [models[0](ids) for ids in given]
        together = forward_two(models[1], *given)
        for logits, output in zip(apart, together, strict=True):
            assert torch.equal(logits, output.logits)
            logits.square().mean().backward()
        backward_two(models[1], [output.logits.square().mean() for output in together])
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_processes_on_one_gpu(tmp_path: Path):
    launch(on_a_gpu, tmp_path, 2)
