"""Speed of the regions: reading batches, training the detector, extracting.

Prints one JSON line a figure. Ours and the peer run alternately in one process; medians. `--quick` runs tiny.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import QUICK, ROUNDS, alternate, line



def stored(folder: Path, items: int, regions: int, dim: int):
    "A folder of random regions in the released shape, made without pictures."
    from product_retrieval.capture.regions import Regions

    rng, shape = np.random.default_rng(0), (items, regions + 1, dim)
    folder.mkdir()
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
    for row in range(items):
        features[row] = rng.random(shape[1:], dtype=np.float32)
    features.flush()
    boxes = rng.random((items, regions + 1, 5), dtype=np.float32)
    rest = {"boxes": boxes, "scores": boxes[..., 0], "mask": np.ones(shape[:2], bool)}
    features = np.load(folder / "features.npy", mmap_mode="r")
    return Regions(folder, [str(i) for i in range(items)], {"features": features, **rest}, {})


def training_step(batch: int, tokens: int):
    "One transformer layer of the released width on a batch: a lower bound of what a training step costs."
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    inputs = torch.randn(batch, tokens, 768)

    def step():
        layer(inputs).square().mean().backward()
        layer.zero_grad()

    return step


def bench_reading(folder: Path) -> None:
    "A batch of 16 items, 36 regions + 1, 2,048 numbers each, at random rows; peer: float32 arrays, one file an item."
    items, regions, dim = (64, 4, 64) if QUICK else (1500, 36, 2048)
    found, files = stored(folder / "r", items, regions, dim), folder / "files"
    files.mkdir()
    for row in range(min(items, 400)):
        np.savez(files / f"{row}.npz", x=found.features[row].astype(np.float32), b=found.boxes[row])
    rng = np.random.default_rng(1)
    rows = lambda count: rng.integers(0, count, 16)

    def peer():
        loaded = [np.load(files / f"{row}.npz") for row in rows(min(items, 400))]
        return torch.from_numpy(np.stack([f["x"] for f in loaded])), torch.from_numpy(np.stack([f["b"] for f in loaded]))

    ours, theirs, step = alternate(lambda: found.batch(rows(items)), peer, training_step(16, 36 + regions + 1), rounds=4 * ROUNDS)
    size = f"16 items x {regions + 1} x {dim}"
    line(f"reading a batch of {size}, seconds; peer: one float32 .npz an item", ours, theirs, "faster", ours < theirs)
    line("the same; peer: one transformer layer, forward and backward, of a model that has 14", ours, step,
         "under a tenth of 14 layers", ours < 1.4 * step)


def bench_detector(folder: Path) -> None:
    "Training on the shelf, cut-outs and validation included; then extraction with the trained detector."
    from product_retrieval.capture.detector import train_detector
    from product_retrieval.capture.regions import DetectorProposals, GridProposals, extract_regions
    from product_retrieval.data.shelf import load_shelf
    from product_retrieval.encoders import load_encoder

    shelf = load_shelf("tiny" if QUICK else "small")
    recipe = Path(__file__).resolve().parents[1] / "recipes" / f"{'tiny' if QUICK else 'shelf'}-detector.toml"
    start = time.perf_counter()
    detector = train_detector(shelf, recipe, folder / "run")
    seconds = time.perf_counter() - start
    line("training the detector on the shelf, seconds", seconds, None, "< 240 s", seconds < 240, steps=detector.history.steps)
    part = shelf.split("train")
    proposals, crops = DetectorProposals(detector), load_encoder("resnet10t", "random", size=64)
    jobs = {"detector features": (proposals, detector), "crops through resnet10t at 64 px": (proposals, crops),
            "grid cells through resnet10t at 64 px": (GridProposals(2, 2), crops)}
    for name, (proposer, encoder) in jobs.items():
        start = time.perf_counter()
        extract_regions(part, proposer, encoder, folder / name.split()[0])
        rate = len(part) / (time.perf_counter() - start)
        line(f"extracting regions, {name}, pictures a second", rate, None, "reported", True, pictures=len(part))


def bench_full_size(folder: Path) -> None:
    "Product1M's set-up with random weights, on which speed does not depend: steps of the detector, then extraction."
    from dataclasses import replace

    from product_retrieval.capture.detector import Detector, DetectorRecipe, cut_products, pasted_pictures
    from product_retrieval.capture.regions import DetectorProposals, GridProposals, extract_regions
    from product_retrieval.core import recipe_path
    from product_retrieval.data.shelf import load_shelf
    from product_retrieval.encoders import load_encoder
    from product_retrieval.training import load_recipe

    shelf = load_shelf("tiny")
    recipe = load_recipe(recipe_path("product1m-detector"), DetectorRecipe)
    recipe = replace(recipe, detector=replace(recipe.detector, weights="random"), cut_outs=40, pictures=16, batch_size=4)
    detector = Detector(recipe.detector).train()
    batches, _ = pasted_pictures(cut_products(shelf, 40, 200), recipe)
    start = time.perf_counter()
    for batch in list(batches)[: 1 if QUICK else 4]:
        sum(detector(batch).values()).backward()
    seconds = (time.perf_counter() - start) / (4 if QUICK else 16)
    line("training Product1M's detector, seconds a picture", seconds, None, "reported", True)
    part = shelf.split("train").select(range(4 if QUICK else 8))
    encoder = load_encoder("resnet50", "random")
    jobs = {"36 regions": (DetectorProposals(detector.eval(), 0.0, 1.0), 36), "whole picture": (GridProposals(), 0)}
    for name, (proposer, limit) in jobs.items():
        start = time.perf_counter()
        found = extract_regions(part, proposer, encoder, folder / name, limit)
        rate = len(part) / (time.perf_counter() - start)
        regions = float(found.mask[:, 1:].sum(1).mean()) if limit else 0.0
        line(f"extracting with Product1M's parts, {name}, pictures a second", rate, bar="reported", regions=round(regions, 1))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        bench_reading(Path(name))
        bench_detector(Path(name))
        bench_full_size(Path(name))


if __name__ == "__main__":
    main()
