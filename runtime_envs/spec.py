"""Reads environment.yml into an `EnvironmentSpec`, with the line of everything. Pure: no solving, no I/O."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from runtime_envs.errors import INVALID, UNSUPPORTED, EnvironmentProblem

MAX_BYTES = 64 * 1024
MAX_DEPENDENCIES = 500
MAX_DEPTH = 6
KEYS = ("name", "channels", "dependencies", "base", "prefix")
BASES = ("host", "cpu", "cuda", "tensorflow")
"""The first is the default; each is a file in `bases/`."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CONDA_LINE = re.compile(r"(?:(?P<channel>[^\s=<>]+?)::)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)\s*(?P<rest>.*)")
CONDA_REST = re.compile(r"(?P<versions>\S*?)(?:(?:(?<=[^=<>!~,])=| )(?P<build>[A-Za-z0-9._+*]+))?")
SEGMENTS = r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*_?"
CONDA_VERSION = re.compile(
    rf"(?P<operator>==|>=|<=|!=|~=|>|<|=)?(?P<version>(?:[0-9]+!)?{SEGMENTS}(?:\+{SEGMENTS})?)?(?P<star>\.?\*)?"
)
NO_DEFAULTS = "nodefaults"
"""Not a channel: it says that there are no others."""
LICENSED_CHANNELS = re.compile(r"defaults|main|anaconda|pkgs/.*|.*repo\.(anaconda|continuum)\..*")


@dataclass(frozen=True)
class Channel:
    """A name or a URL, as written."""

    name: str
    line: int


@dataclass(frozen=True)
class Dependency:
    """One package that the file asks for. `name` is canonical, `text` as written, `line` from 1. Of a conda package `match_spec`
    is what a solver is asked for, in the one form that all of them read alike (name, versions, build), without `channel`."""

    name: str
    text: str
    line: int
    specifier: SpecifierSet
    match_spec: str = ""
    channel: str | None = None

    @property
    def conda_name(self) -> str:
        return self.match_spec.partition(" ")[0]


@dataclass(frozen=True)
class EnvironmentSpec:
    """`conda` holds the conda packages other than python and pip."""

    name: str
    base: str
    channels: tuple[Channel, ...]
    python: Dependency | None
    conda: tuple[Dependency, ...]
    pip: tuple[Dependency, ...]


def parse_spec(text: str) -> EnvironmentSpec:
    """Raises EnvironmentProblem: `environment_invalid`, or `environment_unsupported` for what is read but refused."""
    fields = dict(_fields(_compose(text)))
    if "name" not in fields:
        refuse(1, "the file has no `name`", "Add a line such as `name: my-env`; it is the handle of the environment.")
    conda, pip = _dependencies(fields.get("dependencies"))
    # Conda has packages whose names differ in `-` and `_` only, such as typing-extensions; a pip package is one of either.
    _refuse_twice(((d.conda_name, d) for d in conda), {})
    _refuse_twice(((d.name, d) for d in pip), {d.name: d.line for d in conda})
    return EnvironmentSpec(
        name=_name(fields["name"]),
        base=_base(fields["base"]) if "base" in fields else BASES[0],
        channels=tuple(_channels(fields.get("channels"))),
        python=next((d for d in conda if d.name == "python"), None),
        conda=tuple(d for d in conda if d.name not in ("python", "pip")),
        pip=pip,
    )


def refuse(line: int | None, message: str, hint: str | None = None, code: str = INVALID) -> NoReturn:
    where = f"line {line}: " if line is not None else ""
    raise EnvironmentProblem(code, f"environment.yml {where}{message}", hint=hint, line=line)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(known)}."


# --- YAML nodes. Nodes rather than values, because they carry line numbers and show duplicate keys. ---


def _compose(text: str) -> yaml.MappingNode:
    if len(text.encode(errors="replace")) > MAX_BYTES:
        refuse(None, f"is larger than {MAX_BYTES // 1024} KiB", "List the packages that you import, not a full export.")
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        refuse(_mark_line(mark), f"is not valid YAML: {reason}", "Check indentation and colons.")
    if not isinstance(root, yaml.MappingNode):
        refuse(1, "must be a mapping with `name` and `dependencies`")
    return root


def _check_depth(text: str) -> None:
    # Events come without recursion; composing a file of 60,000 brackets would exhaust the stack.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            refuse(_mark_line(event.start_mark), "uses a YAML alias, which is not supported here")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            refuse(_mark_line(event.start_mark), "is nested too deeply")


