"""Pictures: every colour mode and fault that a shop's files have, and a loader that is exact under kills and workers."""

import io
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from product_retrieval.core import InputError
from product_retrieval.data import pictures as p


def scene(width=60, height=40) -> Image.Image:
    "Red above, blue below: a picture whose way up can be seen."
    picture = Image.new("RGB", (width, height), (200, 30, 30))
    picture.paste((20, 40, 180), (0, height // 2, width, height))
    return picture


def mean(path, **options) -> tuple:
    return tuple(np.asarray(p.read_image(path, **options)).reshape(-1, 3).mean(0).round().astype(int).tolist())


def near(a, b, tolerance=6) -> bool:
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


# --- colour modes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene(64, 48)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB")
    read = p.read_image(tmp_path / "a.jpg")
    assert read.mode == "RGB" and read.size == expected.size == ((48, 64) if orientation >= 5 else (64, 48))
    assert np.array_equal(np.asarray(read), np.asarray(expected))
    tensor = p.read_pixels(tmp_path / "a.jpg")
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_broken_exif_does_not_spoil_a_picture(tmp_path):
    scene().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01", quality=95)
    assert p.read_image(tmp_path / "a.jpg").size == (60, 40)
    assert p.read_pixels(tmp_path / "a.jpg").shape == (3, 40, 60)


def test_cmyk_palette_grey_and_alpha(tmp_path):
    picture = scene()
    whole = tuple(np.asarray(picture).reshape(-1, 3).mean(0))
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    picture.convert("P").save(tmp_path / "palette.png")
    picture.save(tmp_path / "a.webp", quality=95)
    picture.save(tmp_path / "a.bmp")
    for name in ("cmyk.jpg", "palette.png", "a.webp", "a.bmp"):
        assert near(mean(tmp_path / name), whole, 12), name
    picture.convert("L").save(tmp_path / "grey.jpg", quality=95)
    grey = np.asarray(p.read_image(tmp_path / "grey.jpg"))
    assert grey.shape == (40, 60, 3) and (grey[..., 0] == grey[..., 2]).all()
    assert np.array_equal(p.read_pixels(tmp_path / "grey.jpg").permute(1, 2, 0).numpy(), grey)


def test_transparency_lies_over_white(tmp_path):
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    clear.save(tmp_path / "rgba.png")
    clear.convert("LA").save(tmp_path / "la.png")
    Image.new("RGBA", (10, 10), (255, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    Image.new("RGB", (10, 10), (0, 255, 0)).save(tmp_path / "trns.png", transparency=(0, 255, 0))
    for name in ("rgba.png", "la.png", "p.png", "p.gif", "trns.png"):
        assert mean(tmp_path / name) == (255, 255, 255), name
    assert near(mean(tmp_path / "half.png"), (255, 127, 127))


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        row = np.asarray(p.read_image(tmp_path / name))[0, :, 0].astype(int)
        assert np.abs(row - np.linspace(0, 255, 64)).max() <= 1, name
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert near(mean(tmp_path / "f.tif"), (128, 128, 128))
    Image.fromarray(np.full((4, 4), 128, np.int32)).save(tmp_path / "i.tif")
    assert near(mean(tmp_path / "i.tif"), (128, 128, 128))


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {}))
        assert near(mean(tmp_path / name), (255, 0, 0)), name


def test_draft_decoding_is_close_and_never_too_small(tmp_path):
    from PIL import ImageFilter

    noise = Image.effect_noise((900, 1200), 60).convert("RGB").filter(ImageFilter.GaussianBlur(8))
    noise.save(tmp_path / "big.jpg", quality=92)
    whole = p.read_image(tmp_path / "big.jpg")
    for need, expected in ((112, 113), (224, 225), (225, 225), (226, 450), (451, 900), (2000, 900)):
        small = p.read_image(tmp_path / "big.jpg", min_side=need)
        assert min(small.size) == expected
        a, b = (np.asarray(i.resize((64, 64), Image.Resampling.BOX)).astype(int) for i in (small, whole))
        assert np.abs(a - b).mean() < 2
    assert max(p.read_image(tmp_path / "big.jpg", max_side=100).size) == 100
    assert min(p.read_pixels(tmp_path / "big.jpg", 224).shape[1:]) == 225


def test_both_ways_to_decode_a_jpeg_agree(grocery, monkeypatch):
    paths = sorted((grocery / "dataset" / "val").rglob("*.jpg"))[::10]
    fast = [p.read_pixels(path) for path in paths]
    monkeypatch.setattr(p, "_jpeg_decoder", lambda: None)
    assert all(torch.equal(a, p.read_pixels(path)) for a, path in zip(fast, paths, strict=True))


# --- faults


def png_bomb(side=20000) -> bytes:
    "A PNG of a few hundred bytes whose header promises 400 million pixels."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    "A JPEG whose header promises 4 billion pixels."
    buffer = io.BytesIO()
    scene().save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(data)


def faults(folder) -> dict[str, str]:
    "Broken files by name, and what the error has to say."
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, "JPEG")
    good = buffer.getvalue()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "html.jpg").write_bytes(b"<!doctype html><title>log in</title>")
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "head.jpg").write_bytes(good[:300])
    (folder / "two.jpg").write_bytes(good[:2])
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "bomb.jpg").write_bytes(jpeg_bomb())
    (folder / "post.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:-30])
    (folder / "folder.jpg").mkdir()
    return {
        "empty.jpg": "file is empty", "html.jpg": "not a picture in a known format", "cut.jpg": "broken picture",
        "head.jpg": "picture", "two.jpg": "picture", "cut.png": "broken picture",
        "bomb.png": "too large", "bomb.jpg": "too large",
        "post.eps": "not a picture in a known format", "folder.jpg": "directory", "missing.jpg": "No such file",
    }


def test_errors_name_the_file_and_say_why(tmp_path, recwarn):
    for name, why in faults(tmp_path).items():
        for read in (p.read_image, p.read_pixels):
            with pytest.raises(p.ImageError, match=why) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
            assert "0x" not in str(error.value)
    assert not [w for w in recwarn if "Bomb" in w.category.__name__]


# --- transforms


def test_transform_equals_the_plain_way():
    from torchvision import transforms as plain

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8))
    ours = p.picture_transform(128)(picture)
    theirs = plain.Compose([plain.ToTensor(), plain.Normalize(p.IMAGENET_MEAN, p.IMAGENET_STD)])(picture)
    assert torch.allclose(ours, theirs, atol=1e-5)
    blurred = scene(150, 100)
    ours = p.picture_transform(64)(blurred)
    steps = [plain.Resize(64), plain.CenterCrop(64), plain.ToTensor(), plain.Normalize(p.IMAGENET_MEAN, p.IMAGENET_STD)]
    assert (ours - plain.Compose(steps)(blurred)).abs().mean() < 0.05


