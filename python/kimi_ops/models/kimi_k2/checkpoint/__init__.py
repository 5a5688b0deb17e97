# SPDX-License-Identifier: MIT
"""The files of a Hugging Face checkpoint, read and written; which model they are of it does not
know: a `Part` says what is in memory."""

from kimi_ops.models.kimi_k2.checkpoint.layout import Part
from kimi_ops.models.kimi_k2.checkpoint.reading import load
from kimi_ops.models.kimi_k2.checkpoint.saving import save, to_first

__all__ = ["Part", "load", "save", "to_first"]
