"""The catalogue: every way in and out, every fault with file, row and column, and what stays after dropping."""

import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from product_retrieval.core import InputError
from product_retrieval.data.catalog import Catalog, Problem, TrainCatalog, open_catalog
from product_retrieval.data.checks import (
    check_catalog,
    describe,
    drop_problems,
    look_at,
    plot_description,
    problems_to_json,
    save_clean,
)

HEADER = "item_id,image,title,split,category,labels\n"
ROWS = [
    "001,a.jpg,NA,train,care/soap,",
    "002,b.jpg,red soap,train,care/soap,",
    "003,c.jpg,,gallery,care/soap,p1",
    '004,d.jpg,"blue, mild soap",gallery,care/soap,p2',
    "005,e.jpg,two soaps,query,,p1;p2",
]


def picture(path, seed=0, size=(40, 30)):
    "A noisy picture that no other seed gives."
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def shop(tmp_path):
    "A folder with five pictures and a faultless table."
    for seed, name in enumerate("abcde"):
        picture(tmp_path / "shop" / f"{name}.jpg", seed)
    (tmp_path / "shop" / "shop.csv").write_text(HEADER + "\n".join(ROWS) + "\n")
    return tmp_path / "shop"


def kinds(problems):
    return [p.kind for p in problems]


def only(problems, kind):
    "The one problem there is; it must be of this kind."
    assert kinds(problems) == [kind], [str(p) for p in problems]
    return problems[0]


# ways in


def test_csv_keeps_text_as_written(shop):
    catalog = open_catalog(shop / "shop.csv")
    assert catalog.ids == ["001", "002", "003", "004", "005"]
    assert catalog.titles[0] == "NA" and catalog.titles[2] == "" and catalog.titles[3] == "blue, mild soap"
    assert catalog.labels == [(), (), ("p1",), ("p2",), ("p1", "p2")]
    assert catalog.categories(1) == ["care"] * 4 + [""]
    assert catalog.paths[0] == shop / "a.jpg" and all(p.exists() for p in catalog.paths)
    assert check_catalog(shop / "shop.csv") == []


@pytest.mark.parametrize("encoding, separator", [("utf-8-sig", ","), ("utf-8", ";"), ("utf-8", "\t")])
def test_csv_dialects(tmp_path, encoding, separator):
    header = separator.join(["item_id", "image", "title", "split"])
    (tmp_path / "t.csv").write_bytes(f"{header}\r\n7{separator}x.jpg{separator}Käse{separator}query\r\n\r\n".encode(encoding))
    catalog = Catalog.from_csv(tmp_path / "t.csv")
    assert (catalog.ids, catalog.titles, len(catalog)) == (["7"], ["Käse"], 1)


