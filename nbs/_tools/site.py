"""Render the site with whatever `quarto` is on the PATH (1.6 or newer); say how to get one when there is none."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]


def main() -> None:
    "Find Quarto, check its version, render."
    quarto = shutil.which("quarto")
    if quarto is None:
        sys.exit("make site needs Quarto 1.6 or newer on the PATH: https://quarto.org/docs/get-started/")
    version = subprocess.run([quarto, "--version"], capture_output=True, text=True).stdout.strip()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers and numbers < (1, 6) and numbers != (99, 9):
        sys.exit(f"make site needs Quarto 1.6 or newer, found {version}: https://quarto.org/docs/get-started/")
    environment = {**os.environ, "QUARTO_PYTHON": sys.executable}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    sys.exit(subprocess.run([quarto, "render", *sys.argv[1:]], cwd=root, env=environment).returncode)


if __name__ == "__main__":
    main()
