"""Regions: pasted pictures, the detector, stored regions; kills, bad input, features made elsewhere."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from product_retrieval.capture import detector as d
from product_retrieval.capture import regions as r
from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.data.pictures import read_pixels
from product_retrieval.training import TrainConfig, load_recipe

recipes = Path(__file__).resolve().parents[1] / "recipes"
SMALL = d.DetectorConfig(size=64, anchors=(16, 32, 48), channels=16, hidden=24, cells=3)


@pytest.fixture(scope="module")
def cutouts(tiny_shelf):
    return d.cut_products(tiny_shelf, most=16, side=64, workers=1)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return d.Detector(SMALL)


def photos(folder, count=12, size=(40, 30), **special):
    "A catalogue of random pictures; `special` gives the bytes of single ones."
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines, rng = ["item_id,image,title,split"], np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"item{i},{i}.png,soap {i},gallery")
    for name, content in special.items():
        (folder / f"{name.removeprefix('p')}.png").write_bytes(content)
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Catalog.from_csv(folder / "catalog.csv")


class Means:
    "Mean colour of four quarters of a crop; remembers how many crops it saw."

    name, dim, size = "means", 12, 16

    def __init__(self, scale=1.0, pause=0.0):
        from product_retrieval.data.pictures import picture_transform

        self.transform, self.scale = picture_transform(16), scale
        self._pause, self._seen = pause, 0

    def __call__(self, batch):
        time.sleep(self._pause)
        self._seen += len(batch.pixels)
        return torch.nn.functional.adaptive_avg_pool2d(batch.pixels, 2).flatten(1) * self.scale


class Many:
    "A proposer with so many boxes a picture, the first ones the surest."

    def __init__(self, count):
        self.count = count

    def propose(self, pictures, item_ids, sizes):
        boxes = np.array([[0.1, 0.1, 0.2 + k / 100, 0.9] for k in range(self.count)], np.float32).reshape(-1, 4)
        return [d.Proposals(boxes, np.linspace(1, 0.1, self.count, dtype=np.float32))] * len(pictures)

    def settings(self):
        return {"proposer": "many", "count": self.count}


# ---------------------------------------------------------------- copy and paste

def test_cut_out_finds_a_disc_before_a_calm_wall():
    y, x = np.mgrid[:80, :100]
    picture = np.full((80, 100, 3), (200, 205, 210), np.uint8)
    picture[(x - 50) ** 2 + (y - 40) ** 2 < 25**2] = (180, 30, 40)
    mask = d.largest_piece(d.grab(picture))
    truth = (x - 50) ** 2 + (y - 40) ** 2 < 25**2
    assert (mask & truth).sum() / (mask | truth).sum() > 0.9
    assert d.cut_out(picture).shape[2] == 4


@pytest.mark.parametrize("size", [(40, 40), (1, 1), (3, 500)])
def test_nothing_to_cut_out(size):
    assert d.cut_out(np.full((*size, 3), 7, np.uint8)) is None


def test_a_shop_without_cut_outs_says_so(tmp_path):
    catalog = photos(tmp_path, count=3, size=(8, 8))
    frame = catalog.frame.assign(split="train")
    with pytest.raises(InputError, match="0 of 3 training pictures gave a cut-out"):
        d.cut_products(Catalog.from_frame(frame, catalog.root))


def test_visible_boxes_count_what_later_masks_leave():
    masks = [np.zeros((10, 10), bool) for _ in range(3)]
    masks[0][0:4, 0:4] = masks[1][0:4, 1:8] = masks[2][8:, 8:] = True
    assert d.visible_boxes(masks, [16, 28], 0.25).tolist() == [[0, 0, 4, 4], [1, 0, 8, 4]]
    assert d.visible_boxes(masks, [16, 28], 0.3).tolist() == [[1, 0, 8, 4]]
    assert d.visible_boxes([], [], 0.3).shape == (0, 4)


@pytest.mark.parametrize("number", [0, 1, 6])
def test_composed_boxes_are_inside_and_the_same_every_time(cutouts, number):
    pairs = [d.compose(cutouts.products[:number], cutouts.corners, np.random.default_rng(3), 64) for _ in range(2)]
    (picture, boxes), (again, same) = pairs
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert len(boxes) <= number and (boxes >= 0).all() and (boxes <= 64).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    np.testing.assert_array_equal(picture, again)
    np.testing.assert_array_equal(boxes, same)


def test_pasted_pictures_depend_on_seed_epoch_and_index_only(cutouts):
    one, other, usual = (d.PastedPictures(cutouts, size=64, count=10, batch_size=4, workers=w) for w in (0, 2, None))
    for pictures in (one, other, usual):
        pictures.set_epoch(3)
    assert len(one) == 3 and [len(batch) for batch in one] == [4, 4, 2]
    for a, b in zip(list(one)[1:], other.iter_from(1), strict=True):
        assert a.index == b.index and torch.equal(a.pixels, b.pixels) and torch.equal(a.boxes, b.boxes)
    assert torch.equal(next(iter(usual)).pixels, next(iter(one)).pixels)
    before = one.picture(0)[0]
    one.set_epoch(4)
    assert (one.picture(0)[0] != before).any()


def test_training_reads_single_pictures_of_split_train_only(tiny_shelf, cutouts):
    train = tiny_shelf.split("train")
    singles = {i for i, c in zip(train.ids, train.categories(), strict=True) if c}
    assert set(cutouts.item_ids) <= singles
    assert len(d.cut_products(tiny_shelf.train, most=5, side=64, workers=1)) <= 5


def test_cut_outs_on_disk(cutouts, tmp_path):
    cutouts.save(tmp_path / "cuts.npz")
    again = d.CutOuts.load(tmp_path / "cuts.npz")
    assert again.item_ids == cutouts.item_ids
    np.testing.assert_array_equal(again.products[2], cutouts.products[2])
    (tmp_path / "cuts.npz").write_bytes((tmp_path / "cuts.npz").read_bytes()[:500])
    with pytest.raises(InputError, match="delete it to cut again"):
        d.CutOuts.load(tmp_path / "cuts.npz")


def test_training_and_validation_share_no_cut_out(cutouts):
    train, checks = d.pasted_pictures(cutouts, d.DetectorRecipe(detector=SMALL))
    assert not set(train.cutouts.item_ids) & set(checks.cutouts.item_ids)
    assert len(train.cutouts) + len(checks.cutouts) == len(cutouts)


# ---------------------------------------------------------------- scores

def upright(rows):
    boxes = [[min(a, c), min(b, e), max(a, c) + 0.01, max(b, e) + 0.01] for a, b, c, e in rows]
    return np.array(boxes, np.float32).reshape(-1, 4)


boxes_strategy = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=6).map(upright)


@settings(max_examples=50, deadline=None)
@given(boxes_strategy, boxes_strategy)
def test_overlaps_equal_torchvision(a, b):
    from torchvision.ops import box_iou

    judge = box_iou(torch.from_numpy(a).double(), torch.from_numpy(b).double()).numpy()
    np.testing.assert_allclose(d.overlaps(a, b), judge, atol=1e-6)


def slow_average_precision(found, truth):
    "By the definition, with loops."
    rows = sorted(((-s, p, k) for p, one in enumerate(found) for k, s in enumerate(one.scores)))
    taken, hits = {p: set() for p in range(len(found))}, []
    for _, p, k in rows:
        ious = [0.0 if t in taken[p] else float(d.overlaps(found[p].boxes[k], box)[0, 0]) for t, box in enumerate(truth[p])]
        best = int(np.argmax(ious)) if ious else -1
        hits.append(best >= 0 and ious[best] >= 0.5)
        if hits[-1]:
            taken[p].add(best)
    total, area = sum(len(t) for t in truth), 0.0
    for n in range(len(hits)):
        if hits[n]:
            area += max(sum(hits[: m + 1]) / (m + 1) for m in range(n, len(hits))) / total
    return area


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_and_recall_by_the_definition(seed):
    rng = np.random.default_rng(seed)
    truth = [np.sort(rng.random((rng.integers(1, 4), 2, 2)), axis=1).reshape(-1, 4) for _ in range(6)]
    found = []
    for boxes in truth:
        near = np.repeat(boxes, 2, 0) + rng.normal(0, 0.05, (2 * len(boxes), 4))
        found.append(d.Proposals(near.astype(np.float32), -np.sort(-rng.random(len(near))).astype(np.float32)))
    assert d.average_precision(found, truth) == pytest.approx(slow_average_precision(found, truth), abs=1e-9)
    right = sum(d.match(one, boxes).sum() for one, boxes in zip(found, truth, strict=True))
    assert d.proposal_recall(found, truth) == pytest.approx(right / sum(map(len, truth)))


def test_scores_of_nothing():
    none = d.Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    box = np.array([[0, 0, 1, 1]], np.float32)
    assert d.average_precision([none], [box]) == d.proposal_recall([none], [box]) == 0
    assert d.average_precision([none], [np.zeros((0, 4))]) == 0 and d.best_threshold([none], [box]) > 0


# ---------------------------------------------------------------- the detector

@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (64, 64), (1, 4000), (70, 33)])
def test_any_picture_fits_the_square_and_can_be_searched(detector, size):
    picture = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    square, inside = d.fit_square(picture, 64)
    assert square.shape == (3, 64, 64) and max(inside) == 64 and min(inside) >= 1
    (found,) = detector.find([picture], threshold=0.0)
    assert found.boxes.shape == (len(found), 4) and (found.boxes >= 0).all() and (found.boxes <= 1).all()
    assert (np.diff(found.scores) <= 0).all()


def test_a_picture_without_pixels_is_refused(detector):
    with pytest.raises(InputError, match="at least one pixel"):
        detector.find([torch.zeros(3, 0, 5, dtype=torch.uint8)])
    assert detector.find([]) == []


def test_a_picture_finds_the_same_alone_and_in_company(detector):
    pictures = [torch.randint(0, 255, (3, s, 50), dtype=torch.uint8) for s in (50, 20, 64)]
    together, alone = detector.find(pictures, threshold=0.0), [detector.find([p], threshold=0.0)[0] for p in pictures]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)


def test_features_have_the_whole_picture_first(detector):
    pictures = [torch.randint(0, 255, (3, 50, 50), dtype=torch.uint8) for _ in range(2)]
    found, features = d.find_and_describe(detector, pictures, limit=3, threshold=0.0)
    assert [len(f) for f in features] == [1 + len(one) for one in found] and features[0].shape[1] == detector.dim
    again = d.describe_boxes(detector, pictures, found)
    np.testing.assert_allclose(features[1], again[1], atol=1e-5)
    assert detector.training  # the mode is given back


def test_saved_detector_finds_the_same(detector, tmp_path):
    picture = torch.randint(0, 255, (3, 50, 50), dtype=torch.uint8)
    again = d.Detector.from_pretrained(detector.save_pretrained(tmp_path / "model"))
    assert again.config == detector.config
    np.testing.assert_array_equal(again.find([picture], threshold=0.0)[0].boxes, detector.find([picture], threshold=0.0)[0].boxes)


def test_training_learns_and_stops_where_it_should(tiny_shelf, tmp_path):
    recipe = d.DetectorRecipe(detector=SMALL, cut_outs=24, pictures=64, validation=4, batch_size=8,
                              train=TrainConfig(epochs=2, learning_rate=2e-3, tensorboard=False, checkpoint_every=4))
    trained = d.train_detector(tiny_shelf, recipe, tmp_path / "run")
    losses = trained.history.train["loss"]
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean()
    assert 0 < trained.config.threshold < 1 and (tmp_path / "run/model/model.safetensors").exists()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    again = d.train_detector(tiny_shelf, recipe, tmp_path / "run")  # finished: opens the result
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    assert again.history.steps == trained.history.steps == 16


def test_recipes_of_the_course_are_valid():
    for path in sorted(recipes.glob("*-detector.toml")):
        assert load_recipe(path, d.DetectorRecipe).pictures > 0


@pytest.mark.parametrize(("change", "message"), [
    ({"backbone": "resnet10"}, "unknown; did you mean 'resnet10t'"),
    ({"strides": (8, 16, 128)}, "none of stride 128"),
    ({"anchors": (10,)}, "expected one for each of the strides"),
])
def test_settings_that_cannot_be_built(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        d.Detector(d.DetectorConfig(**{**d.asdict(SMALL), **change}))


def test_backbone_weights_of_another_network(tmp_path):
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="has no fitting"):
        d.start_detector(d.DetectorRecipe(detector=SMALL), tmp_path / "other.safetensors")


def test_backbone_weights_from_a_file(detector, tmp_path):
    from safetensors.torch import save_file

    backbone = {k: v.contiguous() + 1 for k, v in detector.backbone.state_dict().items() if v.is_floating_point()}
    counters = {k: v for k, v in detector.backbone.state_dict().items() if not v.is_floating_point()}
    save_file({**backbone, **counters}, tmp_path / "mine.safetensors")
    started = d.start_detector(d.DetectorRecipe(detector=SMALL), tmp_path / "mine.safetensors")
    key = next(iter(backbone))
    assert torch.equal(started.backbone.state_dict()[key], backbone[key]) and started.config.weights == "mine.safetensors"


# ---------------------------------------------------------------- crops

@settings(max_examples=200, deadline=None)
@given(boxes_strategy, st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.5))
def test_square_crops_stay_inside_and_hold_the_box(boxes, height, width, margin):
    for box in boxes.clip(0, 1):
        left, top, right, bottom = r.square_around(box, height, width, margin)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert left <= box[0] * width + 1 and right >= box[2] * width - 1
        assert top <= box[1] * height + 1 and bottom >= box[3] * height - 1


def test_cut_regions_by_hand():
    picture = torch.zeros(3, 20, 40, dtype=torch.uint8)
    picture[:, :, 20:] = 200
    crops = r.cut_regions(picture, np.array([[0.5, 0, 1, 1]], np.float32), 8, margin=0)
    assert crops.shape == (2, 3, 8, 8) and crops[1].min() == 200 and 0 < crops[0].float().mean() < 200


# ---------------------------------------------------------------- stored regions

def test_extracted_regions_hold_what_was_proposed(tmp_path):
    catalog, encoder = photos(tmp_path / "c"), Means()
    found = r.extract_regions(catalog, Many(3), encoder, tmp_path / "r", regions=5, batch_size=5)
    assert found.features.shape == (12, 6, 12) and found.features.dtype == np.float16 and isinstance(found.features, np.memmap)
    assert found.mask[:, :4].all() and not found.mask[:, 4:].any() and not np.any(found.features[:, 4:])
    np.testing.assert_allclose(found.boxes[2, 1], [0.1, 0.1, 0.2, 0.9, 0.08], atol=1e-6)
    np.testing.assert_array_equal(found.boxes[2, 0], [0, 0, 1, 1, 1])
    features, _, mask = found.batch([7, 3])
    assert features.dtype == torch.float32 and features.shape == (2, 6, 12) and mask.dtype == torch.bool
    pixels = r.cut_regions(read_pixels(catalog.paths[7]), found.boxes[7, 1:2, :4], 16)
    truth = encoder(type("B", (), {"pixels": encoder.transform.finish(pixels)}))
    np.testing.assert_allclose(features[0, :2], truth, atol=2e-3)
    assert found.batch([0], limit=2)[0].shape == (1, 3, 12)
    assert found.of(catalog.select([4, 1])).tolist() == [4, 1]
    assert r.Regions.open(tmp_path / "r").ids == catalog.ids


@pytest.mark.parametrize(("count", "limit", "kept"), [(0, 3, 0), (9, 3, 3), (2, 0, 0)])
def test_no_regions_and_more_regions_than_configured(tmp_path, count, limit, kept):
    found = r.extract_regions(photos(tmp_path / "c", 3), Many(count), Means(), tmp_path / "r", regions=limit)
    assert found.mask.sum(1).tolist() == [1 + kept] * 3 and found.limit == limit
    assert found.features[:, 0].any()  # the whole picture is always there


def test_more_regions_asked_for_than_stored(tmp_path):
    found = r.extract_regions(photos(tmp_path / "c", 3), Many(2), Means(), tmp_path / "r", regions=2)
    with pytest.raises(InputError, match="36 regions asked for, 2 are stored"):
        found.batch([0], limit=36)


def test_one_pixel_and_unreadable_pictures(tmp_path, detector):
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (1, 1), "red").save(file, "PNG")
    catalog = photos(tmp_path / "c", 4, p1=file.getvalue(), p2=b"no picture")
    found = r.extract_regions(catalog, r.DetectorProposals(detector, threshold=0.9), Means(), tmp_path / "r", regions=3)
    assert found.mask[1].tolist() == [True, False, False, False] and found.features[1, 0].any()
    with pytest.raises(InputError, match=r"item 'item2': its picture was skipped \(.*not a picture"):
        found.of(catalog)
    assert found.of(catalog.select([0, 1, 3])).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("scale", "message"), [(float("nan"), "item 'item0': NaN"), (1e6, "does not fit into float16")])
def test_features_that_are_no_numbers(tmp_path, scale, message):
    with pytest.raises(InputError, match=message):
        r.extract_regions(photos(tmp_path / "c", 3), Many(1), Means(scale), tmp_path / "r")


def test_stored_features_that_are_no_numbers(tmp_path):
    found = r.extract_regions(photos(tmp_path / "c", 3), Many(1), Means(), tmp_path / "r", regions=1)
    damaged = np.load(tmp_path / "r/features.npy", mmap_mode="r+")
    damaged[1, 1, 3] = np.nan
    damaged.flush()
    with pytest.raises(InputError, match="item 'item1' has features that are no numbers"):
        found.batch([0, 1])
    found.batch([0, 2])


def test_regions_of_another_catalogue(tmp_path):
    catalog = photos(tmp_path / "a", 5)
    found = r.extract_regions(catalog, Many(1), Means(), tmp_path / "r", regions=1)
    with pytest.raises(InputError, match="these regions are of another catalogue"):  # same ids, same file names
        found.of(photos(tmp_path / "b", 5, size=(50, 60)))
    other = Catalog.from_frame(catalog.frame.assign(item_id=[f"x{i}" for i in range(5)]), catalog.root, name="other")
    with pytest.raises(InputError, match="item 'x0': not in these regions, which are of catalogue"):
        found.of(other)


@pytest.mark.parametrize("change", ["cut", "missing", "json", "shape"])
def test_damaged_folders(tmp_path, change):
    r.extract_regions(photos(tmp_path / "c", 3), Many(1), Means(), folder := tmp_path / "r", regions=1)
    if change == "cut":
        (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-7])
    elif change == "missing":
        (folder / "boxes.npy").unlink()
    elif change == "json":
        (folder / "ids.json").write_text((folder / "ids.json").read_text().replace("item1", "item7"))
    else:
        meta = json.loads((folder / "regions.json").read_text())
        (folder / "regions.json").write_text(json.dumps({**meta, "dim": 5}))
    with pytest.raises(InputError, match=str(folder)):
        r.Regions.open(folder)


def test_no_regions_here(tmp_path):
    with pytest.raises(InputError, match="expected a folder made by extract_regions"):
        r.Regions.open(tmp_path)


def test_another_plan_needs_another_folder(tmp_path):
    catalog = photos(tmp_path / "c", 3)
    r.extract_regions(catalog, Many(1), Means(), tmp_path / "r", regions=1)
    with pytest.raises(InputError, match="holds a run with regions 1, this one has 2"):
        r.extract_regions(catalog, Many(1), Means(), tmp_path / "r", regions=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        r.extract_regions(catalog, Many(1), Means(), tmp_path / "full")
    with pytest.raises(InputError, match="reads no pictures"):
        from product_retrieval.encoders import load_encoder

        r.extract_regions(catalog, Many(1), load_encoder("title-words"), tmp_path / "words")


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_regions import Many, Means
from product_retrieval.capture.regions import extract_regions
from product_retrieval.data.catalog import Catalog
work = Path({work!r})
extract_regions(Catalog.from_csv(work / "c/catalog.csv"), Many(2), Means(pause=0.15), work / "r", regions=2, batch_size=2)
"""


