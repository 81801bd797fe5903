"""Make the environment once: `python bootstrap.py package|dev FOLDER`. Says in one line what is missing.

Runs on any Python 3, so that an old one gets a sentence and not a syntax error.
"""

import os
import shutil
import subprocess
import sys

NEEDED = (3, 10)
NEEDED_GB = 12  # torch with its CUDA libraries, the rest, and pip's unpacking


def stop(line):
    "One line, exit 2."
    sys.stderr.write("product_retrieval: " + line + "\n")
    sys.exit(2)


def check_machine(folder):
    "Stop with one line when this machine cannot hold the environment."
    if sys.version_info < NEEDED:
        have = "{}.{}".format(*sys.version_info[:2])
        stop(f"Python {have} is too old, 3.10 or newer is needed; try: make PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("this Python has no venv module; on Debian or Ubuntu: apt install python3-venv")
    parent = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(parent).free / 1e9
    if not os.path.exists(folder) and free < NEEDED_GB:
        stop(f"{free:.1f} GB are free in {parent}, about {NEEDED_GB} GB are needed; free some, or: make VENV=/elsewhere/venv")


def run(command, what):
    "Run one step; when it fails, one line says which."
    code = subprocess.call(command)
    if code:
        stop(f"{what} failed (exit {code}); the lines above say why. Run the same command again to go on.")


def main():
    kind, folder = sys.argv[1], sys.argv[2]
    check_machine(folder)
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        print(f"making the environment in {folder} ...", flush=True)
        run([sys.executable, "-m", "venv", folder], "making the environment")
    extra = "[dev]" if kind == "dev" else ""
    print(f"installing product_retrieval{extra} into {folder} (once; a few minutes, several GB) ...", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--editable", "." + extra], "installing")
    for done in ["package", "dev"] if kind == "dev" else ["package"]:
        with open(os.path.join(folder, "." + done), "w") as stamp:
            stamp.write("installed\n")
    print("installed.", flush=True)


if __name__ == "__main__":
    main()
