# SPDX-License-Identifier: MIT
"""Training the reference model on text, byte by byte."""

from kimi_ops.train.checkpoint import CheckpointError
from kimi_ops.train.data import DataError
from kimi_ops.train.loop import TrainResult, train
from kimi_ops.train.ranks import PeerError, RankError, Ranks, join_ranks
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Diverged

__all__ = [
    "CheckpointError",
    "DataError",
    "Diverged",
    "PeerError",
    "RankError",
    "Ranks",
    "TrainResult",
    "TrainSettings",
    "join_ranks",
    "train",
]