def test_transform_settings_build_it_again():
    import json

    first = p.picture_transform(96, train=True, scale=(0.5, 1), mean=(0.5, 0.5, 0.5), jitter=0.2)
    again = p.picture_transform(**json.loads(json.dumps(first.settings())))
    assert again == first and again.min_side == 136
    for wrong in ({"size": 0}, {"size": 8, "crop": 0}, {"size": 8, "scale": (0.9, 0.5)}, {"size": 8, "std": (0, 1, 1)}):
        with pytest.raises(InputError, match="picture_transform"):
            p.picture_transform(**wrong)


# --- the loader


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "37 pictures of many sizes as a catalogue."
    root = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(1)
    for k in range(37):
        size = (40 + 7 * k % 30, 40 + 11 * k % 30)
        picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        picture.save(root / f"{k}.jpg")
    frame = pd.DataFrame({"item_id": [f"i{k}" for k in range(37)], "image": [f"{k}.jpg" for k in range(37)]})
    return SimpleNamespace(frame=frame.assign(title=[f"title {k}" for k in range(37)]), root=root)


def loader(shop, **options):
    options = {"batch_size": 8, "shuffle": True, "seed": 3, "workers": 0, **options}
    transform = options.pop("transform", p.picture_transform(32, train=True, jitter=0.2))
    return p.PictureLoader(shop, transform, **options)


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.pixels, y.pixels) and x.item_ids == y.item_ids and x.titles == y.titles
        and torch.equal(x.rows, y.rows) and x.index == y.index
        for x, y in zip(a, b, strict=True)
    )


def test_batches(shop):
    batches = list(loader(shop))
    assert len(batches) == len(loader(shop)) == 5
    assert batches[0].pixels.shape == (8, 3, 32, 32) and batches[0].pixels.dtype == torch.float32
    rows = torch.cat([b.rows for b in batches]).tolist()
    assert sorted(rows) == list(range(37)) and rows != list(range(37))
    assert all(i == f"i{r}" and t == f"title {r}" for b in batches for i, t, r in zip(b.item_ids, b.titles, b.rows, strict=True))
    assert len(loader(shop, drop_last=True)) == len(list(loader(shop, drop_last=True))) == 4
    assert len(batches[-1].to("cpu")) == 5


