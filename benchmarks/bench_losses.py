"""Memory of gradient caching at a batch of 4,096 against a micro-batch of 64; speed of the losses against two libraries.

Prints one JSON line a figure. Ours and the peer run alternately in one process, forward and backward; medians. Memory is
the peak that Linux saw, in a process of its own, beyond what was held before. `--quick` runs tiny.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import QUICK, alternate, line
from torch.nn import functional


def capture_batch(config, count: int):
    "Random items of the model's full size."
    from product_retrieval.capture.model import CaptureBatch

    torch.manual_seed(0)
    tokens, regions = torch.randint(5, config.vocabulary, (count, config.tokens)), (count, config.regions)
    features, boxes = torch.randn(*regions, config.region_dim), torch.rand(*regions, 5)
    masks = torch.ones_like(tokens).bool(), torch.ones(regions).bool()
    names = [f"item{i}" for i in range(count)]
    return CaptureBatch(tokens, masks[0], features, boxes, masks[1], torch.arange(count), names)


def kilobytes(name: str) -> int:
    "VmRSS (now) or VmHWM (peak) of this process, as Linux tells it."
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(name))


def pretrain_once(kind: str, count: int, chunk: int) -> None:
    "One forward and backward pass of CAPTURE's three losses; prints the peak beyond the start in kilobytes."
    from product_retrieval.capture.model import CaptureModel, capture_config
    from product_retrieval.capture.objectives import CaptureObjective, ObjectiveConfig, TokenTable

    config = capture_config("tiny" if QUICK else "small")
    torch.manual_seed(0)
    model = CaptureModel(config)
    objective = CaptureObjective(TokenTable(config.vocabulary, 4, (0, 1, 2, 3)), ObjectiveConfig(kind=kind, chunk=chunk))
    objective(model, capture_batch(config, 2))["loss"].backward()
    batch = capture_batch(config, count)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    objective(model, batch)["loss"].backward()
    print(kilobytes("VmHWM") - before)


def peers() -> dict:
    "The same losses of other libraries, by name."
    from open_clip.loss import ClipLoss, SigLipLoss
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    unit, twice = functional.normalize, lambda a: torch.arange(len(a)).repeat(2)
    return {
        "open_clip's ClipLoss": lambda a, b: ClipLoss()(unit(a), unit(b), 1 / 0.07),
        "open_clip's SigLipLoss": lambda a, b: SigLipLoss()(unit(a), unit(b), 10.0, -10.0),
        "pytorch-metric-learning's NTXentLoss": lambda a, b: NTXentLoss(0.07)(torch.cat([a, b]), twice(a)),
        # the same number when no product comes twice
        "pytorch-metric-learning's SupConLoss": lambda a, b: SupConLoss(0.07)(torch.cat([a, b]), twice(a)),
    }


def loss_once(name: str, count: int, dim: int) -> None:
    "A loss alone, ours or a peer's, forward and backward; prints the peak beyond the start in kilobytes."
    from product_retrieval.losses import KINDS, Contrastive

    match = Contrastive(name) if name in KINDS else peers()[name]
    a, b = (torch.randn(count, dim, requires_grad=True) for _ in range(2))
    match(a[:4], b[:4]).backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    match(a, b).backward()
    print(kilobytes("VmHWM") - before)


def in_own_process(*arguments) -> float:
    "Megabytes that a function of this file prints; freed memory goes back to the system at once."
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *map(str, arguments), *(["--quick"] if QUICK else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def bench_memory() -> None:
    "Pretraining with `chunk` against a plain micro-batch of that size, and the losses alone."
    if not Path("/proc/self/clear_refs").exists():
        return print(json.dumps({"figure": "memory", "skipped": "needs Linux"}))
    large, small = (256, 16) if QUICK else (4096, 64)
    name = "tiny" if QUICK else "small"
    peer = in_own_process("pretrain", "nt-xent", small, 0)
    for kind in ("nt-xent", "info-nce", "sigmoid"):
        ours = in_own_process("pretrain", kind, large, small)
        what = f"peak MB of a step of CAPTURE {name}, {kind}, batch {large} by gradient caching; peer: plain batch of {small}"
        line(what, ours, peer, "<= 1.2x the peer", ours <= 1.2 * peer)
    names = {
        "nt-xent": "pytorch-metric-learning's SupConLoss",
        "info-nce": "open_clip's ClipLoss",
        "sigmoid": "open_clip's SigLipLoss",
    }
    for kind, name in names.items():
        count = large // 2 if kind == "nt-xent" else large  # its table has twice the rows and columns
        ours, peer = (in_own_process("loss", which, count, 512) for which in (kind, name))
        what = f"peak MB of {kind} alone, {count} x 512, forward and backward; peer: {name}"
        line(what, ours, peer, "below the peer", QUICK or ours < peer)


def bench_speed() -> None:
    "Loss and gradient of two matrices of vectors."
    from product_retrieval.losses import info_nce, nt_xent, sigmoid_loss

    jobs = [
        ("info-nce", "open_clip's ClipLoss", info_nce, (256, 4096)),
        ("sigmoid", "open_clip's SigLipLoss", sigmoid_loss, (256, 4096)),
    ]
    jobs += [("nt-xent", "pytorch-metric-learning's NTXentLoss", nt_xent, (256,))]  # 34 GB at 1,024
    jobs += [("nt-xent", "pytorch-metric-learning's SupConLoss", nt_xent, (256, 2048))]
    for kind, name, ours, counts in jobs:
        peer = peers()[name]
        for count in (64,) if QUICK else counts:
            a, b = (torch.randn(count, 512, requires_grad=True) for _ in range(2))
            both = [lambda f=f, a=a, b=b: torch.autograd.grad(f(a, b), (a, b)) for f in (ours, peer)]
            for mine, theirs in zip(*(job() for job in both), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
            seconds = alternate(*both)
            what = f"{kind}, {count} x 512, loss and gradient; peer: {name}, seconds"
            line(what, *seconds, "not slower than the peer", seconds[0] <= 1.05 * seconds[1])


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in ("pretrain", "loss"):
        (pretrain_once if sys.argv[1] == "pretrain" else loss_once)(sys.argv[2], *map(int, sys.argv[3:5]))
    else:
        bench_memory()
        bench_speed()
