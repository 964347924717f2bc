"""The page: the same content as the Markdown, whole in one file, and nothing in it runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import LOG, run_dir
from nanochat.report.card import write_report
from nanochat.report.html import render, write_pages
from nanochat.report.plot import Panel
from nanochat.report.tables import literal, table

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> `</code>` | ![p](http://e.vil/x.png)"
LOADS = {"src", "srcset", "data", "poster", "background", "action"}


class Page(HTMLParser):
    """Which elements a page has, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def is_harmless(page: Page) -> bool:
    """Nothing that runs, nothing that is loaded: links lead within the page."""
    for _, name, value in page.attributes:
        link = name in ("href", "xlink:href")
        if name.startswith("on") or name in LOADS or (link and not str(value).startswith("#")):
            return False
        if name == "style" and re.search(r"url\((?!#)", str(value)):
            return False
    return not page.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}


def test_what_is_harmless_is_known() -> None:
    bad = ('<script>', '<a href="http://x">', '<p onclick="x">', '<img src="data:,">',
           '<p style="background: url(http://x)">')  # fmt: skip
    assert not any(is_harmless(Page(text)) for text in bad)
    assert is_harmless(Page('<a href="#x">x</a><g clip-path="url(#y)" style="fill: url(#z)"/>'))


def evil_run(**start: Any) -> None:
    """A run of which everything that a model or a user writes is evil."""
    log = run_dir("sft", "d4") / LOG
    log.parent.mkdir(parents=True)
    rows = [
        {"event": "start", "step": 0, "args": {"mixture": EVIL, "sample_prompts": "Hi"},
         "mixture": EVIL, "typed": [f"--data={EVIL}\n```\n{EVIL}"], "started_from": EVIL, **start},
        {"event": "sample", "step": 0, "text": f"<|assistant_start|>{EVIL}"},
        *({"event": "step", "step": i, "loss": 3.0 - i / 50, "seconds": i} for i in range(1, 60)),
        {"event": "sample", "step": 59, "text": f"<|assistant_start|>{EVIL}<|assistant_end|>"},
    ]  # fmt: skip
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("prompts", ["Hi", EVIL, ""])
def test_nothing_that_is_written_runs(own_base_dir: Path, prompts: str) -> None:
    evil_run(args={"sample_prompts": prompts, "data": EVIL})
    folder = own_base_dir / "report"
    items = {"index": 0, "prompt": EVIL, "expected": EVIL, "replies": [{"reply": EVIL}]}
    (folder / "chat_eval").mkdir(parents=True)
    (folder / "chat_eval" / "x.jsonl").write_text(json.dumps(items), encoding="utf-8")
    about = {"source": "sft", "model_tag": "d4", "step": 59}
    row = {**about, "task": EVIL, "accuracy": 0.5, "n": 1, "items": "report/chat_eval/x.jsonl"}
    (folder / "chat_eval.jsonl").write_text(json.dumps(row), encoding="utf-8")
    base = {"source": "base", "model_tag": "x", "step": 1, "samples": [EVIL], "note": EVIL}
    (folder / "base_eval.jsonl").write_text(json.dumps(base), encoding="utf-8")
    token = {"text": "validation", "tokenizer": EVIL, "bytes_per_token": 2.0}
    (folder / "tok_eval.jsonl").write_text(json.dumps(token), encoding="utf-8")
    write_report(folder, folder / "report.md")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert is_harmless(page)
    assert "".join(page.words).count("<script>alert(1)</script>") > 5  # all of it is there to read


@pytest.mark.parametrize(
    "text",
    [*(start + EVIL for start in ("", "| a |\n|---|\n| ", "# ", "## ", "    ", "- ", "> ")),
     *(f"<details><summary>{end}" for end in (f"{EVIL}</summary>", f"x</summary>\n{EVIL}")),
     "[x](javascript:alert(1))", "<div\nonclick=x>"],
)  # fmt: skip
def test_markup_in_markdown_is_text_on_the_page(text: str, tmp_path: Path) -> None:
    """Even where the sections forgot to quote it."""
    write_pages([text], [], tmp_path / "x.md", "x.png")
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert is_harmless(page) and "details" not in page.tags


def test_the_page_forbids_scripts_and_loading() -> None:
    write = Path(__file__).parents[2] / "nanochat" / "report" / "page.html"
    assert "default-src 'none'; style-src 'unsafe-inline'" in write.read_text(encoding="utf-8")


def test_a_span_of_code_cannot_be_left() -> None:
    for text in ("a`b", "``", "`a`", "a|b`` `", "\\`x\\`", "<b>", "*x*", "a\\", "\\|"):
        (row,) = re.findall(
            r"<td>(.*?)</td>", render("\n".join(table(["h"], [[literal(text)]])), {})[0]
        )
        found = re.fullmatch(r"<code>(.*)</code>", row)
        assert found and Page(found[1]).words == [text.strip()]
    assert literal("") == "" and literal("abcdef", 3) == "`abc …`"
    assert literal("a\n b") == "`a b`"


def test_headings_make_sections_and_contents() -> None:
    body, contents = render("# T\n\n## A b\n\nx\n\n## C\n\ny\n", {})
    assert re.findall(r'href="#([^"]+)"', contents) == re.findall(r'<section id="([^"]+)"', body)
    assert body.count("<section") == body.count("</section>") == 2


def test_settings_fold_and_pictures_are_drawn_in() -> None:
    text = "<details><summary>Settings</summary>\n\n| a |\n|---|\n\n</details>\n\n![c](p.png)\n"
    panels = [Panel(f"panel {i}", lambda axes: axes.plot([1, 2], [3, 4])) for i in range(2)]
    body, _ = render(text, {"p.png": panels})
    assert body.index("<details>") < body.index("<table>") < body.index("</details>")
    assert body.count("<svg") == 2 and "panel 1" in body and "p.png" not in body
    assert "<p>" not in body.split("</details>")[1]  # a paragraph holds no figures
    ids = re.findall(r'\bid="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', body):
        assert used in ids
