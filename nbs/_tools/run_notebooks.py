"""Execute notebooks and, unless told not to, save their outputs in place.

    python nbs/_tools/run_notebooks.py [--check] [--limit SECONDS] [NOTEBOOK ...]

Without names: every chapter. Each notebook runs in a fresh interpreter with its own folder as the working folder,
as in JupyterLab. Cells with `#| eval: false` are skipped. `--check` runs and reports, and writes nothing: that is
how `make test` uses it, with QUICK=1. What is saved is free of what differs from run to run: execution counts,
streams split at random places, progress bars, memory addresses, absolute paths.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

nbs = Path(__file__).resolve().parents[1]


def chapters() -> list[Path]:
    "All notebooks of the course, in reading order."
    return sorted(nbs.glob("*.ipynb"))


def skipped(source: str) -> bool:
    "Whether a cell asks not to be executed."
    return re.search(r"^#\|\s*eval:\s*false", source, re.M) is not None


def tidy(outputs: list[dict]) -> list[dict]:
    "Merge neighbouring pieces of one stream and drop warnings on stderr, widget state and empty pieces."
    merged: list[dict] = []
    for out in outputs:
        if out["output_type"] == "stream":
            if out["name"] == "stderr":
                continue
            text = "".join(out["text"])
            if merged and merged[-1]["output_type"] == "stream":
                text = "".join(merged[-1]["text"]) + text
                merged.pop()
            out = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        merged.append(out)
    return merged


def private_paths(text: str) -> str:
    "Absolute paths of this machine become `~`, `<repository>` and `<temporary>`."
    for path, name in ((str(nbs.parent), "<repository>"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return re.sub(re.escape(tempfile.gettempdir()) + r"/tmp\w+", "<temporary>", text)


def run_here(path: Path, save: bool) -> None:
    "Execute one notebook in this process, raise on the first error, save outputs when asked."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    os.chdir(path.parent)
    notebook = read_nb(path)
    shell = CaptureShell(mpl_format="png")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or skipped(cell.source):
            continue
        outputs = [dict(o) for o in shell.run(cell.source)]
        if shell.exc:
            sys.stderr.write(f"{path.name}, cell {number} ({cell.id}):\n{cell.source}\n")
            for out in outputs:
                if out["output_type"] == "error":
                    sys.stderr.write("\n".join(re.sub(r"\x1b\[[0-9;]*m", "", t) for t in out["traceback"]) + "\n")
            sys.exit(1)
        cell.outputs = json.loads(private_paths(json.dumps(tidy(outputs))))
        cell.execution_count = None
    if save:
        write_nb(notebook, path)
        os.chdir(path.parent)  # a chapter may have moved; nbdev looks for its settings from here
        from nbdev.clean import nbdev_clean

        nbdev_clean(str(path))


def main() -> None:
    "Command line; every notebook runs in a process of its own."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="run, but leave the files alone")
    parser.add_argument("--limit", type=float, default=0, help="fail when a notebook takes longer than this many seconds")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_here(args.notebooks[0].resolve(), save=not args.check)
        return
    failed, rows = [], []
    for path in args.notebooks or chapters():
        command = [sys.executable, __file__, "--one", str(path), *(["--check"] if args.check else [])]
        start = time.perf_counter()
        code = subprocess.run(command).returncode
        rows.append((time.perf_counter() - start, path.name))
        print(f"{'ran' if code == 0 else 'FAILED'}  {rows[-1][0]:6.1f} s  {path.name}", flush=True)
        too_slow = args.limit and rows[-1][0] > args.limit
        failed += [f"{path.name} (over {args.limit:.0f} s)" if too_slow else path.name] if code or too_slow else []
    print(f"{len(rows)} notebooks, {sum(s for s, _ in rows):.0f} s; slowest: {max(rows)[1]}" if rows else "no notebooks")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