def test_a_kill_loses_one_batch_at_most(tmp_path):
    catalog = photos(tmp_path / "c", 30)
    code = KILLED.format(tests=str(Path(__file__).parent), work=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code])
    done = tmp_path / ".r.unfinished/done.npy"
    for _ in range(600):
        if done.exists() and os.path.getsize(done) > 128 and np.load(done).sum() >= 6:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = int(np.load(done).sum())
    assert 6 <= finished < 30 and not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="an unfinished run lies beside it"):
        r.Regions.open(tmp_path / "r")
    encoder = Means()
    encoder._pause = 0.0
    resumed = r.extract_regions(catalog, Many(2), encoder, tmp_path / "r", regions=2, batch_size=2)
    assert encoder._seen == (30 - finished) * 3
    whole = r.extract_regions(catalog, Many(2), Means(), tmp_path / "whole", regions=2)
    for name in ("features", "boxes", "scores", "mask"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))


def test_two_at_once_are_told(tmp_path):
    catalog = photos(tmp_path / "c", 3)
    (tmp_path / ".r.lock").write_text(str(os.getppid()))
    with pytest.raises(InputError, match="runs an extraction of regions here"):
        r.extract_regions(catalog, Many(1), Means(), tmp_path / "r")


def test_workers_change_nothing(tmp_path):
    catalog = photos(tmp_path / "c", 9)
    options = {"regions": 2, "batch_size": 4}
    one, two = (r.extract_regions(catalog, Many(2), Means(), tmp_path / f"r{w}", workers=w, **options) for w in (0, 2))
    np.testing.assert_array_equal(one.features, two.features)


