"""The filter between a notebook and its page: Quarto sends a notebook on stdin and reads it back from stdout.

nbdev's own processors hide exported plumbing, show signatures and link names; three things are set right around
them: the notebook's path (found by its cell ids), page names that keep their chapter number, and links that stay
inside the site. It is plain Python, so the tests run it on every notebook without Quarto.
"""

import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path


def path_of(notebook: dict, folder: Path) -> Path | None:
    "The file in `folder` whose cell ids are those of `notebook`."
    ids = [cell.get("id") for cell in notebook["cells"]]
    for path in sorted(folder.glob("*.ipynb")):
        if [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]] == ids:
            return path
    return None


def inside(text: str, folder: Path, base: str) -> str:
    "Links that nbdev makes for the published address, made relative to the page."
    from nbdev.doclinks import _nbpath2html  # the name that nbdev gives to a notebook's page

    for path in folder.glob("*.ipynb"):
        text = text.replace(f"{base}/{_nbpath2html(Path(path.name))}", f"{path.stem}.html")
    return text


def site_filter(text: str, folder: Path) -> str:
    "A notebook as JSON text in, the notebook for the page as JSON text out."
    from execnb.nbio import dict2nb, nb2str
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults

    notebook = dict2nb(json.loads(text))
    notebook.path_ = path_of(json.loads(text), folder) or folder / "unknown.ipynb"
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        FilterDefaults()(notebook)
    config = get_config()
    base = f"{config.doc_host}{config.doc_baseurl}".rstrip("/")
    for cell in notebook.cells:
        if cell.cell_type in ("markdown", "raw"):
            cell.source = re.sub(r"(?m)^output-file:.*\n", "", cell.source)
    return inside(nb2str(notebook), folder, base)


if __name__ == "__main__":
    os.environ["IN_TEST"] = "1"
    print(site_filter(sys.stdin.read(), Path.cwd()), flush=True)
