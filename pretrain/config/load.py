"""Recipes and overrides -> `Config`, and back to YAML.

A recipe is a YAML file, or the name of one in `pretrain/recipes`. A value is taken from the last of these that sets it:

    defaults in schema.py  <  the recipe named by `inherit:`  <  the recipe  <  overrides `a.b=value`, left to right

Mappings of names (`data.sources`) are sections too: what a later one does not name stays. Lists are replaced whole.

The type of a field says how its text is read; YAML 1.1's guesses play no part. So `lr: 1e-3` is a number,
`telemetry.wandb=off` is the word "off", `steps: 010` is ten, and `steps: 1.5` or `compile: 1` is an error.

`objective.name` decides which fields `objective` has. Within one file, and within the overrides taken together, every
field must belong to the objective in force there. When a file or the overrides change the name, what earlier files said
about the old objective is dropped, except for fields that both objectives have: `objective.name=mdlm` over a CCDD
recipe is MDLM's defaults on that recipe's data, model and training.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import yaml

from braid.kernels.errors import ConfigError
from braid.pretrain.config.objectives import OBJECTIVES
from braid.pretrain.config.problem import Problem, configuration_error, listed, nearest
from braid.pretrain.config.schema import Config

RECIPES = Path(__file__).parent.parent / "recipes"

RENAMED = {"data.long_pairs": "data.oversized", "objective.grid": "sampling.grid"}
"""Fields that had another name: recipes and resolved configurations that have it can be read."""
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~")
_YAML_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null timestamp value merge seq map".split()}


def recipes() -> list[str]:
    """Names of the recipes that come with Braid."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe with `key=value` overrides applied.

    Raises ConfigError with every problem of the files and overrides at once. Only types and names are checked here;
    `validate.py` judges the values.
    """
    problems: list[Problem] = []
    layers = [[source] for source in _read_files(recipe)] + [_read_overrides(overrides, problems)]
    objective, values = Config().objective.name, {}
    for layer in layers:
        name = _objective_name(layer) or objective
        if name != objective and name in OBJECTIVES and "objective" in values:
            shared = _fields(OBJECTIVES[name], name).items() & _fields(OBJECTIVES[objective], objective).items()
            values["objective"] = {key: values["objective"][key] for key, _ in shared if key in values["objective"]}
        objective = name if name in OBJECTIVES else objective
        for source in layer:
            _merge(values, _Reader(source, name, problems).section(source.settings, Config, ""))
    if problems:
        raise configuration_error(problems)
    return _build(Config, values, objective)


def dump_config(config: Config) -> str:
    """Every field as YAML, in the order of the schema. `load_config` reads it back as an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, width=math.inf)


def field_names(objective: str) -> list[str]:
    """Dotted names of all fields a configuration with this objective has, in the order of the schema."""

    def walk(cls: type, path: str) -> Iterable[str]:
        for name, kind in _fields(cls, objective).items():
            yield from walk(kind, f"{path}{name}.") if is_dataclass(kind) else [f"{path}{name}"]

    return list(walk(Config, ""))


# Where settings come from: YAML files and overrides, both as YAML nodes (which know their line).


@dataclass(frozen=True)
class _Source:
    """Settings from one file or one override."""

    settings: yaml.MappingNode
    label: str
    has_lines: bool

    def place(self, node: yaml.Node) -> str:
        return f"{self.label}, line {node.start_mark.line + 1}" if self.has_lines else self.label


