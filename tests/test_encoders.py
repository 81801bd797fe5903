"""Encoders: what chapter 4a cannot tell - oracles, bad input, offline machines, round trips."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from product_retrieval import encoders
from product_retrieval.core import InputError
from product_retrieval.data.pictures import Batch
from product_retrieval.encoders import (
    ColorHistogram,
    EncoderConfig,
    HubLayout,
    ImageEncoder,
    OpenClipConfig,
    OpenClipEncoder,
    RawPixels,
    TitleWords,
    count_colors,
    encode_titles,
    image_encoder,
    load_encoder,
    open_clip_encoder,
    rgb_to_hsv,
    unit,
    weights_convention,
    words,
)

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def batch():
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, ["Blue lipstick 5ml", "shampoo", "红口红"], ["a", "b", "c"], torch.arange(3))


def everything():
    torch.manual_seed(0)
    yield ColorHistogram()
    yield ColorHistogram(space="lab", bins=(3, 4, 5), grid=2, size=32)
    yield RawPixels(side=4)
    yield TitleWords().fit(["blue lipstick", "shampoo"])
    yield ImageEncoder(EncoderConfig("resnet10t", size=32, dim=8, neck=True, pool="gem"))
    yield ImageEncoder(EncoderConfig("vit_tiny_patch16_224", size=32, pool="avg", backbone_args={"img_size": 32}))
    yield ImageEncoder(EncoderConfig("convnext_atto", size=32, pool="max", dim=4))
    yield OpenClipEncoder(OpenClipConfig("tiny", architecture=TOWERS, size=32))
    yield OpenClipEncoder(OpenClipConfig("tiny", architecture=TOWERS, size=32, reads="text"))


@pytest.mark.parametrize("encoder", everything(), ids=lambda e: f"{type(e).__name__}-{e.dim}")
def test_round_trip_gives_identical_vectors(encoder, batch, tmp_path):
    vectors = encoder(batch)
    assert vectors.shape == (3, encoder.dim) and vectors.dtype == torch.float32 and not vectors.requires_grad
    folder = encoder.save_pretrained(tmp_path / "model", card="Trained on nothing.")
    again = load_encoder(folder)
    assert type(again) is type(encoder) and torch.equal(again(batch), vectors)
    assert again.name == encoder.name and again.size == encoder.size
    assert again.settings() == encoder.settings()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "Trained on nothing." in card
    assert type(encoder).from_pretrained(folder).dim == encoder.dim


def test_vectors_have_length_one_and_zero_stays_zero(batch):
    for encoder in everything():
        lengths = encoder(batch).norm(dim=1)
        assert torch.all(torch.isclose(lengths, torch.ones(3), atol=1e-5) | (lengths == 0)), encoder.name
    assert unit(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_a_grey_picture_is_no_trouble():
    for value in (0.0, 0.5, 1.0):
        flat = Batch(torch.full((1, 3, 16, 16), value), ["x"], ["x"], torch.zeros(1, dtype=torch.long))
        for encoder in (ColorHistogram(), ColorHistogram(space="lab"), RawPixels()):
            assert torch.isfinite(encoder(flat)).all()


def test_histogram_counts_like_numpy(batch):
    bins = (4, 3, 5)
    ours = count_colors(batch.pixels, bins)
    for picture, shares in zip(batch.pixels, ours, strict=True):
        points = picture.flatten(1).T.numpy()
        theirs, _ = np.histogramdd(points, bins=bins, range=[(0, 1)] * 3)
        assert np.allclose(shares.numpy(), theirs.ravel() / len(points), atol=1e-6)


def test_grid_adds_up_to_the_whole(batch):
    whole, cells = count_colors(batch.pixels, (2, 2, 2)), count_colors(batch.pixels, (2, 2, 2), grid=3)
    assert torch.allclose(cells.view(3, 9, 8).sum(1), whole, atol=1e-6)


def test_hue_wraps_around():
    nearly = torch.tensor([[1.0, 0.0, 0.01], [1.0, 0.01, 0.0]]).T.reshape(1, 3, 1, 2)
    hue = rgb_to_hsv(nearly)[0, 0, 0]
    assert hue[0] > 0.99 and hue[1] < 0.01


def test_words_of_several_scripts():
    assert words("L'Oréal no_5  100ML") == ["l", "oréal", "no", "5", "100ml"]
    assert words("兰蔻 口红 red") == ["兰", "蔻", "口", "红", "red"]
    assert words("") == []


def test_title_words_need_titles():
    with pytest.raises(InputError, match="fit"):
        TitleWords()(Batch(torch.empty(1, 3, 0, 0), ["x"], ["x"], torch.zeros(1)))
    with pytest.raises(InputError, match="no word"):
        TitleWords().fit(["", "!"])


def test_title_words_keep_the_most_frequent():
    fitted = TitleWords(max_words=2).fit(["a b", "a b", "a c"])
    assert fitted.vocabulary == ["a", "b"]


def test_training_view_carries_gradients(batch):
    model = ImageEncoder(EncoderConfig("resnet10t", size=32, dim=8)).train()
    model(batch.pixels).sum().backward()
    assert model.head[0].weight.grad is not None
    model(batch)
    assert model.training, "embedding a batch leaves the mode as it was"


def test_embedding_does_not_touch_batch_norm(batch):
    model = ImageEncoder(EncoderConfig("resnet10t", size=32)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- names and weights -------------------------------------------------------------------------------------------


def test_unknown_names_offer_the_nearest():
    for call, near in (
        (lambda: load_encoder("resnet81"), "resnet18"),
        (lambda: load_encoder("colour-histogram"), "color-histogram"),
        (lambda: load_encoder("open_clip:ViT-B-33/openai"), "ViT-B-32"),
        (lambda: load_encoder("open_clip:ViT-B-32/laion"), "laion"),
        (lambda: load_encoder("resnet10t", weights="random", sise=64), "size"),
        (lambda: ColorHistogram(space="hvs"), "hsv"),
        (lambda: EncoderConfig("resnet10t", pool="gemm"), "gem"),
        (lambda: OpenClipConfig("ViT-B-32", reads="texts"), "text"),
    ):
        with pytest.raises(InputError, match=f"'{near}"):
            call()


def test_offline_names_the_file_to_put_where(tmp_path):
    program = """
