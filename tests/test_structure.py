"""
The house rules, held by a test: import floors, nothing at import, sizes, safety, honest documents.

The rules themselves are in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from tests.conftest import REPO

# A module may import what stands strictly lower, and its own package. A half floor is a landing:
# the module stands on neighbours of its floor (all of floor 0 may use common.py).
FLOORS = {
    "common": 0,
    **dict.fromkeys(
        ["conversation", "download", "execution", "execution_child", "launch", "progress"], 0.5
    ),
    "flag_errors": 0.5,
    "errors": 0.25,
    "rank_log": 0.5,
    "flags": 0.75,
    **dict.fromkeys(["machine", "manifest", "scaling", "schedule", "threads", "vocabulary"], 0.5),
    **dict.fromkeys(["hub", "meeting", "tokenizer_files"], 0.75),
    "hf_code": 0.9,  # runs in transformers, without the rest of the package
    **dict.fromkeys(["heartbeat", "shards"], 0.9),
    **dict.fromkeys(["chat_format", "dataset", "distributed", "models", "packing"], 1),
    "cpu_kernels": 0.9,
    "int8": 0.75,
    **dict.fromkeys(["fp8", "kv_cache", "recompute", "updates"], 1),
    **dict.fromkeys(["compiling", "precision"], 1.25),
    **dict.fromkeys(["communication", "fixed_memory", "memory_trace", "shard"], 1.5),
    **dict.fromkeys(["chat_template", "token_cache", "tokenizer"], 1.5),
    "step_program": 1.6,
    **dict.fromkeys(["cluster", "matrices", "static_step", "training_trace"], 1.75),
    **dict.fromkeys(["dataloader", "optim", "reply", "sampling", "tasks", "text_source"], 2),
    **dict.fromkeys(["serving", "tools"], 2),
    **dict.fromkeys(["conversation_source", "lora"], 2.25),
    **dict.fromkeys(["plan", "prepare", "primer", "rewards"], 2.5),
    **dict.fromkeys(["scheduler", "traffic"], 2.75),
    "rows": 2.9,
    **dict.fromkeys(["checkpoint", "engine", "hf", "retokenize"], 3),
    "meter": 3,
    **dict.fromkeys(["hf_export", "hf_import", "recipe", "start", "step"], 3.5),
    **dict.fromkeys(["budget", "gguf", "record", "trial"], 3.75),
    **dict.fromkeys(["evals", "policy", "preview", "report", "serve", "terminal", "train"], 4),
    **dict.fromkeys(["dpo", "finetune", "rollout"], 4.5),
}
MAX_LINES = 450
MAX_FUNCTION = 70
# Imported by the functions that need them: a chat needs no data sets, a tokenizer no web server.
HEAVY = [
    "datasets",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "prompt_toolkit",
    "ray",
    "transformers",
    "uvicorn",
    "wandb",
]


def sources(*folders: str) -> list[Path]:
    """Python files below these folders of the repository."""
    found = [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]
    assert found
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(REPO)}:{getattr(node, 'lineno', 0)}"


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# But for those that transformers runs, from an exported folder: they import it, and only it
MODULES = [
    name
    for name in map(module_name, sources("nanochat", "scripts"))
    if not name.startswith("nanochat.hf_code.")
]


# ---- imports


def imported(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, absolute module name) of every import, those inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the whole path"
            for name in node.names:
                yield node, f"{node.module}.{name.name}"


def test_imports_go_strictly_down_the_floors() -> None:
    wrong = []
    for path in sources("nanochat"):
        name = module_name(path)
        own = name.split(".")[1] if "." in name else ""
        if own:
            assert own in FLOORS, (
                f"nanochat/{own} has no floor: give it one in {Path(__file__).name}"
            )
        for node, target in imported(parsed(path)):
            if target.split(".")[0] != "nanochat":
                continue
            other = target.split(".")[1]
            if other != own and FLOORS.get(other, 9) >= FLOORS.get(own, -1):
                wrong.append(f"{where(path, node)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_code_that_leaves_with_an_export_needs_nothing_of_ours() -> None:
    for path in sources("nanochat/hf_code"):
        packages = {target.split(".")[0] for _, target in imported(parsed(path))}
        assert packages <= {"__future__", "typing", "torch", "transformers"}, path


def test_the_package_knows_nothing_of_scripts_and_scripts_not_of_each_other() -> None:
    ours = ("nanochat", "scripts", "tests", "bench")
    wrong = [
        f"{where(path, node)} imports {target}"
        for path in sources("nanochat", "scripts")
        for node, target in imported(parsed(path))
        if target.split(".")[0] in ours[1:]
    ]
    assert not wrong, "\n".join(wrong)


IMPORT_ALL = """
import importlib, json, logging, os, signal, sys
modules = json.loads(sys.argv.pop())
import numpy, pyarrow.parquet, requests, tiktoken, torch, tyro  # what they do is their business
before = dict(os.environ), list(sys.argv), list(logging.root.handlers), os.getcwd()
signals = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
for module in modules:
    importlib.import_module(module)
