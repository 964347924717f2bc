"""
The chapters in docs/: their examples run and give what they show, their commands run in a tiny
world, their links lead somewhere.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from scripts import plan
from tests.conftest import REPO
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, RL_FLAGS, new_world, run_stage

PAGES = sorted((REPO / "docs").glob("*.md"))
CHAPTERS = [page for page in PAGES if page.name[0].isdigit()]


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_examples_give_what_they_show(page: Path, own_base_dir: Path) -> None:
    """Python's own doctest; a chapter is one session, in an empty base directory."""
    failed, tried = doctest.testfile(
        str(page), module_relative=False, encoding="utf-8",
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )  # fmt: skip
    assert tried > 3 and failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_chapters_are_numbered_and_have_exercises_with_answers() -> None:
    assert [page.name[:2] for page in CHAPTERS] == [f"{i + 1:02}" for i in range(len(CHAPTERS))]
    for page in CHAPTERS:
        text = page.read_text(encoding="utf-8")
        assert "## Exercises" in text and "<summary>Answers</summary>" in text, page.name
        assert len(text.splitlines()) < 250, f"{page.name} is no short chapter"


# What makes a command tiny, by what it runs; the rest of it is run as it stands in the chapter.
CPU = "--device_type=cpu"
SMALLER = {
    "scripts.tok_train": ["--vocab_size=500"],
    "scripts.base_train": [*BASE_FLAGS, "--num_iterations=2"],
    "scripts.mid_train": [*MID_FLAGS, "--num_iterations=2"],
    "scripts.chat_sft": [*MID_FLAGS[2:], "--num_iterations=2", "--eval_tokens=512"],
    "scripts.chat_dpo": [CPU],
    "scripts.chat_rl": [*RL_FLAGS[1:], "--num_iterations=1", "--max_new_tokens=4"],
    "scripts.chat_eval": [CPU, "-x", "4", "-m", "4"],
    "scripts.chat_cli": [CPU, "-m", "4"],
    "scripts.plan": ["--max_seq_len=64"],
    "nanochat.dataset": ["--workers=1"],
}
# Commands that are parsed here (tests/test_structure.py parses all) and not run, and why.
ONLY_PARSED = {
    "torchrun": "takes eight GPUs; tests/test_ranks.py runs torchrun",
    "--arch=qwen2.5-0.5b": "half a billion parameters; tests/test_train.py runs a small one",
    "nanochat.dataset -n 8": "downloads; tests/test_download.py runs it against a server here",
    "--executor=ray": "starts a cluster, which takes a while; tests/test_prepare.py does so",
    "scripts.hf_import": "downloads; tests/scripts/test_hf_import.py imports a folder",
    "--source_tag=qwen": "goes on with that download; tests/test_lora.py runs --lora_rank",
    "HumanEval": "problems are downloaded; tests/scripts/test_chat_eval.py runs it on a few",
    "bench.decode_speed": "takes minutes; tests/test_decode_speed.py runs it small",
    "scripts.chat_web": "serves until it is stopped; tests/scripts/test_chat_web.py runs it",
    "scripts.miniseries": "four trainings; tests/scripts/test_miniseries.py runs it small",
}


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command in the page's blocks of shell."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def reason_not_to_run(words: list[str]) -> str | None:
    line = " ".join(words)
    return next((reason for part, reason in ONLY_PARSED.items() if part in line), None)


@pytest.fixture(scope="module")
def docs_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a reader of the chapters has: data, own files beside it, and a run, d6. The
    commands add to it, chapter after chapter."""
    with new_world(tmp_path_factory) as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plan, "SIZES", ("--depth=2", "--depth=4"))  # its table takes large shapes
        shutil.copytree(folder / "task_data" / "primer-chat", folder / "task_data" / "smoltalk")
        chats = (folder / "task_data" / "primer-chat" / "train.jsonl").read_text(encoding="utf-8")
        Path("my_conversations.jsonl").write_text("\n".join(chats.splitlines()[:20]) + "\n")
        problems = folder / "task_data" / "primer-math" / "train.jsonl"
        shutil.copy(problems, "my_problems.jsonl")
        pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
        rows = [{**pair, "prompt": f"Hi {i}"} for i in range(20)]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("my_texts").mkdir()
        for i in range(3):
            Path(f"my_texts/{i}.txt").write_text("A dog says woof. " * 200, encoding="utf-8")
        run_stage("base_train", *SMALLER["scripts.base_train"], "--model_tag=d6")
        yield folder


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=lambda page: page.stem)
def test_commands_run(page: Path, docs_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as their command lines would, in the order of the chapters."""
    if page.stem == "many_machines":
        pytest.skip("takes several hosts: tests/test_nodes.py makes some of this one")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(docs_world))
    monkeypatch.chdir(docs_world)
    for words in commands_of(page):
        if reason_not_to_run(words) is None:
            run(words)


def run(words: list[str]) -> None:
    """python -m NAME FLAGS, made tiny. What it says goes to a string, not to a terminal."""
    assert words[:2] == ["python", "-m"], words
    name, argv = words[2], words[3:]
    try:
        module: Any = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(name)
    smaller = SMALLER.get(name, [])
    if name == "scripts.plan" and any(word.startswith("--depth=") for word in argv):
        smaller = [*smaller, "--depth=4"]
    if name == "scripts.base_train":  # a run keeps the name that its depth would give it
        depth = next((word for word in argv if word.startswith("--depth=")), "--depth=20")
        arch = "turbo-" * ("--arch=turbo" in argv)
        smaller = [*smaller, f"--model_tag={arch}d{depth.removeprefix('--depth=')}"]
    if name == "scripts.chat_sft" and not any("source" in word for word in argv):
        smaller = [*smaller, "--source=mid"]
    if name == "scripts.chat_sft" and not any(w.startswith(("--data", "--mix")) for w in argv):
        smaller = [*smaller, *MID_FLAGS[:2]]  # the default mixture is downloaded
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main(flags.parse(module.Args, [*argv, *smaller]))
    assert said.getvalue().strip(), f"{words} said nothing"


def test_what_is_not_run_is_still_in_the_chapters() -> None:
    """No reason outlives its command."""
    lines = [" ".join(words) for page in PAGES for words in commands_of(page)]
    for part in ONLY_PARSED:
        assert any(part in line for line in lines), part