def test_csv_other_names_and_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("sku,photo,name,price\n007,x.jpg,NA,3\n008,y.jpg,x,\n")
    catalog = Catalog.from_csv(tmp_path / "t.csv", columns={"sku": "item_id", "photo": "image", "name": "title"}, split="gallery")
    assert catalog.ids == ["007", "008"] and catalog.titles[0] == "NA"
    assert catalog.frame["price"].iloc[0] == 3 and np.isnan(catalog.frame["price"].iloc[1])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["t.csv", "header"]),
        (b"item_id,item_id,image,title,split\n", ["'item_id' stands twice"]),
        ("item_id,image,title,split\n1,x.jpg,Käse,query\n".encode("latin-1"), ["UTF-8"]),
        (b"item_id,image,titel,split\n1,x.jpg,a,query\n", ["t.csv", "'title'", "did you mean 'titel'"]),
        (b"item_id,image,title,split\n1,x.jpg,a, b,query\n", ["t.csv", "row 2", "5 fields", "4"]),
        (b"item_id,image,title,split\n1,x.jpg,a,query\n2,x.jpg,a,qeury\n", ["row 3", "'split'", "'qeury'", "'query'"]),
        (b'item_id,image,title,split\n1,x.jpg,"a,query\n2,y.jpg,b,query\n', ["t.csv, row 2", "opened in row 2 is not closed"]),
        (b'item_id,image,title,split\n1,x.jpg,a,query\n2,y,"b,query\n3,z,"c",query\n', ["opened in row 3 is not closed"]),
        (b'item_id,image,title,split\n1,x.jpg,a,query,,\n2,y.jpg,"b,query\n', ["opened in row 3 is not closed"]),
        (b"item_id,image,title,split\n1,x.jpg,a, b,query\n2,\xff\xfe,a,query\n", ["t.csv", "UTF-8"]),
        (b'{"item_id": 1, "image": 2, "title": 3}\n', ["t.csv: not a CSV table", "'{"]),
        (b"[" * 300_000, ["t.csv: not a CSV table"]),
        (b"root:x:0:0:root:/root:/bin/bash\nbin:x:1:1\n", ["t.csv: not a CSV table", "'root:x"]),
        (b"<!DOCTYPE html><title>a, b, c</title>\n", ["not a CSV table"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["t.csv: not a CSV table", "binary"]),
        (b"PK\x03\x04\x14\0\0\0\x08\0", ["t.csv: not a CSV table", "binary"]),
    ],
)
def test_bad_csv(tmp_path, content, words):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError) as error:
        Catalog.from_csv(tmp_path / "t.csv")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    for name in ("no.csv", "no.parquet", "no"):
        with pytest.raises(InputError, match=f"{name}: .*check the path"):
            open_catalog(tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"broken\.parquet"):
        open_catalog(tmp_path / "broken.parquet")


def test_frame_of_numbers_lists_and_nothing():
    frame = pd.DataFrame({
        "item_id": [7.0, 8.0], "image": ["x.jpg", "y.jpg"], "title": [None, "t"], "split": ["query", "gallery"],
        "labels": [["p1", "p2"], []], "boxes": [[[1, 2, 3, 4, "p1"]], None], "price": [1.5, 2.5],
    }, index=[5, 5])  # fmt: skip
    catalog = Catalog.from_frame(frame, "pictures")
    assert catalog.ids == ["7", "8"] and catalog.titles == ["", "t"]
    assert catalog.labels == [("p1", "p2"), ()] and catalog.boxes == [[[1, 2, 3, 4, "p1"]], []]
    assert frame.columns[0] == "item_id" and frame["item_id"].iloc[0] == 7.0  # the caller's frame is left alone


def test_folders(tmp_path):
    for seed, name in enumerate(["train/care/soap/1.jpg", "train/care/2.png", "query/care/soap/3.jpg", "query/.hidden/4.jpg"]):
        picture(tmp_path / name, seed)
    (tmp_path / "query" / "notes.txt").write_text("no picture")
    catalog = open_catalog(tmp_path)
    assert sorted(catalog.ids) == ["query/care/soap/3.jpg", "train/care/2.png", "train/care/soap/1.jpg"]
    assert dict(zip(catalog.categories(), catalog.labels, strict=True)) == {"care/soap": (), "care": ()} or catalog.has("labels")
    assert catalog.split("query").labels == [("care/soap",)]
    assert set(catalog.select(catalog.frame["split"] == "train").labels) == {()}  # train rows get no labels
    one = Catalog.from_folders(tmp_path / "train", split="query")
    assert set(one.categories()) == {"care", "care/soap"} and len(one.split("query")) == 2


def test_a_folder_with_one_table(shop):
    (shop / "notes.csv").write_text("what,else\n")
    assert open_catalog(shop).ids == open_catalog(shop / "shop.csv").ids
    shutil.copy(shop / "shop.csv", shop / "other.csv")
    assert open_catalog(shop).name == "shop" and len(open_catalog(shop).categories()) == 5  # two tables: the folder of pictures
    assert open_catalog(shop).frame["split"].unique().tolist() == ["gallery"]


def test_an_open_quote_in_a_long_table(tmp_path):
    text = HEADER + '1,a.jpg,"never closed,query,,\n' + "2,b.jpg,x,query,,,,\n" * 20_000
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=r"t\.csv.*quote"):
        open_catalog(tmp_path / "t.csv")


