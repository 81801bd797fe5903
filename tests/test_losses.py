"""Contrastive losses against three libraries and the release, blocks, gradient caching, several processes, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import losses_toy
import pytest
import torch
from torch import nn
from torch.nn import functional

import product_retrieval.losses as losses
from product_retrieval.core import InputError, read_json
from product_retrieval.losses import KINDS, MODES, Contrastive, LogitScale, cached, gather_with_gradient
from product_retrieval.losses import info_nce, nt_xent, sigmoid_loss

FUNCTIONS = [nt_xent, info_nce, sigmoid_loss]


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(items: int = 9, dim: int = 6, seed: int = 0, dtype=torch.float64):
    torch.manual_seed(seed)
    return tuple(torch.randn(items, dim, dtype=dtype, requires_grad=True) for _ in range(2))


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def equal(ours, theirs, *inputs):
    "Same value, same gradients."
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


# ---- against the libraries


def test_nt_xent_is_pytorch_metric_learnings():
    from pytorch_metric_learning.losses import NTXentLoss

    a, b = pair()
    labels = torch.arange(len(a)).repeat(2)
    equal(nt_xent(a, b, 0.2), NTXentLoss(0.2)(torch.cat([a, b]), labels), a, b)


def test_positive_groups_are_supcon():
    from pytorch_metric_learning.losses import SupConLoss

    a, b = pair()
    groups = torch.tensor([3, 1, 3, 0, 2, 1, 3, 4, 5])
    equal(nt_xent(a, b, 0.2, groups, "positive"), SupConLoss(0.2)(torch.cat([a, b]), groups.repeat(2)), a, b)


def test_info_nce_is_open_clips_and_transformers():
    from open_clip.loss import ClipLoss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    a, b = pair()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    unit = functional.normalize
    equal(info_nce(a, b, scale), ClipLoss()(unit(a), unit(b), scale), a, b, scale)
    equal(info_nce(a, b, scale), image_text_contrastive_loss(scale * unit(a) @ unit(b).T), a, b, scale)


def test_sigmoid_is_open_clips():
    from open_clip.loss import SigLipLoss

    a, b = pair()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (8.0, -4.0))
    x, y = functional.normalize(a), functional.normalize(b)
    equal(sigmoid_loss(a, b, scale, bias), SigLipLoss()(x, y, scale, bias), a, b, scale, bias)


@pytest.mark.parametrize("name", ["feature_regression", "class_distillation"])
def test_the_release(reference_dir, name):
    from safetensors.torch import load_file

    folder = reference_dir / "capture" / name
    out, wanted = load_file(folder / "outputs.safetensors"), read_json(folder / "reference.json")
    found = nt_xent(out["text_projection"], out["image_projection"], wanted["temperature"])
    assert abs(float(found) - wanted["losses"]["contrastive"]) < 2e-6


# ---- what the pairs mean, spelled out with loops


def by_loops(a, b, scale, same, mode):
    "NT-Xent with the same product, one row after the other."
    z, n = functional.normalize(torch.cat([a, b])), len(a)
    total = 0.0
    for i in range(2 * n):
        alike = [j for j in range(2 * n) if j != i and (same[i % n][j % n] or j % n == i % n)]
        partner = (i + n) % (2 * n)
        known = alike if mode == "positive" else [partner]
        rest = [j for j in range(2 * n) if j != i and (mode == "positive" or j not in alike or j == partner)]
        logits = scale * z @ z[i]
        total = total + logits[rest].logsumexp(0) - logits[known].mean()
    return total / (2 * n)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [1 << 21, 20])
def test_nt_xent_by_loops(monkeypatch, mode, blocks):
    monkeypatch.setattr(losses, "BLOCK", blocks)
    a, b = pair()
    same = torch.rand(9, 9) > 0.6
    same = same | same.T
    equal(nt_xent(a, b, 0.2, same, mode), by_loops(a, b, 5.0, same, mode), a, b)


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
@pytest.mark.parametrize("mode", MODES)
def test_ids_and_matrix_agree_in_blocks_of_any_size(monkeypatch, loss, mode):
    a, b = pair()
    ids = torch.tensor([3, 1, 3, 0, 2, 1, 3, -1, -1])
    matrix = (ids[:, None] == ids) & (ids >= 0)[:, None]
    for block in (1, 17, 45):
        whole = loss(a, b, same=ids, mode=mode)
        with monkeypatch.context() as small:
            small.setattr(losses, "BLOCK", block)
            equal(loss(a, b, same=matrix, mode=mode), whole, a, b)
    assert whole != loss(a, b)


def test_soft_targets_are_torchs_cross_entropy():
    a, b = pair()
    same = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5])
    targets = (same[:, None] == same).double()
    targets /= targets.sum(1, keepdim=True)
    logits = 5 * functional.normalize(a) @ functional.normalize(b).T
    theirs = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
    equal(info_nce(a, b, 5.0, same, "positive"), theirs, a, b)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    a, b = pair(5, 3)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -2.0))
    same = torch.tensor([0, 1, 0, -1, -1])
    for function in (
        lambda a, b, s, _: nt_xent(a, b, 1 / s, same, mode),
        lambda a, b, s, _: info_nce(a, b, s, same, mode),
        lambda a, b, s, z: sigmoid_loss(a, b, s, z, same, mode),
    ):
        assert torch.autograd.gradcheck(function, (a, b, scale, bias))


def test_bf16_is_computed_in_float32_even_under_autocast():
    a, b = (x.detach().bfloat16().requires_grad_() for x in pair(64, 32))
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, nt_xent(a.float(), b.float()))
    assert gradients(found, a)[0].dtype == torch.bfloat16


def test_no_gradient_is_computed_where_none_is_asked():
    a, b = pair()
    with torch.no_grad():
        assert not nt_xent(a, b).requires_grad
    (found,) = gradients(info_nce(a, b.detach()), a)
    assert found.shape == a.shape


# ---- temperature


def test_logit_scale_learns_and_stays_in_range():
    scale = LogitScale(0.07)
    assert abs(scale().item() - 1 / 0.07) < 1e-5
    with torch.no_grad():
        scale.log.fill_(9.0)
    assert scale().item() == pytest.approx(100)
    scale().backward()
    assert scale.log.grad > 0  # the way back stays open: the parameter itself was clamped
    with torch.no_grad():
        scale.log.fill_(-1.0)
    assert scale().item() == 1.0
    assert not list(LogitScale(0.07, learn=False).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_module_equals_function(kind):
    a, b = pair(dtype=torch.float32)
    module = Contrastive(kind, learn=True)
    wanted = {"nt-xent": nt_xent, "info-nce": info_nce, "sigmoid": sigmoid_loss}[kind](a, b)
    torch.testing.assert_close(module(a, b), wanted, rtol=1e-5, atol=1e-5)
    module(a, b).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert len(list(module.parameters())) == (2 if kind == "sigmoid" else 1)


# ---- gradient caching


def encoder(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 32), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(32), nn.Linear(32, 8), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def relative(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_cached_gradient_is_that_of_the_whole_batch(kind, dropout):
    "With dropout the whole batch means: all pieces embedded with a graph that stays in memory, from the same random state."
    text, image, match = encoder(dropout), encoder(dropout), Contrastive(kind, learn=True)
    parameters = [*text.parameters(), *image.parameters(), *match.parameters()]
    batch = (torch.randn(50, 12), torch.randn(50, 12))
    encode = lambda part: (text(part[0]), image(part[1]))
    pieces = [encode((batch[0], batch[1]))] if not dropout else None
    torch.manual_seed(5)
    if dropout:
        pieces = [encode(tuple(x[at : at + 16] for x in batch)) for at in range(0, 50, 16)]
    whole = gradients(match(*(torch.cat(parts) for parts in zip(*pieces, strict=True))), *parameters)
    torch.manual_seed(5)
    found = gradients(match(*cached(encode, batch, chunk=16)), *parameters)
    assert relative(found, whole) < 1e-6


def test_cached_leaves_the_random_state_as_a_plain_pass_does():
    model, x = encoder(), torch.randn(10, 12)
    torch.manual_seed(0)
    cached(model, x, 10).sum().backward()
    after = torch.rand(1)
    torch.manual_seed(0)
    model(x).sum().backward()
    assert torch.equal(after, torch.rand(1))


@dataclass
class Items:
    x: torch.Tensor
    weight: torch.Tensor  # not one an item: given to every piece
    names: list
    nothing: None = None


Couple = namedtuple("Couple", "x name")


def test_cached_cuts_any_kind_of_batch():
    x, weight = torch.randn(7, 12), torch.ones(12)
    seen = []
    items = Items(x, weight, [f"i{i}" for i in range(7)])
    found = cached(lambda part: (seen.append(part.names), part.x * part.weight)[1], items, 3)
    assert torch.equal(found, x) and seen == [["i0", "i1", "i2"], ["i3", "i4", "i5"], ["i6"]]
    assert torch.equal(cached(lambda part: part["x"], {"x": x, "n": 5}, 2), x)
    assert torch.equal(cached(lambda part: part.x, Couple(x, "name"), 2), x)
    assert torch.equal(cached(lambda part: part, x, 100), x)
    sums = cached(lambda part: (part, part.sum()[None]), x, 3)
    assert sums[1].shape == (3,)
    with torch.no_grad():
        assert torch.equal(cached(lambda part: part, x, 3), x)


MEMORY = """
import sys, torch
from product_retrieval.losses import cached, nt_xent
torch.set_num_threads(1)
torch.manual_seed(0)
layer = lambda: torch.nn.TransformerEncoderLayer(128, 2, 256, 0.1, batch_first=True)
layers = lambda: torch.nn.Sequential(*(layer() for _ in range(1)))
text, image = layers(), layers()
encode = lambda part: (text(part[0])[:, 0], image(part[1])[:, 0])
data = tuple(torch.randn(int(sys.argv[1]), 16, 128) for _ in range(2))
warm = tuple(x[:2] for x in data)
nt_xent(*cached(encode, warm, 1)).backward()
kilobytes = lambda name: next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = kilobytes("VmRSS")
nt_xent(*(cached(encode, data, 64))).backward()
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of its memory as Linux tells it")
def test_memory_does_not_grow_with_the_batch():
    "1,024 against 64; benchmarks/bench_losses.py does 4,096."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = lambda items: int(subprocess.run([sys.executable, "-c", MEMORY, str(items)], env=environment, capture_output=True,
                                           text=True, check=True, timeout=120).stdout)
    small, large = run(64), run(1024)
    print(f"64 items: {small // 1024} MB, 1,024 items: {large // 1024} MB")
    assert large < 1.2 * small + 8 * 1024  # the embeddings of 1,024 items and their gradients: 2 x 1,024 x 128 floats a few times


