"""Data sets: hashes, readers of the papers' formats, and downloads that meet every fault a server can have."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from product_retrieval.core import InputError
from product_retrieval.data import datasets as d
from product_retrieval.data.catalog import TrainCatalog

HASTY = d.Polite(timeout=5, retries=3, backoff=0.01)


def picture(number: int = 0, size: int = 40) -> bytes:
    "A small JPEG that differs from number to number."
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 40 + number % 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    "Serves `server.files`; `server.faults` says what goes wrong with which path."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked.append((self.path, self.headers.get("Range")))
            fault = server.faults.get(self.path, [])
            fault = fault.pop(0) if isinstance(fault, list) and fault else fault
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.delay)
        with server.lock:  # before the answer: once it is out, the client may already ask for the next picture
            server.now -= 1
        self.answer(server.files.get(self.path), fault)

    def answer(self, body, fault):
        if isinstance(fault, int) or body is None:
            return self.plain(fault if isinstance(fault, int) else 404, b"no")
        if fault == "html":
            return self.plain(200, b"<!doctype html><title>please log in</title>")
        if fault == "truncated":  # the length is right, the picture is not
            return self.plain(200, body[: len(body) // 2])
        start = 0
        if self.server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if self.headers.get("If-Range") != '"v1"' or start > len(body):
                start = 0
            elif start == len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
        self.send_response(206 if start else 200)
        if self.server.ranges:
            self.send_header("ETag", '"v1"')
        body = body[start:]
        self.send_header("Content-Length", str(len(body) + (100 if fault == "size" else 0)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault in ("cut", "size"):
            self.wfile.flush()
            self.close_connection = True
        return None

    def plain(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.faults, web.asked, web.lock = {}, {}, [], threading.Lock()
    web.ranges, web.delay, web.now, web.most = True, 0.0, 0, 0
    web.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield web
    web.shutdown()
    web.server_close()


# --- hashes


def test_tree_hash_equals_git(tmp_path):
    folder = tmp_path / "tree"
    for name in ("b.txt", "a/inner/deep.txt", "a.txt", "a-b/x", "ab", "ünïcode/é.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 3)
    git = ["git", "-C", str(folder), "-c", "core.autocrlf=false"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "add", "."], check=True)
    expected = subprocess.run([*git, "write-tree"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["rm", "-rf", str(folder / ".git")], check=True)
    assert d.git_tree_hash(folder) == expected


def test_known_git_hashes():
    assert d.git_blob_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert d.tree_hash({}) == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


# --- one file


def test_fetch_file_resumes_where_it_was_cut(server, tmp_path):
    body = bytes(range(256)) * 4000
    server.files["/a.bin"], server.faults["/a.bin"] = body, ["cut", "cut"]
    path = d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", size=len(body), polite=HASTY)
    assert path.read_bytes() == body
    assert [r for _, r in server.asked][1:] == [f"bytes={len(body) // 2}-", f"bytes={len(body) * 3 // 4}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_fetch_file_starts_over_when_the_server_cannot_resume(server, tmp_path):
    body = b"x" * 100_000
    server.files["/a.bin"], server.faults["/a.bin"], server.ranges = body, ["cut"], False
    assert d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", polite=HASTY).read_bytes() == body
    assert server.asked[1][1] is None


def test_fetch_file_gives_up_on_a_server_that_cuts_and_cannot_resume(server, tmp_path):
    server.files["/a.bin"], server.faults["/a.bin"], server.ranges = b"x" * 100_000, "cut", False
    with pytest.raises(InputError, match=r"run again to go on"):
        d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", polite=HASTY)
    assert len(server.asked) == HASTY.retries + 1


def test_fetch_file_checks_size_and_content(server, tmp_path):
    server.files["/a.bin"] = b"hello"
    with pytest.raises(InputError, match=r"5 bytes where 6 are expected"):
        d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", size=6, polite=HASTY)
    with pytest.raises(InputError, match=r"SHA-256"):
        d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", sha256="0" * 64, polite=HASTY)
    assert list(tmp_path.iterdir()) == []


def test_fetch_file_does_not_ask_again_for_what_is_here(server, tmp_path):
    server.files["/a.bin"] = b"hello"
    for _ in range(2):
        d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", size=5, polite=HASTY)
    assert len(server.asked) == 1


def test_fetch_file_goes_on_with_a_complete_part(server, tmp_path):
    server.files["/a.bin"] = b"hello"
    (tmp_path / ".a.bin.part").write_bytes(b"hello")
    (tmp_path / ".a.bin.part.json").write_text('{"version": "\\"v1\\""}')
    assert d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", polite=HASTY).read_bytes() == b"hello"


def test_fetch_file_starts_over_when_the_file_has_changed(server, tmp_path):
    server.files["/a.bin"] = b"hello"
    (tmp_path / ".a.bin.part").write_bytes(b"HE")
    (tmp_path / ".a.bin.part.json").write_text('{"version": "\\"v0\\""}')
    assert d.fetch_file(server.url + "/a.bin", tmp_path / "a.bin", polite=HASTY).read_bytes() == b"hello"


def test_fetch_file_errors_name_the_address(server, tmp_path):
    with pytest.raises(InputError, match=r"/none: the server says 404"):
        d.fetch_file(server.url + "/none", tmp_path / "x", polite=HASTY)
    server.files["/busy"], server.faults["/busy"] = b"x", 503
    with pytest.raises(InputError, match=r"503.*run again to go on"):
        d.fetch_file(server.url + "/busy", tmp_path / "x", polite=HASTY)
    with pytest.raises(InputError, match=r"not an http or https address"):
        d.fetch_file("file:///etc/passwd", tmp_path / "x", polite=HASTY)
    with pytest.raises(InputError, match=r"run again"):
        d.fetch_file("http://127.0.0.1:9/x", tmp_path / "x", polite=HASTY)


# --- many pictures


def jobs(server, names):
    return [(f"{n[-1]}/{n}.jpg", [f"{server.url}/{n}.jpg"]) for n in names]


def test_pictures_under_every_fault(server, tmp_path):
    names = [f"p{k}" for k in range(12)]
    server.files = {f"/{n}.jpg": picture(k) for k, n in enumerate(names)}
    server.faults = {
        "/p1.jpg": 404, "/p2.jpg": [500], "/p3.jpg": ["cut"], "/p4.jpg": ["size"], "/p5.jpg": "html",
        "/p6.jpg": 503, "/p7.jpg": "truncated", "/p8.jpg": [429, 500, "cut"],
    }
    report = d.download_pictures(jobs(server, names), tmp_path, workers=4, polite=HASTY)
    lost = {"1/p1.jpg": "404", "5/p5.jpg": "not a picture", "6/p6.jpg": "503", "7/p7.jpg": "broken picture"}
    assert (report.fetched, report.failed) == (12 - len(lost), len(lost))
    written = {f["path"]: f for f in map(json.loads, report.failures.read_text().splitlines())}
    assert written.keys() == lost.keys()
    assert all(word in written[name]["reason"] for name, word in lost.items())
    for k, name in enumerate(names):
        path = tmp_path / name[-1] / f"{name}.jpg"
        assert path.exists() == (f"{name[-1]}/{name}.jpg" not in lost)
        assert not path.exists() or path.read_bytes() == server.files[f"/{name}.jpg"], k
    assert not list(tmp_path.glob(".parts-*"))


def test_a_second_run_asks_only_for_what_may_have_changed(server, tmp_path):
    server.files = {f"/p{k}.jpg": picture(k) for k in range(3)}
    server.faults = {"/p1.jpg": 404, "/p2.jpg": 503}
    work = jobs(server, ["p0", "p1", "p2"])
    d.download_pictures(work, tmp_path, polite=HASTY)
    server.asked.clear()
    server.faults = {}
    report = d.download_pictures(work, tmp_path, polite=HASTY)
    assert (report.fetched, report.present, report.failed) == (1, 1, 1)
    assert {p for p, _ in server.asked} == {"/p2.jpg"}
    report = d.download_pictures(work, tmp_path, polite=HASTY, again=True)
    assert (report.fetched, report.present, report.failed) == (1, 2, 0)
    assert not (tmp_path / "failures.jsonl").exists()


def test_the_mirror_is_asked_when_the_first_address_fails(server, tmp_path):
    server.files = {"/mirror.jpg": picture()}
    job = ("a.jpg", [server.url + "/gone.jpg", server.url + "/mirror.jpg"])
    assert d.download_pictures([job], tmp_path, polite=HASTY).fetched == 1


def test_no_more_than_so_many_connections_to_a_host(server, tmp_path):
    names = [f"p{k}" for k in range(30)]
    server.files, server.delay = {f"/{n}.jpg": picture() for n in names}, 0.02
    polite = d.Polite(per_host=3)
    assert d.download_pictures(jobs(server, names), tmp_path, workers=12, polite=polite).fetched == 30
    assert 2 <= server.most <= 3


def test_a_list_cannot_write_outside_its_folder(server, tmp_path):
    server.files["/a.jpg"] = picture()
    for name in ("../a.jpg", "/tmp/a.jpg", "x/../../a.jpg"):
        with pytest.raises(InputError, match=r"leaves the folder"):
            d.download_pictures([(name, [server.url + "/a.jpg"])], tmp_path / "in", polite=HASTY)
    assert not (tmp_path / "a.jpg").exists()


def test_files_are_not_fetched_from_this_machine(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture())
    report = d.download_pictures([("a.jpg", [(tmp_path / "secret.jpg").as_uri()])], tmp_path / "in", polite=HASTY)
    assert report.failed == 1 and "http" in report.failures.read_text()


def pictures_in(folder):
    "Pictures so far; a folder that the downloader removes while we look is looked at again."
    try:
        return list(folder.rglob("*.jpg"))
    except FileNotFoundError:
        return pictures_in(folder)


def test_resume_after_sigkill(server, tmp_path):
    names = [f"p{k:03d}" for k in range(120)]
    server.files, server.delay = {f"/{n}.jpg": picture(k, 200) for k, n in enumerate(names)}, 0.02
    work = jobs(server, names)
    (tmp_path / "jobs.json").write_text(json.dumps(work))
    code = (
        "import json, sys; from product_retrieval.data.datasets import download_pictures; "
        f"download_pictures(json.load(open({str(tmp_path / 'jobs.json')!r})), {str(tmp_path / 'out')!r}, workers=6)"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code])
        enough = len(pictures_in(tmp_path / "out")) + 20
        while len(pictures_in(tmp_path / "out")) < enough and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    here = sorted((tmp_path / "out").rglob("*.jpg"))
    assert 40 <= len(here) < 120
    assert all(p.read_bytes() == server.files[f"/{p.name}"] for p in here), "a killed run left half a picture"
    server.asked.clear()
    report = d.download_pictures(work, tmp_path / "out", polite=HASTY)
    assert (report.fetched, report.present, report.failed) == (120 - len(here), len(here), 0)
    assert len(server.asked) == 120 - len(here)
    assert not list((tmp_path / "out").glob(".parts-*"))


# --- Grocery


def test_grocery_rows(grocery):
    catalog = d.grocery_catalog(grocery)
    counts = catalog.frame["split"].value_counts().to_dict()
    assert counts == {"train": 2640, "query": 2485, "val_query": 296, "gallery": 81, "val_gallery": 81}
    assert "160 px" in catalog.source and catalog.licence == "MIT"
    assert len(set(catalog.categories())) == 43
    assert {c.split("/")[0] for c in catalog.categories()} == {"Fruit", "Packages", "Vegetables"}
    gallery, again = catalog.split("gallery"), catalog.split("val_gallery")
    assert gallery.frame["image"].tolist() == again.frame["image"].tolist()
    assert not set(gallery.ids) & set(again.ids) and all(gallery.titles)
    assert {labels[0] for labels in catalog.split("query").labels} <= {labels[0] for labels in gallery.labels}
    assert all(path.is_file() for path in catalog.paths)


def test_grocery_train_view_has_no_answers(grocery):
    train = d.grocery_catalog(grocery, verify=False).train
    assert isinstance(train, TrainCatalog) and "labels" not in train.frame
    names = set(d.grocery_catalog(grocery, verify=False).frame["labels"])
    assert not any(name.lower() in item.lower() for item in train.ids[::50] for name in names)
    assert set(train.titles) == {""}


def test_grocery_with_a_changed_byte_is_refused(grocery, tmp_path):
    import shutil

    shutil.copytree(grocery / "dataset", tmp_path / "dataset", copy_function=lambda a, b: Path(b).symlink_to(a))
    lists = tmp_path / "dataset" / "val.txt"
    text = lists.read_text()
    lists.unlink()
    lists.write_text(text.replace(", 0, 0", ", 1, 0", 1))
    with pytest.raises(InputError, match=r"git tree hash .* expected .* pass verify=False"):
        d.grocery_catalog(tmp_path)
    assert len(d.grocery_catalog(tmp_path, verify=False)) == 5583
    lists.write_text(text + "nonsense\n")
    with pytest.raises(InputError, match=r"val.txt, line 297: 'nonsense'"):
        d.grocery_catalog(tmp_path, verify=False)


def fake_grocery(server, monkeypatch):
    "A repository of three files behind the addresses that the registry names."
    import dataclasses

    files = {"classes.csv": b"a,b\n", "train/Fruit/x y.jpg": picture(), "val.txt": b"v"}
    hashes = {name: d.git_blob_hash(data) for name, data in files.items()}
    pack = io.BytesIO()
    packed = {"R-fc80/LICENSE": b"MIT", "R-fc80/README.md": b"", **{f"R-fc80/dataset/{n}": f for n, f in files.items()}}
    with zipfile.ZipFile(pack, "w") as archive:
        for name, data in packed.items():
            archive.writestr(name, data)
    server.files = {"/a.zip": pack.getvalue()}
    server.files |= {f"/raw/{name.replace(' ', '%20')}": data for name, data in files.items()}
    tree = [{"path": n, "sha": h, "type": "blob"} for n, h in hashes.items()] + [{"path": "train", "sha": "0", "type": "tree"}]
    server.files["/tree"] = json.dumps({"tree": tree}).encode()
    monkeypatch.setattr(d, "_TREE", d.tree_hash(hashes))
    monkeypatch.setattr(d, "_GROCERY", dataclasses.replace(d._GROCERY, url=server.url + "/a.zip"))
    monkeypatch.setattr(d, "GITHUB_TREE", server.url + "/tree")
    monkeypatch.setattr(d, "GITHUB_RAW", server.url + "/raw/")
    return files


def test_grocery_downloads_the_archive_and_verifies(server, tmp_path, monkeypatch):
    files = fake_grocery(server, monkeypatch)
    folder = d.download_grocery(tmp_path / "grocery", HASTY)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"LICENSE": b"MIT", **{f"dataset/{n}": f for n, f in files.items()}}
    assert [p.name for p in tmp_path.iterdir()] == ["grocery"]


def test_grocery_with_other_content_is_deleted(server, tmp_path, monkeypatch):
    fake_grocery(server, monkeypatch)
    monkeypatch.setattr(d, "_TREE", "0" * 40)
    with pytest.raises(InputError, match=r"expected 000000000000: deleted"):
        d.download_grocery(tmp_path / "grocery", HASTY)
    server.files["/a.zip"] = server.files["/a.zip"][:300]
    with pytest.raises(InputError, match=r"broken archive"):
        d.download_grocery(tmp_path / "grocery", HASTY)
    assert list(tmp_path.iterdir()) == []


def test_grocery_goes_on_file_by_file_after_a_broken_archive(server, tmp_path, monkeypatch):
    files = fake_grocery(server, monkeypatch)
    server.ranges, server.faults["/a.zip"] = False, "cut"  # as GitHub: archives made on the fly cannot be resumed
    with pytest.raises(InputError, match=r"run again to go on"):
        d.download_grocery(tmp_path / "grocery", HASTY)
    server.files["/raw/val.txt"], good = b"other", server.files["/raw/val.txt"]
    with pytest.raises(InputError, match=r"1 failed.*run again"):
        d.download_grocery(tmp_path / "grocery", HASTY)
    server.files["/raw/val.txt"] = good
    server.asked.clear()
    folder = d.download_grocery(tmp_path / "grocery", HASTY)
    assert [p for p, _ in server.asked] == ["/tree", "/raw/val.txt"]
    assert d.git_tree_hash(folder / "dataset") == d.tree_hash({n: d.git_blob_hash(f) for n, f in files.items()})
    assert [p.name for p in tmp_path.iterdir()] == ["grocery"]


# --- Product1M


def lines(*rows, end="\r\n"):
    return "".join("#####".join(row) + end for row in rows).encode()


def test_product1m_format(tmp_path):
    path = tmp_path / "product1m_test_ossurl_v2.txt"
    rows = [
        ("1", "口红 &amp; 眼影", "http://a/1.jpg", "http://b/1.jpg", "品牌 甲#;#品牌 乙#;#品牌 甲"),
        ("2", "same\u2028caption\x85here", "http://a/2.jpg", "http://b/2.jpg", "x;y"),
    ]
    for end in ("\r\n", "\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + lines(*rows, end=end))
            frame = d.read_product1m(path, "query")
            assert frame["item_id"].tolist() == ["1", "2"]
            assert frame["title"].tolist() == ["口红 & 眼影", "same\u2028caption\x85here"]
            assert frame["labels"].tolist() == ["品牌 甲;品牌 乙;品牌 甲", "x\uff1by"]
            assert frame["url"].tolist() == ["http://a/1.jpg", "http://a/2.jpg"]
            assert frame["mirror"].tolist() == ["http://b/1.jpg", "http://b/2.jpg"]


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"3#####caption#####http://a\n", "line 2: 3 fields joined by '#####'; expected 5"),
        (b"3#####a#####b#####c#####d#####e\n", "line 2: 6 fields"),
        (b"3#####\xff#####b#####c#####d\n", "line 2: not UTF-8"),
        (b"../x#####a#####b#####c#####d\n", r"line 2: item id '../x'"),
        (b"1#####a#####b#####c#####d\n", "item id '1' stands there twice"),
    ],
)
def test_product1m_faults_name_file_and_line(tmp_path, bad, message):
    path = tmp_path / "product1m_dev_ossurl_v2.txt"
    path.write_bytes(lines(("1", "a", "b", "c", "d"), end="\n") + bad + b"\n")
    with pytest.raises(InputError, match=message) as error:
        d.read_product1m(path, "val_query")
    assert path.name in str(error.value)


def test_product1m_catalog(tmp_path):
    for name, rows in {
        "train": [("t1", "c", "u", "m"), ("t2", "c", "u", "m", "a label that must not be seen")],
        "dev": [("d1", "c", "u", "m", "A")], "test": [("q1", "c", "u", "m", "A#;#B")], "gallery": [("g1", "c", "u", "m", "A")],
    }.items():
        (tmp_path / f"product1m_{name}_ossurl_v2.txt").write_bytes(lines(*rows))
    catalog = d.load_dataset("product1m", tmp_path)
    assert dict(zip(catalog.ids, catalog.frame["split"], strict=True)) == {
        "t1": "train", "t2": "train", "d1": "val_query", "q1": "query", "g1": "gallery", "val-g1": "val_gallery",
    }
    assert set(catalog.frame["labels"][catalog.frame["split"] == "train"]) == {""}
    assert "must not be seen" not in catalog.frame.to_csv()
    images = catalog.frame.set_index("item_id")["image"]
    assert images["g1"] == images["val-g1"] == "images/g1/g1.jpg"
    with pytest.raises(InputError, match=r"none of product1m_train"):
        d.load_dataset("product1m", tmp_path / "nothing")


def test_product1m_reference_files(reference_dir):
    catalog = d.product1m_catalog(reference_dir / "product1m_evaluation")
    assert len(catalog.split("val_query")) == 600
    assert any(len(labels) > len(set(labels)) for labels in catalog.split("val_query").labels)


def test_product1m_pictures(server, tmp_path):
    server.files = {"/1.jpg": picture(), "/m2.jpg": picture(2)}
    rows = [("1", "c", server.url + "/1.jpg", "", "A"), ("2", "c", server.url + "/gone.jpg", server.url + "/m2.jpg", "A")]
    (tmp_path / "product1m_gallery_ossurl_v2.txt").write_bytes(lines(*rows))
    catalog = d.product1m_catalog(tmp_path)
    report = d.fetch_pictures(catalog, polite=HASTY)
    assert (report.fetched, report.failed) == (2, 0) and all(p.is_file() for p in catalog.paths)


# --- eProduct and the registry


def eproduct(folder: Path) -> Path:
    meta = folder / "metadata"
    meta.mkdir(parents=True)
    head = "UUID,IMAGE_PATH,AUCT_TITL,META_CATEG_ID,CATEG_LVL2_ID,LEAF_CATEG_ID\n"
    (meta / "train.csv").write_text(head + 'u1,u1.jpg,"A, ""quoted"" title",3,17,904\n')
    (meta / "val.csv").write_text(head + "".join(f"v{k},v{k}.jpg,t,0,1,2\n" for k in range(40)))
    (meta / "index.csv").write_text("UUID,IMAGE_PATH\ni1,i1.jpg\n")
    (meta / "query_part1.csv").write_text("UUID,IMAGE_PATH\nq1,q1.jpg\n")
    (folder / "Images" / "index").mkdir(parents=True)
    (folder / "Images" / "index" / "i1.jpg").write_bytes(picture())
    return folder


def test_eproduct_catalog(tmp_path):
    catalog = d.load_dataset("eproduct", eproduct(tmp_path))
    frame = catalog.frame.set_index("item_id")
    assert frame.loc["u1", ["title", "split", "category", "image", "labels"]].tolist() == [
        'A, "quoted" title', "train", "3/17/904", "Images/train/u1.jpg", "",
    ]
    assert frame.loc["i1", "image"] == "Images/index/i1.jpg" and frame.loc["i1", "split"] == "gallery"
    assert frame.loc["q1", "split"] == "query"
    shares = frame[frame.index.str.startswith("v")]["split"].value_counts()
    assert set(shares.index) == {"val_query", "val_gallery"} and shares.min() > 8
    (tmp_path / "metadata" / "index.csv").write_text("UUID,IMAGE\ni1,i1.jpg\n")
    with pytest.raises(InputError, match=r"index.csv: no column 'IMAGE_PATH'; did you mean 'IMAGE'"):
        d.eproduct_catalog(tmp_path)


def test_registry():
    for known in d.list_datasets():
        assert known.url.startswith("https://") and known.licence and known.citation and known.how
        assert known.name in str(known)
    bibliography = (Path(__file__).parents[1] / "nbs" / "references.bib").read_text()
    assert all("{" + known.citation + "," in bibliography for known in d.list_datasets())


def test_load_dataset_by_name(tmp_path, monkeypatch, grocery):
    monkeypatch.setenv("PRODUCT_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PRODUCT_RETRIEVAL_DATA", raising=False)
    with pytest.raises(InputError, match=r"'grocry': unknown; did you mean 'grocery'"):
        d.load_dataset("grocry")
    with pytest.raises(InputError, match=r"allow the download or name the folder"):
        d.load_dataset("grocery", download=False)
    with pytest.raises(InputError, match=r"not here and not downloadable"):
        d.load_dataset("eproduct")
    with pytest.raises(InputError, match=r"no classes.csv here"):
        d.load_dataset("grocery", tmp_path)
    monkeypatch.setenv("PRODUCT_RETRIEVAL_DATA", str(grocery.parent))
    assert len(d.load_dataset("grocery", download=False)) == 5583
    (tmp_path / "own.csv").write_text("item_id,image,title,split\na,a.jpg,t,gallery\n")
    assert d.load_dataset(tmp_path / "own.csv").ids == ["a"]


def test_bench_datasets_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "bench_datasets.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count('"met": true') == 2, done.stdout + done.stderr
