"""Search: our exact search against `faiss.knn`, and what the approximate kinds give.

    python benchmarks/bench_search.py [--quick]

Peer and ours run alternately in one process; the figures are medians. One JSON line per figure.
"""

import faiss
import numpy as np
from common import QUICK, alternate, line

from product_retrieval.embeddings import Embeddings
from product_retrieval.search import Index, clustered_vectors, normalise

QUERIES, ITEMS, DIM, TOP, ROUNDS = (50, 3_000, 32, 10, 3) if QUICK else (2_000, 100_000, 512, 100, 7)


def main():
    "All figures."
    vectors = normalise(clustered_vectors(ITEMS + QUERIES, DIM, ITEMS // 50, spread=1.0, rank=16, seed=0))
    queries, items = vectors[ITEMS:], vectors[:ITEMS]
    embeddings = Embeddings(items, [f"i{row}" for row in range(ITEMS)])
    flat = Index.build(embeddings, kind="flat")
    knn = lambda: faiss.knn(queries, items, TOP, faiss.METRIC_INNER_PRODUCT)
    ours, peer = alternate(lambda: flat.search(queries, TOP), knn, rounds=ROUNDS)
    name = f"exact search, {QUERIES} x {ITEMS} x {DIM}, top {TOP}, seconds; peer: faiss.knn"
    line(name, ours, peer, "ratio >= 0.95", peer / ours >= 0.95, faiss=faiss.__version__)
    right = flat.search(queries, 10).rows
    for kind in ("hnsw", "ivfpq"):
        index = Index.build(embeddings, kind=kind)
        found = index.search(queries, 10).rows
        recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), right.tolist(), strict=True)]))
        ours, peer = alternate(lambda: index.search(queries, 10), lambda: flat.search(queries, 10), rounds=3)  # noqa: B023
        name = f"{kind}, {QUERIES} x {ITEMS} x {DIM}, top 10, seconds; peer: exact search"
        more = {"recall@10": round(recall, 4), "effort": index.settings["effort"]}
        line(name, ours, peer, "ratio >= 1", QUICK or ours <= peer, **more)
        line(f"{kind}: recall@10 on new queries", recall, None, ">= 0.9", recall >= 0.9)


if __name__ == "__main__":
    main()
