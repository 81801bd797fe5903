"""Re-ranking: the same ranking as the dense published algorithm, twins, lists, bad input."""

import faiss
import numpy as np
import pytest
from rerank_oracle import rerank_dense

from product_retrieval.core import InputError
from product_retrieval.rerank import (
    METRICS,
    _distances,
    augment_database,
    expand_queries,
    k_reciprocal,
    neighbours,
    rerank_lists,
)


def problem(seed):
    "A random problem: queries and gallery in clumps of any tightness, and settings."
    random = np.random.default_rng(seed)
    asked, stored, dim = random.integers(1, 30), random.integers(30, 200), random.integers(2, 64)
    centres = random.normal(size=(random.integers(2, 12), dim))
    vectors = centres[random.integers(0, len(centres), asked + stored)]
    vectors = vectors + random.normal(size=vectors.shape) * random.uniform(0.2, 1.5)
    k1, k2, weight = random.integers(1, 25), random.integers(1, 9), random.choice([0.1, 0.3, 0.5, 1])
    settings = {"k1": int(k1), "k2": int(k2), "weight": float(weight)}
    return vectors[:asked].astype(np.float32), vectors[asked:].astype(np.float32), settings


def unit(vectors):
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def same_order(rankings, dense, tolerance=1e-6):
    "The rankings sort the dense distances; two that are closer than the rounding of float32 may stand in either order."
    return bool((np.diff(np.take_along_axis(dense, rankings, 1), axis=1) >= -tolerance).all())


def differing(found, rankings, dense):
    "How many places differ; where they do, the dense distances must be a tie to all but rounding."
    gaps = np.take_along_axis(dense, found, 1) - np.take_along_axis(dense, rankings, 1)
    assert np.abs(gaps).max() < 1e-7
    return int((found != rankings).sum())


