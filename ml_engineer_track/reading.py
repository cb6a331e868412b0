"""Turns public text into reading exercises: the curriculum of the bundled base model's second stage.

A model that answers from sources needs two skills before it needs knowledge: **finding** (which of these sentences is
meant?) and **copying** (say it word for word). Both can be trained on text nobody has labelled: take a sentence, keep a
few of its words as the question, hide it among its neighbours. Data sets with real questions (MedQuAD, SQuAD, RQE) come
on top. Every exercise is laid out by `shared.chat`, the contract the model is served under.

    python -m ml_engineer_track pretrain --corpus FOLDER      (this module is its stage 2; it has no command of its own)

Sources and licences: see the model card in `base_model/`.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ml_engineer_track.corpus import Corpus, flat, sentences
from shared import chat
from shared.errors import UserError

CHARS_PER_TOKEN = 4.0  # of the bundled tokenizer on English prose; only used to size exercises
STOP = frozenset(
    "the a an of to in and is are was were be been for on with as by at from that this it its or which their has have had "
    "not can may also more most than other these those such into they he she his her we you i but when who what how there "
    "some many one between during after before about over under each both used often usually called known include".split()
)


@dataclass(frozen=True)
class Exercise:
    """One prompt with the reply that is right. `kind` names the skill."""

    kind: str
    messages: list[chat.Message]
    reply: str


#: texts of the sources, and questions with the number (from 1) of the source that answers, 0 for none
Quiz = tuple[list[str], list[tuple[str, int]]]


class Exercises:
    """Makes exercises of every kind from a corpus; the same seed gives the same exercise."""

    def __init__(self, corpus: Corpus, held_out: bool = False) -> None:
        tasks = corpus.held_out_tasks if held_out else corpus.tasks
        self.paragraphs = corpus.held_out_paragraphs if held_out else corpus.paragraphs
        self.squad = [row for row in tasks["squad2_16_articles"] if len(sentences(row["context"])) > 1]
        self.medquad = [row for row in tasks["medquad_1_to_6"] if len(row["sections"]) > 1]
        self.rqe = [row for row in corpus.tasks["rqe_train"] if len(row["chq"]) < 500]
        self.qulac = corpus.tasks["qulac"]
        self.in3 = corpus.tasks["in3_train"]
        self.medsafety = corpus.tasks["medsafety_train"]
        self.halueval = corpus.tasks["halueval_qa"]
        self.matches = corpus.matches
        self.by_context: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.squad:
            self.by_context[row["context"]].append(row)
        self.contexts = list(self.by_context)
        self.kinds: dict[str, Callable[[random.Random, int], Exercise | None]] = {
            "copy": self.copy,
            "lookup": self.lookup,
            "index": self.index,
            "quiz": self.quiz,
            "find": self.find,
            "consult": self.consult,
            "define": self.define,
            "section": self.section,
            "squad_reading": self.squad_reading,
            "medquad_reading": self.medquad_reading,
            "same_question": self.same_question,
            "choose_question": self.choose_question,
            "claim": self.claim,
            "ask_back": self.ask_back,
            "vague": self.vague,
            "harmful": self.harmful,
            "fields": self.fields,
        }

    def make(self, kind: str, rng: random.Random, tokens: int) -> Exercise:
        """An exercise of about `tokens` tokens; kinds that find no material in one paragraph try others."""
        for _ in range(2000):
            made = self.kinds[kind](rng, int(tokens * CHARS_PER_TOKEN))
            if made is not None:
                return made
        raise UserError(f"no material for exercises of kind {kind!r}", "the corpus", "Is the corpus complete?")

    def copy(self, rng: random.Random, room: int) -> Exercise:
        """Say this again: the first exercise, from which the induction heads come."""
        text = " ".join(rng.choice(self.paragraphs))
        words = text.split()
        n = max(3, int(room / 2 / 6.5) - 4)
        start = rng.randrange(max(1, len(words) - n))
        span = " ".join(words[start : start + rng.randint(max(3, n // 2), n)])
        return Exercise("copy", _user(f"Copy: {span}"), span)

    def lookup(self, rng: random.Random, room: int) -> Exercise | None:
        """Which sentence has this number: ties a mark to its line."""
        sources = self._sources(rng, room - 120, paragraphs=1 + room // 1500)
        if len(sources) < 2:
            return None
        n = rng.randrange(len(sources)) + 1
        return Exercise(
            "lookup", _user(f"{chat.render_sources(sources)}\n\nQuote sentence [{n}]."), chat.answer_text([n], sources)
        )

    def index(self, rng: random.Random, room: int) -> Exercise | None:
        """Words of the sources, each with the number of its sentence: many choices a row, where `find` has one."""
        sources = self._sources(rng, int(room * 0.6), paragraphs=1 + room // 1500)
        entries = []
        for number, source in enumerate(sources, start=1):
            words = [w for w in re.findall(r"[A-Za-z][A-Za-z\-]+", source.text) if w.lower() not in STOP]
            for _ in range(min(4, len(words) // 2)):
                start = rng.randrange(len(words) - 1)
                entries.append(f"{' '.join(words[start : start + rng.randint(1, 3)])} [{number}]")
        if len(sources) < 2 or len(entries) < 3:
            return None
        rng.shuffle(entries)
        while sum(map(len, entries)) > room * 0.35:
            entries.pop()
        return Exercise("index", _user(f"{chat.render_sources(sources)}\n\nWhich sentence?"), "; ".join(entries))

    def quiz(self, rng: random.Random, room: int) -> Exercise | None:
        """A conversation of many questions about the same sources, each answered by a number alone."""
        material = rng.choices((self._words_quiz, self._squad_quiz, self._sections_quiz, self._consult_quiz), (4, 2, 2, 5))[0]
        made = material(rng, room)
        if made is None or len(made[0]) < 2:
            return None
        texts, asked = made
        sources = [_source(text) for text in texts]
        turns, used = [], len(chat.render_sources(sources)) + 20
        rng.shuffle(asked)
        for question, number in asked:
            if rng.random() < 0.08:
                stranger = _words_of(rng.choice(rng.choice(self.paragraphs)), rng)
                question, number = (stranger, 0) if stranger else (question, number)
            used += len(question) + 60
            if used > room:
                break
            turns.append((flat(question), f"[{number}]" if number else chat.NOT_ANSWERED))
        if len(turns) < 2:
            return None
        opening = f"{chat.render_sources(sources)}\n\nQuestion: {turns[0][0]}"
        later = "".join(f"<|end|><|user|>Question: {question}<|end|><|assistant|>{number}" for question, number in turns[1:])
        return Exercise("quiz", _user(opening), turns[0][1] + later)

    def _words_quiz(self, rng: random.Random, room: int) -> Quiz:
        texts = [s.text for s in self._sources(rng, int(room * 0.55), paragraphs=1 + room // 1500)]
        order = rng.sample(range(len(texts)), len(texts)) * 3
        return texts, [(q, i + 1) for i in order if (q := _words_of(texts[i], rng))]

    def _squad_quiz(self, rng: random.Random, room: int) -> Quiz | None:
        context = rng.choice(self.contexts)
        texts = sentences(context)
        if sum(map(len, texts)) > room * 0.7:
            return None
        asked = [
            (row["question"], next((i for i, s in enumerate(texts, 1) if not row["is_impossible"] and row["answers"][0] in s), 0))
            for row in self.by_context[context]
        ]
        return texts, [(q, n) for q, n in asked if n or rng.random() < 0.2]

    def _sections_quiz(self, rng: random.Random, room: int) -> Quiz | None:
        row = rng.choice(self.medquad)
        pairs = [(part["question"], found[0]) for part in row["sections"] if (found := sentences(part["answer"]))]
        pairs = rng.sample(pairs, min(len(pairs), 8))
        while sum(len(q) + len(s) + 60 for q, s in pairs) > room * 0.95 and pairs:
            pairs.pop()
        return [s for _, s in pairs], [(q, i) for i, (q, _) in enumerate(pairs, 1)]

    def _consult_quiz(self, rng: random.Random, room: int) -> Quiz | None:
        if self.matches is None:
            return None
        m, texts, asked, chosen, used = self.matches, [], [], [], 0
        for question in {self._someone_asks(rng) for _ in range(12)}:
            best = int(m.nearest[question, 0])
            if all(m.clear(question, other) for _, other in chosen) and all(m.clear(other, best) for other, _ in chosen):
                text = self._as_question(question, rng)
                used += len(text) + len(m.sentences[best]) + 70
                if used > room * 0.95:
                    break
                chosen.append((question, best))
                texts.append(m.sentences[best])
                asked.append((text, len(texts)))
        return texts, asked

    def consult(self, rng: random.Random, room: int) -> Exercise | None:
        """A question somebody really asked; the sentence a sentence model finds nearest, among others of its document."""
        if self.matches is None:
            return None
        m, question = self.matches, self._someone_asks(rng)
        best, text = int(m.nearest[question, 0]), self._as_question(question, rng)
        if len(text) > room // 3:
            return None
        near = range(max(0, best - 6), min(len(m.sentences), best + 7))
        rivals = [i for i in near if m.document[i] == m.document[best]] + [int(i) for i in m.nearest[question, 40::40]]
        kept = sorted({best, *(i for i in rivals if m.clear(question, i))})  # document order: its place must tell nothing
        return self._hide("consult", rng, text, [m.sentences[best]], [m.sentences[i] for i in kept], room)

    def _someone_asks(self, rng: random.Random) -> int:
        """The number of a question of `matches`: as often one that was really asked as a statement."""
        real = self.matches.asked if self.matches else 0
        total = len(self.matches.questions) if self.matches else 0
        return rng.randrange(real) if rng.random() < 0.5 or real == total else rng.randrange(real, total)

    def _as_question(self, number: int, rng: random.Random) -> str:
        """A question as it was asked; a statement with some of its words left out, as people type."""
        text = self.matches.questions[number] if self.matches else ""
        if self.matches and number < self.matches.asked:
            return text
        words = text.rstrip(".!").split()
        kept = [w for w in words if rng.random() < 0.75] if rng.random() < 0.6 else words
        return " ".join(kept or words)[: rng.choice((60, 120, 200))].lower()

    def find(self, rng: random.Random, room: int) -> Exercise | None:
        """A few words of a sentence as the question; one in six has its sentence taken out of the sources."""
        paragraph = rng.choice(self.paragraphs)
        target = rng.choice(paragraph)
        query = _words_of(target, rng)
        return self._hide("find", rng, query, [target], paragraph, room) if query else None

    def define(self, rng: random.Random, room: int) -> Exercise | None:
        """A sentence that says what something is, asked for as a question."""
        paragraph = rng.choice(self.paragraphs)
        for target in rng.sample(paragraph, len(paragraph)):
            match = re.match(
                r"(?:An? |The )?([A-Z]?[\w\-]+(?: [\w\-]+){0,3}) (?:is|are|refers to|means) (?:an?|the|any|one|when)\b", target
            )
            if match and match[1].split()[0].lower() not in STOP:
                question = rng.choice(DEFINITIONS).format(match[1] if rng.random() < 0.5 else match[1].lower())
                return self._hide("define", rng, question, [target], paragraph, room)
        return None

    def section(self, rng: random.Random, room: int) -> Exercise | None:
        """Which sentence stands under this heading of a MedQuAD document."""
        row = rng.choice(self.medquad)
        asked = rng.choice(row["sections"])
        answer = sentences(asked["answer"])[:2]
        shown = [s for sec in row["sections"] for s in (answer[:1] if sec is asked else sentences(sec["answer"])[:4])]
        if not answer or len(shown) < 4:
            return None
        return self._hide("section", rng, f"{row['focus']}: {asked['qtype']}", answer[:1], shown, room)

    def squad_reading(self, rng: random.Random, room: int) -> Exercise | None:
        """A person's question about a paragraph; the sentence that holds the answer, or none."""
        row = rng.choice(self.squad)
        context = sentences(row["context"])
        if row["is_impossible"]:
            return self._hide("squad_reading", rng, row["question"], [], context, room)
        target = next((s for s in context if row["answers"][0] in s), None)
        return self._hide("squad_reading", rng, row["question"], [target], context, room) if target else None

    def medquad_reading(self, rng: random.Random, room: int) -> Exercise | None:
        """A health question; the first one or two sentences of its section among the other sections of the document."""
        row = rng.choice(self.medquad)
        asked = rng.choice(row["sections"])
        answer = sentences(asked["answer"])[: rng.choice((1, 1, 2))]
        shown = [s for sec in row["sections"] for s in (answer if sec is asked else sentences(sec["answer"])[:3])]
        question = asked["question"]
        if row["synonyms"] and rng.random() < 0.4:
            question = question.replace(row["focus"], rng.choice(row["synonyms"]))
        return self._hide("medquad_reading", rng, question, answer, shown, room) if answer else None

    def same_question(self, rng: random.Random, room: int) -> Exercise:
        """Does answering the second question answer the first? (RQE)"""
        row = rng.choice(self.rqe)
        task = f"Does an answer to B answer A? Reply as JSON.\n\nA: {flat(row['chq'])}\n\nB: {flat(row['faq'])}"
        return Exercise("same_question", _user(task), json.dumps({"same": bool(row["entails"])}, separators=(",", ":")))

    def choose_question(self, rng: random.Random, room: int) -> Exercise | None:
        """A long consumer question; the short question that asks the same among others. Bridges lay and clinical words."""
        row = rng.choice(self.rqe)
        if not row["entails"] or row["chq"] == row["faq"]:
            return None
        n = max(3, min(16, (room - len(row["chq"]) - 300) // 70))
        others = [flat(rng.choice(self.rqe)["faq"]) for _ in range(n)]
        return self._hide("choose_question", rng, row["chq"], [flat(row["faq"])], others, room)

    def claim(self, rng: random.Random, room: int) -> Exercise | None:
        """Do the sources say this? Half of the claims are changed by a number, a negation or a swapped word."""
        if rng.random() < 0.25:
            row = rng.choice(self.halueval)
            true = rng.random() < 0.5
            sources = [_source(s) for s in sentences(row["knowledge"])]
            answer = f"{row['question']} {row['right_answer' if true else 'hallucinated_answer']}"
            return self._claim(answer, sources, true) if sources else None
        sources = self._sources(rng, min(room - 300, 1200), paragraphs=1)
        if len(sources) < 2:
            return None
        said = rng.choice(sources).text
        changed = None if rng.random() < 0.5 else change_fact(said, rng)
        return self._claim(changed or said, sources, changed is None)

    def ask_back(self, rng: random.Random, room: int) -> Exercise:
        """A question that clarifies a short request (Qulac)."""
        row = rng.choice(self.qulac)
        task = f"Ask the person one short question.\n\nMessage: {flat(row['topic'])}\n\nFeature: {flat(row['facet_desc'])}"
        return Exercise("ask_back", _user(task), flat(row["question"]))

    def vague(self, rng: random.Random, room: int) -> Exercise:
        """Is this task clear enough to start on? (IN3)"""
        row = rng.choice(self.in3)
        task = f"Is the message clear or vague? Reply as JSON.\n\nMessage: {flat(row['task'])}"
        return Exercise("vague", _user(task), json.dumps({"vague": bool(row["vague"])}, separators=(",", ":")))

    def harmful(self, rng: random.Random, room: int) -> Exercise:
        """Is this request harmful? Harmless ones are MedQuAD's and RQE's questions."""
        bad = rng.random() < 0.5
        text = rng.choice(self.medsafety)["harmful_medical_request"] if bad else rng.choice(self.rqe)["chq"]
        task = f"Is the message harmful? Reply as JSON.\n\nMessage: {flat(text)}"
        return Exercise("harmful", _user(task), json.dumps({"harmful": bad}, separators=(",", ":")))

    def fields(self, rng: random.Random, room: int) -> Exercise | None:
        """Fill a given JSON schema from a sentence."""
        paragraph = rng.choice(self.paragraphs)
        words = re.findall(r"[A-Za-z]{4,}", " ".join(paragraph[:2]))
        if len(words) < 6:
            return None
        names = rng.sample(("name", "topic", "place", "count", "kind", "sure", "next"), rng.randint(1, 4))
        values: dict[str, Any] = {
            n: rng.randint(1, 60) if n == "count" else rng.random() < 0.5 if n == "sure" else rng.choice(words) for n in names
        }
        given = "; ".join(f"{n} = {json.dumps(v).strip(chr(34))}" for n, v in rng.sample(list(values.items()), len(values)))
        task = f"Reply as JSON with the keys {', '.join(names)}.\n\n{given}"
        return Exercise("fields", _user(task), json.dumps(values, separators=(",", ":")))

    def _hide(
        self, kind: str, rng: random.Random, question: str, targets: Sequence[str], context: Sequence[str], room: int
    ) -> Exercise | None:
        """Sources of about `room` characters: the context, then strangers, in runs as documents have them.

        `targets` are the sentences that answer (none: unanswerable). One in six loses its targets and becomes so.
        """
        drop = bool(targets) and rng.random() < 1 / 6
        own = [s for s in dict.fromkeys([*context, *targets]) if not (drop and s in targets)]
        brief = room < 800 or rng.random() < 0.2  # short rows have no room for the instruction, and finding needs none
        room -= len(question) + (60 if brief else 250)
        must = sum(len(t) + 6 for t in targets)
        if must > room:
            return None
        # Keep a run of the context around the targets, as long as about half of the room.
        kept, used = [s for s in own if s in targets], must
        for sentence in sorted((s for s in own if s not in targets), key=lambda s: rng.random()):
            if used + len(sentence) + 6 < max(must + 1, room * rng.uniform(0.4, 0.9)):
                kept.append(sentence)
                used += len(sentence) + 6
        runs = [[s for s in own if s in set(kept)]]
        for _ in range(12):
            stranger = [s for s in rng.choice(self.paragraphs)[: rng.randint(1, 5)] if s not in targets]
            size = sum(len(s) + 6 for s in stranger)
            if used + size <= room:
                runs.append(stranger)
                used += size
        rng.shuffle(runs)
        sources = [_source(s) for run in runs for s in run][: chat.MAX_SOURCES]
        numbers = [n for t in targets for n, s in enumerate(sources, start=1) if s.text == flat(t)]
        if not sources or (targets and not drop and len(numbers) != len(targets)):
            return None
        task = f"{chat.render_sources(sources)}\n\nQuestion: {flat(question)}"
        messages = _user(task) if brief else chat.answer_messages(question, sources)
        return Exercise(kind, messages, chat.answer_text([] if drop else numbers, sources))

    def _sources(self, rng: random.Random, room: int, paragraphs: int) -> list[chat.Source]:
        found: list[chat.Source] = []
        for _ in range(paragraphs * 3):
            for sentence in rng.choice(self.paragraphs):
                room -= len(sentence) + 6
                if room < 0 or len(found) == chat.MAX_SOURCES:
                    return found
                found.append(_source(sentence))
        return found

    @staticmethod
    def _claim(claim: str, sources: Sequence[chat.Source], true: bool) -> Exercise:
        task = f"Do the sources say all of the claim? Reply as JSON.\n\n{chat.render_sources(sources)}\n\nClaim: {flat(claim)}"
        return Exercise("claim", _user(task), json.dumps({"grounded": true}, separators=(",", ":")))


FORMS = ("{}", "{}?", "what about {}", "tell me about {}", "I want to know about {}", "{} please", "is it true about {}?")
DEFINITIONS = ("What is {}?", "what are {}", "What does {} mean?", "{}?", "Can you explain {}?", "tell me what {} is")


def _words_of(sentence: str, rng: random.Random) -> str | None:
    """A few words of a sentence, reworded, as a question; None for a sentence with too few of its own."""
    words = [w for w in re.findall(r"[A-Za-z][A-Za-z\-]+", sentence) if w.lower() not in STOP]
    if len(words) < 4:
        return None
    kept = sorted(rng.sample(range(len(words)), rng.randint(2, min(6, len(words)))))
    return rng.choice(FORMS).format(" ".join(_reword(words[i], rng) for i in kept))


def _reword(word: str, rng: random.Random) -> str:
    """A word as people type it: sometimes lower case, now and then with another ending or two letters swapped."""
    word = word.lower() if rng.random() < 0.7 else word
    roll = rng.random()
    if roll < 0.08 and len(word) > 5:
        i = rng.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if roll < 0.16:
        return word[:-1] if word.endswith("s") else word + "s"
    return word


def change_fact(sentence: str, rng: random.Random) -> str | None:
    """The sentence with one fact changed, or None when it offers nothing to change."""
    options: list[str] = []
    if numbers := list(re.finditer(r"\d+", sentence)):
        m = rng.choice(numbers)
        options.append(f"{sentence[: m.start()]}{int(m[0]) + rng.choice((1, 2, 5, 10))}{sentence[m.end() :]}")
    for a, b in (
        (" is ", " is not "),
        (" are ", " are not "),
        (" can ", " cannot "),
        (" may ", " never "),
        (" not ", " "),
        (" always ", " never "),
        (" more ", " less "),
        (" before ", " after "),
        (" increase", " decrease"),
        (" high ", " low "),
    ):
        if a in sentence:
            options.append(sentence.replace(a, b, 1))
    words = [w for w in re.findall(r"\b[a-z]{5,}\b", sentence) if w not in STOP]
    if len(words) > 3:
        first, second = rng.sample(words, 2)
        options.append(sentence.replace(first, "\0").replace(second, first).replace("\0", second))
    return rng.choice([o for o in options if o != sentence]) if any(o != sentence for o in options) else None


def _source(text: str) -> chat.Source:
    return chat.Source(id="", heading="", text=flat(text))


def _user(content: str) -> list[chat.Message]:
    return [{"role": "user", "content": content}]
