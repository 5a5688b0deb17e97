# SPDX-License-Identifier: MIT
"""What the parameters of a model are: matrices between activations, which Muon takes, or tables,
heads, routers and vectors, which AdamW takes. Told by how modules use them, then by usual names."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_HEADS = _names(
    "lm_head head heads output output_projection classifier score logits to_logits unembed "
    "unembedding embed_out proj_out vocab_proj qa_outputs prediction_head policy_head value_head "
    "v_head reward_head shared_head medusa_head"
)
_HEAD_BOXES = _HEADS - {"output", "logits", "score"}  # all that is inside belongs to the head
_ROUTERS = _names("gate router switch gating gate_network")
_TABLES = _names(
    "embed_tokens wte wpe tok_embeddings embeddings embedding embed pos_embed pos_embedding "
    "position_embedding position_embeddings positional_embedding cls_token mask_token dist_token "
    "register_tokens relative_position_bias_table"
)
_HIDDEN = _names(
    "qkv wqkv to_q to_k to_v to_kv to_qkv to_out query key value query_key_value c_attn c_proj "
    "c_fc wq wk wv wo w1 w2 w3 w12 w13 wi wi_0 wi_1 fc_in fc_out proj dense_h_to_4h "
    "dense_4h_to_h"
)
_INWARDS = re.compile(r"(q|k|v|kv|qkv|gate|up|gate_up|in)(_[ab])?_proj(_with_mqa)?")  # never heads
_MAYBE_HIDDEN = re.compile(r"(fc|linear|lin|dense|layer)\d*")
_POSITIONS = re.compile(r"pos|wpe|type|segment|time")


@dataclass(frozen=True)
class Role:
    muon: bool
    doubt: str = ""  # why the other one may be right


MUON, ADAMW = Role(True), Role(False)


def rows_of(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a linear map."""
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer in transformers, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module, leaf: str, param: Tensor) -> bool:
    return (
        leaf == "weight"
        and param.ndim == 2
        and (isinstance(module, nn.Linear) or is_conv1d(module))
    )


def is_stack(module: nn.Module, path: str, leaf: str, param: Tensor) -> bool:
    """A stack of the matrices of all experts, by its name or its place."""
    named = leaf in _HIDDEN or leaf.endswith("_proj") or "expert" in path
    return param.ndim == 3 and named and not isinstance(module, nn.modules.conv._ConvNd)


def is_bias(leaf: str) -> bool:
    return leaf.startswith("bias") or leaf.endswith("bias")


