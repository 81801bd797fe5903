"""Pictures a second: our loader against PIL + torch DataLoader + torchvision's v1 transforms, on the Grocery photos.

    python benchmarks/bench_loader.py [--quick]

Both ways run alternately in one process with the same number of workers; the figure is the median of the passes. The
steps (decoding, resizing, normalising) follow, each alone and in this process, so that the sum can be understood.
One JSON line a figure. `--quick` runs a few pictures once.
"""

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from product_retrieval.data import pictures as ours

QUICK = "--quick" in sys.argv
BAR = 1.5
HARDWARE = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}"


def grocery() -> Path | None:
    "The folder dataset/ of the Grocery photos."
    places = [Path(os.environ.get("PRODUCT_RETRIEVAL_DATA", "")), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((p / "grocery160" / "dataset" for p in places if (p / "grocery160").is_dir()), None)


class Plain(Dataset):
    "The way that tutorials show."

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        with Image.open(self.paths[k]) as picture:
            return self.transform(picture.convert("RGB"))


def plain_transform(size: int, train: bool):
    "v1 transforms that do what ours do."
    views = [v1.RandomResizedCrop(size, scale=(0.35, 1)), v1.RandomHorizontalFlip()]
    still = [v1.Resize(size), v1.CenterCrop(size)]
    return v1.Compose([*(views if train else still), v1.ToTensor(), v1.Normalize(ours.IMAGENET_MEAN, ours.IMAGENET_STD)])


def rate(batches, count) -> float:
    "Pictures a second of one pass."
    start = time.perf_counter()
    seen = sum(count(batch) for batch in batches)
    return seen / (time.perf_counter() - start)


def say(figure: str, mine: float, peer: float, unit: str, bar: float | None = None) -> None:
    "One JSON line; the ratio is above 1 when ours is faster."
    ratio = mine / peer if unit == "pictures/s" else peer / mine
    line = {"figure": figure, "ours": round(mine, 3), "peer": round(peer, 3), "unit": unit, "ratio": round(ratio, 2)}
    line |= {"bar": bar, "met": None if bar is None else ratio >= bar, "hardware": HARDWARE}
    print(json.dumps(line), flush=True)


def compare_loaders(catalog, paths, size, train, workers, passes, files="") -> None:
    "Whole passes, alternately."
    peer = DataLoader(Plain(paths, plain_transform(size, train)), batch_size=64, shuffle=True, num_workers=workers)
    transform = ours.picture_transform(size, train=train)
    mine = ours.PictureLoader(catalog, transform, batch_size=64, shuffle=True, workers=workers)
    rates = [(rate(mine, len), rate(peer, len)) for _ in range(passes)]
    a, b = (statistics.median(column) for column in zip(*rates, strict=True))
    kind = "training views" if train else "still views"
    say(f"loader, {files}{kind} at {size} px, {workers} workers", a, b, "pictures/s", BAR if workers else None)


def milliseconds(function, items, passes) -> float:
    "Milliseconds a call, the best of some passes: what the step costs when nobody disturbs it."
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        for item in items:
            function(item)
        times.append((time.perf_counter() - start) / len(items) * 1000)
    return min(times)


def pil_decode(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def compare_steps(paths, passes) -> None:
    "Each step alone, one thread."
    pictures, tensors = [pil_decode(p) for p in paths], [ours.read_pixels(p) for p in paths]
    say("step: decode", milliseconds(ours.read_pixels, paths, passes), milliseconds(pil_decode, paths, passes), "ms")
    for size in (64, 96, 128, 160):
        cut = v1.Compose([v1.Resize(size), v1.CenterCrop(size)])
        steps = ours.picture_transform(size).pixels
        say(f"step: resize and cut to {size} px", milliseconds(steps, tensors, passes), milliseconds(cut, pictures, passes), "ms")
    finish_each = v1.Compose([v1.ToTensor(), v1.Normalize(ours.IMAGENET_MEAN, ours.IMAGENET_STD)])
    squares = [p.resize((128, 128)) for p in pictures[:64]]
    batch = torch.stack([v1.functional.pil_to_tensor(s) for s in squares])
    finish = ours.picture_transform(128).finish
    say("step: to normalised floats, 128 px", milliseconds(lambda _: finish(batch), range(8), passes) / len(batch),
        milliseconds(finish_each, squares, passes), "ms")


def enlarged(paths, side) -> list[bytearray]:
    "The photos with a longer shorter side, as a phone would store them."
    files = []
    for path in paths:
        picture, buffer = pil_decode(path), io.BytesIO()
        scale = side / min(picture.size)
        picture.resize([round(s * scale) for s in picture.size]).save(buffer, "JPEG", quality=85)
        files.append(bytearray(buffer.getvalue()))
    return files


def compare_draft(paths, folder, passes) -> None:
    "Draft decoding: how much it saves depends on how much larger the file is than what the model sees."
    for side in (160, 464, 1200):
        places = []
        for k, data in enumerate(enlarged(paths, side)):
            places.append(folder / f"{side}-{k}.jpg")
            places[-1].write_bytes(data)
        for size in (64, 96, 128, 160):
            if side >= 2 * size:
                cut = ours.picture_transform(size).pixels
                draft = milliseconds(lambda p, s=size, c=cut: c(ours.read_pixels(p, s)), places, passes)
                whole = milliseconds(lambda p, c=cut: c(ours.read_pixels(p)), places, passes)
                say(f"step: decode {side} px and resize to {size} px, draft against whole", draft, whole, "ms")


def compare_phone(paths, folder, passes) -> None:
    "Whole passes over large files: the photos enlarged to 1,200 pixels on the shorter side."
    images = [f"{k}.jpg" for k in range(len(paths))]
    for image, data in zip(images, enlarged(paths, 1200), strict=True):
        (folder / image).write_bytes(data)
    frame = pd.DataFrame({"item_id": images, "image": images, "title": ""})
    catalog = SimpleNamespace(frame=frame, root=folder)
    compare_loaders(catalog, [folder / i for i in images], 160, True, 2, passes, "files of 1,200 px, ")


def main() -> None:
    "All figures."
    root = grocery()
    if root is None:
        sys.exit("the Grocery photos are not here: set PRODUCT_RETRIEVAL_DATA")
    torch.set_num_threads(1)
    images = [line.split(", ")[0] for line in (root / "train.txt").read_text().splitlines()][:: 20 if QUICK else 1]
    paths = [str(root / image) for image in images]
    frame = pd.DataFrame({"item_id": images, "image": images, "title": ""})
    catalog, passes = SimpleNamespace(frame=frame, root=root), 1 if QUICK else 5
    for size in (96,) if QUICK else (64, 96, 128, 160):
        for train in (True, False):
            compare_loaders(catalog, paths, size, train, workers=2, passes=passes)
    compare_loaders(catalog, paths, 96, True, workers=0, passes=passes)
    compare_steps(paths[::8], passes)
    with tempfile.TemporaryDirectory() as folder:
        compare_draft(paths[:: 60 if QUICK else 40], Path(folder), passes)
    with tempfile.TemporaryDirectory() as folder:
        compare_phone(paths[::10], Path(folder), passes)


if __name__ == "__main__":
    main()