assert before == (dict(os.environ), sys.argv, logging.root.handlers, os.getcwd())
assert signals == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert not torch.distributed.is_initialized()
heavy = [name for name in HEAVY if name in sys.modules]
assert not heavy, f"imported at the top of some module: {heavy}"
"""


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    modules = [name for name in MODULES if not name.endswith("execution_child")]
    env = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1",
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
    }  # fmt: skip
    for folder in ("home", "tmp", "cwd"):
        (tmp_path / folder).mkdir()
    program = f"HEAVY = {HEAVY}\n{IMPORT_ALL}"
    done = subprocess.run(
        [sys.executable, "-c", program, "--depth=7", json.dumps(modules)],
        env=env, cwd=tmp_path / "cwd", capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert made == ["cwd", "home", "tmp"]


# ---- sizes


def test_files_and_functions_can_be_held_in_the_head() -> None:
    wrong = []
    for path in sources("nanochat", "scripts", "bench"):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > MAX_LINES:
            wrong.append(f"{path.relative_to(REPO)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or 0) - node.lineno + 1
            tells_the_story = path.parent.name == "scripts" and node.name in ("main", "train")
            if length > MAX_FUNCTION and not tells_the_story:
                wrong.append(f"{where(path, node)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


# ---- safety


def dotted(node: ast.expr) -> str:
    """The name that is called: "open", "pickle.load", "?.read_text" for a method of something."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) if isinstance(node.value, ast.Name) else '?'}.{node.attr}"
    return "?"


