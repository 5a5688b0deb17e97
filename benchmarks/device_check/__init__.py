# SPDX-License-Identifier: MIT
"""What a machine with a GPU is asked, in one call of less than ten minutes.

``prepare`` builds on a machine with nvcc what the other one needs, ``run`` checks and measures
there: the op tests, each primitive of csrc/device, benchmarks, host cost, a training step, tile
shapes, ncu profiles and memcheck.
"""
