# SPDX-License-Identifier: MIT
"""The polynomials of Newton-Schulz: named schedules, restarts of the Gram form, costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import get_args

from kimi_ops import _arguments as _check
from kimi_ops.choices import Method, Schedule

Triple = tuple[float, float, float]
Coefficients = Schedule | Sequence[float] | Sequence[Sequence[float]]

METHODS = get_args(Method)
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's triple, the one of torch.optim.Muon


def _guarded(rows: tuple[Triple, ...], safety: float = 1.01) -> tuple[Triple, ...]:
    """Every row but the last applied to x / safety.

    Schedules tuned for singular values up to exactly 1 are steep there (|p'| = 26): one bf16
    rounding above 1, as a matrix of rank one meets it, and the iteration diverges.
    """
    scaled = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1])
    return scaled + rows[-1:]


# Polar Express (arXiv 2505.16932), minimax polynomials for singular values in [1e-3, 1].
_POLAR_EXPRESS = (
    (8.28721, -23.59589, 17.30039),
    (4.10706, -2.94785, 0.54484),
    (3.94869, -2.90890, 0.55182),
    (3.31842, -2.48849, 0.51005),
    (2.30065, -1.66890, 0.41881),
    (1.89130, -1.26800, 0.37680),
    (1.87500, -1.25000, 0.37500),
    (1.87500, -1.25000, 0.37500),
)

# CANS (arXiv 2506.10935), five Chebyshev-optimal polynomials. They leave [0.866, 1.114]; then comes
# the minimax quintic of [0.86, 1.12], which leaves 1 by 0.0014, then Newton-Schulz proper.
_CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# J. You (2025): five triples tuned together, which leave [0.977, 1.146] of [3e-3, 1].
_YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_SETTLE = (1.875, -1.25, 0.375)  # Newton-Schulz proper: values near 1 go to 1

# Schedules whose last row may be repeated: any number of steps makes sense.
OPEN_SCHEDULES: dict[str, tuple[Triple, ...]] = {
    "quintic": (_QUINTIC,),
    "polar_express": _guarded(_POLAR_EXPRESS),
    "cans": (*_guarded(_CANS), (1.91257, -1.30923, 0.39647), _SETTLE),
}
# Schedules tuned as a whole: they mean something only with all their rows.
FIXED_SCHEDULES: dict[str, tuple[Triple, ...]] = {
    "you": _YOU,
    "deepseek_v4": (_QUINTIC,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    "cubic": (
        (3.36566, -3.34210, 0.0),
        (2.57445, -1.49574, 0.0),
        (2.53690, -1.43126, 0.0),
        (2.44189, -1.27640, 0.0),
        (2.22305, -0.96307, 0.0),
    ),
}
SCHEDULES: dict[str, tuple[Triple, ...]] = {**OPEN_SCHEDULES, **FIXED_SCHEDULES}
# Turbo-Muon (arXiv 2512.04632): AOL's scaling takes the place of the first rows of `you`.
AOL = "aol"
NAMES = list(get_args(Schedule))

# Names that others give to what is here, and what they mean.
_ELSEWHERE = {
    "simple": "Emerging-Optimizers' name of the triple that is 'quintic' here",
    "standard": "optax's name of the triple that is 'quintic' here",
    "dion": "optax's name of the five triples that are 'you' here",
    "cubic5": "'cubic' here",
    "custom": "a list of triples here",
    "deepseekv4": "'deepseek_v4' here",
}


def schedule(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The `steps` triples (a, b, c) that `coefficients` stands for.

    Parameters
    ----------
    coefficients : str, triple, or sequence of triples
        ``"quintic"`` (Keller Jordan's triple; Emerging-Optimizers calls it ``simple`` and what is
        ``"you"`` here ``quintic``), ``"polar_express"`` and ``"cans"`` take any number of steps
        (their last row repeats); ``"you"``, ``"cubic"`` (5 rows) and ``"deepseek_v4"`` (10 rows)
        only their own; ``"aol"`` has the last rows of ``"you"``, with more than five steps all of
        them and then (1.875, -1.25, 0.375), and :func:`kimi_ops.newton_schulz` scales rows before
        them; one triple repeats; a list has one per step.
    steps : int
        Number of iterations, 1 to 99.

    Raises
    ------
    ValueError
        Unknown name, wrong number of steps, or something that is not made of triples.

    Examples
    --------
    >>> schedule("quintic", 2)
    ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"newton_schulz: steps: expected an int, got {type(steps).__name__}; convert it"
        )
    if not 1 <= steps < 100:
        raise ValueError(f"newton_schulz: steps: expected 1 to 99, got {steps}; 5 is usual")
    if isinstance(coefficients, str):
        if coefficients == AOL:
            return (_YOU[-steps:] + (_SETTLE,) * steps)[:steps]
        if coefficients not in SCHEDULES:
            raise ValueError(
                f"newton_schulz: coefficients: expected one of {NAMES}, a triple or "
                f"a list of triples, got {coefficients!r}; "
                + _ELSEWHERE.get(coefficients, "choose one")
            )
        rows = SCHEDULES[coefficients]
        if coefficients in FIXED_SCHEDULES and len(rows) != steps:
            raise ValueError(
                f"newton_schulz: steps: the schedule {coefficients!r} has {len(rows)} steps, "
                f"got {steps}; pass steps={len(rows)}"
            )
        return (rows + rows[-1:] * steps)[:steps]
    listed = list(coefficients) if isinstance(coefficients, Sequence) else [None]
    if len(listed) == 3 and all(isinstance(value, (int, float)) for value in listed):
        listed = [listed] * steps
    triples = []
    for row in listed:
        values = tuple(float(v) for v in row) if isinstance(row, Sequence) else ()
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(
                f"newton_schulz: coefficients: expected a triple or a list of triples of finite "
                f"numbers, got {coefficients!r}; give (a, b, c) for each step"
            )
        triples.append((values[0], values[1], values[2]))
    if len(triples) != steps:
        raise ValueError(
            f"newton_schulz: steps: {len(triples)} triples were given, got steps={steps}; pass "
            f"steps={len(triples)}"
        )
    return tuple(triples)


def has_aol(coefficients: Coefficients) -> bool:
    """Whether the rows of a matrix are scaled before the steps."""
    return isinstance(coefficients, str) and coefficients == AOL


def tune_ns_restarts(
    coefficients: Sequence[Sequence[float]], num_restarts: int = 1, perturbation: float = -4e-4
) -> tuple[int, ...]:
    r"""The steps before which the Gram form should restart.

    Rounding shifts the eigenvalues :math:`x^2` of the Gram matrix by about `perturbation`. A
    negative one grows by at least :math:`a^2` a step instead of turning at 1, so the accumulated
    polynomial Q becomes ill-conditioned. Chosen are the steps that keep the largest condition
    number of Q, over singular values x in [0, 1] and over the windows between restarts, smallest.

    Parameters
    ----------
    coefficients : sequence of (a, b, c)
        One triple a step.
    num_restarts : int
        How many, less than the number of steps.
    perturbation : float
        Shift of the eigenvalues of a Gram matrix with largest eigenvalue 1.

    Returns
    -------
    tuple of int
        Ascending; r means that r steps are done when X is multiplied out and the Gram matrix formed
        anew. The earliest of equally good ones.

    Raises
    ------
    ValueError
        No triples, or too many restarts.

    Examples
    --------
    >>> tune_ns_restarts(schedule("quintic", 5)), tune_ns_restarts(schedule("you", 5))
    ((3,), (2,))

    Notes
    -----
    The criterion is that of the Gram-Newton-Schulz package of Dao-AILab (2026).
    """
    rows = schedule(coefficients, len(list(coefficients)))
    if not 0 <= _check.integer("tune_ns_restarts", "num_restarts", num_restarts) < len(rows):
        raise ValueError(
            f"tune_ns_restarts: num_restarts: expected 0 to {len(rows) - 1} for {len(rows)} steps, "
            f"got {num_restarts}; lower it"
        )
    shift = float(_check.number("tune_ns_restarts", "perturbation", perturbation))
    return _tuned(rows, num_restarts, shift)[0]


# Measured: the fewest restarts that keep fp16 within 0.05 of the exact image for singular values
# 1 / i and 1 .. 1e-4. The tuned ones agree for the quintic and you; of the others the first
# polynomials almost vanish at 1, which raises the condition without harm.
_MEASURED: dict[tuple[Schedule, int], tuple[int, ...]] = {
    ("quintic", 5): (3,),
    ("polar_express", 5): (2,),
    ("you", 5): (2,),
    ("cans", 5): (2,),
    ("cubic", 5): (2,),
    ("deepseek_v4", 10): (2, 4, 6),
}


def checked_restarts(
    rows: tuple[Triple, ...], method: str, restarts: str | Sequence[int]
) -> tuple[int, ...]:
    """The steps that the option `restarts` stands for; raises for what no method has."""
    if restarts == "auto":
        return () if method in ("standard", "symmetric") else auto_restarts(rows)
    if isinstance(restarts, str) or not isinstance(restarts, Iterable):
        raise ValueError(
            f"newton_schulz: restarts: expected 'auto' or steps, got {restarts!r}; choose one"
        )
    listed = [_check.integer("newton_schulz", "restarts", step) for step in restarts]
    if listed and method != "gram":
        raise ValueError(
            f"newton_schulz: restarts: only method 'gram' has any, got {tuple(listed)} for "
            f"{method!r}; pass 'auto' or ()"
        )
    if listed != sorted(set(listed)) or not all(0 < step < len(rows) for step in listed):
        raise ValueError(
            f"newton_schulz: restarts: expected ascending steps from 1 to {len(rows) - 1}, got "
            f"{tuple(listed)}; tune_ns_restarts finds good ones"
        )
    return tuple(listed)


@lru_cache(maxsize=256)
def auto_restarts(rows: tuple[Triple, ...]) -> tuple[int, ...]:
    """The restarts of the Gram form: measured ones for the named schedules; for others the fewest
    whose condition is below 100, or within twice that of a restart at every step."""
    for (name, steps), restarts in _MEASURED.items():
        if rows == schedule(name, steps):
            return restarts
    everywhere = _condition(rows, tuple(range(1, len(rows))), -4e-4)
    for number in range(len(rows)):
        restarts, condition = _tuned(rows, number, -4e-4)
        if condition <= max(100.0, 2 * everywhere):
            return restarts
    return tuple(range(1, len(rows)))


_GRID = (0.0, *(10.0 ** (k / 100 - 4) for k in range(401)))


@lru_cache(maxsize=256)
def _tuned(
    rows: tuple[Triple, ...], number: int, perturbation: float
) -> tuple[tuple[int, ...], float]:
    """The best choice and its condition. Windows are independent of each other but for x, which
    every road maps alike (up to the shift), so candidates are few: all combinations up to 10
    steps, regular spacing beyond."""
    steps = range(1, len(rows))
    if math.comb(len(steps), number) <= 400:
        candidates = list(combinations(steps, number))
    else:
        size = len(rows) / (number + 1)
        candidates = [tuple(math.ceil(size * (i + 1)) for i in range(number))]
    scored = [(_condition(rows, choice, perturbation), choice) for choice in candidates]
    condition, choice = min(scored)
    return choice, condition


def _condition(rows: tuple[Triple, ...], restarts: tuple[int, ...], perturbation: float) -> float:
    """Largest condition number of Q over all steps and windows, on a grid of singular values."""
    x = list(_GRID)
    q = [1.0] * len(x)
    gram = [v * v + perturbation for v in x]
    worst = 1.0
    for step, (a, b, c) in enumerate(rows):
        if step in restarts:
            x = [u * v for u, v in zip(q, x, strict=True)]
            q = [1.0] * len(x)
            gram = [v * v + perturbation for v in x]
        weights = [a + b * r + c * r * r for r in gram]
        q = [u * w for u, w in zip(q, weights, strict=True)]
        gram = [r * w * w for r, w in zip(gram, weights, strict=True)]
        sizes = [abs(u) for u in q]
        low, high = min(sizes), max(sizes)
        if not high < 1e100 or low == 0:
            return math.inf
        worst = max(worst, high / low)
    return worst


def ns_flops(
    shape: Sequence[int], steps: int = 5, method: Method = "symmetric", *, restarts: int = 1
) -> int:
    r"""Floating-point operations of Newton-Schulz on matrices of `shape`, 2 for a multiply-add.

    With m <= n the two sides: standard :math:`K (4 m^2 n + 2 m^3)`, symmetric
    :math:`K (3 m^2 n + m^3)` (products with a symmetric result at half price), Gram with :math:`r`
    restarts :math:`3 (1 + r) m^2 n + (4 K - 3 (1 + r)) m^3`.

    Parameters
    ----------
    shape : sequence of int
        [..., m, n]; leading dimensions count matrices.
    steps : int
        K.
    method : str
        ``"standard"``, ``"symmetric"`` or ``"gram"``.
    restarts : int
        Of the Gram form.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        Fewer than two dimensions, an unknown method, steps < 1 or as many restarts as steps.

    Examples
    --------
    >>> [round(ns_flops((2048, 7168), 5, m) / 1e9, 1) for m in ("standard", "symmetric", "gram")]
    [687.2, 493.9, 300.6]
    """
    _check.choice("ns_flops", "method", method, METHODS)
    sizes = [_check.integer("ns_flops", "shape", size) for size in shape]
    if len(sizes) < 2 or min(sizes) < 0:
        raise ValueError(f"ns_flops: shape: expected [..., m, n], got {tuple(shape)}; give a shape")
    if _check.integer("ns_flops", "steps", steps) < 1:
        raise ValueError(f"ns_flops: steps: expected at least 1, got {steps}; 5 is usual")
    if not 0 <= _check.integer("ns_flops", "restarts", restarts) < max(steps, 2):
        raise ValueError(
            f"ns_flops: restarts: expected 0 to {steps - 1}, got {restarts}; restart less often"
        )
    m, n = sorted(sizes[-2:])
    count = math.prod(sizes[:-2])
    if method == "standard":
        return count * steps * (4 * m * m * n + 2 * m**3)
    if method == "symmetric":
        return count * steps * (3 * m * m * n + m**3)
    windows = 1 + min(restarts, steps - 1)
    return count * (3 * windows * m * m * n + (4 * steps - 3 * windows) * m**3)