@pytest.mark.parametrize("seed", range(50))
def test_ranking_of_the_dense_algorithm(seed):
    queries, gallery, settings = problem(seed)
    dense, rankings = rerank_dense(unit(queries), unit(gallery), **settings)
    found, distances = k_reciprocal(queries, gallery, **settings, k=len(gallery))
    assert differing(found, rankings, dense) <= 2  # one pair of neighbours in a ranking, of up to 5,800 places
    np.testing.assert_allclose(distances, np.take_along_axis(dense, rankings, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_jaccard_alone(seed):
    "Without the original distance many items are almost equally far; their order may differ by rounding only."
    queries, gallery, settings = problem(seed)
    settings["weight"] = 0.0
    dense, _ = rerank_dense(unit(queries), unit(gallery), **settings)
    found, distances = k_reciprocal(queries, gallery, **settings, k=len(gallery))
    assert same_order(found, dense)
    np.testing.assert_allclose(distances, np.take_along_axis(dense, found, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_euclidean_distances(seed):
    queries, gallery, settings = problem(seed)
    dense, rankings = rerank_dense(queries, gallery, **settings)
    found, distances = k_reciprocal(queries, gallery, **settings, k=len(gallery), metric="euclidean")
    assert differing(found, rankings, dense) <= 2
    np.testing.assert_allclose(distances, np.take_along_axis(dense, rankings, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_ties_and_twins(seed):
    "Points of a grid, each up to four times: equal distances everywhere, settled in one way by both."
    random = np.random.default_rng(seed)
    points = random.integers(0, 6, (90, 2)).astype(np.float32)
    dense, rankings = rerank_dense(points[:15], points[15:], k1=8, k2=3)
    found, distances = k_reciprocal(points[:15], points[15:], k1=8, k2=3, k=75, metric="euclidean")
    np.testing.assert_allclose(distances, np.take_along_axis(dense, rankings, 1), atol=1e-6)
    assert same_order(found, dense)


def test_more_twins_than_places():
    "Thirty copies of one picture among others: an item stays its own neighbour, and nothing becomes NaN."
    random = np.random.default_rng(0)
    gallery = np.concatenate([np.repeat(random.normal(size=(1, 8)), 30, 0), random.normal(size=(60, 8))]).astype(np.float32)
    rankings, distances = k_reciprocal(gallery[:3], gallery, k1=5, k2=2, k=90)
    assert np.isfinite(distances).all()
    assert set(rankings[0, :30]) == set(range(30))
    assert (neighbours(gallery, 4).rows[:, 0] == np.arange(90)).all()


def test_all_vectors_equal():
    rankings, distances = k_reciprocal(np.ones((2, 4)), np.ones((40, 4)), k=40)
    assert rankings.tolist() == [list(range(40))] * 2
    assert np.isfinite(distances).all()


@pytest.mark.parametrize("k1", [1, 2, 3, 4, 5, 7, 9, 11])
def test_rounding_of_half_k1(k1):
    "Half of 5 is 2, half of 7 is 4: the published code rounds to even."
    queries, gallery, _ = problem(100 + k1)
    _, rankings = rerank_dense(unit(queries), unit(gallery), k1=k1, k2=1)
    assert np.array_equal(k_reciprocal(queries, gallery, k1=k1, k2=1, k=len(gallery))[0], rankings)


def test_two_thirds_in_whole_numbers():
    "3 * common > 2 * size says the same as the published common > 2 / 3 * size."
    for size in range(1, 300):
        for common in range(size + 1):
            assert (3 * common > 2 * size) == (common > 2.0 / 3 * size)


def test_first_k_are_the_first_of_all():
    queries, gallery, settings = problem(7)
    everything = k_reciprocal(queries, gallery, **settings, k=len(gallery))
    few = k_reciprocal(queries, gallery, **settings, k=5)
    assert np.array_equal(few[0], everything[0][:, :5])
    assert np.array_equal(few[1], everything[1][:, :5])
    assert k_reciprocal(queries, gallery, **settings)[0].shape[1] == min(100, len(gallery))


def test_weight_one_is_the_plain_ranking():
    from product_retrieval.evaluation import rank

    queries, gallery, _ = problem(3)
    plain = rank(unit(queries), unit(gallery), k=20)
    assert np.array_equal(k_reciprocal(queries, gallery, weight=1, k=20)[0], plain)


def test_blocks_do_not_matter(monkeypatch):
    queries, gallery, settings = problem(11)
    whole = k_reciprocal(queries, gallery, **settings)
    monkeypatch.setattr("product_retrieval.rerank.BLOCK", 16)
    monkeypatch.setattr("product_retrieval.rerank.ROWS", 7)
    parts = k_reciprocal(queries, gallery, **settings)
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-12)


def test_neighbours_against_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float32)
    near = neighbours(vectors, 10, metric="euclidean")
    picked = np.arange(0, 3000, 100)
    square = ((vectors[picked, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    assert np.array_equal(near.rows[picked], np.argsort(square, axis=1, kind="stable")[:, :10])
    np.testing.assert_allclose(near.distances[picked], np.sort(square, axis=1)[:, :10], rtol=1e-5)
    np.testing.assert_allclose(near.farthest[picked], square.max(1), rtol=1e-4)


@pytest.fixture
def rounding():
    "Faiss computes small searches from differences; make it take products, as it does for large ones."
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    yield
    faiss.cvar.distance_compute_blas_threshold = before


@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_neighbours_where_products_are_rounded(rounding, offset):
    "Far from the origin, and with more twins than the slack holds."
    vectors = np.random.default_rng(1).normal(size=(600, 24)).astype(np.float32)
    vectors[::15] = vectors[0]
    vectors += np.float32(offset)
    near = neighbours(vectors, 6, metric="euclidean")
    square = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    own = np.arange(len(vectors))
    order = np.lexsort(
        (np.broadcast_to(own, square.shape), np.where(np.eye(len(own), dtype=bool), -1, square.astype(np.float32)))
    )
    assert np.array_equal(near.rows, order[:, :6])
    np.testing.assert_allclose(near.farthest, square.max(1), rtol=1e-3)


def test_pair_distances():
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    a, b = np.random.default_rng(1).integers(0, 50, (2, 400))
    np.testing.assert_allclose(_distances(vectors, a, b), ((vectors[a] - vectors[b]) ** 2).sum(1), rtol=1e-5)
    assert (_distances(vectors, a, a) == 0).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("given", [False, True])
def test_lists_in_the_order_of_the_dense_algorithm(seed, given):
    queries, gallery, settings = problem(seed)
    random = np.random.default_rng(seed)
    lists = np.stack([random.permutation(len(gallery))[:20] for _ in queries])
    dense, _ = rerank_dense(unit(queries), unit(gallery), **settings)
    rows = neighbours(gallery, max(settings["k1"] + 1, settings["k2"])).rows if given else None
    found, distances = rerank_lists(queries, gallery, lists, **settings, gallery_rows=rows)
    assert np.array_equal(np.sort(found, 1), np.sort(lists, 1))
    assert same_order(found, dense)
    np.testing.assert_allclose(distances, np.take_along_axis(dense, found, 1), atol=1e-6)


def test_lists_without_the_item_itself():
    "An index that leaves the item out of its own list gives the same result."
    queries, gallery, settings = problem(5)
    width = max(settings["k1"] + 1, settings["k2"])
    lists = np.tile(np.arange(25), (len(queries), 1))
    rows = neighbours(gallery, width + 1).rows
    whole = rerank_lists(queries, gallery, lists, **settings, gallery_rows=rows[:, :width])
    without = rerank_lists(queries, gallery, lists, **settings, gallery_rows=rows[:, 1:])
    assert np.array_equal(whole[0], without[0])


def test_short_lists_stay_short():
    queries, gallery, settings = problem(6)
    lists = np.tile(np.arange(8), (len(queries), 1))
    lists[0, 3:] = -1
    found, distances = rerank_lists(queries, gallery, lists, **settings)
    assert set(found[0, :3]) == {0, 1, 2}
    assert (found[0, 3:] == -1).all() and np.isinf(distances[0, 3:]).all()
    assert (found[1:] >= 0).all()


def test_a_sample_only_scales_the_weights():
    queries, gallery, _ = problem(8)
    lists = np.tile(np.arange(25), (len(queries), 1))
    rows = neighbours(gallery, 21).rows
    whole = rerank_lists(queries, gallery, lists, gallery_rows=rows)
    rough = rerank_lists(queries, gallery, lists, gallery_rows=rows, sample=20)
    assert np.array_equal(rerank_lists(queries, gallery, lists)[0], whole[0])
    assert not np.array_equal(whole[1], rough[1])
    np.testing.assert_allclose(np.sort(whole[1], 1), np.sort(rough[1], 1), atol=0.1)


def test_expansion_against_a_loop():
    queries, gallery, _ = problem(9)
    q, g = unit(queries), unit(gallery)
    for n, alpha in [(1, 3), (5, 0), (7, 2.5)]:
        expected = []
        for one in q:
            best = np.argsort(-(g @ one), kind="stable")[:n]
            total = one + sum(max(g[j] @ one, 0) ** alpha * g[j] for j in best)
            expected.append(total / np.linalg.norm(total))
        np.testing.assert_allclose(expand_queries(queries, gallery, n, alpha), expected, atol=1e-5)


def test_augmentation_is_expansion_by_the_others():
    _, gallery, _ = problem(10)
    g = unit(gallery)
    cosines = g @ g.T - 3 * np.eye(len(g))
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :4]
    total = g + (np.take_along_axis(cosines, best, 1).clip(0)[..., None] ** 2 * g[best]).sum(1)
    expected = total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(augment_database(gallery, 4, 2), expected, atol=1e-5)
    np.testing.assert_allclose(augment_database(gallery, 4, 2, rows=best), expected, atol=1e-5)


def test_one_item():
    "A gallery of one item stays as it is."
    rankings, distances = k_reciprocal(np.ones((3, 4)), np.ones((1, 4)))
    assert rankings.tolist() == [[0]] * 3 and distances.tolist() == [[0.0]] * 3
    found, _ = rerank_lists(np.ones((3, 4)), np.ones((1, 4)), np.zeros((3, 1), int))
    assert found.tolist() == [[0]] * 3
    np.testing.assert_allclose(augment_database([[3.0, 4.0]]), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(expand_queries([[1.0, 0.0]], [[0.0, 1.0]], n=1, alpha=0), [[0.5**0.5] * 2], rtol=1e-6)


Q, G = np.eye(4, 6, dtype=np.float32) + 0.1, np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
broken, zero = G.copy(), G.copy()
broken[7, 2], zero[9] = np.nan, 0
L = np.tile(np.arange(10), (4, 1))
ROWS = neighbours(G, 25).rows

BAD = {
    "no queries": (lambda: k_reciprocal(Q[:0], G), r"queries: found .*\[0, 6\]"),
    "no gallery": (lambda: k_reciprocal(Q, G[:0]), r"gallery: found .*\[0, 6\]"),
    "one vector": (lambda: k_reciprocal(Q[0], G), r"queries: found .*\[6\]"),
    "text": (lambda: k_reciprocal([["a", "b"]], G), "expected numbers"),
    "dimensions": (lambda: k_reciprocal(Q[:, :5], G), "gallery: 6 dimensions, the queries have 5"),
    "NaN": (lambda: k_reciprocal(Q, broken), r"gallery, row 7: NaN"),
    "NaN in a query": (lambda: k_reciprocal(broken, G), r"queries, row 7: NaN"),
    "zero vector": (lambda: k_reciprocal(Q, zero), r"gallery, row 9: only zeros"),
    "k too large": (lambda: k_reciprocal(Q, G, k=31), "k = 31: expected 1 to 30"),
    "k too small": (lambda: k_reciprocal(Q, G, k=0), "k = 0: expected 1 to 30"),
    "k1 too small": (lambda: k_reciprocal(Q, G, k1=0), "k1 = 0: expected 1 to 33"),
    "k1 too large": (lambda: k_reciprocal(Q, G, k1=34), "k1 = 34: expected 1 to 33"),
    "k2": (lambda: k_reciprocal(Q, G, k2=0), "k2 = 0"),
    "weight below": (lambda: k_reciprocal(Q, G, weight=-0.1), "weight = -0.1"),
    "weight above": (lambda: k_reciprocal(Q, G, weight=1.5), "weight = 1.5"),
    "weight NaN": (lambda: k_reciprocal(Q, G, weight=float("nan")), "weight = nan"),
    "weight, one item": (lambda: k_reciprocal(Q, G[:1], weight=2), "weight = 2"),
    "metric": (lambda: k_reciprocal(Q, G, metric="cosin"), "did you mean 'cosine'"),
    "expansion, n": (lambda: expand_queries(Q, G, n=31), "n = 31: expected 1 to 30"),
    "expansion, alpha": (lambda: expand_queries(Q, G, alpha=-1), "alpha = -1"),
    "expansion, zero": (lambda: expand_queries(zero, G), "queries, row 9: only zeros"),
    "expansion, dimensions": (lambda: expand_queries(Q, G[:, :3]), "gallery: 3 dimensions"),
    "augmentation, n": (lambda: augment_database(G, n=30), "n = 30: expected 1 to 29"),
    "augmentation, rows": (lambda: augment_database(G, n=5, rows=ROWS[:, :3]), "at least 5"),
    "neighbours, k": (lambda: neighbours(G, 31), "k = 31: expected 1 to 30"),
    "lists, number": (lambda: rerank_lists(Q, G, L[:3]), "lists: found"),
    "lists, kind": (lambda: rerank_lists(Q, G, L * 1.0), "expected whole numbers"),
    "lists, row": (lambda: rerank_lists(Q, G, L + 25), "lists, line 0: gallery row 30 is outside 0..29"),
    "lists, twice": (lambda: rerank_lists(Q, G, L * 0 + 3), "lists, line 0: gallery row 3 stands twice"),
    "lists, empty": (lambda: rerank_lists(Q, G, L[:, :0]), "lists: found"),
    "gallery rows, width": (lambda: rerank_lists(Q, G, L, gallery_rows=ROWS[:, :20]), "gallery_rows: found .*at least 21"),
    "gallery rows, short": (lambda: rerank_lists(Q, G, L, gallery_rows=ROWS - 1), "gallery_rows, line"),
    "gallery rows, twice": (lambda: rerank_lists(Q, G, L, gallery_rows=ROWS * 0), "gallery_rows, line 0: a row stands twice"),
    "sample": (lambda: rerank_lists(Q, G, L, gallery_rows=ROWS, sample=0), "sample = 0"),
    "lists, k1": (lambda: rerank_lists(Q, G, L, k1=0), "k1 = 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()


def test_zero_vectors_have_a_place_in_euclidean_space():
    assert METRICS == ("cosine", "euclidean")
    assert k_reciprocal(Q, zero, metric="euclidean", k=30)[0].shape == (4, 30)


def test_inputs_stay_untouched_and_lists_may_come_from_torch():
    import torch

    queries, gallery = Q.copy(), G.astype(np.float16)
    first = k_reciprocal(queries, gallery)
    assert np.array_equal(queries, Q)
    again = k_reciprocal(torch.tensor(Q), torch.tensor(gallery))
    assert np.array_equal(first[0], again[0])


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, product_retrieval.rerank; print([m for m in ('torch', 'faiss', 'scipy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