# ---- several processes


def test_two_processes_compare_with_each_other(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [losses_toy.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in losses_toy.CASES:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        value, grads = losses_toy.alone(name)
        assert abs(found["loss"] - value.item()) < 1e-5 * abs(value.item()), name
        assert relative(found["gradients"], grads) < 1e-6, name


def test_one_process_gathers_nothing():
    a, b = pair()
    assert gather_with_gradient(a) is a
    assert torch.equal(nt_xent(a, b, gather=True), nt_xent(a, b))


# ---- bad input


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), "the same shape"),
        (torch.ones(3, 2), torch.ones(3, 5), "the same shape"),
        (torch.ones(3), torch.ones(3), r"\[batch, dim\]"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2), "floating-point"),
        (torch.ones(0, 2), torch.ones(0, 2), "empty"),
        ([[1.0]], torch.ones(1, 1), "list"),
    ],
    ids=["items", "dims", "vectors", "whole numbers", "empty", "lists"],
)
def test_shapes(loss, a, b, says):
    with pytest.raises(InputError, match=says):
        loss(a, b)


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("same", [torch.arange(4), torch.arange(9.0), torch.ones(9, 9), torch.ones(8, 9).bool(), [[1]]])
def test_groups_that_do_not_fit(loss, same):
    with pytest.raises(InputError, match="same: "):
        loss(*pair(), same=same)


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'ignore'"):
        nt_xent(*pair(), same=torch.arange(9), mode="ignor")
    with pytest.raises(InputError, match="did you mean 'info-nce'"):
        Contrastive("infonce")
    with pytest.raises(InputError, match="mode"):
        Contrastive(mode="drop")
    for temperature in (0.0, -1.0, 0.001, 2.0, float("nan")):
        with pytest.raises(InputError, match="temperature"):
            LogitScale(temperature)