def test_long_cells_and_cells_of_several_lines_are_meant(tmp_path):
    text = 'item_id,image,title,split\n1,a.jpg,"two\nlines ""quoted""",query\n2,b.jpg,"' + "long\n" * 40_000 + '",query\n'
    (tmp_path / "t.csv").write_text(text)
    catalog = open_catalog(tmp_path / "t.csv")
    assert catalog.titles[0] == 'two\nlines "quoted"' and len(catalog.titles[1]) == 200_000 and catalog.ids == ["1", "2"]


def test_a_swallowing_quote_is_never_dropped_in_silence(shop, tmp_path):
    (shop / "shop.csv").write_text(HEADER + '9,a.jpg,"open,query,,\n' + "\n".join(ROWS) + "\n")
    with pytest.raises(InputError, match=r"shop\.csv, row 2: a quote opened in row 2 is not closed"):
        check_catalog(shop / "shop.csv")


def test_a_folder_with_files_that_are_no_tables(shop):
    (shop / "a_list.csv").write_bytes(b"\xff\xfe\0binary")
    (shop / "b_list.csv").write_text("")
    assert len(open_catalog(shop)) == 5 and open_catalog(shop).name == "shop"
    (shop / "shop.csv").unlink()
    with pytest.raises(InputError, match=r"a_list\.csv: not a CSV table.*move it out of the folder"):
        open_catalog(shop)


def test_a_table_without_rows(tmp_path):
    (tmp_path / "t.csv").write_text(HEADER)
    problem = only(check_catalog(tmp_path / "t.csv"), "no-rows")
    assert str(problem).startswith("t.csv: no rows")
    with pytest.raises(InputError, match=r"t\.csv: no row would be kept"):
        save_clean(tmp_path / "t.csv", [problem], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: c.sample(-1), "n=-1"),
        (lambda c: c.sample("x"), "n='x'"),
        (lambda c: c.sample(2.5), "n=2.5"),
        (lambda c: c.sample(1, seed=-1), "seed=-1"),
        (lambda c: c.join(5), "join: got a int"),
        (lambda c: c.join(None), "join: got a NoneType"),
        (lambda c: c.categories("x"), "level='x'"),
        (lambda c: c.categories(-1), "level=-1"),
        (lambda c: open_catalog(None), "path=None"),
        (lambda c: open_catalog(5), "path=5"),
        (lambda c: open_catalog("a\0.csv"), "cannot be read"),
        (lambda c: Catalog.load(None), "path=None"),
        (lambda c: Catalog.from_folders(None), "path=None"),
    ],
)
def test_arguments_of_the_wrong_kind(shop, call, words):
    with pytest.raises(InputError) as error:
        call(open_catalog(shop / "shop.csv"))
    assert words in str(error.value)


def test_columns_that_stand_twice_in_a_frame():
    frame = pd.DataFrame([["1", "a.jpg", "t", "t", "query"]], columns=["item_id", "image", "title", "title", "split"])
    with pytest.raises(InputError, match="'title' stands twice"):
        Catalog.from_frame(frame)


# out and in again


@pytest.mark.parametrize("images", ["copy", "link", "none"])
def test_save_and_load(shop, tmp_path, images):
    catalog = Catalog.from_csv(shop / "shop.csv", source="a shop", licence="MIT")
    folder = catalog.save(tmp_path / "saved", images=images)
    again = open_catalog(folder)
    pd.testing.assert_frame_equal(catalog.frame, again.frame)
    assert (again.name, again.source, again.licence) == ("shop", "a shop", "MIT")
    assert check_catalog(folder) == []
    assert (folder / "a.jpg").exists() == (images != "none")
    if images != "none":
        shutil.rmtree(shop)
        assert check_catalog(folder) == []


