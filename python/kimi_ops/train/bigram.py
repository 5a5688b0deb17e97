# SPDX-License-Identifier: MIT
"""The byte bigram model that a training run has to beat."""

from __future__ import annotations

import numpy as np
from torch import Tensor

_CHUNK = 1 << 20  # transitions counted at once: a pair takes 8 bytes while it is counted
_SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01)


def bigram_counts(data: np.ndarray) -> np.ndarray:
    """How often byte b follows byte a, [256, 256] int64."""
    counts = np.zeros(256 * 256, dtype=np.int64)
    for start in range(0, len(data) - 1, _CHUNK):
        piece = data[start : start + _CHUNK + 1]  # the last byte of one is the first of the next
        pairs = piece[:-1].astype(np.int64) * 256 + piece[1:]
        counts += np.bincount(pairs, minlength=256 * 256)
    return counts.reshape(256, 256)


def bigram_loss(train: np.ndarray, sequences: Tensor) -> float:
    """Nats a byte of p(b | a) = (n_ab + s) / (n_a + 256 s) on the transitions of `sequences`.

    The baseline is as strong as its kind can be: of a few constants s the one that is best on these
    very sequences is taken.

    Parameters
    ----------
    train : ndarray uint8
        Text that is counted.
    sequences : Tensor [n, window + 1] int64
        Validation windows, the ones the model is judged on.

    Returns
    -------
    float
        Mean negative log-likelihood in nats; divide by ln 2 for bits.
    """
    counts = bigram_counts(train)
    pairs = sequences.numpy()
    first, second = pairs[:, :-1].ravel(), pairs[:, 1:].ravel()
    losses = []
    for smoothing in _SMOOTHING:
        smoothed = counts + smoothing
        table = np.log(smoothed) - np.log(smoothed.sum(axis=1, keepdims=True))
        losses.append(float(-table[first, second].mean()))
    return min(losses)
