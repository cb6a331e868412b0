"""What a reply may look like: one small grammar tree, written out for each engine's own dialect.

Why an ML engineer owns this: a small model writes valid JSON, a legal choice or an honest quotation only if nothing else can
be decoded, and every engine wants that said differently. Requests come as vLLM's `structured_outputs` (json, choice,
regex, grammar) or OpenAI's `response_format`; all become the tree below, which is checked once and then written as EBNF
(xgrammar, inside openvino-genai) and as Lark (llguidance, in this process). What the tree cannot say is refused with the
reason: an engine that meets a bad grammar in the middle of a batch takes the whole batch down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MAX_NODES = 20_000
MAX_REPEAT = 2_000
#: characters a grammar stands for when all its counted repetitions are written out, which is what the engines do
MAX_UNROLLED = 500_000
MAX_CHARACTERS = 200_000


class GrammarError(ValueError):
    """A constraint nobody can decode under; the message says why."""


@dataclass(frozen=True)
class Text:
    value: str


@dataclass(frozen=True)
class Chars:
    """One character inside (or, negated, outside) closed ranges of code points."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True)
class Seq:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    part: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Rule:
    name: str


Node = Text | Chars | Seq | Either | Repeat | Rule


@dataclass(frozen=True)
class Constraint:
    """A checked constraint. `literal`: every terminal is a fixed text, so most of a reply follows from the text before it."""

    ebnf: str
    lark: str
    literal: bool
    choices: tuple[str, ...] = field(default=())


def constraint(structured: Mapping[str, Any]) -> Constraint:
    """The constraint of one of {json: schema | choice: [...] | regex: ... | grammar: ... | json_object: true}.

    GrammarError when it is none of these, malformed, or more than the engines can decode under.
    """
    given = {key: value for key, value in structured.items() if value not in (None, False)}
    if len(given) != 1:
        raise GrammarError(f"exactly one of json, choice, regex, grammar, json_object is needed, not {sorted(given) or 'none'}")
    kind, value = next(iter(given.items()))
    try:
        text = json.dumps(value)  # no sorted keys: a schema's order is the order of the reply's keys
    except (TypeError, ValueError):
        raise GrammarError(f"{kind} is not JSON") from None
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(f"{kind} has {len(text):,} characters, at most {MAX_CHARACTERS:,}")
    return _constraint(kind, text)


@lru_cache(maxsize=256)
def _constraint(kind: str, text: str) -> Constraint:
    from ml_engineer_track.serving.grammar_json import any_object, schema_rules
    from ml_engineer_track.serving.grammar_text import parse_grammar, parse_regex

    value = json.loads(text)
    choices: tuple[str, ...] = ()
    try:
        if kind == "choice":
            if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
                raise GrammarError("choice must be a list of texts, none of them empty")
            choices = tuple(dict.fromkeys(value))
            rules: dict[str, Node] = {"root": Either(tuple(Text(c) for c in choices))}
        elif kind == "regex":
            rules = {"root": parse_regex(_as_text(kind, value))}
        elif kind == "grammar":
            rules = parse_grammar(_as_text(kind, value))
        elif kind == "json":
            rules = schema_rules(json.loads(value) if isinstance(value, str) else value)
        elif kind == "json_object":
            rules = any_object()
        else:
            raise GrammarError(f"unknown kind of constraint {kind!r}: json, choice, regex, grammar or json_object")
        check(rules)
        literal = not any(isinstance(node, Chars) for rule in rules.values() for node in walk(rule))
        return Constraint(ebnf=to_ebnf(rules), lark=to_lark(rules), literal=literal, choices=choices)
    except json.JSONDecodeError as error:
        raise GrammarError(f"json is not valid JSON: {error}") from None
    except RecursionError:
        raise GrammarError(f"{kind} is nested too deeply") from None


