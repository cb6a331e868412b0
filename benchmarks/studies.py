"""The studies whose reports the pages use when somebody measured them, each with the command that does.

    make tune
    python -m benchmarks readme --take tune.json

docs/lessons.md and docs/resilience.md take their figures from them; both say the same where one is missing.
"""

from __future__ import annotations

#: reports that are kept beside those of `make demo` when somebody measured them, and the command that does
STUDIES = {
    "low_bits.json": "make quantize BITS=2",
    "distill.json": "make distill",
    "tune.json": "make tune",
    "loop.json": "make loop",
    "security.json": "make attack",
    "faults.json": "make faults",
    "load.json": "make load",
    "soak.json": "make soak",
    "drift.json": "python -m ml_engineer_track drift-study",
}


def not_measured(name: str) -> str:
    """What a page says in the place of a study's figures."""
    return f"Not measured yet: `{STUDIES[name]}`, then `python -m benchmarks readme --take {name}`."
