"""The ensemble: whitening against faiss, scikit-learn and numpy; fusion by hand; streams, files, memory, bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from product_retrieval.core import InputError, recipe_path
from product_retrieval.embeddings import Embeddings
from product_retrieval.evaluation import positives_from_lists, rank
from product_retrieval.search import Index, clustered_vectors, normalise
from product_retrieval.training import load_recipe
from product_retrieval.v2l import ensemble as module
from product_retrieval.v2l.ensemble import (
    KINDS,
    RULES,
    Ensemble,
    EnsembleConfig,
    EnsembleRecipe,
    Member,
    Panel,
    Whitening,
    alone,
    average_over,
    build_ensemble,
    choose_weights,
    complementarity,
    concatenate,
    curve,
    fuse_folders,
    fuse_ranks,
    fuse_scores,
    ledoit_wolf,
    member_weights,
    streamed_covariance,
    submit_eproduct,
    train_member,
)

repository = Path(__file__).resolve().parents[1]


def vectors(items=300, dim=12, seed=0):
    "Correlated, off-centre, not of length 1."
    random = np.random.default_rng(seed)
    return (random.normal(size=(items, dim)) @ random.normal(size=(dim, dim)) + random.normal(size=dim)).astype(np.float32)


def folder(path, table, ids=None, model="a", **meta):
    "A folder of embeddings."
    ids = [f"i{n}" for n in range(len(table))] if ids is None else ids
    about = {"model": model, "weights": f"hash of {model}", "preprocessing": "none", **meta}
    Embeddings(table, ids, about).save(path)
    return path


@pytest.fixture
def three(tmp_path):
    "Gallery and query folders of three members with 12, 8 and 20 dimensions."
    sides = {}
    for side, items, start in (("gallery", 300, 0), ("query", 40, 100)):
        tables = [vectors(items, dim, start + n) for n, dim in enumerate((12, 8, 20))]
        sides[side] = [folder(tmp_path / f"m{n}" / side, table, model=f"m{n}") for n, table in enumerate(tables)]
    return sides


# Whitening


def covariance_of(table):
    return np.cov(table.astype(np.float64), rowvar=False, bias=True)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_covariance_is_the_identity(kind):
    table = vectors(500, 12)
    white = Whitening.fit(table, kind, shrinkage=0).apply(table)
    assert np.abs(covariance_of(white) - np.eye(12)).max() < 1e-4 and np.abs(white.mean(axis=0)).max() < 1e-4


def test_a_shorter_pca_is_white_too_and_says_what_it_kept():
    table = vectors(500, 12)
    found = Whitening.fit(table, "pca", dim=5, shrinkage=0)
    values = np.sort(np.linalg.eigvalsh(covariance_of(table)))[::-1]
    assert found.dim == 5 and np.isclose(found.kept, values[:5].sum() / values.sum(), atol=1e-5)
    assert np.abs(covariance_of(found.apply(table)) - np.eye(5)).max() < 1e-4


def test_pca_whitening_equals_faiss_up_to_sign():
    faiss = pytest.importorskip("faiss")
    table = vectors(400, 12)
    judge = faiss.PCAMatrix(12, 7, -0.5)
    judge.train(table)
    theirs, ours = judge.apply(table), Whitening.fit(table, "pca", dim=7, shrinkage=0).apply(table)
    ratio = theirs.std(axis=0).mean()  # faiss divides by its own count of the rows
    signs = np.sign((theirs * ours).sum(axis=0))
    assert np.abs(theirs / ratio - ours * signs).max() < 5e-3


def test_pca_whitening_equals_scikit_learn_up_to_sign():
    decomposition = pytest.importorskip("sklearn.decomposition")
    table = vectors(400, 12)
    theirs = decomposition.PCA(7, whiten=True, svd_solver="full").fit_transform(table.astype(np.float64))
    theirs *= np.sqrt(400 / 399)  # they divide by n - 1
    ours = Whitening.fit(table, "pca", dim=7, shrinkage=0).apply(table)
    assert np.abs(theirs - ours * np.sign((theirs * ours).sum(axis=0))).max() < 1e-3


def test_zca_equals_the_inverse_root_of_the_covariance():
    table = vectors(400, 6)
    values, axes = np.linalg.eigh(covariance_of(table))
    root = axes @ np.diag(values**-0.5) @ axes.T
    found = Whitening.fit(table, "zca", shrinkage=0)
    assert np.abs(found.matrix - root).max() < 1e-4 * np.abs(root).max()


def test_zca_and_full_pca_give_the_same_cosines():
    table = vectors(200, 9)
    a, b = (normalise(Whitening.fit(table, kind, shrinkage=0).apply(table)) for kind in ("pca", "zca"))
    assert np.abs(a @ a.T - b @ b.T).max() < 1e-4


@pytest.mark.parametrize("items", [30, 300])
def test_shrinkage_equals_scikit_learn(items):
    covariance = pytest.importorskip("sklearn.covariance")
    table = vectors(items, 40, 3)
    judge = covariance.LedoitWolf().fit(table.astype(np.float64))
    count, mean, ours = streamed_covariance([table[:11], table[11:]])
    assert count == items and np.allclose(mean, table.mean(axis=0), atol=1e-4)
    assert np.isclose(ledoit_wolf([table[:11], table[11:]], mean, ours), judge.shrinkage_, rtol=1e-5)
    assert np.allclose(ours, covariance_of(table), atol=1e-6 * np.abs(ours).max())


def test_the_covariance_of_blocks_far_from_zero_does_not_cancel():
    table = vectors(1000, 4).astype(np.float64) * 1e-3 + 1e4
    _, _, found = streamed_covariance(table[start : start + 7] for start in range(0, 1000, 7))
    assert np.allclose(found, covariance_of(table), rtol=1e-6, atol=1e-12)


def test_fewer_rows_than_dimensions():
    few = vectors(20, 40)
    with pytest.raises(InputError, match=r"20 rows for 40 dimensions.*shrinkage = 'auto'.*dim below 20"):
        Whitening.fit(few, "pca", shrinkage=0, where="x")
    fallback = Whitening.fit(few, "pca")
    assert 0 < fallback.shrinkage < 1 and fallback.dim == 40 and np.isfinite(fallback.apply(few)).all()
    assert np.abs(covariance_of(Whitening.fit(few, "pca", dim=10, shrinkage=0).apply(few)) - np.eye(10)).max() < 1e-4


def test_directions_without_variance():
    table = np.hstack([vectors(100, 3), np.ones((100, 2), np.float32)])
    assert Whitening.fit(table, "pca", shrinkage=0).dim == 3, "constant columns carry nothing"
    white = Whitening.fit(table, "zca", shrinkage=0).apply(table)
    assert np.isfinite(white).all() and np.abs(white[:, 3:]).max() < 1e-3
    with pytest.raises(InputError, match="differ in 3 directions only, 4 are asked for"):
        Whitening.fit(table, "pca", dim=4, shrinkage=0)
    with pytest.raises(InputError, match="differ in 0 directions only"):
        Whitening.fit(np.ones((9, 3), np.float32))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "pac"}, "did you mean 'pca'"),
        ({"dim": 13}, "dim = 13, but the vectors have 12 dimensions"),
        ({"kind": "zca", "dim": 4}, "only 'pca' shortens vectors"),
        ({"dim": -1}, "dim = -1"),
        ({"shrinkage": 1.5}, "expected a number from 0 to 1"),
        ({"shrinkage": "atuo"}, "expected a number from 0 to 1, or 'auto'"),
        ({"shrinkage": True}, "expected a number from 0 to 1"),
    ],
)
def test_whitening_settings_that_mean_nothing(options, message):
    with pytest.raises(InputError, match=message):
        Whitening.fit(vectors(), **options)


# Concatenation


def test_the_dot_product_is_the_weighted_mean_of_the_cosines():
    queries, gallery = ([normalise(vectors(n, d, n + d)) for d in (12, 8, 20)] for n in (5, 30))
    weights = [0.5, 0.2, 0.3]
    fused = concatenate(queries, weights) @ concatenate(gallery, weights).T
    expected = sum(w * q @ g.T for w, q, g in zip(weights, queries, gallery, strict=True))
    assert np.abs(fused - expected).max() < 1e-6
    assert np.allclose(np.linalg.norm(concatenate(gallery, weights), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "weights, message",
    [([1, -0.5, 1], "member 1 has -0.5, expected 0 or more"), ([1, 2], "2 numbers for 3 members"),
     ([0, 0, 0], "all are 0"), ([1, float("nan"), 1], "member 1 has nan")],
)  # fmt: skip
def test_bad_weights(weights, message, three):
    with pytest.raises(InputError, match=message):
        member_weights(weights, 3)
    with pytest.raises(InputError, match=message):
        Ensemble.fit(three["gallery"], EnsembleConfig(weights=[float(w) for w in weights]))


# The ensemble


@pytest.mark.parametrize("kind", ["none", "centre", "pca", "zca"])
def test_streamed_equals_in_memory(kind, three, tmp_path, monkeypatch):
    config = EnsembleConfig(whitening=kind, weights=[1.0, 2.0, 3.0])
    fitted = Ensemble.fit(three["gallery"], config)
    whole = fitted.transform(three["gallery"])
    tables = [normalise(np.load(f / "vectors.npy")) for f in three["gallery"]]
    by_hand = [normalise(Whitening.fit(t, kind).apply(t)) for t in tables]
    assert np.abs(whole.vectors - concatenate(by_hand, [1, 2, 3])).max() < 1e-5
    monkeypatch.setattr(module, "NUMBERS", 700)
    streamed = fitted.transform(three["gallery"], tmp_path / "out")
    assert np.abs(streamed.vectors - whole.vectors).max() < 1e-6 and streamed.ids == whole.ids


def test_scores_are_the_weighted_sum_of_the_members_scores(three):
    fitted = Ensemble.fit(three["gallery"], EnsembleConfig(weights=[3.0, 1.0, 1.0]))
    fused = fitted.transform(three["query"]).vectors @ fitted.transform(three["gallery"]).vectors.T
    panel = Panel.of(fitted, three["query"], three["gallery"], positives_from_lists([[0]] * 40))
    assert np.abs(fused - np.tensordot(fitted.weights, panel.cosines, axes=1)).max() < 1e-5
    assert np.array_equal(fused.argmax(axis=1), panel.ranking(fitted.weights, k=1)[:, 0])


def test_the_result_is_a_folder_that_an_index_takes(three, tmp_path):
    fitted = Ensemble.fit(three["gallery"])
    gallery = fitted.transform(three["gallery"], tmp_path / "gallery", dtype="float16")
    queries = fitted.transform(three["query"], tmp_path / "query")
    again = Embeddings.open(tmp_path / "gallery", verify=True)
    assert again.vectors.dtype == np.float16 and again.dim == fitted.dim == 40 and len(again) == 300
    assert [part["name"] for part in again.meta["parts"]] == [p.name for p in fitted.parts]
    assert again.meta["weights"] == queries.meta["weights"] and again.meta["model"] == "ensemble of 3"
    assert len(again.meta["folders"]) == 3 and again.meta["parts"][0]["whitening"]["items"] == 300
    found = Index.build(gallery).search(np.asarray(queries.vectors), 5)
    assert (found.rows[:, 0] == rank(queries.vectors, gallery.vectors.astype(np.float32), k=1)[:, 0]).mean() > 0.95
    with pytest.raises(InputError, match="exists already"):
        fitted.transform(three["gallery"], tmp_path / "gallery")
    with pytest.raises(InputError, match="did you mean 'float16'"):
        fitted.transform(three["gallery"], dtype="float61")


def test_statistics_come_from_the_gallery_alone(three):
    fitted = Ensemble.fit(three["gallery"])
    one = fitted.transform(three["query"]).vectors
    before = [part.whitening.matrix.copy() for part in fitted.parts]
    some = [Embeddings.open(f) for f in three["query"]]
    few = [Embeddings(e.vectors[:3], e.ids[:3], e.meta) for e in some]
    assert np.abs(fitted.transform(few).vectors - one[:3]).max() < 1e-6, "a query's vector does not depend on the other queries"
    assert all(np.array_equal(a, part.whitening.matrix) for a, part in zip(before, fitted.parts, strict=True))


def test_saved_and_loaded(three, tmp_path):
    fitted = Ensemble.fit(three["gallery"], EnsembleConfig(dim=6, weights=[1.0, 0.5, 2.0]))
    fitted.save(tmp_path / "kept")
    loaded = Ensemble.load(tmp_path / "kept")
    assert np.array_equal(loaded.transform(three["query"]).vectors, fitted.transform(three["query"]).vectors)
    assert loaded.config == fitted.config and sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "ensemble.json", "ensemble.safetensors"]  # fmt: skip
    with pytest.raises(InputError, match="exists already"):
        fitted.save(tmp_path / "kept")
    about = json.loads((tmp_path / "kept" / "ensemble.json").read_text())
    (tmp_path / "kept" / "ensemble.json").write_text(json.dumps({**about, "config": {**about["config"], "weights": [1, 1, 1]}}))
    with pytest.raises(InputError, match="do not belong together"):
        Ensemble.load(tmp_path / "kept")
    (tmp_path / "kept" / "ensemble.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        Ensemble.load(tmp_path / "kept")
    with pytest.raises(InputError, match="not found"):
        Ensemble.load(tmp_path / "nowhere")


def test_other_weights_keep_the_statistics(three):
    fitted = Ensemble.fit(three["gallery"])
    other = fitted.reweighted([0, 1, 1])
    assert other.weights.tolist() == [0, 0.5, 0.5] and fitted.weights.tolist() == [1 / 3] * 3
    assert other.parts[1].whitening is fitted.parts[1].whitening
    assert not other.transform(three["query"]).vectors[:, :12].any()


def test_other_orders_are_aligned_by_id(three, tmp_path):
    whole = Ensemble.fit(three["gallery"])
    shuffled = Embeddings.open(three["gallery"][1])
    order = np.random.default_rng(0).permutation(300)
    mixed = folder(tmp_path / "m1" / "mixed", np.asarray(shuffled.vectors)[order], [shuffled.ids[n] for n in order], "m1")
    folders = [three["gallery"][0], mixed, three["gallery"][2]]
    again = Ensemble.fit(folders)
    result = again.transform(folders)
    assert result.ids == [f"i{n}" for n in range(300)]
    before = whole.transform(three["gallery"]).vectors
    assert np.abs(result.vectors @ result.vectors.T - before @ before.T).max() < 1e-4


def test_other_items_are_refused_by_name(three, tmp_path):
    short = folder(tmp_path / "short", vectors(299, 8), [f"i{n}" for n in range(300) if n != 17], "m1")
    with pytest.raises(InputError, match=r"short: item 'i17' of .*m0/gallery is missing \(1 such\)"):
        Ensemble.fit([three["gallery"][0], short])
    long = folder(tmp_path / "long", vectors(301, 8), [f"i{n}" for n in range(300)] + ["extra"], "m1")
    with pytest.raises(InputError, match=r"long: item 'extra' is not in .*m0/gallery"):
        Ensemble.fit([three["gallery"][0], long])


@pytest.mark.parametrize("value, what", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0.0, "all zeros")])
def test_broken_rows_name_folder_and_row(value, what, three, tmp_path):
    table = vectors(300, 8)
    table[123] = value
    bad = folder(tmp_path / "bad", table, model="m1")
    with pytest.raises(InputError, match=f"bad: row 123 .*{what}"):
        Ensemble.fit([three["gallery"][0], bad])
    order = np.arange(300)[::-1]
    turned = folder(tmp_path / "turned", table[order], [f"i{n}" for n in order], "m1")
    with pytest.raises(InputError, match=f"turned: row {299 - 123} .*{what}"):
        Ensemble.fit([three["gallery"][0], turned])


def test_a_member_may_abstain(three, tmp_path):
    tables = {side: vectors(n, 8, n) for side, n in (("gallery", 300), ("query", 40))}
    tables["query"][5] = 0
    tables["gallery"][7] = 0
    folders = {side: [three[side][0], folder(tmp_path / "w" / side, t, model="w")] for side, t in tables.items()}
    fitted = Ensemble.fit(folders["gallery"], EnsembleConfig(zeros="abstain"))
    queries, gallery = (fitted.transform(folders[side]).vectors for side in ("query", "gallery"))
    assert not queries[5, 12:].any() and not gallery[7, 12:].any() and fitted.parts[1].whitening.items == 299
    assert np.isclose(np.linalg.norm(queries[5]), np.sqrt(0.5)) and np.isclose(np.linalg.norm(queries[6]), 1)
    with pytest.raises(InputError, match="did you mean 'abstain'"):
        EnsembleConfig(zeros="abstains")


def test_queries_of_another_model(three, tmp_path):
    fitted = Ensemble.fit(three["gallery"])
    with pytest.raises(InputError, match=r"m1/query: member 0 \('m0/gallery'\) was fitted on 12 dimensions, this folder has 8"):
        fitted.transform([three["query"][1], three["query"][0], three["query"][2]])
    other = folder(tmp_path / "other", vectors(40, 12, 9), model="m9")
    with pytest.raises(InputError, match=r"other: member 0 .* was fitted with model 'm0', this folder has 'm9'"):
        fitted.transform([other, *three["query"][1:]])
    retrained = folder(tmp_path / "retrained", vectors(40, 12, 9), model="m0", weights="another hash")
    with pytest.raises(InputError, match="fitted with weights 'hash of m0', this folder has 'another hash'"):
        fitted.transform([retrained, *three["query"][1:]])
    with pytest.raises(InputError, match="2 for an ensemble of 3 members"):
        fitted.transform(three["query"][:2])


def test_members_by_name(three):
    named = {side: dict(zip("abc", folders, strict=True)) for side, folders in three.items()}
    fitted = Ensemble.fit(named["gallery"])
    turned = dict(reversed(named["query"].items()))
    assert np.array_equal(fitted.transform(turned).vectors, fitted.transform(three["query"]).vectors)
    with pytest.raises(InputError, match="member 'd' stands on one side only"):
        fitted.transform({**named["query"], "d": three["query"][0]})


def test_one_member_is_whitening_alone(three):
    fitted = Ensemble.fit(three["gallery"][:1], EnsembleConfig(dim=4))
    table = normalise(np.load(three["gallery"][0] / "vectors.npy"))
    by_hand = normalise(Whitening.fit(table, "pca", 4).apply(table))
    assert np.abs(fitted.transform(three["gallery"][:1]).vectors - by_hand).max() < 1e-6


def test_missing_and_wrong_folders(three, tmp_path):
    with pytest.raises(InputError, match="nowhere: not found"):
        Ensemble.fit([three["gallery"][0], tmp_path / "nowhere"])
    with pytest.raises(InputError, match="none given"):
        Ensemble.fit([])
    with pytest.raises(InputError, match="expected a list of folders"):
        Ensemble.fit(three["gallery"][0])
    with pytest.raises(InputError, match=r"m1/gallery: dim = 10, but the vectors have 8 dimensions"):
        Ensemble.fit(three["gallery"], EnsembleConfig(dim=10))


def test_a_stopped_transform_leaves_nothing(three, tmp_path, monkeypatch):
    fitted = Ensemble.fit(three["gallery"])

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_fill", fail)
    with pytest.raises(KeyboardInterrupt):
        fitted.transform(three["gallery"], tmp_path / "out" / "fused")
    assert list((tmp_path / "out").iterdir()) == []


MEASURED = """
import sys, tracemalloc, numpy as np
from pathlib import Path
import product_retrieval.v2l.ensemble as module
module.NUMBERS = 250_000
root = Path(sys.argv[1])
folders = [root / f"m{n}" for n in range(6)]
tracemalloc.start()
fitted = module.Ensemble.fit(folders, module.EnsembleConfig(dim=64))
fitted.transform(folders, root / "out", dtype="float16")
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_members_times_items(tmp_path):
    "Six members of 20,000 x 128 are 61 MB on disk; what is allocated in blocks stays far below."
    ids = [f"i{n}" for n in range(20_000)]
    for n in range(6):
        folder(tmp_path / f"m{n}", clustered_vectors(20_000, 128, 200, seed=n), ids, f"m{n}")
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = 6 * 20_000 * 128 * 4
    assert int(done.stdout) < whole / 3, f"{int(done.stdout) / 1e6:.0f} MB of {whole / 1e6:.0f} MB"


