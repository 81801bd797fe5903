"Two processes give the loss curve of one with the same global batch."

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_toy
from safetensors.torch import load_file

from product_retrieval.core import read_json
from product_retrieval.training import checkpoints, read_log

TOLERANCE = 1e-5  # relative for the curve, absolute for weights; seen: 2e-7 for both (float32 sums in another order)


def launch(command: list[str], folder: Path) -> str:
    "Run the toy script under a launcher; what it said on the error stream."
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command, training_toy.__file__, str(folder)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The run in a single process."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield training_toy.without_dropout(tmp_path_factory.mktemp("one")).folder
    torch.set_num_threads(threads)


def compare(one: Path, two: Path) -> tuple[float, float]:
    "Largest relative difference of the curve (loss and gradient norm), largest difference of a weight."
    first, second = read_log(one / "train.csv"), read_log(two / "train.csv")
    assert list(first.index) == list(second.index) == list(range(1, 13))
    columns = ["loss", "gradient_norm", "learning_rate"]
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    weights = max(float((a[key] - b[key]).abs().max()) for key in a)
    return float((first[columns] / second[columns] - 1).abs().max().max()), weights


def processes(folder: Path) -> int:
    return read_json(checkpoints(folder)[-1] / "state.json")["processes"]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"]


def free_port() -> str:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes(one, tmp_path, launcher):
    launch(launcher + [free_port()] * (launcher is ACCELERATE), tmp_path)
    assert processes(one) == 1 and processes(tmp_path) == 2
    curve, weights = compare(one, tmp_path)
    print(f"two processes against one: loss curve {curve:.1e} relative, weights {weights:.1e}")
    assert curve < TOLERANCE and weights < TOLERANCE
    assert (one / "validation.csv").read_text() == (tmp_path / "validation.csv").read_text()


def test_accelerate_launch_for_cpus(one, tmp_path):
    "Without mpirun, Accelerate 1.15 starts one process, whatever number is asked for: same curve, and the run says so."
    said = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "2"], tmp_path)
    curve, weights = compare(one, tmp_path)
    assert curve < TOLERANCE and weights < TOLERANCE
    assert processes(tmp_path) == 2 or "one process only" in said
