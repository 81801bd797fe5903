"""The package as a whole: floors, imports, README, repository hygiene, and the command line typed wrongly."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

repository = Path(__file__).resolve().parents[1]
package = repository / "product_retrieval"


def floors() -> dict[str, int]:
    "Module -> floor, read from the table in CONTRIBUTING.md, so that table and code cannot disagree."
    found = {}
    rows = re.findall(r"(?m)^\| (ground|\d+) \| (.*) \|$", (repository / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for floor, modules in rows:
        for name in re.findall(r"`([\w.]+)`", modules):
            found[name] = -1 if floor == "ground" else int(floor)
    return found


def modules() -> list[Path]:
    return sorted(p for p in package.rglob("*.py") if not p.name.startswith("_"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(package).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    "Modules of the package that a module imports, at the top or inside functions."
    found = set()
    here = name_of(path).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            full = ".".join(part for part in (base, node.module or "") if part)
            full = full.removeprefix("product_retrieval").strip(".") if not node.level else full
            if node.level or (node.module or "").startswith("product_retrieval"):
                found |= {full} if full in floors() else {f"{full}.{a.name}".strip(".") for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("product_retrieval.") for a in node.names if a.name.startswith("product_retrieval.")}
    return {name for name in found if name and name not in ("__version__", "data")}


def test_every_module_has_a_floor():
    assert {name_of(p) for p in modules()} == set(floors())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_only_from_floors_below(path):
    floor, here = floors(), name_of(path)
    for other in imported(path):
        if other in floor:
            assert floor[other] < floor[here], f"{here} (floor {floor[here]}) imports {other} (floor {floor[other]})"
        assert other != "teaching", f"{here}: teaching is for chapters"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_public_names_have_docstrings_and_types(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            untyped = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
            assert not untyped, f"{path.name}: {node.name} has untyped parameters {untyped}"


def test_light_imports():
    "Tables, metrics and the command line load without torch."
    names = "product_retrieval, product_retrieval.cli, product_retrieval.data.catalog, product_retrieval.evaluation"
    code = f"import sys, {names}; print([m for m in ('torch', 'faiss', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled():
    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\.load|allow_pickle=True|weights_only=False|joblib\.load", text), path.name
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_readme_python(tmp_path):
    "The README's example runs as it stands."
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "MAR@10" in done.stdout


def test_readme_links_and_commands():
    text = (repository / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (repository / target).exists(), target
    targets = set(re.findall(r"(?m)^([a-z-]+):", (repository / "Makefile").read_text(encoding="utf-8")))
    assert set(re.findall(r"`?make ([a-z]+)`?", text)) - {"alone"} <= targets


def test_no_paths_of_this_machine():
    for path in [*modules(), *(repository / "nbs").glob("*.ipynb"), *repository.glob("*.md")]:
        assert str(repository) not in path.read_text(encoding="utf-8"), path


def command(*arguments, **variables):
    code = "from product_retrieval.cli import main; main()"
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("catalog", "check", "nowhere.csv"),
        ("catalog", "describe", "nowhere"),
        ("demo", "--data", "nowhere", "--out", "OUT"),
        ("demo", "--size", "smal", "--out", "OUT"),
        ("demo", "--seed", "many", "--out", "OUT"),
        ("datasets", "get", "grocer", "--out", "OUT"),
        ("shelf", "--size", "huge", "--out", "OUT"),
        ("train", "first", "nowhere", "--out", "OUT"),
        ("embed", "nowhere", "--model", "color_histogram", "--out", "OUT"),
        ("index", "nowhere", "--out", "OUT"),
        ("search", "nowhere", "--model", "color_histogram", "--image", "a.jpg"),
        ("evaluate", "product1m", "--ground-truth", "nowhere", "--ranking", "nothing"),
        ("evaluate", "eproduct", "--ground-truth", "nowhere", "--ranking", "nothing"),
        ("evaluate", "run", "nowhere"),
        ("evaluat",),
        ("index", "nowhere", "--out", "OUT", "--memory", "nan"),
        ("demo", "--out", "."),
    ],
    ids=" ".join,
)
def test_nonsense_gets_one_line_and_exit_2(arguments, tmp_path):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    done = command(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("product-retrieval: ") and len(lines[0]) > 40, done.stderr


def test_ctrl_c_says_one_line(tmp_path):
    import signal
    import time

    code = "from product_retrieval.cli import main; main()"
    environment = {**os.environ, "QUICK": "1"}
    arguments = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process.stdout.readline()  # the catalogue is being drawn
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(errors.strip().splitlines()) == 1 and errors.startswith("product-retrieval: "), errors
    assert not (tmp_path / "out").exists()


def test_no_arguments_print_help():
    done = command()
    assert done.returncode == 2 and "Usage" in done.stdout and not done.stderr
    assert "grocery" in command("datasets").stdout


def test_doctor_and_version():
    assert json.loads(command("doctor", "--json").stdout)["device"].startswith("auto = ")
    assert re.search(r"\d+\.\d+\.\d+", command("--version").stdout)
