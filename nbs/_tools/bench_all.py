"""Run every script in benchmarks/, print its JSON lines, and end with a table of figures against their bars."""

import json
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]


def figures(script: Path, arguments: list[str]) -> list[dict]:
    "Run one script; its JSON lines as dictionaries. Other lines pass through."
    print(f"== {script.name}", flush=True)
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, cwd=root)
    rows = []
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            rows.append({"script": script.name, **json.loads(line)})
    if process.wait():
        rows.append({"script": script.name, "figure": "ended with an error", "met": False})
    return rows


def main() -> None:
    "All scripts, or those whose name contains an argument; arguments with dashes go to the scripts."
    names = [a for a in sys.argv[1:] if not a.startswith("-")]
    options = [a for a in sys.argv[1:] if a.startswith("-")]
    scripts = sorted((root / "benchmarks").glob("bench_*.py"))
    scripts = [s for s in scripts if not names or any(n in s.name for n in names)]
    rows = [row for script in scripts for row in figures(script, options)]
    print("\nfigure | ours | peer | bar | met")
    for row in rows:
        print(" | ".join(str(row.get(key, "")) for key in ("figure", "ours", "peer", "bar", "met")))


if __name__ == "__main__":
    main()
