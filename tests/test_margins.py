"""Margin losses against pytorch-metric-learning, their edges, class weights, groups, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import losses as library
from pytorch_metric_learning.reducers import ClassWeightedReducer
from torch import nn
from torch.nn import functional

from product_retrieval.core import InputError
from product_retrieval.margins import LOSSES, ArcFace, CosFace, add_angle, class_weights, cosines, margin_loss


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(items: int = 40, dim: int = 16, classes: int = 9, seed: int = 0, dtype=torch.float64):
    dice = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items, dim, generator=dice, dtype=dtype).requires_grad_()
    return vectors, torch.randint(classes, (items,), generator=dice)


def compare(ours, theirs, vectors, targets):
    "Largest difference in value, gradient of the vectors and gradient of the centres."
    theirs.W.data = ours.centres.data.T.clone()
    a, b = ours(vectors, targets), theirs(vectors, targets)
    ga, gb = torch.autograd.grad(a, (vectors, ours.centres)), torch.autograd.grad(b, (vectors, theirs.W))
    return max((a - b).abs(), (ga[0] - gb[0]).abs().max(), (ga[1] - gb[1].T).abs().max()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("margin", "scale"), [(0.0, 1), (0.2, 24), (0.5, 64), (1.2, 30)])
def test_both_margins_equal_the_library(margin, scale, seed):
    vectors, targets = batch(seed=seed)
    torch.manual_seed(seed)
    cosface, arcface = CosFace(9, 16, margin, scale).double(), ArcFace(9, 16, margin, scale).double()
    assert compare(cosface, library.CosFaceLoss(9, 16, margin=margin, scale=scale), vectors, targets) < 1e-6
    assert compare(arcface, library.ArcFaceLoss(9, 16, margin=math.degrees(margin), scale=scale), vectors, targets) < 1e-6


def test_single_precision_is_near_the_library_too():
    vectors, targets = batch(dtype=torch.float32)
    assert compare(CosFace(9, 16), library.CosFaceLoss(9, 16, margin=0.2, scale=24), vectors, targets) < 1e-5
    theirs = library.ArcFaceLoss(9, 16, margin=math.degrees(0.3), scale=24)
    assert compare(ArcFace(9, 16, 0.3), theirs, vectors, targets) < 1e-5


def test_every_angle_including_the_far_side_equals_the_library():
    angle = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    points = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    ours, theirs = ArcFace(2, 2, 0.5, 24).double(), library.ArcFaceLoss(2, 2, margin=math.degrees(0.5), scale=24)
    ours.centres.data = torch.eye(2, dtype=torch.float64)
    assert compare(ours, theirs, points, torch.zeros(200, dtype=torch.long)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.1, 0.5, 1.5])
def test_angle_falls_all_the_way_with_finite_slope(dtype, margin):
    cosine = torch.linspace(-1, 1, 2001, dtype=dtype).requires_grad_()
    moved = add_angle(cosine, margin)
    assert (moved.diff() > 0).all(), "a larger cosine never gives a smaller value"
    assert torch.isfinite(torch.autograd.grad(moved.sum(), cosine)[0]).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_arcface_at_and_opposite_its_centre_has_finite_gradients(sign):
    loss = ArcFace(2, 4, 0.5, 64)
    vectors = (sign * loss.centres.detach()[:1]).requires_grad_()
    value = loss(vectors, torch.tensor([0]))
    grads = torch.autograd.grad(value, (vectors, loss.centres))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("kind", [CosFace, ArcFace])
def test_gradients_against_differences(kind):
    vectors, targets = batch(6, 5, 4)
    loss = kind(4, 5, 0.3, 8, weights=[1.0, 2.0, 0.5, 1.0], groups=[0, 0, 1, 1]).double()
    assert torch.autograd.gradcheck(lambda v, c: functional_loss(loss, v, c, targets), (vectors, loss.centres))


def functional_loss(loss, vectors, centres, targets):
    return torch.func.functional_call(loss, {"centres": centres}, (vectors, targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_give_a_single_precision_loss(dtype):
    vectors, targets = batch(dtype=torch.float32)
    loss = CosFace(9, 16)
    half = loss(vectors.to(dtype), targets)
    assert half.dtype == torch.float32 and torch.isclose(half, loss(vectors.to(dtype).float(), targets))
    ready = margin_loss("softmax", 9, 16)
    ready(vectors.to(dtype), targets)
    assert ready.loss.W.dtype == torch.float32, "the library would have cast its centres"


def test_weights():
    targets = torch.tensor([0] * 6 + [1] * 3 + [2, -1])
    for power in (0.0, 0.5, 1.0):
        weights = class_weights(targets, 4, power)
        assert torch.isclose(weights[targets[targets >= 0]].mean(), torch.tensor(1.0)) and weights[3] == 0
    assert torch.allclose(class_weights(targets, 4, 0.0)[:3], torch.ones(3))
    assert torch.allclose(class_weights(targets, 3, 1.0) * torch.tensor([6, 3, 1]), torch.full((3,), 10 / 3))
    vectors, targets = batch()
    weights = class_weights(targets, 9, 1.0)
    ours = ArcFace(9, 16, 0.3, 24, weights=weights).double()
    reducer = ClassWeightedReducer(weights.double())
    assert compare(ours, library.ArcFaceLoss(9, 16, margin=math.degrees(0.3), scale=24, reducer=reducer), vectors, targets) < 1e-6
    by_name = margin_loss("softmax", 9, 16, weights=weights, temperature=1 / 24)
    plain = CosFace(9, 16, 0.0, 24, weights=weights)
    by_name.loss.W.data = plain.centres.data.T.clone()
    assert torch.isclose(by_name(vectors.float(), targets), plain(vectors.float(), targets), rtol=1e-5)


def test_groups_compete_only_inside():
    vectors, targets = batch(classes=4)
    loss = CosFace(4, 16, 0.2, 24, groups=[5, 5, 7, 7]).double()
    expected = []
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        siblings = [0, 1] if target < 2 else [2, 3]
        logits = cosines(vector[None], loss.centres[siblings])[0]
        logits = logits - 0.2 * functional.one_hot(torch.tensor(siblings.index(target)), 2)
        expected.append(functional.cross_entropy(24 * logits, torch.tensor(siblings.index(target))))
    assert torch.isclose(loss(vectors, targets), torch.stack(expected).mean())
    alone = CosFace(2, 16, groups=[0, 1])
    assert alone(vectors.float(), targets % 2) == 0, "a class without siblings has nothing to win"


@pytest.mark.parametrize("name", LOSSES)
def test_every_name_trains_and_leaves_out_items_without_a_class(name):
    vectors, targets = batch(dtype=torch.float32)
    torch.manual_seed(0)
    loss = margin_loss(name, 9, 16)
    partly = targets.clone()
    partly[::3] = -1
    known = partly >= 0
    assert torch.equal(loss(vectors, partly), loss(vectors[known], partly[known]))
    nobody = loss(vectors, torch.full_like(targets, -1))
    assert nobody == 0
    nobody.backward()
    assert not vectors.grad.any() and all(p.grad is not None and not p.grad.any() for p in loss.parameters())
    scores = loss.logits(vectors.detach())
    assert scores is None or scores.shape == (40, 9)


@pytest.mark.parametrize("name", LOSSES)
def test_every_name_lowers_its_loss(name):
    vectors, targets = batch(64, 12, 4, dtype=torch.float32)
    torch.manual_seed(1)
    encoder, loss = nn.Linear(12, 8), margin_loss(name, 4, 8)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], 0.02)
    values = []
    for _ in range(60):
        value = loss(encoder(vectors.detach()), targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.97 * values[0], (values[0], values[-1])


def test_sub_centre_margin_is_in_radians():
    vectors, targets = batch()
    ours = margin_loss("sub-centre-arcface", 9, 16, margin=0.5, scale=24, sub_centers=1).double()
    plain = ArcFace(9, 16, 0.5, 24).double()
    assert compare(plain, ours.loss, vectors, targets) < 1e-6


def test_centres_are_saved_and_weights_are_not():
    loss = CosFace(3, 4, weights=[1, 2, 3], groups=[0, 0, 1])
    assert list(loss.state_dict()) == ["centres"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: margin_loss("cosfase", 3, 4), "did you mean 'cosface'"),
        (lambda: margin_loss("arc-face", 3, 4), "did you mean 'arcface'"),
        (lambda: margin_loss("cosface", 3, 4, margn=0.1), "unknown option 'margn'; did you mean 'margin'"),
        (lambda: margin_loss("circle", 3, 4, gama=80), "unknown option 'gama'; did you mean 'gamma'"),
        (lambda: margin_loss("proxy-anchor", 3, 4, weights=[1, 1, 1]), "takes no class weights"),
        (lambda: margin_loss("softmax", 3, 4, weights=[1, 1]), "one number for each of 3 classes"),
        (lambda: margin_loss("cosface", 1, 4), "1 class; a margin needs at least two"),
        (lambda: margin_loss("triplet", 1, 4), "1 class; a loss needs at least two"),
        (lambda: CosFace(3, 4, margin=-0.1), "margin = -0.1; expected 0 to 2"),
        (lambda: ArcFace(3, 4, margin=28.6), "margin = 28.6; expected 0 to 1.57"),
        (lambda: CosFace(3, 4, scale=0), "expected both above 0"),
        (lambda: CosFace(3, 4, groups=[0, 1]), "groups: shape"),
        (lambda: CosFace(3, 4)(torch.randn(2, 4), torch.tensor([0, 3])), "class 3; there are 3 classes"),
        (lambda: CosFace(3, 4)(torch.randn(2, 4), torch.tensor([0])), "expected \\[batch, dim\\] and \\[batch\\]"),
        (lambda: class_weights(torch.tensor([-1, -1]), 3), "none of 2 items has a class"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()