def _mark_line(mark: Any) -> int | None:
    return int(mark.line) + 1 if mark else None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _fields(root: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in root.value:
        word = _text(key, "a key")
        if word in seen:
            refuse(_line(key), f"`{word}` is there twice (first in line {seen[word]})")
        if word not in KEYS:
            refuse(_line(key), f"unknown key `{word}`", did_you_mean(word, KEYS))
        seen[word] = _line(key)
        yield word, value


def _items(node: yaml.Node | None, what: str) -> list[yaml.Node]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
        return []
    if not isinstance(node, yaml.SequenceNode):
        refuse(_line(node), f"`{what}` must be a list", "Put each item on a line of its own, after `- `.")
    return list(node.value)


def _text(node: yaml.Node, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        refuse(_line(node), f"{what} must be text")
    return str(node.value).strip()


def _name(node: yaml.Node) -> str:
    name = _text(node, "`name`")
    if not NAME.fullmatch(name):
        refuse(_line(node), f"`{name}` is not a usable name", "Use a-z, 0-9, `.`, `_` and `-`, at most 64 characters.")
    return name


def _base(node: yaml.Node) -> str:
    base = _text(node, "`base`")
    if base not in BASES:
        refuse(_line(node), f"there is no base `{base}`", did_you_mean(base, BASES), UNSUPPORTED)
    return base


def _channels(node: yaml.Node | None) -> Iterator[Channel]:
    for item in _items(node, "channels"):
        channel = Channel(_text(item, "a channel"), _line(item))
        if LICENSED_CHANNELS.fullmatch(channel.name):
            refuse(channel.line, f"channel `{channel.name}` is refused: its licence does not cover every organisation",
                   "Use `conda-forge`.", UNSUPPORTED)  # fmt: skip
        if channel.name != NO_DEFAULTS:
            yield channel


# --- Dependencies ---


def _dependencies(node: yaml.Node | None) -> tuple[tuple[Dependency, ...], tuple[Dependency, ...]]:
    conda: list[Dependency] = []
    pip: list[Dependency] = []
    for item in _items(node, "dependencies"):
        if isinstance(item, yaml.MappingNode):
            pip.extend(_pip_section(item))
        else:
            conda.append(conda_dependency(_text(item, "a dependency"), _line(item)))
    if len(conda) + len(pip) > MAX_DEPENDENCIES:
        refuse(None, f"lists more than {MAX_DEPENDENCIES} packages")
    return tuple(conda), tuple(pip)


def _pip_section(item: yaml.MappingNode) -> Iterator[Dependency]:
    for key, value in item.value:
        if _text(key, "a key") != "pip":
            refuse(_line(key), f"unknown key `{key.value}` under `dependencies`", did_you_mean(key.value, ["pip"]))
        for node in _items(value, "pip"):
            yield pip_dependency(_text(node, "a pip requirement"), _line(node))


def conda_dependency(text: str, line: int) -> Dependency:
    """`python=3.11`, `python >=3.10,<3.12`, `conda-forge::numpy 2.*`, and with a build `numpy=2.0=py311_0`, as `conda env export`
    writes it."""
    match = CONDA_LINE.fullmatch(text)
    if not match:
        refuse(line, f"`{text}` is not a conda package", "Write `name`, `name=1.2` or `name>=1.2,<2`.")
    channel, name = match["channel"], match["name"].lower()
    if channel and LICENSED_CHANNELS.fullmatch(channel):
        refuse(line, f"channel `{channel}` is refused", "Use `conda-forge`.", UNSUPPORTED)
    rest = re.sub(r" ?([=<>!~,]+) ?", r"\1", " ".join(match["rest"].split()))
    try:
        versions, build = _versions(rest)
        specifier = _specifier(name, versions)
    except InvalidSpecifier:
        refuse(line, f"`{rest}` is not a version", "Write `name=1.2` or `name>=1.2,<2`.")
    asked = ",".join(re.sub(r"^==(.*\.\*)$", r"\1", version) for version in versions)
    match_spec = " ".join(filter(None, (name, asked or (build and "*"), build)))
    return Dependency(canonicalize_name(name), text, line, specifier, match_spec, channel)


def _versions(rest: str) -> tuple[list[str], str | None]:
    """Of what stands behind a name: the versions as PEP 440 writes them, and the build."""
    match = CONDA_REST.fullmatch(rest)
    if not match:
        raise InvalidSpecifier(rest)
    parts = [part for part in match["versions"].split(",") if part]
    return [version for part in parts if (version := _pep440(part, bool(match["build"])))], match["build"]


def _pep440(part: str, has_build: bool) -> str:
    """Conda's `=3.11` and `3.11.*` mean any 3.11.x; `=3.11` beside a build, and `3.11` alone, just that. Empty: any version."""
    match = CONDA_VERSION.fullmatch(part)
    if not match or not (match["version"] or match["star"]):
        raise InvalidSpecifier(part)
    operator = "==" if match["operator"] in (None, "=") else match["operator"]
    begins = match["star"] or (match["operator"] == "=" and not has_build)
    return f"{operator}{match['version']}{'.*' * bool(begins and operator in ('==', '!='))}" if match["version"] else ""


def _specifier(name: str, versions: Iterable[str]) -> SpecifierSet:
    """What can be told before solving: `1.1.1w` or `9e` is a version for conda only. A Python's is one for all."""
    specifier = SpecifierSet()
    for version in versions:
        try:
            specifier &= SpecifierSet(version)
        except InvalidSpecifier:
            if name == "python":
                raise
    return specifier


def pip_dependency(text: str, line: int) -> Dependency:
    """A name with extras, versions and markers. Options, URLs, version control and paths are refused: a lock could not
    be checked against an index, and a source tree would run its build on the platform."""
    if text.startswith("-"):
        refuse(
            line, f"pip option `{text.split()[0]}` is refused", "List packages only; operators set the package index."
        )
    if "://" in text or text.startswith(("git+", "hg+", "svn+", "bzr+", "file:")):
        refuse(line, f"`{text}` is a URL", "Name a package and version of the package index.")
    if text.startswith((".", "/", "~", "\\")) or re.search(r"\.(whl|zip|tar\.gz|txt)$", text):
        refuse(line, f"`{text}` is a local path", "Name a package and version of the package index.")
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        refuse(line, f"`{text}` is not a pip requirement: {reason}", "Write `name`, `name==1.2` or `name>=1.2,<2`.")
    if requirement.url:
        refuse(line, f"`{text}` is a URL", "Name a package and version of the package index.")
    return Dependency(canonicalize_name(requirement.name), text, line, requirement.specifier)


def _refuse_twice(dependencies: Iterable[tuple[str, Dependency]], seen: dict[str, int]) -> None:
    """`seen`: names → lines, before these."""
    for name, dependency in dependencies:
        if name in seen and ";" not in dependency.text:  # markers may choose between two lines
            refuse(dependency.line, f"`{name}` is there twice (first in line {seen[name]})", "Keep one of them.")
        seen.setdefault(name, dependency.line)
