"""One training step (forward and backward) of CAPTURE beside a plain fp32 implementation. Prints one JSON line a figure.

The peer computes the same three losses with the same weights, written as such code is usually written first: attention
weights stored, the vocabulary head on every token, LayerNorm, GELU and dropout by hand, three matrices for queries, keys and
values. Ours and the peer run alternately in one process; medians. `--quick` runs the small preset. With a CUDA device, the
last lines are bf16 and torch.compile there.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from common import QUICK, ROUNDS, alternate, line
from torch import nn
from torch.nn import functional

from product_retrieval.capture.model import CaptureBatch, CaptureModel, by_length, capture_config, count_flops
from product_retrieval.training import use_bf16

TEMPERATURE = 0.07


def random_batch(config, items: int, lengths=None, rows=None, device="cpu") -> tuple[CaptureBatch, dict]:
    "A batch of random items, and what is masked: 15 % of the words and of the regions."
    generator = torch.Generator().manual_seed(0)
    words = torch.full((items,), config.tokens) if lengths is None else lengths
    places = torch.full((items,), config.regions) if rows is None else rows
    mask, keep = torch.arange(config.tokens) < words[:, None], torch.arange(config.regions) < places[:, None]
    tokens = torch.randint(5, config.vocabulary, mask.shape, generator=generator) * mask
    regions = torch.randn(items, config.regions, config.region_dim, generator=generator)
    boxes = torch.rand(items, config.regions, 5, generator=generator)
    hidden = (torch.rand(mask.shape, generator=generator) < 0.15) & mask
    gone = (torch.rand(keep.shape, generator=generator) < 0.15) & keep
    gone[:, 0] = False
    tensors = [x.to(device) for x in (tokens, mask, regions, boxes, keep, torch.arange(items))]
    targets = {"words": tokens.masked_fill(~hidden, -100).to(device), "gone": gone.to(device), "regions": regions.to(device)}
    return CaptureBatch(*tensors, [str(i) for i in range(items)]), targets


def nt_xent(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    both = functional.normalize(torch.cat([text, image]).float(), dim=-1)
    scores = (both @ both.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    return functional.cross_entropy(scores, torch.arange(len(both), device=both.device).roll(len(text)))


def ours(model: CaptureModel, batch: CaptureBatch, targets: dict, autocast=nullcontext) -> torch.Tensor:
    "The sum of the three losses; heads only at masked places."
    width, rows = batch.tokens.shape[1], batch.regions.shape[1]
    words, gone = targets["words"][:, :width], targets["gone"][:, :rows]
    asked = words >= 0
    with autocast():
        out = model(**batch.inputs())
        guesses, found = model.token_logits(out.fused_text[asked]), model.region_predictions(out.fused_image[gone])
    language = functional.cross_entropy(guesses.float(), words[asked])
    region = functional.mse_loss(found.float(), targets["regions"][:, :rows][gone])
    return language + region + nt_xent(out.text_projection, out.image_projection)


class Plain(nn.Module):
    "The peer: the release's parameters under their own names, every step spelled out, fp32."

    def __init__(self, model: CaptureModel):
        super().__init__()
        self.config, self.rate = model.config, model.config.dropout
        given = {name: tensor for name, tensor in model.to_official().items() if name != "cls.predictions.decoder.weight"}
        self.names = {name: name.replace(".", "_") for name in given}
        for name, tensor in given.items():
            self.register_parameter(self.names[name], nn.Parameter(tensor.clone()))

    def at(self, name: str) -> torch.Tensor:
        return getattr(self, self.names[name])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.at(f"{name}.weight").T + self.at(f"{name}.bias")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.at(f"{name}.weight") * (x - mean) / torch.sqrt(spread + 1e-12) + self.at(f"{name}.bias")

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand_like(x) >= self.rate) / (1 - self.rate) if self.rate else x

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))

    def attend(self, q, k, v, mask, heads: int, dropout: bool = True) -> torch.Tensor:
        split = lambda x: x.view(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)
        scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads) + mask
        weights = torch.softmax(scores, -1)
        mixed = (self.drop(weights) if dropout else weights) @ split(v)
        return mixed.permute(0, 2, 1, 3).contiguous().view(*q.shape[:2], -1)

    def feed(self, x, up: str, down: str) -> torch.Tensor:
        inner = self.drop(self.linear(self.gelu(self.linear(x, f"{up}.dense")), f"{down}.dense"))
        return self.norm(inner + x, f"{down}.LayerNorm")

    def layer(self, x, name: str, mask, heads: int) -> torch.Tensor:
        q, k, v = (self.linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        out = self.drop(self.linear(self.attend(q, k, v, mask, heads), f"{name}.attention.output.dense"))
        x = self.norm(out + x, f"{name}.attention.output.LayerNorm")
        return self.feed(x, f"{name}.intermediate", f"{name}.output")

    def co(self, text, image, name: str, words, places) -> tuple:
        parts = [self.linear(image, f"{name}.biattention.{part}1") for part in ("query", "key", "value")]
        parts += [self.linear(text, f"{name}.biattention.{part}2") for part in ("query", "key", "value")]
        heads = self.config.co_heads
        to_text, to_image = self.attend(parts[3], *parts[1:3], places, heads), self.attend(parts[0], *parts[4:], words, heads)
        image = self.norm(self.drop(self.linear(to_image, f"{name}.biOutput.dense1")) + image, f"{name}.biOutput.LayerNorm1")
        text = self.norm(self.drop(self.linear(to_text, f"{name}.biOutput.dense2")) + text, f"{name}.biOutput.LayerNorm2")
        image = self.feed(image, f"{name}.v_intermediate", f"{name}.v_output")
        return self.feed(text, f"{name}.t_intermediate", f"{name}.t_output"), image

    def block(self, x, name: str, mask) -> torch.Tensor:
        y = self.norm(x, f"{name}.ln_1") @ self.at(f"{name}.attn.in_proj_weight").T + self.at(f"{name}.attn.in_proj_bias")
        x = x + self.linear(self.attend(*y.chunk(3, -1), mask, self.config.fused_heads, False), f"{name}.attn.out_proj")
        y = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        return x + self.linear(y * torch.sigmoid(1.702 * y), f"{name}.mlp.c_proj")

    def head(self, x, letter: str, name: str) -> torch.Tensor:
        inner = self.gelu(self.linear(self.linear(x, f"cls.{letter}_fc"), f"cls.{name}.transform.dense"))
        return self.norm(inner, f"cls.{name}.transform.LayerNorm")

    def forward(self, batch: CaptureBatch) -> tuple:
        c, e, fused = self.config, "bert.embeddings", "bert.cross_encoder"
        words, places = ((1 - m[:, None, None].float()) * -10000.0 for m in (batch.token_mask, batch.region_mask))
        text = self.at(f"{e}.word_embeddings.weight")[batch.tokens] + self.at(f"{e}.position_embeddings.weight")[: c.tokens]
        text = text + self.at(f"{e}.token_type_embeddings.weight")[torch.zeros_like(batch.tokens)]
        text = self.drop(self.norm(text, f"{e}.LayerNorm"))
        image = self.linear(batch.regions, "bert.v_embeddings.image_embeddings")
        image = image + self.linear(batch.boxes, "bert.v_embeddings.image_location_embeddings")
        image = self.drop(self.norm(image, "bert.v_embeddings.LayerNorm"))
        for i in range(c.text_layers):
            text = self.layer(text, f"bert.encoder.layer.{i}", words, c.text_heads)
        for i in range(c.visual_layers):
            image = self.layer(image, f"bert.encoder.v_layer.{i}", places, c.visual_heads)
        alone = [torch.relu(self.linear(x[:, 0], f"bert.encoder.{n}_pooler.dense")) for x, n in ((text, "t"), (image, "v"))]
        for i in range(c.co_layers):
            text, image = self.co(text, image, f"bert.encoder.c_layer.{i}", words, places)
        x = torch.cat([text, image], 1)
        x = self.drop(x + self.at(f"{fused}.embeddings.position_embeddings.weight")[: x.shape[1]])
        for i in range(c.fused_layers):
            x = self.block(x, f"{fused}.transformer.resblocks.{i}", torch.cat([words, places], -1))
        text = torch.relu(self.linear(x[:, : c.tokens], "bert.t_fc.dense"))
        image = torch.relu(self.linear(x[:, c.tokens :], "bert.v_fc.dense"))
        logits = self.head(text, "t", "predictions") @ self.at(f"{e}.word_embeddings.weight").T + self.at("cls.predictions.bias")
        return *alone, logits, self.linear(self.head(image, "v", "imagePredictions"), "cls.imagePredictions.decoder")

    def loss(self, batch: CaptureBatch, targets: dict) -> torch.Tensor:
        text, image, logits, found = self(batch)
        language = functional.cross_entropy(logits.flatten(0, 1), targets["words"].flatten())
        errors = (found - targets["regions"]).pow(2) * targets["gone"][:, :, None]
        region = errors.sum() / (targets["gone"].sum() * found.shape[2])
        return language + region + nt_xent(text, image)


def step(module: nn.Module, loss: Callable) -> Callable:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()

    return run


def matmul_peak(dtype: torch.dtype, device: str = "cpu", size: int = 0) -> float:
    "GFLOP per second of a large matrix product."
    size = size or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    (seconds,) = alternate(lambda: (a @ b, wait()), rounds=7)
    return 2 * size**3 / seconds / 1e9


def same_loss(model: CaptureModel, peer: Plain, batch: CaptureBatch, targets: dict) -> None:
    "Both compute the same number when nothing is dropped."
    rate, peer.rate = peer.rate, 0.0
    with torch.no_grad():
        here, there = float(ours(model.eval(), batch, targets)), float(peer.loss(batch, targets))
    peer.rate = rate
    model.train()
    assert abs(here - there) < 1e-3 * abs(there), (here, there)


def bench_cpu() -> None:
    config = capture_config("small" if QUICK else "released")
    torch.manual_seed(0)
    model = CaptureModel(config).train()
    peer, items = Plain(model), 16
    batch, targets = random_batch(config, items)
    same_loss(model, peer, batch, targets)
    bf16 = lambda: torch.autocast("cpu", torch.bfloat16)
    jobs = {"fp32": (torch.float32, 1.3, step(model, lambda: ours(model, batch, targets)))}
    if use_bf16("auto", "cpu"):
        jobs["bf16"] = (torch.bfloat16, 3.0, step(model, lambda: ours(model, batch, targets, bf16)))
    asked = int((targets["words"] >= 0).sum()) / items
    work = 3 * count_flops(config, asked=round(asked)) / 1e9
    plain = step(peer, lambda: peer.loss(batch, targets))
    slow, *fast = alternate(plain, *(job for *_, job in jobs.values()), rounds=min(3, ROUNDS))  # plain steps are slow
    what = f"training step of {'small' if QUICK else 'released'}, batch {items}, {config.tokens} tokens, {config.regions} regions"
    for (name, (dtype, bar, _)), seconds in zip(jobs.items(), fast, strict=True):
        share = work * items / seconds / matmul_peak(dtype)
        more = {"GFLOP a sample": round(work, 2), "share of matmul peak": round(share, 3)}
        more["samples a second"] = round(items / seconds, 3)
        line(f"{what}, {name}, seconds; peer: plain fp32", seconds, slow, f">= {bar}x", slow / seconds >= bar, **more)
    if "bf16" not in jobs:
        print(json.dumps({"figure": f"{what}, bf16", "skipped": "this processor multiplies no matrices in bf16"}))


def bench_lengths() -> None:
    "Items of mixed length: some batches padded to the limits, and as many batches of an order by length, trimmed."
    half = {"text_layers": 2, "visual_layers": 2, "co_layers": 2, "fused_layers": 3}  # of released, to save time
    config = capture_config("small") if QUICK else capture_config("released", **half)
    torch.manual_seed(0)
    model, items, size, timed = CaptureModel(config).train(), 1024, 16, 8
    words, places = torch.randint(6, config.tokens + 1, (items,)), torch.randint(2, config.regions + 1, (items,))
    order = by_length(torch.stack([words, places], 1).numpy(), size)
    similar = torch.from_numpy(order).split(size)[:timed]

    def some(rows: torch.Tensor, trim: bool) -> Callable:
        batch, targets = random_batch(config, size, words[rows], places[rows])
        return step(model, lambda: ours(model, batch.trimmed() if trim else batch, targets))

    padded, trimmed = ([some(rows, trim) for rows in similar] for trim in (False, True))
    run = lambda steps: lambda: [one() for one in steps]
    slow, fast = alternate(run(padded), run(trimmed), rounds=min(3, ROUNDS))
    rows = torch.cat(similar)
    needed = count_flops(config, round(float(words[rows].float().mean())), round(float(places[rows].float().mean())))
    more = {"tokens": f"6 to {config.tokens}", "regions": f"2 to {config.regions}"}
    more["work without padding"] = round(needed / count_flops(config), 3)
    line("variable lengths, batches by length and trimmed, seconds; peer: padded to the limits", fast, slow, "< 0.85 of the peer",
         fast / slow < 0.85, **more)


def bench_cuda() -> None:
    "bf16 and torch.compile on a GPU."
    config, items, device = capture_config("released", text_positions=512), 64 if QUICK else 512, "cuda"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = CaptureModel(config).to(device).train()
    batch, targets = random_batch(config, items, device=device)
    asked = targets["words"] >= 0
    width = asked.sum()
    compiled = torch.compile(model)
    low = lambda: torch.autocast("cuda", torch.bfloat16)

    def loss() -> torch.Tensor:
        with low():
            out = compiled(**batch.inputs())
            guesses = model.token_logits(out.fused_text[asked])
            found = model.region_predictions(out.fused_image[targets["gone"]])
        language = functional.cross_entropy(guesses.float(), targets["words"][asked])
        region = functional.mse_loss(found.float(), targets["regions"][targets["gone"]])
        return language + region + nt_xent(out.text_projection, out.image_projection)

    run = step(model, loss)
    for _ in range(3):
        run()
    torch.cuda.reset_peak_memory_stats()
    (seconds,) = alternate(lambda: (run(), torch.cuda.synchronize()), rounds=10)
    work = 3 * count_flops(config, asked=round(int(width) / items)) / 1e9
    share = work * items / seconds / matmul_peak(torch.bfloat16, device)
    memory = torch.cuda.max_memory_allocated() / 1e9
    more = {"samples a second": round(items / seconds, 1), "memory GB": round(memory, 2), "GPU": torch.cuda.get_device_name()}
    figure = f"training step of released, batch {items}, bf16 and compile: share of matmul peak"
    line(figure, share, None, ">= 0.4", share >= 0.4, **more)


if __name__ == "__main__":
    bench_cpu()
    bench_lengths()
    if torch.cuda.is_available():
        bench_cuda()
