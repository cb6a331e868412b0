"""Feedback: what the product got wrong, written so that the next model can learn from it.

The AI track appends a record for every thumb a person gives and for every answer its own checks found wanting; the ML track
reads them. The file outlives the service, so three things must hold whatever happens: no personal data is ever written, no
record is lost or half-written, and none is there twice.

    artifacts/feedback/feedback.jsonl     one record a line, only ever appended to

    python -m shared.feedback             count the records by kind and report the lines that cannot be read

`Feedback` scrubs its free text when it is built, so a record that could leak a name cannot exist. Scrubbing goes by patterns.
It catches how people usually give away who they are, not every way: a lower-case name after "I'm" looks like "I'm pregnant".
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shared.chat import Verdict
from shared.errors import UserError
from shared.files import sha256_text
from shared.library import BadRow
from shared.records import RecordStore, read_records
from shared.settings import ROOT

FOLDER = ROOT / "artifacts" / "feedback"
FILE = "feedback.jsonl"

Kind = Literal["thumbs_up", "thumbs_down", "judge_failed", "withheld", "low_confidence", "clarify_failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def scrub(text: str) -> str:
    """`text` without names, phone numbers, e-mail and street addresses, dates of birth and other full dates.

    A name that was given away once is removed wherever it stands. Scrubbing twice changes nothing more, and takes time linear
    in the text.

    >>> scrub("My name is Ann Lee, I'm 34, call 020 7946 0018. My ankle hurts.")
    "My name is [name], I'm 34, call [number]. My ankle hurts."
    """
    plain = unicodedata.normalize("NFKC", text)  # full-width digits and letters are the same digits and letters
    plain = "".join(c for c in plain if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    names: set[str] = set()
    for pattern, replacement in _PERSONAL:
        if "name" in pattern.groupindex:
            names.update(word for match in pattern.finditer(plain) for word in match["name"].removesuffix("'s").split())
        plain = pattern.sub(replacement, plain)
    if names := {name for name in names if name[0].isupper() and len(name) > 2}:  # "my neighbour Roy ... Roy says"
        plain = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", "[name]", plain)
    return plain


Scrubbed = Annotated[str, AfterValidator(scrub)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TurnSummary(_Strict):
    """What the service did with the message: enough to compare with what it should have done."""

    kind: str = Field(max_length=40)
    text: Scrubbed = Field(max_length=8_000)
    leaflet: str | None = None
    cited: list[str] = []
    question: Scrubbed | None = None
    verdict: Verdict | None = None
    #: what was written and then not shown
    withheld: Scrubbed | None = None


class Feedback(_Strict):
    """One thing to learn from. `answer_id` names the answer, never the person or the conversation.

    `earlier` are the person's messages before `question`, oldest first, and `replies` what they were told: without them a
    clarified case cannot be replayed. `opening` is the message that began the problem, where `question` only replies to a
    question back. `steps` are the parts of the work with what each found, `passages` the ids of what was retrieved, best
    first. `model_version` is `<published version>:<variant>` of the model that answered, or the name a provider gives its
    model. `judge_trusted` says whether the judge agreed with the labels well enough, when it was last measured, for the marks
    this is about to count; None where it was not asked.
    """

    schema_version: Literal[1] = 1
    answer_id: str = Field(min_length=1, max_length=64)
    kind: Kind
    reason: Scrubbed = Field(default="", max_length=2_000)
    #: the same remark on the same answer has the same id, however often it is sent
    id: str = Field(default_factory=lambda made: _record_id(made), max_length=64)
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    question: Scrubbed = Field(max_length=20_000)
    opening: Scrubbed = Field(default="", max_length=20_000)
    earlier: list[Scrubbed] = []
    replies: list[Scrubbed] = []
    turn: TurnSummary
    steps: list[Scrubbed] = []
    passages: list[str]
    model_version: str
    index_version: str
    prompt_version: int
    judge_trusted: bool | None = None


class FeedbackStore(RecordStore[Feedback]):
    """Appends to the feedback file of a folder. Several threads and processes may do so at once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder / FILE, Feedback)


