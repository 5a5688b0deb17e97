# SPDX-License-Identifier: MIT
"""grouped_gemm against F.grouped_mm for many numbers of rows an expert: where the form of the tile
changes, a step shows."""

import torch

from benchmarks.bench_grouped_gemm import Setting, make_weight
from benchmarks.cases import tile_cases
from benchmarks.measure import roof_rate
from benchmarks.session import Session, main


def compare(session: Session) -> None:
    table = session.table("tile_shapes", width=34, memory="grouped_mm")
    weight, kind = torch.empty(0), ""
    for case in session.select(tile_cases(session.device)):
        if case.shape != kind:
            del weight  # before the next is made
            kind, weight = case.shape, make_weight(case, session.device)
        with torch.no_grad():
            setting = Setting(case, weight)
            named = setting.functions()
            named = {way: named[way] for way in ("kimi_ops", "grouped_mm")}
            peak = session.peak(torch.bfloat16)
            roof = roof_rate(case.flops, setting.moved(), peak, session.bandwidth)
            table.compare(case, named, case.flops, "TFLOP/s", roof)


if __name__ == "__main__":
    main(compare)
