# SPDX-License-Identifier: MIT
"""The bias rule, balance loss and z-loss against the same work in torch, forward and backward.

Roof: logits read once for each pass, and their gradient written, at the read bandwidth of this run.
On a CPU the exponentials are the limit.

    python -m benchmarks.bench_balance [--help]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import BalanceCase, balance_cases
from benchmarks.marks import parametrize
from benchmarks.session import Session, main
from kimi_ops import sequence_balance_loss, update_expert_bias_, z_loss

ALPHA, Z, RATE = 1e-4, 1e-3, 1e-3


def torch_balance_loss(logits: Tensor, indices: Tensor, sequences: int) -> Tensor:
    """DeepSeek-V3's eq. 17-20; no row of these inputs needs care."""
    experts, k = logits.shape[1], indices.shape[1]
    scores = logits.float().sigmoid().view(sequences, -1, experts)
    share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
    ids = indices.view(sequences, -1).long()
    ones = torch.ones((), device=logits.device).expand(ids.shape)
    load = torch.zeros(sequences, experts, device=logits.device).scatter_add_(1, ids, ones)
    frequency = load * (experts / (k * scores.shape[1]))
    return ALPHA * (frequency * share).sum(dim=1).mean()


def torch_z_loss(logits: Tensor) -> Tensor:
    return Z * logits.float().logsumexp(dim=-1).square().mean()


def torch_bias_rule(bias: Tensor, loads: Tensor) -> Tensor:
    loads = loads.float()
    return bias.add_((loads.mean() - loads).sign(), alpha=RATE)


def functions(case: BalanceCase, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    if case.op == "bias rule":
        bias, loads = torch.zeros(case.experts), torch.arange(case.experts, dtype=torch.int32)
        bias, loads = bias.to(device), loads.to(device)
        return {
            "kimi_ops": lambda: update_expert_bias_(bias, loads, RATE),
            "torch": lambda: torch_bias_rule(bias, loads),
        }
    logits = torch.randn(case.tokens, case.experts, generator=generator)
    logits = logits.to(device, getattr(torch, case.dtype)).requires_grad_(case.backward)
    indices = logits.detach().topk(case.k, dim=-1).indices.int()

    def ours() -> Tensor:
        if case.op == "z loss":
            return z_loss(logits, coefficient=Z)
        return sequence_balance_loss(
            logits, indices, num_sequences=case.sequences, coefficient=ALPHA
        )

    def timed(loss: Callable[[], Tensor]) -> Callable[[], object]:
        if not case.backward:
            return loss
        return lambda: torch.autograd.grad(loss(), logits)

    def peer(balance: Callable[..., Tensor], z: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if case.op == "z loss":
            return timed(lambda: z(logits))
        return timed(lambda: balance(logits, indices, case.sequences))

    named = {"kimi_ops": timed(ours), "torch": peer(torch_balance_loss, torch_z_loss)}
    if compiled:
        named["torch.compile"] = peer(
            torch.compile(torch_balance_loss, dynamic=False),
            torch.compile(torch_z_loss, dynamic=False),
        )
    return named


def moved(case: BalanceCase) -> int:
    """Bytes that have to be read and written."""
    if case.op == "bias rule":
        return case.experts * 12
    bytes_each = 2 if case.dtype == "bfloat16" else 4
    return case.tokens * case.experts * bytes_each * (3 if case.backward else 1)


def compare(session: Session) -> None:
    table = session.table("balance")
    for case in session.select(balance_cases(session.quick)):
        torch._dynamo.reset()
        named = functions(case, session.device, session.compiled)
        table.compare(case, named, moved(case), "GB/s", session.bandwidth)


@parametrize("case", balance_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", "torch"])
def test_balance(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"balance {case}"
    benchmark(functions(case, "cpu", compiled=False)[way])


if __name__ == "__main__":
    main(compare)
