"""The chapters in docs/: their examples run and give what they show, their links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.conftest import REPO

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
