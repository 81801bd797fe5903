"""The ensemble: time and memory of fusing many models on many items, block by block.

    python benchmarks/bench_ensemble.py [--quick] [--models 20] [--items 1100000] [--dim 128] [--folder DIR] [--float16]

Draws one folder of embeddings per model, fits the ensemble on them, and writes the fused folder, in a process of its own whose
memory is watched. `anonymous` is what the process itself allocates; `resident` also counts pages of the mapped files, which the
system takes back when it needs them. One JSON line per figure; the time for 20 x 1.1 M x 128 is extrapolated where less ran.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import line

from product_retrieval.core import human_size
from product_retrieval.embeddings import Embeddings, new_array
from product_retrieval.embeddings import write_side_files as describe

FULL = (20, 1_100_000, 128)


def options():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--items", type=int, default=110_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--work", default=None, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.quick:
        found.models, found.items, found.dim = 3, 4_000, 32
    return found


def draw(folder, number, items, dim):
    "A folder of embeddings, written in blocks."
    (folder / f"m{number}").mkdir(parents=True)
    table = new_array(folder / f"m{number}" / "vectors.npy", np.dtype("float32"), (items, dim))
    random = np.random.default_rng(number)
    mixing = random.normal(size=(dim, dim)).astype(np.float32)
    for start in range(0, items, 50_000):
        block = random.normal(size=(min(50_000, items - start), dim)).astype(np.float32) @ mixing
        table[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    table.flush()
    about = {"model": f"m{number}", "weights": str(number), "preprocessing": "none", "dim": dim, "dtype": "float32"}
    describe(folder / f"m{number}", [f"item{n}" for n in range(items)], about)


class Watch(threading.Thread):
    "The largest anonymous and resident memory of this process, in bytes, looked at fifty times a second."

    def __init__(self):
        super().__init__(daemon=True)
        self.peaks, self.going = {"RssAnon": 0, "VmRSS": 0}, True

    def run(self):
        while self.going:
            lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
            for row in lines:
                name = row.split(":")[0]
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], 1024 * int(row.split()[1]))
            time.sleep(0.02)


def work(arguments):
    "Fit and transform, in a process of its own; prints seconds and peaks."
    from product_retrieval.v2l.ensemble import Ensemble, EnsembleConfig

    folder = Path(arguments.work)
    members = [folder / f"m{n}" for n in range(arguments.models)]
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    fitted = Ensemble.fit(members, EnsembleConfig(weights=[1.0] * arguments.models))
    middle = time.perf_counter()
    fitted.transform(members, folder / "fused", dtype="float16" if arguments.float16 else "float32")
    end = time.perf_counter()
    watch.going = False
    print(json.dumps({"fit": middle - start, "transform": end - middle, **watch.peaks}))


def main():
    "All figures."
    arguments = options()
    if arguments.work:
        return work(arguments)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for number in range(arguments.models):
            draw(folder, number, arguments.items, arguments.dim)
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--work", str(folder)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found = json.loads(done.stdout)
        size = f"{arguments.models} x {arguments.items:,} x {arguments.dim}"
        numbers = arguments.models * arguments.items * arguments.dim
        factor = FULL[0] * FULL[1] * FULL[2] / numbers
        for step in ("fit", "transform"):
            more = {"at_full_size": round(found[step] * factor, 1), "factor": round(factor, 2)}
            line(f"ensemble, {step}, {size}: seconds", found[step], bar="reported", **more)
        own, resident = found["RssAnon"] / 2**30, found["VmRSS"] / 2**30
        line(f"ensemble, peak of anonymous memory, {size}: GB", own, bar="< 24 GB", met=own < 24, inputs=human_size(4 * numbers))
        line(f"ensemble, peak of resident memory, {size}: GB", resident, bar="reported")
        fused = Embeddings.open(folder / "fused")
        line(f"ensemble, fused folder, {size}, {fused.vectors.dtype}: GB", fused.vectors.nbytes / 2**30, bar="reported")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
