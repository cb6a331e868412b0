"""Reads what people write: regular expressions, and grammars in Lark or EBNF notation, into the tree of `grammar.py`.

Two notations come in through vLLM's `structured_outputs.grammar`: Lark, which `shared.chat.grounded_grammar` writes
(`start: "a" | b`), and EBNF as xgrammar and llama.cpp have it (`root ::= "a" | b`). They differ in the sign after a
rule's name, in `[...]` (optional in Lark, a character class in EBNF) and in regular expressions (Lark only).
Left out on purpose, with an error that says so: look-around and back-references, which are not regular, and Lark's %ignore.
"""

from __future__ import annotations

import json
import re

from ml_engineer_track.serving.grammar import Chars, Either, GrammarError, Node, Repeat, Rule, Seq, Text

DIGIT = ((48, 57),)
WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE = ((9, 13), (32, 32))
CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
ESCAPES = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0, "b": 8, "a": 7}
LAST = 0x10FFFF


def parse_regex(text: str) -> Node:
    """A regular expression that must match the whole reply; `^` and `$` around it change nothing."""
    if text.startswith("^"):
        text = text[1:]
    if text.endswith("$") and (len(text) - len(text[:-1].rstrip("\\"))) % 2 == 1:
        text = text[:-1]
    reader = _Reader(text, "regex")
    node = _alternatives(reader)
    if not reader.done():
        raise reader.error("unbalanced )")
    return node


def parse_grammar(text: str) -> dict[str, Node]:
    """Rules by name, the first being `root`, of a Lark or EBNF grammar."""
    ebnf = "::=" in re.sub(r'"(?:\\.|[^"\\])*"', "", text)
    rules: dict[str, Node] = {}
    for name, body in _split_rules(text, ebnf):
        if name in rules:
            raise GrammarError(f"rule {name!r} is defined twice")
        reader = _Reader(body, f"rule {name!r}")
        rules[name] = _alternatives_of_rule(reader, ebnf)
        if not reader.done():
            raise reader.error(f"unexpected {reader.peek()!r}")
    start = "root" if ebnf else "start"
    if start not in rules:
        raise GrammarError(f"the grammar has no rule {start!r}")
    if not ebnf and "root" in rules:
        rules = {("root_" if name == "root" else name): _renamed(node) for name, node in rules.items()}
    return {"root": rules.pop(start) if ebnf else Rule("start"), **rules}


class _Reader:
    """A text and a place in it."""

    def __init__(self, text: str, what: str) -> None:
        self.text, self.what, self.at = text, what, 0

    def done(self) -> bool:
        return self.at >= len(self.text)

    def peek(self, n: int = 1) -> str:
        return self.text[self.at : self.at + n]

    def take(self, n: int = 1) -> str:
        found = self.peek(n)
        if len(found) < n:
            raise self.error("ends too early")
        self.at += n
        return found

    def match(self, pattern: str) -> re.Match[str] | None:
        found = re.compile(pattern).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def error(self, why: str) -> GrammarError:
        return GrammarError(f"{self.what}, character {self.at + 1}: {why}")


# --- regular expressions ---------------------------------------------------------------------------------------------


def _alternatives(reader: _Reader) -> Node:
    options = [_sequence(reader)]
    while reader.peek() == "|":
        reader.take()
        options.append(_sequence(reader))
    return options[0] if len(options) == 1 else Either(tuple(options))


def _sequence(reader: _Reader) -> Node:
    parts: list[Node] = []
    while not reader.done() and reader.peek() not in "|)":
        parts.append(_quantified(reader, _atom(reader)))
    return parts[0] if len(parts) == 1 else Seq(tuple(parts))


def _quantified(reader: _Reader, node: Node) -> Node:
    counts = _counts(reader)
    if counts is None:
        return node
    reader.match(r"\?")  # lazy or greedy: the same replies
    if reader.peek() and reader.peek() in "*+":
        raise reader.error("multiple repetition")
    return Repeat(node, *counts)


def _counts(reader: _Reader) -> tuple[int, int | None] | None:
    if reader.peek() and reader.peek() in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[reader.take()]
    if found := reader.match(r"\{(\d{1,5})(,)?(\d{1,5})?\}"):
        least, comma, most = found.groups()
        return int(least), (int(most) if most else None) if comma else int(least)
    return None


def _atom(reader: _Reader) -> Node:
    character = reader.take()
    if character == "(":
        if reader.match(r"\?(?!:)"):
            raise reader.error("only plain and (?: ) groups are supported")
        reader.match(r"\?:")
        node = _alternatives(reader)
        if reader.peek() != ")":
            raise reader.error("missing )")
        reader.take()
        return node
    if character == "[":
        return _character_class(reader)
    if character == ".":
        return Chars(((10, 10),), negated=True)
    if character == "\\":
        return _escaped(reader)
    if character in "*+?":
        raise reader.error(f"nothing to repeat before {character!r}")
    if character in "^$":
        raise reader.error(f"{character!r} is supported only around the whole expression")
    return Text(character)


def _escaped(reader: _Reader) -> Node:
    character = reader.peek()
    if character and character in "dws":
        reader.take()
        return Chars(CLASSES[character])
    if character and character in "DWS":
        reader.take()
        return Chars(CLASSES[character.lower()], negated=True)
    if (character and character in "bBAZzG") or (character.isdigit() and character != "0"):
        raise reader.error(f"\\{character} is not supported")
    return Text(chr(_code(reader)))


