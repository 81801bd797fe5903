"Resume is exact: whenever a run is killed, the one that goes on ends with the same bits and the same log."

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import training_toy
from safetensors.torch import load_file
from training_toy import in_child

from product_retrieval.training import checkpoints, fit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start twenty runs in seconds")
KILLS = 20


def toy_run(folder: Path) -> None:
    "The whole run, or what is left of it."
    model, objective, batches, validate = training_toy.parts()
    fit(model, objective, batches, training_toy.config(), folder, validate)


def kill_at(call: int) -> None:
    "End this process by SIGKILL when Python makes its `call`-th function call: in a batch, a loss, a half-written file."
    left = [call]

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def killed_run(folder: Path, call: int) -> None:
    kill_at(call)
    toy_run(folder)


def count_calls(folder: Path, result: Path) -> None:
    "How many function calls a whole run makes."
    total = [0]

    def count(frame, event, argument):
        total[0] += event in ("call", "c_call")

    sys.setprofile(count)
    toy_run(folder)
    sys.setprofile(None)
    result.write_text(str(total[0]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed, and its number of function calls."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    toy_run(folder / "first")  # so that everything is imported before the first fork, and calls can be compared
    assert in_child(count_calls, folder / "run", folder / "calls") == 0
    yield folder / "run", int((folder / "calls").read_text())
    torch.set_num_threads(threads)


def same(first: Path, second: Path) -> None:
    "Weights, state of the objective, optimizer and average, and both logs."
    for name in ("train.csv", "validation.csv"):
        assert (first / name).read_text() == (second / name).read_text(), name
    names = [p.relative_to(first) for p in first.rglob("*.safetensors")]
    assert len(names) == 5 and sorted(names) == sorted(p.relative_to(second) for p in second.rglob("*.safetensors"))
    for name in names:
        one, two = load_file(first / name), load_file(second / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_the_same_run_twice_gives_the_same_bits(whole, tmp_path):
    assert in_child(toy_run, tmp_path / "again") == 0
    same(whole[0], tmp_path / "again")


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_anywhere(whole, tmp_path, number):
    chance, calls = random.Random(number), whole[1]
    call = int(0.96 * calls * (number + chance.random()) / KILLS)  # spread over the run, random inside each part
    assert in_child(killed_run, tmp_path / "run", call) == -signal.SIGKILL
    for folder in checkpoints(tmp_path / "run"):
        for path in folder.glob("*.safetensors"):
            load_file(path)  # whatever is there is whole
    assert in_child(toy_run, tmp_path / "run") == 0
    same(whole[0], tmp_path / "run")
    left = [p.name for p in tmp_path.rglob("*.part*")]
    assert not left, left


def test_killed_again_and_again(whole, tmp_path):
    "A run that never gets far still arrives, with the same bits."
    chance, tries = random.Random(7), 0
    while in_child(killed_run, tmp_path / "run", int(whole[1] * chance.uniform(0.3, 0.7))):
        tries += 1
        assert tries < 20
    same(whole[0], tmp_path / "run")
    assert tries >= 2


def test_killed_by_the_clock(whole, tmp_path):
    "Also while no Python code runs: from outside, at a random time."
    start = time.perf_counter()
    child = os.fork()
    if not child:
        toy_run(tmp_path / "run")
        os._exit(0)
    while not checkpoints(tmp_path / "run") and time.perf_counter() - start < 30:
        time.sleep(0.01)
    time.sleep(random.Random(1).uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert in_child(toy_run, tmp_path / "run") == 0
    same(whole[0], tmp_path / "run")
