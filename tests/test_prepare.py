"""
Preparing shards as many tasks: they fill the cache that training reads, whatever happens to them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import dataset, flags, prepare, shards, text_source
from nanochat.common import UserError, get_base_dir, write_json
from nanochat.dataset import split_files
from nanochat.prepare import _take, estimate, parse_range
from nanochat.text_source import TextSource
from nanochat.tokenizer import get_tokenizer
from tests.conftest import REPO
from tests.servers_for_tests import FakeHub
from tests.tiny_world import BASE_FLAGS, make_world, run_stage
from tests.tokenizers_for_tests import tiny_tokenizer

TEXTS = [f"The boat number {i} comes back before sunrise, isn't it?" for i in range(120)]


@pytest.fixture(autouse=True)
def every_file_is_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_source, "MIN_SHARD", 1)


@pytest.fixture
def own(tmp_path: Path, own_base_dir: Path) -> Path:
    """A folder of five files, of which the last is validation, and a tokenizer."""
    tiny_tokenizer().save(own_base_dir / "tokenizer")
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(5):
        rows = [json.dumps({"text": f"{i} {text}"}) + "\n" for text in TEXTS]
        (folder / f"{i}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def cli(*argv: str) -> None:
    dataset.main(flags.parse(dataset.Args, ["prepare", "--workers=1", *argv]))


def cached(cache: Path | None = None) -> dict[str, bytes]:
    """What is in the cache: folder of a shard -> its ids. Nothing half-written is."""
    folder = cache or get_base_dir() / "token_cache"
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
    assert not [path for path in found if path.name.startswith(".")]
    return {path.name.split("-")[0]: (path / "ids.bin").read_bytes() for path in found}


def never(*args: Any) -> Any:
    raise AssertionError("this was to be ready")


# ---- which shards


def test_a_range_is_as_in_a_slice() -> None:
    assert parse_range(":") == (0, None)
    assert parse_range("3:") == (3, None)
    assert parse_range(":7") == (0, 7)
    assert parse_range("0029:58") == (29, 58)
    for wrong in ("", "3", "-1:4", "1:2:3", "a:b", "0-29"):
        with pytest.raises(UserError, match="write FROM:TO"):
            parse_range(wrong)


@pytest.mark.parametrize("each", [1, 2, 3, 7, 100])
def test_ranges_share_out_all_files_and_validation_once(
    each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_source, "MIN_SHARD", 10)
    files = [f"{i:02}" for i in range(20)]
    sizes = [3, 12, 9, 1, 4, 4, 4, 30, 2, 2, 2, 2, 2, 9, 10, 11, 1, 1, 1, 1]
    whole = text_source.group(files, sizes)
    train, val, seen = [], [], []
    for begin in range(0, 24, each):
        taken, last = _take(files, sizes, "val", begin, begin + each)
        part = text_source.group(taken, [sizes[files.index(name)] for name in taken])
        assert part == whole[begin : begin + each]  # what a task makes is what training looks for
        train += taken
        val += last
        seen += part
    assert (train, val, seen) == (files, ["val"], whole)


def test_a_range_beyond_the_end_is_no_error(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"--data={own}", "--shard_range=5:9")
    assert "nothing to do" in capsys.readouterr().out
    assert not cached()
    cli(f"--data={own}", "--shard_range=4:9")
    assert list(cached()) == ["4"]  # validation, the last


# ---- the same cache


def test_training_starts_at_once_and_tokenizes_nothing(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(own_base_dir)
    for part in ("0:2", "2:4", "4:6"):
        cli(f"--shard_range={part}")
    assert len(cached()) == 5
    monkeypatch.setattr(TextSource, "_encode", never)
    monkeypatch.setattr(TextSource, "prepare", never)
    monkeypatch.setattr(text_source, "_send", never)  # to a process that would prepare shards
    capsys.readouterr()
    run_stage("base_train", *BASE_FLAGS[:5], "--num_iterations=2", *BASE_FLAGS[6:])
    assert "0 of this run's" in capsys.readouterr().out
    files, tokenizer = split_files(), get_tokenizer()
    for source in (TextSource(files.train, tokenizer), TextSource([files.val], tokenizer)):
        source.check_disk(range(source.num_shards()))
        assert all(len(source.load(i).ids) for i in range(source.num_shards()))
    assert "0 of this run's 4 shards" in capsys.readouterr().out


def test_own_data_of_one_file_is_prepared_in_both_parts(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = own / "0.jsonl", tmp_path / "elsewhere"
    cli(f"--data={path}", f"--token_cache_dir={cache}")
    monkeypatch.setattr(TextSource, "_encode", never)
    files, tokenizer = split_files(str(path)), tiny_tokenizer()
    assert files.by_hash
    parts = [
        TextSource([files.val], tokenizer, keep, cache).load(0)
        for keep in (files.keep_train, files.keep_val)
    ]
    assert sum(len(part.lengths) for part in parts) == len(TEXTS)
    assert len(list(cache.glob("*/meta.json"))) == 2
    assert not (get_base_dir() / "token_cache").exists()


# ---- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, own_base_dir: Path) -> Iterator[FakeHub]:
    """The default data set, cut down to four shards and the validation shard."""
    tiny_tokenizer().save(own_base_dir / "tokenizer")
    monkeypatch.setattr(shards, "LAST_SHARD", 4)
    names = [f"shard_{i:05d}.parquet" for i in range(5)]
    with FakeHub("karpathy/fineweb-edu-100b-shuffle", names) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def test_a_task_fetches_its_own_shards_and_no_others(
    hub: FakeHub, own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("--shard_range=1:3")
    assert sorted(hub.shards_asked_for()) == ["00001", "00002"]
    cli("--shard_range=0:1")
    cli("--shard_range=3:5", "-w", "1")
    assert sorted(hub.shards_asked_for()) == ["00000", "00001", "00002", "00003", "00004"]
    assert len(cached()) == 5
    asked = len(hub.paths)
    cli()  # machines without a network do with what is there
    assert len(hub.paths) == asked
    monkeypatch.setattr(TextSource, "_encode", never)
    files = split_files()  # as training finds them, with the validation shard of the data set
    assert files.val.name == "shard_00004.parquet" and len(files.train) == 4
    source = TextSource(files.train, tiny_tokenizer())
    assert [len(source.load(i).lengths) > 0 for i in range(4)] == [True] * 4
    TextSource([files.val], tiny_tokenizer()).load(0)


def test_of_the_first_n_shards_the_validation_shard_is_the_last(hub: FakeHub) -> None:
    cli("-n", "2", "--shard_range=2:")
    assert list(cached()) == ["shard_00004"]
    cli("-n", "2")
    assert sorted(cached()) == ["shard_00000", "shard_00001", "shard_00004"]


def test_another_data_set_is_gone_on_with(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer().save(own_base_dir / "tokenizer")
    with FakeHub("me/mine", [f"shard_{i:05d}.parquet" for i in range(4)]) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        fake.publish_listing()
        cli("--repo=me/mine", "--shard_range=0:2")
        cli("--shard_range=2:")  # what base_data/ holds is recorded
        assert sorted(fake.shards_asked_for()) == ["00000", "00001", "00002", "00003"]
    assert split_files().val.name == "shard_00003.parquet"
    assert len(cached()) == 4


# ---- again, torn, wrong


def test_what_is_done_is_not_done_again(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli(f"--data={own}", "--shard_range=:3")
    assert "0 shards were there, 3 tokenized, 0 failed" in capsys.readouterr().out
    first = cached()
    cli(f"--data={own}")
    assert "3 shards were there, 2 tokenized, 0 failed" in capsys.readouterr().out
    assert len(cached()) == 5
    torn = next((get_base_dir() / "token_cache").glob("1-*")) / "ids.bin"
    torn.write_bytes(b"\0\0" + torn.read_bytes()[2:])
    cli(f"--data={own}")
    assert "4 shards were there, 1 tokenized" in capsys.readouterr().out
    assert {name: cached()[name] for name in first} == first  # it is whole again


def test_a_wrong_shard_is_named_and_the_others_are_made(own: Path) -> None:
    (own / "1.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 shards failed.*\n  1\.jsonl: .*1\.jsonl:1: not valid"):
        cli(f"--data={own}")
    assert sorted(cached()) == ["0", "2", "3", "4"]


SLOW = """
import sys, time
from nanochat import dataset, flags, text_source
from nanochat.tokenizer import Tokenizer
text_source.MIN_SHARD, text_source.BATCH_CHARS = 1, 1000
encode_batch = Tokenizer.encode_batch
def slow(self, texts, prepend=None):
    time.sleep(float(sys.argv[1]))
    return encode_batch(self, texts, prepend)
