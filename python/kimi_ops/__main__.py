# SPDX-License-Identifier: MIT
"""``python -m kimi_ops``: the same as the installed command ``kimi-ops``."""

from kimi_ops.cli import main

if __name__ == "__main__":
    main()
