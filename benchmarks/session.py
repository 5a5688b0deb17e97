# SPDX-License-Identifier: MIT
"""One run of benchmarks: its options, roofs and tables, and the files that it writes."""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.checkout import commit
from benchmarks.measure import compute_peak, read_bandwidth
from benchmarks.options import parse, parser
from benchmarks.plot import plot
from benchmarks.report import Table
from kimi_ops.facts import describe, info

Case = TypeVar("Case")


class Session:
    def __init__(self, options: Any) -> None:
        self.options = options
        self.device: str = options.device
        self.quick: bool = options.quick
        self.compiled = not options.no_compile
        if options.threads:
            torch.set_num_threads(options.threads)
        self.tables: list[Table] = []
        self.skipped: list[str] = []  # cases that --cases does not name
        self._peaks: dict[torch.dtype, float] = {}
        print(f"{describe()}\ncommand   {command()}\n", flush=True)

    def table(self, op: str, **more: Any) -> Table:
        """See :class:`Table`; it is written with the others."""
        made = Table(op, self.device, self.quick, after=self.write_json, **more)
        self.tables.append(made)
        return made

    def select(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that the command line asks for."""
        chosen = [case for case in cases if self.options.cases in str(case)]
        self.skipped += [str(case) for case in cases if case not in chosen]
        return chosen

    @cached_property
    def bandwidth(self) -> float:
        rate = read_bandwidth(self.device)
        print(f"read bandwidth of this run: {rate / 1e9:.1f} GB/s")
        return rate

    def peak(self, dtype: torch.dtype) -> float:
        if dtype not in self._peaks:
            rate = self._peaks[dtype] = compute_peak(dtype, self.device)
            name = str(dtype).removeprefix("torch.")
            print(f"dense {name} product of this run: {rate / 1e12:.3f} TFLOP/s")
        return self._peaks[dtype]

    def finish(self) -> None:
        if not any(table.rows for table in self.tables):
            if not self.options.cases:
                raise SystemExit("nothing was measured")
            names = "\n  ".join(self.skipped)
            raise SystemExit(
                f"--cases: no case is named like {self.options.cases!r}; there are\n  {names}"
            )
        print()
        for table in self.tables:
            if table.rows:
                print(f"{table.op}")
                table.print_summary()
        self.write_json()
        if self.options.json:
            print(f"wrote {self.options.json}")
        if self.options.plot:
            plot(self.as_dict(), self.options.plot)
            print(f"wrote {self.options.plot}")

    def write_json(self) -> None:
        path: Path | None = self.options.json
        if path is not None:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            temporary.replace(path)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "command": command(),
            "commit": commit(),
            "machine": platform.machine(),
            "device": self.device,
            "info": info(),
        }

    def as_dict(self) -> dict[str, Any]:
        roofs = {str(dtype).removeprefix("torch."): peak for dtype, peak in self._peaks.items()}
        roofs |= {"bandwidth": self.__dict__["bandwidth"]} if "bandwidth" in self.__dict__ else {}
        engines, tables = self.facts["info"]["engines"], []
        for table in self.tables:
            engine = engines.get(table.op.split(" ")[0], {}).get(self.device)
            if table.rows:
                tables.append({"engine": engine} | table.as_dict())
        return self.facts | {"roofs": roofs, "tables": tables}


def command() -> str:
    """The command line of this process."""
    spec = sys.modules["__main__"].__spec__
    name = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join([*name, *sys.argv[1:]])


def main(compare: Callable[[Session], None], arguments: list[str] | None = None) -> Session:
    """The program of one benchmark: `compare` fills its tables."""
    module = sys.modules[compare.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__
    session = Session(parse(parser(name, module.__doc__ or ""), arguments))
    compare(session)
    session.finish()
    return session
