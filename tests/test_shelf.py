"""The shop, its packs and its pictures: what chapters 2a to 2c cannot tell."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from product_retrieval.core import InputError
from product_retrieval.data.packs import SILHOUETTES, View, draw_pack, fitted_parts
from product_retrieval.data.shelf import (
    PRESETS,
    Placed,
    ShelfConfig,
    Shot,
    config_from_json,
    config_to_json,
    draw_shelf,
    load_shelf,
    plan_shots,
    shoot,
    true_boxes,
)
from product_retrieval.data.shop import (
    LEAVES,
    CaptionConfig,
    ShopConfig,
    caption,
    choose_leaves,
    group_caption,
    rng_for,
    stock_shop,
    true_caption,
)

tiny = PRESETS["tiny"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return draw_shelf(tmp_path_factory.mktemp("shelf") / "tiny", "tiny")


def test_hierarchy_is_deep_enough():
    for leaves in (LEAVES, choose_leaves(24)):
        parts = [leaf.path.split("/") for leaf in leaves]
        assert len({p[0] for p in parts}) >= 4
        assert len({tuple(p[:2]) for p in parts}) >= 10
        assert len({tuple(p) for p in parts}) >= 24
    assert {leaf.silhouette for leaf in LEAVES} == set(SILHOUETTES)


@pytest.mark.parametrize("preset", ["small", "full"])
def test_products_are_distinct(preset):
    shop = stock_shop(PRESETS[preset])
    assert len(shop) == PRESETS[preset].products
    assert len({p.product_id for p in shop}) == len(shop)
    captions = [true_caption(p) + p.category for p in shop]
    assert len(set(captions)) > 0.97 * len(shop), "almost no two products may be the same by their description"


def test_another_seed_is_another_shop():
    assert stock_shop(tiny, 0) == stock_shop(tiny, 0)
    assert stock_shop(tiny, 0) != stock_shop(tiny, 1)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.silhouette)
def test_every_leaf_is_drawn(leaf):
    shop = stock_shop(ShopConfig(leaves=34, products=150))
    product = next(p for p in shop if p.line.leaf == leaf)
    for view in (View(), View(30), View(200, yaw=0.9, tilt=0.3, light=0.9), View(200, tilt=0.0, light=0.0)):
        pack = np.asarray(draw_pack(product, view))
        assert pack.shape[2] == 4 and (pack[..., 3] > 128).mean() > 0.1
        rim = np.concatenate([pack[0, :, 3], pack[-1, :, 3], pack[:, 0, 3], pack[:, -1, 3]])
        assert rim.max() < 128, "a pack is not cut off"
    assert all(w > 0 for part in fitted_parts(product) for _, w in part.outline)


def test_variants_of_a_line_look_different():
    shop = stock_shop(PRESETS["small"])
    for one, two in list(pairwise(shop))[::3]:
        if one.line == two.line:
            a, b = (np.asarray(draw_pack(p, View(160)).resize((160, 160)), float) for p in (one, two))
            assert np.abs(a - b).max() > 40, f"{one.product_id} and {two.product_id} cannot be told apart"


def test_captions():
    shop = stock_shop(tiny)
    silent = CaptionConfig(*[0.0] * 6, name_product=1.0)
    for p in shop:
        assert set(caption(p, shop, rng_for(p.product_id), silent).split()) <= set(true_caption(p).split())
        assert p.variant in caption(p, shop, rng_for(p.product_id), silent)
    loud = CaptionConfig(*[1.0] * 6, name_product=0.0)
    texts = [caption(p, shop, rng_for(k), loud) for k, p in enumerate(shop)]
    assert all(text.strip() for text in texts)
    assert group_caption(shop[:4], shop, rng_for(3), loud).strip()
    named = group_caption(shop[:3], shop, rng_for(3), silent)
    assert all(p.line.name in named and p.variant in named for p in shop[:3])


def test_tiny_is_quick(tmp_path):
    draw_shelf(tmp_path / "warm", replace(tiny, products=4, queries=1))
    start = time.process_time()
    draw_shelf(tmp_path / "shelf", "tiny")
    assert time.process_time() - start < 2


def test_splits(shelf):
    frame = shelf.frame
    assert set(frame["split"]) == {"train", "gallery", "query", "val_gallery", "val_query"}
    train = frame[frame["split"] == "train"]
    assert (train["labels"] == "").all() and (train["boxes"] == "").all()
    multi = train["item_id"].str.startswith("m")
    assert multi.any() and (train.loc[multi, "category"] == "").all() and (train.loc[~multi, "category"] != "").all()
    assert not shelf.train.has("labels") and not shelf.train.has("boxes")
    for query, gallery in (("query", "gallery"), ("val_query", "val_gallery")):
        known = {label for item in shelf.split(gallery).labels for label in item}
        assert all(set(labels) <= known and labels for labels in shelf.split(query).labels)
        assert all(len(labels) == 1 for labels in shelf.split(gallery).labels)


def test_boxes_lie_in_the_picture(shelf):
    for split in ("query", "gallery", "val_query", "val_gallery"):
        part = shelf.split(split)
        for path, boxes, labels in zip(part.paths, part.boxes, part.labels, strict=True):
            with Image.open(path) as image:
                assert image.size == (tiny.picture_size,) * 2
            assert {box[4] for box in boxes} == set(labels)
            assert all(0 <= x1 < x2 <= tiny.picture_size and 0 <= y1 < y2 <= tiny.picture_size for x1, y1, x2, y2, _ in boxes)


def test_hidden_products_are_no_answers():
    shop, square = stock_shop(tiny), Image.new("RGBA", (10, 10), "red")
    scene = [Placed(shop[0], square, 0, 0), Placed(shop[1], square, 1, 0), Placed(shop[2], square, 15, 15)]
    shares = [share for share, _ in true_boxes(scene, None, 20)]
    assert shares == pytest.approx([0.1, 1.0, 0.25])
    crowded = replace(tiny, overlap=0.9, least_visible=0.6, flat_lay=0.0)
    seen = [len(shoot(Shot(f"x{k}", "query", (0, 5, 9, 13)), shop, crowded)[1]) for k in range(10)]
    assert min(seen) < 4


def test_products_per_query():
    config = replace(tiny, products_per_query=(1, 1))
    assert all(len(s.products) == 1 for s in plan_shots(config) if s.split.endswith("query"))
    numbers = {len(s.products) for s in plan_shots(PRESETS["small"]) if s.split == "query"}
    assert numbers == {2, 3, 4, 5, 6}


def test_same_bytes_for_any_number_of_processes(shelf, tmp_path):
    again = draw_shelf(tmp_path / "three", "tiny", workers=3)
    assert again.frame.equals(shelf.frame)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(shelf.paths, again.paths, strict=True))
    other = draw_shelf(tmp_path / "other", "tiny", seed=1)
    assert not other.frame.equals(shelf.frame)


def test_every_knob_is_documented_and_survives_json():
    import inspect

    source = "\n".join(inspect.getsource(c) for c in ShelfConfig.__mro__[:-1])
    for knob in fields(ShelfConfig):
        line = next(text for text in source.splitlines() if text.strip().startswith(f"{knob.name}:"))
        assert "  # " in line, f"{knob.name} is not documented"
    for config in PRESETS.values():
        assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    ("knobs", "name"),
    [({"products": 0}, "products"), ({"picture_size": 4}, "picture_size"), ({"products_per_query": (3, 2)}, "products_per_query"),
     ({"zoom": (0.0, 1.0)}, "zoom"), ({"jpeg": (90, 20)}, "jpeg")],
)  # fmt: skip
def test_bad_knobs_are_named(tmp_path, knobs, name):
    with pytest.raises(InputError, match=name):
        draw_shelf(tmp_path / "shelf", replace(tiny, **knobs))
    assert not (tmp_path / "shelf").exists()


def test_unknown_size_names_the_nearest():
    with pytest.raises(InputError, match="small"):
        load_shelf("smal")


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        draw_shelf(tmp_path, "tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_load_shelf_draws_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PRODUCT_RETRIEVAL_CACHE", str(tmp_path))
    config = replace(tiny, products=6, queries=2, train_multi=2)
    first = load_shelf(config)
    stamp = (first.root / "catalog.parquet").stat().st_mtime_ns
    second = load_shelf(config)
    assert (second.root / "catalog.parquet").stat().st_mtime_ns == stamp
    assert first.frame.equals(second.frame)
    assert json.loads((first.root / "shelf.json").read_text())["products"] == 6
    assert load_shelf(config, seed=1).root != first.root


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_leaves_no_half_shelf(tmp_path, workers):
    call = "draw_shelf(sys.argv[1], 'small', workers=int(sys.argv[2]))"
    code = f"import sys; from product_retrieval.data.shelf import draw_shelf; {call}"
    folder = tmp_path / "shelf"
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), str(workers)])
    deadline = time.time() + 30
    while time.time() < deadline and not list(tmp_path.glob(".shelf*/drawn/images/train/*.jpg")):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not folder.exists()
    drawn = draw_shelf(folder, replace(tiny, products=4, queries=1))
    assert len(drawn) == len(drawn.paths) and all(path.exists() for path in drawn.paths)


@pytest.mark.slow
def test_a_histogram_stays_far_from_the_top():
    from product_retrieval.data.pictures import PictureLoader
    from product_retrieval.encoders import ColorHistogram, RawPixels, TitleWords
    from product_retrieval.evaluation import evaluate, positives_from_labels, rank

    shelf = load_shelf("small")
    query, gallery = shelf.split("query"), shelf.split("gallery")
    for encoder in (ColorHistogram(), RawPixels(), TitleWords().fit(gallery.titles)):
        batches = [PictureLoader(part, encoder.transform, workers=0) for part in (query, gallery)]
        q, g = (np.concatenate([np.asarray(encoder(b), np.float32) for b in part]) for part in batches)
        scores = evaluate(rank(q, g, 100), positives_from_labels(query.labels, gallery.labels), metrics=("MAR@10", "mAP@10"))
        assert scores.values["MAR@10"] < 0.6 and scores.values["mAP@10"] < 0.6