# Panel and weights


def toy_panel(queries=60, gallery=80, noises=(0.5, 0.5, 3.0), seed=0):
    "Members that see the right item through noise; the last one sees little else."
    random = np.random.default_rng(seed)
    right = random.integers(0, gallery, queries)
    truth = np.eye(gallery)[right]
    cosines = np.stack([truth + noise * random.normal(size=truth.shape) for noise in noises]).astype(np.float32)
    return Panel([f"m{n}" for n in range(len(noises))], cosines, positives_from_lists([[r] for r in right]))


def test_candidates_rank_as_the_whole_gallery(three):
    fitted = Ensemble.fit(three["gallery"])
    right = positives_from_lists([[n % 300] for n in range(40)])
    whole = Panel.of(fitted, three["query"], three["gallery"], right)
    some = Panel.of(fitted, three["query"], three["gallery"], right, depth=80, memory=1000)
    assert whole.rows is None and some.rows is not None and some.rows.shape[1] < 300
    assert np.array_equal(whole.ranking(k=10), some.ranking(k=10))
    assert np.allclose(choose_weights(some, "score", "MRR"), choose_weights(whole, "score", "MRR"), atol=0.05)
    with pytest.raises(InputError, match="for 3 queries, but the folders hold 40"):
        Panel.of(fitted, three["query"], three["gallery"], positives_from_lists([[0]] * 3))