def test_save_refuses(shop, tmp_path):
    catalog = open_catalog(shop / "shop.csv")
    for folder in (shop, shop.parent):
        with pytest.raises(InputError, match="own pictures"):
            catalog.save(folder, replace=True)
    with pytest.raises(InputError, match="copy"):
        catalog.save(tmp_path / "x", images="copi")
    (shop / "e.jpg").unlink()
    with pytest.raises(InputError, match=r"e\.jpg"):
        catalog.save(tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_faulty_catalogue_is_never_written_outside_its_folder(shop, tmp_path):
    frame = open_catalog(shop / "shop.csv").frame.assign(image="../shop/a.jpg")
    faulty = Catalog(frame, shop, "faulty", checked=False)
    with pytest.raises(InputError, match="leaves the folder"):
        faulty.save(tmp_path / "deep" / "x")


def test_newer_or_broken_folder(shop, tmp_path):
    folder = open_catalog(shop / "shop.csv").save(tmp_path / "saved")
    about = json.loads((folder / "catalog.json").read_text())
    (folder / "catalog.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(InputError, match="update"):
        Catalog.load(folder)
    (folder / "catalog.json").write_text("{")
    with pytest.raises(InputError, match=r"catalog\.json"):
        Catalog.load(folder)
    with pytest.raises(InputError, match=r"catalog\.json"):
        Catalog.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "5", '"x"', "null", '{"schema": "x"}', '{"root": 5}', '{"type": []}', '{"name": {}}'])
def test_catalog_json_of_the_wrong_kind(shop, tmp_path, content):
    folder = open_catalog(shop / "shop.csv").save(tmp_path / "saved")
    (folder / "catalog.json").write_text(content)
    with pytest.raises(InputError, match=r"catalog\.json: (holds|key '\w+' is).*expected"):
        open_catalog(folder)


# parts


def test_select_sample_join_append(shop, tmp_path):
    catalog = open_catalog(shop / "shop.csv")
    assert catalog.select(["005", "001"]).ids == ["005", "001"]
    assert catalog.select(catalog.frame["split"] == "gallery").ids == ["003", "004"]
    assert catalog.select([]).ids == [] and catalog.select(np.array([4, 0])).ids == ["005", "001"]
    for bad in (["009"], [7], [-1], [True]):
        with pytest.raises(InputError):
            catalog.select(bad)
    assert catalog.sample(3, seed=1).ids == catalog.sample(3, seed=1).ids and len(catalog.sample(99)) == 5
    assert catalog.sample(1, by="split").frame["split"].tolist() == ["train", "gallery", "query"]
    with pytest.raises(InputError, match="no column 'splt'; did you mean 'split'"):
        catalog.sample(1, by="splt")

    wider = catalog.join(pd.DataFrame({"item_id": [5, "003", "x"], "price": [1, 2, 3], "title": ["a", "b", "c"]}))
    assert wider.titles == ["NA", "red soap", "b", "blue, mild soap", "two soaps"]
    assert wider.frame["price"].tolist()[2] == 2 and wider.frame["price"].isna().sum() == 4
    assert catalog.has("price") is False and len(catalog) == 5
    with pytest.raises(InputError, match="item_id"):
        catalog.join(pd.DataFrame({"item_id": ["003", "003"]}))
    with pytest.raises(InputError, match="unknown split"):
        catalog.join(pd.DataFrame({"item_id": ["003"], "split": ["x"]}))

    picture(tmp_path / "more" / "f.jpg", 9)
    more = Catalog(pd.DataFrame([{"item_id": "6", "image": "f.jpg", "title": "", "split": "gallery"}]), tmp_path / "more", "more")
    both = catalog.append(more)
    assert len(both) == 6 and all(p.exists() for p in both.paths) and both.labels[-1] == ()
    with pytest.raises(InputError, match="already"):
        catalog.append(catalog)


def test_frame_is_a_copy(shop):
    catalog = open_catalog(shop / "shop.csv")
    frame = catalog.frame
    frame.loc[0, "title"] = "changed"
    frame["labels"] = "changed"
    assert catalog.titles[0] == "NA" and catalog.labels[0] == ()


