"""The papers' protocols against the release's results and slow loops; faulty files; formats; run folders."""

import json
import shutil

import numpy as np
import pytest
from evaluation_oracles import product1m, strict_product1m
from hypothesis import given, settings
from hypothesis import strategies as st

from product_retrieval import protocols as pr
from product_retrieval.core import InputError

house = settings(deadline=None, max_examples=60, derandomize=True)
GALLERY, TEST, DEV = (pr.PRODUCT1M_FILES[name] for name in ("gallery", "test", "dev"))


@pytest.fixture(scope="module")
def release(reference_dir):
    return reference_dir / "product1m_evaluation"


def close(a: dict, b: dict) -> bool:
    return all(abs(a[top][name] - b[top][name]) < 1e-12 for top in b for name in b[top]) and a.keys() == b.keys()


def test_equals_the_release_to_1e_12(release):
    wanted = json.loads((release / "metric_results.json").read_text())
    found = pr.evaluate_product1m(release, release / "retrieval_id_list.txt")
    assert close(found, wanted) and all(list(found[top]) == ["mAP", "Prec", "mAR"] for top in found)
    assert close(pr.evaluate_product1m(release, release / "retrieval_id_list.txt", lenient=True), wanted)


def test_both_definitions_equal_the_loops_on_the_reference(release):
    truth, ranking = pr.read_product1m_truth(release), pr.read_product1m_ranking(release / "retrieval_id_list.txt")
    gallery = {item: labels[0] for item, labels in truth.gallery.items()}
    lines = list(zip(ranking.query_ids, ranking.item_ids, strict=True))
    queries = {query: list(labels) for query, labels in truth.labels().items()}
    for strict, oracle in ((False, product1m), (True, strict_product1m)):
        found = pr.evaluate_product1m(release, release / "retrieval_id_list.txt", strict=strict)
        for n in (10, 50, 100):
            np.testing.assert_allclose(list(found[f"top{n}"].values()), oracle(gallery, queries, lines, n), atol=1e-12, rtol=0)


