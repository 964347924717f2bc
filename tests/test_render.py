"""bench/render.py: what the documents say was measured is what the result files say."""

from __future__ import annotations

import copy

import pytest

from bench import render
from nanochat.common import UserError
from tests.conftest import REPO


@pytest.mark.parametrize("page, name", render.PASSAGES)
def test_a_passage_is_what_was_measured(page: str, name: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert render.rendered(page, name, text) == text, "run `python -m bench.render`"


def test_a_row_follows_its_result() -> None:
    def changed(name: str) -> render.Result:
        result = copy.deepcopy(render.load(name))
        result["date"] = "1999-12-31"
        if name == "core_speed":
            result["total"]["times"] = 123.0
        return result

    before, after = render.performance(), render.performance(changed)
    assert "123×" in after and "123×" not in before
    assert after.count("1999-12-31") == len(render.PERFORMANCE)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"python -m bench\.nothing"):
        render.load("nothing")
    with pytest.raises(UserError, match=r"README.md must have once each: <!-- speedrun"):
        render.rendered("README.md", "speedrun", "no marks")
    with pytest.raises(UserError, match="no row with"):
        render.find([{"a": 1}], a=2)


def test_a_gpu_is_named_in_place_of_the_processor() -> None:
    result = {"machine": {"cpu": "c", "cores": 16, "gpus": ["NVIDIA H200"] * 8}}
    assert render.machine(result) == "8 × NVIDIA H200"
