"""Everything that `make test` promises, step by step, each timed. The first failure stops the run.

    python nbs/_tools/test_all.py [STEP ...]     steps: export clean lint notebooks pytest wheel
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
tools = Path(__file__).resolve().parent
bin_dir = Path(sys.executable).parent


def run(*command: str | Path, **variables: str) -> None:
    "Run a command in the repository; a failure ends everything with one line."
    calm = {"OMP_WAIT_POLICY": "passive"}  # threads that wait sleep: on a machine with other work, spinning costs minutes
    environment = {**calm, **os.environ, **variables, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    if subprocess.run([str(c) for c in command], cwd=root, env=environment).returncode:
        sys.exit(f"make test: failed: {' '.join(str(c) for c in command)}")


def state() -> dict[str, str]:
    "A hash of every notebook and every module."
    files = [*root.glob("nbs/*.ipynb"), *root.glob("product_retrieval/**/*.py")]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def leaves_no_difference(command: str) -> None:
    "Run an nbdev command; the files must be the same afterwards."
    before = state()
    run(bin_dir / command)
    after = state()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        sys.exit(f"make test: {command} changed {', '.join(changed)}; run it and commit what it writes")


def test_export() -> None:
    leaves_no_difference("nbdev_export")


def test_clean() -> None:
    leaves_no_difference("nbdev_clean")


def test_lint() -> None:
    config = tools / "ruff.toml"
    run(bin_dir / "ruff", "check", "--config", config, "product_retrieval", "tests", "benchmarks", tools, "setup.py")


def test_notebooks() -> None:
    run(sys.executable, tools / "run_notebooks.py", "--check", "--limit", "180", QUICK="1")  # 60 s on a quiet machine


def test_pytest() -> None:
    run(sys.executable, "-m", "pytest", "tests", "--durations=15")


def test_wheel() -> None:
    "Build the wheel, put it and what it declares to need into a new environment, and use it there."
    shutil.rmtree(root / "build", ignore_errors=True)
    try:  # beside the environment's own files, so that they can be linked
        run(sys.executable, "-m", "build", "--wheel", "--outdir", root / "build" / "wheel")
        wheel = next((root / "build" / "wheel").glob("*.whl"))
        run(sys.executable, tools / "clean_env.py", wheel, root / "build" / "venv")
        run(root / "build" / "venv" / "bin" / "python", tools / "check_wheel.py", wheel)
    finally:
        shutil.rmtree(root / "build", ignore_errors=True)


STEPS = {
    "export": (test_export, "nbdev_export leaves no difference"),
    "clean": (test_clean, "nbdev_clean leaves no difference"),
    "lint": (test_lint, "ruff"),
    "notebooks": (test_notebooks, "every notebook runs, QUICK=1"),
    "pytest": (test_pytest, "tests: notebooks' health, site filter, README, package, command line"),
    "wheel": (test_wheel, "the wheel in a clean environment, without the dev extra"),
}


def main() -> None:
    "Run the steps asked for, or all, and say how long each took."
    names = sys.argv[1:] or list(STEPS)
    unknown = [n for n in names if n not in STEPS]
    if unknown:
        sys.exit(f"unknown step {unknown[0]!r}; steps: {' '.join(STEPS)}")
    times = []
    for name in names:
        function, what = STEPS[name]
        print(f"== {name}: {what}", flush=True)
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start, name))
    print("\nAll passed. Slowest first:")
    for seconds, name in sorted(times, reverse=True):
        print(f"  {seconds:7.1f} s  {name}")


if __name__ == "__main__":
    main()
