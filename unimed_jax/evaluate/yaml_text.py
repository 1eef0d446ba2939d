"""YAML as strict as JSON: names once, keys are texts, and no word silently becomes a truth value or a date."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from unimed_jax.errors import UsageError

_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """Plain data only; refuses what would be read as something else than it says."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse(self.peek_event().start_mark, "an alias (*name)", "write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._refuse(key.start_mark, "a key that is no text", "write one word or a quoted text")
            if key.value in found:
                self._refuse(key.start_mark, f"{key.value!r} a second time", "name it once")
            found[key.value] = self.construct_object(value, deep=True)
        return found

    def construct_yaml_map(self, node: MappingNode) -> Any:
        yield self.construct_mapping(node)

    def construct_yaml_bool(self, node: ScalarNode) -> bool:
        if node.value.lower() not in ("true", "false"):
            self._refuse(
                node.start_mark,
                f"{node.value}, which YAML takes for a truth value",
                f'write "{node.value}" in quotes, or true or false',
            )
        return node.value.lower() == "true"

    def _refuse(self, mark: yaml.Mark, what: str, remedy: str) -> None:
        raise UsageError(f"{mark.name} line {mark.line + 1} has {what}", remedy)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor(_BOOL, _Loader.construct_yaml_bool)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(data: bytes, name: str) -> Any:
    r"""The content of a YAML text as dicts, lists, texts, numbers and truth values.

    Args:
        data: the file.
        name: what messages call it.

    Raises:
        UsageError: for a text that is no YAML, names repeated, aliases, tags of objects, and words such as `no` or
            `off` without quotes where a value stands, with the line.

    Example:
        >>> parse(b"classes: [benign, malignant]\nlabels: {0: benign, 1: malignant}", "mine.yaml")
        {'classes': ['benign', 'malignant'], 'labels': {'0': 'benign', '1': 'malignant'}}
    """
    try:
        text = data.decode("utf-8-sig")
        loader = _Loader(text)
        loader.name = name
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{where} is no YAML text: {e.problem or e.context}") from e
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise UsageError(f"{name} is no YAML text ({type(e).__name__})") from e
