"""JSON Schema as a grammar of *compact* JSON: no free whitespace, keys in the order of the schema.

Free whitespace is where a weak model wanders for ever, and one fixed spelling is what the models of this repository are
trained on (`shared.chat.to_json`). The dialect is what pydantic writes for ordinary models; a keyword that cannot be held
to is refused by name, because a constraint that silently does not constrain is worse than an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_engineer_track.serving.grammar import MAX_REPEAT, Chars, Either, GrammarError, Node, Repeat, Rule, Seq, Text
from ml_engineer_track.serving.grammar_text import parse_regex

ANNOTATIONS = {
    "title", "description", "default", "examples", "example", "format", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$schema", "$id", "$comment", "$defs", "definitions",
}  # fmt: skip
KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}  # fmt: skip
#: An integer between two bounds is written out value by value, up to this many.
MAX_ENUMERATED = 1000

PLAIN = Chars(((0, 31), (34, 34), (92, 92)), negated=True)  # what stands in a JSON string as it is
# Text can be written with these and what stands for itself. `\u` and four digits are left out: a model has no need of them, and
# with them xgrammar took 3 ms a token of free text for each request in the batch (without: too little to measure).
CHARACTER = Either((PLAIN, Seq((Text("\\"), Chars(tuple((ord(c), ord(c)) for c in '"\\/bfnrt'))))))
DIGITS = Chars(((48, 57),))
NATURAL = Either((Text("0"), Seq((Chars(((49, 57),)), Repeat(DIGITS, 0, 15)))))
FRACTION = Repeat(Seq((Text("."), Repeat(DIGITS, 1, 16))), 0, 1)
EXPONENT = Repeat(Seq((Chars(((69, 69), (101, 101))), Repeat(Chars(((43, 43), (45, 45))), 0, 1), Repeat(DIGITS, 1, 3))), 0, 1)
MINUS = Repeat(Text("-"), 0, 1)
STRING = Seq((Text('"'), Repeat(Rule("character"), 0, None), Text('"')))
BASIC: dict[str, Node] = {
    "character": CHARACTER,
    "string": STRING,
    "value": Either(
        (Rule("object"), Rule("array"), Rule("string"), Seq((MINUS, NATURAL, FRACTION, EXPONENT)),
         Text("true"), Text("false"), Text("null"))
    ),
    "member": Seq((Rule("string"), Text(":"), Rule("value"))),
    "object": Seq((Text("{"), Repeat(Seq((Rule("member"), Repeat(Seq((Text(","), Rule("member"))), 0, None))), 0, 1), Text("}"))),
    "array": Seq((Text("["), Repeat(Seq((Rule("value"), Repeat(Seq((Text(","), Rule("value"))), 0, None))), 0, 1), Text("]"))),
}  # fmt: skip


def any_object() -> dict[str, Node]:
    """Any JSON object (OpenAI's json_object)."""
    return {"root": Rule("object"), **BASIC}


def schema_rules(schema: Any) -> dict[str, Node]:
    """The rules of a JSON schema, `root` first. GrammarError for what is malformed or cannot be held to."""
    compiler = _Compiler(schema)
    root = compiler.node(schema)
    rules = {"root": root, **compiler.rules}
    return {"root": root, **{name: rules[name] for name in _reachable(rules)}}


class _Compiler:
    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.rules: dict[str, Node] = dict(BASIC)
        self.refs: dict[str, str] = {}

    def node(self, schema: Any) -> Node:
        if schema is True or schema == {}:
            return Rule("value")
        if not isinstance(schema, Mapping):
            raise GrammarError(f"a JSON schema must be an object, not {json.dumps(schema)[:60]}")
        keys = set(schema) - ANNOTATIONS
        for keyword, build in (
            ("$ref", self.reference), ("enum", self.enum), ("const", lambda value: self.enum([value])),
            ("anyOf", self.either), ("oneOf", self.either), ("allOf", self.all_of),
        ):  # fmt: skip
            if keyword in keys:
                self.refuse(keys - {keyword, "type"}, f"beside {keyword}")
                return build(schema[keyword])
        kind = schema.get("type", "object" if "properties" in keys else None)
        if kind is None:
            self.refuse(keys, "without a type")
            return Rule("value")
        if isinstance(kind, list):
            return self.either([{**{k: v for k, v in schema.items() if k in KEYWORDS.get(one, ())}, "type": one} for one in kind])
        if kind not in KEYWORDS:
            raise GrammarError(f"unknown type {json.dumps(kind)}")
        self.refuse(keys - {"type"} - KEYWORDS[kind], f"of type {kind}")
        if kind in ("boolean", "null"):
            return Either((Text("true"), Text("false"))) if kind == "boolean" else Text("null")
        of_kind = {"object": self.object, "array": self.array, "string": self.string, "integer": self.integer,
                   "number": self.number}  # fmt: skip
        return of_kind[kind](schema)

    @staticmethod
    def refuse(keys: set[str], where: str) -> None:
        if keys:
            raise GrammarError(f"JSON schema: keyword {min(keys)!r} {where} is not supported")

    def reference(self, path: Any) -> Node:
        if not isinstance(path, str) or not path.startswith("#"):
            raise GrammarError(f"JSON schema: $ref {path!r} does not point into the schema")
        if path not in self.refs:
            target = self.schema
            for part in path[1:].strip("/").split("/") if path != "#" else ():
                key = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, Mapping) or key not in target:
                    raise GrammarError(f"JSON schema: $ref {path!r} points to nothing")
                target = target[key]
            self.refs[path] = name = f"ref{len(self.refs)}"
            self.rules[name] = self.node(target)
        return Rule(self.refs[path])

    def enum(self, values: Any) -> Node:
        if not isinstance(values, list) or not values:
            raise GrammarError("JSON schema: enum must be a list that is not empty")
        texts = dict.fromkeys(_compact(value) for value in values)
        return Either(tuple(Text(text) for text in texts))

    def either(self, options: Any) -> Node:
        if not isinstance(options, list) or not options:
            raise GrammarError("JSON schema: anyOf, oneOf and a list of types need at least one entry")
        return Either(tuple(self.node(option) for option in options))

    def all_of(self, parts: Any) -> Node:
        if not isinstance(parts, list) or len(parts) != 1:
            raise GrammarError("JSON schema: allOf of several parts is not supported")
        return self.node(parts[0])

    def object(self, schema: Mapping[str, Any]) -> Node:
        """Declared properties in their order; keys nobody declared only where nothing is declared."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise GrammarError("JSON schema: properties must be an object and required a list")
        members = {**properties, **{key: True for key in required if isinstance(key, str) and key not in properties}}
        if not members:
            others = schema.get("additionalProperties", True)
            if others is False:
                return Text("{}")
            member = Seq((Rule("string"), Text(":"), self.node(others)))
            return Seq((Text("{"), Repeat(Seq((member, Repeat(Seq((Text(","), member)), 0, None))), 0, 1), Text("}")))
        written = [(Seq((Text(_compact(key) + ":"), self.node(value))), key in required) for key, value in members.items()]
        return Seq((Text("{"), self.members(written), Text("}")))

    def members(self, written: Sequence[tuple[Node, bool]]) -> Node:
        """Members in order with commas between them. `rest[first]` is what may follow, nothing or something before it."""
        rest: dict[bool, Node] = {True: Text(""), False: Text("")}
        for member, needed in reversed(written):
            following: dict[bool, Node] = {}
            for first in (True, False):
                taken = Seq((member if first else Seq((Text(","), member)), rest[False]))
                following[first] = taken if needed else Either((taken, rest[first]))
            rest = {first: self.rule(node) if not needed else node for first, node in following.items()}
        return rest[True]

    def rule(self, node: Node) -> Node:
        name = f"part{len(self.rules)}"
        self.rules[name] = node
        return Rule(name)

    def array(self, schema: Mapping[str, Any]) -> Node:
        first = [self.node(item) for item in schema.get("prefixItems", [])]
        least, most = _count(schema, "minItems", 0), _count(schema, "maxItems", None)
        if first:
            if ("items" in schema and schema["items"] is not False) or len(first) != (most or len(first)):
                raise GrammarError("JSON schema: items beside prefixItems is not supported")
            return Seq((Text("["), *_separated(first), Text("]")))
        item = self.node(schema.get("items", True))
        if most == 0:
            return Text("[]")
        more = Repeat(Seq((Text(","), item)), max((least or 0) - 1, 0), None if most is None else most - 1)
        some = Seq((item, more))
        return Seq((Text("["), some if least else Repeat(some, 0, 1), Text("]")))

    def string(self, schema: Mapping[str, Any]) -> Node:
        least, most = _count(schema, "minLength", 0), _count(schema, "maxLength", None)
        if "pattern" in schema:
            if least or most is not None:
                raise GrammarError("JSON schema: pattern beside minLength or maxLength is not supported")
            return self.pattern(schema["pattern"])
        if not least and most is None:
            return Rule("string")
        return Seq((Text('"'), Repeat(Rule("character"), least or 0, most), Text('"')))

    def pattern(self, pattern: Any) -> Node:
        """A pattern is a search unless it is anchored; characters JSON must escape are left out of its classes."""
        if not isinstance(pattern, str):
            raise GrammarError("JSON schema: pattern must be a text")
        anything: Node = Repeat(Rule("character"), 0, None)
        before, after = ([] if pattern.startswith("^") else [anything]), ([] if pattern.endswith("$") else [anything])
        return Seq((Text('"'), *before, _inside_string(parse_regex(pattern)), *after, Text('"')))

    def integer(self, schema: Mapping[str, Any]) -> Node:
        least, most = _bound(schema, "minimum", "exclusiveMinimum", 1), _bound(schema, "maximum", "exclusiveMaximum", -1)
        if least is not None and most is not None:
            if most < least or most - least >= MAX_ENUMERATED:
                raise GrammarError(
                    f"JSON schema: integers from {least} to {most}: at least one and at most {MAX_ENUMERATED} values"
                )
            return Either(tuple(Text(str(n)) for n in range(int(least), int(most) + 1)))
        if most is not None or least not in (None, 0, 1):
            raise GrammarError("JSON schema: an integer may have both bounds, or a minimum of 0 or 1")
        if least == 1:
            return Seq((Chars(((49, 57),)), Repeat(DIGITS, 0, 15)))
        return NATURAL if least == 0 else Seq((MINUS, NATURAL))

    def number(self, schema: Mapping[str, Any]) -> Node:
        if set(schema) & {"maximum", "exclusiveMaximum", "exclusiveMinimum"} or schema.get("minimum", 0) != 0:
            raise GrammarError("JSON schema: a number may only have a minimum of 0")
        return Seq((*(() if "minimum" in schema else (MINUS,)), NATURAL, FRACTION, EXPONENT))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _separated(items: Sequence[Node]) -> list[Node]:
    return [part for number, item in enumerate(items) for part in ((Text(","), item) if number else (item,))]


def _count(schema: Mapping[str, Any], key: str, default: int | None) -> int | None:
    if key not in schema:
        return default
    value = schema[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
        raise GrammarError(f"JSON schema: {key} must be a whole number from 0 to {MAX_REPEAT}")
    return int(value)


def _bound(schema: Mapping[str, Any], key: str, exclusive: str, step: int) -> int | None:
    for name, add in ((key, 0), (exclusive, step)):
        if name in schema:
            value = schema[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
                raise GrammarError(f"JSON schema: {name} of an integer must be a whole number")
            return int(value) + add
    return None


def _inside_string(node: Node) -> Node:
    """The node as it stands inside a JSON string."""
    if isinstance(node, Text):
        return Text(_compact(node.value)[1:-1])
    if isinstance(node, Chars):
        return Chars((*node.ranges, *PLAIN.ranges), negated=True) if node.negated else Chars(_without_special(node.ranges))
    if isinstance(node, Seq):
        return Seq(tuple(map(_inside_string, node.parts)))
    if isinstance(node, Either):
        return Either(tuple(map(_inside_string, node.options)))
    return Repeat(_inside_string(node.part), node.least, node.most) if isinstance(node, Repeat) else node


def _without_special(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    kept = list(ranges)
    for low, high in PLAIN.ranges:
        kept = [piece for a, b in kept for piece in ((a, min(b, low - 1)), (max(a, high + 1), b)) if piece[0] <= piece[1]]
    return tuple(kept)


def _reachable(rules: Mapping[str, Node]) -> list[str]:
    from ml_engineer_track.serving.grammar import walk

    found, stack = [], ["root"]
    while stack:
        for node in walk(rules[stack.pop()]):
            if isinstance(node, Rule) and node.name not in found and node.name in rules:
                found.append(node.name)
                stack.append(node.name)
    return found
