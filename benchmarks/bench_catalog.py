"""The catalogue at the size of Product1M: reading, splitting and taking labels apart, time and peak memory.

    python benchmarks/bench_catalog.py [--quick]

Every measurement runs in a fresh process, ours and the peer in turn, and reports the median of three. The peer of
reading is `pandas.read_csv` alone; the difference is what text columns, rules and row numbers cost.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

quick = "--quick" in sys.argv
rows = 20_000 if quick else 1_200_000
rounds = 1 if quick else 3

WORK = {
    "pandas": "pd.read_csv(csv, dtype=str)",
    "from_csv": "Catalog.from_csv(csv)",
    "load": "Catalog.load(folder)",
    "split": "[catalog.split(name) for name in SPLITS]",
    "labels": "catalog.split('gallery').labels",
    "check": "check_catalog(catalog, pictures=False)",
}


def write_table(path: Path) -> None:
    "A table like Product1M: 94 % train rows, captions of 4-54 characters, 458 labels, three levels of category."
    random = np.random.default_rng(0)
    words = np.array(["".join(chr(c) for c in random.integers(0x4E00, 0x9FA5, 6)) for _ in range(5000)])
    first, second, third = (pd.Series(words[random.integers(0, 5000, rows)]) for _ in range(3))
    split = random.choice(["train", "gallery", "query"], rows, p=[0.94, 0.04, 0.02])
    label = pd.Series(random.integers(0, 458, rows).astype(str))
    name = pd.Series(np.arange(rows).astype(str))
    columns = {
        "item_id": name.str.zfill(9),
        "image": "images/" + name.str[-3:] + "/" + name + ".jpg",
        "title": first + second + third,
        "split": split,
        "category": "meta" + label.str[-1] + "/level" + label.str[-2:] + "/leaf" + label,
        "labels": label.where(split != "train", ""),
    }
    frame = pd.DataFrame(columns)
    covered = np.flatnonzero(split == "gallery")[:458]
    frame.loc[covered, "labels"] = [str(i) for i in range(len(covered))]
    frame.to_csv(path, index=False)


def prepare(folder: Path) -> None:
    "The table as CSV and as a catalogue folder."
    from product_retrieval.data.catalog import Catalog

    write_table(folder / "table.csv")
    Catalog.from_csv(folder / "table.csv").save(folder / "saved", images="none")


def measure(what: str, folder: Path) -> None:
    "Print seconds and peak memory of one piece of work; runs in a process of its own."
    from product_retrieval.data.catalog import SPLITS, Catalog
    from product_retrieval.data.checks import check_catalog

    names = {"Catalog": Catalog, "SPLITS": SPLITS, "check_catalog": check_catalog, "pd": pd}
    names |= {"csv": folder / "table.csv", "folder": folder / "saved"}
    if what in ("split", "labels", "check"):
        names["catalog"] = Catalog.load(folder / "saved")
    start = time.perf_counter()
    names["result"] = eval(WORK[what], names)  # the texts stand above
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))


def main() -> None:
    "Write the table once, measure in turn, print one JSON line for every figure."
    with tempfile.TemporaryDirectory() as folder:
        # a child starts with its parent's peak memory, so the parent stays small
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", "prepare", folder], check=True)
        found: dict[str, list] = {what: [] for what in WORK}
        for _ in range(rounds):
            for what in WORK:
                command = [sys.executable, __file__, "--one", what, folder]
                found[what].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    report({what: [statistics.median(column) for column in zip(*runs, strict=True)] for what, runs in found.items()})


def report(median: dict[str, list[float]]) -> None:
    "One JSON line for every figure."
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    bars = {"from_csv": (20, 2), "load": (5, 2), "split": (5, 2), "labels": (5, 2), "check": (20, 2)}  # seconds, GB
    for what, bar in bars.items():
        for value, limit, peer, unit in zip(median[what], bar, median["pandas"], ("s", "GB"), strict=True):
            peer = peer if what == "from_csv" else None
            line = {"figure": f"catalog {what}, {rows:,} rows, {unit}", "ours": round(value, 3),
                    "peer": peer and round(peer, 3), "ratio": peer and round(value / peer, 2),
                    "bar": limit, "met": value <= limit, "hardware": hardware}  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if "--one" in sys.argv:
        what, folder = sys.argv[-2], Path(sys.argv[-1])
        prepare(folder) if what == "prepare" else measure(what, folder)
    else:
        main()
