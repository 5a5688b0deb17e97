# SPDX-License-Identifier: MIT
"""The ops on arrays, once for NumPy and JAX, without torch: arguments, options and results, and the
forms that are composed of kernels. `door.Door` is what a framework brings."""
