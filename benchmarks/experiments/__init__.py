# SPDX-License-Identifier: MIT
"""What the pages say beyond times, as programs: `python -m benchmarks.experiments.needle`."""
