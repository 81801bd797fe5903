"""Evaluation against judges: slow loops, trec_eval, pytorch-metric-learning, brute force; properties; bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_oracles import metrics as slow_metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from product_retrieval import evaluation as ev
from product_retrieval.core import InputError

house = settings(deadline=None, max_examples=60, derandomize=True)


def random_case(seed: int, queries: int = 8, gallery: int = 40, depth: int = 15) -> tuple[np.ndarray, list[list[int]]]:
    "Rankings with short lists, and lists of positives, some of them empty."
    random = np.random.default_rng(seed)
    rankings = np.stack([random.permutation(gallery)[:depth] for _ in range(queries)])
    for line in rankings:
        line[random.integers(1, depth + 1) :] = -1
    lists = [random.permutation(gallery)[: random.integers(0, 20)].tolist() for _ in range(queries)]
    return rankings, lists if any(lists) else [[0], *lists[1:]]


@st.composite
def cases(draw) -> tuple[np.ndarray, list[list[int]]]:
    return random_case(draw(st.integers(0, 10**6)), draw(st.integers(1, 12)), draw(st.integers(15, 60)), draw(st.integers(1, 15)))


ALL = [name.replace("@10", "@7").replace("@1", "@7") if "@1" in name else name for name in ev.METRIC_NAMES]
ALL = sorted({*ALL, "mAP", "mAP/min", "nDCG", "MRR@7"})


@house
@given(cases())
def test_every_metric_equals_the_loops(case):
    rankings, lists = case
    found = ev.evaluate(rankings, ev.positives_from_lists(lists), ALL)
    for query, positives in enumerate(lists):
        line = found.per_query.iloc[query]
        if not positives:
            assert line.isna().all()
            continue
        slow = slow_metrics(rankings[query].tolist(), set(positives), 7, rankings.shape[1])
        for name in ALL:
            assert math.isclose(line[name], slow[name], abs_tol=1e-12), name


@house
@given(cases(), st.integers(1, 200))
def test_blocks_do_not_matter(case, marks):
    rankings, lists = case
    positives = ev.positives_from_lists(lists)
    assert (ev.hits_matrix(rankings, positives, marks=marks) == ev.hits_matrix(rankings, positives)).all()


@house
@given(cases(), st.integers(0, 1000))
def test_the_order_of_the_queries_does_not_matter(case, seed):
    rankings, lists = case
    order = np.random.default_rng(seed).permutation(len(lists))
    one = ev.evaluate(rankings, ev.positives_from_lists(lists), ALL)
    two = ev.evaluate(rankings[order], ev.positives_from_lists([lists[i] for i in order]), ALL)
    assert all(math.isclose(one.values[name], two.values[name], abs_tol=1e-12) for name in ALL)
    np.testing.assert_array_equal(one.per_query.to_numpy()[order], two.per_query.to_numpy())


@house
@given(cases())
def test_bounds(case):
    rankings, lists = case
    table = ev.evaluate(rankings, ev.positives_from_lists(lists), ALL).per_query.dropna()
    assert ((table >= 0) & (table <= 1 + 1e-12)).all(axis=None)
    assert (table["mAP@7"] <= table["mAP@7/min"] + 1e-12).all() and (table["mAP@7/min"] <= table["mAP@7/hits"] + 1e-12).all()
    assert (table["MAP@R"] <= table["R-precision"] + 1e-12).all()


@house
@given(cases(), st.integers(0, 1000))
def test_a_hit_that_moves_up_never_lowers_a_metric(case, seed):
    rankings, lists = case
    positives = ev.positives_from_lists(lists)
    hits, before = ev.hits_matrix(rankings, positives), ev.evaluate(rankings, positives, ALL)
    better = rankings.copy()
    for line, right in zip(better, hits, strict=True):
        ups = np.flatnonzero(right[1:] & ~right[:-1] & (line[:-1] >= 0)) + 1
        if len(ups):
            place = ups[seed % len(ups)]
            line[[place - 1, place]] = line[[place, place - 1]]
    after = ev.evaluate(better, positives, ALL)
    honest = [name for name in ALL if not name.endswith("/hits")]
    assert (after.per_query[honest].dropna() >= before.per_query[honest].dropna() - 1e-12).all(axis=None)


def test_the_normaliser_hits_can_punish_a_better_ranking():
    positives = ev.positives_from_lists([[0, 9]])
    worse, better = np.array([[0, 1, 2, 3]]), np.array([[0, 1, 2, 9]])
    score = lambda rankings, name: ev.evaluate(rankings, positives, name).values[name]
    assert score(better, "mAP@4/hits") < score(worse, "mAP@4/hits")
    assert score(better, "mAP@4") > score(worse, "mAP@4") and score(better, "mAP@4/min") > score(worse, "mAP@4/min")


@house
@given(cases())
def test_recall_grows_with_k(case):
    rankings, lists = case
    positives = ev.positives_from_lists(lists)
    curve = ev.recall_curve(rankings, positives)
    assert (np.diff(curve) >= -1e-12).all()
    names = [f"recall@{k}" for k in range(1, len(curve) + 1)]
    np.testing.assert_allclose(curve, [ev.evaluate(rankings, positives, names).values[n] for n in names], atol=1e-12)


def test_perfect_and_useless_rankings():
    positives = ev.positives_from_lists([[3, 1, 2], [0]])
    perfect, useless = np.array([[1, 2, 3], [0, 5, 6]]), np.array([[7, 8, 9], [7, 8, 9]])
    names = ["recall@3", "mAP@3", "MRR", "nDCG@3", "R-precision", "MAP@R", "hit@1"]
    assert all(value == 1 for value in ev.evaluate(perfect, positives, names).values.values())
    assert all(value == 0 for value in ev.evaluate(useless, positives, names).values.values())


def test_trec_eval_agrees_on_200_random_cases():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    pairs = {
        "map": "mAP", "map_cut_5": "mAP@5", "recip_rank": "MRR", "ndcg_cut_5": "nDCG@5", "ndcg": "nDCG", "P_5": "Prec@5",
        "recall_5": "recall@5", "Rprec": "R-precision", "success_5": "hit@5",
    }  # fmt: skip
    measures = {"map", "map_cut.5", "recip_rank", "ndcg_cut.5", "ndcg", "P.5", "recall.5", "Rprec", "success.5"}
    for seed in range(200):
        rankings, lists = random_case(seed)
        qrels = {f"q{i}": {f"d{row}": 1 for row in rows} for i, rows in enumerate(lists) if rows}
        run = {f"q{i}": {f"d{row}": -float(j) for j, row in enumerate(line) if row >= 0} for i, line in enumerate(rankings)}
        judged = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
        ours = ev.evaluate(rankings, ev.positives_from_lists(lists), list(pairs.values())).per_query
        for query, values in judged.items():
            for theirs, name in pairs.items():
                assert math.isclose(values[theirs], ours[name][int(query[1:])], abs_tol=1e-9), (seed, query, name)


def test_labels_to_positives_by_brute_force():
    random = np.random.default_rng(0)
    draw = lambda n: [tuple(f"p{c}" for c in random.integers(0, 12, random.integers(0, 4))) for _ in range(n)]
    queries, gallery = draw(30), draw(80)
    positives = ev.positives_from_labels(queries, gallery)
    for query, labels in enumerate(queries):
        assert positives[query].tolist() == [row for row, other in enumerate(gallery) if set(labels) & set(other)]
    as_text = ev.positives_from_labels([";".join(q) for q in queries], [";".join(g) for g in gallery])
    assert (as_text.indices == positives.indices).all() and (as_text.indptr == positives.indptr).all()
    assert ev.positives_from_labels([7, 8], [8, 8, 9])[1].tolist() == [0, 1]


def brute_force_ranking(queries: np.ndarray, gallery: np.ndarray, k: int, exclude_self: bool) -> np.ndarray:
    lines = []
    for i, scores in enumerate(queries @ gallery.T):
        rows = [row for row in range(len(gallery)) if not (exclude_self and row == i)]
        lines.append(sorted(rows, key=lambda row, s=scores: (-s[row], row))[:k])
    return np.array(lines)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 3, 12, 39, 60])
def test_rank_by_brute_force_with_many_ties(k, exclude_self):
    "Small whole numbers: scores are exact in float32, and most of them are tied."
    random = np.random.default_rng(k)
    gallery = random.integers(-1, 2, (40, 4)).astype(np.float32)
    queries = gallery if exclude_self else random.integers(-1, 2, (25, 4)).astype(np.float32)
    found = ev.rank(queries, gallery, k, exclude_self)
    np.testing.assert_array_equal(found, brute_force_ranking(queries, gallery, k, exclude_self))


def test_rank_with_every_vector_equal_and_many_queries():
    vectors = np.ones((200, 8), np.float32)
    assert (ev.rank(vectors, vectors, 5) == np.arange(5)).all()
    assert (ev.rank(vectors, vectors, 5, exclude_self=True)[50:] == np.arange(5)).all()
    rows, scores = ev.rank(vectors[:2], vectors, 300, with_scores=True)
    assert rows.shape == (2, 200) and (scores == 8).all()


def test_leave_one_out_equals_the_long_way_and_pytorch_metric_learning():
    random = np.random.default_rng(0)
    labels = random.integers(0, 60, 400)
    labels[:3] = [1000, 1001, 1002]
    vectors = random.standard_normal((1003, 16))[labels] + 0.8 * random.standard_normal((400, 16))
    found = ev.leave_one_out(vectors, labels)
    rankings = ev.rank(vectors, vectors, 399, exclude_self=True)
    lists = [[j for j in range(400) if j != i and labels[j] == labels[i]] for i in range(400)]
    long_way = ev.evaluate(rankings, ev.positives_from_lists(lists), ev.LEAVE_ONE_OUT)
    np.testing.assert_allclose(found.per_query.to_numpy(), long_way.per_query.to_numpy())
    assert found.values == pytest.approx(long_way.values) and found.without_positives >= 3
    judge_with_pytorch_metric_learning(found, vectors, labels)


def judge_with_pytorch_metric_learning(found, vectors, labels):
    torch = pytest.importorskip("torch")
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    flat = pytest.importorskip("faiss").IndexFlatIP
    knn = pytest.importorskip("pytorch_metric_learning.utils.inference").FaissKNN(index_init_fn=flat)
    names = {"precision_at_1": "P@1", "r_precision": "R-precision", "mean_average_precision_at_r": "MAP@R"}
    judge = calculator.AccuracyCalculator(include=tuple(names), k="max_bin_count", knn_func=knn, device=torch.device("cpu"))
    theirs = judge.get_accuracy(torch.tensor(vectors, dtype=torch.float32), torch.tensor(labels))
    for name, ours in names.items():
        assert theirs[name] == pytest.approx(found.values[ours], abs=1e-9)


def test_classes_of_very_different_size_are_searched_in_blocks():
    random = np.random.default_rng(1)
    labels = np.concatenate([np.zeros(300, int), np.repeat(np.arange(1, 51), 2)])
    vectors = random.standard_normal((400, 4))
    blocks = list(ev._blocks_by_depth(np.bincount(labels)[labels] - 1, most=64))
    assert sorted(np.concatenate(blocks)) == list(range(400)) and max(len(b) for b in blocks) <= 64
    assert 0 < ev.leave_one_out(vectors, labels).values["P@1"] < 1


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        low, high = ev.confidence_interval(random.random(60) ** 2, samples=400, seed=seed)
        inside += low <= 1 / 3 <= high
    assert 180 <= inside <= 200


def test_the_seed_fixes_intervals_and_tests():
    values = np.random.default_rng(0).random(50)
    assert ev.confidence_interval(values, seed=3) == ev.confidence_interval(values, seed=3)
    assert ev.confidence_interval(values, seed=3) != ev.confidence_interval(values, seed=4)
    assert ev.paired_test(values, values[::-1]) == ev.paired_test(values, values[::-1])


def test_paired_test_counts_like_all_sign_flips():
    gaps = np.array([0.3, 0.1, -0.2, 0.25, 0.4, 0.05, 0.15, -0.1])
    flips = np.array([[1 if code >> i & 1 else -1 for i in range(8)] for code in range(256)])
    exact = np.mean(np.abs(flips @ gaps) >= abs(gaps.sum()) - 1e-12)
    found = ev.paired_test(gaps, np.zeros(8), samples=40_000)
    assert found.p_value == pytest.approx(exact, abs=0.01) and found.difference == pytest.approx(gaps.mean())


def test_paired_test_is_honest_when_nothing_differs():
    random = np.random.default_rng(0)
    p_values = [ev.paired_test(random.random(40), random.random(40), samples=300, seed=i).p_value for i in range(150)]
    assert np.mean(np.array(p_values) < 0.05) < 0.12
    assert ev.paired_test([0.5, 0.5], [0.5, 0.5]).p_value == 1


def test_categories_and_worst_queries():
    positives = ev.positives_from_lists([[0], [1], [2], []])
    found = ev.evaluate(np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), positives, ["MRR", "hit@1"])
    table = ev.per_category(found, ["a", "b", "b", "c"])
    assert table.index.tolist() == ["b", "a"] and table["queries"].tolist() == [2, 1]
    assert table.loc["b", "MRR"] == 0.25 and (table["low"] <= table["MRR"]).all()
    assert ev.worst_queries(found, "MRR", 2).index.tolist() == [2, 1]
    assert found.without_positives == 1 and "1 without positives" in str(found)
    assert found.table().loc["hit@1", "value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: ev.evaluate(np.zeros((2, 3)), p), ["whole numbers", "float64"]),
        (lambda p: ev.evaluate(np.zeros((3, 3), int), p), ["3 rows", "2 queries"]),
        (lambda p: ev.evaluate(np.array([[0, -2], [0, 1]]), p), ["row 0", "-2"]),
        (lambda p: ev.evaluate(np.array([[0, 1], [1, 1]]), p), ["row 1", "gallery row 1", "more than once"]),
        (lambda p: ev.evaluate(np.array([[0, 1], [1, 2]]), p, "mAP@10/max"), ["max", "normaliser"]),
        (lambda p: ev.evaluate(np.array([[0, 1], [1, 2]]), p, "MaR@10"), ["'MaR@10'", "'MAR@10'"]),
        (lambda p: ev.evaluate(np.array([[0, 1], [1, 2]]), p, "recall"), ["recall@10"]),
        (lambda p: ev.evaluate(np.array([[0, 1], [1, 2]]), p, "R-precision@5"), ["without a number"]),
        (lambda p: ev.evaluate(np.array([[0, 1]]), ev.positives_from_lists([[]])), ["none of the 1 queries"]),
        (lambda p: ev.rank(np.ones((2, 3)), np.ones((2, 4)), 1), ["3 dimensions", "4"]),
        (lambda p: ev.rank(np.array([[1.0], [np.nan]]), np.ones((2, 1)), 1), ["query_vectors", "row 1", "NaN"]),
        (lambda p: ev.rank(np.ones((2, 3)), np.ones((4, 3)), 1, exclude_self=True), ["exclude_self", "2 and 4"]),
        (lambda p: ev.rank(np.ones((2, 3)), np.ones((4, 3)), 0), ["k = 0"]),
        (lambda p: ev.leave_one_out(np.ones((2, 3)), [1, 2]), ["no two items"]),
        (lambda p: ev.leave_one_out(np.ones((2, 3)), [1, 2, 3]), ["3 for 2"]),
        (lambda p: ev.paired_test([0.1, 0.2], [0.1]), ["same queries"]),
        (lambda p: ev.confidence_interval([float("nan")]), ["no values"]),
        (lambda p: ev.worst_queries(ev.evaluate(np.array([[0], [1]]), p, "MRR"), "MRM"), ["'MRM'", "'MRR'"]),
        (lambda p: ev.per_category(ev.evaluate(np.array([[0], [1]]), p, "MRR"), ["a"]), ["1 values for 2 queries"]),
    ],
)
def test_bad_input_says_what_and_where(call, words):
    with pytest.raises(InputError) as error:
        call(ev.positives_from_lists([[0, 1], [1]]))
    assert all(word in str(error.value) for word in words), error.value


def test_pictures_have_what_they_need():
    import matplotlib

    matplotlib.use("Agg")
    picture = np.zeros((8, 8, 3), np.uint8)
    sheet = ev.result_sheet([picture] * 2, [[picture] * 3, [picture]], np.array([[1, 0, 1], [0, 0, 0]], bool))
    titles = [ax.get_title() for ax in sheet.axes]
    assert sum("hit" in t for t in titles) == 2 and sum("miss" in t for t in titles) == 2
    assert len(ev.plot_recall({"a": np.array([0.1, 0.2])}).axes) == 1
    found = ev.evaluate(np.array([[0], [1]]), ev.positives_from_lists([[0], [1]]), "MRR")
    assert ev.plot_per_category(ev.per_category(found, ["x", "y"])).axes[0].get_xlabel() == "MRR"


def test_scoreboard():
    table = ev.scoreboard([{"name": "chance", "MAR@10": 0.01234}, {"name": "model", "MAR@10": (0.5, 0.45, 0.55)}])
    assert table.loc["chance", "MAR@10"] == 0.012 and table.loc["model", "MAR@10"] == "0.500 [0.450, 0.550]"
    assert ev.scoreboard([]).empty


def test_import_is_light():
    code = "import sys, product_retrieval.evaluation; print(*{'torch', 'faiss', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""


@pytest.mark.slow
def test_bench_evaluation_runs():
    pytest.importorskip("ranx")
    script = Path(__file__).parents[1] / "benchmarks" / "bench_evaluation.py"
    out = subprocess.run([sys.executable, str(script), "--quick"], capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 5 and all({"figure", "ours", "peer", "ratio", "bar", "met", "hardware"} <= set(line) for line in lines)
