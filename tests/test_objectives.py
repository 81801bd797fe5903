"""Masking against transformers, the release's losses, the objective on every variant of the model, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from product_retrieval.capture.model import CaptureBatch, CaptureModel, capture_config
from product_retrieval.capture.objectives import CaptureObjective, ObjectiveConfig, TokenTable, caption_groups
from product_retrieval.capture.objectives import class_distribution, mask_regions, mask_tokens, masked_language
from product_retrieval.capture.objectives import masked_region, shared_words
from product_retrieval.core import InputError, read_json
from product_retrieval.losses import nt_xent
from product_retrieval.training import TrainConfig, fit

STREAMS = ("both", "no-co", "single", "dual", "late", "text", "image")
TABLE = TokenTable(300, 4, (0, 1, 2, 3), tuple(range(200, 300)))


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def items(count: int = 12, tokens: int = 10, regions: int = 6) -> CaptureBatch:
    torch.manual_seed(7)
    words, places = torch.randint(3, tokens + 1, (count, 1)), torch.randint(1, regions + 1, (count, 1))
    token_mask, region_mask = torch.arange(tokens) < words, torch.arange(regions) < places
    numbers = torch.randint(5, 300, (count, tokens)).masked_fill(~token_mask, 0)
    numbers[:, 0] = 2
    names = [f"item{i}" for i in range(count)]
    features, boxes = torch.randn(count, regions, 16), torch.rand(count, regions, 5)
    return CaptureBatch(numbers, token_mask, features, boxes, region_mask, torch.arange(count), names)


def model(**changes) -> CaptureModel:
    torch.manual_seed(1)
    return CaptureModel(capture_config("tiny", **changes))


def gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


# ---- words


def test_masking_as_transformers_does_it():
    "The same shares of [MASK], of other tokens and of kept ones, and the same targets, as its data collator."
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    tokens = torch.randint(5, 300, (400, 100))
    tokens[:, 0], tokens[:, -1] = 2, 3
    ours = mask_tokens(tokens, torch.ones_like(tokens).bool(), TABLE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), mask_token="[MASK]", pad_token="[PAD]")
    special = torch.zeros_like(tokens).bool()
    special[:, [0, -1]] = True
    theirs = DataCollatorForLanguageModeling(tokenizer).torch_mask_tokens(tokens.clone(), special)
    for name, share in shares(tokens, *ours).items():
        assert share == pytest.approx(shares(tokens, *theirs)[name], abs=0.012), name


def word_tokenizer():
    from tokenizers import Tokenizer, models

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(295))]
    return Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))


def shares(tokens, masked, targets) -> dict[str, float]:
    chosen = targets >= 0
    assert torch.equal(masked[~chosen], tokens[~chosen]) and torch.equal(targets[chosen], tokens[chosen])
    hidden, kept = masked[chosen] == 4, masked[chosen] == tokens[chosen]
    first_and_last = chosen[:, [0, -1]].float()
    parts = {"chosen": chosen.float(), "[MASK]": hidden.float(), "kept": kept.float(), "special": first_and_last}
    return {name: float(part.mean()) for name, part in parts.items()}


def test_specials_and_padding_are_never_masked_nor_drawn():
    batch = items(300)
    masked, targets = mask_tokens(batch.tokens, batch.token_mask, TABLE, share=1.0)
    ordinary = batch.token_mask & (batch.tokens > 4)
    assert torch.equal(targets >= 0, ordinary)
    assert masked[ordinary].min() >= 4 and torch.equal(masked[~ordinary], batch.tokens[~ordinary])


def test_whole_words():
    tokens = torch.tensor([[2, 50, 51, 210, 211, 52, 220, 3]]).repeat(2000, 1)  # three words of 1, 3 and 2 pieces
    mask = torch.ones_like(tokens).bool()
    _, targets = mask_tokens(tokens, mask, TABLE, share=0.3, whole_words=True)
    chosen = targets >= 0
    assert not chosen[:, [0, 7]].any()
    assert torch.equal(chosen[:, 2], chosen[:, 3]) and torch.equal(chosen[:, 3], chosen[:, 4])
    assert torch.equal(chosen[:, 5], chosen[:, 6])
    assert float(chosen[:, [1, 2, 5]].float().mean()) == pytest.approx(0.3, abs=0.02)
    pieces = mask_tokens(tokens, mask, TABLE, share=0.3)[1] >= 0
    assert not torch.equal(pieces[:, 2], pieces[:, 3])


def test_the_same_seed_masks_the_same():
    batch = items()
    torch.manual_seed(3)
    first = mask_tokens(batch.tokens, batch.token_mask, TABLE)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, mask_tokens(batch.tokens, batch.token_mask, TABLE), strict=True))


def test_token_table_of_a_vocabulary():
    table = TokenTable.of({"[PAD]": 0, "[MASK]": 1, "lip": 2, "##stick": 3, "[": 4, "]": 5})
    assert table == TokenTable(6, 1, (0, 1), (3,))
    with pytest.raises(InputError, match="no '\\[MASK\\]'"):
        TokenTable.of({"lip": 0})
    with pytest.raises(InputError, match="mask = 9"):
        TokenTable(9, 9)
    with pytest.raises(InputError, match="special"):
        TokenTable(2, 1, (0,))


# ---- regions


def test_regions():
    regions, mask = torch.randn(500, 8, 4), torch.ones(500, 8).bool()
    mask[:, 6:] = False
    masked, which = mask_regions(regions, mask)
    assert not which[:, 0].any() and not which[:, 6:].any()
    assert float(which[:, 1:6].float().mean()) == pytest.approx(0.15, abs=0.02)
    zero = (masked == 0).all(-1)
    assert not (zero & ~which).any()
    assert float(zero[which].float().mean()) == pytest.approx(0.9, abs=0.04)
    assert torch.equal(masked[~zero], regions[~zero]) and torch.equal(masked[:, 0], regions[:, 0])


def test_class_distribution():
    centres = torch.eye(3)
    found = class_distribution(torch.tensor([[[2.0, 0, 0], [0, 1, 1]]]), centres, 0.5)
    wanted = torch.tensor([[1.0, 0, 0], [0, math.sqrt(0.5), math.sqrt(0.5)]]) / 0.5
    torch.testing.assert_close(found[0], wanted.softmax(-1))
    assert class_distribution(torch.zeros(1, 3), centres).isfinite().all()


# ---- the losses of the release


@pytest.mark.parametrize("name", ["feature_regression", "class_distillation"])
def test_the_release_from_its_outputs(reference_dir, name):
    "Without a model: logits of the reference stand in for the heads."
    from safetensors.torch import load_file

    folder = reference_dir / "capture" / name
    given, out = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    wanted, heads = read_json(folder / "reference.json")["losses"], Echo()
    targets, which, truth = release_targets(given)
    kind = "feature" if name == "feature_regression" else "classes"
    assert abs(float(masked_language(heads, out["token_logits"], targets)) - wanted["masked_language"]) < 2e-6
    assert abs(float(masked_region(heads, out["region_predictions"], which, truth, kind)) - wanted["masked_region"]) < 2e-6


class Echo(nn.Module):
    "A model whose heads return what they get."

    def token_logits(self, rows):
        return rows

    region_predictions = token_logits


def release_targets(given):
    "The release's labels in our form: -100 for nothing, and a column for the whole picture."
    targets = given["lm_label_ids"].masked_fill(given["lm_label_ids"] < 0, -100)
    which = functional.pad(given["image_label"] == 1, (1, 0))
    return targets, which, functional.pad(given["image_target"], (0, 0, 1, 0))


@pytest.mark.parametrize("name", ["feature_regression", "class_distillation"])
def test_the_release_with_the_model(reference_dir, name):
    "The three losses of our model with the release's weights, and the norm of the gradient of a few parameters."
    from safetensors.torch import load_file

    folder = reference_dir / "capture" / name
    given, wanted = load_file(folder / "inputs.safetensors"), read_json(folder / "reference.json")
    words, places = given["input_ids"].shape[1], given["image_feat"].shape[1]
    ours = CaptureModel.from_official(folder, tokens=words, regions=places).eval()
    text, image = (given["input_ids"], given["input_mask"].bool()), (given["image_feat"], given["image_loc"])
    out = ours(*text, *image, given["image_mask"].bool(), given["segment_ids"])
    targets, which, truth = release_targets(given)
    found = {
        "masked_language": masked_language(ours, out.fused_text, targets),
        "masked_region": masked_region(ours, out.fused_image, which, truth, ours.config.region_target),
        "contrastive": nt_xent(out.text_projection, out.image_projection, wanted["temperature"]),
    }
    for key, value in found.items():
        assert abs(value.item() - wanted["losses"][key]) < 1e-5, key
    sum(found.values()).backward()
    norm = wanted["gradient_norms"]["bert.embeddings.word_embeddings.weight"]
    assert float(ours.text.words.weight.grad.norm()) == pytest.approx(norm, rel=1e-3)


def test_masked_language_is_transformers():
    from transformers.loss.loss_utils import ForMaskedLMLoss

    logits, targets = torch.randn(3, 5, 30), torch.full((3, 5), -100)
    targets[0, 2], targets[2, 4] = 7, 11
    theirs = ForMaskedLMLoss(logits, targets, vocab_size=30)
    torch.testing.assert_close(masked_language(Echo(), logits, targets), theirs)


# ---- the same product


def test_caption_groups_ignore_order_and_padding():
    tokens = torch.tensor([[2, 10, 11, 3, 0], [2, 11, 10, 3, 0], [2, 10, 11, 12, 3], [2, 3, 0, 0, 0], [2, 10, 10, 11, 3]])
    mask = tokens != 0
    found = caption_groups(tokens, mask, TABLE)
    assert found[0] == found[1] and len(set(found.tolist())) == 4
    assert found[3] == -1 and (found[[0, 2, 4]] >= 0).all()
    assert torch.equal(found[:2], caption_groups(tokens[:2, :4], mask[:2, :4], TABLE))


def test_caption_groups_do_not_collide():
    tokens = torch.cartesian_prod(torch.arange(5, 300), torch.arange(5, 300))
    tokens = tokens[tokens[:, 0] < tokens[:, 1]]
    found = caption_groups(tokens, torch.ones_like(tokens).bool(), TABLE)
    assert len(found.unique()) == len(tokens) and found.min() >= 0


def test_shared_words_by_hand():
    "Weights log(4 / captions with the token): token 10 is in all four, 11 in two, 12 and 13 in one."
    tokens = torch.tensor([[2, 10, 11, 12], [2, 10, 11, 0], [2, 10, 13, 0], [2, 10, 0, 0]])
    found = shared_words(tokens, tokens != 0, TABLE)
    half, rare = math.log(2), math.log(4)
    assert found[0, 1] == pytest.approx(1.0) and found[0, 0] == pytest.approx(1.0)
    assert found[0, 2] == 0 and found[3].max() == 0  # nothing but a word that all have
    assert torch.equal(found, found.T)
    wide = functional.pad(tokens, (0, 3))
    other = torch.tensor([[2, 12, 14, 0, 0, 0, 0]])
    both = torch.cat([wide, other])
    found = shared_words(tokens, tokens != 0, TABLE, (both, both != 0))
    weight = {10: math.log(5 / 4), 11: math.log(5 / 2), 12: math.log(5 / 2), 14: math.log(5)}
    assert found.shape == (4, 5)
    assert found[0, 4] == pytest.approx(weight[12] / min(weight[10] + weight[11] + weight[12], weight[12] + weight[14]))
    assert half < rare


# ---- the objective


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("chunk", [0, 5])
def test_every_variant_trains_every_parameter(streams, chunk):
    config = ObjectiveConfig(chunk=chunk, token_share=0.5, region_share=0.5)
    net, objective = model(streams=streams), CaptureObjective(TABLE, config)
    values = objective(net, items())
    assert list(values) == ["loss", "language", "region", "contrastive"]
    assert all(value.ndim == 0 and value.isfinite() for value in values.values())
    torch.testing.assert_close(values["loss"], values["language"] + values["region"] + values["contrastive"])
    absent = {"text": "region", "image": "language", "late": "region"}.get(streams)
    assert all((values[part].item() == 0) == (part == absent) for part in ("language", "region", "contrastive"))
    assert all(g is not None for g in gradients(values["loss"], net))


@pytest.mark.parametrize("same", ["none", "caption", "words"])
@pytest.mark.parametrize("mode", ["ignore", "positive"])
def test_chunks_have_the_gradient_of_the_whole(same, mode):
    "With dropout; the whole: all pieces in memory with their graph, from the same random state."
    net, batch = model(), items()
    config = ObjectiveConfig(chunk=5, same=same, mode=mode, alike=0.3, token_share=0.4, region_share=0.4, learn_temperature=True)
    objective = CaptureObjective(TABLE, config)
    from product_retrieval import losses
    from product_retrieval.capture import objectives

    def kept(encode, batch, chunk):
        parts = [encode(piece) for piece in losses._pieces(batch, chunk)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    found = []
    for how in (losses.cached, kept):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objectives, "cached", how)
            torch.manual_seed(5)
            found.append(gradients(objective(net, batch)["loss"], net, objective))
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(*found, strict=True)) < 1e-6


def test_weights_and_kinds():
    net, batch = model().eval(), items()
    for kind in ("nt-xent", "info-nce", "sigmoid"):
        torch.manual_seed(2)
        values = CaptureObjective(TABLE, ObjectiveConfig(language=2.0, region=0.5, contrastive=3.0, kind=kind))(net, batch)
        torch.testing.assert_close(values["loss"], 2 * values["language"] + values["region"] / 2 + 3 * values["contrastive"])


def test_captions_that_repeat_are_no_negatives():
    net, batch = model(dropout=0.0), items(4)
    batch.tokens[1], batch.token_mask[1] = batch.tokens[0], batch.token_mask[0]
    values = {}
    for same in ("none", "caption"):
        config = ObjectiveConfig(same=same, token_share=0.0, region_share=0.0)
        values[same] = CaptureObjective(TABLE, config)(net, batch)["contrastive"].item()
    assert values["caption"] < values["none"]


def test_distillation():
    net, centres = model(region_target="classes", region_classes=9), torch.randn(9, 16)
    objective = CaptureObjective(TABLE, ObjectiveConfig(region_target="classes", region_share=0.5), centres)
    values = objective(net, items())
    assert float(values["region"]) > 0 and all(g is not None for g in gradients(values["loss"], net))
    with pytest.raises(InputError, match="9 values, the model predicts 16"):
        objective(model(), items())
    for wrong in ((ObjectiveConfig(region_target="classes"), None), (ObjectiveConfig(), centres)):
        with pytest.raises(InputError, match="centres"):
            CaptureObjective(TABLE, *wrong)


def test_nothing_masked_leaves_the_contrastive_loss():
    net, config = model(), ObjectiveConfig(token_share=0.0, region_share=0.0)
    values = CaptureObjective(TABLE, config)(net, items())
    assert float(values["language"]) == 0 and float(values["region"]) == 0
    assert torch.equal(values["loss"], values["contrastive"])
    assert all(g is not None and g.isfinite().all() for g in gradients(values["loss"], net))  # DDP wants every parameter


def test_one_item_and_pictures_without_regions():
    net, batch = model(), items(1)
    values = CaptureObjective(TABLE)(net, batch)
    assert float(values["contrastive"]) == 0 and values["loss"].isfinite()
    batch = items()
    batch.region_mask[:, 1:] = False
    values = CaptureObjective(TABLE, ObjectiveConfig(region_share=1.0))(net, batch)
    assert float(values["region"]) == 0 and values["loss"].isfinite()
    whole = replace(batch, regions=batch.regions[:, :1], boxes=batch.boxes[:, :1], region_mask=batch.region_mask[:, :1])
    assert CaptureObjective(TABLE)(net, whole)["loss"].isfinite()


def test_empty_captions():
    batch = items()
    batch.token_mask[:4, 1:] = False
    values = CaptureObjective(TABLE, ObjectiveConfig(same="words"))(model(), batch)
    assert values["loss"].isfinite()


def test_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        values = CaptureObjective(TABLE)(model(), items())
    assert values["loss"].isfinite() and values["loss"].dtype == torch.float32


def test_trains_and_resumes_through_fit(tmp_path):
    "Masking draws from torch's generator, which the loop seeds for each step: two runs are equal to the last bit."
    batch = items()
    recipe = TrainConfig(epochs=6, learning_rate=3e-3, device="cpu", precision="fp32", tensorboard=False)
    runs = []
    for name in ("one", "two"):
        net = model()
        fit(net, CaptureObjective(TABLE, ObjectiveConfig(learn_temperature=True)), [batch] * 4, recipe, tmp_path / name)
        runs.append((tmp_path / name / "train.csv").read_text())
    assert runs[0] == runs[1]
    rows = [line.split(",") for line in runs[0].splitlines()]
    column = rows[0].index("contrastive")
    assert float(rows[-1][column]) < float(rows[1][column])


# ---- bad input


def test_masks_and_tokens_that_do_not_fit():
    batch = items()
    with pytest.raises(InputError, match="int64"):
        mask_tokens(batch.tokens.float(), batch.token_mask, TABLE)
    with pytest.raises(InputError, match="token_mask"):
        mask_tokens(batch.tokens, batch.token_mask[:, :4], TABLE)
    with pytest.raises(InputError, match="token_mask"):
        mask_tokens(batch.tokens, batch.token_mask.long(), TABLE)
    with pytest.raises(InputError, match="another vocabulary"):
        mask_tokens(batch.tokens + 300, batch.token_mask, TABLE)
    with pytest.raises(InputError, match="share = 15"):
        mask_tokens(batch.tokens, batch.token_mask, TABLE, share=15)
    with pytest.raises(InputError, match="region_mask"):
        mask_regions(batch.regions, batch.region_mask[:3])
    with pytest.raises(InputError, match="zeroed"):
        mask_regions(batch.regions, batch.region_mask, zeroed=float("nan"))
    with pytest.raises(InputError, match="floating point"):
        mask_regions(batch.tokens, batch.token_mask)


def test_targets_that_do_not_fit():
    states = torch.randn(2, 3, 8)
    with pytest.raises(InputError, match="targets"):
        masked_language(Echo(), states, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="which"):
        masked_region(Echo(), states, torch.ones(2, 2).bool(), states)
    with pytest.raises(InputError, match="predicts 8"):
        masked_region(Echo(), states, torch.ones(2, 3).bool(), states[..., :5])
    with pytest.raises(InputError, match="did you mean 'classes'"):
        masked_region(Echo(), states, torch.ones(2, 3).bool(), states, "class")


def test_nan_names_the_item():
    batch = items()
    batch.regions[7, 0, 3] = float("nan")
    for chunk in (0, 4):
        with pytest.raises(InputError, match=r"item7.*NaN"):
            CaptureObjective(TABLE, ObjectiveConfig(chunk=chunk))(model(), batch)


@pytest.mark.parametrize(
    "settings",
    [{"same": "title"}, {"region_target": "feat"}, {"kind": "clip"}, {"mode": "drop"}, {"token_share": 1.5}, {"alike": -0.1},
     {"language": -1.0}, {"chunk": -1}, {"temperature": 5.0}, {"region": float("nan")}],
    ids=str,
)
def test_settings_out_of_range(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        CaptureObjective(TABLE, ObjectiveConfig(**settings))
