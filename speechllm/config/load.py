"""Reads a configuration from YAML, strictly: no tags, no repeated keys, no guessing."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from speechllm import folders
from speechllm.config.schema import Config
from speechllm.errors import ConfigError
from speechllm.runtime import write_text

if TYPE_CHECKING:
    from pathlib import Path

MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 50  # of lists and mappings in each other: PyYAML's scanner takes time in the square of it
EXTENDS = "extends"
PLAIN_NAME = re.compile(r"[\w-]+\.yaml")
NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
REFUSED = {yaml.AliasToken: "aliases are", yaml.TagToken: "tags are"}
OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, made to refuse what it would take in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a mapping; a repeated key names its line, and `line_of` remembers where each key stands."""
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"{loader.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise ConfigError(where, f"the key {key!r} is not text", "put it in quotes")
        if key in built:
            raise ConfigError(where, f"{key} stands here twice", "delete one of the two")
        built[key] = loader.construct_object(value_node, deep=True)
    return built


def _str(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Build a text; escapes write what no file of UTF-8 and no path holds."""
    text = str(loader.construct_scalar(node))
    if NO_TEXT.search(text):
        where = f"{loader.name}:{node.start_mark.line + 1}"
        raise ConfigError(where, f"{json.dumps(text[:80])} holds NUL or half a character", "write whole characters")
    return text


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 takes 010 for 8 and 1:30 for 90
    return int(loader.construct_scalar(node).replace("_", ""))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _str)
# YAML 1.1 reads `no` as false: as in YAML 1.2, only these are truth values
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:bool"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
# YAML 1.1 reads 1e-4 as text: YAML 1.2's number forms are added in front
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of ours.

    Raises:
        ConfigError: missing, too large, not UTF-8, not YAML, with aliases, tags or a repeated key.
    """
    if not path.is_file():
        raise ConfigError(path, "no such configuration file", "see conf/ for the ones there are")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(path, "is larger than 1 MiB", "give a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 (byte {error.start + 1})", "save it as UTF-8") from error
    return _parse(text, str(path))


def _parse(text: str, name: str) -> Any:
    """Return what a YAML text says; messages call it `name`."""
    depth = 0
    try:
        for token in yaml.scan(text):
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > MAX_DEPTH:
                where = f"{name}:{token.start_mark.line + 1}"
                raise ConfigError(where, f"is nested more than {MAX_DEPTH} deep", "give a configuration")
            if type(token) in REFUSED:
                where = f"{name}:{token.start_mark.line + 1}"
                raise ConfigError(where, f"{REFUSED[type(token)]} not read", "write the value out")
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}", f"is not YAML ({error.problem})", "mend it") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(name, f"is not YAML ({error})", "mend it") from error


def load(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Return the configuration in `path`, changed by ``key.key=value`` overrides.

    With ``extends: NAME.yaml`` it says only what differs from that file beside it.

    Raises:
        ConfigError: an unknown key (the nearest right one is named), a wrong type or range.
    """
    content = _read_whole(path)
    for override in overrides:
        _apply(content, override)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise _explain(path, error) from error


def _read_whole(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a file laid over those that it extends."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(path, "holds no mapping", "see conf/ for examples")
    base = content.pop(EXTENDS, None)
    if base is None:
        return content
    if not isinstance(base, str) or PLAIN_NAME.fullmatch(base) is None:
        raise ConfigError(path, f"extends {base!r}, which names no file beside it", "write extends: NAME.yaml")
    if path in extended_by:
        raise ConfigError(path, "extends itself", "take out one extends")
    return _laid_over(_read_whole(path.parent / base, (*extended_by, path)), content)


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`, mapping by mapping; one of another `kind` takes the place of the old."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _laid_over(old, value)
        else:
            merged[key] = value
    return merged


def _apply(content: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(override if override.strip() else "--set", "is no override", "write it as key.key=value")
    *parents, last = dotted.split(".")
    target = content
    for key in parents:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(override, f"{key} has no fields", "write it as key.key=value")
    target[last] = _parse(value, override)


def _explain(path: Path, error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    if not first["loc"]:  # fields that contradict each other
        return ConfigError(path, first["msg"].removeprefix("Value error, "), "see docs/configuration.md")
    keys = [str(part) for part in first["loc"]]
    name = ".".join(keys)
    where = _place_of(path, keys)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys[-1], _known_keys(), n=1)
        fix = f"did you mean {near[0]}?" if near else "delete it"
        return ConfigError(where, f"unknown key {name}", fix)
    given = json.dumps(first.get("input"), ensure_ascii=False, default=str)[:80]
    return ConfigError(where, f"{name}: {first['msg']}, got {given}", "see docs/configuration.md")


def _place_of(path: Path, keys: list[str]) -> str:
    """Return file and line where most of `keys` stand: in `path`, or in the first of those that it extends."""
    places = []
    file: Path | None = path
    while file is not None:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        places.append((*_depth_and_line(node, keys), file))
        base = read_yaml(file).get(EXTENDS)
        file = file.parent / base if base else None
    _, line, best = max(places, key=lambda place: place[0])
    return f"{best}:{line}"


def _depth_and_line(node: yaml.Node | None, keys: list[str]) -> tuple[int, int]:
    """Return how many of `keys` a document has, one inside the other, and the line of the last of them.

    A key that is not there is passed over: pydantic puts the kind of a projector among them.
    """
    depth, line = 0, 1
    for wanted in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key_node, value_node in pairs:
            if key_node.value == wanted:
                depth, line, node = depth + 1, key_node.start_mark.line + 1, value_node
                break
    return depth, line


def _known_keys() -> list[str]:
    schema = Config.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    return [key for part in parts for key in part.get("properties", {})]


def dump(config: Config, path: Path) -> None:
    """Write the resolved configuration, every default included."""
    content = config.model_dump(mode="json")
    write_text(path, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


def differences(old: Config, new: Config) -> list[str]:
    """Return ``key: old -> new`` for every field that differs."""
    changed = folders.differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    return [f"{name}: {was} -> {now}" for name, was, now in changed]