def test_unknown_names(shop):
    catalog = open_catalog(shop / "shop.csv")
    with pytest.raises(InputError, match="did you mean 'val_query'"):
        catalog.split("vel_query")
    with pytest.raises(InputError, match="no column 'boxes'"):
        _ = catalog.boxes


# faults in the table: (field to change, its new value, kind, words of the message)


@pytest.mark.parametrize(
    "column, value, kind, words",
    [
        ("item_id", "", "empty-id", "empty"),
        ("item_id", "001", "duplicate-id", "row 2"),
        ("split", "tset", "unknown-split", "'tset'"),
        ("image", "", "image-missing", "name the picture"),
        ("image", "../shop/a.jpg", "path-leaves-root", "leaves the folder"),
        ("image", "x/../../shop/a.jpg", "path-leaves-root", "leaves the folder"),
        ("image", "/etc/passwd", "path-leaves-root", "leaves the folder"),
        ("image", "C:\\photos\\a.jpg", "path-leaves-root", "leaves the folder"),
        ("image", "..\\a.jpg", "path-leaves-root", "leaves the folder"),
        ("category", "care//soap", "empty-category-level", "'care//soap'"),
        ("category", "/care", "empty-category-level", "'/care'"),
        ("category", "care/ /soap", "empty-category-level", "level"),
        ("labels", "p1;;p2", "empty-label", "'p1;;p2'"),
        ("image", "a\0.jpg", "null-character", "'a\\x00.jpg'"),
        ("title", "so\0ap", "null-character", "null"),
        ("image", "a" * 300, "image-unreadable", "too long"),
        ("boxes", "nothing", "bad-boxes", "no list"),
        ("boxes", "[[5, 5, 1, 9, \"p1\"]]", "bad-boxes", "empty"),
        ("boxes", "[[1, 2, 3]]", "bad-boxes", "no list"),
        ("boxes", "17", "bad-boxes", "no list"),
        ("boxes", "{}", "bad-boxes", "no list"),
        ("boxes", "[" * 3000, "bad-boxes", "no list"),
        ("boxes", "[[0, 0, Infinity, 1, \"p1\"]]", "bad-boxes", "outside"),
        ("boxes", "[[NaN, 0, 1, 1, \"p1\"]]", "bad-boxes", "empty"),
    ],
)
def test_table_faults(shop, column, value, kind, words):
    frame = open_catalog(shop / "shop.csv").frame
    frame = frame if column in frame else frame.assign(**{column: ""})
    frame.loc[3, column] = value
    frame.to_csv(shop / "shop.csv", index=False)
    if not kind.startswith("image-") or not value:  # seen without opening a picture
        with pytest.raises(InputError, match=r"shop\.csv, row 5, column"):
            open_catalog(shop / "shop.csv")
    problems = [p for p in check_catalog(shop / "shop.csv") if p.kind != "label-not-in-gallery"]
    problem = only(problems, kind)
    assert (problem.file, problem.row, problem.column) == ("shop.csv", 5, column) and words in problem.message
    clean, dropped = drop_problems(shop / "shop.csv", problems)
    assert "004" not in clean.ids and check_catalog(clean) == [] and 5 in dropped["row"].tolist()


def test_missing_columns_are_listed_together(tmp_path):
    (tmp_path / "t.csv").write_text("sku,photo,title\n1,a.jpg,x\n")
    problems = check_catalog(tmp_path / "t.csv")
    assert [(p.kind, p.row, p.column) for p in problems] == [("missing-column", 0, c) for c in ("item_id", "image", "split")]
    with pytest.raises(InputError, match="missing"):
        drop_problems(tmp_path / "t.csv", problems)


def test_rows_are_counted_as_a_spreadsheet_does(shop):
    text = HEADER + ROWS[0] + '\n\n"002",b.jpg,"two\nlines",train,care,\n,,,,,\n003,c.jpg,x,oops,care,p1\n\n\n'
    (shop / "shop.csv").write_text(text)
    problem = only(check_catalog(shop / "shop.csv"), "unknown-split")
    assert problem.row == 6  # header, 001, blank, 002, blank, 003
    clean, _ = drop_problems(shop / "shop.csv", [problem])
    assert clean.ids == ["001", "002"] and clean.titles[1] == "two\nlines"


