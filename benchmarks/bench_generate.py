# SPDX-License-Identifier: MIT
"""Prefill and decode of a slice of Kimi K2 against transformers' DeepseekV3, over the same weights.

The slice has K2's widths in bfloat16 and fewer layers, experts and words: one dense layer, one with
experts. Prefill: the prompt into an empty cache, the logits of its last token. Decode: one token of
each sequence behind a cache. transformers keeps expanded keys and values and computes what it
computes with `DynamicCache`; ours keeps latents, and on a GPU replays a step from a CUDA graph.
Work of a prefill: 2 FLOP for each weight in use and token; roof: a large dense product of this run.
Work of a decode step: the bytes of all weights but the embedding's and of the experts that the
tokens chose; roof: the read bandwidth of this run.

    python -m benchmarks.bench_generate [--help]
"""

import importlib.util
from typing import Any, cast

import torch

from benchmarks.cases import GenerateCase, generate_cases
from benchmarks.marks import parametrize
from benchmarks.session import Session, main
from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config, LatentCache
from kimi_ops.models.kimi_k2.decode_graphs import CudaGraphs, DecodeGraphs
from kimi_ops.models.kimi_k2.parameters import parameter_report
from kimi_ops.nn import Router

PEERS = ("grouped_mm", "eager")


def build(case: GenerateCase, device: str) -> KimiK2:
    """K2's widths where memory allows; `tiny` for tests. Embeddings are small, experts few."""
    if case.preset == "tiny":
        config = KimiK2Config.tiny()
    else:
        values = KimiK2Config.k2().to_dict()
        values |= {"num_hidden_layers": 2, "n_routed_experts": case.experts, "vocab_size": 8192}
        values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = KimiK2Config.from_dict(values)
    model = KimiK2(config, device="meta", dtype=torch.bfloat16)
    model.allocate(device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator).add_(float(parameter.dim() == 1))
    return model.eval()


def peer_model(model: KimiK2, way: str) -> Any:
    """transformers' model over the memory of ours."""
    import transformers

    values = model.config.to_dict()
    for name in ("model_type", "architectures", "torch_dtype"):
        del values[name]
    config = transformers.DeepseekV3Config(**values)
    config._experts_implementation = way
    with torch.device("meta"):
        other = transformers.DeepseekV3ForCausalLM(config)
    other.load_state_dict(model.state_dict(), assign=True)
    rotary = type(other.model.rotary_emb)(config)  # its tables are in no state
    other.model.rotary_emb = rotary.to(model.lm_head.weight.device)
    return other.eval()


def tokens(model: Any, sequences: int, length: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), generator=generator)
    return ids.to(model.lm_head.weight.device)


class Ours:
    def __init__(self, model: KimiK2, ids: torch.Tensor, length: int) -> None:
        place: dict[str, Any] = {"device": ids.device, "dtype": torch.bfloat16}
        self.model, self.ids, self.length = model, ids, length
        self.cache = LatentCache(model.config, len(ids), length + ids.shape[1], **place)
        if length:
            self._forward(tokens(model, len(ids), length, seed=2))
        self.graphs = None
        if length and ids.device.type == "cuda":
            self.graphs = DecodeGraphs(model, self.cache, CudaGraphs())

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, cache=self.cache, logits_to_keep=1)
        return logits

    def __call__(self) -> torch.Tensor:
        self.cache.length = self.length
        return self._forward(self.ids) if self.graphs is None else self.graphs.step(self.ids)

    def experts(self) -> list[int]:
        """How many experts of each layer the tokens choose."""
        found: list[int] = []
        hooks = [
            part.register_forward_hook(lambda _, x, y: found.append(len(y[1].indices.unique())))
            for part in self.model.modules()
            if isinstance(part, Router)
        ]
        self.cache.length = self.length
        self._forward(self.ids)
        for hook in hooks:
            hook.remove()
        return found


class Theirs:
    def __init__(self, model: Any, ids: torch.Tensor, length: int) -> None:
        from transformers import DynamicCache

        self.model, self.ids, self.length = model, ids, length
        self.make = lambda: DynamicCache(config=model.config)
        self.cache = self.make()
        if length:
            self._forward(tokens(model, len(ids), length, seed=2))

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = found.logits
        return logits

    def __call__(self) -> torch.Tensor:
        if not self.length:
            self.cache = self.make()
        elif self.cache.get_seq_length() > self.length:
            self.cache.crop(-1)
        return self._forward(self.ids)


def functions(case: GenerateCase, model: KimiK2) -> dict[str, Ours | Theirs]:
    ids = tokens(model, case.sequences, case.prompt if case.prompt else 1, seed=1)
    named: dict[str, Ours | Theirs] = {
        "kimi_ops": Ours(model, ids, 0 if case.prompt else case.behind)
    }
    for way in PEERS if importlib.util.find_spec("transformers") else ():
        named[way] = Theirs(peer_model(model, way), ids, 0 if case.prompt else case.behind)
    return named


def decode_bytes(ours: Ours) -> float:
    """Of the weights that a step reads, with the experts that its tokens choose."""
    config, experts = ours.model.config, ours.experts()
    parts = {part.name: part for part in parameter_report(config).parts}
    count = sum(part.total for part in parts.values()) - config.vocab_size * config.hidden_size
    touched = sum(experts) / (len(experts) * config.n_routed_experts)
    return 2.0 * (count - (1 - touched) * parts["routed experts"].total)


def compare(session: Session) -> None:
    table = session.table("generate", peers=PEERS, width=36, memory="grouped_mm")
    models: dict[tuple[str, int], KimiK2] = {}
    for case in session.select(generate_cases(session.quick)):
        key = (case.preset, case.experts)
        if key not in models:
            models.clear()
            models[key] = build(case, session.device)
        model = models[key]
        named = functions(case, model)
        if case.prompt:
            weights = parameter_report(model.config).active_without_embedding_and_head
            work = 2.0 * weights * case.sequences * case.prompt
            table.compare(case, named, work, "TFLOP/s", session.peak(torch.bfloat16))
        else:
            work = decode_bytes(cast(Ours, named["kimi_ops"]))
            table.compare(case, named, work, "GB/s", session.bandwidth)


@parametrize("case", generate_cases(quick=True), ids=str)
@parametrize("way", ["kimi_ops", *PEERS])
def test_generate(benchmark, case, way):  # type: ignore[no-untyped-def]
    benchmark.group = f"generate {case}"
    benchmark(functions(case, build(case, "cpu"))[way])


if __name__ == "__main__":
    main(compare)
