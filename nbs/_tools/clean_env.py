"""A new environment that holds a wheel and what it declares to need, and nothing else: no download, no second copy.

    python clean_env.py WHEEL FOLDER

The requirements are followed through the metadata of the packages installed here, and their files are linked, so that
the gigabytes of torch lie on the disk once. A requirement that the wheel forgets to declare is absent, as it would be
after `pip install`; `pip check` names one that is declared and not met.
"""

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def applies(requirement: Requirement, extras: set[str]) -> bool:
    "Whether a requirement counts on this machine, for a package installed with these extras."
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras})


def closure(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    "Every installed package that the requirements lead to, by canonical name."
    found, seen = {}, set()
    waiting = [(Requirement(r), set()) for r in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if not applies(requirement, extras):
            continue
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            found[name] = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # `pip check` will name it
        waiting += [(Requirement(r), set(wanted)) for r in found[name].requires or []]
    return found


def link(source: Path, target: Path) -> None:
    "A hard link, or a symbolic one where the two lie on different disks."
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # two packages may own one file of a shared namespace
        return
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())


def main() -> None:
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    declared = next(importlib.metadata.distributions(path=[str(wheel)])).requires
    needed = closure(declared)
    for distribution in needed.values():
        for file in distribution.files or []:
            source = Path(distribution.locate_file(file))
            if ".." not in file.parts and source.is_file():  # scripts lie outside and start the other interpreter
                link(source, site / file)
    print(f"linked {len(needed)} packages that the wheel needs", flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    if subprocess.run([*pip, "check"]).returncode:
        sys.exit("the wheel's requirements are not met by the packages in .venv; delete .venv and make it again")


if __name__ == "__main__":
    main()
