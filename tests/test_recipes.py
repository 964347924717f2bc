"""
The recipes for clusters, and the commands of the documents: shells and parsers take them.

That their flags are those of our scripts tests/test_structure.py says, of all documents.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.conftest import REPO

RECIPES = sorted((REPO / "recipes").iterdir())
DOCUMENTS = [REPO / "README.md", REPO / "speedrun.sh", *sorted((REPO / "docs").glob("*.md"))]


def test_the_recipes_are_short() -> None:
    assert {path.name for path in RECIPES} >= {"train.sbatch", "train.sky.yaml"}
    for path in RECIPES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shell_takes_the_recipe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        task = yaml.safe_load(text)
        known = {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"}
        assert set(task) <= known
        assert all(isinstance(task[part], str) for part in ("setup", "run"))
        text = f"{task['setup']}\n{task['run']}"
        variables = set(re.findall(r"\$\{?([A-Z]\w+)", text)) - set(task["envs"]) - {"HEAD"}
        assert all(name.startswith("SKYPILOT_") for name in variables), variables
    else:
        assert text.startswith("#!/bin/bash\n")
        # Slurm reads its lines up to the first command
        head = text.split("\nset -", 1)[0]
        assert head.count("\n#SBATCH --") == text.count("\n#SBATCH --") > 3
    done = subprocess.run(
        ["bash", "-n"], input=text, capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def torchruns() -> list[Any]:
    """Every torchrun command there is, in words, its variables replaced by 1."""
    found = []
    for path in [*RECIPES, *DOCUMENTS]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"\btorchrun ((?:--|-m)[^`|;&}\n]*)", text):
            if " -m " not in f" {command}":  # a mention
                continue
            words = shlex.split(re.sub(r"\$(\{[^}]*\}|\w+)", "1", command), comments=True)
            found.append(pytest.param(words, id=f"{path.name}: {' '.join(words)}"))
    return found


@pytest.mark.parametrize("words", torchruns())
def test_torchrun_takes_its_own_flags(words: list[str]) -> None:
    args = get_args_parser().parse_args(words)
    assert args.module and args.training_script
    if not args.standalone and args.nnodes != "1:1":  # several nodes must know where they meet
        assert args.rdzv_endpoint or args.master_addr != "127.0.0.1", words


def test_the_commands_were_found() -> None:
    names = {param.id.split(":")[0] for param in torchruns()}
    assert names >= {"train.sbatch", "train.sky.yaml", "speedrun.sh", "many_machines.md"}


def test_two_hosts_by_hand(tmp_path: Path) -> None:
    """The commands of docs/many_machines.md make two hosts, and start a torchrun on each."""
    text = (REPO / "docs" / "many_machines.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if "ip netns add" in b]
    block = block.replace("nano-", f"nano{os.getpid()}-")  # whoever else runs these tests
    probe = ["ip", "netns", "add", f"nano{os.getpid()}-probe"]
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (Debian: iproute2)")
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("network namespaces are not permitted here")
    subprocess.run(["ip", "netns", "delete", probe[-1]], check=True)
    # In torchrun's place a program that says where it is and with what
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        f'#!/bin/sh\n{{ ip -o -4 address show eth0; echo "$@"; }} > {tmp_path}/$$.said\n',
        encoding="utf-8",
    )
    torchrun.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], capture_output=True, encoding="utf-8",
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = sorted(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.said"))
    assert len(said) == 2
    for number, text in enumerate(sorted(said, key=lambda t: "10.77.0.2/24" in t), 1):
        assert f"10.77.0.{number}/24" in text and f"--local_addr=10.77.0.{number} " in text
