"""Stage two: the loss against a slow oracle, the queue, resume with momentum encoder and queue, bad input, forgetting."""

import math
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toy import in_child

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.data.pictures import PictureLoader
from product_retrieval.encoders import ColorHistogram, ImageEncoder, image_encoder, load_encoder, unit, vectors_of
from product_retrieval.first_model import FirstRecipe, train_first_model
from product_retrieval.training import TrainConfig, checkpoints, fit, load_recipe
from product_retrieval.v2l.fine import (
    FineObjective,
    FineRecipe,
    InstanceContrast,
    InstanceQueue,
    SelfDistillation,
    Tie,
    compare_rows,
    forgetting,
    instance_part,
    likely_twins,
    negative_weights,
    queue_contrast,
    stage_one,
    train_fine,
    two_views,
)

recipes = Path(__file__).resolve().parents[1] / "recipes"


def short(**changes):
    "A recipe of three steps; whatever looks at stage one is off unless asked for."
    recipe = load_recipe(recipes / "tiny-fine.toml", FineRecipe)
    train = changes.pop("train", replace(recipe.train, max_steps=3, epochs=1))
    return replace(recipe, **{"size": 32, "dim": 8, "keep": 0.0, "twins": 0, "coarse": 0.0, "train": train, **changes})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A stage-one model of a few steps, as a folder."
    from product_retrieval.data.shelf import load_shelf

    recipe = load_recipe(recipes / "tiny-first.toml", FirstRecipe)
    recipe = replace(recipe, size=32, dim=8, train=replace(recipe.train, max_steps=2, epochs=1))
    folder = tmp_path_factory.mktemp("stage-one")
    train_first_model(load_shelf("tiny", seed=0), recipe, folder, workers=0)
    return folder / "model"


def slow_contrast(vectors, keys, queue, weights, temperature, partners=None):
    "The definition, one number at a time."
    losses = []
    for i in range(len(vectors)):
        own = math.exp(float(vectors[i] @ keys[i]) / temperature)
        right, total = [own], own
        for j in range(len(queue)):
            power = math.exp(float(vectors[i] @ queue[j]) / temperature)
            partner = partners is not None and bool(partners[i, j])
            total += power if partner else float(weights[i, j]) * power
            right += [power] if partner else []
        losses.append(sum(-math.log(power / total) for power in right) / len(right))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(20))
def test_loss_against_the_slow_oracle(seed):
    dice = torch.Generator().manual_seed(seed)
    batch, places = 5, 9
    vectors, keys, queue = (unit(torch.randn(n, 4, generator=dice)).double() for n in (batch, batch, places))
    weights = torch.rand(batch, places, generator=dice).double() * (torch.rand(batch, places, generator=dice) > 0.3)
    partners = torch.rand(batch, places, generator=dice) > 0.7
    for chosen in (None, partners, torch.zeros_like(partners)):
        found = queue_contrast(vectors, keys, queue, weights, 0.2, chosen)
        assert torch.allclose(found, slow_contrast(vectors, keys, queue, weights, 0.2, chosen), atol=1e-6)


def test_gradients_are_finite_without_any_negative():
    vectors = unit(torch.randn(3, 4)).requires_grad_()
    for partners in (None, torch.zeros(3, 6, dtype=torch.bool)):
        loss = queue_contrast(vectors, unit(torch.randn(3, 4)), unit(torch.randn(6, 4)), torch.zeros(3, 6), 0.1, partners)
        (gradient,) = torch.autograd.grad(loss.sum(), vectors)
        assert torch.allclose(loss, torch.zeros(3), atol=1e-6) and torch.isfinite(gradient).all()


def test_weights_add_up_and_fall_back():
    usable = torch.tensor([[True] * 5, [True, True, False, True, True], [True] * 5])
    same = torch.tensor([[True, False, False, False, False], [False] * 5, [True] * 5])
    weights = negative_weights(usable, same, 0.5)
    assert torch.allclose(weights.sum(1), torch.tensor([5.0, 4.0, 5.0]))
    assert weights[0].tolist() == [2.5, 0.625, 0.625, 0.625, 0.625]
    assert weights[1].tolist() == [1, 1, 0, 1, 1], "a class with one picture: all others weigh the same"
    assert weights[2].tolist() == [1] * 5, "nobody outside: the class alone"
    assert torch.equal(negative_weights(usable, same, 0), usable.float())
    only = negative_weights(usable, same, 1.0)
    assert only[0].tolist() == [5, 0, 0, 0, 0]


