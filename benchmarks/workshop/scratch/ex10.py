"""Exercise 10: when is a question worth asking?    python artifacts/workshop/ex10.py

Simulated people with a vague opening answer from a hidden profile, or do not know. After every reply the assistant says which
leaflet fits best. Training and validation cases; the test split is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ai_engineer_track.clarify import Belief, Interviewer, Question, simulate
from ai_engineer_track.evidence import Evidence
from ai_engineer_track.heads import Array
from ai_engineer_track.ingest import open_index
from ai_engineer_track.settings import load_ai_settings
from ai_engineer_track.turn import Reply
from benchmarks.workshop.place import keep_run, script
from shared import library as lib
from shared.metrics import estimate_mean
from shared.passages import StoredVectors

MOST = 4  # questions asked at most
EVERY = 4  # every so many-th case, so that a run stays short


def alphabetical(interviewer: Interviewer, belief: Belief, asked: set[str]) -> str | None:
    """To be beaten: a questionnaire."""
    features = {feature for slug in belief.candidates for feature in interviewer.leaflets[slug].features}
    return min(features - asked, default=None)


# --- change this -------------------------------------------------------------------------------------------------------
def choose(interviewer: Interviewer, belief: Belief, asked: set[str]) -> str | None:
    """The feature to ask about next; None to stop. `belief.candidates` are leaflets, the likeliest first;
    `interviewer.leaflets[slug].features` is what a leaflet says: {"where the pain is": "one side", ...}.

    This one goes through everything that any candidate lists, in the order of the alphabet.
    """
    return alphabetical(interviewer, belief, asked)


# ------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    settings = load_ai_settings("tiny")
    index = open_index(settings)
    stored = StoredVectors(settings.artifacts / "vectors.npz", index.embed)
    library = lib.load_library(settings.datasets)
    interviewer = Interviewer(library.leaflets, Evidence(index), index.embed, stored)
    rows = lib.read_rows(settings.datasets, "cases.jsonl", lib.Case)[0]
    cases = [c for c in rows if c.split != "test" and c.needs_question][::EVERY]
    openings = stored([c.opening for c in cases])

    def way(rule: Callable[[Interviewer, Belief, set[str]], str | None]) -> Callable[..., Question | None]:
        def ask(belief: Belief, opening: Array, replies: Sequence[Reply]) -> Question | None:
            feature = rule(interviewer, belief, {reply.feature for reply in replies})
            return Question(feature, interviewer.values(feature, belief), 0.0) if feature else None

        return ask

    ways = {"yours": way(choose), "alphabetical": way(alphabetical), "largest expected gain": None}
    found: dict[str, list[float]] = {}
    print(f"{len(cases)} vague openings; the right leaflet is thought likeliest after n questions; value [95 % interval]")
    for name, rule in ways.items():
        told = [simulate(c, interviewer, v, MOST, rule)[0] for c, v in zip(cases, openings, strict=True)]
        right = [[float(best[n] == c.leaflet) for best, c in zip(told, cases, strict=True)] for n in range(MOST + 1)]
        found[name] = [sum(r) / len(r) for r in right]
        print(f"  {name}")
        for n, r in enumerate(right):
            print(f"    {n}: {estimate_mean(r, 1000, 7)}")
    index.close()
    keep_run(10, {"cases": len(cases), "accuracy": found})


if __name__ == "__main__":
    script(main)
