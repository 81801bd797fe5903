"""Health of the chapters: what a reader must find in each, and what must not stand in git."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

repository = Path(__file__).resolve().parents[1]
folder = repository / "nbs"
paths = sorted(folder.glob("*.ipynb"))
plain = {"index", "00a_tour", "00c_teaching", "A_command_line", "E_glossary"}  # no exercises and quiz of their own
chapters = [p for p in paths if p.stem not in plain]
FRONT = ("title", "subtitle", "description", "minutes", "hardware", "order")
DIRECTIVES = {
    "default_exp", "export", "exports", "exporti", "hide", "hide_line", "eval", "echo", "output", "label", "fig-cap", "fig-alt",
    "fig-width", "fig-height", "code-fold", "code-summary", "tbl-cap", "warning", "slow", "gpu", "layout-ncol", "column",
}  # fmt: skip


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(path: Path) -> list[dict]:
    return [c for c in cells(path) if c["cell_type"] == "code" and source(c).strip()]


def prose(path: Path) -> str:
    return "\n\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")


def each(which):
    return pytest.mark.parametrize("path", which, ids=lambda p: p.stem)


def body_lines(cell: dict) -> int:
    return sum(1 for line in source(cell).splitlines() if line.strip() and not line.startswith("#|"))


@each(paths)
def test_front_matter(path):
    import yaml

    first = cells(path)[0]
    assert first["cell_type"] == "raw", "the first cell is a raw cell with front matter"
    front = yaml.safe_load(source(first).strip().strip("-"))
    assert not [key for key in FRONT if key not in front]


@each(paths)
def test_size(path):
    assert path.stat().st_size <= 500 * 1024
    for cell in code(path):
        for out in cell["outputs"]:
            data = out.get("data", {})
            picture = data.get("image/png", "") or data.get("image/jpeg", "")
            assert len("".join(picture)) * 3 / 4 <= 100 * 1024, f"a picture over 100 KB: {source(cell)[:80]}"


@each(paths)
def test_cell_length(path):
    lengths = [body_lines(c) for c in code(path)]
    assert max(lengths, default=0) <= 30
    long = sum(n >= 15 for n in lengths)
    assert long <= 0.1 * len(lengths) + 1, f"{long} of {len(lengths)} cells have 15 lines or more"


@each(paths)
def test_directives_are_known(path):
    for cell in code(path):
        for name in re.findall(r"(?m)^#\|\s*([\w-]+)", source(cell)):
            assert name in DIRECTIVES, f"unknown directive {name!r}"


@each(paths)
def test_outputs_present_clean_and_without_errors(path):
    produced = [out for cell in code(path) for out in cell["outputs"]]
    assert produced, "no outputs: run `make notebooks`"
    assert not [out for out in produced if out["output_type"] == "error"]
    text = json.dumps(produced)
    for pattern in (r"0x[0-9a-f]{8,}", r"/home/\w+", r"/tmp/tmp", re.escape(f"{Path.home()}{os.sep}"), r"\d+%\|", r"it/s\]"):
        assert not re.search(pattern, text), f"an output holds {re.search(pattern, text).group()!r}"
    assert all(cell["execution_count"] is None for cell in code(path))


@each(paths)
def test_pictures_have_alternative_text(path):
    for cell in code(path):
        if any({"image/png", "image/jpeg"} & set(out.get("data", {})) for out in cell["outputs"]):
            text = source(cell)
            assert re.search(r"(?m)^#\| fig-alt: .{20,}", text), f"no fig-alt: {text[:80]}"
            assert re.search(r"(?m)^#\| fig-cap: .{10,}", text), f"no fig-cap: {text[:80]}"
            assert re.search(r"(?m)^#\| label: fig-", text), f"no label: {text[:80]}"
    for alt in re.findall(r"!\[(.*?)\]\(", prose(path)):
        assert alt.strip(), "a picture in the text without alternative text"


@each(paths)
def test_references_resolve(path):
    text = prose(path)
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    everywhere = "\n".join(source(c) for p in paths for c in cells(p))
    known = set(re.findall(r"(?m)^#\| label: (\S+)", everywhere)) | set(re.findall(r"\{#([\w-]+)", everywhere))
    bibliography = set(re.findall(r"@\w+\{([\w:-]+),", (folder / "references.bib").read_text(encoding="utf-8")))
    for name in re.findall(r"(?<![\w.])@([A-Za-z][\w:-]*\w)", text):
        if name.split("-")[0] in ("fig", "eq", "sec", "exr", "tbl"):
            assert name in known, f"@{name} points nowhere"
        else:
            assert name in bibliography, f"@{name} is not in references.bib"
    assert not re.search(r"Figure @fig", text), "Quarto writes the word Figure itself"


@each(paths)
def test_relative_links_exist(path):
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", prose(path)):
        name = target.split("#")[0]
        assert (folder / name).exists() or (folder / name.replace(".html", ".ipynb")).exists(), f"{target} does not exist"


@each(paths)
def test_imports_stand_alone(path):
    import ast

    for cell in code(path):
        if re.search(r"(?m)^#\|\s*exports?\b|^#\|\s*eval:\s*false", source(cell)):
            continue
        body = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source(cell))).body
        imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
        assert not any(imports) or all(imports), f"imports stand in cells of their own: {source(cell)[:80]}"


@each(paths)
def test_house_voice(path):
    text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|!\[", "", prose(path), flags=re.S)
    assert not re.search(r"\w!(\s|$)", text), "the course uses no exclamation marks"


@each(chapters)
def test_chapter_has_its_parts(path):
    text, programs = prose(path), "\n".join(source(c) for c in code(path))
    assert ".callout-note" in text, "objectives in a callout"
    assert re.search(r"(?i)who may skip", text)
    assert re.search(r"(?mi)^## .*summary", text)
    assert len(re.findall(r"\{#exr-", text)) == 4, "four exercises"
    assert len(re.findall(r"solution=True", programs)) >= 4, "four solutions that are checked"
    folded = [c for c in code(path) if c["metadata"].get("jupyter", {}).get("source_hidden")]
    assert len(folded) >= 4 and all("#| code-fold: true" in source(c) for c in folded)
    assert re.search(r"(?m)^quiz\(", programs) and re.search(r"(?m)^cards\(", programs)
    assert re.search(r"(?mi)^## .*further reading", text) and re.search(r"\[@\w", text)


@each(paths)
def test_site_filter(path):
    "The page that Quarto would get: no directive leaks, no plumbing, links stay inside."
    environment = {**os.environ, "IN_TEST": "1", "QUICK": "1"}
    command = [sys.executable, str(folder / "_tools" / "site_filter.py")]
    text = path.read_text(encoding="utf-8")
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    page = json.loads(done.stdout)
    text = "\n".join("".join(c["source"]) for c in page["cells"])
    assert not re.search(r"(?m)^#\|\s*(default_exp|export|exports|hide)\b", text), "a directive leaks"
    assert "output-file:" not in text
    if any("#| exports" in source(c) and re.search(r"(?m)^(def|class) [a-zA-Z]", source(c)) for c in code(path)):
        assert "show_doc(" in text
