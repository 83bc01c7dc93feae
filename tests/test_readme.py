"""What README.md and docs/ promise: links that resolve, commands and options that exist, placeholders that were filled."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from app.cli.main import app
from app.schemas.finetune import FinetuneRequest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("app/*/README.md")])
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
GLOBALS = {"--json", "--url", "--token-file", "--context", "--tenant", "--help"}


def blocks(page: Path) -> Iterator[str]:
    """The lines of code blocks; a line that is indented belongs to the one before."""
    inside = False
    for line in re.sub(r"\n {8,}", " ", page.read_text()).splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            yield line


def documented() -> list[str]:
    """`heliostat …` in blocks and in running text, one command each: `env ls | show REF` is two."""
    found: list[str] = []
    for page in (README, *ROOT.glob("docs/*.md")):
        spans = re.findall(r"`((?:\.venv/bin/)?heliostat [^`]+)`", page.read_text())
        for line in (*blocks(page), *spans):
            line = line.split(" #")[0].strip()
            if re.match(r"(\.venv/bin/)?heliostat (?!COMMAND)", line):
                found += alternatives(line.split("heliostat ", 1)[1])
    return sorted(set(found))


def alternatives(line: str) -> list[str]:
    """`env ls | rm REF` → `env ls`, `env rm REF`; `jobs cancel|pause ID` → both."""
    first, *others = line.split(" | ")
    group = first.split()[0]
    whole = [first, *(other if group in TOP else f"{group} {other}" for other in others)]
    found = []
    for one in whole:
        choice = re.match(r"(\S+ )([a-z]+(?:\|[a-z]+)+)\b", one)
        names = choice[2].split("|") if choice else []
        found += [one.replace(choice[2], name, 1) for name in names] if choice else [one]
    return found


ROOT_COMMAND: Any = get_command(app)
TOP = {name for name, one in ROOT_COMMAND.commands.items() if not hasattr(one, "commands")}


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words behind its name."""
    while words and words[0] in GLOBALS:
        words = words[1 if words[0] == "--json" else 2 :]
    command: Any = ROOT_COMMAND
    while hasattr(command, "get_command") and words:
        inner = command.get_command(None, words[0])
        assert inner is not None, f"no such command: {words[0]}"
        command, words = inner, words[1:]
    assert not hasattr(command, "get_command"), "a command is missing behind a group"
    return command, words


def check(line: str) -> None:
    words = shlex.split(re.sub(r"[\[\]…]", " ", line.split("2>")[0]), comments=True)
    command, rest = resolved(words)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if word.startswith("-") and word != "--" and word not in options]
    assert not unknown, f"{command.name} has no {unknown}"
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    assert arguments or not rest or rest[0].startswith("-") or rest == ["…"], f"{command.name} takes no {rest[0]}"


COMMANDS = documented()


def test_there_are_documented_commands() -> None:
    assert len(COMMANDS) > 40
    assert {"env rm REF", "jobs retry ID", "nodes", "dataset show REF"} <= set(COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_exists_with_its_options(line: str) -> None:
    check(line)


@pytest.mark.parametrize("line", ["job show X", "jobs shwo X", "jobs logs X --tial 3", "nodes extra", "dataset"])
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    if line == "job show X":
        check(line)  # singular and plural both work
        return
    with pytest.raises(AssertionError):
        check(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 180
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in lines[:34]), command


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert not re.findall(r"@@\w+@@", page.read_text()), page.name


def test_make_has_the_targets_that_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|=1 )make ([a-z-]+)", README.read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_requests_in_the_readme_are_valid() -> None:
    text = "\n".join(blocks(README))
    bodies = [body for body in objects_in(text) if "base_model" in body]
    assert bodies, "the README shows a request over HTTP"
    for body in bodies:
        FinetuneRequest.model_validate(body)


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that stand somewhere in a text; those inside others come with them."""
    place = text.find("{")
    while place >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, place)
        except json.JSONDecodeError:
            end = place + 1
        else:
            yield found
        place = text.find("{", end)
