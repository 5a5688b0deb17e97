# SPDX-License-Identifier: MIT
"""MuonClip.step against torch.optim.Muon and AdamW on the same parameters and gradients.

Cases: 64 matrices of mixed shapes (Kimi K2's, an eighth of its hidden size), 64 so small that the
step around them is what counts, the parameters of `mini` with their own groups, and AdamW alone on
16 M parameters in 64 tensors, on shorter ones and on a long one. Peers: "torch" is
torch.optim.Muon on the 2-D matrices (3-D stacks as lists of their matrices, which it cannot take
otherwise) beside torch.optim.AdamW with its default foreach; "fused" the same with AdamW's fused
kernel. The rate of "AdamW" is bytes of the parameters' 28 an element against the read bandwidth;
the others' is operations of standard Newton-Schulz against torch's bf16 product.

    python -m benchmarks.bench_muon_clip [--help]
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops import MuonClip, muon_param_groups, ns_flops
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config

Groups = list[dict[str, Any]]
SHAPES = [(256, 896), (896, 256), (192, 896), (1536, 192), (72, 896), (2048, 64), (896, 1024)]


def with_gradients(params: Iterable[Tensor]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


def matrices(count: int, kinds: list[tuple[int, int]] = SHAPES) -> Groups:
    shapes = (kinds * (count // len(kinds) + 1))[:count]
    return [{"params": [Parameter(torch.randn(shape)) for shape in shapes], "algorithm": "muon"}]


def mini() -> Groups:
    groups = muon_param_groups(KimiK2(KimiK2Config.mini()))
    return [group | {"params": [param for _, param in group["params"]]} for group in groups]


def adamw(count: int, size: int = 250_000) -> Groups:
    params = [Parameter(torch.randn(size)) for _ in range(count)]
    return [{"params": params, "algorithm": "adamw"}]


def torch_optimizers(groups: Groups, fused: bool) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon and AdamW for the same tensors; matrices of a stack become parameters of
    their own, which share its memory."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for group in groups:
        for param in group["params"]:
            if group["algorithm"] != "muon":
                rest.append(param)
                continue
            assert param.grad is not None
            whole = zip(_matrices(param.detach()), _matrices(param.grad), strict=True)
            for matrix, grad in whole:
                view = Parameter(matrix)
                view.grad = grad
                matrices.append(view)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw"))
    if rest:
        kind = {"fused": True} if fused else {"foreach": True}
        optimizers.append(torch.optim.AdamW(rest, lr=1e-3, **kind))
    return optimizers


def _matrices(x: Tensor) -> list[Tensor]:
    return [x] if x.ndim == 2 else [matrix for part in x for matrix in _matrices(part)]


def flops(groups: Groups) -> int:
    shapes = [p.shape for group in groups if group["algorithm"] == "muon" for p in group["params"]]
    return sum(ns_flops(shape, 5, "standard") for shape in shapes)


def ways(groups: Groups) -> Functions:
    with_gradients(param for group in groups for param in group["params"])
    ours = MuonClip(groups, lr=1e-3, adjust_lr_fn="match_rms_adamw")

    def stepper(optimizers: list[torch.optim.Optimizer]) -> Callable[[], object]:
        return lambda: [optimizer.step() for optimizer in optimizers]

    return {
        "kimi_ops": ours.step,
        "torch": stepper(torch_optimizers(groups, fused=False)),
        "fused": stepper(torch_optimizers(groups, fused=True)),
    }


def compare(session: Session) -> None:
    quick = session.quick
    makers = {
        "8 matrices" if quick else "64 matrices": lambda: matrices(8 if quick else 64),
        "64 matrices of 16 x 16": lambda: matrices(64, [(16, 16)]),
        "mini": mini,
        "AdamW, 16 tensors" if quick else "AdamW, 64 tensors": lambda: adamw(16 if quick else 64),
        "AdamW, 64 tensors of 10 000": lambda: adamw(64, 10_000),
        "AdamW, 200 short tensors": lambda: adamw(200, 1000),
        "AdamW, a long tensor": lambda: adamw(1, 10**6 if quick else 10**7),
    }
    products, passes = session.table("muon_clip"), session.table("muon_clip (AdamW)")
    for name in session.select(list(makers)):
        with torch.device(session.device):
            groups = makers[name]()
            named = ways(groups)
        if work := flops(groups):
            products.compare(name, named, work, "TFLOP/s", session.peak(torch.bfloat16))
        else:
            numbers = sum(param.numel() for group in groups for param in group["params"])
            passes.compare(name, named, 28 * numbers, "GB/s", session.bandwidth)


if __name__ == "__main__":
    main(compare)