Tokenizer.encode_batch = slow
flags.run(dataset.main, dataset.Args, ["prepare", "--workers=1", *sys.argv[2:]])
"""


def start(pause: float, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(pause), *argv], cwd=REPO, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_task_leaves_whole_shards_and_is_run_again(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = get_base_dir() / "token_cache"
    process = start(0.1, f"--data={own}")

    def in_the_second() -> bool:
        return any(cache.glob("0-*/meta.json")) and any(cache.glob(".1-*.tmp"))

    wait_for(in_the_second)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    named = [path for path in cache.iterdir() if path.is_dir() and path.name[0] != "."]
    assert [path.name.split("-")[0] for path in named] == ["0"]
    for path in cache.glob(".*.tmp"):  # as an hour later, see token_cache.sweep
        for file in path.iterdir():
            os.utime(file, (0, 0))
        os.utime(path, (0, 0))
    cli(f"--data={own}")
    assert "1 shards were there, 4 tokenized" in capsys.readouterr().out
    cli(f"--data={own}", f"--token_cache_dir={tmp_path / 'undisturbed'}")
    assert cached() == cached(tmp_path / "undisturbed")


def test_two_tasks_on_the_same_shards_share_the_work(own: Path, tmp_path: Path) -> None:
    tasks = [start(0.05, f"--data={own}") for _ in range(2)]
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    counts = [line.split(" shards were there, ") for text in said for line in text.splitlines()
              if "were there" in line]  # fmt: skip
    made = [int(after.split(" tokenized")[0]) for _, after in counts]
    assert len(made) == 2 and sum(made) == 5  # between them, each shard once
    cli(f"--data={own}", f"--token_cache_dir={tmp_path / 'undisturbed'}")
    assert cached() == cached(tmp_path / "undisturbed")


# ---- many processes


def test_processes_make_the_same_cache_and_survive_a_wrong_shard(own: Path, tmp_path: Path) -> None:
    cli(f"--data={own}", f"--token_cache_dir={tmp_path / 'one'}")
    (own / "1.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 shards failed.*\n  1\.jsonl"):
        cli(f"--data={own}", "--workers=2")
    one = cached(tmp_path / "one")
    del one["1"]
    assert cached() == one


WORKERS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from nanochat.prepare import _begin_worker, _cores
context = multiprocessing.get_context("spawn")
arguments = (context.Value("i", 0), _cores(), 2)
pool = ProcessPoolExecutor(2, context, _begin_worker, arguments)
futures = [pool.submit(time.sleep, 0.5) for _ in range(2)]  # both have started then
print(pool.submit(os.sched_getaffinity, 0).result(), flush=True)
print(*pool._processes, flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and a process's cores")
def test_workers_keep_to_their_cores_and_end_with_the_task() -> None:
    task = subprocess.Popen(
        [sys.executable, "-c", WORKERS], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert task.stdout is not None
    cores = ast.literal_eval(task.stdout.readline())
    ours = os.sched_getaffinity(0)
    assert cores < ours if len(ours) > 1 else cores == ours
    workers = [int(word) for word in task.stdout.readline().split()]
    assert len(workers) == 2
    task.kill()
    task.communicate(timeout=60)

    def is_over(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")  # without an init to reap it, it stays a zombie
        try:
            return status.read_text(encoding="utf-8").split()[2] == "Z"
        except OSError:
            return True

    wait_for(lambda: all(map(is_over, workers)))


@pytest.mark.parametrize("argv", [("--workers=0",), ("--workers=-2",), ("--estimate", "--cores=0")])
def test_numbers_that_mean_nothing(argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=re.escape(argv[-1])):
        dataset.main(flags.parse(dataset.Args, ["prepare", *argv]))


# ---- Ray


def test_without_ray_the_message_says_how_to_get_it(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--executor=ray needs Ray: `uv pip install"):
        cli(f"--data={own}", "--executor=ray")


def test_a_cluster_that_is_not_there_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **how: Any) -> None:
        raise ConnectionError(f"nobody at {address}")

    fake = types.SimpleNamespace(init=init, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(--ray_address=nowhere:1\): nobody at nowhere:1"):
        cli(f"--data={own}", "--executor=ray", "--ray_address=nowhere:1")


@pytest.mark.slow
def test_ray_makes_the_same_cache(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    cli(f"--data={own}", f"--token_cache_dir={tmp_path / 'one'}")
    (own / "1.jsonl").write_text("{\n", encoding="utf-8")
    for _ in range(3):
        try:
            ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
            break
        except Exception as e:  # it has a limit of its own of 30 s, and raises no class of its own
            assert "timed out during startup" in str(e)
            ray.shutdown()
    else:
        pytest.skip("Ray itself did not start within its 30 s: the machine is too busy")
    try:
        with pytest.raises(UserError, match=r"1 shards failed.*\n  1\.jsonl: .*not valid JSON"):
            cli(f"--data={own}", "--executor=ray")
        assert ray.is_initialized()  # a cluster that was there before stays
    finally:
        ray.shutdown()
    one = cached(tmp_path / "one")
    del one["1"]
    assert cached() == one
    assert "0 shards were there, 4 tokenized, 1 failed" in capsys.readouterr().out


# ---- on paper


def test_the_estimate_is_reckoned_from_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"cores": 2, "cpu": "a processor"}
    encoders = [
        {"package": "rustbpe", "texts": "str", "pattern": pattern, "threads": threads,
         "mb_per_s": speed, "runs": [{"tokens": 25}]}
        for pattern, threads, speed in [("ours", 1, 99.0), ("ours", 2, 100.0), ("other", 4, 999.0)]
    ]  # fmt: skip
    encoding = {"corpus": {"chars": 100, "mb": 100e-6}, "encoders": encoders, "machine": machine}
    loading = {"real": {"a shard of 250M characters": {"characters": 250e6, "seconds": 8.0}}}
    monkeypatch.setattr(prepare, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=r"bpe_encoding\.json, which is not there"):
        estimate(64, 1.0)
    write_json(tmp_path / "bpe_encoding.json", {**encoding, "load_before": 0.5})
    write_json(tmp_path / "data_loading.json", {**loading, "machine": machine, "load_before": 1})
    monkeypatch.setattr(prepare, "LAST_SHARD", 143)  # 144 shards of 250 MB: 36,000 MB
    text = estimate(10, 2.0)
    # At 50 MB/s a core 720 s of one core; reading too, 144 times 8 s of two
    assert "encoder alone              0.20   0.020     0.40" in text
    assert "read, encode, write        0.64   0.064     1.28" in text
    assert "144 shards, 36B characters" in text
    # In 72 s on 10 cores: 14,400 MB of shards, and 9B tokens of 2 bytes
    assert "200 MB/s of packed\nshards (14 GB in all)" in text and "250 MB/s of ids (18 GB)" in text


def test_the_estimate_of_the_whole_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    cli("--estimate", "--cores=64")
    said = capsys.readouterr().out
    assert "1,823 shards, 456B characters" in said and "on 64 cores" in said


# ---- Slurm


@pytest.mark.parametrize("count", [1, 10, 64, 100, 1823, 2000])
def test_the_array_of_tasks_shares_out_all_shards(count: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    script, seen = REPO / "recipes" / "prepare_data.sbatch", []
    for task in sorted({0, 1, count // 2, count - 1} & set(range(count))):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}",
               "SLURM_ARRAY_TASK_COUNT": str(count), "SLURM_ARRAY_TASK_ID": str(task)}  # fmt: skip
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
        words = done.stdout.split()
        assert words[:3] == ["-m", "nanochat.dataset", "prepare"]
        args = flags.parse(dataset.Args, words[2:])
        assert args.command is not None
        seen.append((task, parse_range(args.command.shard_range)))
    each = -(-1823 // count)
    assert seen == [(task, (task * each, (task + 1) * each)) for task, _ in seen]
    assert count * each >= shards.LAST_SHARD + 1 == 1823
