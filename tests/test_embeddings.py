"""Embeddings on disk: kills, refusals, skipped pictures, damaged folders."""

import errno
import filecmp
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog
from product_retrieval.embeddings import (
    Embeddings,
    about_file,
    content_hash,
    describe_catalog,
    describe_encoder,
    embed,
    embed_cached,
    new_array,
)


class Letters:
    "Counts letters of titles: reads no picture."

    name, dim, size, transform = "letters", 26, 0, None

    def __init__(self, pause=0.0, seen=None):
        self._pause, self._seen = pause, seen if seen is not None else []

    def __call__(self, batch):
        time.sleep(self._pause)
        self._seen.extend(batch.item_ids)
        digests = [hashlib.sha256(title.encode()).digest()[:26] for title in batch.titles]
        return np.array([list(d) for d in digests], dtype=np.float32)


class Means:
    "Mean colour of four quarters of a picture."

    name, dim, size = "means", 12, 32

    def __init__(self, pause=0.0):
        from product_retrieval.data.pictures import picture_transform

        self.transform, self._pause = picture_transform(32), pause

    def __call__(self, batch):
        time.sleep(self._pause)
        return torch.nn.functional.adaptive_avg_pool2d(batch.pixels, 2).flatten(1)


def make_catalog(folder, count=60, **changes):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["item_id,image,title,split"]
    for i in range(count):
        path = folder / f"{i}.jpg"
        if not path.exists():
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        lines.append(f"item{i},{i}.jpg,{changes.get('title', 'soap')} number {i},gallery")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Catalog.from_csv(folder / "catalog.csv")


@pytest.fixture
def catalog(tmp_path):
    return make_catalog(tmp_path / "shop")


def same_folder(a, b):
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir()) == ["embeddings.json", "ids.json", "vectors.npy"]
    return filecmp.cmpfiles(a, b, names, shallow=False)[1:] == ([], [])


def run_and_kill(work, after):
    "Run `work` in a child process and kill it with SIGKILL after some seconds; True when it had finished before."
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("encoder,count", [(Letters(pause=0.004), 200), (Means(pause=0.004), 60)], ids=["titles", "pictures"])
def test_killed_at_random_points_ends_identical(tmp_path, encoder, count):
    torch.set_num_threads(1)
    catalog = make_catalog(tmp_path / "shop", count)
    (tmp_path / "shop" / "7.jpg").write_bytes(b"broken")
    start = time.perf_counter()
    whole = embed(encoder, catalog, tmp_path / "whole", batch_size=8, workers=0)
    seconds = time.perf_counter() - start
    rng, kills = random.Random(0), 0
    for trial in range(6):
        folder = tmp_path / f"killed{trial}"
        for _ in range(30):
            if run_and_kill(lambda: embed(encoder, catalog, folder, batch_size=8, workers=0), rng.uniform(0, seconds * 0.3)):  # noqa: B023
                break
            kills += 1
        embed(encoder, catalog, folder, batch_size=8, workers=0)
        assert same_folder(tmp_path / "whole", folder)
        assert not (tmp_path / f".killed{trial}.unfinished").exists()
    assert kills >= 6
    assert whole.meta["skipped"] == ([] if encoder.size == 0 else [["item7", whole.meta["skipped"][0][1]]])


def test_resumed_run_recomputes_at_most_one_batch(tmp_path, catalog):
    class Stops(Letters):
        def __call__(self, batch):
            if len(self._seen) >= 40:
                raise KeyboardInterrupt
            return super().__call__(batch)

    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        embed(Stops(seen=first), catalog, tmp_path / "e", batch_size=8)
    done = np.load(tmp_path / ".e.unfinished" / "done.npy")
    assert done.sum() == 40
    result = embed(Letters(seen=second), catalog, tmp_path / "e", batch_size=8)
    assert not set(first) & set(second) and len(first) + len(second) == 60
    whole = embed(Letters(), catalog, tmp_path / "w", batch_size=60)
    assert np.array_equal(result.vectors, whole.vectors) and result.ids == catalog.ids


