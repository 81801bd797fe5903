"""What the benchmarks share: jobs that take turns, medians, and one line of JSON a figure."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 5


def hardware() -> str:
    "Processor, cores, and torch with its threads when a script uses it."
    torch = sys.modules.get("torch")
    with_torch = f", torch {torch.__version__}, {torch.get_num_threads()} threads" if torch else ""
    return f"{_processor()}, {os.cpu_count()} cores{with_torch}"


def _processor() -> str:
    "The processor's name where Linux tells it."
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(row.split(":")[1].strip() for row in file if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def alternate(*jobs: Callable, rounds: int = ROUNDS, warm_up: bool = True) -> list[float]:
    "Median seconds of each job; the jobs take turns, after one round that is not counted."
    times = [[] for _ in jobs]
    for turn in range(rounds + warm_up):
        for job, spent in zip(jobs, times, strict=True):
            start = time.perf_counter()
            job()
            if turn >= warm_up:
                spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def line(figure: str, ours: float, peer: float | None = None, bar: str = "", met: bool = True, **more) -> None:
    "Print a figure; `ratio` is peer / ours."
    ratio = round(peer / ours, 3) if peer else None
    peer = round(peer, 4) if peer else None
    about = {"ours": round(ours, 4), "peer": peer, "ratio": ratio, "bar": bar, "met": bool(met), **more}
    print(json.dumps({"figure": figure, **about, "hardware": hardware(), "quick": QUICK}), flush=True)
