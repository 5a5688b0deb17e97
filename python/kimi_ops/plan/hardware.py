# SPDX-License-Identifier: MIT
"""Named machines: what they are sold as, what of it a good kernel gets, and where that is known.

Memory is the decimal figure of the data sheet; a driver reports 6 % more (an H100 85.5e9 bytes),
which is left to the CUDA context, libraries and fragmentation. Bandwidths are of one GPU and one
direction. Links are fitted to published dispatch and combine times (docs/plan.md), never measured
here; `gemm`, `gemm_fp8`, `stream` and `copy` were measured on an H100 (benchmarks/results) and are
assumed of the others.
"""

from dataclasses import dataclass, replace

__all__ = ["HARDWARE", "Hardware"]


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