def test_resume_with_another_batch_size_is_allowed(tmp_path, catalog):
    class Stops(Letters):
        def __call__(self, batch):
            if len(self._seen) >= 21:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        embed(Stops(), catalog, tmp_path / "e", batch_size=7)
    assert np.array_equal(
        embed(Letters(), catalog, tmp_path / "e", batch_size=16).vectors, embed(Letters(), catalog, tmp_path / "w").vectors
    )


def test_other_model_preprocessing_or_catalogue_is_refused(tmp_path, catalog):
    encoder = Means()
    embed(encoder, catalog, tmp_path / "e", workers=0)
    other = Means()
    other.name = "other"
    with pytest.raises(InputError, match=r"model 'means'.*'other'"):
        embed(other, catalog, tmp_path / "e")
    other = Means()
    other.scale = 2
    with pytest.raises(InputError, match="weights"):
        embed(other, catalog, tmp_path / "e")
    from product_retrieval.data.pictures import picture_transform

    other = Means()
    other.transform = picture_transform(32, mean=(0.0, 0.0, 0.0))
    with pytest.raises(InputError, match="preprocessing"):
        embed(other, catalog, tmp_path / "e")
    with pytest.raises(InputError, match="catalog_hash"):
        embed(encoder, make_catalog(tmp_path / "shop", title="shampoo"), tmp_path / "e")
    with pytest.raises(InputError, match="dtype"):
        embed(encoder, make_catalog(tmp_path / "shop"), tmp_path / "e", dtype="float16")


def test_changed_picture_is_another_catalogue(tmp_path, catalog):
    embed(Means(), catalog, tmp_path / "e", workers=0)
    (tmp_path / "shop" / "3.jpg").write_bytes((tmp_path / "shop" / "4.jpg").read_bytes() + b" ")
    with pytest.raises(InputError, match="catalog_hash"):
        embed(Means(), catalog, tmp_path / "e", workers=0)


def stop_after_a_batch(catalog, folder):
    class Stops(Letters):
        def __call__(self, batch):
            if self._seen:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        embed(Stops(), catalog, folder, batch_size=8)


def test_unfinished_folder_of_another_run_is_refused(tmp_path, catalog):
    stop_after_a_batch(catalog, tmp_path / "e")
    with pytest.raises(InputError, match="call embed again"):
        Embeddings.open(tmp_path / "e")
    other = Letters()
    other.name = "other"
    with pytest.raises(InputError, match="holds a run with model 'letters'"):
        embed(other, catalog, tmp_path / "e")


def test_finished_folder_is_not_computed_again(tmp_path, catalog):
    seen, reported = [], []
    embed(Letters(seen=seen), catalog, tmp_path / "e", batch_size=25, report=lambda *now: reported.append(now))
    assert reported == [(25, 60), (50, 60), (60, 60)]
    embed(Letters(seen=seen), catalog, tmp_path / "e")
    assert len(seen) == 60


def test_skipped_pictures_are_recorded_and_joined(tmp_path, catalog):
    (tmp_path / "shop" / "5.jpg").write_bytes(b"no picture")
    (tmp_path / "shop" / "6.jpg").unlink()
    found = embed(Means(), catalog, tmp_path / "e", workers=0)
    assert [i for i, _ in found.meta["skipped"]] == ["item5", "item6"] and len(found) == 58
    assert all(len(reason) > 5 for _, reason in found.meta["skipped"])
    with pytest.raises(InputError, match=r"'item5'.*skipped"):
        found.of(catalog)
    rest = found.join(catalog)
    assert rest.ids == found.ids and found.of(rest).shape == (58, 12)
    with pytest.raises(InputError, match="item 'item99': has no vector here; did you mean"):
        found.select(["item99"])


def test_nothing_readable_is_an_error(tmp_path, catalog):
    for path in (tmp_path / "shop").glob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="no item could be embedded"):
        embed(Means(), catalog, tmp_path / "e", workers=0)


