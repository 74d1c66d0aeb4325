"""YAML 1.2 scalars in and out, and the two kinds of value that only a command line makes."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and a key that is given twice is refused (PyYAML would keep the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Keep every implicit type of YAML 1.1 except its many booleans, its exponents that need a dot, base 60 and dates.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":", 1)[1] in ("null", "merge", "value")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


class Text(str):
    """A value as typed on the command line; what it means depends on the type of its key."""

    __slots__ = ()

    def parse(self) -> Any:
        try:
            return yaml.load(self, Loader=Loader)
        except yaml.YAMLError:
            return str(self)


class Patch(dict):
    """A mapping that came from dotted keys: it changes single entries of what is below, rather than replacing it."""


class Dumper(yaml.SafeDumper):
    pass


def float_text(x: float) -> str:
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(x), repr(x))


Dumper.add_representer(float, lambda dumper, x: dumper.represent_scalar("tag:yaml.org,2002:float", float_text(x)))