@pytest.mark.parametrize("workers, start", [(1, "fork"), (2, "fork"), (3, "fork"), (2, "forkserver")])
def test_the_number_of_workers_changes_nothing(shop, workers, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    here, there = loader(shop), loader(shop, workers=workers, start=start)
    for epoch in (0, 1) if start == "fork" else (1,):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        assert same(list(here), list(there))


def test_order_and_views_depend_on_seed_and_epoch(shop):
    one, other = loader(shop), loader(shop, seed=4)
    first = list(one)
    assert same(first, list(one))
    one.set_epoch(1)
    assert not same(first, list(one)) and not same(first, list(other))
    still = loader(shop, shuffle=False)
    a = list(still)
    still.set_epoch(1)
    b = list(still)
    assert all(x.item_ids == y.item_ids and not torch.equal(x.pixels, y.pixels) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(shop, workers):
    whole = list(loader(shop, workers=workers))
    for start in range(6):
        assert same(list(loader(shop, workers=workers).iter_from(start)), whole[start:])


def test_the_generators_outside_stay_as_they_are(shop):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    seen = []
    for workers in (0, 2):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        for _ in loader(shop, workers=workers, transform=lambda i: torch.from_numpy(np.asarray(i.resize((8, 8))).copy())):
            pass
        seen.append(draw())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert seen[0] == seen[1] == draw()


def noisy(picture):
    "Somebody else's transform, which draws from all three generators."
    value = random.random() + np.random.rand() + torch.rand(()).item()
    return torch.full((3, 4, 4), value)


def test_a_foreign_transform_is_seeded_too(shop):
    a, b = (list(loader(shop, transform=noisy, workers=w)) for w in (0, 2))
    assert same(a, b) and len({x.pixels[0, 0, 0, 0].item() for x in a}) == 5


def test_shards_share_out_every_batch(shop):
    whole = list(loader(shop))
    parts = [list(loader(shop, shard=(k, 2))) for k in range(2)]
    for full, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(full.pixels, torch.cat([left.pixels, right.pixels]))
        assert full.item_ids == left.item_ids + right.item_ids


def test_without_a_transform_no_picture_is_read(shop, tmp_path):
    nowhere = SimpleNamespace(frame=shop.frame, root=tmp_path / "nowhere")
    batches = list(p.PictureLoader(nowhere, None, batch_size=10))
    assert [b.pixels.shape for b in batches] == [(10, 3, 0, 0)] * 3 + [(7, 3, 0, 0)]
    assert batches[0].titles[0] == "title 0"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_skipped_and_reported(shop, tmp_path, workers, capfd):
    broken = faults(tmp_path)
    images = [str(shop.root / f"{k}.jpg") for k in range(10)] + list(broken)
    frame = pd.DataFrame({"item_id": [f"x{k}" for k in range(len(images))], "image": images, "title": ""})
    catalog = SimpleNamespace(frame=frame, root=tmp_path)
    reader = p.PictureLoader(catalog, p.picture_transform(16), batch_size=4, workers=workers)
    batches = list(reader)
    assert sum(len(b) for b in batches) == 10 and len(reader.skipped) == len(broken)
    assert [b.index for b in batches] == [0, 1, 2]
    reasons = dict(reader.skipped)
    assert all(why in reasons[f"x{10 + k}"] for k, why in enumerate(broken.values()))
    said = capfd.readouterr().err
    assert f"{len(broken)} of {len(images)} pictures could not be read and were skipped" in said
    list(reader)
    assert "skipped" not in capfd.readouterr().err, "the same pictures are reported once"
    next(iter(p.PictureLoader(SimpleNamespace(frame=frame[9:], root=tmp_path), p.picture_transform(16), batch_size=4)))
    assert "pictures could not be read" in capfd.readouterr().err, "a pass that is broken off reports too"


def test_bad_settings_and_transforms(shop):
    with pytest.raises(InputError, match="batch_size=0"):
        loader(shop, batch_size=0)
    with pytest.raises(InputError, match=r"shard=\(2, 2\)"):
        loader(shop, shard=(2, 2))
    with pytest.raises(InputError, match="start='frok'; did you mean 'fork'"):
        loader(shop, start="frok")
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"jpg: the transform returned shape .* resize to one fixed size"):
            list(loader(shop, workers=workers, transform=lambda i: torch.zeros(i.size)))
        with pytest.raises(InputError, match=r"returned \w+; expected a tensor"):
            list(loader(shop, workers=workers, transform=lambda i: i))


@pytest.mark.timeout(60)
def test_a_dead_worker_is_an_error_not_a_hang(grocery):
    lists = (grocery / "dataset" / "train.txt").read_text().splitlines()
    images = [line.split(", ")[0] for line in lists]
    frame = pd.DataFrame({"item_id": images, "image": images, "title": ""})
    catalog = SimpleNamespace(frame=frame, root=grocery / "dataset")
    with pytest.raises(RuntimeError, match="worker"):
        for number, _ in enumerate(p.PictureLoader(catalog, p.picture_transform(64), batch_size=16, workers=2)):
            if number == 2:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_worker_that_dies_by_itself_is_explained(shop):
    with pytest.raises(p.WorkerError, match=r"worker that decodes pictures died.*fewer workers"):
        list(loader(shop, workers=2, transform=lambda i: os._exit(9)))


def test_no_worker_is_left_behind(shop):
    for _ in loader(shop, workers=2):
        break
    iterator = iter(loader(shop, workers=2))
    next(iterator)
    iterator.close()
    assert not multiprocessing.active_children()


def test_bench_loader_runs(grocery):
    script = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "bench_loader.py")
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '"ratio"' in done.stdout, done.stderr