def write_truth(folder, gallery: dict, queries: dict, name: str = TEST, end: str = "\n", mark: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = lambda item, labels: "#####".join([item, "caption", "http://a/1.jpg", "http://b/1.jpg", "#;#".join(labels)])
    for file, items in ((GALLERY, gallery), (name, queries)):
        (folder / file).write_bytes((mark + end.join(line(i, ls) for i, ls in items.items()) + end).encode())


def small_world(seed: int, faults: bool = False) -> tuple[dict, dict, list]:
    "Gallery, queries with repeated labels, and ranking lines; with faults: unknown and repeated ids, queries, labels."
    random = np.random.default_rng(seed)
    gallery = {f"g{i}": [f"label {random.integers(0, 9)}"] for i in range(60)}
    there = sorted({labels[0] for labels in gallery.values()}) + ["label nobody has"] * faults
    queries = {f"q{i}": [str(c) for c in random.choice(there, random.integers(1, 13))] for i in range(7)}
    names = [*queries, "stranger", "q0"] if faults else list(queries)
    pool = [*gallery, "nothing 1", "nothing 2"] if faults else list(gallery)
    lines = [(q, [str(i) for i in random.choice(pool, random.integers(1, 50), replace=faults)]) for q in names]
    return gallery, queries, lines


def write_lines(path, lines: list[tuple[str, list[str]]], end: str = "\n") -> None:
    path.write_bytes("".join(",".join([query, *items]) + end for query, items in lines).encode())


@house
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_random_worlds_equal_the_loops(tmp_path_factory, seed, strict, faults):
    folder = tmp_path_factory.mktemp("world")
    gallery, queries, lines = small_world(seed, faults)
    write_truth(folder, gallery, queries)
    write_lines(folder / "ranking.txt", lines)
    found = pr.evaluate_product1m(folder, folder / "ranking.txt", strict=strict, lenient=faults)
    oracle = strict_product1m if strict else product1m
    for n in (10, 50, 100):
        slow = oracle({item: labels[0] for item, labels in gallery.items()}, queries, lines, n)
        np.testing.assert_allclose(list(found[f"top{n}"].values()), slow, atol=1e-12, rtol=0)
        assert all(0 <= value <= 1 + 1e-12 for value in found[f"top{n}"].values())


@house
@given(st.integers(0, 10**6), st.integers(0, 100), st.booleans())
def test_the_order_of_lines_does_not_matter(seed, shuffle, strict):
    gallery, queries, lines = small_world(seed)
    rows = {item: row for row, item in enumerate(gallery)}
    rankings = pr._rectangle([[rows[item] for item in items] for _, items in lines])
    labels, order = [queries[query] for query, _ in lines], np.random.default_rng(shuffle).permutation(len(lines))
    names = [label for (label,) in gallery.values()]
    one = pr.product1m_scores(rankings, labels, names, strict)
    two = pr.product1m_scores(rankings[order], [labels[i] for i in order], names, strict)
    for n in one:
        np.testing.assert_array_equal(one[n].to_numpy()[order], two[n].to_numpy())


@pytest.fixture
def world(tmp_path):
    gallery, queries, lines = small_world(5)
    write_truth(tmp_path, gallery, queries)
    write_lines(tmp_path / "ranking.txt", lines)
    return tmp_path, gallery, queries, lines


@pytest.mark.parametrize("end, mark", [("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")])
def test_line_ends_and_byte_order_mark(world, end, mark):
    folder, gallery, queries, lines = world
    wanted = pr.evaluate_product1m(folder, folder / "ranking.txt")
    write_truth(folder / "other", gallery, queries, end=end, mark=mark)
    text = mark + "".join(",".join([q, *items]) + end for q, items in lines)
    (folder / "other" / "ranking.txt").write_bytes(text.encode())
    assert pr.evaluate_product1m(folder / "other", folder / "other" / "ranking.txt") == wanted
    (folder / "other" / "ranking.txt").write_bytes(text.rstrip("\r\n").encode())
    assert pr.evaluate_product1m(folder / "other", folder / "other" / "ranking.txt") == wanted


def test_dev_and_test_together_or_one_of_them(world):
    folder, gallery, queries, lines = world
    only_test = pr.evaluate_product1m(folder, folder / "ranking.txt")
    write_truth(folder / "both", gallery, queries)
    write_truth(folder / "both", gallery, {"d0": ["label 1"], "d1": ["label 2"]}, name=DEV)
    assert pr.evaluate_product1m(folder / "both", folder / "ranking.txt") == only_test
    write_lines(folder / "more.txt", [*lines, ("d0", ["g0"]), ("d1", ["g1"])])
    assert pr.evaluate_product1m(folder / "both", folder / "more.txt") != only_test
    write_lines(folder / "half.txt", [*lines, ("d0", ["g0"])])
    with pytest.raises(InputError, match=f"1 of 2 queries of {DEV} have no line, the first is 'd1'"):
        pr.evaluate_product1m(folder / "both", folder / "half.txt")


@pytest.mark.parametrize(
    "fault, line, words",
    [
        (lambda lines: lines[2][1].insert(1, "g999"), 3, ["'g999'", "not in the gallery"]),
        (lambda lines: lines[3][1].append(lines[3][1][0]), 4, ["stands twice"]),
        (lambda lines: lines.append(lines[1]), 8, ["'q1'", "line 2 already"]),
        (lambda lines: lines.insert(0, ("nobody", ["g1"])), 1, ["'nobody'", "not in the ground truth"]),
        (lambda lines: lines.insert(2, ("q2", [])), 3, ["at least one item id"]),
        (lambda lines: lines.insert(2, ("", [])), 3, ["at least one item id"]),
    ],
)
def test_faults_name_the_line(world, fault, line, words):
    folder, _, _, lines = world
    fault(lines)
    write_lines(folder / "faulty.txt", lines)
    with pytest.raises(InputError) as error:
        pr.evaluate_product1m(folder, folder / "faulty.txt")
    assert f"faulty.txt, line {line}:" in str(error.value) and all(word in str(error.value) for word in words)
    pr.evaluate_product1m(folder, folder / "faulty.txt", lenient=True)


def test_a_missing_query_is_an_error_and_lenient_leaves_it_out(world):
    folder, gallery, queries, lines = world
    write_lines(folder / "short.txt", lines[:-2])
    with pytest.raises(InputError, match="2 of 7 queries"):
        pr.evaluate_product1m(folder, folder / "short.txt")
    found = pr.evaluate_product1m(folder, folder / "short.txt", lenient=True)
    slow = product1m({item: labels[0] for item, labels in gallery.items()}, queries, lines[:-2], 10)
    np.testing.assert_allclose(list(found["top10"].values()), slow, atol=1e-12)


def test_broken_ground_truth(world):
    folder = world[0]
    (folder / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty\.txt: empty"):
        pr.evaluate_product1m(folder, folder / "empty.txt")
    with pytest.raises(InputError, match=r"nowhere\.txt: not found"):
        pr.evaluate_product1m(folder, folder / "nowhere.txt")
    (folder / TEST).write_text("q0#####caption\n")
    with pytest.raises(InputError, match="line 1: 2 fields, expected 5"):
        pr.evaluate_product1m(folder, folder / "ranking.txt")
    (folder / TEST).write_text("q0\n")
    with pytest.raises(InputError, match="line 1: 1 fields, expected 5"):
        pr.evaluate_product1m(folder, folder / "ranking.txt")
    with pytest.raises(InputError, match="cannot be read"):
        pr.read_product1m_labels(folder)
    (folder / TEST).write_bytes("q0#####\xe4".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        pr.evaluate_product1m(folder, folder / "ranking.txt")
    (folder / TEST).unlink()
    with pytest.raises(InputError, match="neither"):
        pr.evaluate_product1m(folder, folder / "ranking.txt")
    (folder / GALLERY).unlink()
    with pytest.raises(InputError, match="gallery"):
        pr.evaluate_product1m(folder, folder / "ranking.txt")


def test_captions_may_hold_strange_line_characters(world):
    folder, gallery, *_ = world
    text = (folder / GALLERY).read_text().replace("caption", "a\x0bb\u2028c\x85d", 3)
    (folder / GALLERY).write_text(text)
    assert len(pr.read_product1m_truth(folder).gallery) == len(gallery)


def test_product1m_files_travel(tmp_path):
    ranking = pr.Ranking(["a", "b"], [[f"g{i}" for i in range(120)], ["g7"]])
    pr.write_product1m_ranking(tmp_path / "list.txt", ranking)
    again = pr.read_product1m_ranking(tmp_path / "list.txt")
    assert again.query_ids == ["a", "b"] and len(again.item_ids[0]) == 100 and again.item_ids[1] == ["g7"]


def test_parquet_travels_and_names_become_rows(tmp_path):
    rows = np.array([[2, 0, -1], [1, 2, 0]])
    ranking = pr.ranking_from_rows(rows, ["a", "b"], ["x", "y", "z"], scores=np.array([[0.9, 0.5, 0], [3, 2, 1]]))
    pr.write_ranking(tmp_path / "ranking.parquet", ranking)
    again = pr.read_ranking(tmp_path / "ranking.parquet")
    assert again.item_ids == [["z", "x"], ["y", "z", "x"]] and again.scores[0] == pytest.approx([0.9, 0.5])
    np.testing.assert_array_equal(again.rows(["a", "b"], ["x", "y", "z"]), rows)
    np.testing.assert_array_equal(again.rows(["b", "a"], ["x", "y", "z"]), rows[::-1])
    for queries, gallery, words in (
        (["a"], ["x", "y", "z"], "'b' is not among the queries"),
        (["a", "b", "c"], ["x", "y", "z"], "'c' has no results"),
        (["a", "b"], ["x", "y"], "item 'z' is not in the gallery"),
    ):
        with pytest.raises(InputError, match=words):
            again.rows(queries, gallery)
    with pytest.raises(InputError, match="'a' stands twice"):
        pr.Ranking(["a", "a"], [["x"], ["x"]]).rows(["a"], ["x"])


def test_not_a_ranking_file(tmp_path):
    (tmp_path / "ranking.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a Parquet file"):
        pr.read_ranking(tmp_path / "ranking.parquet")
    with pytest.raises(InputError, match="not found"):
        pr.read_ranking(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"query_id": ["a", "b"], "item_ids": [["x"], None]}, "column 'item_ids', row 2: .*null"),
        ({"query_id": ["a", "b"], "item_ids": [["x", None], ["y"]]}, "column 'item_ids', row 1: .*null"),
        ({"query_id": ["a", None], "item_ids": [["x"], ["y"]]}, "column 'query_id', row 2: .*null"),
        ({"query_id": ["a", "b"], "item_ids": [["x"], ["y"]], "scores": [[1.0], None]}, "column 'scores', row 2: .*null"),
        ({"query_id": ["a", "b"], "item_ids": [5, 6]}, "column 'item_ids': holds int64, expected list"),
    ],
)
def test_a_ranking_with_holes(tmp_path, columns, words):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "ranking.parquet")
    with pytest.raises(InputError, match=words):
        pr.read_ranking(tmp_path / "ranking.parquet")


