"""Re-ranking: against the dense published algorithm, and at sizes where that one does not fit.

    python benchmarks/bench_rerank.py [--quick] [--dim 128]

Every figure is measured in a process of its own, so that its peak memory is its own, too. One JSON line per figure.
"""

import multiprocessing
import resource
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from common import QUICK, line

from product_retrieval.rerank import augment_database, expand_queries, k_reciprocal, rerank_lists
from product_retrieval.search import clustered_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

DIM = int(sys.argv[sys.argv.index("--dim") + 1]) if "--dim" in sys.argv else (32 if QUICK else 128)
DENSE = (100, 900) if QUICK else (1_000, 9_000)  # queries, gallery
WHOLE = (200, 3_800) if QUICK else (2_000, 38_000)
LISTS = (500, 20_000) if QUICK else (10_000, 1_100_000)
DEPTH = 100
GIGABYTE = 1 << 30
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def vectors(asked, stored):
    "Queries and gallery in clumps of 20 items."
    items = clustered_vectors(asked + stored, DIM, max(2, (asked + stored) // 20), spread=1.0, rank=16, seed=0)
    return items[:asked], items[asked:]


def sparse(asked, stored, rounds):
    "Seconds of the best round of `k_reciprocal`, and its rankings."
    queries, gallery = vectors(asked, stored)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        rankings, _ = k_reciprocal(queries, gallery, k=DEPTH)
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "rankings": rankings}


def dense(asked, stored):
    "Seconds of the dense algorithm in float32, as published, and its rankings."
    from rerank_oracle import rerank_dense

    queries, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors(asked, stored))
    start = time.perf_counter()
    _, rankings = rerank_dense(queries, gallery, dtype=np.float32)
    return {"seconds": time.perf_counter() - start, "rankings": rankings[:, :DEPTH]}


def lists(asked, stored):
    "Seconds of `rerank_lists`; the first lists and the gallery's neighbours come from an inverted-file index."
    queries, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors(asked, stored))
    start = time.perf_counter()
    index = faiss.index_factory(DIM, f"IVF{max(16, int(4 * stored**0.5))},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.niter = 1, 5
    index.train(gallery[: 40 * index.nlist])
    index.add(gallery)
    index.nprobe = 16
    rows = np.concatenate([index.search(part, 21)[1].astype(np.int32) for part in np.array_split(gallery, 64)])
    first = index.search(queries, DEPTH)[1]
    prepared, index = time.perf_counter() - start, None
    start = time.perf_counter()
    rankings, _ = rerank_lists(queries, gallery, first, gallery_rows=rows)
    return {"seconds": time.perf_counter() - start, "neighbours_seconds": prepared, "moved": float((rankings != first).mean())}


def steps(asked, stored):
    "Seconds of query expansion and of database-side augmentation."
    queries, gallery = vectors(asked, stored)
    start = time.perf_counter()
    expand_queries(queries, gallery)
    middle = time.perf_counter()
    augment_database(gallery)
    return {"seconds": middle - start, "augmentation_seconds": time.perf_counter() - middle}


def _child(work, arguments, pipe):
    "Run in a process of its own and send back the result with the peak memory."
    found = work(*arguments)
    pipe.send({**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT})


def alone(work, *arguments):
    "The result of `work` in a fresh process."
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(work, arguments, there))
    child.start()
    there.close()
    found = here.recv()
    child.join()
    return found


def report(figure, ours, bar, met, **more):
    "Print one figure."
    more = {key: round(value, 4) if isinstance(value, float) else value for key, value in more.items()}
    line(figure, ours, None, bar, met, **more, dim=DIM, faiss=faiss.__version__)


def main():
    "All figures."
    ours, peer = alone(sparse, *DENSE, 3), alone(dense, *DENSE)
    ratio = peer["seconds"] / ours["seconds"]
    same = float((ours["rankings"] == peer["rankings"]).mean())
    name = f"k-reciprocal, {sum(DENSE)} items, {DENSE[0]} of them queries: times as fast as the dense algorithm"
    more = {"seconds": ours["seconds"], "peer_seconds": peer["seconds"], "same_places": same}
    report(name, ratio, ">= 10x", ratio >= 10, **more, peak_gb=ours["peak"] / GIGABYTE, peer_peak_gb=peer["peak"] / GIGABYTE)
    found = alone(sparse, *WHOLE, 1)
    report(f"k-reciprocal, {WHOLE[0]} x {WHOLE[1]}: seconds", found["seconds"], "< 15 s", found["seconds"] < 15)
    peak = found["peak"] / GIGABYTE
    report(f"k-reciprocal, {WHOLE[0]} x {WHOLE[1]}: peak memory of the process, GB", peak, "< 3 GB", peak < 3)
    found = alone(steps, *WHOLE)
    name = f"query expansion, {WHOLE[0]} x {WHOLE[1]}: seconds"
    report(name, found["seconds"], "reported", True, augmentation_seconds=found["augmentation_seconds"])
    found = alone(lists, *LISTS)
    more = {key: found[key] for key in ("neighbours_seconds", "moved")}
    report(f"lists of {DEPTH}, {LISTS[0]} x {LISTS[1]}: seconds", found["seconds"], "reported", True, **more)
    peak = found["peak"] / GIGABYTE
    report(f"lists of {DEPTH}, {LISTS[0]} x {LISTS[1]}: peak memory of the process, GB", peak, "< 24 GB", peak < 24)


if __name__ == "__main__":
    main()