def test_the_gradient_of_the_weights():
    optimize = pytest.importorskip("scipy.optimize")
    cosines, target = module._with_targets(toy_panel())
    point = np.array([2.0, 1.0, 0.5])
    numeric = optimize.approx_fprime(point, lambda w: module._listwise(w, cosines, target)[0], 1e-6)
    assert np.allclose(numeric, module._listwise(point, cosines, target)[1], atol=1e-5)


def test_fitted_weights_equal_a_search_over_a_grid():
    panel = toy_panel(noises=(0.5, 1.0))
    cosines, target = module._with_targets(panel)
    grid = np.linspace(0, 12, 121)
    costs = np.array([[module._listwise(np.array([a, b]), cosines, target)[0] for b in grid] for a in grid])
    a, b = np.unravel_index(costs.argmin(), costs.shape)
    assert np.abs(choose_weights(panel, "fit", strength=0) - np.array([grid[a], grid[b]]) / (grid[a] + grid[b])).max() < 0.02


def test_weights_find_the_member_that_knows_nothing():
    panel = toy_panel()
    assert choose_weights(panel).tolist() == [1 / 3] * 3
    by_score, fitted = choose_weights(panel, "score"), choose_weights(panel, "fit")
    assert by_score[2] < by_score[0] and fitted[2] < 0.1 and np.isclose(fitted.sum(), 1) and (fitted >= 0).all()
    assert np.allclose(choose_weights(panel, "fit", strength=1e6), 1 / 3, atol=1e-3), "strong pull: equal"
    assert panel.evaluate(fitted).values["MAR@10"] >= panel.evaluate().values["MAR@10"]
    assert set(RULES) == {"equal", "score", "fit"}
    with pytest.raises(InputError, match="did you mean 'fit'"):
        choose_weights(panel, "fti")
    with pytest.raises(InputError, match="strength = -1"):
        choose_weights(panel, "fit", strength=-1)
    empty = Panel(panel.names, panel.cosines, positives_from_lists([[]] * 60))
    with pytest.raises(InputError, match="no validation query has a right answer"):
        choose_weights(empty, "fit")