def test_bad_encoders(tmp_path, catalog):
    def wrong_length(batch):
        return np.zeros((1, 3))

    def nan(batch):
        return np.full((len(batch.item_ids), 3), np.nan)

    def changes(batch):
        return np.zeros((len(batch.item_ids), 3 if "item0" in batch.item_ids else 4))

    def large(batch):
        return np.full((len(batch.item_ids), 3), 1e6)

    for encoder, message, more in [
        (wrong_length, r"shape \[1, 3\] for a batch of 8", {}),
        (nan, "item 'item0'.*NaN", {}),
        (changes, r"shape \[8, 4\].*expected \[8, 3\]", {}),
        (large, "item 'item0'.*float16", {"dtype": "float16"}),
    ]:
        with pytest.raises(InputError, match=message):
            embed(encoder, catalog, tmp_path / encoder.__name__, batch_size=8, workers=0, **more)
    with pytest.raises(InputError, match=r"dtype 'float23'.*float32"):
        embed(Letters(), catalog, tmp_path / "e", dtype="float23")
    with pytest.raises(InputError, match="nothing to embed"):
        embed(Letters(), catalog.select([]), tmp_path / "e")


def test_float16_and_split_and_torch_mode(tmp_path, catalog):
    class Tower(torch.nn.Module):
        name, dim, size, transform = "tower", 4, 0, None

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 4)

        def forward(self, batch):
            assert not self.training and not torch.is_grad_enabled()
            return self.linear(torch.tensor([[float(len(t))] for t in batch.titles]))

    torch.manual_seed(0)
    tower = Tower().train()
    half = embed(tower, catalog, tmp_path / "half", split="gallery", dtype="float16")
    full = embed(tower, catalog, tmp_path / "full", split="gallery")
    assert tower.training and half.vectors.dtype == np.float16 and half.meta["split"] == "gallery"
    assert np.abs(half.vectors.astype(np.float32) - full.vectors).max() < 0.01
    assert isinstance(full.vectors, np.memmap)
    before = describe_encoder(tower)["weights"]
    with torch.no_grad():
        tower.linear.bias += 1
    assert describe_encoder(tower)["weights"] != before


@pytest.mark.parametrize("name", ["vectors.npy", "ids.json", "embeddings.json"])
def test_truncated_and_missing_files(tmp_path, catalog, name):
    embed(Letters(), catalog, tmp_path / "e")
    path = tmp_path / "e" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        Embeddings.open(tmp_path / "e")
    path.unlink()
    with pytest.raises(InputError, match=f"{name}.*(missing|not found)"):
        Embeddings.open(tmp_path / "e")


def test_changed_bytes(tmp_path, catalog):
    embed(Letters(), catalog, tmp_path / "e")
    path = tmp_path / "e" / "vectors.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Embeddings.open(tmp_path / "e")
    with pytest.raises(InputError, match="checksum"):
        Embeddings.open(tmp_path / "e", verify=True)
    ids = tmp_path / "e" / "ids.json"
    ids.write_text(ids.read_text(encoding="utf-8").replace("item3", "item4"), encoding="utf-8")
    with pytest.raises(InputError, match="checksum"):
        Embeddings.open(tmp_path / "e")


def test_names_of_files_cannot_leave_the_folder(tmp_path, catalog):
    embed(Letters(), catalog, tmp_path / "e")
    path = tmp_path / "e" / "embeddings.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    meta["files"] = {"../../etc/passwd": {"bytes": 1, "sha256": "x"}}
    path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(InputError):
        Embeddings.open(tmp_path / "e")


