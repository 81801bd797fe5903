"""The main job as a user runs it: wall-clock time and the memory of the whole process tree, with the shelf's cache cold.

    python benchmarks/bench_demo.py [--quick]
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def tree_memory(process: psutil.Process) -> int:
    "Proportional bytes of a process and its children; shared pages are counted once."
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            info = member.memory_full_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:
            continue
    return total


def run(out: Path, quick: bool) -> tuple[float, int]:
    "Seconds and peak bytes of one demo."
    environment = {**os.environ, "PRODUCT_RETRIEVAL_CACHE": str(out.parent / "cache"), "QUICK": "1" if quick else ""}
    command = [sys.executable, "-c", "from product_retrieval.cli import main; main()", "demo", "--out", str(out)]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, tree_memory(process))
            time.sleep(0.5)
    if child.returncode:
        sys.exit(f"the demo ended with exit code {child.returncode}")
    return time.perf_counter() - start, peak


def main() -> None:
    "One run; one JSON line a figure."
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = run(Path(folder) / "demo", "--quick" in sys.argv)
        rows = json.loads((Path(folder) / "demo" / "metrics.json").read_text(encoding="utf-8"))["rows"]
    hardware = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    line = {"figure": "demo, seconds", "ours": round(seconds, 1), "bar": 300, "met": seconds < 300, "hardware": hardware}
    print(json.dumps(line))
    memory = round(peak / 1e9, 2)
    line = {"figure": "demo, peak GB of all processes", "ours": memory, "bar": 4, "met": memory < 4, "hardware": hardware}
    print(json.dumps(line))
    for row in rows:
        print(json.dumps({"figure": f"demo, {row['name']}, MAR@10", "ours": round(row["MAR@10"], 4), "hardware": hardware}))


if __name__ == "__main__":
    main()
