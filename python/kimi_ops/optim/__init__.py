# SPDX-License-Identifier: MIT
"""Newton-Schulz, QK-Clip and MuonClip: the public names are in `kimi_ops`."""