def test_arrays_from_elsewhere(tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    Embeddings(vectors, ["a", "b", "c", "d"], {"model": "mine"}).save(tmp_path / "e")
    found = Embeddings.open(tmp_path / "e", verify=True)
    assert np.array_equal(found.select(["d", "a"]), vectors[[3, 0]]) and "mine" in repr(found)
    with pytest.raises(InputError, match="'a' stands there twice"):
        Embeddings(vectors, ["a", "a", "c", "d"])
    with pytest.raises(InputError, match="3 ids for vectors of shape"):
        Embeddings(vectors, ["a", "b", "c"])
    with pytest.raises(InputError, match="exists already"):
        found.save(tmp_path / "e")


def test_content_hash():
    assert content_hash({"b": 1, "a": [1, 2]}) == content_hash({"a": [1, 2], "b": 1})
    assert len({content_hash(x) for x in (1, "1", 1.0, None, [1], [[1]], np.ones(1), np.ones(1, np.float32))}) == 8
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"])
    assert content_hash(object()) == content_hash(object())


def test_cache(tmp_path, catalog, monkeypatch):
    monkeypatch.setenv("PRODUCT_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    seen = []
    first = embed_cached(Letters(seen=seen), catalog)
    again = embed_cached(Letters(seen=seen), catalog)
    assert len(seen) == 60 and np.array_equal(first.vectors, again.vectors)
    embed_cached(Letters(seen=seen), catalog.select(list(range(5))))
    assert len(seen) == 65
    shutil.rmtree(tmp_path / "cache")


def test_failed_run_without_a_row_does_not_block_the_next(tmp_path, catalog):
    def broken(batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        embed(broken, catalog, tmp_path / "e", workers=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shop"], "nothing stays behind"
    left = tmp_path / ".e.unfinished"
    for plan in ("[]", "{", '{"model": "other", "items": 3}'):  # what a kill before the first row leaves
        left.mkdir()
        (left / "plan.json").write_text(plan, encoding="utf-8")
        np.save(left / "done.npy", np.zeros(3, np.uint8))
        assert len(embed(Letters(), catalog, tmp_path / "e")) == 60
        assert not left.exists()
        shutil.rmtree(tmp_path / "e")


@pytest.mark.parametrize("name,content", [("plan.json", b"[]"), ("plan.json", b"{"), ("done.npy", b"x"), ("vectors.npy", b"x")])
def test_damaged_unfinished_folder_with_rows_is_kept_and_named(tmp_path, catalog, name, content):
    stop_after_a_batch(catalog, tmp_path / "e")
    path = tmp_path / ".e.unfinished" / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        embed(Letters(), catalog, tmp_path / "e", batch_size=8)
    assert path.read_bytes() == content and not (tmp_path / "e").exists()


def test_places_that_are_no_new_folder(tmp_path, catalog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", ".", "/", "..", "a/..", "a\0b"):
        with pytest.raises(InputError, match="names no folder of its own"):
            embed(Letters(), catalog, folder)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="file: is a file"):
        embed(Letters(), catalog, tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        embed(Letters(), catalog, tmp_path / "file" / "e")
    before = sorted(p.name for p in (tmp_path / "shop").iterdir())
    with pytest.raises(InputError, match=r"shop: holds other files.*choose a new folder"):
        embed(Letters(), catalog, tmp_path / "shop")
    assert sorted(p.name for p in (tmp_path / "shop").iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "shop"]


def test_empty_folder_is_accepted(tmp_path, catalog):
    (tmp_path / "e").mkdir()
    assert len(embed(Letters(), catalog, tmp_path / "e")) == 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "shop"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_at_the_start(tmp_path, catalog, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(InputError, match=r"disk full: needs .* free; make room, then the same command goes on"):
        embed(Letters(), catalog, tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shop"]
    monkeypatch.undo()
    assert len(embed(Letters(), catalog, tmp_path / "e")) == 60


def test_full_disk_at_the_end_keeps_the_rows(tmp_path, catalog, monkeypatch):
    import product_retrieval.embeddings as module

    (tmp_path / "shop" / "5.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(module, "_write_kept", full_disk)
    with pytest.raises(InputError, match="e: disk full"):
        embed(Means(), catalog, tmp_path / "e", workers=0)
    assert not (tmp_path / "e").exists()
    monkeypatch.undo()
    assert np.load(tmp_path / ".e.unfinished" / "done.npy").sum() == 59
    assert len(embed(Means(), catalog, tmp_path / "e", workers=0)) == 59


@pytest.mark.parametrize("how", ["posix_fallocate", "unsupported", "missing"])
def test_new_array_has_its_space(tmp_path, monkeypatch, how):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if how == "unsupported":
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    new_array(tmp_path / "a.npy", "float32", (3000, 100))[7] = 7
    found = np.load(tmp_path / "a.npy")
    assert found.shape == (3000, 100) and found.sum() == 700
    assert getattr((tmp_path / "a.npy").stat(), "st_blocks", 10**9) * 512 >= found.nbytes


def test_second_run_into_the_same_folder_is_told(tmp_path, catalog):
    child = os.fork()
    if child == 0:
        try:
            embed(Letters(pause=0.3), catalog, tmp_path / "e", batch_size=8)
            os._exit(0)
        except BaseException:
            os._exit(1)
    lock = tmp_path / ".e.unfinished.lock"
    while not os.path.lexists(lock):
        time.sleep(0.005)
    with pytest.raises(InputError, match=f"process {child} is embedding there now; wait"):
        embed(Letters(), catalog, tmp_path / "e", batch_size=8)
    assert os.waitpid(child, 0)[1] == 0
    seen = []
    assert len(embed(Letters(seen=seen), catalog, tmp_path / "e", batch_size=8)) == 60 and not seen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "shop"]


def test_locks_of_the_dead_and_of_other_machines(tmp_path, catalog):
    lock = tmp_path / ".e.unfinished.lock"
    lock.write_text(f"{os.getpid()} 1.0 {platform.node()}", encoding="utf-8")  # this number, started long ago
    assert len(embed(Letters(), catalog, tmp_path / "e")) == 60 and not lock.exists()
    lock = tmp_path / ".f.unfinished.lock"
    lock.write_text("7 1.0 another-machine", encoding="utf-8")
    with pytest.raises(InputError, match=r"process 7 on another-machine.*delete .*\.lock"):
        embed(Letters(), catalog, tmp_path / "f")
    lock.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="another process"):
        embed(Letters(), catalog, tmp_path / "f")
    os.utime(lock, (1, 1))
    assert len(embed(Letters(), catalog, tmp_path / "f")) == 60


def test_folder_that_another_run_finished_meanwhile_is_returned(tmp_path, catalog):
    embed(Letters(), catalog, tmp_path / "other")

    class Late(Letters):
        def __call__(self, batch):
            if not (tmp_path / "e").exists():
                shutil.copytree(tmp_path / "other", tmp_path / "e")
            return super().__call__(batch)

    assert len(embed(Late(), catalog, tmp_path / "e")) == 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "other", "shop"]


def test_descriptions_of_the_wrong_kind(tmp_path, catalog):
    embed(Letters(), catalog, tmp_path / "e")
    path = tmp_path / "e" / "embeddings.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    ids = tmp_path / "e" / "ids.json"
    changes = [{"vectors.npy": 5}, {"vectors.npy": {"bytes": "x", "sha256": "y"}}, {}, [], 5]
    for change in [*({"files": c} for c in changes), {"skipped": 5}, {"skipped": [5]}, {"version": 0}]:
        path.write_text(json.dumps({**meta, **change}), encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(str(tmp_path / "e"))):
            Embeddings.open(tmp_path / "e")
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"embeddings\.json: holds a list, expected a dict"):
        Embeddings.open(tmp_path / "e")
    ids.write_text("5", encoding="utf-8")
    meta["files"]["ids.json"] = about_file(ids)
    path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(InputError, match=r"ids\.json: holds a int, expected a list"):
        Embeddings.open(tmp_path / "e")


def test_picture_name_with_a_nul_counts_as_missing(catalog):
    from types import SimpleNamespace

    about = SimpleNamespace(frame=catalog.frame, name="toy", paths=[Path("3\0.jpg"), *catalog.paths[1:]])
    assert describe_catalog(about)["catalog_hash"] != describe_catalog(catalog)["catalog_hash"]
