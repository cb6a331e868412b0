"""Is it done? Exercises 7 to 12, the AI engineer's. Every check reads what the participant's own runs left and nothing else.

A check returns the answer that follows from those figures; `NotYet` says what is missing, in a sentence that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from benchmarks.workshop.place import SCRATCH, Expected, NotYet, artifacts, last_run, need, place, read_json, runs
from shared import feedback, handoff
from shared.errors import UserError

CHAIN = "My chain keeps coming off the front. What can I do?"
#: a further question must put the right leaflet first in so many more of a hundred conversations to be worth asking
WORTH = 0.05


def own_documents() -> Expected:
    """7: a document of the participant's own answers a question that the starters do not."""
    from ai_engineer_track.ingest import open_index
    from ai_engineer_track.retrieve import Retriever
    from ai_engineer_track.settings import load_ai_settings

    command = "`ARTIFACTS=artifacts/workshop/other CORPUS=artifacts/workshop/bicycle python -m ai_engineer_track ingest`"
    settings = load_ai_settings("tiny", artifacts=place() / "other", corpus=place() / "bicycle")
    try:
        index = open_index(settings)
    except UserError:
        raise NotYet(f"There is no index of the folder yet. Run {command}.") from None
    try:
        given = {path.name for path in (SCRATCH / "bicycle").iterdir()}
        need(
            {p.source for p in index.passages.values()} - given, f"Add a document about chains to the folder, then run {command}."
        )
        best = Retriever(index, settings).search(CHAIN, 1)[0].passage
        need(
            best.source not in given,
            f"The first passage for {CHAIN!r} is {best.id} of {best.source}. Write what to do in the words of one who asks.",
        )
        old = sum(p.source in given for p in index.passages.values())
    finally:
        index.close()
    return Expected(
        float(old), "Every passage of the files that were there before stayed `unchanged` and was not embedded again."
    )


def fusion() -> Expected:
    """8: two settings of the fusion, and the most that any fusion could find."""
    need(runs(8), "Run `python artifacts/workshop/ex8.py` first.")
    tried = {(run["rrf_k"], run["candidates"]) for run in runs(8)}
    need(len(tried) >= 2, "Change RRF_K or CANDIDATES in artifacts/workshop/ex8.py and run it again.")
    run = runs(8)[-1]
    cells = run["cells"]
    found = cells["both"] + cells["only dense"] + cells["only bm25"]
    totals = run["found"]
    how = f"Both + only dense + only bm25, of {run['questions']}; fused found {totals['fused']}, dense {totals['dense']}."
    return Expected(float(found), how)


def threshold() -> Expected:
    """9: the highest threshold that still sends the wanted share of emergencies."""
    run = last_run(9)
    table = {float(name): shares for name, shares in run["table"].items()}
    wanted, chosen = run["wanted"], run["threshold"]
    enough = [t for t, shares in table.items() if shares[0] >= wanted]
    need(enough, f"No threshold sends {wanted:.0%} of the emergencies. Ask for less in WANTED.")
    best = max(enough)
    sensitivity = table.get(chosen, [0.0])[0]
    need(sensitivity >= wanted, f"At {chosen:.2f} only {sensitivity:.1%} are sent, {wanted:.0%} are wanted. Lower THRESHOLD.")
    need(chosen >= best, f"At {chosen:.2f} enough are sent, but a higher threshold sends enough, too, and fewer near misses.")
    sent = 100 * (1 - table[chosen][1])
    how = f"100 x (1 - specificity) at {chosen:.2f}; of ordinary messages it is {100 * (1 - table[chosen][2]):.1f}."
    return Expected(sent, how, tolerance=1.0)


def asking_back() -> Expected:
    """10: a way to choose questions that beats the one given, and how many are worth asking."""
    run = last_run(10)
    mine, given = run["accuracy"]["yours"], run["accuracy"]["alphabetical"]
    need(mine != given, "Your way asks what the given one asks. Change `choose` in artifacts/workshop/ex10.py.")
    need(
        mine[-1] > given[-1],
        f"After {len(mine) - 1} questions yours is right in {mine[-1]:.1%}, the given way in {given[-1]:.1%}. "
        "Ask about what the likely candidates list.",
    )
    gain = run["accuracy"]["largest expected gain"]
    worth = next((n for n in range(1, len(gain)) if gain[n] - gain[n - 1] < WORTH), len(gain)) - 1
    steps = ", ".join(f"{after - before:+.3f}" for before, after in pairwise(gain))
    return Expected(
        float(worth), f"With the largest expected gain the questions add {steps}: the last one before less than {WORTH}."
    )


def judging() -> Expected:
    """11: a judge whose kappa reaches the bar, and the accuracy that a judge gets without looking."""
    read_json(artifacts() / "judge" / "calibration.json", "Run `python -m ai_engineer_track calibrate` first.")
    run = last_run(11)
    low = run["kappa"]["low"] or 0.0
    need(
        low >= 0.4,
        f"Your judge's kappa is {run['kappa']['value']:.2f}, its lower end {low:.2f}; 0.40 is needed. "
        "Most of the grounded answers are quotations: look for each statement among the passages.",
    )
    how = "A judge that always says yes is right in every grounded row: their share, in percent. Its kappa is 0."
    return Expected(100 * run["grounded_share"], how, tolerance=1.0)


def swapped() -> Expected:
    """12: feedback about two models, and which training the current one comes from."""
    need(runs(12), "Run `python artifacts/workshop/ex12.py` while the service runs.")
    records = [r for r in feedback.read(artifacts() / "feedback")[0] if r.kind in ("thumbs_up", "thumbs_down")]
    need(
        any(r.kind == "thumbs_down" and r.reason for r in records),
        "Nobody said what was wrong. Give one answer a thumbs_down with a reason in ex12.py (or on the page).",
    )
    models = {r.model_version.split(":")[0] for r in records}
    need(
        len(models) >= 2, f"All feedback is about {', '.join(models)}. Publish another model, start the service again, ask again."
    )
    made = handoff.read_manifest(handoff.current(artifacts() / "models"))
    latest = records[-1].model_version
    need(
        is_about(latest, made),
        f"The last thumb is about {latest}, the current model is {made.version}. Start the service again, then run ex12.py.",
    )
    how = f"The manifest of {made.version} keeps the training settings; it is the rank under `training`."
    return Expected(float(made.training["rank"]), how)


def is_about(model: str, made: handoff.Manifest) -> bool:
    """Does a served model's name belong to a manifest? It begins with the version or with the model's id."""
    return model.split(":")[0] in (made.version, made.model_id)


AI_CHECKS: dict[int, Callable[[], Expected]] = {
    7: own_documents,
    8: fusion,
    9: threshold,
    10: asking_back,
    11: judging,
    12: swapped,
}