def test_the_queue_is_a_ring():
    queue = InstanceQueue(5, 2)
    assert queue.rows.tolist() == [-1] * 5
    for first in (0, 2, 4):
        queue.push(torch.full((2, 2), float(first)), torch.tensor([first, first + 1]))
    assert queue.rows.tolist() == [5, 1, 2, 3, 4] and queue.vectors[:, 0].tolist() == [4, 0, 2, 2, 4]
    with pytest.raises(InputError, match="5 places for a batch of 6"):
        queue.push(torch.zeros(6, 2), torch.arange(6))


def test_own_views_and_empty_places_are_no_negatives():
    others, none = torch.tensor([0, 1, 2, -1, -1, -1]), torch.full((4, 0), -2)
    weights, twins = compare_rows(torch.tensor([1, 3]), others, torch.tensor([0, 0, 1, 1]), none, inside=0)
    assert weights.tolist() == [[1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]] and not twins.any()


def test_twins_are_left_out_or_count_as_partners():
    twins = torch.tensor([[1], [0], [-2], [-2]])
    classes, keys = torch.zeros(4, dtype=torch.long), unit(torch.randn(4, 2))
    weights, found = compare_rows(torch.tensor([0, 3]), torch.arange(4), classes, twins)
    assert weights[0].tolist() == [0, 0, 1, 1] and found.tolist() == [[False, True, False, False], [False] * 4]
    for mode, partners in (("ignore", None), ("positive", found)):
        lesson = InstanceContrast(2, classes, places=4, twins=twins, twin_mode=mode)
        loss = lesson(keys[[0, 3]], keys[[0, 3]], torch.tensor([0, 3]))["loss"]
        queue = torch.cat([keys[[0, 3]], torch.zeros(2, 2)])  # the batch is in the queue; the rest is empty
        weights, found = compare_rows(torch.tensor([0, 3]), torch.tensor([0, 3, -1, -1]), classes, twins)
        assert torch.allclose(loss, queue_contrast(keys[[0, 3]], keys[[0, 3]], queue, weights, 0.1, None).mean()), mode
        lesson(keys[[1, 2]], keys[[1, 2]], torch.tensor([1, 2]))
        weights, found = compare_rows(torch.tensor([0]), torch.tensor([0, 3, 1, 2]), classes, twins)
        lesson.eval()
        loss = lesson(keys[[0]], keys[[0]], torch.tensor([0]))["loss"].double()
        want = slow_contrast(keys[[0]], keys[[0]], keys[[0, 3, 1, 2]], weights, 0.1, None if partners is None else found)
        assert torch.allclose(loss, want.mean(), atol=1e-5), mode


def test_likely_twins_are_mutual_and_of_one_class():
    angles = torch.tensor([0.0, 1.0, 5.0, 0.5, 90.0]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], 1).numpy()
    found = likely_twins(vectors, torch.tensor([0, 0, 0, 1, 2]), 1)
    assert found[:, 0].tolist() == [1, 0, -2, -2, -2], "item 2 is near to 1, but 1 is nearer to 0; 3 and 4 are alone"


def test_two_views_differ_and_depend_on_seed_epoch_and_item_only(tiny_shelf):
    views = two_views(24, jitter=0.4)
    items = tiny_shelf.train.select([0, 1, 2, 3, 4])
    loaders = [PictureLoader(items, views, 3, workers=workers, seed=1) for workers in (0, 2)]
    one, two = ([batch.pixels for batch in loader] for loader in loaders)
    assert one[0].shape == (3, 2, 3, 24, 24) and one[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "whatever the number of workers"
    assert not torch.equal(one[0][:, 0], one[0][:, 1])
    again = next(loaders[0].iter_from(1)).pixels
    assert torch.equal(again, one[1]), "also from the middle of an epoch"
    loaders[0].set_epoch(1)
    assert not torch.equal(next(iter(loaders[0])).pixels, one[0])


def test_jitter_turns_the_hue(tiny_shelf):
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    picture[0] = 200  # red
    torch.manual_seed(0)
    still = two_views(8, area=(1.0, 1.0), jitter=0.0).pixels(picture)
    moved = two_views(8, area=(1.0, 1.0), jitter=0.8).pixels(picture)
    assert torch.equal(still[0], still[1]) and still[0, 0].min() == 200
    assert moved[:, 1:].max() > 20, "other channels light up"


def test_the_momentum_encoder_follows_and_never_trains(tiny_shelf, start):
    encoder = stage_one(short(), start)
    objective = FineObjective(encoder, SelfDistillation(encoder.dim, 16), momentum=0.9)
    before = {k: v.clone() for k, v in objective.teacher.encoder.state_dict().items()}
    objective.train()
    assert not objective.teacher.training and objective.lesson.training
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    objective.after_step(encoder)
    name = next(name for name, _ in encoder.named_parameters())
    assert torch.allclose(objective.teacher.encoder.state_dict()[name], before[name] + 0.1, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"method": "contrast"}, {"method": "distil"}, {"keep": 1.0, "coarse": 0.5}, {"twins": 2},
    {"twins": 2, "twin_mode": "positive"}, {"method": "none", "coarse": 1.0},
], ids=str)  # fmt: skip
def test_a_run_from_start_to_saved_model(tiny_shelf, start, tmp_path, changes):
    encoder = train_fine(tiny_shelf, short(**changes), tmp_path / "run", start, workers=0)
    assert encoder.history.steps == 3 and 0 <= encoder.history.best <= 1 and not encoder.training
    saved, some = load_encoder(tmp_path / "run" / "model"), tiny_shelf.split("query").select([0, 1, 2])
    assert isinstance(saved, ImageEncoder) and np.array_equal(vectors_of(saved, some), vectors_of(encoder, some))
    assert "product labels were not used" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert saved.name == encoder.name == "resnet10t, fine"
    log = encoder.history.train
    assert np.isfinite(log.to_numpy()).all() and ("moved" in log) == bool(changes.get("keep"))


