# SPDX-License-Identifier: MIT
"""Named machines: what they are sold as, what of it a good kernel gets, and where that is known.

Memory is the decimal figure of the data sheet; a driver reports 6 % more (an H100 85.5e9 bytes),
which is left to the CUDA context, libraries and fragmentation. Bandwidths are of one GPU and one
direction. Links are fitted to published dispatch and combine times (docs/plan.md), never measured
here; `gemm`, `gemm_fp8`, `stream` and `copy` were measured on an H100 (benchmarks/results) and are
assumed of the others.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from kimi_ops import _check

__all__ = ["HARDWARE", "Hardware"]

_KINDS = {"name": str, "gpu": str, "source": str, "measured": bool}
_SHARES = ("gemm", "gemm_fp8", "attention", "stream", "copy")
_OF_THE_CHIP = ("memory", "hbm", "bf16", "fp8", *_SHARES)
_LINKS = ("domain", "nvlink", "network", "nvlink_latency", "network_latency")


@dataclass(frozen=True)
class Hardware:
    """A GPU and its surroundings; bytes, bytes/s, FLOP/s (dense), seconds."""

    name: str
    gpu: str
    domain: int  # GPUs that reach each other over NVLink
    memory: float
    hbm: float
    bf16: float
    fp8: float
    nvlink: float  # of bytes that leave a GPU, in a good all-to-all kernel
    network: float  # the same through its NIC
    host_memory: float  # of the host, a GPU's share
    source: str  # of the fitted links
    measured: bool = False  # whether grouped products were timed on it
    gemm: float = 0.70  # share of bf16 that large grouped products reach: 695 of 989 TFLOP/s
    gemm_fp8: float = 0.54  # 1.07 of 1.979 PFLOP/s
    attention: float = 0.50  # share of bf16, an assumption
    stream: float = 0.73  # share of hbm: products of few rows, 2.43 of 3.35 TB/s
    copy: float = 0.80  # permute and unpermute, 2.6 and 2.8 TB/s
    host_link: float = 50e9  # PCIe 5, one direction
    nvlink_latency: float = 15e-6  # barriers of a call
    network_latency: float = 30e-6  # that of DeepEP's low-latency table, EP 16 to 256

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "domain":
                _check.between("Hardware", name, value, 1, 2**20)
            elif name in _KINDS:
                if not isinstance(value, _KINDS[name]):
                    raise TypeError(
                        f"Hardware: {name}: expected a {_KINDS[name].__name__}, got {value!r}; "
                        "quote text, and only text"
                    )
            elif not 0 < _check.number("Hardware", name, value) <= (1 if name in _SHARES else 1e30):
                most = "a share above 0, 1 at most" if name in _SHARES else "more than 0"
                raise ValueError(
                    f"Hardware: {name}: expected {most}, got {value}; bytes, FLOP and seconds"
                )

    @classmethod
    def from_file(cls, path: str | Path) -> "Hardware":
        """Read a JSON object: the fields of a machine, or those that differ from one of ``like``.

        ``{"like": "h200", "name": "ours", "network": 25e9}`` is an H200 with half the network.
        """
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(
                f"Hardware: {path}: expected JSON, got {error}; see docs/plan.md"
            ) from None
        known = {field.name for field in fields(cls)} - {"measured"}
        if not isinstance(values, dict) or (unknown := values.keys() - known - {"like"}):
            got = ", ".join(sorted(unknown)) if isinstance(values, dict) else "no object"
            raise ValueError(
                f"Hardware: {path}: expected an object of {', '.join(sorted(known))}, like; got "
                f"{got}; leave the rest out"
            )
        like = values.pop("like", None)
        if like is None:
            needed = [f.name for f in fields(cls) if f.name in known and f.default is MISSING]
            if missing := [name for name in needed if name not in values]:
                raise ValueError(
                    f'Hardware: {path}: expected all fields or "like", got none of '
                    f'{", ".join(missing)}; add them, or "like": "h200"'
                )
            return cls(**values)
        _check.choice("Hardware", "like", like, tuple(HARDWARE))
        found = replace(HARDWARE[like], **{"name": Path(path).stem, **values})
        changed = {
            name for name, value in asdict(found).items() if value != getattr(HARDWARE[like], name)
        }
        if changed.intersection(_LINKS) and "source" not in values:
            found = replace(found, source=f"{path}, which says so")
        return replace(found, measured=found.measured and not changed.intersection(_OF_THE_CHIP))

    def collective(self, size: float, ranks: int, stride: int) -> float:
        """Seconds to reduce `size` bytes to their owners, or to bring them back, in a ring.

        The `ranks` are `stride` apart: those of a node hand on to each other over NVLink, and all
        of their NICs share what leaves it.
        """
        near = max(1, self.domain // stride)
        link = self.nvlink if ranks <= near else min(self.nvlink, near * self.network)
        return size * (1 - 1 / ranks) / link

    def seconds(self, flops: float, bytes_: float, *, fp8: bool = False) -> tuple[float, str]:
        """The longer of a product's arithmetic and traffic, and which one it is."""
        rate = self.fp8 * self.gemm_fp8 if fp8 else self.bf16 * self.gemm
        tensor, memory = flops / rate, bytes_ / (self.hbm * self.stream)
        return max((tensor, "tensor"), (memory, "memory"))


# network: 0.9 of 400 Gb/s, which is DeepEP V2's 90 and 61 GB/s logical on 2 and 4 nodes
_H200 = Hardware(
    name="h200",
    gpu="H200 SXM 141GB, nodes of 8, 400 Gb/s a GPU",
    domain=8,
    memory=141e9,
    hbm=4.8e12,
    bf16=989e12,
    fp8=1979e12,
    nvlink=280e9,
    network=45e9,
    host_memory=250e9,
    source="UCCL-EP on H200, EP 8: 320 GB/s logical, 7/8 of it off the GPU",
)
_H100 = replace(
    _H200,
    name="h100",
    gpu="H100 SXM 80GB, nodes of 8, 400 Gb/s a GPU",
    memory=80e9,
    hbm=3.35e12,
    measured=True,
)
_H800 = replace(
    _H100,
    name="h800",
    gpu="H800 80GB, nodes of 8, 400 Gb/s a GPU",
    nvlink=134e9,
    measured=False,
    source="DeepEP V1, EP 8: 153 GB/s logical, 7/8 of it off the GPU",
)
_B200 = replace(
    _H200,
    name="b200",
    gpu="B200 SXM 180GB, nodes of 8, 400 Gb/s a GPU",
    memory=180e9,
    hbm=8.0e12,
    bf16=2250e12,
    fp8=4500e12,
    nvlink=635e9,
    source="DeepEP V2 on SM100, EP 8: 726 GB/s logical, 7/8 of it off the GPU",
)
_NVL72 = replace(
    _B200,
    name="nvl72",
    gpu="GB200 NVL72 186GB, 72 GPUs on NVLink, 400 Gb/s a GPU",
    domain=72,
    memory=186e9,
    bf16=2500e12,
    fp8=5000e12,
    nvlink=597e9,
    host_memory=240e9,
    source="HybridEP on GB200, EP 36: 632 and 597 GB/s logical, 35/36 of it off the GPU",
)
HARDWARE = {machine.name: machine for machine in (_H800, _H100, _H200, _B200, _NVL72)}
