"""CAPTURE end to end on the tiny shelf: batches, pretraining, instances, the system's folder, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from product_retrieval.capture.captions import TitleTokens
from product_retrieval.capture.detector import DetectorRecipe
from product_retrieval.capture.instances import RULES, as_items, instance_vectors, merge_lists, rank_catalog, rank_instances
from product_retrieval.capture.model import CaptureModel, capture_config
from product_retrieval.capture.pretrain import (
    USES,
    CaptureBatches,
    CaptureRecipe,
    item_vectors,
    pretrain_capture,
    vectors_from,
)
from product_retrieval.capture.regions import GridProposals, extract_regions
from product_retrieval.capture.system import SystemConfig, build_capture, proposer_of, search_instances
from product_retrieval.core import InputError, recipe_path
from product_retrieval.encoders import RawPixels, load_encoder
from product_retrieval.search import Index
from product_retrieval.training import load_recipe

recipes = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def system(tiny_shelf, tmp_path_factory):
    return build_capture(tiny_shelf, recipe_path("tiny-capture"), tmp_path_factory.mktemp("capture") / "run")


@pytest.fixture(scope="module")
def regions(tiny_shelf, tmp_path_factory):
    return extract_regions(tiny_shelf, GridProposals(), RawPixels(), tmp_path_factory.mktemp("grid") / "regions", 4)


def short(**changes):
    recipe = load_recipe(recipe_path("tiny-capture"), CaptureRecipe)
    return replace(recipe, **changes)


@pytest.mark.parametrize("name", ["tiny-capture", "shelf-capture", "demo-capture"])
def test_recipes_are_read_and_name_others(name):
    recipe = load_recipe(recipe_path(name), CaptureRecipe)
    assert recipe_path(recipe.detector).exists() and recipe_path(recipe.encoder).exists()


@pytest.mark.parametrize("name", ["product1m-capture", "product1m-ums"])
def test_full_size_recipes_describe_models_that_can_be_built(name):
    recipe = load_recipe(recipe_path(name), CaptureRecipe)
    assert recipe.detector == "grid" or load_recipe(recipe_path(recipe.detector), DetectorRecipe).detector.backbone == "resnet50"
    with torch.device("meta"):
        sizes = {"tokens": recipe.length, "regions": recipe.regions + 1, "region_dim": 2048}
        model = CaptureModel(capture_config(recipe.preset, **sizes, **recipe.model))
    assert sum(p.numel() for p in model.parameters()) > 50e6


def test_batches_come_in_an_order_of_seed_and_epoch(tiny_shelf, regions):
    words = TitleTokens.train(tiny_shelf.train.titles, 200)
    batches = CaptureBatches(tiny_shelf.train, words, regions, 8, shuffle=True, seed=3, drop_last=True)
    rows = [b.rows.tolist() for b in batches]
    assert len(rows) == len(batches) == len(tiny_shelf.train) // 8
    assert [b.rows.tolist() for b in batches.iter_from(2)] == rows[2:]
    batches.set_epoch(1)
    assert [b.rows.tolist() for b in batches] != rows
    batch = next(iter(batches))
    assert batch.item_ids == [tiny_shelf.train.ids[row] for row in batch.rows.tolist()]


def test_training_sees_no_answers(tiny_shelf, regions, tmp_path):
    bare = tiny_shelf.train  # a TrainCatalog: no labels, no boxes, no validation
    trained = pretrain_capture(bare, regions, short(), tmp_path / "run")
    assert trained.history.steps == 6 and trained.history.best is None


def test_a_killed_run_ends_with_the_same_weights(tiny_shelf, regions, tmp_path):
    whole = pretrain_capture(tiny_shelf, regions, short(), tmp_path / "whole")
    recipe = short()
    stopped = replace(recipe, train=replace(recipe.train, checkpoint_every=2))
    run = tmp_path / "stopped"

    class Killed(Exception):
        pass

    from product_retrieval.capture import pretrain

    original, calls = pretrain.CaptureObjective.forward, []

    def dies(self, model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return original(self, model, batch)

    pretrain.CaptureObjective.forward = dies
    try:
        with pytest.raises(Killed):
            pretrain_capture(tiny_shelf, regions, stopped, run)
    finally:
        pretrain.CaptureObjective.forward = original
    resumed = pretrain_capture(tiny_shelf, regions, stopped, run)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("streams", ["both", "text", "image", "dual", "single", "no-co", "late"])
def test_every_variant_trains_and_ranks(tiny_shelf, regions, tmp_path, streams):
    trained = pretrain_capture(tiny_shelf, regions, short(model={"streams": streams}), tmp_path / streams)
    ranking = rank_catalog(trained, tiny_shelf, regions, "projections", instances=False, k=5)
    assert ranking.shape == (len(tiny_shelf.split("query")), 5)
    if streams != "text":
        assert rank_catalog(trained, tiny_shelf, regions, "image", k=5).min() >= 0
    if streams in ("text", "image"):
        other = "image" if streams == "text" else "text"
        with pytest.raises(InputError, match="has no such stream"):
            item_vectors(trained.model, trained.batches(tiny_shelf.split("gallery"), regions), other)


def test_vectors_have_length_one_for_every_use(tiny_shelf, regions, tmp_path):
    trained = pretrain_capture(tiny_shelf, regions, short(), tmp_path / "run")
    for use in USES:
        vectors = item_vectors(trained.model, trained.batches(tiny_shelf.split("gallery"), regions), use)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5), use
    with pytest.raises(InputError, match=r"did you mean|fused"):
        vectors_from(None, "fusd")


def test_regions_of_another_catalogue(tiny_shelf, regions):
    words = TitleTokens.train(tiny_shelf.train.titles, 200)
    other = tiny_shelf.split("gallery")
    renamed = type(other).from_frame(other.frame.assign(item_id=[f"x{i}" for i in range(len(other))]), other.root)
    with pytest.raises(InputError, match="'x0'"):
        CaptureBatches(renamed, words, regions)


def test_no_training_items(tiny_shelf, regions, tmp_path):
    with pytest.raises(InputError, match="no item of split 'train'"):
        pretrain_capture(tiny_shelf.split("gallery"), regions, short(), tmp_path / "run")


def test_an_unknown_setting_of_the_model(tiny_shelf, regions, tmp_path):
    with pytest.raises(InputError, match=r"strams.*streams"):
        pretrain_capture(tiny_shelf, regions, short(model={"strams": "dual"}), tmp_path / "run")


def test_instances_are_one_per_proposal_or_the_whole(tiny_shelf, regions, tmp_path):
    trained = pretrain_capture(tiny_shelf, regions, short(), tmp_path / "run")
    batches = trained.batches(tiny_shelf.split("query"), regions)
    asked = instance_vectors(trained.model, batches)
    assert (np.bincount(asked.owner) == 4).all()  # the grid has four cells
    batch = batches.of([0, 1])
    batch.region_mask[1, 1:] = False
    items, boxes = as_items(batch)
    assert items.rows.tolist() == [0, 0, 0, 0, 1] and boxes[-1].tolist() == [0, 0, 1, 1]
    assert torch.equal(items.regions[-1, 0], batch.regions[1, 0])


def test_merging_copes_with_short_and_missing_lists():
    rows, scores = np.array([[3, -1], [3, 1]]), np.array([[0.5, -1.0], [0.4, 0.3]])
    for rule in RULES:
        merged = merge_lists(rows, scores, np.array([1, 1]), 3, rule, 3)
        assert merged[0].tolist() == merged[2].tolist() == [-1, -1, -1], rule
        assert sorted(merged[1].tolist()) == [-1, 1, 3], rule
    assert merge_lists(rows[:0], scores[:0], np.array([], int), 2, "score", 3).tolist() == [[-1] * 3] * 2


def test_one_list_keeps_its_order_by_every_rule():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((20, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    from product_retrieval.capture.instances import Instances

    asked = Instances(vectors[:5], np.arange(5), np.zeros((5, 4)))
    plain = rank_instances(asked, vectors, 5, "score", 10)
    for rule in RULES:
        assert np.array_equal(rank_instances(asked, vectors, 5, rule, 10), plain), rule


def test_a_system_loads_back_identically(system, tiny_shelf, tmp_path):
    folder = system.save_pretrained(tmp_path / "system")
    again = load_encoder(folder)
    gallery = tiny_shelf.split("gallery")
    first, second = (one.embed_catalog(gallery, tmp_path / name) for name, one in (("a", system), ("b", again)))
    assert np.array_equal(first.vectors, second.vectors)
    assert "pictures and titles" in (folder / "README.md").read_text()
    index = Index.build(second, kind="flat")
    photo = tiny_shelf.split("query").paths[0]
    assert search_instances(system, index, [photo], ["lipstick"], 3) == search_instances(again, index, [photo], ["lipstick"], 3)


def test_stored_and_live_pictures_give_the_same_vectors(system, tiny_shelf, tmp_path):
    queries = tiny_shelf.split("query").select([0, 1, 2])
    stored = system.regions_of(queries, tmp_path / "regions")
    c = system.config
    batches = CaptureBatches(queries, system.words, stored, length=c.length, limit=stored.limit, scale=c.scale)
    kept, live = instance_vectors(system.model, batches, c.use), system.instances(queries.paths, queries.titles)
    assert np.array_equal(kept.owner, live.owner) and np.allclose(kept.vectors, live.vectors, atol=1e-5)


@pytest.mark.parametrize("title", ["", "x" * 10_000, "\u2603 \U0001f484 口红"])
def test_odd_captions_and_a_picture_of_one_pixel(system, tmp_path, title):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    asked = system.instances([tmp_path / "dot.png"], [title])
    assert len(asked) >= 1 and np.isfinite(asked.vectors).all()


def test_titles_that_do_not_fit_the_pictures(system, tiny_shelf):
    with pytest.raises(InputError, match="2 titles for 1 pictures"):
        system.instances([tiny_shelf.split("query").paths[0]], ["a", "b"])


def test_broken_system_folders(system, tmp_path):
    folder = system.save_pretrained(tmp_path / "system")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rul": "score"}))
    with pytest.raises(InputError, match=r"config\.json"):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_encoder(folder)


def test_a_taken_folder_is_refused_before_anything_trains(tiny_shelf, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        build_capture(tiny_shelf, recipe_path("tiny-capture"), tmp_path / "run")
    assert not (tmp_path / "run" / "detector").exists()


def test_proposers_by_name(system, tmp_path):
    folder = system.save_pretrained(tmp_path / "system")
    proposer, describer = proposer_of(folder / "detector")
    assert describer is proposer.detector
    with pytest.raises(InputError, match="not a detector"):
        proposer_of(folder / "encoder")
    with pytest.raises(InputError, match="grid"):
        proposer_of("grid")


def test_an_index_of_another_system_is_refused(system, tiny_shelf, tmp_path):
    index = Index.build(system.embed_catalog(tiny_shelf.split("gallery"), tmp_path / "vectors"), kind="flat")
    other = type(system)(system.detector, system.encoder, system.words, system.model, SystemConfig(use="text"))
    with pytest.raises(InputError):
        search_instances(other, index, [tiny_shelf.split("query").paths[0]])


@pytest.mark.parametrize("streams", ["both", "text", "image"])
def test_the_dimension_counts_the_streams_that_are_there(system, tiny_shelf, regions, tmp_path, streams):
    trained = pretrain_capture(tiny_shelf, regions, short(model={"streams": streams}), tmp_path / "run")
    gallery = trained.batches(tiny_shelf.split("gallery"), regions)
    for use in ("projections", "fused", *(["text", "image"] if streams == "both" else [streams])):
        one = type(system)(system.detector, system.encoder, trained.words, trained.model, SystemConfig(use=use))
        assert one.dim == item_vectors(trained.model, gallery, use).shape[1], use


def test_the_late_form_needs_no_detector(tiny_shelf, system, tmp_path):
    recipe = short(detector="grid", regions=0, model={"streams": "late"})
    late = build_capture(tiny_shelf, recipe, tmp_path / "run", encoder=system.save_pretrained(tmp_path / "parts") / "encoder")
    again = load_encoder(tmp_path / "run" / "model")
    assert late.detector is None and again.detector is None and not (tmp_path / "run" / "detector").exists()
    gallery = tiny_shelf.split("gallery")
    first, second = (one.embed_catalog(gallery, tmp_path / name) for name, one in (("a", late), ("b", again)))
    assert np.array_equal(first.vectors, second.vectors)
    photos = tiny_shelf.split("query").paths[:2]
    assert late.instances(photos, ["a", "b"]).owner.tolist() == [0, 1]  # each picture asks as a whole


def test_a_grid_in_place_of_a_detector(tiny_shelf, system, tmp_path):
    folder = system.save_pretrained(tmp_path / "parts")
    quarters = build_capture(tiny_shelf, short(), tmp_path / "run", detector="grid", encoder=folder / "encoder")
    assert np.bincount(quarters.instances(tiny_shelf.split("query").paths[:2]).owner).tolist() == [4, 4]
