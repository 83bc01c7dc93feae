"""Where packages of environments come from, as the settings say it. For services, nodes and the command line alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.settings import GIB, Settings
from cluster.errors import HeliostatError
from cluster.storage.objects import ObjectStore
from runtime_envs.budget import Budget
from runtime_envs.bundles.on_node import Fetch
from runtime_envs.bundles.signing import SigningKey, Trust
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.errors import CHANNEL_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.policy import EnvironmentPolicy


def pip_index(settings: Settings) -> PipIndex:
    """The settings' places, else the machine's own pip configuration."""
    cache = settings.data_dir / "cache" / "uv"
    if settings.pip_index_url is None and not settings.pip_find_links:
        return replace(machine_index(), cache_dir=cache)
    return PipIndex(
        cache_dir=cache,
        index_url=settings.pip_index_url,
        find_links=tuple(settings.pip_find_links),
        offline=settings.pip_index_url is None,
    )


def disk_budget(settings: Settings) -> Budget | None:
    allowed = settings.environments.disk_gb
    return None if allowed is None else Budget(int(allowed * GIB))


def conda_places(settings: Settings) -> CondaPlaces:
    allowed = settings.environments
    policy = EnvironmentPolicy(
        channels=allowed.channels,
        denied=frozenset(allowed.denied_packages),
        max_packages=allowed.max_packages,
        max_bytes=int(allowed.max_gb * GIB),
    )
    return CondaPlaces(policy, settings.data_dir / "cache" / "conda", pip_index(settings))


def signing_key(settings: Settings) -> SigningKey:
    return SigningKey(settings.environments.bundle_key_file or settings.data_dir / "keys" / "bundles.pem")


def bundle_trust(settings: Settings) -> Trust:
    return Trust(signing_key(settings).public(), settings.environments.trusted_keys)


def from_storage(storage: ObjectStore) -> Fetch:
    """For packages that came with bundles."""

    def fetch(key: str, target: Path, sha256: str) -> None:
        try:
            storage.get_file(key, target, sha256)
        except HeliostatError as error:
            raise EnvironmentProblem(CHANNEL_FAILED, error.message, hint=error.hint, fixable_by="operator") from None

    return fetch
