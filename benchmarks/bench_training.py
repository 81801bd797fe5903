"What the training loop costs beside a plain loop, and what bf16 gives on this machine. Prints one JSON line per figure."

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from product_retrieval.data.pictures import PictureLoader, picture_transform
from product_retrieval.data.shelf import load_shelf
from product_retrieval.evaluation import positives_from_labels
from product_retrieval.training import MemoryBatches, Task, TrainConfig, fit, retrieval_validation, use_bf16

QUICK = "--quick" in sys.argv[1:]
ROUNDS = 2 if QUICK else 5


def report(figure: str, ours: float, peer: float, bar: float | None, larger_is_better: bool = True) -> None:
    "One line; the ratio is ours to peer."
    ratio = ours / peer
    met = bar is None or (ratio >= bar if larger_is_better else ratio <= bar)
    numbers = {"ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ratio, 3), "bar": bar, "met": met}
    print(json.dumps({"figure": figure, **numbers, "hardware": hardware()}), flush=True)


def hardware() -> str:
    "Processor, threads, and what it has for bf16."
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found = [name for name in ("amx_bf16", "avx512_bf16") if known.get(name)]
    return ", ".join([f"{platform.machine()} CPU", f"{torch.get_num_threads()} threads", *found])


def network() -> nn.Module:
    "The small network of chapter 5a."
    torch.manual_seed(0)

    def block(channels: int, more: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, more, 3, stride=2, padding=1), nn.GroupNorm(4, more), nn.ReLU())

    return nn.Sequential(block(3, 16), block(16, 32), block(32, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64))


class Directions(nn.Module):
    "Softmax over cosines."

    def __init__(self, classes: int, seed: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 64))

    def forward(self, model: nn.Module, batch: tuple) -> torch.Tensor:
        vectors = nn.functional.normalize(model(batch[0]).float())
        return nn.functional.cross_entropy(16 * vectors @ nn.functional.normalize(self.weight).T, batch[1])


def plain_loop(model: nn.Module, objective: nn.Module, batches: MemoryBatches, epochs: int) -> None:
    "The naive loop of chapter 5a."
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=0.003)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            loss = objective(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()


def loop_overhead() -> None:
    "Seconds a step of `fit` (log, clipping, groups, one checkpoint an epoch) beside the plain loop, alternately in one run."
    torch.manual_seed(0)
    count = 256 if QUICK else 1024
    pixels, targets = torch.randn(count, 3, 64, 64), torch.randint(0, 24, (count,))
    batches, epochs = MemoryBatches(pixels, targets, batch_size=64), 2
    config = TrainConfig(epochs=epochs, precision="fp32", device="cpu", tensorboard=False)
    times: dict[str, list[float]] = {"fit": [], "plain": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            fit(network(), Directions(24), batches, config, folder)
            times["fit"].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain_loop(network(), Directions(24), batches, epochs)
        times["plain"].append(time.perf_counter() - start)
    steps = epochs * len(batches)
    ours, peer = (statistics.median(times[name]) / steps for name in ("fit", "plain"))
    report("training: seconds a step, fit / plain loop", ours, peer, None if QUICK else 1.10, larger_is_better=False)


def bf16_speed(name: str, size: int, channels_last: bool) -> None:
    "Steps a second in bf16 and in fp32, alternately."
    import timm

    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name, num_classes=0).to(memory_format=layout)
    pixels = torch.randn(4 if QUICK else 16, 3, size, size).to(memory_format=layout)
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(ROUNDS + 1):
        for bf16 in times:
            task = Task(model, lambda model, batch: model(batch).float().pow(2).mean(), bf16)
            start = time.perf_counter()
            task(pixels)["loss"].backward()
            if round_:
                times[bf16].append(time.perf_counter() - start)
    ours, peer = (1 / statistics.median(times[bf16]) for bf16 in (True, False))
    bar = 1.0 if use_bf16("auto", "cpu") and not QUICK else None
    report(f"training: steps a second in bf16 / fp32, {name} {size} px{' channels last' * channels_last}", ours, peer, bar)


def bf16_quality() -> None:
    "Validation MAR@10 on the shelf after training in bf16 and in fp32: mean of three seeds."
    shop = load_shelf("tiny" if QUICK else "small")
    train = shop.split("train")
    train = train.select([category != "" for category in train.categories()])
    names = sorted(set(train.categories()))

    def pixels(catalog) -> torch.Tensor:
        return torch.cat([batch.pixels for batch in PictureLoader(catalog, picture_transform(48), workers=0)])

    seen, targets = pixels(train), torch.tensor([names.index(category) for category in train.categories()])
    sides = [shop.split(name) for name in ("val_query", "val_gallery")]
    positives = positives_from_labels(sides[0].labels, sides[1].labels)
    validate = retrieval_validation([(pixels(sides[0]),)], [(pixels(sides[1]),)], positives)
    found: dict[str, list[float]] = {"bf16": [], "fp32": []}
    for seed in range(1 if QUICK else 3):
        for precision, values in found.items():
            config = TrainConfig(epochs=1 if QUICK else 12, learning_rate=0.01, ema=0.9, precision=precision, device="cpu",
                                 seed=seed, tensorboard=False)
            with tempfile.TemporaryDirectory() as folder:
                batches = MemoryBatches(seen, targets, batch_size=64, seed=seed)
                history = fit(network(), Directions(len(names), seed), batches, config, folder, validate)
                values.append(float(history.validation["MAR@10"].iloc[-1]))
    ours, peer = (statistics.mean(found[precision]) for precision in ("bf16", "fp32"))
    report("training: validation MAR@10 after bf16 / after fp32", ours, peer, None if QUICK else 0.95)


def checkpoint_seconds() -> None:
    "Seconds of one checkpoint of a ResNet-50 with AdamW and EMA, beside torch.save of the same tensors (which is not atomic)."
    import timm

    from product_retrieval.training import groups_from, new_run, optimizer_tensors, save_checkpoint, train_step

    model, batch = timm.create_model("resnet18" if QUICK else "resnet50", num_classes=0), [(torch.randn(2, 3, 64, 64),)]
    times: dict[str, list[float]] = {"ours": [], "torch.save": []}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(ema=0.9, device="cpu", precision="fp32", max_steps=ROUNDS + 1)
        run = new_run(model, lambda model, batch: model(batch[0]).pow(2).mean(), batch, config, Path(folder))
        for group in groups_from(run, batch):
            train_step(run, group)
            start = time.perf_counter()
            save_checkpoint(run)
            times["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            torch.save([run.task.state_dict(), run.average.state_dict(), optimizer_tensors(run)], Path(folder) / "peer.pt")
            with open(Path(folder) / "peer.pt", "rb") as file:
                os.fsync(file.fileno())
            times["torch.save"].append(time.perf_counter() - start)
    ours, peer = (statistics.median(times[name]) for name in ("ours", "torch.save"))
    bar = None if QUICK else 1.5
    report("training: seconds a checkpoint, ours / torch.save and fsync", ours, peer, bar, larger_is_better=False)


if __name__ == "__main__":
    torch.set_num_threads(1 if QUICK else (os.cpu_count() or 1))
    loop_overhead()
    for name, size in (("resnet18", 128), ("mobilenetv2_100", 128), ("vit_tiny_patch16_224", 224)):
        for channels_last in (False, True):
            if not QUICK or (name == "resnet18" and not channels_last):
                bf16_speed(name, size, channels_last)
    bf16_quality()
    checkpoint_seconds()
