"""The index: recall, filters, changes, files, bad input."""

import json
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.embeddings import Embeddings
from product_retrieval.search import (
    Index,
    as_vectors,
    bytes_needed,
    choose_kind,
    clustered_vectors,
    compact,
    exact_search,
    measure_recall,
    normalise,
)

KINDS = ("flat", "hnsw", "ivfpq")
COUNT, DIM, CLUSTERS = 12_000, 32, 60


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(COUNT, DIM, CLUSTERS, seed=0)


@pytest.fixture(scope="module")
def cluster():
    return np.arange(COUNT) % CLUSTERS


@pytest.fixture(scope="module")
def embeddings(vectors):
    return Embeddings(vectors, [f"i{n}" for n in range(COUNT)])


@pytest.fixture(scope="module")
def catalog(cluster, tmp_path_factory):
    frame = pd.DataFrame({
        "item_id": [f"i{n}" for n in range(COUNT)], "image": "x.jpg", "title": "", "split": "gallery",
        "category": [f"m{c % 4}/l{c % 12}/c{c}" for c in cluster], "brand": [f"b{c % 3}" for c in cluster],
    })  # fmt: skip
    return Catalog.from_frame(frame, tmp_path_factory.mktemp("root"), "toy")


@pytest.fixture(scope="module")
def saved(embeddings, catalog, tmp_path_factory):
    "One index of each kind, on disk: tests load fresh copies."
    folder = tmp_path_factory.mktemp("indexes")
    for kind in KINDS:
        Index.build(embeddings, kind=kind, catalog=catalog, exact_below=100).save(folder / kind)
    return folder


@pytest.fixture(params=KINDS)
def index(request, saved):
    return Index.load(saved / request.param)


@pytest.fixture(scope="module")
def queries(vectors):
    return vectors[:100] + np.random.default_rng(1).normal(0, 0.1, (100, DIM)).astype(np.float32)


def truth(queries, vectors, k, keep=None):
    slots = np.arange(len(vectors)) if keep is None else np.flatnonzero(keep)
    scores = normalise(queries) @ normalise(vectors[slots]).T
    return slots[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def recall(rows, right):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows.tolist(), right.tolist(), strict=True)])


def test_recall_and_what_is_stored(index, queries, vectors):
    found = index.search(queries, 10)
    assert recall(found.rows, truth(queries, vectors, 10)) >= (1 if index.kind == "flat" else 0.95)
    assert index.recall >= 0.95 and index.measured["items"] == COUNT and index.measured["k"] == 10
    assert found.ids[3] == [f"i{row}" for row in found.rows[3]]
    exact = np.einsum("qd,qkd->qk", normalise(queries), normalise(vectors)[found.rows])
    assert np.allclose(found.scores, exact, atol=1e-4) and (np.diff(found.scores, axis=1) <= 0).all()


