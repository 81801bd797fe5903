"""How long a shelf takes to draw: tiny under 2 s on one core, small under 60 s; `--quick` draws tiny only."""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from product_retrieval.data.shelf import draw_shelf


def seconds(size: str, workers: int | None) -> tuple[float, int]:
    "Seconds to draw a shelf of this size into a new folder, and its number of pictures."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        catalog = draw_shelf(Path(folder) / size, size, workers=workers)
        return time.perf_counter() - start, len(catalog)


def main() -> None:
    "Print one JSON line per figure."
    hardware = f"{os.cpu_count()} x {platform.machine()}"
    seconds("tiny", 1)  # imports and fonts
    for size, workers, bar in (("tiny", 1, 2.0), ("small", None, 60.0)):
        if size == "small" and "--quick" in sys.argv:
            continue
        ours, pictures = seconds(size, workers)
        row = {"figure": f"seconds to draw the {size} shelf", "ours": round(ours, 2), "peer": None, "ratio": None}
        print(json.dumps({**row, "bar": f"< {bar:g} s", "met": ours < bar, "pictures": pictures, "hardware": hardware}))


if __name__ == "__main__":
    main()
