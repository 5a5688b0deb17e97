# SPDX-License-Identifier: MIT
"""Training beside another busy process: what the spin count of the programs costs and saves.

Each figure is a process of its own, because libgomp reads its environment when it is loaded; the
settings take turns, so that drift of the machine hits all. Idle, then with one process that keeps a
core busy. The median step of every process counts; the spread over the rounds tells how quiet the
machine was.

    python -m benchmarks.busy [--rounds 5] [--seconds 4] [--spin-counts 500 2000 10000]
"""

import argparse
import os
import statistics
import subprocess
import sys

from kimi_ops._program import SPIN_COUNT

STEPS = """
import sys, time, statistics, torch
from kimi_ops.train.settings import TrainSettings
from kimi_ops.train.trainer import Trainer
settings = TrainSettings()
trainer = Trainer(settings)
batch = torch.randint(0, 256, (settings.sequences, settings.window + 1))
trainer.step(batch, 0)
times, end = [], time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    begin = time.perf_counter()
    trainer.step(batch, 1)
    times.append(time.perf_counter() - begin)
print(settings.tokens_per_step / statistics.median(times))
"""


def tokens_per_second(spin_count: str | None, seconds: float) -> float:
    chosen = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    command = [sys.executable, "-c", STEPS, str(seconds)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(result.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each process")
    parser.add_argument("--spin-counts", nargs="+", default=[SPIN_COUNT], metavar="N")
    options = parser.parse_args(argv)
    settings = {"libgomp's own": None, **{f"GOMP_SPINCOUNT={n}": n for n in options.spin_counts}}
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}; mini, tokens/s: median (lowest to highest)")
    for state, busy in (("idle", 0), ("one busy process", 1)):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            rates: dict[str, list[float]] = {name: [] for name in settings}
            for _ in range(options.rounds):
                for name, spin_count in settings.items():
                    rates[name].append(tokens_per_second(spin_count, options.seconds))
        finally:
            for other in others:
                other.kill()
                other.wait()
        print(state)
        own = statistics.median(rates["libgomp's own"])
        for name, found in rates.items():
            middle = statistics.median(found)
            spread = f"({min(found):,.0f} to {max(found):,.0f})"
            print(f"  {name:<24}{middle:>9,.0f} {spread:<20} {middle / own:6.2f}x")


if __name__ == "__main__":
    main()