from product_retrieval.core import InputError
from product_retrieval.encoders import load_encoder
for name in ("resnet18", "open_clip:ViT-B-32/laion2b_s34b_b79k", "nobody/nothing"):
    try:
        load_encoder(name)
    except InputError as error:
        print(error)
    else:
        raise SystemExit("no error for " + name)
"""
    environment = {**os.environ, "PRODUCT_RETRIEVAL_CACHE": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "model.safetensors" in lines[0] and str(tmp_path / "weights" / "resnet18.safetensors") in lines[0]
    assert "open_clip-ViT-B-32-laion2b_s34b_b79k.safetensors" in lines[1] and "https://huggingface.co/nobody/nothing" in lines[2]


def test_a_file_in_our_cache_is_found(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(encoders, "cache_dir", lambda: tmp_path)
    network = ImageEncoder(EncoderConfig("resnet10t", size=32))
    (tmp_path / "weights").mkdir()
    tensors = {k.removeprefix("backbone."): v for k, v in network.tensors().items()}
    save_file({**tensors, "fc.weight": torch.zeros(7, 512)}, tmp_path / "weights" / "resnet10t.safetensors")
    loaded = load_encoder("resnet10t", size=32)
    assert torch.equal(loaded(batch), network(batch)) and loaded.config.weights == "timm/resnet10t"


def test_weights_files_that_cannot_be_used(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"cos\nsystem\n")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00")
    for name, said in (("none.safetensors", "no such"), ("weights.pth", "safetensors"), ("broken.safetensors", "readable")):
        with pytest.raises(InputError, match=said) as error:
            load_encoder("resnet10t", weights=tmp_path / name)
        assert name in str(error.value)


def test_weights_of_another_backbone_name_the_first_keys(tmp_path):
    other = ImageEncoder(EncoderConfig("convnext_atto", size=32))
    save_file(other.tensors(), tmp_path / "convnext.safetensors")
    with pytest.raises(InputError, match=r"head\.norm\.bias") as error:
        load_encoder("resnet10t", weights=tmp_path / "convnext.safetensors")
    assert "resnet10t" in str(error.value) and "conv1.0.weight" in str(error.value)


def test_weights_of_another_width_name_the_shape(mobilenet_weights):
    with pytest.raises(InputError, match=r"conv_stem.weight: \[32, 3, 3, 3\] where \[48, 3, 3, 3\]"):
        load_encoder("mobilenetv2_140", weights=mobilenet_weights)
    with pytest.raises(InputError, match="resnet18"):
        load_encoder("resnet18", weights=mobilenet_weights)


def test_the_convention_of_tensorflow_weights(mobilenet_weights):
    raw = load_file(mobilenet_weights)
    assert weights_convention(raw)["backbone_args"] == {"pad_type": "same"}
    usual = {**raw, "classifier.weight": torch.zeros(1000, 1280), "classifier.bias": torch.zeros(1000)}
    assert weights_convention(usual) == {}
    encoder = load_encoder("mobilenetv2_100", weights=mobilenet_weights, size=64)
    assert encoder.config.mean == (0.5,) * 3 and encoder.config.weights == mobilenet_weights.name
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_pictures_of_one_fruit_are_near_each_other(mobilenet_weights, grocery):
    "Weights and preprocessing belong together: a small sample of real photos."
    from product_retrieval.data.datasets import grocery_catalog
    from product_retrieval.encoders import vectors_of

    photos = grocery_catalog(grocery, verify=False)
    rows = np.flatnonzero(photos.frame["split"] == "train")[::30]
    some = photos.select(rows.tolist())
    encoder = load_encoder("mobilenetv2_100", weights=mobilenet_weights, size=128)
    vectors = vectors_of(encoder, some, workers=0)
    similar = vectors @ vectors.T - 2 * np.eye(len(vectors))
    coarse = some.categories()
    right = np.mean([coarse[i] == coarse[j] for i, j in enumerate(similar.argmax(1))])
    assert right > 0.2, right  # by chance about 0.03


# ---- folders and the Hub -----------------------------------------------------------------------------------------


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="choose another folder"):
        RawPixels().save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_saved_encoder_is_replaced_whole(tmp_path):
    ImageEncoder(EncoderConfig("resnet10t", size=32)).save_pretrained(tmp_path / "model")
    RawPixels().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists() and load_encoder(tmp_path / "model").name == "raw pixels"


class Elsewhere(HubLayout):
    "An encoder of another package, with a file of its own."

    name, dim, size = "elsewhere", 1, 0

    def __init__(self, word):
        self.word = word

    def settings(self):
        return {}

    def tensors(self):
        return {}

    def write_files(self, folder):
        (folder / "tokenizer.json").write_text(json.dumps(self.word))

    @classmethod
    def read_files(cls, folder):
        return {"word": json.loads((folder / "tokenizer.json").read_text())}

    @classmethod
    def rebuild(cls, settings, tensors):
        return cls(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "Sorcery"}, "no encoder of ours"),
        ({"format": 2}, "newer version"),
        ({"bakbone": "resnet18"}, "backbone"),
        ({"dim": 16}, "do not fit"),
        ({"dim": "many"}, r"config\.json"),
        ({"encoder": ["ImageEncoder"]}, "no encoder of ours"),
    ],
)
def test_broken_folders(tmp_path, change, message):
    folder = ImageEncoder(EncoderConfig("resnet10t", size=32, dim=8)).save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load_encoder(folder)


def test_config_that_is_a_list(tmp_path):
    folder = RawPixels().save_pretrained(tmp_path / "model")
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json.*expected a dict"):
        load_encoder(folder)


def test_weights_beside_a_baseline():
    with pytest.raises(InputError, match="color-histogram has no weights"):
        load_encoder("color-histogram", weights="some.safetensors")


def test_kinds_that_other_packages_register(tmp_path, monkeypatch):
    from importlib import metadata

    entry = metadata.EntryPoint("Elsewhere", f"{__name__}:Elsewhere", "product_retrieval.encoders")
    plain = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **asked: [entry] if asked else plain())
    again = load_encoder(Elsewhere("a secret").save_pretrained(tmp_path / "model"))
    assert isinstance(again, Elsewhere) and again.word == "a secret"


def test_missing_weights_and_folders(tmp_path):
    folder = ImageEncoder(EncoderConfig("resnet10t", size=32)).save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_encoder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        load_encoder(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        HubLayout.from_pretrained(tmp_path / "nowhere")


def test_from_pretrained_of_another_class(tmp_path):
    RawPixels().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="RawPixels, not a ImageEncoder"):
        ImageEncoder.from_pretrained(tmp_path / "model")


def test_publishing_uploads_the_whole_folder(monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repository, private, exist_ok):
            seen.update(repository=repository, private=private)
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, repo_id, folder_path):
            seen["files"] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = ImageEncoder(EncoderConfig("resnet10t", size=32)).push_to_hub("me/mine", token="secret")
    assert address == "https://huggingface.co/me/mine" and seen["private"] is True and seen["token"] == "secret"
    assert seen["files"] == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("files", ["tokenizer.json", [1], ["../secret"], ["/etc/passwd"], [""]])
def test_a_model_names_no_files_outside_its_folder(tmp_path, monkeypatch, files):
    from product_retrieval import encoders

    folder = RawPixels().save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "files": files}))
    monkeypatch.setattr(encoders, "hub_file", lambda name, file, advice, revision=None: folder / file)
    with pytest.raises(InputError, match="inside the folder"):
        HubLayout.from_pretrained("someone/model")


# ---- open_clip ---------------------------------------------------------------------------------------------------


def test_both_towers_live_in_one_space(batch):
    pictures = open_clip_encoder("tiny", weights="random", architecture=TOWERS, size=32)
    titles = encode_titles(pictures, batch.titles)
    assert pictures(batch).shape == titles.shape == (3, 16)
    pictures.config.reads = "text"
    assert torch.equal(pictures(batch), titles)


def test_clip_weights_from_a_local_file(tmp_path, batch, monkeypatch):
    import open_clip

    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(TOWERS)))
    source = open_clip_encoder("tiny", weights="random", size=32)
    assert source.config.size == 32
    save_file({k.removeprefix("clip."): v for k, v in source.tensors().items()}, tmp_path / "clip.safetensors")
    loaded = load_encoder("open_clip:tiny", weights=tmp_path / "clip.safetensors")
    assert torch.equal(loaded(batch), source(batch))


def test_reading_a_clip_model_without_weights_is_refused():
    with pytest.raises(InputError, match="pretrained tag None"):
        load_encoder("open_clip:ViT-B-32")


def test_random_weights_only_by_that_word():
    assert image_encoder("resnet10t", "random").config.weights == "random"


def test_mirrored_asks_twice_and_does_not_mind_a_mirror():
    from product_retrieval.encoders import Mirrored

    encoder = image_encoder("resnet10t", "random", size=32)
    both, pixels = Mirrored(encoder), torch.rand(3, 3, 32, 32)
    batch, flipped = (Batch(p, [""] * 3, ["a", "b", "c"], torch.arange(3)) for p in (pixels, pixels.flip(-1)))
    torch.testing.assert_close(both(batch), unit(encoder(batch) + encoder(flipped)))
    torch.testing.assert_close(both(batch), both(flipped))
    assert both.dim == encoder.dim and torch.allclose(both(batch).norm(dim=1), torch.ones(3))
