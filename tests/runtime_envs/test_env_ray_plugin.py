from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPluginManager, create_for_plugin_if_needed

from runtime_envs.errors import EnvironmentProblem
from runtime_envs.lock import default_lock
from runtime_envs.materialize import HostEnvironments, Prepared
from runtime_envs.ray_plugin import TenantEnvPlugin
from runtime_envs.variables import FINGERPRINT_VARIABLE, PLUGIN_CONFIG, PLUGIN_NAME, PREFIX_VARIABLE, ROOT_VARIABLE


@pytest.fixture
def prepared(environments: HostEnvironments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "node"))
    return environments.materialize(default_lock())


def set_up(fingerprint: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As Ray's agent does it: the plugin by its configuration, with the agent's own cache of URIs."""
    monkeypatch.setenv("RAY_RUNTIME_ENV_PLUGINS", PLUGIN_CONFIG)
    plugin = RuntimeEnvPluginManager().plugins[PLUGIN_NAME]
    context = RuntimeEnvContext(env_vars={})
    for _ in range(2):  # the second time is the one that a cache would answer
        asyncio.run(
            create_for_plugin_if_needed(
                {PLUGIN_NAME: fingerprint}, plugin.class_instance, plugin.uri_cache, context, logging.getLogger("test")
            )
        )
    return dict(context.env_vars)


def test_the_worker_is_told_where_its_environment_is(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_up(prepared.fingerprint, monkeypatch) == {
        FINGERPRINT_VARIABLE: prepared.fingerprint,
        PREFIX_VARIABLE: str(prepared.prefix),
    }


def test_what_the_agent_did_not_make_is_refused(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        set_up("0" * 64, monkeypatch)
    assert caught.value.code == "environment_not_ready"


def test_what_is_damaged_is_refused(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    (prepared.prefix / "pyvenv.cfg").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"pyvenv\.cfg") as caught:
        set_up(prepared.fingerprint, monkeypatch)
    assert caught.value.code == "environment_damaged"


@pytest.mark.parametrize("value", ["../../etc", "", 3, "g" * 64])
def test_only_a_fingerprint_is_taken(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        set_up(value, monkeypatch)


def test_a_node_without_a_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    with pytest.raises(EnvironmentProblem, match=ROOT_VARIABLE):
        set_up("0" * 64, monkeypatch)


def test_the_names_load_without_ray() -> None:
    code = "import sys, runtime_envs.variables, runtime_envs.errors; print('ray' in sys.modules, 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_the_plugin_loads_little_beside_ray() -> None:
    code = (
        "import sys, ray._private.runtime_env.plugin; before = set(sys.modules); import runtime_envs.ray_plugin;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['runtime_envs']\n", done.stderr


def test_the_configuration_names_this_class() -> None:
    (entry,) = json.loads(PLUGIN_CONFIG)
    assert entry["class"] == f"{TenantEnvPlugin.__module__}.{TenantEnvPlugin.__qualname__}"