# Fusion


def test_reciprocal_ranks_by_hand():
    a, b = np.array([[7, 3, 5]]), np.array([[3, 9, -1]])
    rows, scores = fuse_ranks([a, b], k=4)
    assert rows.tolist() == [[3, 7, 9, 5]]
    assert np.allclose(scores * 2, [[1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]])
    assert fuse_ranks([a, b], weights=[1, 0], k=2)[0].tolist() == [[7, 3]]


def test_equal_sums_stand_in_row_order_and_short_lists_are_filled_up():
    rows, scores = fuse_ranks([np.array([[4, -1], [1, 2]]), np.array([[2, -1], [1, 2]])], k=5)
    assert rows.tolist() == [[2, 4], [1, 2]]
    rows, scores = fuse_ranks([np.array([[4, -1], [1, 2]]), np.array([[4, -1], [1, 2]])], k=5)
    assert rows.tolist() == [[4, -1], [1, 2]] and scores[0, 1] == -np.inf


def test_scores_by_hand():
    rows, scores = np.array([[0, 1, 2]]), np.array([[0.9, 0.5, 0.1]])
    other_rows, other = np.array([[2, 1, 0]]), np.array([[30.0, 20.0, 10.0]])
    found, sums = fuse_scores([(rows, scores), (other_rows, other)], scale="minmax")
    assert found.tolist() == [[0, 1, 2]] and np.allclose(sums, 0.5)
    found, sums = fuse_scores([(rows, scores), (other_rows, other)], scale="none")
    assert found.tolist() == [[2, 1, 0]] and np.isclose(sums[0, 0], 10)
    found, sums = fuse_scores([(rows, scores), (other_rows[:, :2], other[:, :2])], scale="zscore")
    spread = np.sqrt((0.4**2 + 0 + 0.4**2) / 3)  # of 0.9, 0.5, 0.1; that of 30 and 20 is 5
    assert found.tolist() == [[0, 2, 1]] and np.allclose(sums[0], [0.8 / spread / 2, 10 / 5 / 2, 0.4 / spread / 2])


