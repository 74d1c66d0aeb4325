"""From a model's text to a checked value, or to a reason why there is none. Nothing is ever guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from robot_rl.rewards.vlm.questions import Question

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\r?\n(.*?)```", re.S)
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
}  # fmt: skip
LONGEST = 200_000


def parse(question: Question, text: str, finish: str = "stop") -> tuple[Any, str, str]:
    """(value, reason, rung): JSON of the whole text, of the first fenced block, of the first balanced bracket, or a lone word.

    A reply that was cut off (``finish`` is ``length``) is invalid whatever it holds.
    """
    if finish == "length" or len(text) > LONGEST:
        return None, "parse", ""
    if not question.schema:
        word = _last_word(question.words, text)
        return (word, "", "word") if word else (None, "parse", "")
    found, value, rung = _ladder(text)
    if not found:
        label = question.schema.get("properties", {}).get("label", {})
        word = _last_word(tuple(str(v) for v in label.get("enum", ())), text)
        if not word:
            return None, "parse", ""
        return {"analysis": text, "label": int(word)}, "", "word"
    if fits(value, question.schema):
        return None, "schema", rung
    reason = question.check(value) if question.check else ""
    return (None, reason, rung) if reason else (value, "", rung)


def _ladder(text: str) -> tuple[bool, Any, str]:
    stripped = text.strip()
    found, value = _load(stripped)
    if found:
        return True, value, "json"
    fence = _FENCE.search(text)
    if fence:
        found, value = _load(fence.group(1).strip())
        if found:
            return True, value, "fenced"
    piece = _balanced(text)
    if piece is not None:
        found, value = _load(piece)
        if found:
            return True, value, "embedded"
    return False, None, ""


def _load(text: str) -> tuple[bool, Any]:
    """Strict JSON: no repeated keys, no NaN, and an object or a list."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    def refuse(token: str) -> Any:
        raise ValueError(token)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None
    return isinstance(value, (dict, list)), value


def _balanced(text: str) -> str | None:
    """The first bracketed piece whose brackets close, strings respected."""
    start = next((i for i, c in enumerate(text) if c in "{["), None)
    if start is None:
        return None
    stack: list[str] = []
    inside = escaped = False
    for i in range(start, len(text)):
        c = text[i]
        if inside:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                inside = False
        elif c == '"':
            inside = True
        elif c in "{[":
            stack.append("}" if c == "{" else "]")
        elif c in "}]":
            if not stack or stack.pop() != c:
                return None
            if not stack:
                return text[start : i + 1]
    return None


def _last_word(words: tuple[str, ...], text: str) -> str:
    """The last whole-word token of the allowed set; nothing where brackets promise JSON that did not come."""
    if not words or any(c in text for c in "{}[]"):
        return ""
    choices = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    found = re.findall(rf"(?<![\w.+-])({choices})(?![\w%]|\.\d)", text)
    return str(found[-1]) if found else ""


def fits(value: Any, schema: Mapping[str, Any], where: str = "answer") -> str:
    """An empty string, or where and how a value breaks the schema (the subset this package's questions use)."""
    kind = schema.get("type")
    if kind is not None:
        accepted = _TYPES[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            return f"{where} is no {kind}"
    if "enum" in schema and (value not in schema["enum"] or isinstance(value, bool)):
        return f"{where}={value!r}: accepted are {schema['enum']}"
    if "minimum" in schema and not value >= schema["minimum"]:
        return f"{where}={value}: below {schema['minimum']}"
    if "maximum" in schema and not value <= schema["maximum"]:
        return f"{where}={value}: above {schema['maximum']}"
    if kind == "object":
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where}.{name} is missing"
        for name, item in value.items():
            if name not in known:
                if schema.get("additionalProperties", True) is False:
                    return f"{where}.{name} is unknown"
            elif problem := fits(item, known[name], f"{where}.{name}"):
                return problem
    if kind == "array":
        for i, item in enumerate(value):
            if problem := fits(item, schema.get("items", {}), f"{where}[{i}]"):
                return problem
    return ""
