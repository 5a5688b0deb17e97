# SPDX-License-Identifier: MIT
"""What kimi_ops says of this machine, and whether it computes on the GPU."""

import argparse
import json
import sys
from pathlib import Path

from kimi_ops.facts import describe, info
from kimi_ops.gpu import gpu_fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    print(describe(), flush=True)
    options.json.write_text(json.dumps(info(), indent=1) + "\n")
    fault = gpu_fault()
    if fault is not None:
        print(f"start: expected kimi_ops to compute on a GPU: {fault}")
    return int(fault is not None)


if __name__ == "__main__":
    sys.exit(main())
