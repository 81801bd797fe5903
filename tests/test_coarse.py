"""Stage one: levels, title words, balanced drawing, training from catalogue to saved model, bad input. Tiny shelf, short runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.data.pictures import PictureLoader
from product_retrieval.encoders import ImageEncoder, image_encoder, load_encoder, vectors_of
from product_retrieval.training import TrainConfig, fit, load_recipe
from product_retrieval.v2l.coarse import (
    CoarseObjective,
    CoarseRecipe,
    DrawnBatches,
    TitleWordLoss,
    balanced_rows,
    coarse_items,
    coarse_views,
    frequent_words,
    level_numbers,
    soft_cross_entropy,
    train_coarse,
    word_targets,
)

recipes = Path(__file__).resolve().parents[1] / "recipes"


def short(**changes):
    recipe = load_recipe(recipes / "tiny-coarse.toml", CoarseRecipe)
    return replace(recipe, size=32, dim=8, **{"train": replace(recipe.train, max_steps=3, epochs=1), **changes})


def changed(catalog, **columns):
    return Catalog.from_frame(catalog.frame.assign(**columns), catalog.root, "changed")


@pytest.mark.parametrize("name", ["tiny", "shelf", "grocery", "eproduct"])
def test_recipes_are_read(name):
    recipe = load_recipe(recipes / f"{name}-coarse.toml", CoarseRecipe)
    assert any(recipe.levels) and recipe.train.epochs >= 1
    assert image_encoder(recipe.backbone.split(".")[0], "random", size=64).dim if name != "eproduct" else True


def test_eproduct_backbone_exists():
    import timm

    backbone = load_recipe(recipes / "eproduct-coarse.toml", CoarseRecipe).backbone
    assert timm.is_model(backbone.split(".")[0]) and timm.get_pretrained_cfg(backbone) is not None


def test_a_run_from_catalogue_to_saved_model(tiny_shelf, tmp_path):
    encoder = train_coarse(tiny_shelf, short(), tmp_path / "run", workers=0)
    history = encoder.history
    assert history.steps == 3 and not encoder.training
    assert list(history.validation) == ["MAR@10", "coarse accuracy"]
    assert {"loss", "level 1", "level 2", "level 3", "accuracy"} <= set(history.train)
    saved = load_encoder(tmp_path / "run" / "model")
    some = tiny_shelf.split("query").select([0, 1, 2])
    assert isinstance(saved, ImageEncoder) and saved.config.pool == "gem" and saved.config.neck
    assert np.array_equal(vectors_of(saved, some), vectors_of(encoder, some))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "level 3 (10 classes)" in card and "product labels were not used" in card


def test_the_total_is_the_weighted_sum(tiny_shelf):
    recipe = short(levels=(0.3, 0.0, 2.0), words=0.7, more_than=1)
    items = coarse_items(tiny_shelf, recipe)
    model = image_encoder("resnet10t", "random", size=32, dim=8)
    objective = CoarseObjective(items, recipe, 8)
    values = objective(model, next(iter(PictureLoader(items, model.transform, batch_size=16, workers=0))))
    total = 0.3 * values["level 1"] + 2.0 * values["level 3"] + 0.7 * values["words"]
    assert torch.isclose(values["loss"], total) and "level 2" not in values
    assert not [key for key in objective.state_dict() if "target" in key], "labels of items are not saved"


@pytest.mark.parametrize("loss", ["arcface", "sub-centre-arcface", "circle", "proxy-anchor", "multi-similarity"])
def test_other_losses_train(tiny_shelf, tmp_path, loss):
    encoder = train_coarse(tiny_shelf, short(loss=loss, options={}), tmp_path / "run", workers=0)
    assert np.isfinite(encoder.history.train["loss"]).all()


def test_training_never_asks_for_labels_or_boxes(tiny_shelf, tmp_path):
    recipe = short(words=0.5, more_than=1)
    items = coarse_items(tiny_shelf, recipe)
    assert not items.has("labels") and not items.has("boxes")
    bare = Catalog.from_frame(tiny_shelf.frame.drop(columns=["labels", "boxes"]), tiny_shelf.root, "bare")
    a = train_coarse(bare, recipe, tmp_path / "a", workers=0)
    b = train_coarse(tiny_shelf.train, recipe, tmp_path / "b", workers=0)
    assert a.history.best is None and b.history.best is None, "no labels, no validation"
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_titles_are_not_read_unless_asked_for(tiny_shelf, tmp_path):
    silent = changed(tiny_shelf, title="")
    a = train_coarse(tiny_shelf, short(), tmp_path / "a", workers=0)
    b = train_coarse(silent, short(), tmp_path / "b", workers=0)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_rows_without_a_level_do_not_count_at_that_level(tiny_shelf):
    "Cut some paths short: the deep heads see the other rows only, the first level sees all."
    recipe = short()
    items = coarse_items(tiny_shelf, recipe)
    frame = items.frame
    cut = np.arange(len(frame)) % 3 == 0
    paths = [path.split("/")[0] if c else path for path, c in zip(frame["category"], cut, strict=True)]
    shortened = items.with_frame(frame.assign(category=paths), items.lines)
    torch.manual_seed(0)
    objective = CoarseObjective(shortened, recipe, 8)
    assert (objective.targets_1 >= 0).all() and ((objective.targets_3 >= 0) == torch.from_numpy(~cut)).all()
    batch = next(iter(PictureLoader(shortened, None, batch_size=len(frame), workers=0)))
    vectors = torch.randn(len(frame), 8)
    values = objective.losses(vectors, batch)
    head, keep = objective.heads["3"], torch.from_numpy(~cut)
    assert torch.isclose(values["level 3"], head(vectors[keep], objective.targets_3[keep]))
    assert 0 <= values["accuracy"] <= 1


def test_a_batch_that_has_no_row_of_a_level(tiny_shelf):
    recipe = short()
    items = coarse_items(tiny_shelf, recipe)
    paths = [path if row >= 8 else path.split("/")[0] for row, path in enumerate(items.categories())]
    items = items.with_frame(items.frame.assign(category=paths), items.lines)
    objective = CoarseObjective(items, recipe, 8)
    batch = next(iter(PictureLoader(items, None, batch_size=8, workers=0)))
    vectors = torch.randn(8, 8, requires_grad=True)
    values = objective.losses(vectors, batch)
    assert values["level 3"] == 0 and values["accuracy"] == 0 and values["loss"] > 0
    values["loss"].backward()
    assert torch.isfinite(vectors.grad).all()


def test_level_numbers():
    paths = ["a/b/c", "a/b/d", "a/e", "f/g/h", ""]
    assert level_numbers(paths, 1) == (["a", "f"], pytest.approx(torch.tensor([0, 0, 0, 1, -1])))
    names, numbers = level_numbers(paths, 3)
    assert names == ["a/b/c", "a/b/d", "f/g/h"] and numbers.tolist() == [0, 1, -1, 2, -1]


def test_a_path_of_the_same_name_at_two_places_is_two_classes():
    names, numbers = level_numbers(["care/sets", "hair/sets"], 2)
    assert names == ["care/sets", "hair/sets"] and numbers.tolist() == [0, 1]


def test_title_words():
    titles = ["The Hand cream", "hand soap", "HAND cream, cream", "lipstick"]
    assert frequent_words(titles, 1) == ["cream", "hand"] and "the" not in frequent_words(titles, 0)
    targets = word_targets(titles, ["cream", "hand"])
    assert targets.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]


def test_soft_cross_entropy_against_torch():
    logits, targets = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.rand(6, 5, dtype=torch.float64)
    targets = targets / targets.sum(1, keepdim=True)
    assert torch.isclose(soft_cross_entropy(logits, targets), torch.nn.functional.cross_entropy(logits, targets))
    hard = torch.nn.functional.one_hot(torch.arange(6) % 5, 5).double()
    right = logits.softmax(1)[range(6), torch.arange(6) % 5]
    assert torch.isclose(soft_cross_entropy(logits, hard, poly=2.0), (-right.log() + 2 * (1 - right)).mean())
    targets[2] = 0
    rest = [0, 1, 3, 4, 5]
    assert torch.isclose(soft_cross_entropy(logits, targets, 1.0), soft_cross_entropy(logits[rest], targets[rest], 1.0))
    assert soft_cross_entropy(logits, torch.zeros(6, 5, dtype=torch.float64)) == 0


def test_title_word_loss_learns():
    torch.manual_seed(0)
    loss, encoder = TitleWordLoss(["cream", "hand", "soap"], 4), torch.nn.Embedding(4, 4)
    titles = ["hand cream", "hand soap", "soap", "lipstick"]
    optimizer = torch.optim.AdamW([*loss.parameters(), *encoder.parameters()], 0.05)
    for _ in range(200):
        value = loss(encoder.weight, titles)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    entropy = (2 * np.log(2) + 0) / 3  # what two titles with two words each cannot get below
    assert entropy - 1e-4 < value.item() < entropy + 0.1


def test_balanced_rows():
    classes = ["a"] * 60 + ["b"] * 6 + ["c"]
    for epoch in range(5):
        assert sorted(balanced_rows(classes, 0.0, 0, epoch)) == list(range(67))
        rows = balanced_rows(classes, 1.0, 0, epoch)
        count = np.bincount([0 if r < 60 else 1 if r < 66 else 2 for r in rows], minlength=3)
        assert len(rows) == 67 and (abs(count - 67 / 3) <= 2).all(), "a class with one picture is drawn as often"
        twice = np.bincount(rows[(rows >= 60) & (rows < 66)] - 60, minlength=6)
        assert twice.max() - twice.min() <= 1, "no item is repeated before all were drawn"
    assert not np.array_equal(balanced_rows(classes, 1.0, 0, 0), balanced_rows(classes, 1.0, 0, 1))
    assert np.array_equal(balanced_rows(classes, 0.5, 3, 2), balanced_rows(classes, 0.5, 3, 2))


def test_drawn_batches_carry_the_rows_of_the_items(tiny_shelf):
    recipe = short(balance=1.0)
    items = coarse_items(tiny_shelf, recipe)
    batches = coarse_views(items, image_encoder("resnet10t", "random", size=32), recipe, workers=0)
    assert isinstance(batches, DrawnBatches)
    batches.set_epoch(1)
    whole = list(batches.iter_from(0))
    assert len(whole) == len(batches)
    for batch in whole:
        assert batch.item_ids == [items.ids[row] for row in batch.rows]
    rest = list(batches.iter_from(1))
    assert all(torch.equal(a.pixels, b.pixels) and torch.equal(a.rows, b.rows) for a, b in zip(whole[1:], rest, strict=True))


def test_a_balanced_run_goes_on_where_it_was_stopped(tiny_shelf, tmp_path):
    "Stopped inside an epoch and resumed, with the same bits as the run in one go."
    recipe = short(balance=0.5, train=TrainConfig(epochs=3, checkpoint_every=1, tensorboard=False, precision="fp32"))
    items = coarse_items(tiny_shelf, recipe)

    def parts():
        torch.manual_seed(0)
        model = image_encoder("resnet10t", "random", size=32, dim=8, pool="gem", neck=True)
        return model, CoarseObjective(items, recipe, 8), coarse_views(items, model, recipe, workers=0)

    model, *rest = parts()
    fit(model, *rest, recipe.train, tmp_path / "whole")
    broken, objective, batches = parts()
    calls = []

    def until_five(model, batch):
        calls.append(batch)
        if len(calls) > 3:
            raise RuntimeError("killed")
        return objective(model, batch)

    class Killed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.objective = objective.heads, [objective]

        def forward(self, model, batch):
            return until_five(model, batch)

    with pytest.raises(RuntimeError, match="killed"):
        fit(broken, Killed(), batches, recipe.train, tmp_path / "broken")
    resumed, *rest = parts()
    fit(resumed, *rest, recipe.train, tmp_path / "broken")
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_harder_views_change_the_pictures_and_stay_repeatable(tiny_shelf):
    recipe = short(trivial=True, erase=1.0)
    items, model = coarse_items(tiny_shelf, recipe), image_encoder("resnet10t", "random", size=32)
    first = [next(iter(coarse_views(items, model, r, workers=0))).pixels for r in (recipe, recipe, short())]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert torch.isfinite(first[0]).all()


def test_a_class_with_one_picture_is_fine(tiny_shelf, tmp_path):
    frame = tiny_shelf.frame
    rows = np.flatnonzero((frame["split"] == "train") & (frame["category"] != ""))
    frame.loc[rows[0], "category"] = "meta/alone/alone"
    catalog = Catalog.from_frame(frame, tiny_shelf.root, "x")
    encoder = train_coarse(catalog, short(balance=1.0, class_power=0.5), tmp_path / "run", workers=0)
    assert np.isfinite(encoder.history.train["loss"]).all()


def test_bad_catalogues(tiny_shelf, tmp_path):
    bare = Catalog.from_frame(tiny_shelf.frame.drop(columns=["category"]), tiny_shelf.root, "bare")
    with pytest.raises(InputError, match="bare: no training item has a category of 1 names"):
        train_coarse(bare, short(), tmp_path / "run")
    with pytest.raises(InputError, match=r"only one class \('a'\)"):
        train_coarse(changed(tiny_shelf, category="a/b/c"), short(), tmp_path / "run")
    shallow = [path.split("/")[0] for path in tiny_shelf.categories()]
    with pytest.raises(InputError, match=r"level 2: no path has so many names \(the longest has 1\)"):
        train_coarse(changed(tiny_shelf, category=shallow), short(), tmp_path / "run")
    words_only = short(levels=(0.0,), words=1.0, more_than=1000)
    with pytest.raises(InputError, match="fewer than two words were seen more than 1000 times"):
        train_coarse(tiny_shelf, words_only, tmp_path / "run")
    with pytest.raises(InputError, match="no training item has a title"):
        train_coarse(changed(tiny_shelf, title=""), words_only, tmp_path / "run")
    assert not (tmp_path / "run" / "train.csv").exists()


def test_words_alone_train_without_a_category(tiny_shelf, tmp_path):
    bare = Catalog.from_frame(tiny_shelf.frame.drop(columns=["category"]), tiny_shelf.root, "bare")
    encoder = train_coarse(bare, short(levels=(), words=1.0, more_than=2), tmp_path / "run", workers=0)
    assert list(encoder.history.validation) == ["MAR@10"] and "words" in encoder.history.train
    assert "words of titles" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet10"}, "did you mean 'resnet10t'"),
        ({"loss": "cosfase"}, "did you mean 'cosface'"),
        ({"options": {"margn": 0.2}}, "unknown option 'margn'; did you mean 'margin'"),
        ({"pool": "gam"}, "did you mean 'gem'"),
    ],
)
def test_names_that_do_not_exist(tiny_shelf, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_coarse(tiny_shelf, short(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0.0, 0.0)}, "all weights are 0"),
        ({"levels": (1.0, -0.5)}, "a weight is below 0"),
        ({"balance": 1.5}, "balance = 1.5: expected 0 to 1"),
        ({"erase": -0.1}, "erase = -0.1: expected 0 to 1"),
        ({"more_than": -1}, "more_than = -1"),
    ],
)
def test_recipes_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        CoarseRecipe(**changes)


def test_a_recipe_file_with_a_wrong_key_names_it(tmp_path):
    (tmp_path / "typo.toml").write_text('backbone = "resnet10t"\nlevel = [1.0]\n')
    with pytest.raises(InputError, match=r"typo.toml: unknown key 'level'; did you mean 'levels'"):
        load_recipe(tmp_path / "typo.toml", CoarseRecipe)


def test_a_checkpoint_of_another_backbone(tiny_shelf, tmp_path, mobilenet_weights):
    with pytest.raises(InputError, match="do not fit resnet10t"):
        train_coarse(tiny_shelf, short(), tmp_path / "run", weights=mobilenet_weights)


def test_a_saved_model_starts_another_run_and_another_backbone_is_refused(tiny_shelf, tmp_path):
    train_coarse(tiny_shelf, short(), tmp_path / "run", workers=0)
    file = tmp_path / "run" / "model" / "model.safetensors"
    second = train_coarse(tiny_shelf, short(), tmp_path / "more", weights=file, workers=0)
    assert second.config.weights == "model.safetensors"
    with pytest.raises(InputError, match="do not fit resnet18"):
        train_coarse(tiny_shelf, short(backbone="resnet18"), tmp_path / "other", weights=file)


def test_a_folder_with_other_files_is_refused_before_the_training(tiny_shelf, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train_coarse(tiny_shelf, short(), tmp_path / "run", workers=0)
