# SPDX-License-Identifier: MIT
"""The shapes that are measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GateCase:
    tokens: int
    experts: int
    k: int
    kind: str = "random"  # | "ties" (all logits 0) | "groups" (8, of which 4 are kept)
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = "" if self.kind == "random" else f", {self.kind}"
        kind += "" if self.dtype == "float32" else f", {self.dtype}"
        return f"T {self.tokens}, E {self.experts}, K {self.k}{kind}"


def gate_cases(quick: bool, device: str = "cpu") -> list[GateCase]:
    """Moonlight (64 experts), DeepSeek-V3 (256), Kimi K2 (384) and Kimi K3 (896) routers."""
    if device == "cuda" and quick:
        cases = [GateCase(t, 384, 8) for t in (1, 64, 4096)]
        large = [(256, 8), (384, 8), (896, 16)]
        dtypes = ("float32", "bfloat16")
        return cases + [GateCase(32768, e, k, dtype=d) for e, k in large for d in dtypes]
    models = [(384, 8)] if quick else [(64, 6), (256, 8), (384, 8), (896, 16)]
    tokens = [1, 64, 4096] if quick else [1, 64, 512, 4096, 32768]
    hard = [GateCase(4096, 384, 8, "ties"), GateCase(4096, 256, 8, "groups")]
    return [GateCase(t, e, k) for e, k in models for t in tokens] + hard


@dataclass(frozen=True)
class PermuteCase:
    tokens: int
    k: int
    experts: int
    hidden: int
    skew: str = "balanced"

    def __str__(self) -> str:
        shape = f"T {self.tokens}, K {self.k}, E {self.experts}, H {self.hidden}"
        return shape if self.skew == "balanced" else f"{shape}, {self.skew}"


def permute_cases(quick: bool, device: str = "cpu") -> list[PermuteCase]:
    """Kimi K2 from decode (few tokens) to training, Moonlight, Kimi K3."""
    if quick and device == "cpu":
        return [PermuteCase(64, 8, 384, 7168), PermuteCase(1024, 8, 384, 7168)]
    return [
        PermuteCase(1, 8, 384, 7168),
        PermuteCase(64, 8, 384, 7168),
        PermuteCase(512, 8, 384, 7168),
        PermuteCase(4096, 8, 384, 7168),
        PermuteCase(4096, 8, 384, 7168, "hot"),
        PermuteCase(16384, 6, 64, 2048),
        PermuteCase(8192, 16, 896, 3584),
    ]


@dataclass(frozen=True)
class BalanceCase:
    op: str  # "balance loss" | "z loss" | "bias rule"
    tokens: int
    experts: int
    k: int
    sequences: int
    dtype: str = "float32"
    backward: bool = True

    def __str__(self) -> str:
        if self.op == "bias rule":
            return f"{self.op}, E {self.experts}"
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        passes = "fwd+bwd" if self.backward else "fwd"
        return f"{self.op} {passes}, T {self.tokens}, E {self.experts}{kind}"


def balance_cases(quick: bool) -> list[BalanceCase]:
    """Routers of topk_gate's models, in sequences of at most 4096 tokens."""
    cases = []
    for op in ("balance loss", "z loss"):
        for experts, k in [(384, 8)] if quick else [(64, 6), (384, 8), (896, 16)]:
            for tokens in [4096] if quick else [64, 4096, 32768]:
                for backward in (False, True):
                    sequences = max(1, tokens // 4096)
                    cases.append(BalanceCase(op, tokens, experts, k, sequences, backward=backward))
        cases.append(BalanceCase(op, 4096, 384, 8, 1, "bfloat16"))
    return [*cases, BalanceCase("bias rule", 0, 384, 8, 1)]


GEMM_SHAPES = {  # experts' matrices: (K, N)
    "K2 gate+up": (7168, 4096),
    "K2 down": (2048, 7168),
    "Moonlight": (2048, 1408),
    "Moonlight gate+up": (2048, 2816),
    "Moonlight down": (1408, 2048),
    "GLM up": (6144, 4096),
    "mini gate+up": (128, 128),
    "mini down": (64, 128),
}


@dataclass(frozen=True)
class GemmCase:
    shape: str  # of GEMM_SHAPES
    experts: int
    rows: int  # of an expert on average; decode: tokens that choose 8 of the experts each
    what: str = "fwd"  # | "dgrad" | "wgrad" | "wgrad acc" (added to fp32)
    skew: str = "balanced"  # | "hot" (half of all rows to one expert) | "decode"
    dtype: str = "bfloat16"

    @property
    def total(self) -> int:
        return self.rows * (8 if self.skew == "decode" else self.experts)

    @property
    def flops(self) -> int:
        k, n = GEMM_SHAPES[self.shape]
        return 2 * self.total * k * n

    @property
    def weight_bytes(self) -> int:
        k, n = GEMM_SHAPES[self.shape]
        return self.experts * k * n * (2 if self.dtype == "bfloat16" else 4)

    def __str__(self) -> str:
        rows = f"T {self.rows}" if self.skew == "decode" else f"x {self.rows}"
        kind = "" if self.skew == "balanced" else f" {self.skew}"
        dtype = "" if self.dtype == "bfloat16" else " fp32"
        return f"{self.shape} E {self.experts} {rows}{kind} {self.what}{dtype}"


def gemm_cases(quick: bool, device: str = "cpu") -> list[GemmCase]:
    """Slices of Kimi K2, Moonlight, and the preset `mini`, from decoding to training; without cases
    above 500 GFLOP or 3 GB of weights, which take tens of seconds."""
    passes = ("fwd", "dgrad", "wgrad", "wgrad acc")
    if device == "cuda":
        return _gemm_cases_cuda(quick)
    if quick:
        cases = [GemmCase("Moonlight", 64, 64, what) for what in passes]
        cases += [GemmCase("mini gate+up", 32, 512, p, "hot", "float32") for p in passes[:3]]
        return [*cases, GemmCase("K2 down", 24, 4, "fwd", "decode"), GemmCase("K2 down", 8, 21)]
    models = [(name, e) for name in ("K2 gate+up", "K2 down") for e in (8, 24)]
    models += [("Moonlight", 64), ("mini gate+up", 32), ("mini down", 32)]
    cases = []
    for name, experts in models:
        dtypes = ["float32"] if name.startswith("mini") else ["bfloat16"]
        for dtype in dtypes:
            for rows in (1, 4, 21, 64, 256, 1024):
                cases += [GemmCase(name, experts, rows, p, dtype=dtype) for p in passes]
            for rows in (21, 256):
                cases += [GemmCase(name, experts, rows, p, "hot", dtype) for p in passes]
    cases += [GemmCase("Moonlight", 64, r, p, dtype="float32") for r in (21, 256) for p in passes]
    for name, experts in (("K2 gate+up", 24), ("K2 down", 24), ("Moonlight", 64)):
        cases += [GemmCase(name, experts, tokens, "fwd", "decode") for tokens in (1, 4, 16)]
    return [c for c in cases if c.flops <= 500e9 and c.weight_bytes <= 3e9]


def _gemm_cases_cuda(quick: bool) -> list[GemmCase]:
    """Published shapes: 262 144 rows of GLM's 256 experts, DeepGEMM's 4 x 8192 rows of
    DeepSeek-V3's gate+up (which is K2's); K2's 384 experts in decoding, 48 (one of 8 ranks) else.
    """
    passes = ("fwd", "dgrad", "wgrad", "wgrad acc")
    if quick:
        cases = [GemmCase("K2 gate+up", 4, 8192, p) for p in passes]
        cases += [GemmCase("K2 gate+up", 48, r, p) for r in (1024, 256, 64) for p in passes]
        cases += [GemmCase("K2 gate+up", 48, rows) for rows in (128, 21, 4)]
        cases += [GemmCase("K2 down", 4, 8192)]
        cases += [GemmCase("K2 down", 48, rows) for rows in (1024, 256, 64, 21)]
        cases += [GemmCase("Moonlight", 64, rows) for rows in (1024, 256, 64)]
        cases += [GemmCase("K2 down", 384, t, "fwd", "decode") for t in (4, 64)]
        return [*cases, GemmCase("GLM up", 256, 1024)]
    cases = [GemmCase("GLM up", 256, 1024, p) for p in passes[:3]]
    cases += [GemmCase("K2 gate+up", 4, 8192, p) for p in passes]
    for name, experts in (("K2 gate+up", 48), ("K2 down", 48), ("Moonlight", 64)):
        for rows in (4, 21, 64, 256, 1024):
            cases += [GemmCase(name, experts, rows, p) for p in passes]
        cases += [GemmCase(name, experts, 256, p, "hot") for p in passes]
    cases += [GemmCase("Moonlight", 64, 256, p, dtype="float32") for p in passes]
    for name in ("K2 gate+up", "K2 down"):
        cases += [GemmCase(name, 384, t, "fwd", "decode") for t in (1, 4, 16, 64, 256)]
    return cases


def fp8_cases(quick: bool) -> list[GemmCase]:
    """Forward products of a GPU: DeepGEMM's published shape, one of 8 ranks of K2, decoding."""
    if quick:
        cases = [GemmCase("K2 gate+up", 4, 8192)]
        cases += [GemmCase("K2 gate+up", 48, rows) for rows in (1024, 128)]
        return [*cases, GemmCase("K2 down", 384, 64, "fwd", "decode")]
    cases = [GemmCase("K2 gate+up", 4, 8192), GemmCase("K2 down", 4, 8192)]
    for name in ("K2 gate+up", "K2 down"):
        cases += [GemmCase(name, 48, rows) for rows in (21, 64, 128, 256, 1024)]
        cases += [GemmCase(name, 384, t, "fwd", "decode") for t in (1, 16, 64, 256)]
    return cases


def quantized_cases(quick: bool) -> list[GemmCase]:
    """Few rows an expert: the bytes of the weights are the time."""
    if quick:
        return [GemmCase("Moonlight", 64, 1, "fwd", "decode")]
    shapes = [("K2 gate+up", 24), ("K2 down", 24), ("Moonlight", 64)]
    cases = [GemmCase(name, e, t, "fwd", "decode") for name, e in shapes for t in (1, 4, 16)]
    return cases + [GemmCase("K2 gate+up", 8, rows) for rows in (4, 21, 64)]


@dataclass(frozen=True)
class ExpertsCase:
    model: str
    experts: int
    hidden: int
    width: int
    tokens: int
    backward: bool = False
    k: int = 8

    @property
    def flops(self) -> int:
        passes = 3 if self.backward else 1
        return passes * 6 * self.tokens * self.k * self.hidden * self.width

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices in bfloat16."""
        return 2 * 3 * self.hidden * self.width

    def __str__(self) -> str:
        return f"{self.model} T {self.tokens} {'fwd+bwd' if self.backward else 'fwd'}"


def experts_cases(quick: bool, device: str = "cpu") -> list[ExpertsCase]:
    """64 small experts, and 16 experts of Kimi K2; on a GPU 48 of them and more tokens."""
    models = [("E 64, H 2048, F 768", 64, 2048, 768)]
    if device == "cuda" or not quick:
        experts = 48 if device == "cuda" else 16
        models.append((f"K2 E {experts}, H 7168, F 2048", experts, 7168, 2048))
    tokens = (16, 256) if quick else (16, 256, 2048)
    if device == "cuda":
        tokens = (16, 256, 4096) if quick else (16, 256, 4096, 16384)
    return [
        ExpertsCase(*m, t, backward) for m in models for t in tokens for backward in (False, True)
    ]


def decode_cases(quick: bool, device: str = "cpu") -> list[ExpertsCase]:
    """Few tokens: on a GPU through all experts of a layer of Kimi K2 (34 GB), else small ones."""
    if device == "cuda":
        model, tokens = ("K2 E 384 decode", 384, 7168, 2048), (1, 16, 64)
    else:
        model, tokens = ("E 64, H 2048, F 768 decode", 64, 2048, 768), (1, 16)
    return [ExpertsCase(*model, t) for t in tokens[: 1 if quick and device == "cpu" else None]]


@dataclass(frozen=True)
class StepCase:
    preset: str
    sequences: int
    window: int
    optimizer: bool = True
    recompute: str = "none"
    weights: str = "float32"
    hidden: int = 0  # not the preset's: Moonlight's heads and ratios, 16 experts, 4 layers
    apart: bool = False  # one after the other: both do not fit into a GPU's memory

    def __str__(self) -> str:
        what = "step" if self.optimizer else "fwd+bwd"
        size = f" H {self.hidden}" if self.hidden else ""
        again = f", {self.recompute} again" if self.recompute != "none" else ""
        return f"{self.preset}{size} B {self.sequences}, S {self.window} {what}{again}"

    def fields(self) -> dict[str, int]:
        """In which the model differs from the preset."""
        if not self.hidden:
            return {}
        of_hidden = {"intermediate_size": 4, "moe_intermediate_size": 2 / 3}
        widths = {name: round(self.hidden * ratio) for name, ratio in of_hidden.items()}
        heads = self.hidden // 128
        return widths | {
            "hidden_size": self.hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
            "n_routed_experts": 16, "num_hidden_layers": 4,
        }  # fmt: skip


def step_cases(quick: bool, device: str = "cpu") -> list[StepCase]:
    """The default of `kimi-ops train`, with and without the optimizer, and from less memory.

    CPU: the widest model of which 2 cores make a step of either side in 10 s, the most that a peer
    may take. CUDA: Moonlight's slice, which fills 80 GB.
    """
    cases = [StepCase("mini", 16, 256, False), StepCase("mini", 16, 256)]
    if quick:
        return cases
    cases += [StepCase("mini", 16, 256, True, way) for way in ("selective", "full")]
    if device == "cpu":
        return [*cases, StepCase("moonlight", 2, 512, hidden=768)]
    slice_ = StepCase("moonlight_slice", 2, 4096, True, "selective", "bfloat16", apart=True)
    return [*cases, slice_]


@dataclass(frozen=True)
class GenerateCase:
    """A prompt of so many tokens, or one token of each sequence behind as many in a cache."""

    sequences: int
    prompt: int = 0
    behind: int = 0
    experts: int = 48
    preset: str = "k2"

    def __str__(self) -> str:
        what = f"prefill {self.prompt}" if self.prompt else f"decode behind {self.behind}"
        return f"{self.preset} E {self.experts} B {self.sequences}, {what}"


def generate_cases(quick: bool) -> list[GenerateCase]:
    """Widths of K2, 5.6 GB of weights; quick: the smallest model, which times calls."""
    if quick:
        return [GenerateCase(1, 32, 0, 8, "tiny"), GenerateCase(1, 0, 64, 8, "tiny")]
    prefills = [GenerateCase(1, length) for length in (128, 1024)]
    return prefills + [GenerateCase(batch, 0, 1024) for batch in (1, 8)]


@dataclass(frozen=True)
class MatrixCase:
    rows: int
    cols: int
    count: int = 1
    method: str = "symmetric"  # | "gram" | "standard"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        times = f" x {self.count}" if self.count > 1 else ""
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"{self.rows} x {self.cols}{times}, {self.method}{kind}"


def matrix_cases(quick: bool, device: str = "cpu") -> list[MatrixCase]:
    """Kimi K2's experts, attention projections, and single heads of them."""
    if device == "cuda":
        shapes = [(2048, 7168, 48), (576, 7168, 1), (128, 512, 128), (192, 1536, 64)]
        if not quick:
            shapes += [(2048, 7168, 1), (1536, 7168, 1), (128, 512, 1), (64, 512, 1024)]
        ways = [("gram", "float16"), ("standard", "bfloat16")]
        return [MatrixCase(*shape, *way) for shape in shapes for way in ways]
    if quick:
        return [
            MatrixCase(576, 1536), MatrixCase(192, 1536, 8), MatrixCase(576, 1536, 1, "gram")
        ]  # fmt: skip
    shapes = [
        (2048, 7168, 1), (2048, 7168, 8), (1536, 7168, 1), (12288, 1536, 1), (16384, 512, 1),
        (576, 7168, 1), (192, 1536, 64), (128, 512, 64),
    ]  # fmt: skip
    cases = [MatrixCase(*shape) for shape in shapes]
    return [*cases, MatrixCase(2048, 7168, 1, "standard"), MatrixCase(2048, 7168, 1, "gram")]


@dataclass(frozen=True)
class LogitsCase:
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"B {self.batch}, heads {heads}, S {self.queries}, D {self.dim}{kind}"


def logits_cases(quick: bool) -> list[LogitsCase]:
    """MLA (192 = 128 + 64 a head), grouped queries, and the `mini` model."""
    if quick:
        return [LogitsCase(1, 4, 4, 512, 512, 192), LogitsCase(1, 8, 2, 512, 512, 128)]
    return [
        LogitsCase(1, 64, 64, 1024, 1024, 192),
        LogitsCase(1, 16, 16, 4096, 4096, 192),
        LogitsCase(1, 32, 8, 4096, 4096, 128),
        LogitsCase(1, 16, 16, 2048, 2048, 192, "float32"),
        LogitsCase(16, 4, 4, 256, 256, 96),
    ]
