"""Mistakes and mishaps: each ends as one message with the value and what mends it."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint, dataset, errors, flags
from nanochat.common import UserError, atomic_write
from nanochat.distributed import pick_device_type
from nanochat.report import __main__ as report
from nanochat.serve.run import listen
from scripts import (
    base_train,
    chat_cli,
    chat_eval,
    chat_rl,
    chat_sft,
    hf_export,
    hf_import,
    plan,
    tok_eval,
    tok_train,
)
from tests.conftest import REPO
from tests.tiny_world import BASE_FLAGS, new_world, run_stage

TRAIN = [*BASE_FLAGS, "--compile=off", "--num_iterations=1"]


@dataclass
class Args:
    """Do something."""

    out: str = ""
    """Where to."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with data, a tokenizer and the checkpoint of one step."""
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *TRAIN)
    (folder / "a file").write_text("no folder", encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    (folder / "columns.jsonl").write_text('{"txt": "good"}\n', encoding="utf-8")
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    (folder / "empty.txt").touch()
    (folder / "table.csv").write_text("a,b\n", encoding="utf-8")
    return folder


def said_by(
    capsys: pytest.CaptureFixture[str], main: Callable[..., object], args_class: type, *argv: str
) -> tuple[int, str]:
    """Runs a command in this process: its exit status, and what it says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        flags.run(main, args_class, argv)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def assert_one_message(status: int, err: str, words: str) -> None:
    assert status == 1, err
    assert "Traceback" not in err
    messages = re.findall(r"^error", err, re.MULTILINE)
    assert len(messages) == 1 and err.startswith("error"), err
    assert re.search(words, " ".join(err.split())), err


# ---- commands as a user types them. {base} is a base directory with one base checkpoint

MISTAKES = {
    "no such data": (base_train, [*TRAIN, "--data=/nowhere"], r"/nowhere: --data takes"),
    "data of another kind": (
        tok_train, ["--data={base}/table.csv"], r"table\.csv: cannot read this kind",
    ),
    "a broken line": (tok_train, ["--data={base}/bad.jsonl"], r"bad\.jsonl:2: not valid JSON"),
    "other columns": (tok_train, ["--data={base}/columns.jsonl"], r"field `text`.*fields txt"),
    "a broken shard": (tok_train, ["--data={base}/bad.parquet"], r"bad\.parquet .*parquet"),
    "no checkpoint of the stage": (
        chat_cli, ["--source=rl", "--prompt=x"], r"no rl checkpoint .*scripts\.chat_rl",
    ),
    "no such tag": (
        chat_cli, ["--source=base", "--model_tag=d9", "--prompt=x"], "--model_tag=d9",
    ),
    "no such step": (
        chat_cli, ["--source=base", "--step=77", "--prompt=x"], r"no step 77; it has \[1\]",
    ),
    "resumed from a step that is not there": (
        base_train, [*TRAIN, "--resume_from_step=9"], r"no step 9; it has \[1\]",
    ),
    "resumed with other flags": (
        base_train, [*TRAIN, "--resume", "--seed=7"], r"--seed was 42, now it is 7.*model_tag",
    ),
    "resumed as another architecture": (
        base_train, [*TRAIN, "--resume", "--arch=qwen2.5"], "cannot resume .*architecture",
    ),
    "no such architecture": (plan, ["--arch=llama"], "--arch=llama is not known; choose one of"),
    "no depth": (base_train, ["--depth=0"], "--depth=0 must be at least 1"),
    "no steps": (base_train, ["--num_iterations=0"], "--num_iterations=0 must be .*default is -1"),
    "no rows": (chat_sft, ["--device_batch_size=0"], "--device_batch_size=0 must .*is auto"),
    "fewer than no tokens": (base_train, ["--max_seq_len=-1"], "--max_seq_len=-1 must be at least"),
    "a tag that is a path": (base_train, ["--model_tag=../x"], "--model_tag=../x must be the name"),
    "a negative temperature": (
        chat_cli, ["--source=base", "-t", "-1"], "--temperature=-1 must be at least 0; .* is 0.6",
    ),
    "more than the whole": (base_train, ["--warmdown_ratio=2"], "--warmdown_ratio=2 must be a"),
    "a batch of parts of rows": (
        base_train, [*TRAIN, "--total_batch_size=100"], "not a multiple .*Use --total_batch_size",
    ),
    "no such device": (base_train, [*TRAIN, "--device_type=gpu"], "choose one of cuda, cpu, mps"),
    "no such task": (
        chat_eval, ["-i", "base", "-a", "gsm9k", "--device_type=cpu"], "no task 'gsm9k'.*gsm8k",
    ),
    "tasks joined by commas": (
        chat_eval, ["-i", "base", "-a", "gsm8k,mmlu", "--device_type=cpu"], r"are joined by \|",
    ),
    "a mixture of so many what": (
        chat_sft, ["--source=base", "--mixture=primer-facts@all", "--device_type=cpu"],
        r"rows and epochs are whole numbers, as in smoltalk@5000\*2",
    ),
    "nothing to validate on": (tok_eval, ["--data={base}/empty.txt"], "text .*empty.txt is empty"),
    "a report on no run": (
        report, ["--model_tag=d9"], "no metrics of --model_tag=d9; the runs there are: base/d2",
    ),
    "no vocabulary to plan for": (plan, ["--depth=2", "--vocab_size=0"], "vocab_size=0 must be at"),
    "a step of nothing": (chat_rl, ["--examples_per_step=0"], "examples_per_step=0 must be at"),
    "another stage's model": (
        chat_sft, ["--source=mid", "--device_type=cpu"], r"no mid checkpoint .*scripts\.mid_train",
    ),
    "an export into a folder with files": (
        hf_export, ["--source=base", "--out={base}"], "is not empty; .*--overwrite",
    ),
    "an export below a file": (
        hf_export, ["--source=base", "--out={base}/a file/x"], "a file is a file where a folder",
    ),
    "an import of nothing": (hf_import, ["--from=/nowhere"], "--from=/nowhere is neither a folder"),
    "a message that is too long": (
        chat_cli, ["--source=base", "-p", "word " * 300], "context is 64.*shorter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_as_one_message(
    name: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, argv, words = MISTAKES[name]
    argv = [word.replace("{base}", str(base)) for word in argv]
    status, err = said_by(capsys, module.main, module.Args, *argv)
    assert_one_message(status, err, words)
    assert not list(base.rglob("*.traceback"))


@pytest.mark.parametrize("stage", [base_train, tok_train])
def test_an_empty_base_directory_says_how_to_begin(
    stage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    module: object = stage
    argv = TRAIN if module is base_train else []
    status, err = said_by(capsys, module.main, module.Args, *argv)  # type: ignore[attr-defined]
    assert_one_message(status, err, r"python -m (scripts\.tok_train|nanochat\.dataset)")


def test_a_base_directory_that_is_a_file(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world / "a file"))
    argv = [f"--data={world}/base_data", "--vocab_size=300"]
    status, err = said_by(capsys, tok_train.main, tok_train.Args, *argv)
    assert_one_message(status, err, r"a file is a file where a folder.*Set NANOCHAT_BASE_DIR")


def test_a_damaged_checkpoint_and_tokenizer_are_named(
    world: Path, own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(world, own_base_dir)
    weights = own_base_dir / "base_checkpoints" / "d2" / "step_000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    talk = ["--source=base", "--prompt=x"]
    status, err = said_by(capsys, chat_cli.main, chat_cli.Args, *talk)
    assert_one_message(status, err, r"step_000001 is damaged: model\.safetensors has 1000 bytes")
    (own_base_dir / "tokenizer" / "tokenizer.json").write_text("{ half", encoding="utf-8")
    status, err = said_by(capsys, base_train.main, base_train.Args, *TRAIN)
    assert_one_message(status, err, r"tokenizer\.json is not valid JSON")


def test_a_port_in_use_names_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, err = said_by(capsys, lambda _: listen("127.0.0.1", port), Args)
    assert_one_message(status, err, f"--port={port} is taken .*--port={port + 1}")


def test_a_closed_input_is_no_conversation(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    status, err = said_by(capsys, chat_cli.main, chat_cli.Args, "--source=base")
    assert_one_message(status, err, "nothing to answer: the standard input is empty; ask with -p")


def test_a_tag_that_another_run_is_writing_is_refused(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    path = base / "base_checkpoints" / ".running" / "both"
    path.parent.mkdir(exist_ok=True)
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "file.write('process 7 on a host'); file.flush(); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"locked\n"
        for resume in ([], ["--resume"]):
            argv = [*TRAIN, "--model_tag=both", *resume]
            status, err = said_by(capsys, base_train.main, base_train.Args, *argv)
            words = r"another run \(process 7 on a host\) is writing the base .*--model_tag"
            assert_one_message(status, err, words)
        other.communicate(b"\n")
    checkpoint.claim("base", "both")  # the other has ended
    checkpoint.claim("base", "both")  # ours already


def test_the_primers_shards_are_not_taken_for_a_downloads(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = (base / "validation_files.json").read_bytes()
    status, err = said_by(capsys, dataset.main, dataset.Args, "-n", "1")
    assert_one_message(status, err, "holds shards of the primer; .*NANOCHAT_BASE_DIR")
    assert (base / "validation_files.json").read_bytes() == pins


# ---- what others raise

UNFORESEEN = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "{base}/x"), r"disk of .*/x is full"),
    "full, somewhere": (OSError(errno.ENOSPC, "No space left on device"), r"`df -h`"),
    "full, in Rust": (Exception("I/O error: No space left on device (os error 28)"), "is full"),
    "not ours": (
        PermissionError(errno.EACCES, "Permission denied", "{base}/x"),
        r"/x may not be read or written.*NANOCHAT_BASE_DIR \(now ",
    ),
    "not ours, by a flag": (
        PermissionError(errno.EACCES, "Permission denied", "/srv/models/new/config.json"),
        r"config\.json may not be .*another place than --out=/srv/models/new",
    ),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), "can only be read"),
    "below a file": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "{file}/x/y"), "/file is a file where",
    ),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file", "/mnt/x"), "/mnt/x is not there"),
    "no host memory": (MemoryError(), "memory has run out.*--device_batch_size"),
    "no GPU memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        r"memory has run out \(CUDA out of memory.*--device_batch_size.*scripts\.plan",
    ),
    "an old driver": (
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        r"driver is older .*\(found version 11040\).*download\.pytorch\.org.*--device_type=cpu",
    ),
    "another CUDA": (
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
        "has no code for this GPU.*uv pip install torch",
    ),
    "a build without CUDA": (
        AssertionError("Torch not compiled with CUDA enabled"), "is a build without CUDA",
    ),
    "a GPU that is busy": (
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "nvidia-smi",
    ),
    "no compiler": (
        RuntimeError("InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')"),
        r"apt install g\+\+.*--compile=off",
    ),
    "no network": (
        ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"), "network was not reached",
    ),
    "no account": (
        RuntimeError("No API key configured. Use `wandb login` to log in."),
        "wandb is not logged in .*WANDB_MODE=offline.*drop --run",
    ),
    "no gguf": (
        ModuleNotFoundError("No module named 'gguf'", name="gguf"), r"uv pip install 'gguf",
    ),
    "no matplotlib": (
        ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot"),
        r"package matplotlib is not installed.*source setup\.sh",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFORESEEN)
def test_what_others_raise_is_put_into_words(
    name: str,
    own_base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    template, words = UNFORESEEN[name]
    (tmp_path / "file").touch()

    def main(args: Args) -> None:
        if isinstance(template, OSError) and template.filename:
            path = template.filename.format(base=own_base_dir, file=tmp_path / "file")
            raise type(template)(template.errno, template.strerror, path)
        raise template

    argv = ["--out=/srv/models/new"]
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    assert_one_message(*said_by(capsys, main, Args, *argv), words)
    _, err = said_by(capsys, main, Args, *argv, "--debug")
    assert "Traceback" in err and re.search(r"^error: ", err, re.MULTILINE)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("out of memory"),  # a value that has such words by chance
        ValueError("Connection refused"),
        FileExistsError(errno.EEXIST, "File exists", "/"),  # a folder: we should have looked
        OSError(errno.EBADF, "Bad file descriptor"),
        ImportError("cannot import name 'x' from 'nanochat.flags'", name="nanochat.flags"),
        ModuleNotFoundError("No module named 'nanochat.x'", name="nanochat.x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_bug_of_ours_is_called_one(error: Exception) -> None:
    assert errors.explain(error) is None


def test_nothing_of_a_bug_is_lost(own_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: Args) -> None:
        print(1 // 0)

    status, err = said_by(capsys, main, Args)
    assert_one_message(
        status, err, r"^error: unexpected ZeroDivisionError: .* \(test_errors\.py:\d+\).*--debug"
    )
    (path,) = (own_base_dir / "rank_logs").iterdir()
    assert str(path) in err
    text = path.read_text(encoding="utf-8")
    assert "Traceback" in text and "print(1 // 0)" in text and f"torch {torch.__version__}" in text
    status, err = said_by(capsys, main, Args, "--debug")
    assert status == 1 and "print(1 // 0)" in err
    assert "This is a bug" in err and "--debug" not in err
    assert len(list(path.parent.iterdir())) == 1


def test_a_bug_where_no_file_can_be_written_shows_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: Args) -> None:
        raise KeyError("x")

    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(errors.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    status, err = said_by(capsys, main, Args)
    assert status == 1 and "Traceback" in err and "error: unexpected KeyError" in err


def test_no_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(UserError, match=r"--device_type=cuda: the NVIDIA driver .*11040"):
        pick_device_type("cuda")
    assert pick_device_type() in ("cpu", "mps")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x.json", "w"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


# ---- the command line itself


@pytest.mark.parametrize(
    ("module", "argv", "words"),
    [
        (base_train, ["--dept=4"], "--dept=4 is not a flag.*nearest is --depth.*base_train --help"),
        (base_train, ["20"], "20 belongs to no flag"),
        (base_train, ["--depth=four"], "--depth=four must be a whole number"),
        (base_train, ["--dtype=fp16"], "--dtype=fp16 must be auto, float32, bfloat16 or float16"),
        (hf_export, [], r"missing: --out=\.\.\. \(Folder to write; .*scripts\.hf_export --help"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(
    module: object, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = said_by(capsys, module.main, module.Args, *argv)  # type: ignore[attr-defined]
    assert_one_message(status, err, words)
    assert err.count("\n") == 1


# ---- processes

BEFORE = """
import os, signal, sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            {action}
sys.meta_path.insert(0, Gone())
"""


def process(
    tmp_path: Path, *command: str, site: str = "", stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own. `site`: what its Python runs before anything else."""
    (tmp_path / "sitecustomize.py").write_text(site, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, stdout=stdout,
        stderr=subprocess.PIPE, encoding="utf-8", timeout=240, check=False, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            1,
            "error: the Python package torch is not installed in .*source setup.sh",
        ),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "interrupted\n$"),
    ],
)
def test_what_happens_before_main_is_one_message_too(
    action: str, status: int, words: str, tmp_path: Path
) -> None:
    """Another Python than the environment's; Ctrl-C while torch is imported."""
    program = ["-m", "scripts.base_train", "--depth=2"]
    done = process(tmp_path, *program, site=BEFORE.format(action=action))
    assert done.returncode == status
    assert re.match(words, done.stderr) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("words", [["-m", "scripts.chat_web"], ["scripts/base_train.py"]])