def eproduct(tmp_path, truth: str, submission: str):
    (tmp_path / "ground_truth.csv").write_text(truth)
    (tmp_path / "submission.csv").write_text(submission)
    return tmp_path, tmp_path / "submission.csv"


def test_eproduct_by_hand(tmp_path):
    found = pr.evaluate_eproduct(*eproduct(tmp_path, 'a,"1 2"\nb,"3 4 5 6"\n', 'a,"9 2 1"\nb,"3 9"\n'))
    assert found == {"MAR@10": (1 + 0.25) / 2, "queries": 2}


def test_eproduct_travels_and_counts_ten(tmp_path):
    pr.write_eproduct_submission(tmp_path / "s.csv", pr.Ranking(["a"], [[str(i) for i in range(12)]]))
    assert (tmp_path / "s.csv").read_text() == 'a,"0 1 2 3 4 5 6 7 8 9"\n'
    assert pr.read_eproduct_submission(tmp_path / "s.csv").item_ids == [[str(i) for i in range(10)]]


@pytest.mark.parametrize(
    "submission, words",
    [
        ('a,"1"\nb,"3 3"\n', "line 2: item '3' stands twice"),
        ('query,"ids"\na,"1"\nb,"3"\n', "line 1: query 'query' is not in the ground truth"),
        ('a,"1"\na,"2"\nb,"3"\n', "line 2: query 'a' stands in line 1 already"),
        ('a,"1"\n', "1 of 2 queries have no line, the first is 'b'"),
        ('a,"1"\nb\n', "line 2: expected query_uuid"),
        ('a,"1"\nb,""\n', "line 2: 0 results"),
        ('a,"1\nb,"3"\n', "line 1: expected query_uuid.*a quote opened in line 1 is not closed"),
        ('a,"1"\n"b,3\n', "line 2: expected query_uuid.*a quote opened in line 2 is not closed"),
        ('a,"1"\n ,"3"\n', "line 2: expected query_uuid"),
        ('a,"1"\nb,"1 2 3 4 5 6 7 8 9 10 11"\n', "line 2: 11 results"),
    ],
)
def test_eproduct_faults(tmp_path, submission, words):
    with pytest.raises(InputError, match=words):
        pr.evaluate_eproduct(*eproduct(tmp_path, 'a,"1 2"\nb,"3"\n', submission))


