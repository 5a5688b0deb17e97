# SPDX-License-Identifier: MIT
"""How near `newton_schulz` comes to the polar factor, with AOL's scaling and without, in fp64.

For matrices G with D the scaling of AOL, of each schedule the singular values' root mean square
distance from 1 and the relative distance of the image from the polar factors of G and of D G. The
last column says how far these two lie apart: what AOL changes however many steps follow.

    python -m benchmarks.experiments.newton_schulz_errors [--rows 256] [--seed 0]
"""

import argparse

import torch
from torch import Tensor

from kimi_ops import newton_schulz
from kimi_ops.optim.ns_schedule import Coefficients, schedule

WAYS: dict[str, tuple[Coefficients, int]] = {
    "you 5": ("you", 5),
    "its last 4": (schedule("aol", 4), 4),
    "aol 4": ("aol", 4),
    "aol 5": ("aol", 5),
}


def matrices(m: int, generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(m, m)).Q, torch.linalg.qr(normal(2 * m, m)).Q
    return {
        "Gaussian": normal(m, 2 * m),
        "Gaussian, square": normal(m, m),
        "heavy tails (normal^3)": normal(m, 2 * m) ** 3,
        "rank 8 and 1 % noise": normal(m, 8) @ normal(8, 2 * m) + 0.01 * normal(m, 2 * m),
        "rank 1": normal(m, 1) @ normal(1, 2 * m),
        "singular values 1 .. 1e-3": left * torch.logspace(0, -3, m).double() @ right.mT,
        "rows 1 .. 1e-2": torch.logspace(0, -2, m).double()[:, None] * normal(m, 2 * m),
    }


def polar(g: Tensor) -> Tensor:
    """Of the directions that G has."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    return u[:, :rank] @ v[:rank]


def scaled(g: Tensor) -> Tensor:
    return g / (g @ g.mT).abs().sum(dim=1, keepdim=True).sqrt()


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    print(f"{'matrix':<28}" + "".join(f"{name:>22}" for name in WAYS) + f"{'G to D G':>10}")
    for name, g in matrices(options.rows, generator).items():
        exact, other = polar(g), polar(scaled(g))
        line = f"{name:<28}"
        for coefficients, steps in WAYS.values():
            x = newton_schulz(g, coefficients=coefficients, steps=steps, dtype=torch.float64)
            values = torch.linalg.svdvals(x)[: torch.linalg.matrix_rank(exact)]
            off = float((values - 1).square().mean().sqrt())
            line += f"{off:>8.3f}{distance(x, exact):>7.3f}{distance(x, other):>7.3f}"
        print(line + f"{distance(other, exact):>10.3f}")


if __name__ == "__main__":
    main()