def read(folder: Path = FOLDER) -> tuple[list[Feedback], list[BadRow]]:
    """All records in the order they were written, each once, and the lines that are none. No file: two empty lists."""
    return read_records(folder / FILE, Feedback)


def _record_id(made: dict[str, Any]) -> str:
    """`made` holds the fields declared before the id; a field that did not validate is missing, and the record is refused."""
    return "f-" + sha256_text("\0".join(str(made.get(name)) for name in ("answer_id", "kind", "reason")))[:16]


# What gives people away. Every quantifier is bounded, so that no message can make a pattern slow. A name starts with a capital
# letter, except after words that only a name follows.
_NAME = r"[A-ZÀ-ÖØ-Þ][\w'’-]{1,30}"
_NAMES = rf"(?P<name>{_NAME}(?:[ ]{_NAME}){{0,3}})"
_WORD = r"[^\W\d_][\w'’-]{0,30}"
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = (
    r"(?:\d{1,2}[ ]?[./-][ ]?\d{1,2}[ ]?[./-][ ]?(?:\d{4}|\d{2})|\d{4}[./-]\d{1,2}[./-]\d{1,2}"
    rf"|{_DAY}[ ](?:of[ ])?{_MONTH}\.?,?[ ]\d{{4}}|{_MONTH}\.?[ ]{_DAY},?[ ]\d{{4}})(?!\d)"
)
_STREET = r"(?:street|road|avenue|lane|crescent|boulevard|terrace)"
_STREET_CAPITAL = r"(?:St|Rd|Ave|Ln|Dr|Drive|Close|Court|Way|Place|Gardens|Square|Mews|Grove|Hill|Walk|Park|Row)"
_STREET_WORD = r"(?!(?:of|in|on|at|my|the|our|his|her|a|to|by|from|and)\b)[a-z'’-]{2,30}"
_RELATIVE = (
    r"(?i:son|daughter|wife|husband|partner|mother|father|mum|mom|dad|brother|sister|baby|child|boy|girl|friend|boyfriend"
    r"|girlfriend|mate|nephew|niece|uncle|aunt|auntie|gran|nan|grandma|grandad|grandpa|grandson|granddaughter|neighbour|neighbor"
    r"|cousin|boss|twin|carer)"
)
#: Capitalised words that follow "I'm" without being names: "I'm Type 1 diabetic", "I'm Black".
_NOT_NAMES = (
    r"(?!(?:Not?|Type|In|On|At|So|Very|Really|Still|Now|Just|Also|Having|Feeling|Getting|Worried|Pregnant|Diabetic|Asthmatic"
    r"|Allergic|Black|White|Asian|African|Caribbean|Indian|British|English|Scottish|Welsh|Irish|European|American|Muslim"
    r"|Christian|Jewish|Hindu|Sikh|The|An?|My|I|Scared|Afraid|Tired|Sick|Ill|Dying|Bleeding|Choking|Taking|Fine|Sorry|Sure"
    r"|Going)\b)"
)
_NOT_AFTER_A_NAME = r"(?!(?:and|but|or|i|from|with|my|who|is|was|has|have|she|he|they|the|am|for|it|please)\b)"
_NOT_AFTER_CALL_ME = (
    r"(?!(?:back|on|at|if|when|an?|the|crazy|mad|stupid|silly|old|later|today|tomorrow|now|please|mrs?|ms|miss|dr)\b)"
)