def test_grid_and_given_boxes(tmp_path):
    catalog = photos(tmp_path / "c", 3, size=(40, 20))
    grid = r.extract_regions(catalog, r.GridProposals(2, 2), Means(), tmp_path / "g", regions=4)
    np.testing.assert_allclose(grid.boxes[0, 1:, :4].sum(0), [1, 1, 3, 3])
    given = r.GivenBoxes({"item1": [[10, 5, 30, 20, "label"]]})
    found = r.extract_regions(catalog, given, Means(), tmp_path / "b", regions=2, side=20)  # reduces pictures, not boxes
    assert found.mask[:, 1].tolist() == [False, True, False]
    np.testing.assert_allclose(found.boxes[1, 1], [0.25, 0.25, 0.75, 1, 0.375])
    for wrong in ([30, 5, 10, 20], [0, 0, 90, 10], [0, 0, float("nan"), 5]):
        with pytest.raises(InputError, match=r"item 'item1': box .* in a picture of 40 x 20 pixels"):
            r.extract_regions(catalog, r.GivenBoxes({"item1": [wrong]}), Means(), tmp_path / "w")


# ---------------------------------------------------------------- features made elsewhere

def release(count=4, dim=6):
    "Records of the release's form: item i has i boxes."
    rng = np.random.default_rng(0)
    random = lambda *shape: rng.random(shape, dtype=np.float32)
    return [(f"item{i}", 40, 30, random(i, 4).cumsum(1) * 7, random(i, dim)) for i in range(count)]


