"""Runs in an environment that holds only the wheel: what a practitioner gets with `pip install product_retrieval`."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

LIMITS = {"import product_retrieval": 0.5, "product-retrieval --help": 1.0}  # seconds, best of three


def fastest(command: list[str], runs: int = 3) -> float:
    "Seconds of the fastest of some runs; each must succeed."
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir())
        times.append(time.perf_counter() - start)
    return min(times)


def imports_of(path: Path) -> set[str]:
    "The packages that a module imports anywhere, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def main() -> None:
    "Content, dependencies, speed of import, and a command of every kind."
    names = zipfile.ZipFile(sys.argv[1]).namelist()
    strangers = [n for n in names if not n.startswith(("product_retrieval/", "product_retrieval-"))]
    assert not strangers, f"the wheel holds more than the package: {strangers[:5]}"
    for module in ("nbdev", "fastcore", "jupyterlab", "IPython", "pytest"):
        assert importlib.util.find_spec(module) is None, f"a plain installation brought {module}"
    print("version", importlib.metadata.version("product_retrieval"), "modules", sum(n.endswith(".py") for n in names))

    script = str(Path(sys.executable).with_name("product-retrieval"))
    commands = {
        "import product_retrieval": [sys.executable, "-c", "import product_retrieval"],
        "product-retrieval --help": [script, "--help"],
    }
    for what, command in commands.items():
        seconds = fastest(command)
        print(f"{what}: {seconds:.2f} s (bar {LIMITS[what]} s)")
        assert seconds < LIMITS[what], f"{what} took {seconds:.2f} s"

    package = Path(importlib.util.find_spec("product_retrieval").origin).parent
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not parts[-1].startswith("_") or parts[-1] == "__init__":
            importlib.import_module(name)
    not_here = {"tomli"} if sys.version_info >= (3, 11) else set()
    used = set().union(*(imports_of(path) for path in package.rglob("*.py") if path.stem != "teaching"))  # it is for chapters
    missing = sorted(name for name in used - not_here if importlib.util.find_spec(name) is None)
    assert not missing, f"the package imports {', '.join(missing)}, which its requirements do not bring"
    print("every module imports, and what functions import is there")
    for arguments in (["doctor"], ["datasets"]):
        subprocess.run([script, *arguments], check=True, stdout=subprocess.DEVNULL)
    print("doctor and datasets run")


if __name__ == "__main__":
    main()