def test_score_fusion_of_whole_lists_is_the_sum_of_the_normalised_tables():
    random = np.random.default_rng(0)
    tables = [random.normal(size=(2100, 30)) for _ in range(3)]
    lists = [(np.argsort(-t, axis=1), -np.sort(-t, axis=1)) for t in tables]
    rows, scores = fuse_scores(lists, [1, 2, 3], k=30)
    units = [(t - t.mean(axis=1, keepdims=True)) / t.std(axis=1, keepdims=True) for t in tables]
    total = units[0] + 2 * units[1] + 3 * units[2]
    assert np.array_equal(rows, np.argsort(-total, axis=1, kind="stable"))
    assert np.allclose(np.diff(scores, axis=1), np.diff(-np.sort(-total, axis=1) / 6, axis=1), atol=1e-5)


def test_constant_and_empty_lists_say_nothing():
    flat, some = (np.array([[3, 1]]), np.array([[0.5, 0.5]])), (np.array([[1, 2]]), np.array([[0.9, 0.1]]))
    empty = (np.array([[-1, -1]]), np.array([[-np.inf, -np.inf]]))
    assert fuse_scores([flat, some, empty])[0][0, 0] == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fuse_ranks([]), "no lists"),
        (lambda: fuse_ranks([np.array([[0.5]])]), "list 0 is float64"),
        (lambda: fuse_ranks([np.array([[1]]), np.array([[1], [2]])]), "list 1 .*one line for each query"),
        (lambda: fuse_ranks([np.array([[1]])], k=0), "k = 0"),
        (lambda: fuse_scores([(np.array([[1, 2]]), np.array([[0.5, np.nan]]))]), "list 0: query 0 has NaN"),
        (lambda: fuse_scores([(np.array([[1, 2]]), np.array([[0.5]]))]), "differ in shape"),
        (lambda: fuse_scores([(np.array([[1]]), np.array([[0.5]]))], scale="zcore"), "did you mean 'zscore'"),
        (lambda: fuse_ranks([np.array([[1]])], weights=[-1]), "member 0 has -1"),
    ],
)
def test_fusion_refuses_nonsense(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_query_keeps_k_results_over_blocks():
    random = np.random.default_rng(0)
    lists = [np.argsort(random.random((2500, 40)), axis=1) for _ in range(2)]
    rows, _ = fuse_ranks(lists, k=7)
    for query in (0, 1023, 1024, 2499):
        sums = np.zeros(40)
        for line in lists:
            sums[line[query]] += 1 / (61 + np.arange(40))
        assert rows[query].tolist() == np.lexsort((np.arange(40), -sums))[:7].tolist()


# Curve and grid


def test_the_curve_counts_all_subsets_of_few_members():
    panel = toy_panel(noises=(0.8, 0.9, 1.0, 1.1))
    table = curve(panel)
    assert table["subsets"].tolist() == [4, 6, 4, 1] and table.index.tolist() == [1, 2, 3, 4]
    assert np.isclose(table.loc[1, "mean"], alone(panel).mean()) and table.loc[1, "highest"] == alone(panel).max()
    assert np.isclose(table.loc[4, "mean"], panel.evaluate().values["MAR@10"])
    assert curve(panel, draws=3)["subsets"].tolist() == [3, 3, 3, 1]
    assert curve(panel, members=[2])["mean"].tolist() == [alone(panel)[2]]


def test_two_families_with_errors_of_their_own_complement_each_other():
    random = np.random.default_rng(1)
    right, gallery = random.integers(0, 60, 150), 60
    truth, shared = np.eye(gallery)[right], random.normal(size=(2, 150, gallery))
    members = [truth + shared[family] + 0.3 * random.normal(size=truth.shape) for family in (0, 0, 1, 1)]
    panel = Panel(list("abcd"), np.stack(members).astype(np.float32), positives_from_lists([[r] for r in right]))
    mixes = complementarity(panel, [0, 1], [2, 3], size=2)
    score = mixes.table["MAR@10"]
    assert list(mixes.table.index) == [(2, 0), (1, 1), (0, 2)] and mixes.table["subsets"].tolist() == [1, 4, 1]
    assert score[(1, 1)] > max(score[(2, 0)], score[(0, 2)]) + 0.05
    assert np.allclose(mixes.per_query[(2, 0)], average_over(panel, [(0, 1)])[0])
    assert (mixes.table["low"] <= score).all() and (score <= mixes.table["high"]).all()
    for first, second, size in (([0, 1], [1, 2], 2), ([0, 1], [2], 2), ([0], [1], 0)):
        with pytest.raises(InputError, match="two families without a common member"):
            complementarity(panel, first, second, size)


# Recipes


def small_recipe(**changes):
    overrides = {"size": 32, "dim": 8, "train": {"max_steps": 2, "epochs": 1}}
    members = [
        Member("net", recipe="tiny-first", overrides=overrides),
        Member("colours", "color-histogram", overrides={"bins": [4, 2, 2]}),
        Member("words", "title-words", family="language", overrides={"share": 0.5}),
    ]
    return EnsembleRecipe(members, fuse=EnsembleConfig(zeros="abstain"), **changes)


def test_the_recipe_of_twenty():
    recipe = load_recipe(recipe_path("v2l-20"), EnsembleRecipe)
    families = [member.family for member in recipe.members]
    assert len(recipe.members) == 20 and set(families) == {"vision", "language"}
    assert {m.kind for m in recipe.members} <= set(KINDS)
    assert families.count("vision") >= 8 and families.count("language") >= 4


@pytest.mark.parametrize("name", ["tiny-ensemble", "shelf-ensemble", "v2l-20"])
def test_members_of_the_recipes_can_be_read(name):
    "Every member's recipe with its overrides fits the dataclass of its kind."
    for member in load_recipe(recipe_path(name), EnsembleRecipe).members:
        wing = repository / "product_retrieval" / "v2l"
        if member.kind in ("coarse", "fine", "clip") and not (wing / f"{member.kind}.py").exists():
            pytest.skip(f"kind {member.kind!r} is not in the package")
        assert module._recipe_of(member, module._function_of(member.kind)) is not None


def test_build_from_catalogue_to_fused_folders(tiny_shelf, tmp_path):
    told = []
    built = build_ensemble(small_recipe(how="fit"), tiny_shelf, tmp_path / "run", workers=0, report=told.append)
    assert told == ["training net", "training colours", "training words"]
    assert set(built.fused) == {"gallery", "query", "val_query", "val_gallery"}
    assert built.families == {"vision": [0, 1], "language": [2]} and built.validation.names == ["net", "colours", "words"]
    assert len(built.fused["gallery"]) == len(tiny_shelf.split("gallery"))
    assert np.isclose(built.ensemble.weights.sum(), 1)
    loaded = Ensemble.load(tmp_path / "run" / "ensemble")
    assert np.array_equal(loaded.transform(built.folders["query"]).vectors, built.fused["query"].vectors)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "members").rglob("*.safetensors")}
    again = build_ensemble(small_recipe(how="fit"), tiny_shelf, tmp_path / "run", workers=0, report=told.append)
    assert len(told) == 3 and stamps == {p: p.stat().st_mtime_ns for p in stamps}, "nothing is trained twice"
    assert np.array_equal(again.fused["query"].vectors, built.fused["query"].vectors)