def test_eproduct_index_and_lenient(tmp_path):
    folder, file = eproduct(tmp_path, 'a,"1 2"\nb,"3"\n', 'a,"1 1 x"\nstranger,"3"\n')
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "index.csv").write_text("UUID,IMAGE_PATH\n1,a.jpg\n2,b.jpg\n3,c.jpg\n")
    assert pr.evaluate_eproduct(folder, file, lenient=True) == {"MAR@10": 0.25, "queries": 2}
    file.write_text('a,"1 x"\nb,"3"\n')
    with pytest.raises(InputError, match="line 1: item 'x' is not in the index"):
        pr.evaluate_eproduct(folder, file)


def test_eproduct_lenient_swallows_nothing(tmp_path):
    folder, file = eproduct(tmp_path, 'a,"1 2"\nb,"3"\n', 'a,"1 2\nb,"3"\n')
    with pytest.raises(InputError, match=r"submission\.csv, line 1: .*not closed"):
        pr.evaluate_eproduct(folder, file, lenient=True)


def test_eproduct_long_fields_and_other_ways_to_write_them(tmp_path):
    many = " ".join(f"u{i:036d}" for i in range(5000))
    folder, file = eproduct(tmp_path, f'a,"{many}"\r\n"b",3\r\n', f'"a", "{many[:37]}"\nb,3\n')
    assert pr.evaluate_eproduct(folder, file) == {"MAR@10": (1 / 5000 + 1) / 2, "queries": 2}


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\xff\xfe\0", b"ID,IMAGE_PATH\n1,a.jpg\n", b'UUID,x\n"1,a\n'])
def test_eproduct_index_that_is_no_table(tmp_path, content):
    folder, file = eproduct(tmp_path, 'a,"1"\n', 'a,"1"\n')
    (tmp_path / "index.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"index\.csv: expected a CSV table with a column 'UUID'"):
        pr.evaluate_eproduct(folder, file)


def test_eproduct_truth_without_right_answers(tmp_path):
    for lenient in (False, True):
        with pytest.raises(InputError, match=r"ground_truth\.csv: no query has a right answer"):
            pr.evaluate_eproduct(*eproduct(tmp_path, 'a,""\n', 'a,"1"\n'), lenient=lenient)


@pytest.fixture
def run_folder(tiny_shelf, tmp_path):
    tiny_shelf.save(tmp_path / "catalogue", images="none")
    queries, gallery = tiny_shelf.split("query"), tiny_shelf.split("gallery")
    rows = np.stack([np.random.default_rng(i).permutation(len(gallery))[:20] for i in range(len(queries))])
    ranking = pr.ranking_from_rows(rows, queries.ids, gallery.ids)
    return pr.write_run(tmp_path / "run", ranking, tmp_path / "catalogue", model="chance"), rows, queries, gallery


def test_a_run_folder_is_scored_from_its_catalogue(run_folder):
    from product_retrieval.evaluation import evaluate, positives_from_labels

    folder, rows, queries, gallery = run_folder
    report = pr.evaluate_run(folder)
    wanted = evaluate(rows, positives_from_labels(queries.labels, gallery.labels), pr.RUN_METRICS)
    assert report.evaluation.values == wanted.values and "chance" in str(report)
    json.dumps(report.to_dict())


def test_a_run_folder_with_faults(run_folder, tmp_path):
    folder, *_ = run_folder
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({key: value for key, value in about.items() if key != "query_split"}))
    with pytest.raises(InputError, match="query_split"):
        pr.evaluate_run(folder)
    (folder / "run.json").write_text(json.dumps({**about, "gallery_split": "val_gallery"}))
    with pytest.raises(InputError, match="not in the gallery"):
        pr.evaluate_run(folder)
    for content in (5, [], {**about, "catalogue": 5}, {**about, "query_split": []}, {**about, "gallery_split": None}):
        (folder / "run.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"run\.json: (holds|key).*expected"):
            pr.evaluate_run(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"run\.json: not found"):
        pr.evaluate_run(folder)


def test_a_run_never_replaces_a_folder_that_is_not_a_run(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="exists already"):
        pr.write_run(tmp_path / "precious", pr.Ranking(["a"], [["x"]]), tmp_path)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"
