"""Checkpoints: what was saved comes back bit by bit, and what is damaged is refused by name."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.checkpoint import (
    FILES,
    find_checkpoint,
    list_steps,
    list_tags,
    load_model,
    load_weights,
    newest_tag,
    newest_whole,
    optim_reader,
    read_meta,
    save_checkpoint,
    set_aside,
    snapshot,
    stage_dir,
    step_dir,
    tidy,
)
from nanochat.common import UserError, read_json, write_json
from nanochat.manifest import seal
from nanochat.models import build_model, config_from_dict
from tests.models_for_tests import tiny_model, tokens_of
from tests.tokenizers_for_tests import tiny_qwen, tiny_tokenizer


def save(
    step: int = 7,
    tag: str = "d4",
    source: str = "base",
    arch: str = "gpt",
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Saves a tiny model (random from `seed` or step) with its tokenizer; returns the model."""
    tokenizer = tiny_tokenizer()
    if not (checkpoint.get_base_dir() / "tokenizer").exists():
        tokenizer.save(checkpoint.get_base_dir() / "tokenizer")
    model = tiny_model(
        arch, seed=step if seed is None else seed, vocab_size=tokenizer.get_vocab_size()
    )
    optim = {"w/exp_avg": torch.arange(6.0).view(2, 3).T, "w/step": torch.tensor(step)}
    meta = {"tokenizer": None, "tokenizer_fingerprint": tokenizer.fingerprint, "note": "größer"}
    save_checkpoint(source, tag, step, model, optim, meta, **kwargs)
    return model


def reseal(folder: Path, **changes: Any) -> None:
    """Changes meta.json and makes the manifest fit, as somebody who edits by hand would."""
    write_json(folder / "meta.json", {**read_json(folder / "meta.json"), **changes})
    seal(folder, FILES)


# ---- there and back


@pytest.mark.parametrize("arch", ["gpt", "turbo", "qwen2.5"])
@pytest.mark.parametrize("source", ["base", "mid", "sft", "rl"])
def test_what_was_saved_comes_back(source: str, arch: str) -> None:
    model = save(source=source, arch=arch)
    loaded, tokenizer, meta = load_model(source, "cpu")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    idx = tokens_of(model, 2, 9)
    assert torch.equal(loaded(idx), model(idx))  # buffers, which are not saved, too
    assert not loaded.training
    assert tokenizer.fingerprint == tiny_tokenizer().fingerprint
    assert (meta["tag"], meta["step"], meta["note"]) == ("d4", 7, "größer")
    assert meta["folder"] == str(step_dir(source, "d4", 7))


def test_the_folder_is_where_it_is_promised(own_base_dir: Path) -> None:
    for source, name in [
        ("base", "base_checkpoints"),
        ("mid", "mid_checkpoints"),
        ("sft", "chatsft_checkpoints"),
        ("rl", "chatrl_checkpoints"),
    ]:
        save(source=source, step=200)
        folder = own_base_dir / name / "d4" / "step_000200"
        assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    with pytest.raises(UserError, match="'bass': choose one of base, mid, sft, rl"):
        stage_dir("bass")


def test_optimizer_state_is_read_by_name() -> None:
    save()
    get = optim_reader(step_dir("base", "d4", 7))
    assert get("w/exp_avg").tolist() == [[0, 3], [1, 4], [2, 5]]  # saved as a transposed view
    assert get("w/step").item() == 7
    with pytest.raises(UserError, match=r"step_000007 has no optimizer state nothing/exp_avg"):
        get("nothing/exp_avg")


def test_no_file_is_a_pickle_and_none_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = save()
    for path in step_dir("base", "d4", 7).iterdir():
        assert path.suffix in (".safetensors", ".json")
        assert not zipfile.is_zipfile(path)  # what torch.save writes
        # JSON, or 8 bytes of length and then JSON
        assert path.read_bytes()[8 if path.suffix == ".safetensors" else 0 :].startswith(b"{")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    loaded, _, _ = load_model("base", "cpu")
    optim_reader(step_dir("base", "d4", 7))("w/step")
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))


