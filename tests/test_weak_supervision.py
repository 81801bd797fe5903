"""No path from a catalogue to a model carries labels or boxes of train rows.

Every label and box of the catalogue below holds a word that stands nowhere else. Each way to a train view is
walked, and the word must not occur in anything that the view holds, pickles, writes, or turns into batches.
"""

import copy
import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import product_retrieval.data.catalog as module
from product_retrieval.core import InputError
from product_retrieval.data.catalog import TRAIN_COLUMNS, Catalog, TrainCatalog, open_catalog
from product_retrieval.data.checks import check_catalog, describe, drop_problems, save_clean

SECRET = "SECRETANSWER"


@pytest.fixture
def catalog(tmp_path):
    "Six items, four of them train rows that do have labels and boxes."
    rows = []
    for i, split in enumerate(["train", "train", "gallery", "train", "query", "train"]):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "shop").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "shop" / f"{i}.png")
        rows.append({
            "item_id": f"item{i}", "image": f"{i}.png", "title": f"title {i}", "split": split, "category": f"care/level{i % 2}",
            "labels": f"{SECRET}", "boxes": f'[[1, 2, 9, 9, "{SECRET}"]]', "product": SECRET, "price": i,
        })  # fmt: skip
    return Catalog(pd.DataFrame(rows), tmp_path / "shop", "shop")


def extra(**columns):
    return pd.DataFrame({"item_id": [f"item{i}" for i in range(6)], **columns})


def written(catalog, folder, suffix):
    "The catalogue's table as one file beside its pictures."
    path = catalog.root / f"{folder}.{suffix}"
    catalog.frame.to_csv(path, index=False) if suffix == "csv" else catalog.frame.to_parquet(path, index=False)
    return path


ROADS = {
    "property": lambda c, t: c.train,
    "split": lambda c, t: c.split("train"),
    "split of the view": lambda c, t: c.train.split("train"),
    "train of the view": lambda c, t: c.train.train,
    "select, then train": lambda c, t: c.select(c.frame["split"] != "query").train,
    "train, then a mask": lambda c, t: c.train.select([True, False, True, True]),
    "train, then ids": lambda c, t: c.train.select(["item3", "item0"]),
    "train, then rows": lambda c, t: c.train.select([2, 0]),
    "nothing selected": lambda c, t: c.train.select([]),
    "sample": lambda c, t: c.train.sample(2, seed=3),
    "sample by": lambda c, t: c.train.sample(1, by="category"),
    "sample, then train": lambda c, t: c.sample(5).train,
    "join of labels, then train": lambda c, t: c.join(extra(labels=SECRET, boxes="[]")).train,
    "join of a stranger, then train": lambda c, t: c.join(extra(answer=SECRET)).train,
    "join of a catalogue, then train": lambda c, t: c.join(c).train,
    "train, then join": lambda c, t: c.train.join(extra(title="new")),
    "append, then train": lambda c, t: c.append(other(c)).train,
    "train, then append": lambda c, t: c.train.append(other(c).train),
    "save all": lambda c, t: Catalog.load(c.save(t / "a")).train,
    "save all, open": lambda c, t: open_catalog(c.save(t / "a", images="none")).train,
    "save the view": lambda c, t: Catalog.load(c.train.save(t / "a", images="link")),
    "save the view, load as view": lambda c, t: TrainCatalog.load(c.train.save(t / "a")),
    "save the view, open": lambda c, t: open_catalog(c.train.save(t / "a")),
    "CSV": lambda c, t: Catalog.from_csv(written(c, "x", "csv")).train,
    "CSV unchecked": lambda c, t: open_catalog(written(c, "x", "csv"), checked=False).train,
    "CSV of a view": lambda c, t: TrainCatalog.from_csv(written(c.train, "x", "csv")),
    "Parquet": lambda c, t: Catalog.from_parquet(written(c, "x", "parquet")).train,
    "frame": lambda c, t: Catalog.from_frame(c.frame, c.root).train,
    "folders": lambda c, t: Catalog.from_folders(c.root, split="train").train,
    "dropped": lambda c, t: drop_problems(c, check_catalog(c))[0].train,
    "cleaned": lambda c, t: save_clean(c, check_catalog(c), t / "a")[0].train,
    "copy": lambda c, t: copy.copy(c.train),
    "deep copy": lambda c, t: copy.deepcopy(c.train),
    "pickle": lambda c, t: pickle.loads(pickle.dumps(c.train)),
    "pickle, then train": lambda c, t: pickle.loads(pickle.dumps(c)).train,
    "constructor": lambda c, t: TrainCatalog(c.train.frame, c.root),
    "with another frame": lambda c, t: c.train.with_frame(c.train.frame.assign(title="new"), None),
    "writing into the frame": lambda c, t: wrote_into(c.train),
}


def other(catalog):
    "The same items under other names."
    return Catalog(catalog.frame.assign(item_id="x" + catalog.frame["item_id"]), catalog.root, "more")


def wrote_into(train):
    frame = train.frame
    frame["labels"] = SECRET
    frame["title"] = SECRET
    return train


def everything_in(thing) -> bytes:
    "All that a process receives that gets this object."
    return pickle.dumps(thing, protocol=5)


