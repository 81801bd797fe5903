"""The picture of the README, from a finished demo: `python nbs/_tools/readme_picture.py demo`.

Queries are chosen by the report's rule (three spread over the better half), not by taste.
"""

import json
import sys
from pathlib import Path

import numpy as np

from product_retrieval.data.catalog import open_catalog
from product_retrieval.data.pictures import read_image
from product_retrieval.demo import pick_examples
from product_retrieval.evaluation import result_sheet
from product_retrieval.protocols import evaluate_run, read_ranking

target = Path(__file__).resolve().parents[1] / "images" / "result.jpg"


def main() -> None:
    "Read the image model's run, draw three queries with seven results each."
    demo = Path(sys.argv[1])
    catalog = open_catalog(demo / "catalog")
    queries, gallery = catalog.split("query"), catalog.split("gallery")
    run = demo / "systems" / "image_model" / "run"
    rows = read_ranking(run / "ranking.parquet").rows(queries.ids, gallery.ids)[:, :7]
    chosen = pick_examples(evaluate_run(run).evaluation)["What it finds"]
    hits = np.array([[not set(queries.labels[q]).isdisjoint(gallery.labels[r]) for r in rows[q]] for q in chosen])
    found = [[read_image(gallery.paths[r]) for r in rows[q]] for q in chosen]
    figure = result_sheet([read_image(queries.paths[q]) for q in chosen], found, hits)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=100, pil_kwargs={"quality": 80})
    scores = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))["rows"][-1]
    print(f"{target.name}: {target.stat().st_size // 1024} KB, {scores['name']} MAR@10 {scores['MAR@10']:.3f}")


if __name__ == "__main__":
    main()