def test_without_the_environment_one_message_says_how_to_get_it(words: list[str]) -> None:
    """A Python of nothing but its standard library; a script started by its path, too."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", *words]
    done = subprocess.run(
        command, cwd=REPO, env=env, stderr=subprocess.PIPE, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    words_of_it = "error: the Python package torch is not installed in .*(activate|setup.sh)"
    assert re.match(words_of_it, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_an_environment_that_is_there_is_to_be_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr(errors, "ENVIRONMENT", tmp_path)
    assert "source setup.sh" in str(errors.explain(error))  # none is there
    (tmp_path / "pyvenv.cfg").touch()
    assert f"`source {tmp_path}/bin/activate`" in str(errors.explain(error))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # it is active, and lacks something
    assert "source setup.sh" in str(errors.explain(error))


def test_a_script_started_by_its_path_runs(tmp_path: Path) -> None:
    """From any folder, with the code beside it."""
    script = str(REPO / "scripts" / "compare.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "base/d1"], cwd=tmp_path, env=env, stderr=subprocess.PIPE,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: missing: B (The other)"), done.stderr


def test_a_python_that_is_too_old_is_told(tmp_path: Path) -> None:
    site = "import sys, nanochat\nnanochat.OLDEST = (99, 0)\n"
    site = BEFORE.format(action="raise SyntaxError('match')") + site
    site += "sys.excepthook = nanochat.before_main\n"
    done = process(tmp_path, "-m", "scripts.base_train", site=site)
    assert done.returncode == 1
    assert re.match("error: nanochat needs Python 3.10 .*source setup.sh", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes there are of another kind")
def test_a_reader_that_has_enough_and_a_full_disk(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from dataclasses import dataclass\nfrom nanochat import flags\n"
        "@dataclass\nclass Args:\n    x: int = 0\n"
        "flags.run(lambda args: print('much ' * 100_000), Args)\n",
        encoding="utf-8",
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = process(tmp_path, str(program), stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "error: what read the output has ended (as `| head` does)\n"
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = process(tmp_path, str(program), stdout=full.fileno())
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: a disk is full"), done.stderr