def test_ragged_rows_are_all_listed(shop):
    (shop / "shop.csv").write_text(HEADER + "\n".join(["9,a.jpg,x,query,,,,9", *ROWS, "8,a.jpg,a,b,query,c,p1"]) + "\n")
    problems = [p for p in check_catalog(shop / "shop.csv") if p.kind == "bad-row"]
    assert [(p.row, p.item_id) for p in problems] == [(2, "9"), (8, "8")]
    clean, _ = drop_problems(shop / "shop.csv", check_catalog(shop / "shop.csv"))
    assert clean.ids == ["001", "002", "003", "004", "005"]


# faults in the pictures


def png_header_of_a_bomb(path):
    "A PNG of a few bytes that claims 60,000 x 60,000 pixels."
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def cut(path, name):
    picture(path, 7, (200, 200)).read_bytes()
    content = picture(path.with_name(name), 7, (200, 200)).read_bytes()
    path.write_bytes(content[: len(content) // 2])


SPOIL = {
    "missing": (lambda p: p.unlink(), "image-missing", "no such file"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "not-an-image", "folder"),
    "empty": (lambda p: p.write_bytes(b""), "image-empty", "empty file"),
    "html": (lambda p: p.write_text("<!DOCTYPE html><p>404"), "not-an-image", "<!DOCTYPE"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").close(), "not-an-image", "PK"),
    "jpeg cut": (lambda p: cut(p, "x.jpg"), "image-truncated", "fetch"),
    "png cut": (lambda p: cut(p, "x.png"), "image-truncated", "fetch"),
    "bomb": (png_header_of_a_bomb, "image-too-large", "89,478,485"),
}


@pytest.mark.parametrize("name", SPOIL)
def test_picture_faults(shop, name):
    spoil, kind, words = SPOIL[name]
    spoil(shop / "d.jpg")
    problems = check_catalog(shop / "shop.csv")
    problem = only(problems, kind)
    assert (problem.row, problem.column, problem.item_id) == (5, "image", "004") and words in problem.message
    assert "d.jpg" in problem.message
    clean, dropped = drop_problems(shop / "shop.csv", problems)
    assert clean.ids == ["001", "002", "003", "005"] and clean.labels[-1] == ("p1",)  # p2 went with its only picture
    assert check_catalog(clean) == []
    assert dropped["action"].tolist() == ["row dropped", "mended"]


def test_every_kind_of_cut_picture_is_found(tmp_path):
    "Files cut at many places, in four formats, are never taken for good pictures, and never crash the check."
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    for form in ("jpg", "png", "webp", "gif"):
        path = tmp_path / f"a.{form}"
        noise.save(path)
        content = path.read_bytes()
        assert look_at(path, tmp_path).kind == ""
        for part in (0.001, 0.01, 0.1, 0.5, 0.9):
            path.write_bytes(content[: int(len(content) * part)])
            assert look_at(path, tmp_path).kind in ("image-truncated", "not-an-image", "image-empty"), (form, part)


def test_quick_look_reads_headers_only(shop):
    cut(shop / "d.jpg", "x.jpg")
    assert check_catalog(shop / "shop.csv", quick=True) == []
    (shop / "e.jpg").write_bytes(b"")
    assert kinds(check_catalog(shop / "shop.csv", quick=True)) == ["image-empty"]


def test_links_that_leave_the_root(shop, tmp_path):
    picture(tmp_path / "elsewhere" / "x.jpg", 8)
    (shop / "d.jpg").unlink()
    (shop / "d.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    assert "link" in only(check_catalog(shop / "shop.csv"), "path-leaves-root").message
    (shop / "d.jpg").unlink()
    picture(shop / "inner" / "x.jpg", 8)
    (shop / "d.jpg").symlink_to(shop / "inner" / "x.jpg")
    assert check_catalog(shop / "shop.csv") == []
    (shop / "e.jpg").unlink()
    (shop / "e.jpg").symlink_to(shop / "e.jpg")  # a link to itself
    assert only(check_catalog(shop / "shop.csv"), "image-unreadable").row == 6


def test_a_root_that_is_a_link_itself(shop, tmp_path):
    (tmp_path / "link").symlink_to(shop)
    assert check_catalog(tmp_path / "link" / "shop.csv") == []


def test_pictures_that_are_unusual_but_right(shop):
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[274] = 6
    noise.convert("CMYK").save(shop / "a.jpg")
    noise.convert("P").save(shop / "b.jpg", "GIF")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(shop / "c.jpg", "PNG")
    noise.convert("RGBA").save(shop / "d.jpg", "PNG")
    noise.rotate(90, expand=True).save(shop / "e.jpg", exif=turned)
    assert check_catalog(shop / "shop.csv") == []
    look = look_at(shop / "e.jpg", shop)
    assert (look.width, look.height) == (40, 30)  # stored 30 x 40, shown lying down


# faults between rows


def test_labels_that_no_gallery_item_has(shop):
    (shop / "shop.csv").write_text((HEADER + "\n".join(ROWS)).replace("p1;p2", "p1;p9;p8") + "\n006,a.jpg,x,val_query,,p1\n")
    problems = [p for p in check_catalog(shop / "shop.csv") if p.kind == "label-not-in-gallery"]
    assert [(p.row, p.column) for p in problems] == [(6, "labels"), (7, "labels")] and "'p9;p8'" in problems[0].message
    clean, dropped = drop_problems(shop / "shop.csv", problems)
    assert clean.ids == ["001", "002", "003", "004", "005"] and clean.labels[-1] == ("p1",)
    assert dropped["action"].tolist() == ["mended", "row dropped"]


def test_the_same_picture_in_train_and_query(shop):
    with Image.open(shop / "e.jpg") as same:
        same.save(shop / "b.png")  # other format, other name, same pixels
    (shop / "shop.csv").write_text((HEADER + "\n".join(ROWS)).replace("b.jpg", "b.png"))
    problem = only(check_catalog(shop / "shop.csv"), "train-picture-in-query")
    assert (problem.row, problem.item_id) == (3, "002") and "row 6" in problem.message
    clean, _ = drop_problems(shop / "shop.csv", [problem])
    assert clean.ids == ["001", "003", "004", "005"]
    assert check_catalog(shop / "shop.csv", quick=True) == []  # a quick look compares bytes
    shutil.copy(shop / "e.jpg", shop / "b.png")
    assert kinds(check_catalog(shop / "shop.csv", quick=True)) == ["train-picture-in-query"]


def test_answers_in_the_category_of_train_rows(shop):
    frame = open_catalog(shop / "shop.csv").frame
    train = frame["split"] == "train"
    frame.loc[train, "labels"] = frame.loc[train, "category"] = ["p1", "p2"]
    frame.to_csv(shop / "shop.csv", index=False)
    problems = check_catalog(shop / "shop.csv")
    assert only(problems, "answer-in-category").row == 0
    clean, dropped = drop_problems(shop / "shop.csv", problems)
    assert clean.train.categories() == ["", ""] and len(clean) == 5 and dropped["action"].tolist() == ["mended"]


# the report


def test_all_problems_at_once_as_text_json_and_files(shop, tmp_path):
    (shop / "c.jpg").write_bytes(b"")
    bad = ["001,a.jpg,x,train,a//b,", "006,zz.jpg,x,gallery,a,p3", "007,../x.jpg,x,val_query,a,"]
    (shop / "shop.csv").write_text(HEADER + "\n".join([*ROWS, *bad]) + "\n")
    problems = check_catalog(shop / "shop.csv")
    expected = {"image-empty": 4, "duplicate-id": 7, "empty-category-level": 7, "image-missing": 8, "path-leaves-root": 9}
    assert {p.kind: p.row for p in problems} == expected
    assert all(isinstance(p, Problem) and str(p).startswith("shop.csv, row ") for p in problems)
    report = json.loads(problems_to_json(problems))
    assert report["count"] == 5 and report["problems"][0]["row"] == 4 and report["kinds"]["image-empty"] == 1
    clean, dropped = save_clean(shop / "shop.csv", problems, tmp_path / "clean")
    assert clean.ids == ["001", "002", "004", "005"] and check_catalog(tmp_path / "clean") == []
    written = pd.read_csv(tmp_path / "clean" / "dropped.csv", dtype=str)
    assert written["item_id"].tolist() == dropped["item_id"].tolist() == ["003", "005", "001", "001", "006", "007"]
    assert set(written["action"]) == {"row dropped", "mended"} and not list(tmp_path.glob(".clean*"))
    assert (tmp_path / "clean" / "a.jpg").stat().st_nlink == 1  # a copy: editing it leaves the original alone


def test_nothing_to_keep_means_nothing_written(shop, tmp_path):
    (shop / "shop.csv").write_text(HEADER + "1,zz.jpg,x,gallery,a,p1\n2,yy.jpg,x,query,a,p1\n")
    with pytest.raises(InputError, match=r"shop\.csv: no row would be kept \(problems: 2\)"):
        save_clean(shop / "shop.csv", check_catalog(shop / "shop.csv"), tmp_path / "clean")
    assert not (tmp_path / "clean").exists() and not list(tmp_path.glob(".clean*"))


def test_random_faults_leave_a_clean_catalogue(shop, tmp_path):
    "Whatever is spoiled, what `drop_problems` keeps has no problems."
    good = open_catalog(shop / "shop.csv").frame
    good = pd.concat([good.assign(item_id=good["item_id"] + f"-{i}") for i in range(4)], ignore_index=True)
    wrong = {
        "item_id": ["", "001-0"], "image": ["", "zz.jpg", "../x.jpg", "e.jpg"], "split": ["x", "val_query"],
        "category": ["a//b"], "labels": ["p1;;", "p9", "p2;p9"],
    }  # fmt: skip
    for seed in range(12):
        random, frame = np.random.default_rng(seed), good.copy()
        for _ in range(random.integers(1, 12)):
            column = random.choice(list(wrong))
            frame.loc[random.integers(len(frame)), column] = random.choice(wrong[column])
        frame.to_csv(shop / "shop.csv", index=False)
        problems = check_catalog(shop / "shop.csv")
        clean, dropped = drop_problems(shop / "shop.csv", problems)
        assert check_catalog(clean) == [], seed
        assert len(clean) + dropped.loc[dropped["action"] == "row dropped", "row"].nunique() == len(frame), seed


def test_description(shop):
    catalog = open_catalog(shop / "shop.csv")
    shutil.copy(shop / "a.jpg", shop / "b.jpg")
    found = describe(catalog)
    numbers = found.to_dict()
    assert numbers["splits"] == {"train": 2, "gallery": 2, "query": 1}
    assert numbers["categories"]["gallery"] == {"care/soap": 2} and numbers["titles"]["gallery"]["empty"] == 1
    assert numbers["labels"]["query"] == {"distinct": 2, "per item": 2.0} and "train" not in numbers["labels"]
    assert numbers["pictures"]["repeated"] == 1 and numbers["pictures"]["median width"] == 40
    assert json.loads(json.dumps(numbers)) == numbers
    assert "5 items" in str(found) and "1 repeated" in str(found)
    figure = plot_description(found)
    assert len(figure.axes) == 4
    import matplotlib.pyplot as plt

    plt.close(figure)
    assert describe(catalog, pictures=0).pictures["looked at"] == 0
    assert len(describe(catalog.select([])).splits) == 0
    plt.close(plot_description(catalog.select([])))
    assert isinstance(catalog.train, TrainCatalog) and describe(catalog.train).items == 2


def test_grocery_is_clean(grocery):
    datasets = pytest.importorskip("product_retrieval.data.datasets")
    catalog = datasets.grocery_catalog(grocery)
    assert check_catalog(catalog, quick=True) == []
