"""What several test files share: real data when it is there, a skip with a reason when it is not, a small shelf."""

import os
import signal
from pathlib import Path

import pytest

repository = Path(__file__).resolve().parents[1]


def pytest_configure():
    "A shell that starts the tests in the background makes them ignore Ctrl-C, and every child of theirs; undo that."
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "A cache folder of the session's own, unless the caller names one."
    if "PRODUCT_RETRIEVAL_CACHE" not in os.environ:
        os.environ["PRODUCT_RETRIEVAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def one_thread():
    "Small tensors gain nothing from threads, and sums in another order differ in the last digit."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def beside(variable: str, kind: str, name: str) -> Path:
    "A file or folder from the place that the environment names, else from ../shared; skips when it is nowhere."
    places = [Path(os.environ[variable])] if os.environ.get(variable) else []
    places.append(repository.parent / "shared" / kind)
    for place in places:
        if (place / name).exists():
            return place / name
    pytest.skip(f"{name} is not here: set {variable} to the folder that holds it")


@pytest.fixture(scope="session")
def grocery() -> Path:
    "The Grocery Store photos, 160 px."
    return beside("PRODUCT_RETRIEVAL_DATA", "data", "grocery160")


@pytest.fixture(scope="session")
def fruit() -> Path:
    "Photos with several fruits and their boxes."
    return beside("PRODUCT_RETRIEVAL_DATA", "data", "fruit_boxes")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    "ImageNet weights of MobileNetV2."
    return beside("PRODUCT_RETRIEVAL_WEIGHTS", "weights", "mobilenetv2_100_imagenet.safetensors")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    "Reference vectors of the papers' released code."
    return beside("PRODUCT_RETRIEVAL_REFERENCE", "reference", "product1m_evaluation").parent


@pytest.fixture(scope="session")
def tiny_shelf():
    "The tiny shelf as a Catalog, drawn once a session."
    from product_retrieval.data.shelf import load_shelf

    return load_shelf("tiny", seed=0)
