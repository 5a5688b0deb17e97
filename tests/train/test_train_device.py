# SPDX-License-Identifier: MIT
"""A training step on a device, without one: on tensors of the meta device everything runs but the
kernels, a value read on the host is an error, and a dispatch mode refuses what a GPU would refuse,
an op whose tensors are not all on one device."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_ops import gpu
from kimi_ops.gpu import DeviceError, choose_device, gpu_fault
from kimi_ops.train import Ranks, TrainSettings, train
from kimi_ops.train.checkpoint import read_state, split_optimizer_state
from kimi_ops.train.resume import resumed_settings, resumed_trainer
from kimi_ops.train.sample import load_model, sample_text
from kimi_ops.train.trainer import Trainer

COPIES = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """Raises where a meta tensor meets one of the CPU, but in a copy, or as a number (0-dim) that
    is not written to. `copies` are the sizes of what travelled, `waits` those that block the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []
        self.waits: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = tensors[:1] if func._schema.is_mutable else []
        name = func._schema.name
        out = func(*args, **kwargs)
        everything = [*tensors, *(x for x in tree_leaves(out) if isinstance(x, Tensor))]
        if name in COPIES and len({x.device for x in everything}) > 1:
            self.copies.append(everything[-1].numel())
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.waits.append(everything[-1].numel())
        elif name not in COPIES:
            counted = [x for x in tensors if x.dim() or x.is_meta or any(x is w for w in written)]
            if len({x.device for x in counted}) > 1:
                places = [(str(x.device), tuple(x.shape)) for x in tensors]
                raise RuntimeError(f"{name}: tensors on different devices: {places}")
        return out


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(
        TrainSettings(preset="tiny", window=32, sequences=2, accumulate=2, steps=6), device="meta"
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the host asks the device for, in place of values that meta tensors lack."""
    sizes: list[int] = []

    def read(numbers: Tensor) -> list[float]:
        assert numbers.is_meta
        sizes.append(numbers.numel())
        return [1.0] * numbers.numel()

    monkeypatch.setattr("kimi_ops.train.trainer.read", read)
    return sizes


BATCH = torch.zeros(4, 33, dtype=torch.int64)


def test_a_step_stays_on_its_device_and_waits_once(trainer: Trainer, reads: list[int]):
    trainer.step(BATCH, 0)  # makes the optimizer's state
    reads.clear()
    with OneDevice() as seen:
        statistics = trainer.step(BATCH, 1)
    assert statistics.loss == 1.0 and len(reads) == 1
    assert seen.copies == [BATCH.numel()] and seen.waits == []
    devices = {k: v.device.type for s in trainer.optimizer.state.values() for k, v in s.items()}
    assert devices == {
        **{"momentum_buffer": "meta", "exp_avg": "meta", "exp_avg_sq": "meta"},
        "step": "meta",  # counted there: what is left alone does not count
    }


def test_the_first_step_and_validation_stay_on_their_device(trainer: Trainer, reads: list[int]):
    with OneDevice():
        trainer.step(BATCH, 0)
        assert trainer.validate(torch.zeros(5, 33, dtype=torch.int64)) == 1.0
    assert len(reads) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_stays_on_its_device(trainer: Trainer, temperature: float):
    prompt = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    options = {"temperature": temperature, "top_p": 0.9}
    with OneDevice() as seen:
        ids = trainer.model.generate(prompt, max_new_tokens=3, **options)
    assert ids.shape == (2, 8) and ids.is_meta and seen.copies == []


def test_the_mode_sees_what_it_is_for(trainer: Trainer, reads: list[int]):
    with OneDevice(), pytest.raises(RuntimeError, match="device"):
        torch.cat((torch.zeros(3, device="meta"), torch.zeros(3)))
    with OneDevice(), pytest.raises(RuntimeError, match="different devices"):
        torch.zeros(()).add_(torch.zeros((), device="meta"))
    with OneDevice(), pytest.raises(RuntimeError, match="different devices"):
        torch.zeros(3, device="meta")[torch.tensor([1])]
    with OneDevice(), pytest.raises(RuntimeError):
        float(torch.zeros((), device="meta"))
    with OneDevice() as seen:
        torch.zeros(3).to("meta")
    assert seen.waits == [3]


OPTIONS = {"preset": "tiny", "window": 32, "sequences": 4, "steps": 4, "threads": 1}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"value {i} is {i * i}\n" for i in range(2000)))
    return path


def test_a_checkpoint_moves_between_devices(tmp_path: Path, text: Path):
    before = torch.get_num_threads()
    result = train(tmp_path / "run", data=text, overrides=OPTIONS, say=lambda _: None)
    torch.set_num_threads(before)
    state = read_state(result.checkpoint)
    assert state["device"] == "cpu" and "device" not in state["settings"]
    settings = resumed_settings(state, {}, print)
    device = torch.device("meta")
    trainer = resumed_trainer(result.checkpoint, state, settings, device, Ranks())
    assert all(x.is_meta for x in trainer.model.state_dict().values())
    for entries in trainer.optimizer.state.values():
        assert {name: value.is_meta for name, value in entries.items()} in (
            {"momentum_buffer": True},
            {"exp_avg": True, "exp_avg_sq": True, "step": False},
        )
    # and back: what is written comes from the device first, which meta tensors cannot
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        split_optimizer_state(trainer.optimizer.state_dict())


def test_weights_are_the_same_for_every_device():
    """They are drawn on the CPU: what reaches a device are copies of one stream of numbers."""
    drawn = Trainer(TrainSettings(preset="tiny", seed=5)).model.lm_head.weight
    copied: list[Tensor] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::copy_" and args[0].shape == drawn.shape:
                copied.append(args[1].clone())
            return func(*args, **kwargs or {})

    with Copies():
        Trainer(TrainSettings(preset="tiny", seed=5), device="meta")
    assert any(torch.equal(value, drawn) for value in copied)


FAULTS = [
    (AssertionError("Torch not compiled with CUDA enabled"), False, "without CUDA; install"),
    (RuntimeError("Found no NVIDIA driver on your system. Please"), False, "no NVIDIA driver"),
    (RuntimeError("No CUDA GPUs are available"), False, "CUDA_VISIBLE_DEVICES"),
    (RuntimeError("The NVIDIA driver on your system is too old (found 11040)"), True, "update it"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), True, "memory is full"),
    (RuntimeError("CUDA error: no kernel image is available\nmore"), True, "architecture; build"),
    (RuntimeError("topk_gate: device: got cuda: this build has no CUDA kernels"), True, "nvcc"),
    (RuntimeError("CUDA error: busy\nCompile with"), True, "CUDA error: busy; mend that"),
]


@pytest.mark.parametrize(("error", "present", "words"), FAULTS)
def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch, error, present, words):
    def broken() -> None:
        raise error

    monkeypatch.setattr(gpu, "_try_gpu", broken)
    fault = gpu_fault()
    assert fault is not None and fault.present == present and words in str(fault)
    assert "\n" not in str(fault)
    told: list[str] = []
    assert choose_device("auto", "train", told.append) == torch.device("cpu")
    assert told == ([f"train: on the CPU, because {fault}"] if present else [])
    with pytest.raises(DeviceError, match="train: --device: expected a GPU that works, got none: "):
        choose_device("cuda", "train", told.append)
    assert choose_device("cpu", "train", told.append) == torch.device("cpu")


def test_a_gpu_works_when_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    native = SimpleNamespace(cuda_architectures=lambda: "")
    try_gpu = gpu._try_gpu
    monkeypatch.setattr(gpu, "_try_gpu", lambda: try_gpu("cpu"))
    monkeypatch.setattr(gpu, "_native", SimpleNamespace(_C=native))
    assert "no CUDA kernels; rebuild" in str(gpu_fault())
    native.cuda_architectures = lambda: "sm_80"
    assert gpu_fault() is None
    assert choose_device("auto", "train", print) == torch.device("cuda", 1)
    assert choose_device("cuda", "train", print) == torch.device("cuda", 1)
    wrong = SimpleNamespace(indices=torch.tensor([[0, 1]]))
    monkeypatch.setattr(gpu, "topk_gate", lambda logits, k: wrong)
    assert "wrong result, [[0, 1]]" in str(gpu_fault())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_this_torch_has_no_gpu():
    assert "torch is a build without CUDA" in str(gpu_fault())
    with pytest.raises(ValueError, match="expected auto, cpu or cuda, got cuda:1"):
        choose_device("cuda:1", "generate", print)


def test_bfloat16_is_near_float32_and_keeps_float32_weights(tmp_path: Path, text: Path):
    trainers = [
        Trainer(TrainSettings(preset="tiny", window=32, sequences=4, steps=6, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    batch = torch.randint(97, 105, (4, 33), generator=torch.Generator().manual_seed(0))
    logits: list[torch.dtype] = []
    for trainer in trainers:
        gate = trainer.model.moe_layers()[0].gate
        gate.register_forward_hook(lambda module, args, out: logits.append(out[0].dtype))
    exact, rounded = (trainer.step(batch, 0) for trainer in trainers)
    assert rounded.loss != exact.loss and rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert logits == [torch.float32, torch.float32]  # the router's scores
    assert {p.dtype for p in trainers[1].model.parameters()} == {torch.float32}


def test_generation_in_bfloat16(tmp_path: Path, text: Path):
    before = torch.get_num_threads()
    train(tmp_path / "run", data=text, overrides=OPTIONS, say=lambda _: None)
    torch.set_num_threads(before)
    model = load_model(tmp_path / "run", dtype="bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    made = sample_text(model, "value", max_tokens=5, temperature=0.0, top_p=1.0, seed=0)
    assert made.startswith("value")
    with pytest.raises(ValueError, match="generate: --dtype: expected float32 or bfloat16"):
        load_model(tmp_path / "run", dtype="int8")
