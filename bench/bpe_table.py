"""
The measured table of rustbpe/README.md, from the result files of the two BPE benchmarks.

    python -m bench.render    # after bench.bpe_training and bench.bpe_encoding
"""

from __future__ import annotations

from typing import Any

TEXTS = {"str": "a list of `str`", "array": "arrays"}


def find(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """The row with these fields; None where it was not measured."""
    return next((row for row in rows if fields.items() <= row.items()), None)


def key_of(row: dict[str, Any]) -> dict[str, Any]:
    """What tells a row from the others."""
    return {key: row[key] for key in ("package", "texts", "pattern", "threads")}


def named(row: dict[str, Any]) -> str:
    """A trainer, as the table calls it."""
    package = row["package"].split()[0]
    if row["package"] == "rustbpe":
        return f"**rustbpe**, {TEXTS[row['texts']]}"
    own = ", its own pattern (GPT-2's)" if row["pattern"] == "own" else ""
    return f"{package} {row['version']}{own}"


def training(small: dict[str, Any], large: dict[str, Any]) -> list[str]:
    """The table of trainers: seconds on both sizes, and times and memory on the large one."""
    sizes = [f"{result['corpus']['mb']:.0f} MB" for result in (small, large)]
    ours = find(large["trainers"], package="rustbpe", texts="str", threads=large["threads"])
    assert ours is not None
    lines = [
        f"| training | threads | {sizes[0]} | {sizes[1]} | MB/s | its time ÷ ours | memory added |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(large["trainers"], key=lambda row: row["seconds"]):
        of_small = find(small["trainers"], **key_of(row))
        memory, ratio = row["added_rss_mib"], row["seconds"] / ours["seconds"]
        cells = [
            named(row),
            row["threads"],
            f"{of_small['seconds']:.1f} s" if of_small else "",
            f"{row['seconds']:.1f} s",
            f"{row['mb_per_s']:.0f}",
            f"{ratio:.1f}",
            "" if memory is None else f"{memory:.0f} MiB",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def encoding(result: dict[str, Any]) -> list[str]:
    """The table of encoders: MB/s by threads, of a first and of a second call."""
    several = result["threads"]
    lines = [
        f"| encoding, MB/s | pattern | 1 thread | again | {several} threads | again "
        f"| ÷ tiktoken, 1 thread |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in result["encoders"] if row["threads"] == several]
    rows.sort(key=lambda row: (row["pattern"] != "ours", -row["mb_per_s"]))
    for row in rows:
        one = find(result["encoders"], **{**key_of(row), "threads": 1})
        own = row["package"] == "rustbpe"
        package = f"**{row['package']}**" if own else f"{row['package']} {row['version']}"
        cells = [f"{package}, {TEXTS[row['texts']]}", row["pattern"]]
        for found in (one, row):
            for field in ("mb_per_s", "again_mb_per_s"):
                value = found and found[field]
                cells.append(f"{value:.0f}" if value else "")
        cells.append(f"{row['times_one_tiktoken_thread']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def passage(small: dict[str, Any], large: dict[str, Any], encoded: dict[str, Any]) -> str:
    """All between the markers: what was measured and where, and both tables."""
    machine, corpus, text = large["machine"], large["corpus"], encoded["corpus"]
    once = [named(row) for row in large["trainers"] if len(row["runs"]) == 1]
    repeats, of_small, of_encoding = (
        max(len(row["runs"]) for row in result[key])
        for result, key in ((large, "trainers"), (small, "trainers"), (encoded, "encoders"))
    )
    peers = [row for row in large["trainers"] if row["package"] != "rustbpe"]
    same = [named(row) for row in peers if row["same_merges"]]
    loads = ", ".join(f"{result['load_before']:.1f}" for result in (small, large, encoded))
    return "\n".join(
        [
            f"On {large['date']}, on {machine['cores']} cores of {machine.get('cpu', 'a CPU')}, "
            f"{large['vocab_size']:,} tokens, the peers in the same rounds, each run in a process "
            f"of its own, medians of {repeats} runs ({of_small} at {small['corpus']['mb']:.0f} MB, "
            f"{of_encoding} of encoding; once only: {'; '.join(once) or 'none'}). The load of "
            f"other work before the three measurements was {loads}.",
            "",
            *training(small, large),
            "",
            f"The {small['corpus']['mb']:.0f} MB: {small['corpus']['about']}. "
            f"The {corpus['mb']:.0f} MB: {corpus['about']}; {corpus['repeated_mb']:.1f} MB of it "
            "stand in documents that are there twice. Memory is what training adds at its peak to "
            f"the texts, which are in memory. The same merges as ours: {'; '.join(same)}.",
            "",
            *encoding(encoded),
            "",
            f"On {text['mb']:.0f} MB of text ({text['about']}); *again* is a second call with the "
            "same encoder and text, when its caches are warm. Within a pattern all give the same "
            "ids. gigatoken does not know our pattern, so a second vocabulary of the same size was "
            "trained with cl100k's. Arrays are Arrow's for rustbpe, Awkward's for gigatoken.",
        ]
    )