FILTERS = {
    "meta": {"category": "m1"},
    "level 2": {"category": "m1/l1"},
    "leaf": {"category": "m1/l1/c1"},
    "two leaves": {"category": ["m1/l1/c1", "m2/l2/c2"]},
    "brand": {"brand": "b2"},
    "both": {"brand": ["b0", "b1"], "category": "m0"},
    "function": lambda table: (np.arange(len(table)) % 2 == 0),
    "mask": np.arange(COUNT) < 7000,
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_recall(index, queries, vectors, catalog, name):
    c = np.arange(COUNT) % CLUSTERS
    keep = {
        "meta": c % 4 == 1, "level 2": c % 12 == 1, "leaf": c == 1, "two leaves": np.isin(c, [1, 2]), "brand": c % 3 == 2,
        "both": (c % 3 < 2) & (c % 4 == 0), "function": np.arange(COUNT) % 2 == 0, "mask": np.arange(COUNT) < 7000,
    }[name]  # fmt: skip
    if name == "level 2":
        keep &= c % 4 == 1
    found = index.search(queries, 10, where=FILTERS[name])
    assert keep[found.rows].all()
    assert recall(found.rows, truth(queries, vectors, 10, keep)) >= (1 if index.kind == "flat" else 0.95)


def test_filter_without_matches_and_with_few(index, queries):
    found = index.search(queries[:2], 3, where={"brand": "nobody"})
    assert (found.rows == -1).all() and np.isneginf(found.scores).all() and found.ids == [[], []]
    found = index.search(queries[:2], 3, where=lambda table: table["item_id"].isin(["i5", "i7"]))
    assert sorted(found.ids[0]) == ["i5", "i7"] and found.rows[0, 2] == -1


def test_bad_filters(index, queries):
    with pytest.raises(InputError, match=r"no column 'brnd'.*'brand'"):
        index.search(queries, 3, where={"brnd": "b0"})
    with pytest.raises(InputError, match="one True or False an item"):
        index.search(queries, 3, where=np.array([True, False]))
    with pytest.raises(InputError, match="one True or False an item"):
        index.search(queries, 3, where=lambda table: table["brand"])


def test_add_remove_replace(index, queries, vectors):
    gone = [f"i{n}" for n in range(0, COUNT, 5)]
    index.remove(gone)
    assert len(index) == COUNT - len(gone) and index.measured["changed_since"] == len(gone)
    found = index.search(queries, 10)
    keep = np.arange(COUNT) % 5 != 0
    assert [[index.ids[row] for row in line] for line in found.rows] == found.ids
    slots = np.array([[int(i[1:]) for i in line] for line in found.ids])
    assert keep[slots].all() and recall(slots, truth(queries, vectors, 10, keep)) >= 0.95
    index.add(["new"], queries[:1], {"brand": ["b9"]})
    assert index.search(queries[:1], 1).ids == [["new"]] and index.search(queries[:1], 1, where={"brand": "b9"}).ids == [["new"]]
    index.replace(["new"], queries[1:2])
    assert index.search(queries[:2], 1).ids[0] != ["new"] and index.search(queries[:2], 1).ids[1] == ["new"]
    assert index.search(queries[:1], 1, where={"brand": "b9"}).ids == [["new"]], "columns stay when they are not given"
    assert index.ids[-1] == "new" and len(index) == COUNT - len(gone) + 1
    assert np.allclose(index.vectors(["new"]), normalise(queries[1:2]), atol=1e-5)


def test_compaction(index, queries, vectors):
    slots = len(index.alive)
    index.remove([f"i{n}" for n in range(2000)])
    assert len(index.alive) == (slots - 2000 if index.kind == "flat" else slots)
    before = index.search(queries[-5:], 10, where=np.ones(len(index), dtype=bool))
    compact(index)
    assert len(index.alive) == len(index) == slots - 2000
    after = index.search(queries[-5:], 10)
    assert recall(after.rows, before.rows) >= 0.9
    index.remove([f"i{n}" for n in range(2000, 6000)])
    assert len(index.alive) == len(index) == slots - 6000, "a quarter of dead slots starts a compaction"
    keep = np.arange(COUNT) >= 6000
    rows = index.search(queries, 10).rows + 6000
    assert recall(rows, truth(queries, vectors, 10, keep)) >= 0.95
    measure_recall(index)
    assert index.recall >= 0.9 and index.measured["changed_since"] == 0


def test_remove_everything_and_start_again(index, queries):
    index.remove(index.ids)
    found = index.search(queries[:2], 4)
    assert len(index) == 0 and found.rows.shape == (2, 0) and found.ids == [[], []]
    index.add(["a", "b"], queries[:2])
    assert [line[0] for line in index.search(queries[:2], 5).ids] == ["a", "b"]


def test_changes_are_all_or_nothing(index, queries):
    count, before = len(index), index.search(queries[:3], 5)
    bad = queries[:2].copy()
    bad[1, 3] = np.nan
    for call, message in [
        (lambda: index.add(["i5"], queries[:1]), "'i5' is in the index already; use replace"),
        (lambda: index.add(["x", "x"], queries[:2]), "'x' stands twice"),
        (lambda: index.add(["x", "y"], bad), "row 1: NaN"),
        (lambda: index.add(["x"], queries[:2]), "1 ids for 2 vectors"),
        (lambda: index.add(["x"], queries[:1, :5]), r"shape \[1, 5\]; expected \[n, 32\]"),
        (lambda: index.add(["x"], queries[:1], {"brend": ["b"]}), "column 'brend'.*'brand'"),
        (lambda: index.add(["x"], queries[:1], {"brand": ["b", "c"]}), "2 rows for 1 items"),
        (lambda: index.remove(["i1", "i99999"]), "'i99999' is not in the index"),
        (lambda: index.remove("i1"), "expected a list"),
        (lambda: index.replace(["nobody"], queries[:1]), "'nobody' is not in the index"),
        (lambda: index.replace(["i1"], bad[1:]), "NaN"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    after = index.search(queries[:3], 5)
    assert len(index) == count and np.array_equal(after.rows, before.rows) and "changed_since" in index.measured
    assert index.measured["changed_since"] == 0


def test_bad_queries(index, queries):
    bad = queries[:3].copy()
    bad[2, 0] = np.inf
    for call, message in [
        (lambda: index.search(bad), "queries, row 2: NaN or infinite"),
        (lambda: index.search(queries[:, :7]), r"expected \[n, 32\]"),
        (lambda: index.search(queries, 0), "k=0"),
        (lambda: index.search(queries, 1.5), "k=1.5: expected a whole number"),
        (lambda: index.search(queries, True), "k=True"),
        (lambda: index.search(queries, "3"), "k='3'"),
        (lambda: index.search(queries, -(10**30)), "k=-1000"),
        (lambda: index.search([["a"] * DIM]), "numbers"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert index.search(queries[0], 4).rows.shape == (1, 4), "one vector is a batch of one"
    assert index.search(queries[:0], 4).rows.shape == (0, 4)
    zero = index.search(np.zeros((1, DIM)), 5)
    assert np.allclose(zero.scores, 0) and len(zero.ids[0]) == 5, "a query of zeros scores 0 with everything"


def test_k_larger_than_the_index(queries):
    index = Index.build(Embeddings(queries[:4], list("abcd")))
    for k in (10, 10**9, 99999999999999999999, np.int64(5)):
        found = index.search(queries[:1], k)
        assert found.rows.shape == found.scores.shape == (1, 4) and sorted(found.ids[0]) == list("abcd")
    found = index.search(queries[:1], 10**9, where=np.array([True, False, False, True]))
    assert found.rows.shape == (1, 4) and sorted(found.ids[0]) == ["a", "d"] and (found.rows[0, 2:] == -1).all()


def test_k_as_large_as_the_index(index, queries):
    found = index.search(queries[:2], 10**9)
    assert found.rows.shape == (2, COUNT) and found.rows[0, 0] == index.search(queries[0], 1).rows[0, 0]


def test_ties_come_in_row_order():
    vectors = np.tile(np.eye(4, dtype=np.float32), (50, 1))
    index = Index.build(Embeddings(vectors, [str(n) for n in range(200)]))
    assert index.search(np.eye(4)[1], 50).rows[0].tolist() == list(range(1, 200, 4))


def test_bad_builds(embeddings, vectors, catalog):
    broken = vectors[:10].copy()
    broken[7, 0] = np.nan
    ids = [f"i{n}" for n in range(10)]
    for call, message in [
        (lambda: Index.build(Embeddings(vectors[:0], [])), "nothing to index"),
        (lambda: Index.build(Embeddings(broken, ids)), "item 'i7': NaN"),
        (lambda: Index.build(embeddings, kind="hnws"), "'hnws'.*'hnsw'"),
        (lambda: Index.build(embeddings, metric="cosin"), "'cosin'.*'cosine'"),
        (lambda: Index.build(embeddings, lnks=3), "setting 'lnks'.*'links'"),
        (lambda: Index.build(Embeddings(vectors[:10], ids), kind="ivfpq"), "needs at least 624"),
        (lambda: Index.build(embeddings, memory=1000), "no index fits into 1000 bytes"),
        (lambda: Index.build(Embeddings(vectors[:2], ["i1", "other"]), catalog=catalog), "'other'.*no row in catalogue 'toy'"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_zero_vectors_are_kept(vectors):
    some = vectors[:700].copy()
    some[3] = 0
    for kind in KINDS:
        index = Index.build(Embeddings(some, [str(n) for n in range(700)]), kind=kind)
        assert index.search(some[:10], 1).ids[5] == ["5"] and np.isfinite(index.search(some, 3).scores).all()


def test_dot_is_not_cosine(vectors):
    some = vectors[:500].copy()
    some[9] *= 100
    ids = [str(n) for n in range(500)]
    assert Index.build(Embeddings(some, ids), metric="dot").search(some[9], 1).scores[0, 0] > 10 * (some[8] ** 2).sum()
    assert abs(Index.build(Embeddings(some, ids)).search(some[9], 1).scores[0, 0] - 1) < 1e-5


def test_auto_says_why(embeddings):
    kind, why, _ = choose_kind(5_000, 512, 10**9)
    assert kind == "flat" and "5,000 x 512" in why and "misses nothing" in why
    assert choose_kind(1_200_000, 512, 8 * 10**9)[0] == "hnsw"
    kind, why, code = choose_kind(1_200_000, 512, 500 * 10**6)
    assert kind == "ivfpq" and "more than 476.8 MB" in why and code == 128
    assert choose_kind(1_200_000, 512, 120 * 10**6)[2] < 128, "less memory, shorter codes"
    with pytest.raises(InputError, match="no index fits into"):
        choose_kind(1_200_000, 512, 10**6)
    assert "exact search" in Index.build(embeddings).why


@pytest.mark.parametrize("kind", KINDS)
def test_memory_estimate_is_near_the_truth(saved, kind):
    index = Index.load(saved / kind)
    actual = (saved / kind / "engine.faiss").stat().st_size
    assert 0.7 < bytes_needed(kind, len(index), DIM) / actual < 1.5


def test_save_and_load(index, queries, tmp_path):
    index.remove(["i3", "i4"])
    index.add(["new"], queries[:1], {"brand": ["b7"]})
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index")
    a, b = index.search(queries, 20), again.search(queries, 20)
    assert np.array_equal(a.rows, b.rows) and np.allclose(a.scores, b.scores, atol=1e-6) and a.ids == b.ids
    assert again.why == index.why and again.measured == index.measured and repr(again) == repr(index)
    again.add(["more"], queries[5:6])
    again.remove(["new"])
    again.save(tmp_path / "index", replace=True)
    assert Index.load(tmp_path / "index").search(queries[5:6], 1).ids == [["more"]]
    with pytest.raises(InputError, match="exists already"):
        again.save(tmp_path / "index")


def test_damaged_files(index, tmp_path):
    for name in ["engine.faiss", "items.parquet", "index.json"] + ["vectors.npy"] * (index.kind == "ivfpq"):
        index.save(tmp_path / name)
        path = tmp_path / name / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(InputError, match=name):
            Index.load(tmp_path / name)
        if name != "index.json":
            path.write_bytes(content[:-8] + bytes(8 * [255]))
            with pytest.raises(InputError, match=f"{name}.*checksum"):
                Index.load(tmp_path / name)
        path.unlink()
        with pytest.raises(InputError, match=f"{name}.*(missing|not found)"):
            Index.load(tmp_path / name)
    with pytest.raises(InputError, match="not found; expected a folder"):
        Index.load(tmp_path / "nowhere")


def test_index_json_of_something_else(index, tmp_path):
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    changes = [{"version": 99}, {"kind": "ann"}, {"kind": ["flat"]}, {"dim": DIM + 1}, {"metric": "l2"}, {"model": 3}]
    changes += [{"files": files} for files in ({}, 5, {"engine.faiss": 7}, {"engine.faiss": {"bytes": None, "sha256": 1}})]
    changes += [{"settings": {"effort": "x"}}, {"measured": {"curve": [3]}}, {"measured": 3}]
    for content in [*({**about, **change} for change in changes), [], 5, None]:
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match="index"):
            Index.load(tmp_path / "index")
    for key in ("metric", "dim", "settings", "why", "measured", "files"):
        path.write_text(json.dumps({k: v for k, v in about.items() if k != key}), encoding="utf-8")
        with pytest.raises(InputError, match=r"index.json: .*build|engine.faiss: "):
            Index.load(tmp_path / "index")
    path.write_text(json.dumps({k: v for k, v in about.items() if k != "model"}), encoding="utf-8")
    assert Index.load(tmp_path / "index").model == {}, "an index of an earlier version opens"


def test_full_disk_while_saving_keeps_the_old_index(index, tmp_path, queries, monkeypatch):
    import faiss

    def full(*_):
        raise RuntimeError("Error in write: No space left on device")

    index.save(tmp_path / "index")
    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(InputError, match=r"index: disk full: needs .*make room, then the same command goes on"):
        index.save(tmp_path / "index", replace=True)
    monkeypatch.undo()
    assert len(Index.load(tmp_path / "index")) == len(index)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    if index.kind == "ivfpq":
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full")), raising=False)
        with pytest.raises(InputError, match="index: disk full"):
            index.save(tmp_path / "index", replace=True)
        assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_index_remembers_its_model(tmp_path, vectors):
    from product_retrieval.embeddings import describe_encoder

    class Model:
        name, dim, size, transform = "mine", DIM, 0, None

        def __init__(self, scale=1):
            self.scale = scale

    made = Embeddings(vectors[:50], [str(n) for n in range(50)], {**describe_encoder(Model()), "catalog": "toy"})
    Index.build(made).save(tmp_path / "index")
    index = Index.load(tmp_path / "index")
    assert index.model == describe_encoder(Model())
    index.check_encoder(Model())
    with pytest.raises(InputError, match=r"encoder 'mine': the index was built with 'mine', and weights differs"):
        index.check_encoder(Model(scale=2))
    unknown = Index.build(Embeddings(vectors[:50], [str(n) for n in range(50)]))
    assert unknown.model == {}
    unknown.check_encoder(Model())


def test_killed_while_saving_leaves_the_old_or_the_new_index(saved, tmp_path, queries):
    index = Index.load(saved / "hnsw")
    index.save(tmp_path / "index")
    rng = np.random.default_rng(0)
    for trial in range(6):
        child = os.fork()
        if child == 0:
            index.add([f"n{trial}"], queries[:1])
            index.save(tmp_path / "index", replace=True)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(Index.load(tmp_path / "index")) in (COUNT, COUNT + 1)


def test_exact_search_in_blocks_equals_one_block(vectors, queries, monkeypatch):
    import product_retrieval.search as module

    slots = np.arange(0, COUNT, 3)
    whole = exact_search(queries, 20, slots, lambda part: vectors[part])
    monkeypatch.setattr(module, "BLOCK", 700)
    parts = exact_search(queries, 20, slots, lambda part: vectors[part])
    assert np.array_equal(whole[1], parts[1]) and np.allclose(whole[0], parts[0], rtol=1e-5)


def test_same_inputs_same_index(vectors, queries):
    embeddings = Embeddings(vectors[:2000], [str(n) for n in range(2000)])
    for kind in ("hnsw", "ivfpq"):
        a, b = (Index.build(embeddings, kind=kind, target=0.5) for _ in range(2))
        if kind == "ivfpq" or os.environ.get("OMP_NUM_THREADS") == "1":
            assert np.array_equal(a.search(queries, 10).rows, b.search(queries, 10).rows)


def test_float16_memory_map(vectors, queries, tmp_path):
    vectors = vectors[:2000]
    Embeddings(vectors.astype(np.float16), [f"i{n}" for n in range(2000)]).save(tmp_path / "e")
    found = Embeddings.open(tmp_path / "e")
    for kind in KINDS:
        rows = Index.build(found, kind=kind).search(queries, 10).rows
        assert recall(rows, truth(queries, vectors, 10)) > 0.93


def test_torch_tensors():
    import torch

    assert as_vectors(torch.ones(2, 3, requires_grad=True)).shape == (2, 3)
    assert as_vectors(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == np.float32