def test_start_by_folder_and_by_object_are_the_same_and_the_object_stays(tiny_shelf, start, tmp_path):
    model = load_encoder(start)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = train_fine(tiny_shelf, short(), tmp_path / "a", start, workers=0)
    b = train_fine(tiny_shelf, short(), tmp_path / "b", model, workers=0)
    again = train_fine(tiny_shelf, short(), tmp_path / "a", start, workers=0)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]) and torch.equal(value, again.state_dict()[key]), key
        assert torch.equal(model.state_dict()[key], before[key])
    assert any(not torch.equal(before[k], v) for k, v in a.state_dict().items()), "it has learned"


def test_any_image_encoder_can_be_the_start(tiny_shelf, tmp_path):
    "GeM, a neck, another length: what chapter 10 may hand over."
    model = image_encoder("resnet10t", "random", size=40, dim=12, pool="gem", neck=True)
    encoder = train_fine(tiny_shelf, short(keep=1.0), tmp_path / "run", model, workers=0)
    assert encoder.dim == 12 and encoder.size == 40 and encoder.config.pool == "gem"


def test_training_sees_no_answers(tiny_shelf, start, tmp_path):
    "A train view, and a catalogue without labels and boxes, train alike."
    without = Catalog.from_frame(tiny_shelf.frame.drop(columns=["labels", "boxes"]), tiny_shelf.root, "bare")
    a = train_fine(without, short(), tmp_path / "a", start, workers=0)
    b = train_fine(tiny_shelf.train, short(), tmp_path / "b", start, workers=0)
    assert a.history.best is None and b.history.best is None, "no labels, no validation"
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_both_lessons_learn(tiny_shelf, start):
    "On one batch again and again, the loss falls."
    items, classes = instance_part(tiny_shelf)
    batch = next(iter(PictureLoader(items, two_views(32), 16, workers=0)))
    for method in ("contrast", "distil"):
        encoder = stage_one(short(), start).train()
        lesson = InstanceContrast(encoder.dim, classes, 16) if method == "contrast" else SelfDistillation(encoder.dim, 32)
        objective = FineObjective(encoder, lesson, momentum=0.5).train()
        trained = [p for p in [*encoder.parameters(), *objective.parameters()] if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
        for _ in range(25):
            loss = objective(encoder, batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.after_step(encoder)
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], (method, losses)


def test_queue_and_momentum_encoder_are_in_the_checkpoint_and_answers_are_not(tiny_shelf, start, tmp_path):
    train_fine(tiny_shelf, short(keep=1.0, twins=2, coarse=0.5), tmp_path / "run", start, workers=0)
    saved = load_file(checkpoints(tmp_path / "run")[-1] / "task.safetensors")
    names = {name.removeprefix("objective.") for name in saved if name.startswith("objective.")}
    assert {"lesson.queue.vectors", "lesson.queue.rows", "lesson.queue.place"} <= names
    assert any(name.startswith("teacher.encoder.backbone.") for name in names)
    assert not names & {"tie.anchors", "lesson.classes", "lesson.twins", "tie.margin.targets"}
    assert set(saved["objective.lesson.queue.rows"].tolist()) != {-1}


def toy(folder):
    "A whole run with a small network and every part switched on, or what is left of it."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(150, 8)
    model = nn.Sequential(*layers, Unit())
    dice = torch.Generator().manual_seed(1)
    pictures, classes = torch.rand(40, 2, 3, 24, 24, generator=dice), torch.arange(40) % 4
    anchors = unit(torch.randn(40, 8, generator=dice))
    lesson = InstanceContrast(8, classes, 24, twins=likely_twins(anchors.numpy(), classes, 2))
    objective = FineObjective(model, lesson, 0.9, Tie(anchors, 0.5))
    config = TrainConfig(epochs=3, accumulate=2, ema=0.8, checkpoint_every=1, precision="fp32", device="cpu", tensorboard=False)
    return fit(model, objective, Toys(pictures), config, folder)


class Unit(nn.Module):
    def forward(self, x):
        return unit(x)


class Toys:
    "Batches with the fields that the objective reads, in an order that depends on the epoch."

    def __init__(self, pictures):
        self.pictures, self.epoch = pictures, 0

    def __len__(self):
        return 5

    def set_epoch(self, epoch):
        self.epoch = epoch

    def iter_from(self, first):
        from product_retrieval.data.pictures import Batch

        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch))
        for index in range(first, 5):
            rows = order[8 * index : 8 * index + 8]
            yield Batch(self.pictures[rows], [""] * 8, [str(r) for r in rows.tolist()], rows, index)


