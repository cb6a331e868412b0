"""What the person has said in this conversation, kept per session and gone with one call.

Why an AI engineer keeps it apart from the transcript: being asked the same thing twice is what people hate most about
assistants, and being answered from something private they said long ago is what they fear. So what is remembered is a short list
of replies, each tied to the family of conditions it was about; it is used only there; an answer that used it is never cached;
and `forget` deletes it together with the whole checkpointed state of the session.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ai_engineer_track.turn import Reply

MAX_FACTS = 40
#: words that lean on what was said before
LEANS = re.compile(
    r"^(and|but|so|what about|how about|ok|okay|then)\b|\b(it|that|this|they|them|those|these|he|she)\b", re.IGNORECASE
)
SHORT = 8  # words up to which a message may be a follow-up


class Fact(BaseModel):
    """One thing the person said when asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    feature: str
    text: str
    family: str


def remember(facts: Sequence[Fact], replies: Sequence[Reply], family: str) -> list[Fact]:
    """The facts with new replies; the newest word on a feature counts. Replies that said nothing are not kept."""
    new = {(family, r.feature): Fact(feature=r.feature, text=r.text, family=family) for r in replies if not r.unknown}
    kept = [f for f in facts if (f.family, f.feature) not in new]
    return [*kept, *new.values()][-MAX_FACTS:]


def recall(facts: Sequence[Fact], family: str) -> list[Reply]:
    """What was said about this family of conditions, as replies that need not be asked for again."""
    return [Reply(feature=f.feature, text=f.text) for f in facts if family and f.family == family]


def in_context(message: str, last_title: str, well_covered: bool) -> str:
    """A short message that leans on the last answer, with its subject in front; any other message as it is.

    "And for children?" after an answer about migraine is looked up as "Migraine: And for children?".
    """
    leans = len(message.split()) <= SHORT and LEANS.search(message) is not None
    return f"{last_title}: {message}" if last_title and leans and not well_covered else message
