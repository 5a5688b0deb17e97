# SPDX-License-Identifier: MIT
"""One training step of a preset against transformers' DeepseekV3 with torch.optim.Muon and AdamW.

The same weights, the same text, fp32. Ours is `kimi_ops.train`'s whole step: forward, backward,
clipping, MuonClip with QK-Clip, expert biases and statistics. The peer's: forward, backward,
clipping, torch.optim.Muon and AdamW. torch's Muon takes matrices only, so each expert's gate, up
and down are parameters of their own over the memory of the stacks. Work: 6 FLOP for each weight in
use and token, without the attention's products; roof: the rate of a large dense product of this
run. Peak memory is what a step allocates.

The wide model iterates Newton-Schulz in bf16 as torch does; at the widths of `mini` fp32 is as
fast.

"selective again" and "full again" compute parts of the forward a second time; the peer then has
its own gradient checkpointing, of whole layers. On a GPU the slice of Moonlight has bf16 weights
with fp32 masters, the peer fp32 weights under autocast; each is measured alone, with its own random
weights, and its peak memory is all that it holds.

    python -m benchmarks.bench_train_step [--help]
"""

import dataclasses
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import StepCase, step_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Function, Functions, Time, measure
from benchmarks.report import OURS, Row, Table
from benchmarks.session import Session, main
from kimi_ops import muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.train.data import load_corpus, training_batch
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer

PEERS = ("grouped_mm", "eager")


class Peer:
    """transformers' model and torch's optimizers, with the roles that `muon_param_groups` gives."""

    def __init__(
        self, model: KimiK2, way: str, settings: TrainSettings, device: str = "cpu"
    ) -> None:
        import transformers

        values = model.config.to_dict()
        for name in ("model_type", "architectures", "torch_dtype"):
            del values[name]
        config = transformers.DeepseekV3Config(**values)
        config._experts_implementation = way
        with torch.device(device):
            self.model = transformers.DeepseekV3ForCausalLM(config)
        if model.lm_head.weight.device.type != "meta":  # else it keeps its own random weights
            self.model.load_state_dict(model.state_dict())
        if settings.recompute != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=settings.dtype == "bfloat16")
        self.views: list[tuple[nn.Parameter, nn.Parameter, tuple[Any, ...]]] = []
        matrices, self.rest = self._roles(model)
        rate = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rate)
        self.adamw = torch.optim.AdamW(self.rest, **rate)
        self.clip_norm = settings.clip_norm

    def _roles(self, model: KimiK2) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        parameters = dict(self.model.named_parameters())
        matrices, rest = [], []
        for group in muon_param_groups(model):
            for name, _ in group["params"]:
                parameter = parameters.pop(name)
                if group["algorithm"] == "adamw":
                    rest.append(parameter)
                elif parameter.dim() == 2:
                    matrices.append(parameter)
                else:
                    matrices += self._split(parameter, len(group.get("split_sizes") or (0,)))
        assert not parameters, f"without a role: {list(parameters)}"
        return matrices, rest

    def _split(self, stack: nn.Parameter, parts: int) -> list[nn.Parameter]:
        """Each matrix of the stack as a parameter over the same memory."""
        height, views = stack.shape[1] // parts, []
        for expert in range(stack.shape[0]):
            for part in range(parts):
                place = (expert, slice(part * height, (part + 1) * height))
                views.append(nn.Parameter(stack.data[place]))
                self.views.append((views[-1], stack, place))
        return views

    def backward(self, batch: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        with self.autocast:
            logits = self.model(batch[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).backward()

    def step(self, batch: Tensor) -> None:
        self.backward(batch)
        for view, stack, place in self.views:
            assert stack.grad is not None
            view.grad = stack.grad[place]
        torch.nn.utils.clip_grad_norm_(self.rest, self.clip_norm)
        self.muon.step()
        self.adamw.step()


def settings_of(case: StepCase) -> TrainSettings:
    return TrainSettings(
        preset=case.preset,
        sequences=case.sequences,
        window=case.window,
        recompute=case.recompute,
        dtype=case.weights,
        weights=case.weights,
        ns_dtype="bfloat16" if case.hidden else "auto",
    )


def batch_of(case: StepCase, device: str) -> Tensor:
    text = load_corpus(None, window=case.window).train
    batch = training_batch(text, seed=0, step=0, batch=case.sequences, window=case.window)
    return batch.to(device)


def served() -> tuple[str, ...]:
    return PEERS if importlib.util.find_spec("transformers") else ()


def functions(case: StepCase, device: str = "cpu") -> tuple[Functions, KimiK2]:
    settings, batch = settings_of(case), batch_of(case, device)
    config = dataclasses.replace(settings.model_config(), **case.fields())
    trainer = Trainer(settings, KimiK2(config, device=device))
    peers = {way: Peer(trainer.model, way, settings, device) for way in served()}

    def backward() -> None:
        model = trainer.model
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + model.auxiliary_loss()).backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        model.reset_statistics()

    if case.optimizer:
        named: Functions = {"kimi_ops": lambda: trainer.step(batch, 0)}
        return named | {w: (lambda p=p: p.step(batch)) for w, p in peers.items()}, trainer.model
    named = {"kimi_ops": backward}
    return named | {w: (lambda p=p: p.backward(batch)) for w, p in peers.items()}, trainer.model


def one_of(case: StepCase, way: str, device: str) -> Function:
    """The step of one side alone, whose tokens are all that the preset has."""
    settings, batch = settings_of(case), batch_of(case, device)
    config = getattr(KimiK2Config, case.preset)()
    model = KimiK2(config, device="meta", dtype=getattr(torch, case.weights))
    if way != OURS:
        peer = Peer(model, way, settings, device)
        return lambda: peer.step(batch)
    model.allocate(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.initializer_range)
            else:
                parameter.fill_(1.0)
    trainer = Trainer(settings, model)
    return lambda: trainer.step(batch, 0)


def apart(table: Table, case: StepCase, work: float, roof: float) -> None:
    """One side after the other; peaks are of all memory. A peer that does not fit is left out."""
    times: dict[str, Time] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for way in (OURS, *served()):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = None
        try:
            step = one_of(case, way, "cuda")
            times |= measure({way: step}, "cuda", table.quick)
            peaks[way] = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError as error:
            if way == OURS:
                raise
            left_out[way] = str(error).splitlines()[0]
            print(f"{case}: without {way}: {left_out[way]}", flush=True)
        del step
    row = Row(str(case), times.pop(OURS), work, "TFLOP/s", roof, times, left_out)
    row.peak_bytes, row.peer_bytes = peaks[OURS], peaks.get(table.memory, 0)
    table.add(row)


def compare(session: Session) -> None:
    table = session.table("train_step", peers=PEERS, width=48, memory="grouped_mm")
    for case in session.select(step_cases(session.quick, session.device)):
        roof = session.peak(getattr(torch, case.weights))
        if case.apart:
            config = getattr(KimiK2Config, case.preset)()
            apart(table, case, work_of(case, config), roof)
            continue
        named, model = functions(case, session.device)
        table.compare(case, named, work_of(case, model.config), "TFLOP/s", roof)


def work_of(case: StepCase, config: KimiK2Config) -> float:
    weights = parameter_report(config).active_without_embedding
    return 6.0 * weights * case.sequences * case.window


@parametrize("case", step_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", *PEERS])
def test_train_step(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"train_step {case}"
    benchmark(functions(case)[0][way])


if __name__ == "__main__":
    main(compare)
