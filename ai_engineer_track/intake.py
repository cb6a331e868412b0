"""What a message has to be before anyone looks at it: text, not too long, in a language the library is in.

Why an AI engineer writes this down: whatever can be typed or pasted will be. Each kind of unusable message has one friendly
answer, and everything else becomes one plain line of text: markup is stripped, and nothing in it is an instruction.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Container

from pydantic import BaseModel, ConfigDict

HELP = "If this may be an emergency, call the emergency number now."
EMPTY = "Please write what you would like to know, for example: What helps against a migraine?"
TOO_LONG = f"That is too long for me to read well. Please tell me in a few sentences what you would like to know. {HELP}"
UNREADABLE = f"I could not read that as text. Please write your question in words. {HELP}"
LANGUAGE = f"I can only read English, because the library is in English. {HELP}"
#: categories of Unicode that are not seen, or only as a mark on another character
HIDDEN = ("Cf", "Mn", "Me")
#: letters of other alphabets that look like these; where a word can be read with them, they stand for them
LOOK_ALIKES = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаеіјкмнорсѕтухԁһΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεικνορτυχ", "ABESIJKMHOPCTYXaeijkmhopcstyxdhABEZHIKMNOPTYXaeikvoptux"
)
KNOWN_WORDS = 0.4  # share of known words up to which a message may be in another language
#: small words of other languages that are no words of English
FOREIGN = set(
    (
        "der das und ist nicht ich mein meine mit gegen haben schmerzen bitte wie le les une est je pas mon avec pour quoi "
        "los las una que por para con mi tengo dolor desde il che non sono della mio contro het een niet mijn wat jest nie "
        "jak boli ve bir icin agri meu minha nao uma dor como "
    ).split()
)
#: common words of English, enough to recognise a message by; learners' English has them too
ENGLISH = set(
    (
        "a about after all am an and any are as at back bad be been before but by call can could day did do does doctor dont "
        "down eat every feel for from get go good got had has have he head help her him his how hurt i if im in is it its "
        "just keep know last leg like long make many me more much my need new night no not now of off old on one or out over "
        "pain please should she sick since skin so some still stop take than that the their them then there they this time "
        "to today too tablet two up very want was we week well what when where which who why will with work year yes you "
        "your hurts pills safe normal child baby mum dad son daughter wife husband "
    ).split()
)


class Intake(BaseModel):
    """`text` is what the others read. `problem` is what to reply when the message cannot be used, with `reason` for the log.

    `text` is there also then: an emergency is one in whatever it is wrapped.
    """

    model_config = ConfigDict(frozen=True)
    text: str
    problem: str = ""
    reason: str = ""


def take(message: str, max_chars: int, vocabulary: Container[str] = frozenset()) -> Intake:
    """The message as one line of plain text, or why it cannot be used. `vocabulary` are the words the library uses."""
    if len(message) > max_chars:
        return Intake(text=plain(message[:max_chars]), problem=TOO_LONG, reason="too long")
    text = plain(message)
    if message and unreadable_share(message) > 0.1:
        return Intake(text=text, problem=UNREADABLE, reason="not text")
    if not re.search(r"\w", text):
        return Intake(text="", problem=EMPTY, reason="empty")
    if not is_english(text, vocabulary):
        return Intake(text=text, problem=LANGUAGE, reason="another language")
    return Intake(text=text)


def plain(message: str) -> str:
    """One line of plain letters: without markup, control or invisible characters, stacked accents and disguised letters.

    Words are read by what a person sees. So invisible characters join what they stand in (a soft hyphen, a zero-width space),
    control characters part it, letters in circles or full width are the letters, and an accent no letter takes is dropped.
    """
    text = re.sub(r"<(script|style)\b.*?</\1\s*>", " ", message, flags=re.IGNORECASE | re.DOTALL)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", " ", text))
    text = unicodedata.normalize("NFKC", text)
    kinds = ((c, unicodedata.category(c)) for c in text)
    text = "".join(" " if kind in ("Cc", "Cn", "Co", "Cs") or kind[0] == "Z" else c for c, kind in kinds if kind not in HIDDEN)
    return " ".join(_undisguised(word) for word in text.split())


def _undisguised(word: str) -> str:
    """A word that can be read in Latin letters, in Latin letters, and any other as it is."""
    shown = word if word.isascii() else word.translate(LOOK_ALIKES)
    return shown if shown.isascii() or any(c.isascii() and c.isalpha() for c in word) else word


def unreadable_share(message: str) -> float:
    odd = sum(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\n\r\t") for c in message)
    return odd / len(message)


def is_english(text: str, vocabulary: Container[str] = frozenset()) -> bool:
    """False only when it is clear: mostly other letters, or few known words and small words of another language.

    Terse messages ("tick rash versus dengue rash") and misspelt ones have few known words too, so that alone does not count.
    """
    letters = [c for c in text if c.isalpha()]
    if letters and sum(c.isascii() for c in letters) / len(letters) < 0.7:
        return False
    words = re.findall(r"[^\W\d_]+", text.lower().replace("'", "").replace("’", ""))
    known = sum(word in ENGLISH or word in vocabulary for word in words) / max(1, len(words))
    return known > KNOWN_WORDS or not any(word in FOREIGN for word in words)
