"""Product1M's text format: 1.2 million rows read in less than 20 seconds and 2 GB.

    python benchmarks/bench_datasets.py [--quick]

Writes a synthetic file in the format, reads it in a process of its own, and prints one JSON line a figure. The peer is
pandas' own reader with the separator '#####'. `--quick` takes 20,000 rows.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICK = "--quick" in sys.argv
ROWS = 20_000 if QUICK else 1_200_000
HARDWARE = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def write(path: Path, rows: int) -> None:
    "Captions of 4 to 54 Chinese characters, two addresses, no labels: as the train file."
    draw = random.Random(0)
    letters = "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(4000))
    with open(path, "w", encoding="utf-8", newline="") as file:
        for k in range(rows):
            at = draw.randrange(3900)
            caption = letters[at : at + draw.randint(4, 54)] + (" &amp; A" if k % 30_000 == 0 else "")
            name = f"{draw.randrange(10**10)}/O1CN01{draw.randrange(10**12)}_!!0-item_pic.jpg"
            url = f"img.example.com/bao/uploaded/i{k % 4}/{name}"
            file.write(f"{600_000_000_000 + k}#####{caption}#####https://{url}#####http://mirror.{url}\r\n")


def child(kind: str, path: str) -> None:
    "Read and print seconds and peak memory of this process."
    start = time.perf_counter()
    if kind == "ours":
        from product_retrieval.data.datasets import product1m_catalog

        start = time.perf_counter()
        rows = len(product1m_catalog(Path(path).parent))
    else:
        import pandas as pd

        start = time.perf_counter()
        rows = len(pd.read_csv(path, sep="#####", header=None, engine="python", dtype=str, encoding="utf-8", quoting=3))
    seconds, processor = time.perf_counter() - start, time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(json.dumps({"rows": rows, "seconds": seconds, "processor": processor, "gigabytes": memory}))


def measure(kind: str, path: Path) -> dict:
    "One reader in a fresh process."
    done = subprocess.run([sys.executable, __file__, "--child", kind, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def say(figure: str, ours: float, peer: float, bar: float | None) -> None:
    "One JSON line."
    line = {"figure": figure, "ours": round(ours, 2), "peer": round(peer, 2), "ratio": round(peer / ours, 2), "bar": bar}
    print(json.dumps({**line, "met": None if bar is None else ours < bar, "hardware": HARDWARE}), flush=True)


def main() -> None:
    "Both readers."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product1m_train_ossurl_v2.txt"
        write(path, ROWS)
        ours, peer = measure("ours", path), measure("peer", path)
        assert ours["rows"] == peer["rows"] == ROWS
        say(f"Product1M format to Catalog, {ROWS:,} rows, seconds", ours["seconds"], peer["seconds"], 20)
        say("the same, seconds of processor time, imports included", ours["processor"], peer["processor"], None)
        say(f"Product1M format to Catalog, {ROWS:,} rows, gigabytes at the peak", ours["gigabytes"], peer["gigabytes"], 2)


if __name__ == "__main__":
    child(*sys.argv[2:]) if "--child" in sys.argv else main()
