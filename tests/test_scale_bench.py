"""bench/scale.py: published rows are what their sources say, and are met; its ranks' bytes too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale import ASSUMED, PUBLISHED, beside, compare_published
from bench.scale_worker import model_config
from nanochat.models import build_model

PARAMS = {"7B": 8.03e9, "13B": 14.84e9, "1B": 1_315_950_592, "3B": 2_651_837_440}


@pytest.mark.parametrize("model", PARAMS)
def test_models_have_the_published_parameters(model: str) -> None:
    one = next(p for p in PUBLISHED if p.model == model)
    params = sum(p.numel() for p in build_model(one.config, "meta").parameters())
    untied = 0 if "Kempner" in one.family else one.config.vocab_size * one.config.n_embd
    assert params - untied == pytest.approx(PARAMS[model], rel=0.005)


def test_a_family_is_calibrated_by_its_first_row_and_predicts_the_others() -> None:
    rows = compare_published()
    assert len(rows) == len(PUBLISHED) + len(ASSUMED)
    seen = set()
    for row in rows:
        first = row["family"] not in seen and row["share_from"] == "this row"
        seen.add(row["family"])
        assert (row["ratio"] is None) == first
        if first:
            found = row["predicted_tokens_per_second_per_gpu"]
            assert found == pytest.approx(row["published_tokens_per_second_per_gpu"], rel=1e-3)
        elif "not compiled" not in row["source"]:
            assert 0.85 < row["ratio"] < 1.15, row
    assert replace(ASSUMED[0], nodes=2).predicted(0.5) < ASSUMED[0].predicted(0.5)


@pytest.mark.parametrize(("shard", "twice"), [("none", 0), ("zero", 1), ("fsdp", 1)])
def test_gloo_is_said_to_send_a_reduce_scatter_twice(shard: str, twice: int) -> None:
    """With one row a rank 8 bytes of gradient and weight go for each parameter, 12 on gloo."""
    params = sum(p.numel() for p in build_model(model_config(), "meta").parameters())
    found = {"bytes_per_second": 1e9, "loopback_bytes": 1, "seconds": 1.0}
    row = beside(found, 2, shard, {"seconds": 1.0})
    more = row["sent_by_a_rank_of_gloo"] - row["sent_by_a_rank"]
    assert more == pytest.approx(twice * 4 * params / 2, rel=1e-3)
    if shard != "fsdp":
        assert row["sent_by_a_rank"] == pytest.approx(2 * 4 * params / 2, rel=1e-3)
    assert row["seconds_predicted"] > 1.0
