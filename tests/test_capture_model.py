"""The hybrid-stream transformer: masks per item, variants, the release's parameters, bad input, files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_reference import compare, main, within
from safetensors.torch import load_file, save_file

from product_retrieval.capture.model import PRESETS, CaptureBatch, CaptureModel, attend, attention_weights, by_length
from product_retrieval.capture.model import capture_config, check_batch, config_from_shapes, count_flops, word_to_region
from product_retrieval.core import InputError
from product_retrieval.encoders import load_encoder

STREAMS = ("both", "no-co", "single", "dual", "late", "text", "image")
TINY = capture_config("tiny")


def batch_of(lengths, counts, seed=0, tokens=9, regions=5):
    "Random items; padding holds random words and NaN features."
    g = torch.Generator().manual_seed(seed)
    words = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    places = torch.arange(regions) < torch.tensor(counts)[:, None]
    items = len(lengths)
    features = torch.randn(items, regions, TINY.region_dim, generator=g).masked_fill(~places[:, :, None], float("nan"))
    numbers = torch.randint(0, TINY.vocabulary, (items, tokens), generator=g)
    boxes = torch.rand(items, regions, 5, generator=g).masked_fill(~places[:, :, None], float("nan"))
    return CaptureBatch(numbers, words, features, boxes, places, torch.arange(items), [f"item {i}" for i in range(items)])


def rows_of(batch, rows):
    names = ("tokens", "token_mask", "regions", "boxes", "region_mask", "rows")
    return CaptureBatch(*(getattr(batch, name)[rows] for name in names), [batch.item_ids[r] for r in rows])


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return CaptureModel(capture_config("tiny", **changes)).eval()


def outputs(model, batch):
    "Everything an item gets; per-position outputs only where the item has something."
    with torch.no_grad():
        out = model(**batch.inputs())
    return {name: value for name, value in vars(out).items() if value is not None}


# --- masks


@pytest.mark.parametrize("streams", STREAMS)
def test_an_item_does_not_depend_on_batch_mates_or_padding(streams):
    "Alone, beside others in any order, with more or less padding: the same outputs."
    model, batch = model_of(streams=streams), batch_of([9, 3, 1, 5], [2, 5, 1, 3])
    together = outputs(model, batch)
    for item in range(4):
        words, places = int(batch.token_mask[item].sum()), int(batch.region_mask[item].sum())
        for other in (rows_of(batch, [item]).trimmed(), rows_of(batch, [(item + 1) % 4, item]), rows_of(batch, [item, item])):
            found = outputs(model, other)
            at = other.item_ids.index(f"item {item}")
            for name, value in together.items():
                end = {"fused_text": words, "fused_image": places}.get(name)
                ours, theirs = value[item], found[name][at]
                assert torch.allclose(ours[:end], theirs[:end], atol=2e-5), (name, item)


def test_gradients_do_not_depend_on_batch_mates():
    model, batch = model_of(), batch_of([4, 9], [2, 5])
    grads = []
    for some in (batch, rows_of(batch, [0]).trimmed()):
        model.zero_grad()
        model(**some.inputs()).joined()[0, 0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].isfinite().all() and torch.allclose(grads[0], grads[1], atol=1e-5)


def test_whole_image_instead_of_regions_is_a_mask():
    model, batch = model_of(), batch_of([4, 9], [2, 5])
    only = torch.arange(5).expand(2, 5) == 0
    a = model(**replace(batch, region_mask=only).inputs()).joined()
    b = model(**replace(batch, regions=batch.regions[:, :1], boxes=batch.boxes[:, :1], region_mask=only[:, :1]).inputs()).joined()
    assert torch.allclose(a, b, atol=1e-5)


def test_nothing_at_all_still_gives_numbers():
    "An item without a token or a region, as masks say it: the first position counts."
    batch = batch_of([0, 3], [0, 2])
    batch.regions, batch.boxes = batch.regions.nan_to_num(), batch.boxes.nan_to_num()
    assert all(value.isfinite().all() for value in outputs(model_of(), batch).values())


def test_masks_as_integers_and_left_out():
    model, batch = model_of(), batch_of([9, 9], [5, 5])
    a = model(**batch.inputs()).joined()
    b = model(batch.tokens, batch.token_mask.long(), batch.regions, batch.boxes, batch.region_mask.int()).joined()
    assert torch.equal(a, b) and torch.equal(a, model(batch.tokens, None, batch.regions, batch.boxes).joined())


def test_attention_against_the_definition():
    q, k, v, keep = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.rand(2, 4) > 0.3
    keep[:, 0] = True
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = (q[..., part] @ k[..., part].mT / 2).masked_fill(~keep[:, None], -torch.inf).softmax(-1)
        assert torch.allclose(attention_weights(q, k, keep, 2)[:, head], scores, atol=1e-6)
        assert torch.allclose(attend(q, k, v, keep, 2)[..., part], scores @ v[..., part], atol=1e-6)


# --- shapes and variants


@pytest.mark.parametrize("streams", STREAMS)
def test_variants_have_the_outputs_they_should(streams):
    model, batch = model_of(streams=streams), batch_of([4, 9, 2], [2, 5, 1])
    out = model(**batch.inputs())
    text, image = streams != "image", streams != "text"
    assert all((getattr(out, n) is not None) == text for n in ("text_projection", "fused_text", "pooled_text"))
    assert all((getattr(out, n) is not None) == image for n in ("image_projection", "fused_image", "pooled_image"))
    assert out.joined().shape == (3, model.dim) and torch.allclose(out.joined().norm(dim=1), torch.ones(3), atol=1e-5)
    if text:
        assert out.fused_text.shape == (3, 9, TINY.projection)
        assert model.token_logits(out.fused_text).shape == (3, 9, TINY.vocabulary)
    if image:
        rows = 1 if streams == "late" else 5
        assert model.region_predictions(out.fused_image).shape == (3, rows, TINY.region_dim)


@pytest.mark.parametrize("streams", ("dual", "late", "text", "image", "both", "no-co", "single"))
def test_who_sees_whom(streams):
    "Projections never see the other side; pooled outputs do where streams meet."
    model, batch = model_of(streams=streams), batch_of([9, 9], [5, 5])
    other = replace(batch, regions=batch.regions + 1) if streams != "image" else replace(batch, tokens=(batch.tokens + 7) % 300)
    a, b = outputs(model, batch), outputs(model, other)
    own, pooled = ("text_projection", "pooled_text") if streams != "image" else ("image_projection", "pooled_image")
    assert torch.equal(a[own], b[own])
    assert torch.allclose(a[pooled], b[pooled]) == (streams in ("dual", "late", "text", "image"))


def test_a_variant_needs_only_its_own_inputs():
    batch = batch_of([4, 9], [2, 5])
    assert model_of(streams="text")(batch.tokens, batch.token_mask).joined().shape == (2, 32)
    image = model_of(streams="image")(regions=batch.regions, boxes=batch.boxes, region_mask=batch.region_mask)
    assert image.joined().shape == (2, 32)
    with pytest.raises(InputError, match="regions or boxes: missing"):
        model_of()(batch.tokens, batch.token_mask)
    with pytest.raises(InputError, match="tokens: missing"):
        model_of()(regions=batch.regions, boxes=batch.boxes)


def test_every_parameter_gets_a_gradient():
    model, batch = model_of().train(), batch_of([9, 9], [5, 5])
    out = model(**batch.inputs())
    total = sum(value.sum() for value in vars(out).values()) + model.token_logits(out.fused_text).logsumexp(-1).sum()
    (total + model.region_predictions(out.fused_image).pow(2).sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dropout_follows_torchs_generator():
    model, batch = model_of().train(), batch_of([9, 9], [5, 5])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(**batch.inputs()).joined())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_bf16_stays_close():
    model, batch = model_of(), batch_of([9, 4], [5, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(**batch.inputs()).joined()
    assert (low.float() * outputs_joined(model, batch)).sum(1).min() > 0.999


def outputs_joined(model, batch):
    with torch.no_grad():
        return model(**batch.inputs()).joined()


def test_presets():
    released, paper = PRESETS["released"], PRESETS["paper"]
    assert (released.text_layers, released.text_heads, released.text_inner, released.hidden) == (4, 12, 3072, 768)
    assert (released.visual_layers, released.visual_heads, released.visual_inner) == (4, 8, 1024)
    assert (released.co_layers, released.co_hidden, released.co_heads, released.projection) == (4, 512, 8, 512)
    assert (released.fused_layers, released.fused_heads, paper.fused_layers) == (6, 8, 4)
    assert (released.vocabulary, released.tokens, released.regions, released.region_dim) == (21128, 36, 37, 2048)
    assert 38e9 < 3 * count_flops(released) < 40e9
    assert replace(paper, fused_layers=6) == released


# --- batches


def test_trimmed_cuts_what_nobody_uses():
    batch = batch_of([4, 6], [2, 3]).trimmed()
    assert batch.tokens.shape == (2, 6) and batch.regions.shape == (2, 3, TINY.region_dim) and batch.boxes.shape == (2, 3, 5)
    empty = batch_of([0, 0], [0, 0]).trimmed()
    assert empty.tokens.shape == (2, 1) and empty.regions.shape[1] == 1
    words = replace(batch, regions=None, boxes=None, region_mask=None)
    assert words.trimmed().regions is None


def test_by_length_is_a_permutation_with_little_padding():
    lengths = np.random.default_rng(0).integers(4, 73, 1003)
    order = by_length(lengths, 16, seed=3)
    assert sorted(order) == list(range(1003)) and (order == by_length(lengths, 16, seed=3)).all()
    assert not (order == by_length(lengths, 16, seed=4)).all()
    padded = lambda rows: sum(lengths[part].max() * len(part) for part in np.array_split(rows[:992], 62))
    assert padded(order) < 1.1 * lengths[order[:992]].sum() < 0.7 * padded(np.arange(1003))
    both = np.stack([lengths, lengths[::-1]], 1)
    order = by_length(both, 16, seed=3)
    assert sorted(order) == list(range(1003))
    cost = lambda rows: sum(both[part].max(0).sum() * len(part) for part in np.array_split(rows[:992], 62))
    assert cost(order) < 0.75 * cost(np.arange(1003))
    assert len(by_length([], 16)) == 0 and list(by_length([5], 16)) == [0]


def test_check_batch_names_the_item():
    good = batch_of([4, 6], [2, 3])
    assert check_batch(good, TINY) is good  # NaN in padding does not matter
    for value in (float("nan"), float("inf")):
        bad = batch_of([4, 6], [2, 3])
        bad.regions[1, 2, 7] = value
        with pytest.raises(InputError, match="item 1: region 2"):
            check_batch(bad, TINY)
    for number in (-1, TINY.vocabulary):
        bad = batch_of([4, 6], [2, 3])
        bad.tokens[0, 3] = number
        with pytest.raises(InputError, match=f"item 0: token {number} at place 3"):
            check_batch(bad, TINY)


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 37, dtype=torch.long)}, "tokens: shape"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, "tokens: shape"),
        ({"regions": torch.zeros(2, 7, 16)}, r"regions: shape \[2, 7, 16\], expected \[batch, 1 to 6, 16\]"),
        ({"regions": torch.zeros(2, 0, 16)}, "regions: shape"),
        ({"regions": torch.zeros(2, 5, 17)}, "regions: shape"),
        ({"boxes": torch.zeros(2, 5, 4)}, "boxes: shape"),
        ({"token_mask": torch.ones(2, 8)}, "token_mask: shape"),
        ({"region_mask": torch.ones(1, 5)}, "region_mask: shape"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    inputs = {**batch_of([4, 9], [2, 5]).inputs(), **changes}
    with pytest.raises(InputError, match=message):
        model_of()(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": "bth"}, "did you mean 'both'"),
        ({"region_target": "colour"}, "region_target"),
        ({"text_heads": 5}, "not divisible by text_heads"),
        ({"fused_heads": 3}, "not divisible by fused_heads"),
        ({"co_layers": -1}, "co_layers = -1"),
        ({"vocabulary": 0}, "vocabulary = 0"),
        ({"tokens": 65}, "text_positions"),
        ({"fused_positions": 20}, "fused_positions"),
        ({"visual_hidden": 16}, "visual_hidden = 16"),
        ({"hiden": 16}, "did you mean 'hidden'"),
    ],
)
def test_settings_that_cannot_be_built(changes, message):
    with pytest.raises(InputError, match=message):
        capture_config("tiny", **changes)
    with pytest.raises(InputError, match="preset"):
        capture_config("tin")


def test_streams_that_never_meet_may_differ_in_width():
    model = model_of(streams="dual", visual_hidden=16)
    assert model(**batch_of([4], [2]).inputs()).joined().shape == (1, 64)


# --- the release


@pytest.fixture(scope="module", params=["feature_regression", "class_distillation"])
def vectors(request, reference_dir):
    return reference_dir / "capture" / request.param


def test_reference_vectors(vectors):
    found = compare(vectors)
    assert within(found), found


def test_reference_command(reference_dir):
    "One JSON object and exit 0."
    command = [sys.executable, str(Path(__file__).with_name("capture_reference.py"))]
    done = subprocess.run([*command, str(reference_dir / "capture" / "feature_regression")], capture_output=True, text=True)
    wanted = {"max_abs_diff", "loss_abs_diff", "gradient_norm_max_rel_diff"}
    assert done.returncode == 0 and set(json.loads(done.stdout)) >= wanted


def test_reference_comparison_sees_small_faults(vectors, tmp_path, capsys):
    "Exit 1 when one number of one LayerNorm is 0.01 off."
    for file in vectors.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "official_state_dict.safetensors")
    tensors["bert.cross_encoder.transformer.resblocks.1.ln_1.weight"][3] += 0.01
    save_file(tensors, tmp_path / "official_state_dict.safetensors")
    assert main([str(tmp_path)]) == 1 and main([str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_official_there_and_back(vectors):
    "Also the parameters that the release never uses."
    given = load_file(vectors / "official_state_dict.safetensors")
    back = CaptureModel.from_official(vectors).to_official()
    assert set(back) == set(given) and all(torch.equal(back[name], given[name]) for name in given)


@pytest.mark.parametrize("streams", STREAMS)
def test_ours_to_official_and_back(streams, tmp_path):
    model, batch = model_of(streams=streams), batch_of([4, 9], [2, 5])
    model.to_official(tmp_path / "official")
    again = CaptureModel.from_official(tmp_path / "official", streams=streams, regions=TINY.regions).eval()
    assert torch.equal(again(**batch.inputs()).joined(), model(**batch.inputs()).joined())


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_the_releases_bin_files(wrapper, tmp_path):
    "The highest number counts; names may begin with module."
    old, new = model_of(seed=1), model_of(seed=2)
    for number, model in ((2, old), (10, new)):
        tensors = {f"module.{name}": tensor for name, tensor in model.to_official().items()}
        torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / f"pytorch_model_{number}.bin")
    heads = {"text_heads": 2, "visual_heads": 2, "co_heads": 2, "fused_heads": 2, "regions": 6}
    for source in (tmp_path, tmp_path / "pytorch_model_10.bin"):
        read = CaptureModel.from_official(source, **heads).eval()
        batch = batch_of([4, 9], [2, 5])
        assert torch.equal(read(**batch.inputs()).joined(), new(**batch.inputs()).joined())


def test_a_bin_file_that_would_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"bert.x": Trap()}, tmp_path / "pytorch_model_1.bin")
    with pytest.raises(InputError, match="not a readable torch file"):
        CaptureModel.from_official(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_checkpoint(kind, tmp_path):
    file = tmp_path / f"pytorch_model_0.{kind}"
    save_file(model_of().to_official(), file) if kind == "safetensors" else torch.save(model_of().to_official(), file)
    for share in (0.0, 0.3, 0.99):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(InputError, match=rf"cut\.{kind}"):
            CaptureModel.from_official(cut)


def test_checkpoints_of_another_configuration(tmp_path):
    tensors = model_of().to_official()
    save = lambda changed: (save_file(changed, tmp_path / "a.safetensors"), tmp_path / "a.safetensors")[1]
    missing = {name: t for name, t in tensors.items() if "resblocks.0.mlp" not in name}
    with pytest.raises(InputError, match=r"a\.safetensors: 4 of \d+ parameters are missing"):
        CaptureModel.from_official(save(missing), TINY)
    for changes in ({"hidden": 64, "visual_hidden": 64}, {"vocabulary": 400}, {"region_dim": 17}, {"projection": 16}):
        with pytest.raises(InputError, match="the configuration expects"):
            CaptureModel.from_official(save(tensors), replace(TINY, **changes))
    with pytest.raises(InputError, match="missing"):
        CaptureModel.from_official(save(tensors), replace(TINY, fused_layers=2))
    deeper = model_of(fused_layers=2).to_official()
    with pytest.raises(InputError, match="beyond the configuration"):
        CaptureModel.from_official(save(deeper), TINY)
    untied = {**tensors, "cls.predictions.decoder.weight": tensors["cls.predictions.decoder.weight"] + 1}
    with pytest.raises(InputError, match="ties"):
        CaptureModel.from_official(save(untied), TINY)
    with pytest.raises(InputError, match="none of 1 tensors"):
        CaptureModel.from_official(save({"conv.weight": torch.zeros(2)}))


def test_places_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="holds no official_state_dict"):
        CaptureModel.from_official(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        CaptureModel.from_official(tmp_path / "nowhere.bin")


def test_configuration_from_shapes():
    config = capture_config("tiny", text_layers=2, fused_layers=3, region_target="classes", region_classes=11)
    heads = {"text_heads": 2, "visual_heads": 2, "co_heads": 2, "fused_heads": 2}
    assert config_from_shapes(CaptureModel(config).to_official(), **heads, regions=6) == config


# --- BERT, saving, looking inside


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)).eval()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("layers", [1, 3])
def test_text_stream_from_bert(bert, layers):
    folder, theirs = bert
    model, batch = model_of(text_layers=layers).start_from_bert(folder), batch_of([4, 9], [2, 5])
    with torch.no_grad():
        found = model.text(batch.tokens, batch.token_mask)
        states = theirs.bert(batch.tokens, batch.token_mask.long(), output_hidden_states=True).hidden_states
    assert torch.allclose(found[batch.token_mask], states[layers][batch.token_mask], atol=1e-5)
    assert model.config.weights.startswith("text stream: ") and "random" in model_of().config.weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_layers": 4}, "missing"),
        ({"vocabulary": 400}, "the configuration expects"),
        ({"text_inner": 32}, "the configuration expects"),
        ({"text_heads": 4}, "num_attention_heads"),
        ({"streams": "image"}, "reads no captions"),
    ],
)
def test_a_bert_that_does_not_fit(bert, changes, message):
    with pytest.raises(InputError, match=message):
        model_of(**changes).start_from_bert(bert[0])


def test_no_bert(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"config\.json"):
        model_of().start_from_bert(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        model_of().start_from_bert(tmp_path / "nowhere")


@pytest.mark.parametrize("streams", ("both", "late", "text"))
def test_save_and_load(streams, tmp_path):
    model, batch = model_of(streams=streams, region_target="classes", region_classes=7), batch_of([4, 9], [2, 5])
    model.save_pretrained(tmp_path / "model")
    for again in (CaptureModel.from_pretrained(tmp_path / "model"), load_encoder(tmp_path / "model")):
        assert isinstance(again, CaptureModel) and again.config == model.config
        assert torch.equal(again.eval()(**batch.inputs()).joined(), model(**batch.inputs()).joined())


def test_saved_models_that_are_broken(tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, message in (({"hiden": 3}, "hiden"), ({"text_heads": 5}, "text_heads"), ({"fused_layers": 2}, "missing")):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(InputError, match=message):
            CaptureModel.from_pretrained(tmp_path / "model")


def test_word_to_region():
    model, batch = model_of(co_layers=2).train(), batch_of([4, 9], [2, 5])
    maps = word_to_region(model, batch)
    assert maps.shape == (2, 2, 2, 9, 5) and model.training and not maps.requires_grad
    assert torch.allclose(maps.sum(-1), torch.ones(1), atol=1e-5) and (maps[:, 0, :, :, 2:] == 0).all()
    assert not any(layer._forward_pre_hooks for layer in model.co)
    with pytest.raises(InputError, match="no co-attention"):
        word_to_region(model_of(streams="dual"), batch)
