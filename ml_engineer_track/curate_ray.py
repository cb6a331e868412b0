"""Cleans a corpus of questions that is larger than memory: the rules of `curate.py`, on Ray Data, shard by shard.

    python -m ml_engineer_track curate-corpus FOLDER --into FOLDER      needs the extra [ray]: docs/cluster.md

Why an ML engineer needs a second way: `curate.py` holds every row and an index of all signatures; a corpus of a hundred
million rows does not fit. What decides whether a row stays is small, though. Rows that could be duplicates share a *key*: the
id, the words, or a band of their MinHash signatures (locality-sensitive hashing, Indyk and Motwani 1998). So

1. every shard is read line by line and gives 16-byte keys,
2. Ray sorts the keys into partitions, on disk where memory does not suffice, and only keys that occur twice come out,
3. the rule "the first one stays, test rows are first" runs over the rows that share a key, in one process,
4. every shard is read again and written without what was dropped.

Memory grows with a partition and with the number of rows that have a twin, never with the corpus. The result is that of
`curate.py` on the same rows; only which of several twins a dropped row names may differ. References to leaflets are not
checked here: that is done when rows become prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHashLSH

from ml_engineer_track.curate import PERMUTATIONS, cleaned, fingerprint
from ml_engineer_track.launch import OBJECT_STORE
from shared import library as lib
from shared.cluster import need_ray, start_ray
from shared.errors import UserError
from shared.files import need_disk, replace_folder, write_json

#: Rows of a block that travels through Ray.
BLOCK = 2_000
#: Bytes of text whose keys shall share a partition of the sort; keys take about as much memory as the text they are from.
PARTITION = 256_000_000
#: A key's first letter: what two rows that have it in common are.
REASONS = {"i": "duplicate id", "w": "exact duplicate", "b": "near duplicate"}
#: What was kept and dropped; with `quarantine/` beside it a folder is known as one that this file wrote.
REPORT = "report.json"


@dataclass(frozen=True)
class Cleaned:
    """Kept rows lie under `folder` in files named as the shards were, dropped ones with their reason in `quarantine/`."""

    folder: Path
    kept: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class Sharer:
    """A row that has a key in common with another one. `place` orders rows as they were read."""

    place: int
    id: str
    split: lib.Split
    keys: tuple[str, ...]


def curate_corpus(shards: Path, into: Path, near_duplicate: float) -> Cleaned:
    """Clean every `*.jsonl` of the folder `shards` (rows as in questions.jsonl).

    UserError without Ray or without shards, and for a folder `into` with anything in it but what this left there before.
    """
    files = sorted(shards.glob("*.jsonl"))
    if not files:
        raise UserError("no shards here (*.jsonl)", str(shards), "Name a folder of JSON-lines files")
    _check_replaceable(into, [shards, *files])
    need_ray("curate-corpus", "data")
    size = sum(file.stat().st_size for file in files)
    need_disk(into, 2 * size)
    start_ray(os.cpu_count() or 1, OBJECT_STORE)
    import ray

    try:
        dropped = ray.put(losers(_sharers(files, near_duplicate, max(1, -(-size // PARTITION)))))
        counts: Counter[str] = Counter()
        replace_folder(into, lambda folder: _write(files, folder, dropped, counts))
    finally:
        ray.shutdown()
    return Cleaned(into, counts.pop("kept", 0), dict(counts))


def _check_replaceable(into: Path, sources: Iterable[Path]) -> None:
    """UserError unless `into` may go: the folder is replaced as a whole, with whatever lies in it."""
    another = "Name another folder with --into"
    if any(path.resolve().is_relative_to(into.resolve()) for path in sources):
        raise UserError("the cleaned corpus would replace its source", str(into), another)
    if not into.exists():
        return
    if not into.is_dir():
        raise UserError("this is a file", str(into), another)
    ours = (into / "quarantine").is_dir() and (into / REPORT).is_file()
    if any(into.iterdir()) and not ours:
        raise UserError("the folder holds something else, which would be removed", str(into), another)


# --- who stays -------------------------------------------------------------------------------------------------------


def keys_of(row: lib.Question, index: MinHashLSH) -> tuple[str, ...]:
    """What a duplicate of the row has in common with it: the id, or the words, or one band of the signature."""
    words, signature = fingerprint(row.question)
    bands = [signature.hashvalues[start:end].tobytes() for start, end in index.hashranges]
    return (f"i{_hash(row.id.encode())}", f"w{_hash(words.encode())}", *(f"b{i}-{_hash(b)}" for i, b in enumerate(bands)))


def losers(sharers: Iterable[Sharer]) -> dict[int, tuple[str, str]]:
    """Places of the rows that go, each with the reason and the id of the row that stays for it.

    As in `curate.py`: of one id the first row counts; then test rows come before validation and training rows, and each goes
    when it shares words or a band with one that stays.
    """
    gone: dict[int, tuple[str, str]] = {}
    ids: set[str] = set()
    first: list[Sharer] = []
    for row in sorted(sharers, key=lambda row: row.place):
        if row.id in ids:
            gone[row.place] = (REASONS["i"], row.id)
        else:
            ids.add(row.id)
            first.append(row)
    owners: dict[str, str] = {}
    for row in sorted(first, key=lambda row: lib.SPLITS[::-1].index(row.split)):
        keys = [key for key in row.keys if key[0] != "i"]
        taken = next((key for key in keys if key in owners), None)
        if taken:
            gone[row.place] = (REASONS[taken[0]], owners[taken])
        else:
            owners |= dict.fromkeys(keys, row.id)
    return gone


# --- the passes over the corpus --------------------------------------------------------------------------------------


def _sharers(files: list[Path], near_duplicate: float, partitions: int) -> list[Sharer]:
    """The rows that have a key in common with another, collected from all shards."""
    import ray

    index = MinHashLSH(threshold=near_duplicate, num_perm=PERMUTATIONS)
    shards = ray.data.from_items(
        [{"number": n, "path": str(file)} for n, file in enumerate(files)], override_num_blocks=len(files)
    )
    keys = shards.map_batches(_key_blocks, fn_kwargs={"index": index}, batch_size=1, batch_format="numpy")
    twice = keys.repartition(partitions, keys=["key"]).map_batches(_occurring_twice, batch_size=None, batch_format="pandas")
    rows: dict[int, tuple[str, str, list[str]]] = {}
    for found in twice.iter_rows():
        rows.setdefault(int(found["place"]), (str(found["id"]), str(found["split"]), []))[2].append(str(found["key"]))
    order = {"i": 0, "w": 1, "b": 2}
    return [
        Sharer(place, id_, lib.SPLITS[lib.SPLITS.index(split)], tuple(sorted(keys, key=lambda k: (order[k[0]], k))))  # type: ignore[arg-type]
        for place, (id_, split, keys) in rows.items()
    ]


def _key_blocks(shards: dict[str, np.ndarray], index: MinHashLSH) -> Iterator[dict[str, list[Any]]]:
    """Blocks of (key, place, id, split), one line for each key of each row."""
    block: dict[str, list[Any]] = {"key": [], "place": [], "id": [], "split": []}
    for number, path in zip(shards["number"], shards["path"], strict=True):
        for place, row in read_shard(int(number), Path(str(path))):
            if isinstance(row, lib.BadRow):
                continue
            keys = keys_of(row, index)
            block["key"] += keys
            for name, value in (("place", place), ("id", row.id), ("split", row.split)):
                block[name] += [value] * len(keys)
            if len(block["key"]) >= BLOCK:
                yield block
                block = {name: [] for name in block}
    yield block


def _occurring_twice(keys: Any) -> Any:
    return keys[keys.duplicated("key", keep=False)]


def _write(files: list[Path], folder: Path, dropped: Any, counts: Counter[str]) -> None:
    """The second pass: kept rows and the quarantine of every shard, each written by the worker that reads it."""
    import ray

    (folder / "quarantine").mkdir()
    shards = ray.data.from_items(
        [{"number": n, "path": str(file)} for n, file in enumerate(files)], override_num_blocks=len(files)
    )
    told = {"folder": folder, "dropped": dropped}
    for done in shards.map_batches(_write_shard, fn_kwargs=told, batch_size=1, batch_format="numpy").iter_rows():
        counts[str(done["reason"])] += int(done["rows"])
    write_json(folder / REPORT, {"kept": counts["kept"], "dropped": {k: v for k, v in counts.items() if k != "kept"}})


def _write_shard(shard: dict[str, np.ndarray], folder: Path, dropped: Any) -> dict[str, list[Any]]:
    import ray

    gone, number, path = ray.get(dropped), int(shard["number"][0]), Path(str(shard["path"][0]))
    counts: Counter[str] = Counter()
    with (folder / path.name).open("w", encoding="utf-8") as kept, (folder / "quarantine" / path.name).open("w") as refused:
        for place, row in read_shard(number, path):
            if isinstance(row, lib.BadRow):
                reason, told = "malformed", {**asdict(row), "reason": f"malformed: {row.reason}", "text": row.text[:500]}
            elif place in gone:
                reason, of = gone[place]
                told = {"file": path.name, "id": row.id, "reason": reason, "of": of}
            else:
                counts["kept"] += 1
                kept.write(json.dumps(row.model_dump(by_alias=True), ensure_ascii=False) + "\n")
                continue
            counts[reason] += 1
            refused.write(json.dumps(told) + "\n")
    return {"reason": list(counts), "rows": list(counts.values())}


def read_shard(number: int, path: Path) -> Iterator[tuple[int, lib.Question | lib.BadRow]]:
    """(place, row) of each line that is not empty; the place orders rows by shard, then by line."""
    with path.open("rb") as lines:
        for line, raw in enumerate(lines, start=1):
            if raw.strip():
                row = lib.read_row(raw.removesuffix(b"\n"), path.name, line, lib.Question)
                yield (number << 32) + line, row if isinstance(row, lib.BadRow) else cleaned(row)


def _hash(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest()
