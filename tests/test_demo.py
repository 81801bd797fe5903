"""The main job: what it writes, that it repeats, that it refuses, and the report in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def product_retrieval(*arguments, **variables):
    "Run the command line in a process of its own."
    code = "from product_retrieval.cli import main; main()"
    environment = {**os.environ, "QUICK": "1", **variables}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    "A finished demo on the tiny shelf."
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = product_retrieval("demo", "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"]


def test_metrics_json(out):
    content = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert content["seed"] == 0 and content["data"].startswith("shelf")
    first = ["chance", "colour histogram", "bag of words", "image model", "text only", "image only", "dual encoder"]
    last = ["coarse", "coarse-to-fine", "CLIP-style", "ensemble", "ensemble, re-ranked"]
    assert [r["name"] for r in content["rows"]] == [*first, "CAPTURE image-level", "CAPTURE instance-level", *last]
    for row in content["rows"]:
        for metric in ("MAR@10", "mAP@10"):
            low, high = row[f"{metric} interval"]
            assert 0 <= low <= row[metric] <= high <= 1
        assert row["seconds"] >= 0
    assert rows(out)[2]["MAR@10"] > rows(out)[0]["MAR@10"], "words beat chance"


def test_the_same_seed_gives_the_same_numbers(out, tmp_path):
    assert product_retrieval("demo", "--out", tmp_path / "again").returncode == 0
    strip = lambda table: [{k: v for k, v in row.items() if k != "seconds"} for row in table]
    assert strip(rows(out)) == strip(rows(tmp_path / "again"))


def test_run_folders_score_the_same(out):
    done = product_retrieval("evaluate", "run", out / "systems" / "colour_histogram" / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["MAR@10"]["value"] == pytest.approx(rows(out)[1]["MAR@10"], abs=1e-12)


def test_the_trained_model_answers_a_picture(out, tiny_shelf, tmp_path):
    model = out / "systems" / "image_model" / "training" / "model"
    gallery = out / "systems" / "image_model" / "gallery"
    assert product_retrieval("index", gallery, "--out", tmp_path / "index").returncode == 0
    item = tiny_shelf.split("gallery").select([0])
    done = product_retrieval("search", tmp_path / "index", "--model", model, "--image", item.paths[0], "--k", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = next(iter(json.loads(done.stdout).values()))
    assert found[0]["item_id"] == item.ids[0] and found[0]["score"] == pytest.approx(1, abs=1e-3)


def test_own_catalogue(tiny_shelf, tmp_path):
    "A catalogue without categories and without query titles gets the rows that it can feed, and a note for the others."
    frame = tiny_shelf.frame.drop(columns=["category", "boxes"], errors="ignore")
    frame.loc[frame["split"] == "query", "title"] = ""
    from product_retrieval.data.catalog import Catalog

    mine = Catalog.from_frame(frame, tiny_shelf.root, name="mine").save(tmp_path / "mine", images="none")
    done = product_retrieval("demo", "--data", mine, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [r["name"] for r in rows(tmp_path / "out")] == ["chance", "colour histogram"]
    assert "No image model" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_refusals(tiny_shelf, tmp_path):
    from product_retrieval.data.catalog import Catalog

    unlabelled = tiny_shelf.frame.drop(columns=["labels", "boxes"])
    mine = Catalog.from_frame(unlabelled, tiny_shelf.root, name="mine").save(tmp_path / "mine", images="none")
    done = product_retrieval("demo", "--data", mine, "--out", tmp_path / "out")
    assert done.returncode == 2 and "labels" in done.stderr and not (tmp_path / "out").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    done = product_retrieval("demo", "--out", tmp_path / "letters")
    assert done.returncode == 2 and "choose a new folder" in done.stderr
    (tmp_path / "letters" / "metrics.json").write_text("{}")
    assert product_retrieval("demo", "--out", tmp_path / "letters").returncode == 2
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def test_wrong_weights_are_found_before_anything_runs(tmp_path):
    done = product_retrieval("demo", "--out", tmp_path / "out", "--weights", tmp_path / "no.safetensors")
    assert done.returncode == 2 and "no.safetensors" in done.stderr and "2/3" not in done.stdout


def test_an_earlier_run_is_replaced_by_a_complete_one(out, tmp_path):
    shutil.copytree(out, tmp_path / "again")
    old = (tmp_path / "again" / "report.html").stat().st_mtime_ns
    assert product_retrieval("demo", "--out", tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "report.html").stat().st_mtime_ns > old
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_report_is_self_contained(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    assert "What it misses" in page and "How to make this report again" in page
    assert "product-retrieval demo" in page
    assert page.count("data:image/jpeg;base64,") > 30


@pytest.mark.browser
def test_report_in_chromium(out):
    "The page opens without errors and without a request, every picture is drawn, nothing overflows on a phone."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine; on Debian: apt install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        errors, requests = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
        page.goto((out / "report.html").as_uri())
        page.evaluate("() => document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        page.wait_for_function("() => [...document.images].every(i => i.complete)")
        broken = page.evaluate("() => [...document.images].filter(i => !i.naturalWidth || !i.alt).length")
        assert (errors, requests, broken) == ([], [], 0)
        assert page.locator("h1").inner_text().startswith("Finding products")
        assert page.locator("figure.miss").count() > 0
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
        browser.close()