def _as_text(kind: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise GrammarError(f"{kind} must be a text that is not empty")
    return value


# --- checks ----------------------------------------------------------------------------------------------------------


def check(rules: Mapping[str, Node]) -> None:
    """GrammarError for unknown rules, left recursion, endless loops, rules that never end, half characters, and grammars that
    are too large. Takes time linear in the grammar: it runs while other requests wait."""
    nodes = [node for rule in rules.values() for node in walk(rule)]
    if len(nodes) > MAX_NODES:
        raise GrammarError(f"the grammar has {len(nodes):,} parts, at most {MAX_NODES:,}")
    for node in nodes:
        if isinstance(node, Rule) and node.name not in rules:
            raise GrammarError(f"rule {node.name!r} is used but not defined")
        if isinstance(node, Repeat) and max(node.least, node.most or 0) > MAX_REPEAT:
            raise GrammarError(f"something repeats more than {MAX_REPEAT:,} times")
        if isinstance(node, Repeat) and node.most is not None and node.most < node.least:
            raise GrammarError(f"a repetition of at least {node.least} and at most {node.most}")
        if isinstance(node, Chars) and not node.negated and not node.ranges:
            raise GrammarError("a character class matches nothing")
        if isinstance(node, Text) and any("\ud800" <= c <= "\udfff" for c in node.value):
            raise GrammarError("half of a surrogate pair is no character")
    empty = _fixpoint(rules, _may_be_empty)
    for node in nodes:
        if isinstance(node, Repeat) and node.most is None and _may_be_empty(node.part, empty):
            raise GrammarError("something that may be empty repeats without end")
    if dead := set(rules) - _fixpoint(rules, _ends):
        raise GrammarError(f"rule {min(dead)!r} never comes to an end")
    _refuse_left_recursion(rules, empty)
    if _unrolled(rules) > MAX_UNROLLED:
        raise GrammarError(f"its repetitions written out are more than {MAX_UNROLLED:,} characters")


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it; rules are not followed."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(_below(node))


def _below(node: Node) -> Sequence[Node]:
    if isinstance(node, Seq):
        return node.parts
    if isinstance(node, Either):
        return node.options
    return (node.part,) if isinstance(node, Repeat) else ()


def _fixpoint(rules: Mapping[str, Node], holds: Any) -> set[str]:
    """The rules `holds` is true of, given those it is true of. A rule is looked at again when one it uses was found."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, rule in rules.items():
        for used in {node.name for node in walk(rule) if isinstance(node, Rule)}:
            users[used].append(name)
    found: set[str] = set()
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name not in found and holds(rules[name], found):
            found.add(name)
            waiting.extend(users[name])
    return found


def _may_be_empty(node: Node, rules: set[str]) -> bool:
    if isinstance(node, Text):
        return not node.value
    if isinstance(node, Rule):
        return node.name in rules
    if isinstance(node, Repeat):
        return node.least == 0 or _may_be_empty(node.part, rules)
    if isinstance(node, Seq):
        return all(_may_be_empty(part, rules) for part in node.parts)
    return isinstance(node, Either) and any(_may_be_empty(option, rules) for option in node.options)


def _ends(node: Node, rules: set[str]) -> bool:
    if isinstance(node, Rule):
        return node.name in rules
    if isinstance(node, Repeat):
        return node.least == 0 or _ends(node.part, rules)
    if isinstance(node, Seq):
        return all(_ends(part, rules) for part in node.parts)
    return any(_ends(option, rules) for option in node.options) if isinstance(node, Either) else True


def _refuse_left_recursion(rules: Mapping[str, Node], empty: set[str]) -> None:
    """Depth first over "may begin with", every rule once; a rule met while it is being looked at begins with itself."""
    done: set[str] = set()
    for start in rules:
        path: dict[str, Iterator[str]] = {}  # rules being looked at, outermost first, each with what it may begin with
        if start not in done:
            path[start] = _first_rules(rules[start], empty)
        while path:
            name = next(reversed(path))
            begins = next(path[name], None)
            if begins is None:
                done.add(name)
                del path[name]
            elif begins in path:
                raise GrammarError(f"rule {begins!r} is left-recursive: write it as a repetition")
            elif begins not in done:
                path[begins] = _first_rules(rules[begins], empty)


def _first_rules(node: Node, empty: set[str]) -> Iterator[str]:
    """Names of the rules a node may begin with."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Rule):
            yield node.name
        elif isinstance(node, Seq):
            for part in node.parts:
                stack.append(part)
                if not _may_be_empty(part, empty):
                    break
        else:
            stack.extend(_below(node))


def _unrolled(rules: Mapping[str, Node]) -> int:
    """Characters of all rules with every counted repetition written out; a rule that is used counts once where it stands."""

    def size(node: Node) -> int:
        if isinstance(node, Text):
            return len(node.value)
        inside = sum(map(size, _below(node))) or 1
        return inside * max(1, node.least, node.most or 0) if isinstance(node, Repeat) else inside

    return sum(map(size, rules.values()))


# --- the two dialects ------------------------------------------------------------------------------------------------


def to_ebnf(rules: Mapping[str, Node]) -> str:
    """The dialect of xgrammar (and llama.cpp's GBNF): `root ::= ...`."""
    names = _names(rules, "root")

    def write(node: Node) -> str:
        if isinstance(node, Text):
            return '"' + "".join(_escape(ord(c), '"\\') for c in node.value) + '"'
        if isinstance(node, Chars):
            inside = "".join(_span(a, b, _escape_in_class) for a, b in node.ranges)
            return f"[{'^' if node.negated else ''}{inside}]"
        return _write_rest(node, names, write)

    return "\n".join(f"{names[name]} ::= {write(node)}" for name, node in rules.items()) + "\n"


def to_lark(rules: Mapping[str, Node]) -> str:
    """The dialect of llguidance: `start: ...`.

    Its lexer takes the longest match, so a grammar split into many small terminals would refuse legal texts. Everything that
    is regular is therefore written as one regular expression; only recursive rules stay rules.
    """
    names = _names(rules, "start")
    expressions: dict[str, str | None] = {}

    def expression(node: Node, inside: frozenset[str]) -> str | None:
        """The node as a regular expression; None when it is recursive or would become too long."""
        if isinstance(node, Text):
            return "".join(map(_regex_character, node.value))
        if isinstance(node, Chars):
            ranges = "".join(_span(a, b, lambda code: f"\\u{{{code:X}}}") for a, b in node.ranges)
            return f"[{'^' if node.negated else ''}{ranges}]" if ranges else "(?s:.)"
        if isinstance(node, Rule):
            if node.name in inside:
                return None
            if node.name not in expressions:
                expressions[node.name] = expression(rules[node.name], inside | {node.name})
            return expressions[node.name]
        parts = [expression(part, inside) for part in _below(node)]
        if any(part is None for part in parts) or sum(len(part or "") for part in parts) > MAX_CHARACTERS:
            return None
        if isinstance(node, Seq):
            return "".join(f"(?:{part})" for part in parts)
        if isinstance(node, Either):
            return "|".join(f"(?:{part})" for part in parts)
        assert isinstance(node, Repeat)
        return f"(?:{parts[0]}){{{node.least},{'' if node.most is None else node.most}}}"

    def write(node: Node) -> str:
        regular = expression(node, frozenset())
        if regular is not None:
            return f"/{regular}/" if regular else '""'
        return _write_rest(node, names, write)

    written = {name: write(node) for name, node in rules.items() if name == "root" or expression(node, frozenset({name})) is None}
    return "\n".join(f"{names[name]}: {text}" for name, text in written.items()) + "\n"


def _regex_character(character: str) -> str:
    return character if character.isalnum() or character == " " else f"\\u{{{ord(character):X}}}"


def _write_rest(node: Node, names: Mapping[str, str], write: Any) -> str:
    if isinstance(node, Rule):
        return names[node.name]
    if isinstance(node, Seq):
        return "(" + " ".join(write(part) for part in node.parts) + ")" if node.parts else '""'
    if isinstance(node, Either):
        return "(" + " | ".join(write(option) for option in node.options) + ")"
    assert isinstance(node, Repeat)
    part = write(node.part)
    if node.most is None:
        return f"({part})" + {0: "*", 1: "+"}.get(node.least, f"{{{node.least},}}")
    return f"({part}){{{node.least},{node.most}}}"


def _names(rules: Mapping[str, Node], first: str) -> dict[str, str]:
    return {name: first if name == "root" else f"r{number}" for number, name in enumerate(rules)}


def _span(first: int, last: int, escape: Any) -> str:
    return str(escape(first)) if first == last else f"{escape(first)}-{escape(last)}"


def _escape_in_class(code: int) -> str:
    return _escape(code, '"\\]-^[')


def _escape(code: int, special: str) -> str:
    character = chr(code)
    if character in special:
        return "\\" + character
    if 32 <= code < 127:
        return character
    named = {10: "\\n", 13: "\\r", 9: "\\t"}
    return named.get(code) or (f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}")