def test_a_stopped_build_goes_on_with_the_next_member(tiny_shelf, tmp_path, monkeypatch):
    recipe = small_recipe()
    monkeypatch.setitem(KINDS, "title-words", "product_retrieval.v2l.ensemble:no_such_thing")
    with pytest.raises(InputError, match="no_such_thing is not there"):
        build_ensemble(recipe, tiny_shelf, tmp_path / "run", workers=0, report=lambda line: None)
    monkeypatch.undo()
    told = []
    build_ensemble(recipe, tiny_shelf, tmp_path / "run", workers=0, report=told.append)
    assert told == ["training words"]


def test_a_member_of_another_recipe_is_not_taken(tiny_shelf, tmp_path):
    member = Member("colours", "color-histogram", overrides={"bins": [4, 2, 2]})
    train_member(member, tiny_shelf, tmp_path)
    with pytest.raises(InputError, match=r"holds a member with bins \[4, 2, 2\], the recipe says \[6, 2, 2\]"):
        train_member(replace(member, overrides={"bins": [6, 2, 2]}), tiny_shelf, tmp_path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([], "at least one"),
        ([Member("a"), Member("a")], "no other member has"),
        ([Member("a/b")], "expected a file name"),
        ([Member("a", "frist")], "did you mean 'first'"),
        ([Member("a", "fine", after="b"), Member("b")], "after = 'b' is no earlier member"),
    ],
)
def test_recipes_that_cannot_be(members, message):
    with pytest.raises(InputError, match=message):
        EnsembleRecipe(members)