def test_nan_stays_nan():
    "The training loop stops at a loss that is no number and names the items; here it must not be hidden."
    for loss in FUNCTIONS:
        for mode in MODES:
            a, b = pair()
            spoiled = a.detach().clone()
            spoiled[4, 2] = float("nan")
            assert loss(spoiled, b).isnan() and loss(spoiled, b, same=torch.zeros(9, dtype=torch.int64), mode=mode).isnan()


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_one_item_has_nothing_to_be_told_from(loss):
    a, b = pair(1)
    value = loss(a, b)
    assert value == 0 and all(not g.any() for g in gradients(value, a, b))


@pytest.mark.parametrize("mode", MODES)
def test_everything_the_same(mode):
    "Nothing left to tell apart: finite, and 0 where pairs are ignored."
    for loss in (nt_xent, info_nce):
        a, b = pair()
        value = loss(a, b, same=torch.zeros(9, dtype=torch.int64), mode=mode)
        assert value.isfinite() and (mode == "positive" or value == 0)
        assert all(g.isfinite().all() for g in gradients(value, a, b))


def test_zero_vectors_give_a_finite_loss():
    a, b = (torch.zeros(4, 3, requires_grad=True) for _ in range(2))
    for loss in FUNCTIONS:
        assert loss(a, b).isfinite()