#: (pattern, what stands in its place); patterns with a group `name` also tell which words are names
_PERSONAL: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # e-mail addresses, also spelt out
        (r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}", "[email]"),
        (r"(?i)\b[\w.+-]{1,64} ?[(\[]at[)\]] ?[\w-]{1,63}(?: ?[(\[]dot[)\]] ?|\.)[a-z]{2,10}\b", "[email]"),
        # dates: of birth in any form that says so, others when complete
        (rf"(?i)\b((?:born|birthday)(?: on| in)?(?: is| was)?|d\.?o\.?b\.?|date of birth)(:| is| was)?[ ]?{_DATE}",
         r"\1\2 [date]"),
        (r"(?i)\b(born(?: on| in)?|d\.?o\.?b\.?:?|birth:?) \d{4}\b", r"\1 [date]"),
        (rf"(?i)\b((?:born|birthday)(?: is| was)?(?: on)?)(?: the)? (?:{_DAY} (?:of )?{_MONTH}|{_MONTH} {_DAY})\b", r"\1 [date]"),
        (rf"(?i)(?<![\d./-]){_DATE}", "[date]"),
        # phone, patient and card numbers: eight digits or more, in groups; never doses, pressures or ages
        (r"(?<![\w.])(?:\+|\(\+?)?\d(?:[ ().-]{0,2}\d){7,18}(?!\w)", "[number]"),
        (r"(?i)\b((?:phone|mobile|tel|telephone)(?: number)?(?: is|:|\.)?|(?:call|ring|text) me on) ?\d[\d -]{3,12}\d\b",
         r"\1 [number]"),
        # postcodes (UK) and street addresses
        (r"(?i)\b(my (?:home )?address is|i live at) (?!\[)[^.;!?\n]{3,120}", r"\1 [address]"),
        (r"\b[A-Z]{1,2}\d[A-Z\d]? ?\d[ABD-HJLNP-UW-Z]{2}\b", "[address]"),
        (rf"(?i)\b(?:flat \d{{1,4}}[a-z]?,? )?\d{{1,5}}[a-z]?,? (?:{_STREET_WORD} ){{1,3}}{_STREET}\b", "[address]"),
        (rf"\b\d{{1,5}}[a-z]?,? (?:{_NAME} ){{1,3}}{_STREET_CAPITAL}\b\.?", "[address]"),
        (rf"\b((?:[Ii]|[Ww]e) live in|(?:[Ii](?:['’]m| am)|[Ww]e(?:['’]re| are)) from) (?!\[){_NAME}(?: {_NAME})?",
         r"\1 [address]"),
        # names
        (rf"\b(Dr|Mr|Mrs|Ms|Miss|Mx|Prof|Nurse|Professor|Doctor)\.? (?!\[){_NAMES}", r"\1 [name]"),
        (rf"(?i)\b(my (?:full |first |last |sur)?name(?:['’]s| is)|(?:i['’]m|i am) called|name:) (?!\[)"
         rf"(?P<name>{_WORD}(?:[ ]{_NOT_AFTER_A_NAME}{_WORD}){{0,2}})", r"\1 [name]"),
        (rf"(?i)\b(call me) (?!\[){_NOT_AFTER_CALL_ME}(?P<name>{_WORD})", r"\1 [name]"),
        (rf"\b([Ii](?:['’]m| am)|[Tt]his is|[Hh]ere is|(?:is|['’]s|are|was) called) (?!\[){_NOT_NAMES}{_NAMES}", r"\1 [name]"),
        (rf"\b((?i:my|our|his|her) {_RELATIVE},?) (?!\[)(?!I\b|I['’]|GP\b){_NAMES}", r"\1 [name]"),
        (rf"(?m)\b((?i:regards|thanks|thank you|cheers|yours sincerely|best wishes)[,!.]?\s{{1,3}}){_NAMES}(?=\W{{0,3}}$)",
         r"\1[name]"),
    ]
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.feedback", description="Count the feedback that was collected.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    try:
        records, bad = read(options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counted = Counter(record.kind for record in records)
    print("\n".join(f"{counted[kind]:6d}  {kind}" for kind in KINDS))
    for row in bad:
        print(f"skipped {row.file}:{row.line}: {row.reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