def called(path: str) -> str:
    """The last part of a module's path that is no number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), "")


class Survey:
    """Who uses what in a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        tables = {
            path: module
            for path, module in self.modules.items()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        self.tables = {table.weight for table in tables.values()}
        self.vocabularies = {
            table.num_embeddings
            for path, table in tables.items()
            if not _POSITIONS.search(called(path))
        }
        self.tied = any(
            isinstance(module, nn.Linear) and module.weight in self.tables
            for module in self.modules.values()
        )
        self.order = [
            (name, param) for name, param in model.named_parameters() if param not in self.tables
        ]
        self.places = {name: i for i, (name, _) in enumerate(self.order)}
        self.alike = Counter((_pattern(name), param.shape) for name, param in self.order)
        self.takers = Counter(table.shape[-1] for table in self.tables if self.tied)
        for name, param in self.order:
            self.takers.update(self._takes(name, param))

    def module(self, name: str) -> tuple[nn.Module, str, str]:
        """The module that holds a parameter, its path, and the parameter's own name."""
        path, _, leaf = name.rpartition(".")
        return self.modules[path], path, leaf

    def role(self, name: str, param: Tensor) -> Role:
        module, path, leaf = self.module(name)
        parts = {*path.split("."), leaf}
        if param.ndim < 2 or param in self.tables or is_bias(leaf) or parts & _TABLES:
            return ADAMW
        if is_stack(module, path, leaf, param):
            return MUON
        if param.ndim == 2 and self._is_router(path, param.shape[0]):
            return ADAMW
        if is_linear(module, leaf, param):
            return self._linear(name, param)
        if isinstance(module, nn.MultiheadAttention):
            return MUON
        if parts & (_HEAD_BOXES | _ROUTERS) and param.ndim == 2:
            return ADAMW
        return Role(False, f"a {type(module).__name__} holds it, shape {list(param.shape)}")

    def _linear(self, name: str, weight: Tensor) -> Role:
        module, path, _ = self.module(name)
        parts = path.split(".")
        last_part = called(path)
        rows, columns = rows_of(module, weight)
        taken = self.takers[rows] > (rows == columns)
        repeated = self.alike[_pattern(name), weight.shape] > 1
        vocabulary = rows in self.vocabularies
        if 1 in (rows, columns):
            return ADAMW  # a vector
        if _ROUTERS & set(parts):
            if rows > columns and last_part in _ROUTERS:
                return Role(False, "called like a router, without experts beside it")
            return ADAMW
        hidden = last_part.lower() in _HIDDEN or last_part.endswith("_proj")
        boxed = bool(_HEAD_BOXES & set(parts)) and not (hidden and repeated)  # attention heads
        if last_part in _HEADS or boxed:
            if repeated and taken and not vocabulary:
                return Role(False, "called like a head, but layers repeat it")
            return ADAMW
        if taken:
            if hidden or repeated:
                return MUON
            if vocabulary and not self._is_last(name):
                return Role(False, "as many outputs as the vocabulary has entries")
            unnamed = not _MAYBE_HIDDEN.fullmatch(last_part)
            return ADAMW if vocabulary or (unnamed and self._is_last(name)) else MUON
        if vocabulary and not hidden:
            return ADAMW
        if self._ends_the_model(name) and not _INWARDS.fullmatch(last_part):
            if repeated or not hidden:
                return MUON if repeated else ADAMW
            return Role(False, "nothing takes its outputs, but it is called like a hidden layer")
        listed = any(isinstance(m, nn.ModuleList) for m in self._around(path))
        if hidden or repeated or listed or _MAYBE_HIDDEN.fullmatch(last_part):
            return MUON
        return Role(False, f"nothing takes its {rows} outputs: a head, or several maps in one")

    def _is_router(self, path: str, rows: int) -> bool:
        """Whether experts lie beside the module, as many as it has outputs."""
        if called(path).endswith("_proj") or rows < 2 or not path:
            return False
        beside = self.modules[path.rpartition(".")[0]]
        for name, child in beside.named_children():
            if "expert" not in name:
                continue
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) == rows:
                return True
            if any(p.ndim == 3 and p.shape[0] == rows for p in child.parameters()):
                return True
        own = beside.named_parameters(recurse=False)
        return any(is_stack(beside, "", n, p) and p.shape[0] == rows for n, p in own)

    def _takes(self, name: str, param: Tensor) -> set[int]:
        """Sizes of the activations that the module of a parameter may take."""
        module, _, leaf = self.module(name)
        if is_bias(leaf):
            return set()
        if is_linear(module, leaf, param):
            return {rows_of(module, param)[1]}
        if isinstance(module, nn.modules.conv._ConvNd):
            return {module.in_channels}
        return set(param.shape[-2:] if param.ndim > 2 else param.shape[-1:])

    def _is_last(self, name: str) -> bool:
        """No parameter of another module comes after it, and no table is the head."""
        path = name.rpartition(".")[0]
        later = self.order[self.places[name] + 1 :]
        return not self.tied and all(other.rpartition(".")[0] == path for other, _ in later)

    def _ends_the_model(self, name: str) -> bool:
        """Only linear layers come after it whose outputs nothing takes either."""
        for other, param in self.order[self.places[name] + 1 :]:
            if param.ndim < 2:
                continue
            module, _, leaf = self.module(other)
            if not is_linear(module, leaf, param):
                return False
            rows, columns = rows_of(module, param)
            if self.takers[rows] > (rows == columns):
                return False
        return True

    def _around(self, path: str) -> list[nn.Module]:
        parts = path.split(".")
        return [self.modules[".".join(parts[:i])] for i in range(len(parts))]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)