def recipe_path(recipe: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe: a name in `recipes()`, or a path (relative to `beside`). ConfigError when it is neither."""
    name = str(recipe)
    if name in recipes():
        return RECIPES / f"{name}.yaml"
    path = beside / name
    if path.is_file():
        return path
    guesses = [str(guess) for guess in (path / "config.yaml", Path(f"{path}.yaml")) if guess.is_file()]
    guesses = guesses or nearest(Path(name).name.removesuffix(".yaml"), recipes())
    raise ConfigError(
        f"there is no recipe {name!r}: it is neither the name of a recipe nor a YAML file",
        found=f"{path} is a folder" if path.is_dir() else f"{path} does not exist",
        change=(f"did you mean {listed(guesses)}? " if guesses else "") + "The recipes are " + ", ".join(recipes()),
    )


def _read_files(recipe: str | Path) -> list[_Source]:
    """The recipe and those it inherits from, the most basic first."""
    sources: list[_Source] = []
    seen: list[Path] = []
    following: tuple[str, Path] | None = (str(recipe), Path())
    while following:
        path = recipe_path(*following)
        if path.resolve() in seen:
            raise ConfigError(
                "recipes inherit from each other in a circle",
                found=" -> ".join(each.name for each in [*seen, path]),
                change="remove one `inherit:` line",
            )
        seen.append(path.resolve())
        root = _compose(path)
        parents = [value for key, value in root.value if key.value == "inherit"]
        if len(parents) > 1 or not all(isinstance(parent, yaml.ScalarNode) and parent.value for parent in parents):
            raise ConfigError(f"{path}: `inherit:` takes the name or the path of one recipe", change="write it once")
        root.value = [(key, value) for key, value in root.value if key.value != "inherit"]
        sources.insert(0, _Source(_with_new_names(root), str(path), has_lines=True))
        following = (parents[0].value, path.parent) if parents else None
    return sources


def _compose(path: Path) -> yaml.MappingNode:
    """The YAML tree of a file; ConfigError with file and line when it is malformed."""
    try:
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", found=str(error), change="pass a YAML recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: malformed YAML",
            found=" ".join(str(getattr(error, "problem", None) or error).split()),
            change="repair the file; sections nest by indentation with spaces, and `key: value` needs its space",
        ) from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} holds no settings", found=_describe(root), change="write sections, for example `training:`"
        )
    return root


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> list[_Source]:
    sources = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            change = "write section.field=value, without spaces around the `=`, for example training.steps=100"
            problems.append(Problem(f"override {text!r} is not of the form key=value", change=change))
            continue
        try:
            node = _override_value(value)
        except yaml.YAMLError as error:
            found = " ".join(str(getattr(error, "problem", None) or error).split())
            problems.append(Problem(f"override {text!r}: the value is malformed YAML", found, "repair or quote it"))
            continue
        for part in reversed(key.split(".")):
            node = yaml.MappingNode("tag:yaml.org,2002:map", [(_plain(part), node)])
        sources.append(_Source(_with_new_names(node), f"override {text!r}", has_lines=False))
    return sources


def _with_new_names(root: yaml.MappingNode) -> yaml.MappingNode:
    """The same settings, fields of `RENAMED` where they are now."""
    for former, new in RENAMED.items():
        (old_section, old), (new_section, name) = former.split("."), new.split(".")
        for key, section in list(root.value):
            fields_of = section.value if isinstance(section, yaml.MappingNode) and key.value == old_section else []
            for field_key, value in [pair for pair in fields_of if pair[0].value == old]:
                section.value.remove((field_key, value))
                field_key.value = name
                _section(root, new_section, field_key).value.append((field_key, value))
    return root


def _section(root: yaml.MappingNode, name: str, like: yaml.Node) -> yaml.MappingNode:
    """The section of that name, made at the place of `like` where there is none."""
    for key, section in list(root.value):
        if key.value == name and isinstance(section, yaml.MappingNode):
            return section
        if key.value == name and _is_nothing(section):
            root.value.remove((key, section))
    made = yaml.MappingNode("tag:yaml.org,2002:map", [], like.start_mark, like.end_mark)
    root.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", name, like.start_mark, like.end_mark), made))
    return made


def _override_value(text: str) -> yaml.Node:
    """Quoted texts, lists and mappings are YAML; anything else stands for itself (the shell has its own quoting)."""
    if text.startswith(("'", '"', "[", "{")):
        return yaml.compose(text, Loader=yaml.SafeLoader)
    return _plain(text)


def _plain(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def _objective_name(layer: list[_Source]) -> str | None:
    """The last `objective.name` that a layer sets."""
    name = None
    for source in layer:
        for key, section in source.settings.value:
            if key.value == "objective" and isinstance(section, yaml.MappingNode):
                names = [value.value for key, value in section.value if key.value == "name"]
                name = names[-1] if names and isinstance(names[-1], str) else name
    return name


# YAML nodes against the schema.


@functools.cache
def _fields(cls: type, objective: str) -> dict[str, type]:
    """Name -> type of the fields of a section. The objective's union becomes the class that its name stands for."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in fields(cls)}
    is_union = {name: typing.get_origin(kind) in (typing.Union, types.UnionType) for name, kind in kinds.items()}
    return {name: OBJECTIVES.get(objective, dict) if is_union[name] else kind for name, kind in kinds.items()}


@dataclass
class _Reader:
    """Reads one source against the schema; what does not fit goes to `problems`."""

    source: _Source
    objective: str
    problems: list[Problem]

    def section(self, node: yaml.Node, cls: type, path: str) -> dict:
        """Values of the known, well-typed fields of one section, sections nested."""
        if _is_nothing(node):
            return {}  # `training:` with every line below it commented out
        if not isinstance(node, yaml.MappingNode):
            example = f"{path}.{next(iter(_fields(cls, '')))}=..."
            if path == "objective":
                example = f"objective.name={node.value if node.value in list(OBJECTIVES) else 'mdlm'}"
            self.problem(f"{path} is a section, not a value", node, f"set a field of it, for example {example}")
            return {}
        values, kinds = {}, _fields(cls, self.objective)
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _describe(key_node)
            dotted = f"{path}.{key}" if path else key
            if key in values:
                self.problem(f"{dotted} is set twice", key_node, "remove one of the two")
            elif key not in kinds:
                self.unknown_key(dotted, key_node, value_node)
            elif is_dataclass(kinds[key]):
                values[key] = self.section(value_node, kinds[key], dotted)
            elif kinds[key] is dict:
                self.unknown_objective(value_node)
            else:
                values[key] = self.value(value_node, kinds[key], dotted)
        return values

    def value(self, node: yaml.Node, kind: type, path: str) -> object:
        if node.tag not in _YAML_TAGS:
            self.problem(f"{path}: YAML tags other than the standard ones are not allowed", node, f"remove {node.tag}")
        elif typing.get_origin(kind) is dict:
            return self.mapping(node, typing.get_args(kind)[1], path)
        elif typing.get_origin(kind) is tuple:
            return self.entries(node, typing.get_args(kind)[0], path)
        elif not isinstance(node, yaml.ScalarNode):
            self.problem(f"{path} takes {TYPE_NAMES[kind]} ({kind.__name__})", node, "write a single value")
        else:
            try:
                return _parse(node.value, node.style is not None, kind)
            except ValueError as error:
                self.problem(f"{path} takes {TYPE_NAMES[kind]} ({kind.__name__})", node, str(error))
        return None

    def mapping(self, node: yaml.Node, kind: type, path: str) -> dict:
        """Name -> value of one kind."""
        if not isinstance(node, yaml.MappingNode):
            if not _is_nothing(node):
                self.problem(
                    f"{path} maps names to values", node, f"for example {path}.NAME=... or {path}={{NAME: ...}}"
                )
            return {}
        values = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _describe(key_node)
            if key in values:
                self.problem(f"{path}.{key} is set twice", key_node, "remove one of the two")
            values[key] = self.value(value_node, kind, f"{path}.{key}")
        return values

    def entries(self, node: yaml.Node, cls: type, path: str) -> tuple:
        """A list of sections, each with all of its fields."""
        if not isinstance(node, yaml.SequenceNode):
            if not _is_nothing(node):
                self.problem(f"{path} takes a list", node, f"for example {path}='[{entry_form(cls)}]'")
            return ()
        entries = []
        for number, entry in enumerate(node.value):
            values = self.section(entry, cls, f"{path}[{number}]")
            missing = [name for name in _fields(cls, "") if name not in values]
            if missing and isinstance(entry, yaml.MappingNode):
                self.problem(f"{path}[{number}] lacks {listed(missing, 'and')}", entry, f"write {entry_form(cls)}")
            entries.append(None if missing else cls(**values))
        return tuple(entries)

    def problem(self, what: str, node: yaml.Node, change: str) -> None:
        self.problems.append(Problem(what, f"{_describe(node)} ({self.source.place(node)})", change))

    def unknown_key(self, path: str, key_node: yaml.Node, value_node: yaml.Node) -> None:
        for _ in range(3):  # name the whole key where it is one, as in an override
            if isinstance(value_node, yaml.MappingNode) and len(value_node.value) == 1:
                ((key, value_node),) = value_node.value
                path += f".{key.value}"
        known = field_names(self.objective if self.objective in OBJECTIVES else Config().objective.name)
        last = path.rsplit(".", 1)[-1]
        alike = [name for name in known if name.rsplit(".", 1)[-1] == last]
        alike += nearest(path, known if "." in path else [field.name for field in fields(Config)])
        alike += [name for word in nearest(last, {n.rsplit(".", 1)[-1] for n in known}) for name in known
                  if name.endswith(f".{word}")]  # fmt: skip
        owners = [name for name in OBJECTIVES if path in field_names(name)]
        if owners and self.objective in OBJECTIVES:
            change = f"it belongs to objective.name={listed(owners)}; here the objective is {self.objective}"
        elif alike:
            change = f"did you mean {listed(list(dict.fromkeys(alike))[:3])}?"
        else:
            change = "`braid pretrain --help` lists every key"
        self.problems.append(Problem(f"unknown key {path}", self.source.place(key_node), change))

    def unknown_objective(self, node: yaml.Node) -> None:
        names = [value for key, value in getattr(node, "value", ()) if key.value == "name"]
        if names:  # the sources beside it, which only have fields of that objective, would repeat the message
            alike = nearest(self.objective, OBJECTIVES)
            change = f"did you mean {listed(alike)}? " if alike else ""
            what = f"there is no objective {self.objective!r}"
            self.problem(what, names[-1], f"{change}The objectives are {listed(OBJECTIVES, 'and')}")


def entry_form(cls: type) -> str:
    """How an entry of a list is written."""
    return "{" + ", ".join(f"{name}: ..." for name in _fields(cls, "")) + "}"


def _is_nothing(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.value and node.style is None


def _parse(text: str, quoted: bool, kind: type) -> object:
    """`text` as a value of `kind`. A ValueError says what to write instead."""
    if kind is str:
        if quoted or text.lower() not in _NULL:
            return text
        raise ValueError('write "" for an empty text, or put the word in quotes')
    if quoted:
        raise ValueError("remove the quotes, which make it a text")
    if kind is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise ValueError("write true or false")
    if kind is int and re.fullmatch(r"[-+]?[0-9]+(_[0-9]+)*", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is int:
        raise ValueError(f"write {int(number)}" if number.is_integer() else "write digits only, for example 1000")
    if not math.isfinite(number):
        raise ValueError("write a finite number, for example 0.1 or 3e-4")
    return number


def _describe(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.ScalarNode):
        text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
        return repr(text) if text or node.style else "nothing"
    if node is None:
        return "an empty file"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _merge(values: dict, newer: dict) -> None:
    """Overwrite `values` with `newer`, section by section."""
    for key, value in newer.items():
        if isinstance(value, dict):
            _merge(values.setdefault(key, {}), value)
        else:
            values[key] = value


def _build(cls: type, values: dict, objective: str) -> typing.Any:
    kinds = _fields(cls, objective)
    return cls(**{k: _build(kinds[k], v, objective) if is_dataclass(kinds[k]) else v for k, v in values.items()})