@pytest.mark.parametrize("road", ROADS)
def test_roads_to_training_carry_no_answers(catalog, tmp_path, road):
    train = ROADS[road](catalog, tmp_path)
    assert type(train) is TrainCatalog
    assert set(train.frame.columns) <= set(TRAIN_COLUMNS) and (train.frame["split"] == "train").all()
    assert not train.has("labels") and not train.has("boxes")
    for name in ("labels", "boxes"):
        with pytest.raises(InputError, match=f"no {name}"):
            getattr(train, name)
        with pytest.raises(InputError, match="no column"):
            train.column(name)
        with pytest.raises(AttributeError):
            setattr(train, name, [])
    assert SECRET.encode() not in everything_in(train)
    assert describe(train, pictures=0).labels == {}


def test_the_search_for_the_word_would_find_it(catalog):
    "The proof above is worth something only when a leak would show."
    assert SECRET.encode() in everything_in(catalog)
    assert SECRET.encode() in everything_in(catalog.select(catalog.frame["split"] == "train"))


def test_what_a_view_writes_holds_no_answers(catalog, tmp_path):
    folder = catalog.train.save(tmp_path / "a")
    table = pd.read_parquet(folder / "catalog.parquet")
    assert set(table.columns) <= set(TRAIN_COLUMNS) and SECRET not in table.to_csv()
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


DOORS = {
    "labels": lambda c, t: TrainCatalog(c.train.frame.assign(labels=SECRET), c.root),
    "boxes": lambda c, t: TrainCatalog(c.train.frame.assign(boxes="[]"), c.root),
    "a stranger": lambda c, t: TrainCatalog(c.train.frame.assign(product=SECRET), c.root),
    "unchecked": lambda c, t: TrainCatalog(c.train.frame.assign(labels=SECRET), c.root, checked=False),
    "other splits": lambda c, t: TrainCatalog(c.frame[list(TRAIN_COLUMNS)], c.root),
    "other splits, as such": lambda c, t: c.train.join(extra(split="query")),
    "join labels": lambda c, t: c.train.join(extra(labels=SECRET)),
    "join boxes": lambda c, t: c.train.join(extra(boxes="[]")),
    "join a stranger": lambda c, t: c.train.join(extra(answer=SECRET)),
    "join a catalogue": lambda c, t: c.train.join(c),
    "with a fuller frame": lambda c, t: c.train.with_frame(c.frame, None),
    "append a catalogue": lambda c, t: c.train.append(other(c)),
    "append chosen rows": lambda c, t: c.train.append(other(c).select([0])),
    "frame": lambda c, t: TrainCatalog.from_frame(c.frame, c.root),
    "CSV": lambda c, t: TrainCatalog.from_csv(written(c, "x", "csv")),
    "Parquet": lambda c, t: TrainCatalog.from_parquet(written(c, "x", "parquet")),
    "a full folder": lambda c, t: TrainCatalog.load(c.save(t / "a")),
    "a folder that was changed": lambda c, t: changed(c, t),
}


def changed(catalog, folder):
    path = catalog.train.save(folder / "a") / "catalog.parquet"
    pd.read_parquet(path).assign(labels=SECRET).to_parquet(path)
    return open_catalog(folder / "a")


@pytest.mark.parametrize("door", DOORS)
def test_doors_stay_shut(catalog, tmp_path, door):
    with pytest.raises(InputError, match="train view"):
        DOORS[door](catalog, tmp_path)


def test_folders_give_train_rows_no_labels(catalog):
    frame = Catalog.from_folders(catalog.root, split="train").frame
    assert set(frame["labels"]) == {""}


def test_no_method_widens_a_view(catalog):
    "Whatever method a later version adds to a catalogue has to be walked here too."
    walked = {
        "train", "split", "select", "sample", "join", "append", "save", "load", "from_csv", "from_parquet", "from_frame",
        "from_folders", "frame", "ids", "titles", "paths", "has", "column", "categories", "labels", "boxes",
        "with_frame", "ragged",
    }  # fmt: skip
    assert {name for name, _ in inspect.getmembers(Catalog) if not name.startswith("_")} == walked
    assert set(vars(catalog.train)) == {"root", "name", "source", "licence", "file", "_frame", "lines"}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_no_answers(catalog, workers):
    pictures = pytest.importorskip("product_retrieval.data.pictures")
    transform = pictures.picture_transform(32)
    for view in (catalog.train, catalog):  # a batch has no place for answers, whatever it is made from
        loader = pictures.PictureLoader(view, transform, batch_size=2, shuffle=True, workers=workers)
        batches = list(loader)
        assert sum(len(batch) for batch in batches) == len(view)
        assert all(SECRET.encode() not in everything_in(batch) for batch in batches)
        assert {f for batch in batches for f in vars(batch)} == {"pixels", "titles", "item_ids", "rows", "index"}


def test_training_reads_no_labels_of_train_rows(tiny_shelf, tmp_path, monkeypatch):
    "Train the first model while every reading of labels and boxes is watched."
    first_model = pytest.importorskip("product_retrieval.first_model")
    asked = []

    def watch(name):
        original = getattr(module._Answers, name).fget

        def reading(self):
            asked.append(set(self.frame["split"]))
            return original(self)

        monkeypatch.setattr(module._Answers, name, property(reading))

    watch("labels")
    watch("boxes")
    frame = tiny_shelf.frame
    frame["labels"] = frame["labels"].where(frame["split"] != "train", SECRET)
    spiked = Catalog(frame, tiny_shelf.root, "spiked")
    recipe = first_model.first_recipe("tiny") if hasattr(first_model, "first_recipe") else "recipes/tiny-first.toml"
    first_model.train_first_model(spiked, recipe, tmp_path / "run")
    assert not any("train" in splits for splits in asked)
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert kept and not any(SECRET.encode() in path.read_bytes() for path in kept)