def killed(folder, call):
    left = [call]

    def count(frame, event, argument):
        left[0] -= event in ("call", "c_call")
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    toy(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start many runs in seconds")
def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    "Queue, momentum encoder, optimizer, average and log: bit for bit."
    toy(tmp_path / "first")  # so that all is imported
    assert in_child(toy, tmp_path / "whole") == 0
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    chance, kills = random.Random(0), 0
    for number in range(8):
        folder = tmp_path / str(number)
        kills += in_child(killed, folder, chance.randint(3_000, 40_000)) == -signal.SIGKILL
        assert in_child(toy, folder) == 0
        assert (folder / "train.csv").read_text() == (tmp_path / "whole" / "train.csv").read_text()
        for name in names:
            one, two = load_file(tmp_path / "whole" / name), load_file(folder / name)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    assert kills >= 4, "most of the runs were killed on their way"


def test_stopped_and_continued_like_the_undisturbed(tiny_shelf, start, tmp_path):
    "The real thing: six steps at once, and three plus three."
    train = TrainConfig(epochs=2, checkpoint_every=1, learning_rate=1e-3, tensorboard=False, precision="fp32", device="cpu")
    recipe = short(keep=0.5, coarse=0.3, twins=2, train=train)
    whole = train_fine(tiny_shelf, recipe, tmp_path / "whole", start, workers=0)
    calls = []

    def stop(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    original = FineObjective.after_step
    patch.setattr(FineObjective, "after_step", lambda self, model: (original(self, model), stop(model)))
    with pytest.raises(KeyboardInterrupt):
        train_fine(tiny_shelf, recipe, tmp_path / "parts", start, workers=0)
    patch.undo()
    parts = train_fine(tiny_shelf, recipe, tmp_path / "parts", start, workers=0)
    assert (tmp_path / "whole" / "train.csv").read_text() == (tmp_path / "parts" / "train.csv").read_text()
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize(("changes", "message"), [
    ({"queue": 8}, "queue = 8: smaller than batch_size = 16"),
    ({"momentum": 1.2}, "momentum = 1.2: expected a number from 0 to 1"),
    ({"momentum": -0.1}, "momentum = -0.1"),
    ({"inside": 2.0}, "inside = 2.0"),
    ({"temperature": 0.0}, "temperature = 0.0: expected more than 0"),
    ({"keep": -1.0}, "keep = -1.0: expected 0 or more"),
    ({"jitter": 1.5}, "jitter = 1.5"),
    ({"method": "none"}, "method = 'none': nothing is left to learn"),
    ({"method": "contrasts"}, "did you mean 'contrast'"),
    ({"twin_mode": "positives"}, "did you mean 'positive'"),
], ids=str)  # fmt: skip
def test_recipes_with_bad_values(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        short(**changes)
    (name, value), file = *changes.items(), tmp_path / "bad.toml"
    file.write_text(f"batch_size = 16\n{name} = {value!r}\n")
    with pytest.raises(InputError, match=r"bad\.toml: " + message.split(" = ")[0] if " = " in message else message):
        load_recipe(file, FineRecipe)


def test_momentum_outside_its_range_without_a_recipe():
    with pytest.raises(InputError, match="momentum = 2"):
        FineObjective(nn.Linear(2, 2), SelfDistillation(2), momentum=2)


def test_starts_that_cannot_be(tiny_shelf, start, tmp_path):
    with pytest.raises(InputError, match="a model of resnet10t, but the recipe says backbone = 'resnet18'"):
        train_fine(tiny_shelf, short(backbone="resnet18"), tmp_path / "run", start)
    histogram = tmp_path / "histogram"
    ColorHistogram().save_pretrained(histogram)
    for given in (histogram, ColorHistogram()):
        with pytest.raises(InputError, match="a ColorHistogram; stage two trains an ImageEncoder"):
            train_fine(tiny_shelf, short(), tmp_path / "run", given)
    with pytest.raises(InputError, match="random weights know nothing to keep"):
        train_fine(tiny_shelf, short(keep=1.0), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists(), "refused before anything is written"


def test_weights_of_another_backbone(mobilenet_weights):
    with pytest.raises(InputError, match="the weights do not fit resnet10t"):
        stage_one(short(weights=str(mobilenet_weights)))


def test_a_folder_that_holds_another_recipe_or_another_start(tiny_shelf, start, tmp_path):
    train_fine(tiny_shelf, short(), tmp_path / "run", start, workers=0)
    with pytest.raises(InputError, match=r"recipe\.json: begun with inside = 0\.5, now 0\.9"):
        train_fine(tiny_shelf, short(inside=0.9), tmp_path / "run", start, workers=0)
    with pytest.raises(InputError, match="begun with max_steps = 3, now 4"):
        train_fine(tiny_shelf, short(train=replace(short().train, max_steps=4)), tmp_path / "run", start, workers=0)
    with pytest.raises(InputError, match="begun with start = "):
        train_fine(tiny_shelf, short(), tmp_path / "run", workers=0)
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train_fine(tiny_shelf, short(), tmp_path / "full", start, workers=0)


def test_a_class_with_one_picture_falls_back_to_all_negatives(tiny_shelf, start, tmp_path):
    frame = tiny_shelf.frame
    rows = np.flatnonzero((frame["split"] == "train") & (frame["category"] != ""))
    frame.loc[rows[0], "category"] = "meta/alone/alone"
    items, classes = instance_part(Catalog.from_frame(frame, tiny_shelf.root, "x"))
    alone = int(np.flatnonzero(np.array(items.categories()) == "meta/alone/alone")[0])
    none = torch.full((len(items), 0), -2)
    weights = compare_rows(torch.tensor([alone]), torch.arange(len(items)), classes, none, inside=0.9)[0][0]
    assert weights[alone] == 0 and set(weights.tolist()) == {0.0, 1.0}
    catalog = Catalog.from_frame(frame, tiny_shelf.root, "x")
    assert train_fine(catalog, short(twins=2, coarse=0.1), tmp_path / "run", start, workers=0).history.steps == 3


def test_without_categories_all_pictures_are_negatives_of_each_other(tiny_shelf, start, tmp_path):
    bare = Catalog.from_frame(tiny_shelf.frame.drop(columns=["category"]), tiny_shelf.root, "bare")
    items, classes = instance_part(bare)
    assert len(items) == len(bare.train) and set(classes.tolist()) == {-1}
    none, others = torch.full((len(items), 0), -2), torch.tensor([0, 1, 2, 3, -1, -1])
    assert compare_rows(torch.tensor([0]), others, classes, none, inside=0.9)[0].tolist() == [[0, 1, 1, 1, 0, 0]]
    assert train_fine(bare, short(twins=2), tmp_path / "run", start, workers=0).history.steps == 3
    with pytest.raises(InputError, match=r"coarse = 0\.5: bare has no training item with a category"):
        train_fine(bare, short(coarse=0.5), tmp_path / "other", start, workers=0)
    with pytest.raises(InputError, match="no training item has a category"):
        forgetting(ColorHistogram(), ColorHistogram(), bare)


def test_forgetting(tiny_shelf, start):
    model, worse = load_encoder(start), load_encoder(start)
    same = forgetting(model, model, tiny_shelf, workers=0)
    assert same.before == same.after and same.test.difference == 0 and 0 < same.before <= 1
    with torch.no_grad():
        worse.head[0].weight.zero_()
        worse.head[0].weight[0] = 1.0  # one number is left of a vector
    lost = forgetting(model, worse, tiny_shelf, workers=0)
    assert lost.before == same.before and lost.after < lost.before and "before" in str(lost)
    with pytest.raises(InputError, match="no item of split 'query' has a category"):
        forgetting(model, model, tiny_shelf, split="query")


@pytest.mark.parametrize("name", ["tiny-fine", "shelf-fine", "grocery-fine"])
def test_recipes_are_read(name):
    recipe = load_recipe(recipes / f"{name}.toml", FineRecipe)
    assert recipe.train.epochs >= 1 and recipe.queue >= recipe.batch_size
