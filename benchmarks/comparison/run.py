# SPDX-License-Identifier: MIT
"""This library beside torch and every other library that is installed here, on one page.

Each way's result is compared with ours first; then all take turns, so that the machine's drift
meets each. A library that is absent, fails, gives another result or takes more than ten seconds a
call is named with the reason.
"""

import importlib.util
import os

import torch
from torch import Tensor

from benchmarks.comparison.libraries import LIBRARIES
from benchmarks.comparison.page import page
from benchmarks.comparison.work import Way, Ways, Work, all_work
from benchmarks.options import parse, parser
from benchmarks.report import OURS
from benchmarks.session import Session


def compiled(ways: Ways) -> Ways:
    """torch's own ways through torch.compile."""
    names = [name for name in ways if name.startswith("torch") and name != "torch.optim.Muon"]
    return {
        f"{name} compiled": Way(torch.compile(ways[name].call, dynamic=False), ways[name].result)
        for name in names[:1]
    }


def gathered(work: Work, session: Session) -> tuple[Ways, dict[str, str]]:
    """All ways of a work, and the libraries that failed to give theirs."""
    ways, failed = work.ways(), {}
    if session.compiled:
        ways |= compiled(ways)
    for library in LIBRARIES:
        try:
            ways |= library.ways(work)
        except Exception as error:  # whatever an import of another library raises
            failed[library.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ways, failed


def agreeing(ways: Ways, tolerance: float) -> tuple[Ways, dict[str, str]]:
    """The ways whose result is ours, and what is wrong with the others."""
    ours = ways[OURS].result(ways[OURS].call()).float()
    kept, wrong = {OURS: ways[OURS]}, {}
    for name, way in ways.items():
        if name == OURS:
            continue
        try:
            theirs: Tensor = way.result(way.call()).float()
            error = float((theirs - ours).norm() / ours.norm())
        except Exception as failure:  # likewise
            wrong[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            continue
        if error <= tolerance:
            kept[name] = way
        else:
            wrong[name] = f"its result differs from ours by {error:.2g}"
    return kept, wrong


def compare(session: Session) -> None:
    for op, makers in all_work(session.quick, session.device).items():
        products = op in ("grouped_gemm", "fused_experts")
        table = session.table(op, memory="torch grouped_mm" if products else "torch")
        for make in makers:
            torch.manual_seed(0)
            work = make()
            if not session.select([work]):
                continue
            with torch.no_grad():
                ways, failed = gathered(work, session)
                served, wrong = agreeing(ways, work.tolerance)
                for name, why in wrong.items():
                    print(f"{work}: without {name}: {why}", flush=True)
                named = {name: way.call for name, way in served.items()}
                row = table.compare(work, named, work.work(), work.unit, work.roof(session))
            row.left_out |= failed | wrong


def found() -> dict[str, str]:
    """Every library that is known here, with its version or why there is none."""
    others = {}
    for library in LIBRARIES:
        version = library.version
        if version is None:
            others[library.name] = "not installed"
        else:
            others[library.name] = version if library.adapters else f"{version}: {library.why_not}"
    triton = "installed" if importlib.util.find_spec("triton") else "not installed"
    return {"torch": torch.__version__, "triton (torch.compile on a GPU)": triton} | others


def main(arguments: list[str] | None = None) -> Session:
    options = parse(parser("benchmarks report", __doc__ or ""), arguments)
    session = Session(options)
    session.facts["libraries"] = found()
    load, cores = os.getloadavg()[0], os.cpu_count()
    session.facts["load"] = f"{load:.1f} on {cores} processors"
    session.facts["busy"] = load > 0.7 * (cores or 1)  # before this run brought its own
    compare(session)
    session.finish()
    options.out.write_text(page(session.as_dict()))
    print(f"wrote {options.out}")
    return session
