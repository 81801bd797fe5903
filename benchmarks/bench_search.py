"""Search: our exact search against `faiss.knn`, and what the approximate kinds give.

    python benchmarks/bench_search.py [--quick]

Peer and ours run alternately in one process; the figures are medians. One JSON line per figure.
"""

import json
import os
import platform
import statistics
import sys
import time

import faiss
import numpy as np

from product_retrieval.embeddings import Embeddings
from product_retrieval.search import Index, clustered_vectors, normalise

QUICK = "--quick" in sys.argv
QUERIES, ITEMS, DIM, TOP, ROUNDS = (50, 3_000, 32, 10, 3) if QUICK else (2_000, 100_000, 512, 100, 7)
HARDWARE = f"{os.cpu_count()} cores, {platform.machine()}, faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads"


def seconds(work):
    "Wall-clock seconds of one call."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternately(ours, peer, rounds=ROUNDS):
    "Medians of both, taken in turns after one warm-up each."
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*pairs, strict=True)]


def report(figure, ours, peer, bar, ratio, **more):
    "Print one figure."
    line = {"figure": figure, "ours": ours, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "met": ratio >= bar, **more}
    print(json.dumps({**line, "hardware": HARDWARE, "quick": QUICK}), flush=True)


def main():
    "All figures."
    vectors = normalise(clustered_vectors(ITEMS + QUERIES, DIM, ITEMS // 50, spread=1.0, rank=16, seed=0))
    queries, items = vectors[ITEMS:], vectors[:ITEMS]
    embeddings = Embeddings(items, [f"i{row}" for row in range(ITEMS)])
    flat = Index.build(embeddings, kind="flat")
    ours, peer = alternately(
        lambda: flat.search(queries, TOP), lambda: faiss.knn(queries, items, TOP, faiss.METRIC_INNER_PRODUCT)
    )
    name = f"exact search, {QUERIES} x {ITEMS} x {DIM}, top {TOP}: queries/s against faiss.knn"
    report(name, QUERIES / ours, QUERIES / peer, 0.95, peer / ours)
    right = flat.search(queries, 10).rows
    for kind in ("hnsw", "ivfpq"):
        index = Index.build(embeddings, kind=kind)
        found = index.search(queries, 10).rows
        recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), right.tolist(), strict=True)]))
        ours, peer = alternately(lambda: index.search(queries, 10), lambda: flat.search(queries, 10), 3)  # noqa: B023
        name = f"{kind}, {QUERIES} x {ITEMS} x {DIM}, top 10: queries/s against exact search"
        more = {"recall@10": round(recall, 4), "effort": index.settings["effort"]}
        report(name, QUERIES / ours, QUERIES / peer, 0.0 if QUICK else 1.0, peer / ours, **more)
        report(f"{kind}: recall@10 on new queries", recall, 1.0, 0.9, recall)


if __name__ == "__main__":
    main()
