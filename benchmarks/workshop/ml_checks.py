"""Is it done? Exercises 1 to 6, the ML engineer's. Every check reads what the participant's own runs left and nothing else.

A check returns the answer that follows from those figures; `NotYet` says what is missing, in a sentence that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workshop.place import Expected, NotYet, artifacts, last_run, need, place, read_json
from shared import library as lib
from shared.files import read_jsonl

MINE = "mine"


def quarantine() -> Expected:
    """1: a leaked test question, planted among the training rows, must be in the quarantine."""
    run = "PRESET=artifacts/workshop/ex1.yaml python -m ml_engineer_track curate"
    result = stage_result("ex1", "curate", f"Run `{run}` first.")
    rows = read_jsonl(Path(result["folder"]) / "quarantine.jsonl")
    planted = [row for row in rows if str(row.get("id", "")).startswith(MINE)]
    questions = lib.read_rows(place() / "datasets", "questions.jsonl", lib.Question)[0]
    added = [q for q in questions if q.id.startswith(MINE)]
    need(added, f"Append a row to artifacts/workshop/datasets/questions.jsonl whose id begins with {MINE!r}.")
    need(any(q.split == "train" for q in added), f"The row {added[0].id} is not in the training split: nothing could leak.")
    need(planted, f"The row {added[0].id} was not thrown out. Copy the question of a test row into it, then run `{run}` again.")
    splits = {q.id: q.split for q in questions}
    twin = str(planted[0].get("of"))
    need(
        splits.get(twin) == "test", f"{planted[0]['id']} was thrown out because of {twin}, which is no test row. Copy a test row."
    )
    counted = {reason: sum(str(r["reason"]).split(":")[0] == reason for r in rows) for reason in reasons(rows)}
    most = max(counted, key=lambda reason: counted[reason])
    return Expected(most, "It is the reason that stands in most rows of quarantine.jsonl.")


def rank_against_loss() -> Expected:
    """2: three trainings that differ in the rank, and in the seed."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("first", "rank", "seed"):
        path = place() / f"ex2-{name}.json"
        found[name] = read_json(path, f"Copy the stamp of that training to {path.name}, as the page says.")["result"]
    share = {name: result["trainable_share"] for name, result in found.items()}
    need(
        share["rank"] != share["first"],
        "ex2-rank.json has the rank of ex2-first.json. Change `rank:` in ml.yaml and train again.",
    )
    need(
        share["seed"] == share["first"],
        "ex2-seed.json has another rank than ex2-first.json. Put the rank back; change `seed:` only.",
    )
    loss = {name: result["best_validation_loss"] for name, result in found.items()}
    need(loss["seed"] != loss["first"], "ex2-seed.json is the same training as ex2-first.json. Change `seed:` in ml.yaml.")
    by_rank, by_seed = abs(loss["rank"] - loss["first"]), abs(loss["seed"] - loss["first"])
    how = (
        f"The rank moved the validation loss by {by_rank:.3f}, another seed by {by_seed:.3f}: is the first the larger of the two?"
    )
    return Expected("yes" if by_rank > by_seed else "no", how)


def bytes_against_quality() -> Expected:
    """3: models of fewer bits, once more with a smaller group."""
    first = read_json(place() / "ex3-first.json", "Copy the report of the first run to ex3-first.json, as the page says.")
    hint = "Run `make quantize BITS=2 PRESET=artifacts/workshop/ml.yaml` first."
    second = read_json(artifacts() / "reports" / "low_bits.json", hint)
    changed = second["settings"]["group"] < first["settings"]["group"]
    need(
        changed, f"Both runs have groups of {first['settings']['group']}. Make `group:` below `low_bits:` smaller and run again."
    )
    name = "2-bit"
    before, after = (report["quality"][name]["divergence"]["value"] for report in (first, second))
    bits = second["bits_per_weight"][name] - first["bits_per_weight"][name]
    need(bits > 0, "The smaller group did not make the model larger. Is ex3-first.json from the first run?")
    how = (
        f"A 2-bit weight takes {first['bits_per_weight'][name]:.2f} bits with its share of scale and offset at first, "
        f"{second['bits_per_weight'][name]:.2f} with the smaller group (divergence {before:.3f} -> {after:.3f}): the difference."
    )
    return Expected(bits, how, tolerance=0.011)


def batch_size() -> Expected:
    """4: one prompt at a time, and sixteen."""
    hint = "Run `PRESET=artifacts/workshop/ml.yaml python -m ml_engineer_track benchmark > artifacts/workshop/ex4.json` first."
    figures = read_json(place() / "ex4.json", hint)
    batches = next(iter(figures["models"].values()))["batch"]
    need({"1", "16"} <= set(batches), "Measure batches of 1 and of 16: `batch_sizes: [1, 4, 16]` below `benchmark:` in ml.yaml.")
    need(figures["settings"]["new_tokens"] >= 16, "Four new tokens are too few for a tpot. Set `new_tokens: 32` in ml.yaml.")
    one, many = batches["1"], batches["16"]
    times = many["decode_throughput"] / one["decode_throughput"]
    wait = many["tpot"]["p50"] / one["tpot"]["p50"]
    how = f"decode_throughput at 16 / at 1 (each of the sixteen waits {wait:.1f} times as long for a token)."
    return Expected(times, how, tolerance=0.05 * times)


def grammar() -> Expected:
    """5: a schema with one more field, which every reply held to it has."""
    run = last_run(5)
    fields = run["schema"]["properties"]
    need("urgency" in fields, "Add the field `urgency` to SCHEMA in artifacts/workshop/ex5.py, with an enum of its values.")
    need("urgency" in run["schema"].get("required", []), "Add `urgency` to `required`: otherwise the model may leave it out.")
    need(len(fields["urgency"].get("enum", [])) >= 2, "Give `urgency` an enum of at least two values.")
    need(
        run["schema_fits"] == len(run["replies"]), "Not every reply held to the schema fits it. Is 48 tokens too short for yours?"
    )
    how = "The grammar guarantees the form; `right action, held to it` says how many of the eight were also right."
    return Expected(float(run["schema_right"]), how)


def damages() -> Expected:
    """6: who notices which damage, with one of the participant's own."""
    run = last_run(6)
    mine = run["damages"].get("mine")
    need(mine and mine["changed"], "Your own damage changed nothing. Write `mine` in artifacts/workshop/ex6.py.")
    past = [name for name, found in run["damages"].items() if name != "mine" and found["noticed_by"] != "verify"]
    need(len(past) == 1, f"Of the three given damages {past or 'none'} got past verify; one was expected. Run ex6.py again.")
    how = (
        "Hashes cover the files, not the manifest that holds them; the golden replies are checked against the running model. "
        f"(Yours was noticed by: {mine['noticed_by']}.)"
    )
    return Expected(past[0], how)


def stage_result(preset: str, stage: str, hint: str) -> dict[str, Any]:
    """What a stage of the ML track remembered of its last run under a preset. NotYet(hint) when it did not finish."""
    stamp = read_json(artifacts() / "runs" / f"{preset}-bundled" / stage / "stamp.json", hint)
    if not stamp.get("done"):
        raise NotYet(hint)
    return dict(stamp["result"])


def reasons(rows: list[dict[str, Any]]) -> set[str]:
    return {str(row["reason"]).split(":")[0] for row in rows}


ML_CHECKS: dict[int, Callable[[], Expected]] = {
    1: quarantine,
    2: rank_against_loss,
    3: bytes_against_quality,
    4: batch_size,
    5: grammar,
    6: damages,
}
