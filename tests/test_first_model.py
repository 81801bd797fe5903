"""The first trained model: weak supervision, bad input, resume, recipes; short runs on the tiny shelf."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.encoders import ColorHistogram, ImageEncoder, load_encoder, vectors_of
from product_retrieval.first_model import (
    CoarseMargin,
    FirstRecipe,
    class_numbers,
    coarse_part,
    knn_accuracy,
    nearest_labels,
    score_retrieval,
    start_encoder,
    train_first_model,
)
from product_retrieval.training import TrainConfig, load_recipe

recipes = Path(__file__).resolve().parents[1] / "recipes"


def short(**changes):
    recipe = load_recipe(recipes / "tiny-first.toml", FirstRecipe)
    train = replace(recipe.train, max_steps=3, epochs=1)
    return replace(recipe, size=32, dim=8, **{"train": train, **changes})


@pytest.mark.parametrize("name", ["tiny-first", "shelf-first", "grocery-first"])
def test_recipes_are_read(name):
    recipe = load_recipe(recipes / f"{name}.toml", FirstRecipe)
    assert recipe.train.epochs >= 1 and recipe.size >= 32


def test_a_run_from_catalogue_to_saved_model(tiny_shelf, tmp_path):
    encoder = train_first_model(tiny_shelf, short(), tmp_path / "run", workers=0)
    assert encoder.history.steps == 3 and 0 <= encoder.history.best <= 1 and not encoder.training
    saved = load_encoder(tmp_path / "run" / "model")
    some = tiny_shelf.split("query").select([0, 1, 2])
    assert isinstance(saved, ImageEncoder) and np.array_equal(vectors_of(saved, some), vectors_of(encoder, some))
    assert "product labels were not used" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert saved.name == encoder.name == "resnet10t, coarse"


def test_a_folder_with_other_files_is_refused_before_the_training(tiny_shelf, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train_first_model(tiny_shelf, short(), tmp_path / "run", workers=0)
    assert not (tmp_path / "run" / "train.csv").exists()


def test_the_same_seed_gives_the_same_model_and_a_finished_run_is_not_repeated(tiny_shelf, tmp_path):
    first = train_first_model(tiny_shelf, short(), tmp_path / "a", workers=0)
    second = train_first_model(tiny_shelf, short(), tmp_path / "b", workers=0)
    again = train_first_model(tiny_shelf, short(), tmp_path / "a", workers=0)
    other = train_first_model(tiny_shelf, short(seed=1), tmp_path / "c", workers=0)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]) and torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(first.head[0].weight, other.head[0].weight)


def test_training_never_asks_for_labels_or_boxes(tiny_shelf, tmp_path, monkeypatch):
    "A train view whose labels and boxes cannot be touched, and a catalogue that has none, train alike."
    items, _ = coarse_part(tiny_shelf)
    assert not items.has("labels") and not items.has("boxes")
    without = Catalog.from_frame(tiny_shelf.frame.drop(columns=["labels", "boxes"]), tiny_shelf.root, "bare")
    a = train_first_model(without, short(), tmp_path / "a", workers=0)
    b = train_first_model(tiny_shelf.train, short(), tmp_path / "b", workers=0)
    assert a.history.best is None and b.history.best is None, "no labels, no validation"
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_bad_catalogues(tiny_shelf, tmp_path):
    frame = tiny_shelf.frame
    bare = Catalog.from_frame(frame.drop(columns=["category"]), tiny_shelf.root, "bare")
    with pytest.raises(InputError, match="no training item has a category"):
        train_first_model(bare, short(), tmp_path / "run")
    same = Catalog.from_frame(frame.assign(category="a/b/c"), tiny_shelf.root, "same")
    with pytest.raises(InputError, match="only one class"):
        train_first_model(same, short(), tmp_path / "run")
    with pytest.raises(InputError, match="did you mean 'resnet10t'"):
        train_first_model(tiny_shelf, short(backbone="resnet10"), tmp_path / "run")
    with pytest.raises(InputError, match="recipe not found"):
        train_first_model(tiny_shelf, tmp_path / "none.toml", tmp_path / "run")


def test_a_class_with_one_picture_is_fine(tiny_shelf, tmp_path):
    frame = tiny_shelf.frame
    rows = np.flatnonzero((frame["split"] == "train") & (frame["category"] != ""))
    frame.loc[rows[0], "category"] = "meta/alone/alone"
    encoder = train_first_model(Catalog.from_frame(frame, tiny_shelf.root, "x"), short(), tmp_path / "run", workers=0)
    assert encoder.history.steps == 3


def test_levels():
    class Items:
        name = "x"

        def categories(self, level):
            return ["/".join(path.split("/")[:level]) for path in ("a/b/c", "a/b/d", "a/e/f", "")]

        def select(self, rows):
            return rows

    assert coarse_part(Items(), level=1) == ([0, 1, 2], ["a", "a", "a"])
    assert coarse_part(Items(), level=2)[1] == ["a/b", "a/b", "a/e"]
    assert class_numbers(["b", "a", "b"])[1].tolist() == [1, 0, 1]


def test_objective_falls_on_one_batch(tiny_shelf):
    from product_retrieval.data.pictures import PictureLoader

    items, categories = coarse_part(tiny_shelf)
    names, targets = class_numbers(categories)
    model = start_encoder(short())
    objective = CoarseMargin(targets, len(names), model.dim)
    assert "targets" not in objective.state_dict(), "labels of the training items are not saved with the weights"
    batch = next(iter(PictureLoader(items, model.transform, batch_size=8, workers=0)))
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=3e-3)
    model.train()
    losses = []
    for _ in range(15):
        loss = objective(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def test_bf16_trains(tiny_shelf, tmp_path):
    train = TrainConfig(max_steps=2, precision="bf16", tensorboard=False)
    encoder = train_first_model(tiny_shelf, short(train=train), tmp_path / "run", workers=0)
    assert np.isfinite(encoder.history.train["loss"]).all()
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_nearest_labels_against_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    random = np.random.default_rng(0)
    points = random.normal(size=(250, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    train, test = points[:200], points[200:]
    labels = random.integers(0, 7, 200).astype(str)
    judge = neighbors.KNeighborsClassifier(5, metric="cosine", weights=lambda distance: 1 - distance, algorithm="brute")
    theirs = judge.fit(train, labels).predict(test)
    assert (nearest_labels(train.astype(np.float32), labels, test.astype(np.float32)) == theirs).all()
    assert knn_accuracy(train.astype(np.float32), labels, train.astype(np.float32), labels, k=1) == 1
    assert len(nearest_labels(train[:2].astype(np.float32), labels[:2], test.astype(np.float32), k=5)) == 50


def test_score_retrieval_of_a_baseline(tiny_shelf):
    found = score_retrieval(ColorHistogram(), tiny_shelf, workers=0)
    assert set(found.values) == {"MAR@10", "mAP@10"} and 0 < found.values["MAR@10"] < 1


def test_from_real_weights(tiny_shelf, mobilenet_weights, tmp_path):
    recipe = load_recipe(recipes / "grocery-first.toml", FirstRecipe)
    recipe = replace(recipe, size=32, test_size=48, batch_size=8, train=replace(recipe.train, max_steps=1))
    encoder = train_first_model(tiny_shelf, recipe, tmp_path / "run", weights=mobilenet_weights, workers=0)
    assert encoder.dim == 1280 and encoder.size == 48 and encoder.config.weights == mobilenet_weights.name
