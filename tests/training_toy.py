"A training run small enough to be killed twenty times: the tiny shelf, one convolution. Also a script for `torchrun`."

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

from product_retrieval.data.pictures import PictureLoader, picture_transform
from product_retrieval.data.shelf import load_shelf
from product_retrieval.evaluation import positives_from_labels
from product_retrieval.training import TrainConfig, fit, retrieval_validation


def in_child(work, *arguments) -> int:
    "Do `work` in a forked process that already has everything imported; its exit status."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        work(*arguments)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


class Classes(nn.Module):
    "Softmax over the coarse categories with weights and a queue of its own, as the losses of later chapters have them."

    def __init__(self, names: list[str], dim: int):
        super().__init__()
        self.numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        self.weight = nn.Parameter(torch.randn(len(self.numbers), dim) * 0.1)
        self.register_buffer("queue", torch.zeros(16, dim))
        self.category: dict[str, str] = {}

    def forward(self, model, batch):
        vectors = model(batch.pixels)
        target = torch.tensor([self.numbers[self.category[item]] for item in batch.item_ids])
        if self.training:
            with torch.no_grad():
                self.queue.copy_(torch.cat([vectors.detach(), self.queue])[: len(self.queue)])
        loss = nn.functional.cross_entropy(vectors @ self.weight.T, target)
        spread = vectors.std()
        return {"loss": loss, "spread": spread}


def parts(dropout: float = 0.2, batch_size: int = 10):
    "Model, objective, batches and validation of the toy run. GroupNorm, because BatchNorm sees a process's share only."
    torch.manual_seed(0)
    shop = load_shelf("tiny", seed=0)
    catalog = shop.split("train")
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(dropout),
                          nn.Flatten(), nn.Linear(8 * 7 * 7, 16))
    objective = Classes(catalog.categories(), 16)
    objective.category = dict(zip(catalog.ids, catalog.categories(), strict=True))
    batches = PictureLoader(catalog, picture_transform(32, train=True), batch_size=batch_size, shuffle=True, seed=1, workers=0)
    sides = [PictureLoader(shop.split(s), picture_transform(32), workers=0) for s in ("val_query", "val_gallery")]
    positives = positives_from_labels(shop.split("val_query").labels, shop.split("val_gallery").labels)
    return model, objective, batches, retrieval_validation(*sides, positives, metrics=("MAR@10", "mAP@10"))


def config(**changes) -> TrainConfig:
    "Four epochs of three steps, with everything switched on."
    settings = {"epochs": 4, "learning_rate": 0.01, "accumulate": 2, "ema": 0.8, "validate_every": 2, "checkpoint_every": 1,
                "device": "cpu", "precision": "fp32", "tensorboard": False, "rates": {"objective": 2.0}}
    return TrainConfig(**{**settings, **changes})


def without_dropout(folder: Path):
    "No dropout, which each process draws for itself; 52 pictures in batches of 17, so that one process has nothing of the last."
    model, objective, batches, validate = parts(dropout=0.0, batch_size=17)
    return fit(model, objective, batches, config(epochs=6), folder, validate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_dropout(Path(sys.argv[1]))
