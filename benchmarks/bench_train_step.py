# SPDX-License-Identifier: MIT
"""One training step of a preset against transformers' DeepseekV3 with torch.optim.Muon and AdamW.

The same weights, the same text, fp32. Ours is `kimi_ops.train`'s whole step: forward, backward,
clipping, MuonClip with QK-Clip, expert biases and statistics. The peer's: forward, backward,
clipping, torch.optim.Muon and AdamW. torch's Muon takes matrices only, so each expert's gate, up
and down are parameters of their own over the memory of the stacks. Work: 6 FLOP for each weight in
use and token, without the attention's products; roof: the rate of a large dense fp32 product of
this run.

    python -m benchmarks.bench_train_step [--help]
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import StepCase, step_cases
from benchmarks.marks import parametrize
from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops import muon_param_groups
from kimi_ops.models.kimi_k2 import KimiK2
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.train.data import load_corpus, training_batch
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer

PEERS = ("grouped_mm", "eager")


class Peer:
    """transformers' model and torch's optimizers, with the roles that `muon_param_groups` gives."""

    def __init__(self, model: KimiK2, way: str, settings: TrainSettings) -> None:
        import transformers

        values = model.config.to_dict()
        for name in ("model_type", "architectures", "torch_dtype"):
            del values[name]
        config = transformers.DeepseekV3Config(**values)
        config._experts_implementation = way
        self.model = transformers.DeepseekV3ForCausalLM(config)
        self.model.load_state_dict(model.state_dict())
        self.model.train()
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


def functions(case: StepCase) -> tuple[Functions, KimiK2]:
    settings = TrainSettings(preset=case.preset, sequences=case.sequences, window=case.window)
    corpus = load_corpus(None, window=case.window)
    batch = training_batch(corpus.train, seed=0, step=0, batch=case.sequences, window=case.window)
    trainer = Trainer(settings)
    ways = PEERS if importlib.util.find_spec("transformers") else ()
    peers = {way: Peer(trainer.model, way, settings) for way in ways}

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


def compare(session: Session) -> None:
    if session.device != "cpu":
        print("train_step is left out: it is measured on the CPU; for a GPU see device_check")
        return
    table = session.table("train_step", peers=PEERS, width=40, memory="grouped_mm")
    for case in session.select(step_cases(session.quick)):
        named, model = functions(case)
        weights = parameter_report(model.config).active_without_embedding
        work = 6.0 * weights * case.sequences * case.window
        table.compare(case, named, work, "TFLOP/s", session.peak(torch.float32))


@parametrize("case", step_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", *PEERS])
def test_train_step(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"train_step {case}"
    benchmark(functions(case)[0][way])


if __name__ == "__main__":
    main(compare)