def test_only_rank_0_writes(monkeypatch: pytest.MonkeyPatch, own_base_dir: Path) -> None:
    monkeypatch.setattr(checkpoint, "rank_and_world", lambda: (1, 2))
    waited: list[bool] = []
    monkeypatch.setattr(checkpoint, "barrier", lambda: waited.append(True))
    save()
    assert waited and not (own_base_dir / "base_checkpoints").exists()


# ---- damage


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_any_damage_is_noticed_at_load_named_and_an_earlier_step_offered(name: str) -> None:
    """Altered bytes (the first, the last, a sample), a cut, a longer file, none at all."""
    save(step=3)
    save(step=12)
    path = step_dir("base", "d4", 12) / name
    content = path.read_bytes()
    rng = random.Random(name)
    wrongs = [content[:-3], content + b"}", b""]
    for at in (0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))):
        wrongs.append(
            content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
        )
    for wrong in [*wrongs, None]:
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        with pytest.raises(
            UserError, match=rf"step_000012 is damaged: {name} .*--step=3 .*_step=3"
        ):
            load_model("base", "cpu")
    path.write_bytes(content)
    load_model("base", "cpu")


def test_the_step_offered_is_the_one_before_by_number() -> None:
    for step in (5, 999_999, 1_000_000):
        save(step=step)
    folder = step_dir("base", "d4", 1_000_000)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"--step=999999 \(training: --resume_from_step=999999\)"):
        load_model("base", "cpu")
    (step_dir("base", "d4", 999_999) / "meta.json").unlink()
    with pytest.raises(UserError, match=r"--step=5 "):  # not the later one
        load_model("base", "cpu", step=999_999)
    with pytest.raises(UserError, match=r"--step=5 "):  # nor one that is damaged too
        load_model("base", "cpu")
    assert load_model("base", "cpu", step=5)[2]["step"] == 5


# ---- writing is all or nothing


