"""Text files: finding them, reading each kind, a validation file that never moves, downloading."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, flags
from nanochat.common import UserError
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
from tests.servers_for_tests import FileServer, fail, truncate

TEXTS = [f"Document {i}: ä, 你好, and\na second line." for i in range(300)]


def parquet(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=64)
    return path


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
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


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
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
        return parquet(path, ["a", None])  # type: ignore[list-item]
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
        ("damaged.parquet", "row group 0 is damaged"),
        ("column.parquet", r"no column `text`; found \['content'\]"),
        ("null.parquet", "row 1 of row group 0 holds NoneType"),
        ("numbers.parquet", "row 0 of row group 0 holds int"),
        ("bytes.parquet", "row group 0 is damaged: Invalid UTF8"),
        ("json.jsonl", r"json\.jsonl:3: not valid JSON"),
        ("field.jsonl", r"field\.jsonl:2: no string field `text`; found \['content', 'id'\]"),
        ("number.jsonl", r"number\.jsonl:1: no string field `text`"),
        ("list.jsonl", r"list\.jsonl:1: no string field `text`; found list"),
        ("latin.jsonl", "not UTF-8"),
        ("latin.txt", "not UTF-8"),
        ("torn.jsonl.gz", "not a whole gzip file"),
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


# ---- downloading


def shard(index: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"shard {index} {text}" for text in TEXTS]}), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(dataset, "LAST_SHARD", 4)
    root = f"/datasets/{dataset.DEFAULT_REPO}/resolve/main"
    with FileServer({f"{root}/{dataset.shard_name(i)}": shard(i) for i in range(5)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


def have(base_dir: Path) -> list[str]:
    return sorted(p.name[6:11] for p in (base_dir / "base_data").iterdir())


def cli(*argv: str) -> None:
    flags.run(dataset.main, dataset.Args, argv)


def test_the_first_n_and_the_validation_shard(hub: FileServer, own_base_dir: Path) -> None:
    cli("-n", "2")
    assert have(own_base_dir) == ["00000", "00001", "00004"]
    assert next(iter_texts([val_file()])).startswith("shard 4 ")
    cli("-n", "3", "-w", "1")  # what is there is not fetched again
    assert len(hub.paths) == 4
    cli("-n", "-1")
    assert have(own_base_dir) == ["00000", "00001", "00002", "00003", "00004"]


def test_another_repository_of_the_same_layout(hub: FileServer, own_base_dir: Path) -> None:
    hub.files = {path.replace(dataset.DEFAULT_REPO, "me/mine"): d for path, d in hub.files.items()}
    cli("-n", "1", "--repo=me/mine")
    assert have(own_base_dir) == ["00000", "00004"]


def test_a_failed_shard_ends_with_1_and_running_again_finishes(
    own_base_dir: Path,
) -> None:
    root = f"/datasets/{dataset.DEFAULT_REPO}/resolve/main"
    wanted = [dataset.shard_name(i) for i in (0, 1, 1822)]
    with FileServer({f"{root}/{name}": shard(7) for name in wanted}) as server:
        server.script[f"{root}/{wanted[0]}"] = [truncate(1000)]  # mended on the way
        server.script[f"{root}/{wanted[1]}"] = [fail(404)]
        runs = []
        for _ in range(2):
            command = [sys.executable, "-m", "nanochat.dataset", "-n", "2"]
            env = {**os.environ, "HF_ENDPOINT": server.url}
            runs.append(
                subprocess.run(
                    command, env=env, capture_output=True, text=True, encoding="utf-8", check=False
                )
            )
    assert runs[0].returncode == 1
    assert "1 shards failed; run the same command again" in runs[0].stderr
    assert f"{wanted[1]} answered HTTP 404" in runs[0].stderr
    assert "Traceback" not in runs[0].stderr
    assert runs[1].returncode == 0, runs[1].stderr
    assert "2 shards were there, 1 fetched" in runs[1].stdout
    assert have(own_base_dir) == ["00000", "00001", "01822"]


def test_what_is_no_parquet_file_never_gets_a_name(
    hub: FileServer, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.download.RETRIES", 1)
    path = next(path for path in hub.files if "00001" in path)
    hub.files[path] = b"<html>please log in</html>"
    with pytest.raises(SystemExit) as ended:
        cli("-n", "2")
    assert ended.value.code == 1
    assert have(own_base_dir) == ["00000", "00004"]


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(
    hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"3 shards need .* GB free; use a smaller -n"):
        dataset.main(dataset.Args(num_files=2))
    assert hub.paths == []


@pytest.mark.parametrize("number", [0, -2])
def test_a_number_that_means_nothing(hub: FileServer, number: int) -> None:
    with pytest.raises(UserError, match=f"-n {number}"):
        dataset.main(dataset.Args(num_files=number))
