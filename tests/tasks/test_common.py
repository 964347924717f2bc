"""The Task class, where rows are looked for, and what is said when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.tasks import common
from nanochat.tasks.common import REGISTRY, ChosenRows, Rows, Task, get_task, read_rows, split_files
from tests.tasks.data_for_tests import link, shared, write_jsonl, write_parquet

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


class Numbers(Task):
    """The numbers from 0 to 9."""

    def num_rows(self) -> int:
        return 10

    def conversation(self, i: int) -> Conversation:
        return {"messages": [{"role": "user", "content": str(i)}]}


def said(task: Task) -> list[int]:
    return [int(conversation["messages"][0]["content"]) for conversation in task]


@pytest.mark.parametrize(
    "part", [(0, None, 1), (2, 7, 1), (2, 7, 2), (1, None, 3), (8, 99, 1), (3, 3, 1)]
)
def test_slicing_is_that_of_lists(part: tuple[int, int | None, int]) -> None:
    task = Numbers(*part)
    expected = list(range(10))[slice(*part)]
    assert said(task) == expected
    assert len(task) == len(expected)
    with pytest.raises(IndexError):
        task[len(expected)]


def test_bad_slices_and_missing_answers() -> None:
    for part in [(-1, None, 1), (0, None, 0), (5, 3, 1)]:
        with pytest.raises(UserError, match="no rows are selected"):
            Numbers(*part)
    with pytest.raises(UserError, match="no right answers"):
        Numbers().evaluate({}, "1")


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    first = tmp_path / "a.jsonl"
    first.write_text('{"n": 0}\n\n{"n": 1}\n', encoding="utf-8")  # an empty line is no row
    second = write_parquet(tmp_path / "b.parquet", [{"n": 2, "s": {"x": [1]}}, {"n": 3, "s": None}])
    rows = read_rows([first, second])
    assert [row["n"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["s"] == {"x": [1]}
    assert [rows.where(i) for i in range(4)] == [
        f"{first}:1", f"{first}:3", f"{second}: row 0", f"{second}: row 1",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        rows[4]


def test_broken_files_are_named(tmp_path: Path) -> None:
    for name, content in [("a.parquet", b"PAR1 no"), ("b.parquet", b""), ("c.jsonl", b'{"a": }\n')]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_rows([tmp_path / name])
    with pytest.raises(UserError, match="no rows"):
        read_rows([write_jsonl(tmp_path / "d.jsonl", [])])
    with pytest.raises(UserError, match=r"e.jsonl:1: expected an object, found \[1\]"):
        read_rows([write_jsonl(tmp_path / "e.jsonl", [[1]])])[0]


def test_split_files(tmp_path: Path) -> None:
    assert split_files(tmp_path / "none", "train") == []
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    write_parquet(tmp_path / names[0], [{"n": 0}])
    with pytest.raises(UserError, match="2 shards of train expected"):
        split_files(tmp_path, "train")
    write_parquet(tmp_path / names[1], [{"n": 1}])
    write_parquet(tmp_path / "train-extra-00000-of-00001.parquet", [{"n": 2}])  # another split
    assert [p.name for p in split_files(tmp_path, "train")] == names
    write_jsonl(tmp_path / "test.jsonl", [{"n": 3}])
    assert [p.name for p in split_files(tmp_path, "test")] == ["test.jsonl"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_rows_may_be_packed(tmp_path: Path, kind: str) -> None:
    for i in range(2):
        with pa.output_stream(str(tmp_path / f"train-0000{i}-of-00002.jsonl.{kind}")) as f:
            f.write(b'{"n": %d}\n' % i)
    rows = read_rows(split_files(tmp_path, "train"))
    assert [row["n"] for row in rows] == [0, 1]
    assert rows.where(1).endswith(f"train-00001-of-00002.jsonl.{kind}:1")


def test_chosen_rows_stand_where_they_stood(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": n} for n in range(5)])
    chosen = ChosenRows(read_rows([path]), [3, 1])
    assert [row["n"] for row in chosen] == [3, 1] and len(chosen) == 2
    assert [chosen.where(i) for i in range(2)] == [f"{path}:4", f"{path}:2"]


def test_local_files_come_first(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_rows = [CHAT] * 3
    monkeypatch.setattr(common, "_from_hub", lambda hub: hub_rows)
    assert len(get_task("smoltalk", "train")) == 3
    write_jsonl(base_dir / "task_data" / "smoltalk" / "train.jsonl", [CHAT])
    assert len(get_task("SmolTalk", "train")) == 1
    assert len(get_task("smoltalk", "test")) == 3


GENERATED = ("spelling", "spellingbee", "identity")  # they need neither file nor hub


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in GENERATED])
def test_absent_and_offline_names_both_places(name: str, base_dir: Path) -> None:
    with pytest.raises(UserError) as e:
        get_task(name, REGISTRY[name].splits[0])
    assert str(base_dir / "task_data") in str(e.value)
    assert "hub" in str(e.value)
    assert "no network in tests" in str(e.value)


@pytest.mark.parametrize("name", REGISTRY)
def test_wrong_split_is_refused_before_loading(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("loaded before the split was checked")

    monkeypatch.setattr(common, "load_rows", never)
    with pytest.raises(UserError, match=f"{name} has no split 'nope'; it has"):
        get_task(name, "nope")


@pytest.mark.parametrize(
    ("name", "split", "size"),
    [
        ("smoltalk", "test", 1500), ("mmlu", "test", 14042), ("mmlu", "dev", 285),
        ("arc-easy", "train", 2251), ("arc-challenge", "test", 1172), ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1119), ("humaneval", "test", 164),
    ],
)  # fmt: skip
def test_real_data_as_it_is(name: str, split: str, size: int, base_dir: Path) -> None:
    for folder in ("gsm8k", "humaneval", "mmlu_arc"):
        link(base_dir, folder, shared(folder))
    link(base_dir, "smoltalk", shared("smoltalk_like"))
    task = get_task(name, split)
    assert len(task) == size
    for conversation in list(task)[:: max(1, size // 200)]:
        roles = [m["role"] for m in conversation["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_arc_where_the_hub_puts_it(base_dir: Path) -> None:
    link(base_dir, "arc", shared("mmlu_arc") / "arc")
    assert len(get_task("arc-easy", "test")) == 2376
    link(base_dir, "arc-challenge", shared("mmlu_arc") / "arc" / "ARC-Challenge")
    assert len(get_task("arc-challenge", "test", start=2, stop=12)) == 10


def test_empty_rows() -> None:
    assert len(Rows([])) == 0
