# SPDX-License-Identifier: MIT
"""The command line that all benchmarks share; what cannot be served is a sentence at once."""

import argparse
import ast
from pathlib import Path
from typing import NoReturn

import torch

from kimi_ops import _native

# every benchmark and the first line of what it says of itself
BENCHMARKS = {
    path.stem.removeprefix("bench_"): (
        (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].rstrip(";")
    )
    for path in sorted(Path(__file__).parent.glob("bench_*.py"))
}

REPORT = "benchmarks report"  # the command that compares with other libraries


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage."""
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}\n")


def numbers(text: str) -> list[int]:
    """The type of an option that takes several, as 2,4."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("expected numbers above 0, as 2,4")
    return found


def parser(module: str, description: str) -> Parser:
    """Of one benchmark's module, or of the package for all."""
    made = Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if module == "benchmarks":
        wide = max(map(len, BENCHMARKS))
        lines = [f"  {name:<{wide}}  {line}" for name, line in BENCHMARKS.items()]
        made.epilog = "names:\n" + "\n".join(lines)
        words = "run these benchmarks only (default: all, in the order of the names below)"
        made.add_argument("--only", nargs="*", metavar="NAME", help=words)
    add = made.add_argument
    if module == REPORT:
        add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
        words = "all cases, samples of 1.5 s (default: few cases, short samples)"
        add("--full", action="store_false", dest="quick", help=words)
    else:
        words = "few cases, short samples (default: all, 1.5 s each)"
        add("--quick", action="store_true", help=words)
    only = "call_overhead and threads know cpu only"
    words = f"where the tensors lie (default: cpu); {only}"
    add("--device", default="cpu", choices=["cpu", "cuda"], help=words)
    words = "measure only cases whose names contain TEXT (default: all)"
    add("--cases", metavar="TEXT", default="", help=words)
    words = "leave out torch.compile and Triton, which compile at first (default: measured)"
    add("--no-compile", action="store_true", help=words)
    words = "threads of torch and of the ops (default: as many as torch takes)"
    add("--threads", type=int, metavar="N", help=words)
    words = "write every row and the machine to FILE, again after each row (default: not written)"
    add("--json", type=Path, metavar="FILE", help=words)
    words = "draw all ratios into FILE, an svg (default: not drawn)"
    add("--plot", type=Path, metavar="FILE", help=words)
    return made


def parse(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if getattr(options, "only", None) is not None:
        unknown = [name for name in options.only if name not in BENCHMARKS]
        if unknown or not options.only:
            got = ", ".join(unknown) or "nothing"
            parser.error(f"--only: expected one or more of {', '.join(BENCHMARKS)}, got {got}")
    if options.device == "cuda" and (reason := cuda_missing()):
        parser.error(f"--device: cuda: {reason}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    for flag in ("json", "plot", "out"):
        path: Path | None = getattr(options, flag, None)
        if path is None:
            continue
        if path.is_dir():
            parser.error(f"--{flag}: expected a file, got the folder {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--{flag}: the folder of {path} cannot be made: {error.strerror}")
    if options.plot and options.plot.suffix != ".svg":
        parser.error(f"--plot: expected a file.svg, got {options.plot}")
    return options


def cuda_missing() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is a CPU build: install one for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU: nvidia-smi shows whether the driver does"
    if not _native._C.cuda_architectures():
        return "kimi_ops was built without CUDA kernels: build it where nvcc is on the PATH"
    return None
