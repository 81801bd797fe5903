"""Speed of the evaluation: Product1M's test set, six metrics against ranx, leave-one-out against faiss.knn.

Prints one JSON line a figure. Ours and the peer run alternately in one process; medians. `--quick` runs tiny.
"""

import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
from common import QUICK, ROUNDS, alternate, line

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def product1m_files(folder: Path, queries: int, gallery: int, categories: int) -> tuple[dict, dict, list]:
    "Files of Product1M's size in its format; random rankings with hits among them."
    random = np.random.default_rng(0)
    items = {f"9{i:08d}": f"category {c}" for i, c in enumerate(random.integers(0, categories, gallery))}
    names = np.array(list(items))
    draw = lambda: [f"category {c}" for c in random.integers(0, categories, random.integers(1, 7))]
    asked = {f"6{i:08d}": draw() for i in range(queries)}
    text = lambda rows: "".join(f"{i}#####caption#####http://a#####http://b#####{ls}\r\n" for i, ls in rows)
    (folder / "product1m_gallery_ossurl_v2.txt").write_text(text(items.items()))
    (folder / "product1m_test_ossurl_v2.txt").write_text(text((q, "#;#".join(ls)) for q, ls in asked.items()))
    by_label = {label: [i for i, other in items.items() if other == label] for label in set(items.values())}
    lines = []
    for query, labels in asked.items():
        some = np.concatenate([by_label[label][:12] for label in labels if label in by_label])
        mixed = random.permutation(np.concatenate([some, random.choice(names, 150)]))
        lines.append((query, list(dict.fromkeys(mixed.tolist()))[:100]))
    (folder / "ranking.txt").write_text("".join(",".join([q, *ids]) + "\n" for q, ids in lines))
    return items, asked, lines


def bench_product1m() -> None:
    "The whole command without Python's start: both files read, checked and scored at 10, 50 and 100."
    from evaluation_oracles import product1m

    from product_retrieval.protocols import evaluate_product1m

    size = (60, 400, 20) if QUICK else (6547, 40_033, 458)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gallery, queries, lines = product1m_files(folder, *size)
        loops = lambda: [product1m(gallery, queries, lines, n) for n in (10, 50, 100)]
        fast = lambda: evaluate_product1m(folder, folder / "ranking.txt")
        for n, slow in zip((10, 50, 100), loops(), strict=True):
            np.testing.assert_allclose(list(fast()[f"top{n}"].values()), slow, atol=1e-12, rtol=0)
        (ours,), (peer,) = alternate(fast), alternate(loops, rounds=1)
    what = f"Product1M protocol, {size[0]} queries x 100, gallery {size[1]}, files read and checked; peer: loops over parsed data"
    line(what + ", seconds", ours, peer, "< 0.3 s", ours < 0.3)


RANX = {"recall@10": "recall@10", "mAP@100": "map@100", "MRR": "mrr", "nDCG@10": "ndcg@10"}
RANX |= {"R-precision": "r-precision", "Prec@10": "precision@10"}


def ranx_case(queries: int, gallery: int, depth: int = 100) -> tuple[np.ndarray, list[list[int]]]:
    "Distinct random rows for each query; 1 to 9 positives, about half of them retrieved."
    random = np.random.default_rng(0)
    rankings = np.stack([random.choice(gallery, depth, replace=False) for _ in range(queries)])
    counts = random.integers(1, 10, queries)
    found = lambda row, n: row[random.permutation(depth)[: n // 2 + 1]]
    lists = [list({*found(row, n), *random.integers(0, gallery, n // 2)}) for row, n in zip(rankings, counts, strict=True)]
    return rankings, lists


def bench_ranx() -> None:
    "Two input forms: arrays of rows as a search gives them, and the objects that each library works on."
    import ranx

    from product_retrieval.evaluation import evaluate, positives_from_lists

    warnings.simplefilter("ignore")
    queries, gallery = (200, 1000) if QUICK else (20_000, 40_000)
    rankings, lists = ranx_case(queries, gallery)
    positives = positives_from_lists(lists)
    items, names = np.array([f"d{i}" for i in range(gallery)]), [f"q{i}" for i in range(queries)]
    scores = np.linspace(1, 0.01, rankings.shape[1]).tolist()

    def to_ranx(n: int) -> tuple:
        run = {q: dict(zip(items[row].tolist(), scores, strict=True)) for q, row in zip(names[:n], rankings, strict=False)}
        qrels = {q: dict.fromkeys(items[rows].tolist(), 1) for q, rows in zip(names[:n], lists, strict=False)}
        return ranx.Qrels(qrels), ranx.Run(run)

    warm, objects = to_ranx(50), to_ranx(queries)
    theirs = ranx.evaluate(*warm, list(RANX.values())) and ranx.evaluate(*objects, list(RANX.values()))
    found = evaluate(rankings, positives, list(RANX))
    assert all(abs(found.values[ours] - theirs[name]) < 1e-9 for ours, name in RANX.items())
    sizes = f"six metrics, {queries} queries x top {rankings.shape[1]}, gallery {gallery}"
    from_arrays = lambda: ranx.evaluate(*to_ranx(queries), list(RANX.values()))
    ours_from_lists = lambda: evaluate(rankings, positives_from_lists(lists), list(RANX))
    ours, peer = alternate(ours_from_lists, from_arrays, rounds=min(3, ROUNDS))
    line(f"{sizes}, from arrays of rows and lists of positives; peer: ranx (warm)", ours, peer, ">= 20x", peer / ours >= 20)
    ours_from_objects = lambda: evaluate(rankings, positives, list(RANX))
    ours, peer = alternate(ours_from_objects, lambda: ranx.evaluate(*objects, list(RANX.values())))
    line(f"{sizes}, from each library's own objects; peer: ranx (warm)", ours, peer, ">= 20x", peer / ours >= 20)


class PeakMemory:
    "The most memory that the process holds inside the block beyond what it held before, in bytes."

    def __enter__(self):
        import psutil

        self.process, self.stop = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error) -> None:
        self.stop.set()
        self.thread.join()
        self.bytes = self.peak - self.before


def bench_leave_one_out() -> None:
    "As large as the test half of Stanford Online Products: 60,502 pictures of 2 to 12 a product."
    import faiss

    from product_retrieval.evaluation import leave_one_out

    items = 2000 if QUICK else 60_502
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(items), random.integers(2, 13, items))[:items]
    vectors = random.standard_normal((labels.max() + 1, 128))[labels] + 1.2 * random.standard_normal((items, 128))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    depth = int(np.bincount(labels).max())
    knn = lambda: faiss.knn(vectors, vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)
    knn() if QUICK else faiss.knn(vectors[:5000], vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)
    with PeakMemory() as memory:
        leave_one_out(vectors, labels)
    ours, peer = alternate(lambda: leave_one_out(vectors, labels), knn, rounds=min(3, ROUNDS))
    what = f"leave-one-out, {items} x 128, search and P@1, R-precision, MAP@R; peer: faiss.knn alone, k = {depth}"
    line(f"{what}, seconds", ours, peer, "<= 1.1x the peer's time", ours <= 1.1 * peer)
    gigabytes = memory.bytes / 1e9
    line(f"leave-one-out, {items} x 128, extra memory in GB", gigabytes, None, "< 1 GB", gigabytes < 1)


if __name__ == "__main__":
    bench_product1m()
    bench_ranx()
    bench_leave_one_out()