def test_overrides_are_checked(tiny_shelf, tmp_path):
    with pytest.raises(InputError, match="member 'net': unknown key 'sizes'; did you mean 'size'"):
        train_member(Member("net", recipe="tiny-first", overrides={"sizes": 32}), tiny_shelf, tmp_path)
    with pytest.raises(InputError, match="share = 2"):
        train_member(Member("w", "title-words", overrides={"share": 2.0}), tiny_shelf, tmp_path)
    with pytest.raises(InputError, match=r"how = 'best': unknown"):
        small_recipe(how="best")


# Whole folders


def test_three_folders_in_one_call_and_the_challenge_file(three, tmp_path):
    from product_retrieval.protocols import read_eproduct_submission

    fuse_folders(three["gallery"], tmp_path / "out", three["query"], EnsembleConfig(dim=6), dtype="float16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ensemble", "gallery", "query"]
    path = submit_eproduct(tmp_path / "out" / "query", tmp_path / "out" / "gallery", tmp_path / "submission.csv")
    found = read_eproduct_submission(path)
    assert len(found) == 40 and all(len(items) == 10 for items in found.item_ids)
    with pytest.raises(InputError, match="embed both with one model"):
        submit_eproduct(three["query"][0], tmp_path / "out" / "gallery", tmp_path / "other.csv")
    with pytest.raises(InputError, match="2 for an ensemble of 3"):
        fuse_folders(three["gallery"], tmp_path / "bad", three["query"][:2])
    assert not (tmp_path / "bad").exists()
