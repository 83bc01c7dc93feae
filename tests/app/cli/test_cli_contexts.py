"""Whose word counts: flags, environment, contexts; and who gets which token."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cli_said import Run
from fake_service import TOKEN, FakeService
from hypothesis import given
from hypothesis import strategies as st

from app.cli.contexts import Connection, Context, Contexts, Given, load_contexts, resolve, save_contexts
from cluster.errors import HeliostatError, InvalidRequest, NotFound

HERE, THERE = "http://here:1", "http://there:2"
SAVED = Contexts(
    "default",
    {
        "default": Context(HERE, "mine"),
        "operator": Context(HERE, "operators"),
        "other": Context(THERE, "theirs", tenant="acme"),
    },
)
ENV = {"HELIOSTAT_URL": THERE, "HELIOSTAT_TOKEN": "from-env"}


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        (Given(), {}, Connection(HERE, "mine", None, "default")),
        (Given(), ENV, Connection(THERE, "from-env", None, "default")),
        (Given(url="http://flag:3"), ENV, Connection("http://flag:3", "from-env", None, "default")),
        (Given(context="other"), ENV, Connection(THERE, "theirs", "acme", "other")),
        (Given(context="other", tenant="zeta"), {}, Connection(THERE, "theirs", "zeta", "other")),
        (Given(), {"HELIOSTAT_CONTEXT": "other"}, Connection(THERE, "theirs", "acme", "other")),
        (Given(), {"HELIOSTAT_TOKEN": "x"}, Connection(HERE, "x", None, "default")),
    ],
)
def test_flags_beat_environment_beat_context(flags: Given, environ: dict[str, str], expected: Connection) -> None:
    assert resolve(flags, environ, SAVED) == expected


@pytest.mark.parametrize("where", [Given(url=THERE), Given(url="http://evil:9")])
def test_a_contexts_token_goes_to_its_own_service_only(where: Given) -> None:
    assert resolve(where, {}, SAVED).token is None


def test_an_operators_command_takes_the_operators_context_when_nothing_was_said() -> None:
    assert resolve(Given(), {}, SAVED, operator=True).token == "operators"
    assert resolve(Given(context="default"), {}, SAVED, operator=True).token == "mine"
    assert resolve(Given(), ENV, SAVED, operator=True).token == "from-env"
    assert resolve(Given(), {"HELIOSTAT_CONTEXT": "other"}, SAVED, operator=True).token == "theirs"


def test_token_files(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("in-file\n")
    assert resolve(Given(token_file=file), ENV, SAVED).token == "in-file"
    assert resolve(Given(), {"HELIOSTAT_TOKEN_FILE": str(file)}, SAVED).token == "in-file"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        resolve(Given(token_file=tmp_path / "none"), {}, SAVED)


def test_an_unknown_context_names_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        resolve(Given(context="nobody"), {}, SAVED)
    assert "operator" in str(caught.value.hint)


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@given(contexts=st.dictionaries(TEXTS.filter(bool), st.builds(Context, TEXTS, TEXTS | st.none()), max_size=4))
def test_what_is_saved_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, contexts: dict[str, Context]) -> None:
    file = tmp_path_factory.mktemp("c") / "contexts.toml"
    saved = Contexts(next(iter(contexts), None), contexts)
    save_contexts(saved, file)
    assert load_contexts(file) == saved
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "contexts.toml"
    file.write_text("current = ")
    with pytest.raises(HeliostatError, match=r"contexts\.toml"):
        load_contexts(file)


def test_set_use_ls_rm(offline: Run, service: FakeService, home: Path) -> None:
    token = home / "token"
    token.write_text(TOKEN)
    assert offline("context", "set", "here", "--url", service.url, "--token-file", str(token)).code == 0
    assert offline("context", "use", "here").code == 0
    listed = offline("context", "ls", "--json")
    assert listed.json["data"] == [{"name": "here", "current": True, "url": service.url, "tenant": None}]
    assert TOKEN not in listed.out
    assert offline("jobs", "ls").code == 0
    assert offline("context", "delete", "here").code == 0
    assert offline("context", "use", "here").code == 2


def test_without_a_token_it_is_refused(offline: Run, service: FakeService) -> None:
    said = offline("--url", service.url, "jobs", "ls")
    assert said.code == 4
    assert "send one" in said.err
