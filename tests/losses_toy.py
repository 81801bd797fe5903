"Contrastive losses under DDP, on batches of unequal size. Run by `torchrun`; test_losses.py compares with one process."

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from product_retrieval.losses import Contrastive, cached

ITEMS = 23  # shared out unevenly
SAME = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 8, 9, 10, 11, 0, 12, 13, -1, -1, 14, 15, 16, 1])
CASES = {
    "nt-xent": ("nt-xent", None, "ignore", 0),
    "nt-xent-cached": ("nt-xent", None, "ignore", 3),
    "nt-xent-ignore": ("nt-xent", "ids", "ignore", 3),
    "nt-xent-positive": ("nt-xent", "ids", "positive", 0),
    "info-nce-matrix": ("info-nce", "matrix", "ignore", 0),
    "info-nce": ("info-nce", None, "ignore", 4),
    "sigmoid-positive": ("sigmoid", "ids", "positive", 4),
}


class Task(nn.Module):
    "Two towers and a learned temperature, in one module as the training loop has it."

    def __init__(self, kind: str, mode: str, chunk: int):
        super().__init__()
        torch.manual_seed(0)
        tower = lambda: nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8))
        self.text, self.image, self.match, self.chunk = tower(), tower(), Contrastive(kind, learn=True, mode=mode), chunk

    def forward(self, batch, same):
        encode = lambda part: (self.text(part[0]), self.image(part[1]))
        return self.match(*(cached(encode, batch, self.chunk) if self.chunk else encode(batch)), same)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(ITEMS, 10), torch.randn(ITEMS, 10)


def same_for(form: str | None, rows: slice) -> torch.Tensor | None:
    matrix = (SAME[:, None] == SAME) & (SAME >= 0)
    return {None: None, "ids": SAME[rows], "matrix": matrix[rows]}[form]


def alone(name: str):
    "Loss and gradients of one process with the whole batch."
    kind, form, mode, _ = CASES[name]
    task = Task(kind, mode, 0)
    loss = task(data(), same_for(form, slice(None)))
    return loss, torch.autograd.grad(loss, list(task.parameters()))


def together(name: str, rank: int, processes: int):
    "The same, each process with its share; a share counts by its items, as in the training loop."
    kind, form, mode, chunk = CASES[name]
    task = Task(kind, mode, chunk)
    parallel = DistributedDataParallel(task)
    rows = slice(ITEMS * rank // processes, ITEMS * (rank + 1) // processes)
    share = (rows.stop - rows.start) * processes / ITEMS
    loss = parallel(tuple(x[rows] for x in data()), same_for(form, rows)) * share
    loss.backward()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean / processes, [p.grad for p in task.parameters()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in CASES:
        loss, grads = together(name, rank, processes)
        if rank == 0:
            torch.save({"loss": float(loss), "gradients": grads}, Path(sys.argv[1]) / f"{name}.pt")
    torch.distributed.destroy_process_group()
