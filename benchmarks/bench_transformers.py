# SPDX-License-Identifier: MIT
"""Whole models of transformers whose experts are computed by this library, or by its own ways.

One layer of each model at its released widths (of DeepSeek-V3's experts as many as fit), a small
vocabulary, bfloat16, random weights that both sides share; attention, router and norms are
transformers' own on both sides. "fwd+bwd" takes the gradients of all parameters. Work: 6 T K F H
operations of the routed experts, three times with gradients; roof: the rate of a large dense
product of this run, which the rest of the layer and few tokens stay below.

    python -m benchmarks.bench_transformers [--help]
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.marks import parametrize
from benchmarks.measure import Functions
from benchmarks.session import Session, main
from kimi_ops.interop.transformers import NAME, register

PEERS = ("grouped_mm", "batched_mm", "eager")


@dataclass(frozen=True)
class Model:
    """A class of transformers and its configuration; `experts` holds E, F and K by its names."""

    name: str
    fields: dict[str, Any] = field(hash=False)
    experts: tuple[int, int, int]

    def build(self, device: str) -> Any:
        import transformers

        register()
        config = getattr(transformers, f"{self.name}Config")(
            vocab_size=1024, num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **self.fields,
        )  # fmt: skip
        made = getattr(transformers, f"{self.name}ForCausalLM")
        with torch.device(device):
            return made._from_config(config, dtype=torch.bfloat16)


MODELS = (
    Model(
        "Qwen3Moe",
        dict(
            hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        ),
        (128, 768, 8),
    ),
    Model(
        "Mixtral",
        dict(
            hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
            num_local_experts=8, num_experts_per_tok=2, intermediate_size=14336,
        ),
        (8, 14336, 2),
    ),
    Model(
        "DeepseekV3",
        dict(
            hidden_size=7168, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=32,
            num_experts_per_tok=8, moe_intermediate_size=2048, intermediate_size=2048, n_group=1,
            topk_group=1, first_k_dense_replace=0,
        ),
        (32, 2048, 8),
    ),
)  # fmt: skip
TINY = Model(
    "Mixtral",
    dict(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size=96,
    ),
    (4, 96, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: Model
    tokens: int
    backward: bool

    def __str__(self) -> str:
        experts, width, k = self.model.experts
        what = "fwd+bwd" if self.backward else "fwd"
        return f"{self.model.name} E {experts}, F {width}, K {k}, T {self.tokens} {what}"

    @property
    def flops(self) -> float:
        _, width, k = self.model.experts
        forward = 6.0 * self.tokens * k * width * self.model.fields["hidden_size"]
        return 3 * forward if self.backward else forward


def cases(quick: bool, device: str = "cpu") -> list[Case]:
    """Some decoded tokens, a prompt; gradients where they fit beside the weights."""
    if quick:
        return [Case(TINY, 16, backward) for backward in (False, True)]
    prompt = 512 if device == "cpu" else 4096
    found = [Case(model, t, False) for model in MODELS for t in (8, prompt)]
    return found + [Case(MODELS[0], prompt, True)]


def functions(case: Case, model: Any) -> Functions:
    """Every way through one model, whose weights they share."""
    device = model.lm_head.weight.device
    ids = torch.randint(3, 1024, (1, case.tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    parameters = list(model.parameters())

    def call(way: str) -> object:
        model.config._experts_implementation = way  # what the experts ask at each call
        if not case.backward:
            with torch.no_grad():
                return model.model(ids, use_cache=False).last_hidden_state
        loss = model(ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    # with many tokens one copies the matrices for each pair, the other makes a stack of zeros for
    # each expert in its backward: a minute a call
    slow = {"batched_mm"} | ({"eager"} if case.backward else set()) if case.tokens > 64 else set()
    return {way: (lambda way=way: call(way)) for way in (NAME, *PEERS) if way not in slow}


def compare(session: Session) -> None:
    if importlib.util.find_spec("transformers") is None:
        print(
            "transformers: expected it to be installed, which it is not; pip install transformers"
        )
        return
    table = session.table("transformers", peers=PEERS, width=48, memory="grouped_mm")
    roof = session.peak(torch.bfloat16)
    built, model = None, None
    for case in session.select(cases(session.quick, session.device)):
        if built is not case.model:
            model = None  # before the next is made
            built, model = case.model, case.model.build(session.device)
        table.compare(case, functions(case, model), case.flops, "TFLOP/s", roof)


@parametrize("case", cases(quick=True), ids=str)
@parametrize("way", [NAME, *PEERS])
def test_transformers(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"transformers {case}"
    benchmark(functions(case, case.model.build("cpu"))[way])


if __name__ == "__main__":
    main(compare)