def killed(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["save_file", "write_json", "seal", "_publish"])
def test_a_killed_save_leaves_what_nobody_takes_for_a_checkpoint(
    at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(step=3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, at, killed)  # nothing cleans up after a kill, nor after this
        with pytest.raises(KeyboardInterrupt):
            save(step=12)
    assert list_steps("base", "d4") == [3]
    assert load_model("base", "cpu")[2]["step"] == 3
    (left,) = stage_dir("base").glob("d4/.*")
    save(step=15)  # another step clears it too
    assert f"{left} is an unfinished checkpoint: removed" in capsys.readouterr().out
    assert [p.name for p in stage_dir("base").glob("d4/.*")] == []
    assert list_steps("base", "d4") == [3, 15]


def test_saving_a_step_again_replaces_it() -> None:
    save(step=12)
    other = save(step=12, seed=99)
    loaded, _, _ = load_model("base", "cpu")
    assert torch.equal(next(loaded.parameters()), next(other.parameters()))
    assert [p.name for p in stage_dir("base").glob("d4/*")] == ["step_000012"]


def test_replacing_a_step_can_be_killed_at_any_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one, or the new one: a whole checkpoint of the step is there after tidying up."""
    real = Path.rename
    outcomes = []
    for renames in range(3):
        save(step=12)
        before = load_model("base", "cpu")[0].state_dict()
        done = 0

        def rename(path: Path, target: Path) -> Path:
            nonlocal done
            if path.name.startswith(("step_", ".step_")):
                if done == renames:  # noqa: B023
                    raise KeyboardInterrupt
                done += 1
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            patch.setattr(checkpoint, "flush", killed)
            with pytest.raises(KeyboardInterrupt):
                save(step=12, seed=99)
        tidy(stage_dir("base") / "d4")
        after = load_model("base", "cpu")[0].state_dict()
        outcomes.append(all(torch.equal(after[name], before[name]) for name in before))
        assert [p.name for p in stage_dir("base").glob("d4/*")] == ["step_000012"]
    assert outcomes == [True, True, False]


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(step=3)

    def dies(path: Path, *args: object) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            save(step=12, keep_last=1)
    assert list_steps("base", "d4") == [12]
    assert load_model("base", "cpu")[2]["step"] == 12


def test_a_full_disk_is_found_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    save(step=3)
    usage = type("Usage", (), {"free": 10_000})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
        patch.setattr(checkpoint, "save_file", killed)
        with pytest.raises(
            UserError, match=r"step_000012 .* needs 0\.\d\d MB and 0\.01 MB are free.*Earlier"
        ):
            save(step=12, keep_last=1)
    assert [p.name for p in stage_dir("base").glob("d4/*")] == ["step_000003"]


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_write_that_fails_midway_leaves_the_checkpoints_that_were_there(limit: int) -> None:
    """The kernel refuses to write more than so many bytes into a file: as good as a full disk."""
    resource = pytest.importorskip("resource")
    save(step=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step_000012 could not be written: .* needs .* free"):
            save(step=12, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in stage_dir("base").glob("d4/*")] == ["step_000003"]
    assert load_model("base", "cpu")[2]["step"] == 3


def test_a_snapshot_is_a_copy_even_of_what_is_in_the_hosts_memory() -> None:
    """Training changes weights in place while the snapshot is written."""
    weight = torch.arange(6.0).view(2, 3)
    copies = snapshot({"w": weight, "t": weight.T})
    weight.zero_()
    assert copies["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copies["t"].is_contiguous() and copies["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("keep_last", "expected"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4]), (-1, [1, 2, 3, 4])]
)
def test_keep_last(keep_last: int, expected: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save(step=step, keep_last=keep_last)
    assert list_steps("base", "d4") == expected


def test_steps_of_an_earlier_run_never_push_out_the_new_ones() -> None:
    for step in (1000, 2000):
        save(step=step)
    for step in (10, 20, 30):
        save(step=step, keep_last=2)
        assert step in list_steps("base", "d4")
    assert list_steps("base", "d4") == [20, 30, 1000, 2000]


def test_a_new_run_moves_the_old_one_aside_and_a_resumed_one_what_came_after() -> None:
    for step in (10, 20, 30):
        save(step=step)
    set_aside("base", "d4", after=10)
    old = stage_dir("base") / ".old" / "d4"
    assert list_steps("base", "d4") == [10]
    assert sorted(p.name for p in old.iterdir()) == ["step_000020", "step_000030"]
    save(step=20)
    set_aside("base", "d4", after=10)  # the other one stays: nothing else holds it
    assert sorted(p.name for p in old.iterdir()) == ["step_000020", "step_000030"]
    set_aside("base", "d4")
    assert list_steps("base", "d4") == []
    assert [p.name for p in old.iterdir()] == ["step_000010"]
    set_aside("base", "d4")  # nothing is there: what was moved stays
    assert [p.name for p in old.iterdir()] == ["step_000010"]
    assert list_tags("base") == []


# ---- finding


def test_the_newest_whole_one_is_found_and_damaged_ones_are_passed_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert newest_whole("base", "d4") == -1
    for step in (10, 20, 30):
        save(step=step)
    assert newest_whole("base", "d4") == 30
    (step_dir("base", "d4", 30) / "optim.safetensors").unlink()
    (step_dir("base", "d4", 20) / "meta.json").write_text("{}", encoding="utf-8")
    assert newest_whole("base", "d4") == 10
    said = capsys.readouterr().err
    assert "step_000030 is damaged and passed over: optim.safetensors is missing" in said
    assert "step_000020 is damaged and passed over: meta.json has 2 bytes" in said
    (step_dir("base", "d4", 10) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"none of the checkpoints in .*d4 is whole \(steps \[10, "):
        newest_whole("base", "d4")


def test_steps_are_numbers_and_other_names_are_none() -> None:
    folder = stage_dir("base") / "d4"
    names = [
        "step_1000000", "step_999999", "step_000010", "step_9", "step_000010_old",
        ".step_000011.tmp", "step_abcdef", "xstep_000012",
    ]  # fmt: skip
    for name in names:
        (folder / name).mkdir(parents=True)
    (folder / "step_000013").write_text("a file", encoding="utf-8")
    assert list_steps("base", "d4") == [10, 999_999, 1_000_000]
    assert find_checkpoint("base", "d4").name == "step_1000000"
    assert step_dir("base", "d4", 1_000_000).name == "step_1000000"
    assert list_steps("base", "nothing") == []


def test_the_newest_run_is_the_one_written_last() -> None:
    for when, (tag, step) in enumerate([("d4", 5000), ("d20", 10), ("zz", 20), ("d4", 20)]):
        save(step=step, tag=tag)
        os.utime(step_dir("base", tag, step), (1e9 + when, 1e9 + when))
    (stage_dir("base") / "empty" / ".step_000001.tmp").mkdir(parents=True)
    # Of d4, its last step counts, which is older than those of the others.
    assert newest_tag("base") == "zz"
    assert find_checkpoint("base").parent.name == "zz"
    assert load_model("base", "cpu", model_tag="d20")[2]["tag"] == "d20"
    (step_dir("base", "zz", 20) / "meta.json").unlink()
    with pytest.raises(UserError, match="step_000020 is damaged"):
        load_model("base", "cpu")


def test_what_is_not_there_names_the_command() -> None:
    with pytest.raises(UserError, match=r"no base checkpoint .* `python -m scripts\.base_train`"):
        load_model("base", "cpu")
    with pytest.raises(UserError, match=r"no sft .* `python -m scripts\.chat_sft`"):
        load_model("sft", "cpu")
    save(step=5)
    save(step=9)
    with pytest.raises(UserError, match=r"--model_tag=d9 .*scripts\.base_train --model_tag=d9"):
        load_model("base", "cpu", model_tag="d9")
    with pytest.raises(UserError, match=r"has no step 7; it has \[5, 9\]"):
        load_model("base", "cpu", step=7)


# ---- what does not fit


def test_unknown_config_keys_and_architectures_are_refused() -> None:
    save()
    folder = step_dir("base", "d4", 7)
    config = read_json(folder / "meta.json")["config"]
    reseal(folder, config={**config, "window": 128})
    with pytest.raises(UserError, match=r"step_000007 has config keys .*gpt.*: window"):
        load_model("base", "cpu")
    reseal(folder, config={**config, "arch": "mamba"})
    with pytest.raises(UserError, match="architecture 'mamba'; known: gpt, turbo, qwen"):
        load_model("base", "cpu")
    reseal(folder, config=config, format=2)
    with pytest.raises(UserError, match="checkpoint format 2, this is 1"):
        load_model("base", "cpu")


def test_weights_of_another_architecture_or_shape_are_refused_by_name() -> None:
    save()
    folder = step_dir("base", "d4", 7)
    size = tiny_tokenizer().get_vocab_size()
    qwen = tiny_model("qwen2.5", vocab_size=size)
    before = {name: tensor.clone() for name, tensor in qwen.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit the model: lm_head\.weight"):
        load_weights(folder, qwen)
    with pytest.raises(UserError, match=r"does not fit the model: .*wte\.weight"):
        load_weights(folder, tiny_model("gpt", vocab_size=size + 1))
    with pytest.raises(UserError, match=r"does not fit the model: transformer\.h\.2\."):
        load_weights(folder, tiny_model("gpt", vocab_size=size, n_layer=2))
    assert all(torch.equal(qwen.state_dict()[name], before[name]) for name in before)


def test_the_whole_config_comes_back_and_nothing_is_left_uninitialised() -> None:
    model = save()
    meta = read_meta(step_dir("base", "d4", 7))
    assert config_from_dict(meta["config"]) == model.config
    empty = build_model(model.config)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    load_weights(step_dir("base", "d4", 7), empty)
    assert all(torch.isfinite(parameter).all() for parameter in empty.parameters())


def test_another_tokenizer_than_then_is_refused(own_base_dir: Path) -> None:
    save()
    tiny_tokenizer(500).save(own_base_dir / "tokenizer")  # somebody ran tok_train again
    with pytest.raises(UserError, match=r"step_000007 was trained with another tokenizer"):
        load_model("base", "cpu")
    tiny_qwen().save(own_base_dir / "other")
    reseal(step_dir("base", "d4", 7), tokenizer=str(own_base_dir / "other"))
    with pytest.raises(UserError, match="another tokenizer"):
        load_model("base", "cpu")
    shutil.rmtree(own_base_dir / "tokenizer")
    reseal(step_dir("base", "d4", 7), tokenizer=None)
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        load_model("base", "cpu")
