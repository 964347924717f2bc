"""Text files: finding them, reading each kind, a validation file that never moves, downloading."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError, get_base_dir
from nanochat.dataset import (
    TXT_PIECE,
    find_files,
    is_val_document,
    iter_text_arrays,
    iter_texts,
    split_files,
    text_size,
    train_files,
    val_file,
)

TEXTS = [f"Document {i}: ä, 你好, and\na second line." for i in range(300)]


def parquet(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=64)
    return path


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # By its name, Arrow packs as gzip or zstd, or not at all
    with pa.output_stream(str(path)) as f:
        for text in texts:
            f.write((json.dumps({"text": text, "id": 1}) + "\n").encode())
    return path


def names(paths: list[Path]) -> list[str]:
    return [p.name for p in paths]


# ---- finding


def test_the_default_is_base_data_and_its_absence_names_the_command(own_base_dir: Path) -> None:
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset -n 8"):
        find_files()
    parquet(own_base_dir / "base_data" / "b.parquet", TEXTS)
    parquet(own_base_dir / "base_data" / "a.parquet", TEXTS)
    assert names(find_files()) == ["a.parquet", "b.parquet"]


def test_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    jsonl(tmp_path / "d" / "two.jsonl.gz", TEXTS)
    parquet(tmp_path / "d" / "one.parquet", TEXTS)
    (tmp_path / "d" / "three.txt").write_text("x", encoding="utf-8")
    for other in ("notes.md", "one.parquet.77.part", "._one.parquet"):
        (tmp_path / "d" / other).write_text("x", encoding="utf-8")
    assert names(find_files(str(tmp_path / "d"))) == ["one.parquet", "three.txt", "two.jsonl.gz"]
    assert names(find_files(str(tmp_path / "d" / "t*"))) == ["three.txt", "two.jsonl.gz"]
    assert names(find_files(str(tmp_path / "d" / "three.txt"))) == ["three.txt"]
    for missing in ("nowhere", "d/*.csv"):
        with pytest.raises(UserError, match="--data takes a file, a folder or a glob"):
            find_files(str(tmp_path / missing))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "own.jsonl", TEXTS)
    assert names(find_files("~/own.jsonl")) == ["own.jsonl"]


# ---- reading


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_kind_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    make = parquet if name.endswith("parquet") else jsonl
    path = make(tmp_path / name, TEXTS)
    assert list(iter_texts([path])) == TEXTS
    assert list(iter_texts([path, path], doc_cap=5)) == [text[:5] for text in TEXTS * 2]


def test_a_short_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("äh\n\nzwei", encoding="utf-8")
    assert list(iter_texts([path])) == ["äh\n\nzwei"]


@pytest.mark.parametrize("end", ["\n\n", "\n", " "])
def test_a_long_text_file_is_cut_where_it_hurts_least(tmp_path: Path, end: str) -> None:
    text = "".join(f"Paragraph {i} says little.{end}" for i in range(2000))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(iter_texts([path]))
    assert "".join(pieces) == text  # nothing is lost
    assert len(pieces) > 10 and max(map(len, pieces)) <= TXT_PIECE
    if end != " ":
        assert all(piece.endswith(end) for piece in pieces)
    # So that a lone book has documents for both parts
    val = list(iter_texts([path], keep="val"))
    assert 0 < len(val) < len(pieces) / 4 or len(pieces) < 100


def test_surrogates_in_json_do_not_stop_the_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "half \ud83d of a pair"}', encoding="utf-8")
    assert (
        len(list(iter_texts([path], keep="train"))) + len(list(iter_texts([path], keep="val"))) == 1
    )


def test_arrow_arrays_hold_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "PARQUET_BATCH", 2)
    texts = ["a", "naïve", "", "한국어", "🙂", "b", "a"]
    coded = pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.string(), pa.large_string(), pa.string_view(), coded):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"n": [1] * 7, "text": pa.array(texts, kind)}), path, 5)
        arrays = list(iter_text_arrays(path))
        assert [array.to_pylist() for array in arrays] == [
            *(texts[i : i + 2] for i in (0, 2)),
            texts[4:5],
            texts[5:],
        ]
        assert {array.type for array in arrays} <= {pa.string(), pa.large_string()}
        assert list(iter_texts([path])) == texts


def test_text_size_is_about_that_of_the_text(tmp_path: Path) -> None:
    texts = [f"{i} and some more words" for i in range(1000)]
    size = sum(map(len, texts))
    files = [parquet(tmp_path / "a.parquet", texts), jsonl(tmp_path / "a.jsonl", texts)]
    for path in files:
        assert size < text_size(path) < 2 * size
    (tmp_path / "bad.parquet").write_bytes(b"<html>")
    assert text_size(tmp_path / "bad.parquet") == 0


# ---- errors name the file


def broken(name: str, folder: Path) -> Path:
    """A file that cannot be read, of the kind that `name` says."""
    good = parquet(folder / "good.parquet", TEXTS * 20).read_bytes()
    path = folder / name
    kind = name.partition(".")[0]
    if kind == "column":
        return parquet(path, TEXTS, column="content")
    if kind == "null":
        return parquet(path, ["a"] * 1001 + [None])  # type: ignore[list-item]
    if kind == "numbers":
        pq.write_table(pa.table({"text": [5, 6]}), path)
        return path
    if kind == "bytes":
        array = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"text": array}), path)
        return path
    content = {
        "empty": b"",
        "no_parquet": b"<html>",
        "cut": good[:-100],
        "damaged": good[:200] + bytes(1000) + good[1200:],
        "latin": "{'text': 'ä'}".encode("latin-1"),
        "json": b'{"text": "a"}\n\n{"text": }\n',
        "field": b'{"text": "a"}\n{"content": "b", "id": 1}\n',
        "number": b'{"text": 5}\n',
        "list": b'["a"]\n',
        "torn": gzip.compress(b'{"text": "a"}\n' * 500)[:-20],
    }
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.parquet", "not a readable parquet file"),
        ("no_parquet.parquet", "delete it and download it again"),
        ("cut.parquet", "not a readable parquet file"),
        ("damaged.parquet", r"row group 0 \(row 0 on\) is damaged"),
        ("column.parquet", r"column\.parquet: row 0: there is no column `text`; found content"),
        ("null.parquet", "row 1001: `text` is None, not a string"),
        ("numbers.parquet", "row 0: `text` is 5, not a string"),
        ("bytes.parquet", r"row group 0 \(row 0 on\) is damaged: Invalid UTF8"),
        ("json.jsonl", r"json\.jsonl:3: not valid JSON"),
        ("field.jsonl", r"field\.jsonl:2: no string field `text`; found the fields content, id"),
        ("number.jsonl", r"number\.jsonl:1: no string field `text`; found 5"),
        ("list.jsonl", r"list\.jsonl:1: no string field `text`; found \['a'\]"),
        ("latin.jsonl", "not UTF-8"),
        ("latin.txt", r"latin\.txt:1: not UTF-8"),
        ("torn.jsonl.gz", "cannot be unpacked"),
        ("empty.csv", "cannot read this kind of file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, said: str) -> None:
    path = broken(name, tmp_path)
    with pytest.raises(UserError, match=said) as error:
        list(iter_texts([path]))
    assert str(path) in str(error.value)


# ---- validation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        jsonl(tmp_path / "own" / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    return tmp_path / "own"


def test_the_last_file_is_validation_and_stays_it(folder: Path) -> None:
    split = split_files(str(folder))
    assert (names(split.train), split.val.name, split.by_hash) == (
        ["a.jsonl", "b.jsonl"], "c.jsonl", False,
    )  # fmt: skip
    jsonl(folder / "d.jsonl", TEXTS)  # later, and later in the alphabet
    split = split_files(str(folder))
    assert (names(split.train), split.val.name) == (["a.jsonl", "b.jsonl", "d.jsonl"], "c.jsonl")
    assert (names(train_files(str(folder))), val_file(str(folder))) == (
        ["a.jsonl", "b.jsonl", "d.jsonl"], folder / "c.jsonl",
    )  # fmt: skip


def test_a_pinned_file_that_is_gone_is_an_error(folder: Path) -> None:
    split_files(str(folder))
    (folder / "c.jsonl").unlink()
    for _ in range(2):  # asking again does not move it either
        with pytest.raises(UserError, match=r"c\.jsonl.*gone.*--val_data"):
            split_files(str(folder))
    (folder / "b.jsonl").unlink()  # nor with a single file left
    with pytest.raises(UserError, match="gone"):
        split_files(str(folder))


def test_each_folder_and_glob_has_its_own_pin(folder: Path) -> None:
    assert split_files(str(folder)).val.name == "c.jsonl"
    assert split_files(str(folder / "[ab]*")).val.name == "b.jsonl"
    assert split_files(str(folder)).val.name == "c.jsonl"


def test_a_glob_over_folders_keeps_files_of_one_name_apart(tmp_path: Path) -> None:
    for place in ("x", "y", "z"):
        jsonl(tmp_path / place / "part.jsonl", [place])
    split = split_files(str(tmp_path / "*" / "part.jsonl"))
    assert [p.parent.name for p in split.train] == ["x", "y"]
    assert split.val.parent.name == "z"
    jsonl(tmp_path / "zz" / "part.jsonl", TEXTS)
    split = split_files(str(tmp_path / "*" / "part.jsonl"))
    assert ([p.parent.name for p in split.train], split.val.parent.name) == (["x", "y", "zz"], "z")


def test_the_base_directory_can_be_moved(
    own_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        jsonl(own_base_dir / "base_data" / f"{name}.jsonl", TEXTS)
    assert split_files().val.name == "b.jsonl"
    own_base_dir.rename(tmp_path / "moved")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "moved"))
    jsonl(tmp_path / "moved" / "base_data" / "c.jsonl", TEXTS)
    assert split_files().val.name == "b.jsonl"
    assert split_files(str(tmp_path / "moved" / "base_data")).val.name == "b.jsonl"


def test_the_last_shard_of_the_data_set_is_validation_by_name(folder: Path) -> None:
    assert split_files(str(folder)).val.name == "c.jsonl"
    parquet(folder / "shard_01822.parquet", TEXTS)
    parquet(folder / "shard_99999.parquet", TEXTS)
    split = split_files(str(folder))
    assert split.val.name == "shard_01822.parquet" and not split.by_hash
    assert len(split.train) == 4


@pytest.mark.parametrize("as_folder", [False, True])
def test_one_file_is_split_by_document(tmp_path: Path, as_folder: bool) -> None:
    path = jsonl(tmp_path / "own" / "all.jsonl", TEXTS)
    split = split_files(str(path.parent if as_folder else path))
    assert split.by_hash and split.train == [split.val] == [path]
    train = list(iter_texts(split.train, keep="train"))
    val = list(iter_texts([split.val], keep="val"))
    assert sorted(train + val) == sorted(TEXTS)
    assert not set(train) & set(val)
    assert 0.005 < len(val) / len(TEXTS) < 0.05  # one in 50, more or less
    # The document decides, not its place: the same ones are validation in any order.
    assert {t for t in reversed(TEXTS) if is_val_document(t)} == set(val)


def test_a_lone_file_keeps_its_validation_documents_when_others_come(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "own" / "m.jsonl", TEXTS)
    before = list(iter_texts([split_files(str(path.parent)).val], keep="val"))
    jsonl(path.with_name("z.jsonl"), [f"new {text}" for text in TEXTS])
    split = split_files(str(path.parent))
    assert split.by_hash and names(split.train) == ["m.jsonl", "z.jsonl"]
    assert list(iter_texts([split.val], keep="val")) == before
    assert not set(iter_texts(split.train, keep="train")) & set(before)


def test_names_that_say_what_a_file_is_for(tmp_path: Path) -> None:
    """The last file by name would be train.jsonl; the test file would be trained on."""
    for name in ("test.jsonl", "train-00000.jsonl", "train-00001.jsonl"):
        jsonl(tmp_path / name, TEXTS)
    split = split_files(str(tmp_path))
    assert split.val.name == "test.jsonl"
    assert names(split.train) == ["train-00000.jsonl", "train-00001.jsonl"]
    jsonl(tmp_path / "validation.jsonl", TEXTS)  # comes later: neither pinned nor trained on
    assert split_files(str(tmp_path)) == split
    (get_base_dir() / "validation_files.json").unlink()
    split = split_files(str(tmp_path))
    assert split.val.name == "validation.jsonl" and len(split.train) == 2


def test_names_mean_nothing_where_there_is_no_train_file(tmp_path: Path) -> None:
    for name in ("development.txt", "test of time.txt", "trains.txt", "values.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert split_files(str(tmp_path)).val.name == "values.txt"
    assert len(split_files(str(tmp_path)).train) == 3


def test_a_glob_may_go_down(tmp_path: Path) -> None:
    for place in ("a", "b/c"):
        jsonl(tmp_path / place / "x.jsonl", TEXTS)
    assert len(find_files(str(tmp_path / "**" / "*.jsonl"))) == 2


def test_what_validation_is_can_be_said_in_words(folder: Path) -> None:
    assert split_files(str(folder)).validation == "c.jsonl"
    lone = split_files(str(folder / "a.jsonl"))
    assert lone.validation == "a.jsonl: 1 document in 50, by its hash"
    assert (lone.keep_train, lone.keep_val) == ("train", "val")


def test_val_data_names_the_file(folder: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "val.jsonl", TEXTS)
    split = split_files(str(folder), str(other))
    assert names(split.train) == ["a.jsonl", "b.jsonl", "c.jsonl"] and split.val == other
    inside = split_files(str(folder), str(folder / ".." / "own" / "a.jsonl"))
    assert names(inside.train) == ["b.jsonl", "c.jsonl"]  # never trained on
    with pytest.raises(UserError, match="matches 3 files; name one"):
        split_files(str(folder), str(folder))
    with pytest.raises(UserError, match="nothing to train on"):
        split_files(str(other), str(other))


def test_the_real_data_is_split_by_its_last_shard(shared_data: Path) -> None:
    split = split_files(str(shared_data / "fineweb_like"))
    assert split.val.name == "shard_00004.parquet" and len(split.train) == 4
    assert len(next(iter_texts([split.val]))) > 100
