from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_channel import ChannelServer, served, write_channel
from builders_wheels import write_wheel

from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments
from runtime_envs.index import PipIndex
from runtime_envs.materialize import HostEnvironments
from runtime_envs.policy import EnvironmentPolicy


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """greeter 1.0 and 2.0; polite needs greeter<2; six 1.0 overrides the platform's; big has 100 modules."""
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "greeter", "1.0")
    write_wheel(folder, "greeter", "2.0")
    write_wheel(folder, "polite", "1.0", requires=["greeter<2"])
    write_wheel(folder, "needs_platform", "1.0", requires=["torch>=2.4", "six"])
    write_wheel(folder, "needs_old_torch", "1.0", requires=["torch<2.4"])
    write_wheel(folder, "six", "1.0")
    write_wheel(folder, "torch", "2.5.0")
    write_wheel(folder, "huggingface_hub", "0.1")
    write_wheel(
        folder, "big", "1.0", files={f"big/m{i}.py": f"VALUE = {i}\n" for i in range(100)} | {"big/__init__.py": ""}
    )
    write_wheel(folder, "starter", "1.0", files={"starter.pth": "import os; os.environ['STARTER_RAN'] = '1'\n"})
    write_wheel(folder, "hijack", "1.0", files={"hijack-1.0.data/data/pyvenv.cfg": "home = /nowhere\n"})
    write_wheel(folder, "hijack_pip", "1.0", files={"hijack_pip-1.0.data/data/bin/python3.11": "#!/bin/sh\n"})
    return folder


@pytest.fixture(scope="session")
def index(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> PipIndex:
    return PipIndex(find_links=(str(wheels),), offline=True, cache_dir=tmp_path_factory.mktemp("solve-cache"))


@pytest.fixture
def environments(tmp_path: Path, index: PipIndex) -> HostEnvironments:
    return HostEnvironments(tmp_path / "node", index)


@pytest.fixture(scope="session")
def channel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conda")
    return write_channel(folder / "channel", folder / "wheels")


@pytest.fixture(scope="session")
def channel(channel_folder: Path) -> Iterator[ChannelServer]:
    with served(channel_folder) as server:
        yield server


@pytest.fixture(scope="session")
def places(channel: ChannelServer, index: PipIndex, tmp_path_factory: pytest.TempPathFactory) -> CondaPlaces:
    return CondaPlaces(EnvironmentPolicy({"conda-forge": channel.url}), tmp_path_factory.mktemp("conda-cache"), index)


@pytest.fixture
def node(tmp_path: Path, index: PipIndex) -> Environments:
    return Environments(tmp_path / "node", index)
