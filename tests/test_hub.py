"""Downloading a data set: `python -m nanochat.dataset` against a hub that fails in every way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import dataset, flags, shards
from nanochat.common import UserError
from nanochat.dataset import iter_texts, split_files, val_file
from nanochat.shards import DEFAULT_REPO, shard_name
from tests.conftest import REPO
from tests.servers_for_tests import (
    FakeHub,
    FileServer,
    drip,
    fail,
    html,
    redirect,
    reset,
    shard,
    stall,
    truncate,
)
from tests.terminals_for_tests import on_a_terminal

QUICK = ("--tries=3", "--timeout=1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The default data set, of five shards, on a server without a listing."""
    monkeypatch.setattr(shards, "LAST_SHARD", 4)
    with FakeHub(DEFAULT_REPO, [shard_name(i) for i in range(5)]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Another data set, of seven shards, with a listing."""
    with FakeHub("me/mine", [shard_name(i) for i in range(7)]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.publish_listing()
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries, in this process."""
    monkeypatch.setattr("nanochat.download.random.uniform", lambda low, high: 0.01)


def have(base_dir: Path) -> list[str]:
    """What lies in base_data/: shards by their number, anything else by its name."""
    names = (p.name for p in (base_dir / "base_data").iterdir())
    return sorted(re.sub(r"^shard_(\d{5})\.parquet$", r"\1", name) for name in names)


def cli(*argv: str) -> None:
    dataset.main(flags.parse(dataset.Args, [*QUICK, *argv]))


# ---- which shards


@pytest.mark.parametrize("listed", [False, True])
def test_the_first_n_and_the_validation_shard(
    hub: FakeHub, own_base_dir: Path, listed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if listed:
        hub.publish_listing()
    cli("-n", "2")
    assert have(own_base_dir) == ["00000", "00001", "00004"]
    assert next(iter_texts([val_file()])).startswith("shard 4 ")
    assert "0 shards were there, 3 fetched (0.0 MB), 0 failed" in capsys.readouterr().out
    cli("-n", "3", "-w", "1")  # what is there is not fetched again
    assert "3 shards were there, 1 fetched" in capsys.readouterr().out
    assert sorted(hub.shards_asked_for()) == ["00000", "00001", "00002", "00004"]
    cli("-n", "-1")
    assert have(own_base_dir) == ["00000", "00001", "00002", "00003", "00004"]
    cli("-n", "99")  # there are no more


def test_another_data_set_has_a_last_shard_of_its_own(other: FakeHub, own_base_dir: Path) -> None:
    cli("-n", "2", "--repo=me/mine")
    assert have(own_base_dir) == ["00000", "00001", "00006"]
    split = split_files()
    assert (split.val.name, [f.name for f in split.train]) == (
        shard_name(6), [shard_name(0), shard_name(1)],
    )  # fmt: skip
    # It grows. Validation is what it was.
    for i in (7, 8):
        other.files[other.root + shard_name(i)] = shard(i)
    other.publish_listing()
    cli("-n", "-1", "--repo=me/mine")
    assert len(have(own_base_dir)) == 9
    assert split_files().val.name == shard_name(6) and len(split_files().train) == 8


def test_the_recorded_shard_counts_for_more_than_the_default_name(
    other: FakeHub, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LAST_SHARD", 1)
    cli("-n", "3", "--repo=me/mine")
    assert split_files().val.name == shard_name(6)
    (own_base_dir / "base_data" / shard_name(6)).unlink()
    with pytest.raises(UserError, match=r"shard_00006.* Finish the download: .*--repo=me/mine"):
        split_files()


def test_without_a_listing_another_data_set_is_laid_out_like_the_default(
    hub: FakeHub, own_base_dir: Path
) -> None:
    hub.files = {path.replace(DEFAULT_REPO, "me/mine"): d for path, d in hub.files.items()}
    cli("-n", "1", "--repo=me/mine")
    assert have(own_base_dir) == ["00000", "00004"]


def test_a_listing_that_fails_stops_only_what_needs_it(
    hub: FakeHub, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.script[hub.tree] = [fail(503, Retry_After=0)] * 99
    cli("-n", "1")  # of the default, everything is known
    assert have(own_base_dir) == ["00000", "00004"]
    hub.script["/api/datasets/me/mine/tree/main?limit=1000"] = [fail(503, Retry_After=0)] * 99
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(own_base_dir / "second"))
    with pytest.raises(UserError, match=r"could not download .*tree/main.*HTTP 503"):
        cli("-n", "1", "--repo=me/mine")  # its last shard is not


def test_two_data_sets_never_mix(other: FakeHub, own_base_dir: Path) -> None:
    cli("-n", "1", "--repo=me/mine")
    before = have(own_base_dir)
    with pytest.raises(UserError, match=f"holds shards of me/mine; those of {DEFAULT_REPO}"):
        cli("-n", "1")
    listing = json.dumps([{"path": shard_name(i), "size": 9} for i in range(3)]).encode()
    other.files[other.tree.replace("me/mine", "you/yours")] = listing
    with pytest.raises(UserError, match="holds shards of me/mine; those of you/yours"):
        cli("-n", "1", "--repo=you/yours")
    assert have(own_base_dir) == before


def test_files_of_the_same_name_from_elsewhere_are_noticed(
    hub: FakeHub, own_base_dir: Path
) -> None:
    """The primer's shards are called shard_00000 and so on, too."""
    hub.publish_listing()
    folder = own_base_dir / "base_data"
    folder.mkdir(parents=True)
    (folder / shard_name(1)).write_bytes(shard(9, rows=5))
    with pytest.raises(UserError, match=r"holds shard_00001\.parquet of another size"):
        cli("-n", "2")
    assert hub.shards_asked_for() == []


def test_the_token_opens_what_is_private_and_goes_nowhere_else(
    other: FakeHub, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FileServer(
        {"/more": b'[{"path": "shard_00001.parquet"}]'}
    ) as elsewhere:  # where a mirror's listing goes on
        other.headers[other.tree] = {"Link": f'<{elsewhere.url}/more>; rel="next"'}
        other.files[other.root + shard_name(0)] = shard(0)
        cli("-n", "-1", "--repo=me/mine")
        assert elsewhere.tokens == [None]
    assert set(other.tokens) == {"Bearer hf_secret"}


def test_the_pin_of_other_data_is_not_the_last_shard(other: FakeHub, own_base_dir: Path) -> None:
    """base_data/ held the primer once: its validation shard is a training shard here."""
    pins = {"base_data": {"file": shard_name(4), "by_hash": False}}
    own_base_dir.mkdir()
    (own_base_dir / "validation_files.json").write_text(json.dumps(pins), encoding="utf-8")
    cli("-n", "5", "--repo=me/mine")
    assert split_files().val.name == shard_name(6)


def test_a_data_set_of_another_layout(other: FakeHub) -> None:
    other.files[other.tree] = b'[{"type": "file", "path": "data.csv", "size": 3}]'
    other.headers.clear()
    with pytest.raises(UserError, match=r"holds no files shard_00000.*found data\.csv"):
        cli("-n", "1", "--repo=me/mine")


@pytest.mark.parametrize("argv", [("-n", "0"), ("-n", "-2"), ("-w", "0"), ("--tries=0",)])
def test_a_number_that_means_nothing(hub: FakeHub, argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=argv[0][:4].rstrip("=")):
        cli(*argv)
    assert hub.paths == []


# ---- what fails


def test_every_fault_at_once_is_mended_on_the_way(hub: FakeHub, own_base_dir: Path) -> None:
    paths = [hub.root + shard_name(i) for i in range(5)]
    hub.script = {
        paths[0]: [truncate(1000), fail(429, Retry_After=0)],
        paths[1]: [stall(2.0), fail(500, Retry_After=0)],
        paths[2]: [reset(500), html],
        paths[3]: [redirect(hub.url + paths[4], X_Linked_ETag="0" * 64)],  # a wrong hash
    }
    cli("-n", "-1", "-w", "5")
    assert have(own_base_dir) == ["00000", "00001", "00002", "00003", "00004"]
    for i in range(5):
        file = own_base_dir / "base_data" / shard_name(i)
        assert file.read_bytes() == hub.files[paths[i]]


def test_what_cannot_be_had_is_named_and_the_rest_is_fetched(
    hub: FakeHub, own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub.files[hub.root + shard_name(1)]
    hub.files[hub.root + shard_name(2)] = b"<html>please log in</html>"
    with pytest.raises(UserError) as error:
        cli("-n", "-1", "-w", "1")
    assert have(own_base_dir) == ["00000", "00003", "00004"]
    assert "0 shards were there, 3 fetched" in capsys.readouterr().out
    message = str(error.value)
    assert message.startswith("2 shards failed; run the same command again")
    assert re.search(r"shard_00001\.parquet: .* answered HTTP 404", message)
    assert re.search(r"shard_00002\.parquet: .* not a parquet file.*<html>please", message)


def test_the_hash_of_the_listing_is_checked(hub: FakeHub, own_base_dir: Path) -> None:
    hub.publish_listing()
    spoiled = bytearray(hub.files[hub.root + shard_name(0)])
    spoiled[50] ^= 1  # inside of a row group: the footer knows nothing of it
    hub.files[hub.root + shard_name(0)] = bytes(spoiled)
    with pytest.raises(UserError, match=r"shard_00000\.parquet: .*SHA-256"):
        cli("-n", "2")
    assert have(own_base_dir) == ["00001", "00004"]


def test_where_nobody_answers_it_ends_after_the_first_file(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileServer({}) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"21 shards failed.*(?s:.*)stopped with the others"):
        cli("-n", "20", "-w", "2", "--tries=1")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("listed", [False, True])
def test_a_disk_that_is_too_small_is_found_before_the_first_byte(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    if listed:
        hub.publish_listing()
    sizes = [len(hub.files[hub.root + shard_name(i if listed else 4)]) for i in (0, 1, 4)]
    usage = type("Usage", (), {"free": sum(sizes) - 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"3 files need .* kB and .* kB free; use a smaller -n"):
        cli("-n", "2")
    assert hub.shards_asked_for() == []
    usage.free += 200 if listed else sum(sizes)  # no more than what they need, or are taken to
    cli("-n", "2")


def test_what_has_come_already_needs_no_room(
    hub: FakeHub, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish_listing()
    data = hub.files[hub.root + shard_name(0)]
    folder = own_base_dir / "base_data"
    folder.mkdir(parents=True)
    (folder / f"{shard_name(0)}.part").write_bytes(data[:2000])
    rest = len(data) - 2000 + len(hub.files[hub.root + shard_name(4)])
    usage = type("Usage", (), {"free": rest})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    cli("-n", "1")
    assert have(own_base_dir) == ["00000", "00004"]


# ---- the process: exit status, signals, two of them


def start(server: FakeHub, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nanochat.dataset", "--timeout=5", *argv],
        cwd=REPO, env={**os.environ, "HF_ENDPOINT": server.url}, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def real_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The default data set with the names that it has: 1,823 shards, of which a few are there."""
    with FakeHub(DEFAULT_REPO, [shard_name(i) for i in (0, 1, 2, 1822)]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_failed_shard_ends_with_1_and_running_again_finishes(
    real_hub: FakeHub, own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_hub.script[real_hub.root + shard_name(1)] = [fail(404)]
    process = start(real_hub, "-n", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1 shards failed; run the same command again" in err
    assert f"{shard_name(1)} answered HTTP 404" in err
    assert "Traceback" not in err and "\x1b" not in out + err  # no terminal, no escapes
    cli("-n", "2")
    assert "2 shards were there, 1 fetched" in capsys.readouterr().out
    assert have(own_base_dir) == ["00000", "00001", "01822"]


def test_ctrl_c_keeps_what_has_come(real_hub: FakeHub, own_base_dir: Path) -> None:
    real_hub.always = drip(50, 1)  # minutes a file, so that none is whole however slow we are
    process = start(real_hub, "-n", "3")
    part = own_base_dir / "base_data" / f"{shard_name(0)}.part"
    while not (part.exists() and part.stat().st_size > 0):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what has come is kept" in err and not out
    assert "interrupted" in err and "Traceback" not in err
    assert not list(part.parent.glob("*.parquet"))
    parts = sum(p.stat().st_size > 0 for p in part.parent.glob("*.part"))
    real_hub.always = None
    before = len(real_hub.ranges)
    cli("-n", "3")
    assert have(own_base_dir) == ["00000", "00001", "00002", "01822"]
    assert len([r for r in real_hub.ranges[before:] if r]) == parts  # each was continued


def test_two_processes_share_the_work(real_hub: FakeHub, own_base_dir: Path) -> None:
    real_hub.always = drip(1000, 0.1)
    both = [start(real_hub, "-n", "3", "-w", "2") for _ in range(2)]
    outs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert have(own_base_dir) == ["00000", "00001", "00002", "01822"]
    # Each shard came once, whoever fetched it
    assert sorted(real_hub.shards_asked_for()) == ["00000", "00001", "00002", "01822"]
    fetched = [int(re.search(r"(\d+) fetched", out)[1]) for out, _ in outs]  # type: ignore[index]
    assert sum(fetched) == 4


# ---- progress


def test_on_a_terminal_it_is_live(hub: FakeHub, own_base_dir: Path) -> None:
    """Files, bytes and a bar, over and over on one line."""
    shown = on_a_terminal(
        "from nanochat import dataset, flags, shards; shards.LAST_SHARD = 4; "
        "flags.run(dataset.main, dataset.Args, ['-n', '2'])",
        HF_ENDPOINT=hub.url,
    )
    size = sum(path.stat().st_size for path in (own_base_dir / "base_data").iterdir())
    # All of them, though the size of each was taken for that of the first
    kb = f"{size / 1000:.1f} kB"
    assert "3/3 files" in shown and "━" in shown and f"{kb} of {kb}" in shown
    assert have(own_base_dir) == ["00000", "00001", "00004"]