def calls(path: Path) -> Iterator[tuple[ast.Call, str, dict[str, Any]]]:
    """(call, name, keyword arguments: constants by value, other expressions as nodes)."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            keywords = {
                k.arg: k.value.value if isinstance(k.value, ast.Constant) else k.value
                for k in node.keywords
                if k.arg
            }
            yield node, dotted(node.func), keywords


def test_no_pickle_is_loaded_and_no_text_is_run() -> None:
    wrong = []
    for path in sources("nanochat", "scripts", "bench"):
        runs_programs = path.name == "execution_child.py"  # the sandbox: that is what it is for
        for node, name, keywords in calls(path):
            bad = (
                (name in ("eval", "exec", "compile") and not runs_programs)
                or name in ("os.system", "os.popen", "pickle.load", "pickle.loads")
                or keywords.get("shell", False) is not False
                or (name == "torch.load" and keywords.get("weights_only") is not True)
                or keywords.get("allow_pickle", False) is not False
            )
            if bad:
                wrong.append(f"{where(path, node)}: {name}")
        for node, target in imported(parsed(path)):
            package = target.split(".")[0]
            # One writes a pickle for other programs; one reads it, through a narrow unpickler.
            allowed = path.name in ("tokenizer.py", "tokenizer_files.py") and package == "pickle"
            if package in ("pickle", "dill", "joblib", "marshal", "shelve") and not allowed:
                wrong.append(f"{where(path, node)}: imports {target}")
        for found in ast.walk(parsed(path)):
            if isinstance(found, ast.Attribute) and dotted(found) == "pickle.Unpickler":
                assert path.name == "tokenizer_files.py", where(path, found)
    assert not wrong, "\n".join(wrong)


def opens_text(node: ast.Call, name: str, keywords: dict[str, Any]) -> bool:
    """Whether a call opens a text file, as far as can be seen from outside."""
    if name.endswith((".read_text", ".write_text")):
        return True
    if name in ("os.open", "webbrowser.open") or not (name == "open" or name.endswith(".open")):
        return False
    at = 0 if name.startswith("?") else 1  # path.open(mode), open(path, mode)
    mode = node.args[at] if len(node.args) > at else ast.Constant(keywords.get("mode", "r"))
    modes = [m.value for m in ast.walk(mode) if isinstance(m, ast.Constant)]
    if name == "gzip.open":
        return any("t" in str(m) for m in modes)  # its default is bytes
    return not modes or any("b" not in str(m) for m in modes)


def test_text_is_opened_with_its_encoding() -> None:
    wrong = [
        f"{where(path, node)}: {name}"
        for path in sources("nanochat", "scripts", "bench")
        for node, name, keywords in calls(path)
        if opens_text(node, name, keywords) and "encoding" not in keywords
    ]
    assert not wrong, "\n".join(wrong)


# ---- documents


MODULE = re.compile(r"(?:scripts|nanochat)(?:\.\w+)+")


def commands_in_shell(text: str) -> Iterator[list[str]]:
    """Every command that runs one of our modules, as the words from the module on.

    Variables are replaced by what the text (shell or YAML) assigns to them if those are flags, else
    by 1, which serves as a number and as a name. A function's own arguments ("$@") are left out."""
    text = text.replace("\\\n", " ")
    assigned = dict(
        re.findall(r"""^\s*(?:export )?(\w+)(?:=|: )["'(]*(-[^"')\n]*)["')]*\s*$""", text, re.M)
    )
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#"):  # commands in comments count, prose does not
            line = line.lstrip("# ")
            if not line.startswith(("python ", "torchrun ")):
                continue
        if not MODULE.search(line):
            continue
        line = re.sub(r'"?\$(@|\*|\{\w+\[@\]:?\d*\}|\{@:\d+\})"?', "", line)
        line = re.sub(r"\$\([^)]*\)", "1", line)
        line = re.sub(r"\$\{?(\w+)(?::?-[^}]*)?\}?", lambda m: assigned.get(m[1], "1"), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            at = [i for i, w in enumerate(words) if i > 0 and MODULE.fullmatch(w)]
            if at:
                yield words[at[0] :]
            words = []


def commands_in_markdown(text: str) -> Iterator[list[str]]:
    """The same for fenced blocks and for `python -m ...` within a sentence or table."""
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
    for language, block in fence.findall(text):
        if language in ("", "bash", "sh"):
            yield from commands_in_shell(block)
    for span in re.findall(r"`((?:python|torchrun) [^`\n]+)`", fence.sub("", text)):
        yield from commands_in_shell(span)


def documents() -> list[Path]:
    patterns = ("*.md", "*.sh", "docs/**/*.md", "recipes/**/*", "tests/run.sh")
    return [path for pattern in patterns for path in sorted(REPO.glob(pattern)) if path.is_file()]


def documented_commands() -> list[Any]:
    found = []
    for path in documents():
        read = commands_in_markdown if path.suffix == ".md" else commands_in_shell
        for words in read(path.read_text(encoding="utf-8")):
            found.append(pytest.param(words, id=f"{path.name}: {' '.join(words)}"))
    for path in sources("scripts", "nanochat"):  # "how to run" of the docstrings
        text = (ast.get_docstring(parsed(path)) or "").replace("[-", "-").replace("]", "")
        lines = re.findall(r"^    ((?:python|torchrun) .*(?:\n.*(?<=\\)\n.*)*)", text, re.M)
        for words in commands_in_shell(re.sub(r"\\\n\s*", " ", "\n".join(lines))):
            found.append(pytest.param(words, id=f"{module_name(path)}: {' '.join(words)}"))
    return found


@pytest.mark.parametrize("words", documented_commands())
def test_every_documented_command_parses(words: list[str]) -> None:
    name, *argv = words
    if (REPO / name.replace(".", "/")).is_dir():
        name += ".__main__"
    module = importlib.import_module(name)
    try:
        args = flags.parse(module.Args, argv)
    except SystemExit as ended:
        assert ended.code == 0, f"this does not parse: {shlex.join(words)}"  # --help ends with 0
    else:
        assert isinstance(args, module.Args)


def test_commands_are_found_where_they_are() -> None:
    text = """
    # python -m scripts.a --in=comment
    # the module scripts.a is mentioned, it's no command
    FLAGS="--depth=4 --x"
    python -m scripts.b --one \\
        --two="x | y" $FLAGS | tee log; train scripts.c -- -n "$N" --run="r$RUN" > out 2>&1 &
    train() { torchrun --nproc_per_node=$(nproc) -m "$@"; }
    """
    assert list(commands_in_shell(text)) == [
        ["scripts.a", "--in=comment"],
        ["scripts.b", "--one", "--two=x | y", "--depth=4", "--x"],
        ["scripts.c", "--", "-n", "1", "--run=r1"],
    ]
    markdown = "Use `python -m scripts.a -b` or `scripts.a`.\n```bash\npython -m scripts.b\n```\n"
    markdown += "```python\n>>> from scripts.c import d\n```\n"
    assert list(commands_in_markdown(markdown)) == [["scripts.b"], ["scripts.a", "-b"]]
    shell = [p for p in documents() if p.name == "speedrun.sh"]
    others = [REPO / "docs" / "many_machines.md", *(REPO / "recipes").iterdir()]
    for path in [REPO / "README.md", *shell, *others]:
        assert any(param.id.startswith(path.name) for param in documented_commands()), path.name


def test_every_flag_of_every_command_has_a_help_text() -> None:
    wrong = []
    for path in sources("scripts", "nanochat"):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Args", "Flags")):
                continue
            if not ast.get_docstring(node):
                wrong.append(f"{where(path, node)}: {node.name}")
            for field, after in zip(node.body, [*node.body[1:], None]):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not is_text:
                    wrong.append(f"{where(path, field)}: {ast.unparse(field.target)}")
    assert not wrong, "\n".join(wrong)


def tree_of(page: str) -> list[tuple[str, str]]:
    """(path, description) of the lines of the block under the heading "The tree"."""
    match = re.search(r"^#+ The tree\n.*?^```\w*\n(.*?)^```", page, re.M | re.S)
    assert match, 'CONTRIBUTING.md has no fenced block under a heading "The tree"'
    found: list[tuple[str, str]] = []
    parents: list[str] = []
    for line in match[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        name, _, description = line.strip().partition(" ")
        parents[depth:] = [name]
        found.append(("".join(parents), description.strip()))
    return found


def test_the_readme_is_short_and_names_what_is_there() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    tree = re.search(r"^## The tree\n.*?^```\n(.*?)^```", text, re.M | re.S)
    assert tree
    named = re.findall(r"[\w/]+(?:\.py|\.sh|/)", tree[1])
    missing = [n for n in named if not any((REPO / at / n).exists() for at in ("", "nanochat"))]
    assert len(named) > 20 and not missing


def test_the_tree_is_the_tree_on_disk() -> None:
    tree = tree_of((REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    named = [path for path, _ in tree]
    assert len(named) == len(set(named))
    missing = [path for path in named if not (REPO / path).exists()]
    assert not missing, f"named, but not there: {missing}"
    assert all((REPO / path).is_dir() == path.endswith("/") for path in named)

    there = {
        f"{folder}/{path.name}" + ("/" if path.is_dir() else "")
        for folder in ("nanochat", "scripts")
        for path in (REPO / folder).iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists()
    }
    forgotten = sorted(there - set(named))
    assert not forgotten, f"there, but not named: {forgotten}"

    for path, description in tree:
        if floor := re.match(r"floor (\d)", description):
            module = path.split("/")[1].removesuffix(".py")
            assert int(FLOORS[module]) == int(floor[1]), f"{path} stands on floor {FLOORS[module]}"
