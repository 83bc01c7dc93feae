"""Turns wheels into conda packages: pure ones into `noarch`, others for the architecture. Their needs become conda specs, with
the markers evaluated for the Python that the channel is for."""

from __future__ import annotations

import base64
import configparser
import email.parser
import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from runtime_envs.channels.package import PLACEHOLDER, Entry, Package

CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub", "typing-extensions": "typing_extensions"}
"""Names that conda-forge spells otherwise, so that one environment.yml means the same on both."""
SCRIPT = """#!{python}
import sys
from {module} import {first}
if __name__ == "__main__":
    sys.exit({function}())
"""


@dataclass(frozen=True)
class Wheel:
    """`python`: the full version that markers are evaluated for."""

    path: Path
    python: str

    @cached_property
    def name(self) -> str:
        return canonicalize_name(parse_wheel_filename(self.path.name)[0])

    @cached_property
    def version(self) -> Version:
        return parse_wheel_filename(self.path.name)[1]

    @cached_property
    def tags(self) -> frozenset[Tag]:
        return parse_wheel_filename(self.path.name)[3]

    @cached_property
    def info(self) -> str:
        """The folder `….dist-info`."""
        with zipfile.ZipFile(self.path) as archive:
            return next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]

    @cached_property
    def metadata(self) -> RawMetadata:
        return parse_email(self._read("METADATA"))[0]

    @cached_property
    def pure(self) -> bool:
        fields = email.parser.BytesParser().parsebytes(self._read("WHEEL"))
        return str(fields["Root-Is-Purelib"]).lower() == "true"

    @property
    def minor(self) -> str:
        return ".".join(self.python.split(".")[:2])

    def entry_points(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            if f"{self.info}/entry_points.txt" not in archive.namelist():
                return []
        parser = configparser.RawConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
        parser.read_string(self._read("entry_points.txt").decode())
        names = parser["console_scripts"] if parser.has_section("console_scripts") else {}
        return [f"{name} = {target.split('[')[0].strip()}" for name, target in names.items()]

    def requirements(self, extras: Iterable[str] = ("",)) -> list[Requirement]:
        requirements = [Requirement(text) for text in self.metadata.get("requires_dist", [])]
        return [r for r in requirements if r.marker is None or any(self._applies(r, extra) for extra in extras)]

    def _applies(self, requirement: Requirement, extra: str) -> bool:
        target = {"python_version": self.minor, "python_full_version": self.python, "extra": extra}
        return requirement.marker is None or requirement.marker.evaluate(target)

    def _read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(f"{self.info}/{name}")


def conda_name(pypi_name: str) -> str:
    name = canonicalize_name(pypi_name)
    return CONDA_NAMES.get(name, name)


def describe(wheel: Wheel, others: Mapping[str, Wheel]) -> Package:
    """`others` by name: what an extra of them asks for is needed too."""
    local = f"_{re.sub(r'[^a-z0-9]', '_', wheel.version.local)}" if wheel.version.local else ""
    tag = "py" if wheel.pure else f"py{wheel.minor.replace('.', '')}"
    scripts = tuple(wheel.entry_points()) if wheel.pure else ()
    return Package(
        name=conda_name(wheel.name),
        version=conda_version(str(wheel.version)),
        build=f"{tag}{local}_0",
        depends=tuple(_depends(wheel, others)),
        noarch=wheel.pure,
        entry_points=scripts,
        about={"summary": wheel.metadata.get("summary", ""), "license": wheel.metadata.get("license", "")},
    )


def conda_version(version: str) -> str:
    """Without the local part: conda's `==2.13.0` does not take `2.13.0+cpu`."""
    return version.partition("+")[0]


def _depends(wheel: Wheel, others: Mapping[str, Wheel]) -> Iterator[str]:
    wanted = wheel.metadata.get("requires_python", "") if wheel.pure else f"=={wheel.minor}.*"
    yield conda_spec("python", SpecifierSet(wanted))
    seen: dict[str, None] = {}
    waiting = wheel.requirements()
    while waiting:
        requirement = waiting.pop(0)
        other = others.get(canonicalize_name(requirement.name))
        if requirement.extras and other is not None and other is not wheel:
            waiting += [r for r in other.requirements(sorted(requirement.extras)) if r.marker is not None]
        if other is not wheel:
            seen[conda_spec(conda_name(requirement.name), requirement.specifier)] = None
    yield from seen


def conda_spec(name: str, specifier: SpecifierSet) -> str:
    parts = sorted(_conda_part(part) for part in specifier)
    return f"{name} {','.join(parts)}" if parts else name


def _conda_part(part: Specifier) -> str:
    version = conda_version(part.version)
    if part.operator == "==" and version.endswith(".*"):
        return version
    return f"{'==' if part.operator == '===' else part.operator}{version}"


def entries(wheel: Wheel) -> Iterator[Entry]:
    """The package's files, RECORD last: rewritten to say where they lie now."""
    site = "site-packages" if wheel.pure else f"lib/python{wheel.minor}/site-packages"
    record: list[str] = []
    with zipfile.ZipFile(wheel.path) as archive:
        for member in archive.infolist():
            if member.is_dir() or member.filename in (f"{wheel.info}/RECORD", f"{wheel.info}/INSTALLER"):
                continue
            entry = _placed(
                wheel, site, member.filename, archive.read(member), bool(member.external_attr >> 16 & 0o100)
            )
            record.append(_recorded(entry, site))
            yield entry
    made = [Entry(f"{site}/{wheel.info}/INSTALLER", b"conda\n"), *([] if wheel.pure else _scripts(wheel))]
    record += [_recorded(entry, site) for entry in made]
    yield from made
    yield Entry(f"{site}/{wheel.info}/RECORD", ("".join(record) + f"{wheel.info}/RECORD,,\n").encode())


def _placed(wheel: Wheel, site: str, name: str, data: bytes, executable: bool) -> Entry:
    match = re.match(r"[^/]+\.data/(?P<scheme>[a-z]+)/(?P<rest>.+)", name)
    if match is None:
        return Entry(f"{site}/{name}", data, executable)
    scripts = "python-scripts" if wheel.pure else "bin"
    headers = f"include/python{wheel.minor}/{wheel.name}"
    folders = {"purelib": site, "platlib": site, "data": "", "headers": headers, "scripts": scripts}
    if match["scheme"] == "scripts":
        return Entry(f"{scripts}/{match['rest']}", _with_python(data), True)
    return Entry(f"{folders[match['scheme']]}/{match['rest']}".lstrip("/"), data, executable)


def _with_python(script: bytes) -> bytes:
    return re.sub(rb"\A#!pythonw?", f"#!{PLACEHOLDER}/bin/python".encode(), script)


def _scripts(wheel: Wheel) -> Iterator[Entry]:
    for line in wheel.entry_points():
        name, _, target = (part.strip() for part in line.partition("="))
        module, _, function = target.partition(":")
        text = SCRIPT.format(
            python=f"{PLACEHOLDER}/bin/python", module=module, first=function.split(".")[0], function=function
        )
        yield Entry(f"bin/{name}", text.encode(), True)


def _recorded(entry: Entry, site: str) -> str:
    if not entry.path.startswith(f"{site}/"):
        return f"../../../{entry.path.replace('python-scripts/', 'bin/')},,\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(entry.data).digest()).rstrip(b"=").decode()
    return f"{entry.path.removeprefix(f'{site}/')},sha256={digest},{len(entry.data)}\n"