def test_cached_needs_tensors_and_a_chunk():
    for batch, chunk in ((["a"], 3), (torch.ones(3, 2), 0), ({}, 1)):
        with pytest.raises(InputError, match="chunk"):
            cached(lambda part: part, batch, chunk)


def test_cached_refuses_what_it_would_compute_wrongly():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(InputError, match="requires a gradient"):
        cached(first, torch.ones(4, 3, requires_grad=True), 2)
    x = torch.arange(12.0).view(4, 3)
    out = cached(lambda part: first(part) if part[0, 0] == 0 else second(part), x, 2)
    with pytest.raises(InputError, match="uses parameters in one piece"):
        out.sum().backward()


def test_cached_frozen_and_shared_parameters():
    frozen, shared, x = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3), torch.randn(5, 3)
    encode = lambda part: (shared(frozen(shared(part))), torch.tensor([len(part)]))
    vectors, counts = cached(encode, x, 2)
    wanted = gradients(encode(x)[0].pow(2).sum(), shared.weight, shared.bias)
    torch.testing.assert_close(gradients(vectors.pow(2).sum(), shared.weight, shared.bias), wanted)
    assert counts.tolist() == [2, 2, 1]
    assert not cached(frozen, x, 2).requires_grad


def test_exported_module_holds_no_library_of_losses():
    text = Path(losses.__file__).read_text(encoding="utf-8")
    assert "open_clip" not in text and "pytorch_metric_learning" not in text
