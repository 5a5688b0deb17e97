# SPDX-License-Identifier: MIT
"""Pure-torch twins of every op: written for reading, the oracle of the tests and the slow engine.

Each module has the name of its op (``reference.topk_gate.topk_gate`` is the twin of
``kimi_ops.topk_gate``) and the same arguments. Arguments are not checked here. float64 input is
computed in float64, so that ``torch.autograd.gradcheck`` holds.
"""