def write_tsv(path, records):
    text = lambda array: base64.b64encode(np.ascontiguousarray(array)).decode()
    path.write_text("".join(f"{i}\t{w}\t{h}\t{len(b)}\t{text(b)}\t{text(f)}\ttitle {i}\n" for i, w, h, b, f in records))
    return path


def write_npz(path, records):
    path.mkdir()
    for i, w, h, b, f in records:
        np.savez(path / f"{i}.npz", x=f, bbox=b, num_bbox=len(b), image_h=h, image_w=w, info=np.array({"a": 1}, dtype=object))
    return path


def write_lmdb(path, records, dumps):
    lmdb = pytest.importorskip("lmdb")
    base = lmdb.open(str(path), subdir=False, map_size=1 << 24)
    with base.begin(write=True) as rows:
        for number, (i, w, h, b, f) in enumerate(records):
            rows.put(f"{number:08d}".encode(), dumps([f, b, str(len(b)), h, w, i, f"title {i}"]))
        rows.put(b"__keys__", dumps([]))
    base.close()
    return path


def packed(record):
    msgpack = pytest.importorskip("msgpack")
    array = lambda a: {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": a.shape, b"data": a.tobytes()}
    return msgpack.packb([array(v) if isinstance(v, np.ndarray) else v for v in record], use_bin_type=True)


@pytest.mark.parametrize("form", ["tsv", "npz", "lmdb"])
def test_features_of_the_release(tmp_path, form):
    catalog, records = photos(tmp_path / "c", 5), release()
    path = {"tsv": lambda: write_tsv(tmp_path / "f.tsv", records), "npz": lambda: write_npz(tmp_path / "f", records),
            "lmdb": lambda: write_lmdb(tmp_path / "f.lmdb", records, packed)}[form]()
    found = r.extract_regions(catalog, r.ReleaseFeatures(path), None, tmp_path / "r", regions=2)
    assert found.mask.sum(1).tolist() == [1, 2, 3, 3, 0]
    np.testing.assert_allclose(found.features[3, 0], records[3][4].mean(0), atol=1e-3)
    np.testing.assert_allclose(found.features[3, 1:], records[3][4][:2], atol=1e-3)
    np.testing.assert_allclose(found.boxes[3, 1, :4], (records[3][3][0] / [40, 30, 40, 30]).clip(0, 1), atol=1e-6)
    with pytest.raises(InputError, match=r"item 'item4': its picture was skipped .no features for it"):
        found.of(catalog)


def test_pickled_records_are_refused(tmp_path):
    import pickle

    pytest.importorskip("msgpack")
    path = write_lmdb(tmp_path / "f.lmdb", release(), pickle.dumps)
    with pytest.raises(InputError, match="only msgpack records are read, a pickled one could run code"):
        list(r.ReleaseFeatures(path).records())


@pytest.mark.parametrize(("damage", "message"), [
    (lambda text: text[: len(text) // 2], "line 3"),
    (lambda text: text.replace("\t", " "), "line 1: 1 fields"),
    (lambda text: text.replace("item2\t40", "item2\t0"), "item 'item2'.*a size in pixels"),
])
def test_damaged_tsv(tmp_path, damage, message):
    path = write_tsv(tmp_path / "f.tsv", release())
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=message):
        list(r.ReleaseFeatures(path).records())


def test_missing_and_empty_release_files(tmp_path):
    with pytest.raises(InputError, match="not found"):
        r.ReleaseFeatures(tmp_path / "none.tsv").records()
    with pytest.raises(InputError, match=r"no [.]npz file"):
        list(r.ReleaseFeatures(tmp_path).records())


def test_nan_in_release_features(tmp_path):
    records = release()
    records[2][4][0, 0] = np.nan
    features = r.ReleaseFeatures(write_tsv(tmp_path / "f.tsv", records))
    with pytest.raises(InputError, match="item 'item2': NaN"):
        r.extract_regions(photos(tmp_path / "c", 4), features, None, tmp_path / "r")