def _code(reader: _Reader) -> int:
    """The code point of an escape, the backslash already taken."""
    if found := reader.match(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|u\{([0-9a-fA-F]{1,6})\}"):
        code = int(next(group for group in found.groups() if group), 16)
        if code > LAST or 0xD800 <= code <= 0xDFFF:
            raise reader.error("no such character")
        return code
    character = reader.take()
    if character in ESCAPES:
        return ESCAPES[character]
    if character.isalnum():
        raise reader.error(f"\\{character} is not supported")
    return ord(character)


def _character_class(reader: _Reader) -> Chars:
    """What follows `[`, up to its `]`."""
    negated = bool(reader.match(r"\^"))
    ranges: list[tuple[int, int]] = []
    while reader.peek() != "]" or (not ranges and reader.peek(2) != "]" and not reader.text[reader.at - 1 :].startswith("[]")):
        first = _member(reader)
        if isinstance(first, tuple):
            ranges.extend(first)
        elif reader.peek() == "-" and reader.peek(2) != "-]":
            reader.take()
            last = _member(reader)
            if isinstance(last, tuple) or last < first:
                raise reader.error("a range that runs backwards")
            ranges.append((first, last))
        else:
            ranges.append((first, first))
    reader.take()
    if not ranges and not negated:
        raise reader.error("an empty character class")
    return Chars(tuple(ranges), negated)


def _member(reader: _Reader) -> int | tuple[tuple[int, int], ...]:
    character = reader.take()
    if character != "\\":
        return ord(character)
    if reader.peek() and reader.peek() in "dws":
        return CLASSES[reader.take()]
    if reader.peek() and reader.peek() in "DWS":
        raise reader.error(f"\\{reader.peek()} inside [] is not supported")
    return _code(reader)


# --- grammars --------------------------------------------------------------------------------------------------------


def _split_rules(text: str, ebnf: bool) -> list[tuple[str, str]]:
    """Names and bodies. A body runs over following lines until the next rule begins; comments are dropped."""
    head = re.compile(r"\s*([A-Za-z_][\w-]*)\s*::=" if ebnf else r"\s*[?!]?([A-Za-z_]\w*)(?:\.-?\d+)?\s*:(?!:)")
    found: list[tuple[str, str]] = []
    for line in text.split("\n"):
        line = _without_comment(line, "#" if ebnf else "//")
        if not ebnf and line.lstrip().startswith("%"):
            raise GrammarError(f"{line.split()[0]} is not supported")
        match = head.match(line)
        if match:
            found.append((match[1], line[match.end() :]))
        elif line.strip():
            if not found:
                raise GrammarError(f"the grammar does not begin with a rule: {line.strip()[:60]!r}")
            found[-1] = (found[-1][0], found[-1][1] + "\n" + line)
    return found


def _without_comment(line: str, sign: str) -> str:
    """The line up to a comment sign outside quotes, classes and regular expressions."""
    parts = re.finditer(
        r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|' + (r"/(?!/)(?:\\.|[^/\\])+/|" if sign == "//" else "") + r".", line
    )
    return next((line[: part.start()] for part in parts if line.startswith(sign, part.start()) and part[0] == sign[0]), line)


def _alternatives_of_rule(reader: _Reader, ebnf: bool) -> Node:
    options = [_sequence_of_rule(reader, ebnf)]
    while reader.match(r"\s*\|"):
        options.append(_sequence_of_rule(reader, ebnf))
    reader.match(r"\s+")
    return options[0] if len(options) == 1 else Either(tuple(options))


def _sequence_of_rule(reader: _Reader, ebnf: bool) -> Node:
    parts: list[Node] = []
    while True:
        reader.match(r"\s+")
        if reader.done() or reader.peek() in "|)" or (not ebnf and reader.peek() == "]"):
            return parts[0] if len(parts) == 1 else Seq(tuple(parts))
        node = _part_of_rule(reader, ebnf)
        counts = _counts(reader)
        parts.append(node if counts is None else Repeat(node, *counts))


def _part_of_rule(reader: _Reader, ebnf: bool) -> Node:
    if found := reader.match(r'"((?:\\.|[^"\\])*)"'):
        return Text(_unquoted(found[1], reader))
    if found := reader.match(r"[A-Za-z_][\w-]*" if ebnf else r"[A-Za-z_]\w*"):
        return Rule(found[0])
    character = reader.take()
    if character == "(":
        node = _alternatives_of_rule(reader, ebnf)
        if reader.take() != ")":
            raise reader.error("missing )")
        return node
    if character == "[" and ebnf:
        return _character_class(reader)
    if character == "[":
        node = _alternatives_of_rule(reader, ebnf)
        if reader.take() != "]":
            raise reader.error("missing ]")
        return Repeat(node, 0, 1)
    if character == "/" and not ebnf and (found := reader.match(r"((?:\\.|[^/\\])+)/")):
        if reader.match(r"[imslux]"):
            raise reader.error("flags after a regular expression are not supported")
        return parse_regex(found[1].replace("\\/", "/"))
    raise reader.error(f"unexpected {character!r}")


def _unquoted(inside: str, reader: _Reader) -> str:
    try:
        return str(json.loads(f'"{inside}"', strict=False))
    except json.JSONDecodeError:
        part = _Reader(inside, reader.what)
        out = []
        while not part.done():
            character = part.take()
            out.append(chr(_code(part)) if character == "\\" else character)
        return "".join(out)


def _renamed(node: Node) -> Node:
    """The same with the rule `root` called `root_`, a name the tree keeps for its start."""
    if isinstance(node, Rule):
        return Rule("root_") if node.name == "root" else node
    if isinstance(node, Seq):
        return Seq(tuple(map(_renamed, node.parts)))
    if isinstance(node, Either):
        return Either(tuple(map(_renamed, node.options)))
    return Repeat(_renamed(node.part), node.least, node.most) if isinstance(node, Repeat) else node
