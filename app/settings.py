"""All settings, in one place: a TOML file, over it `HELIOSTAT_*` variables (nested keys with two underscores)."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator
from pydantic_settings import (
    BaseSettings,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cluster.core.policy import Policy
from runtime_envs.sandbox.spec import Limits

GIB = 1024**3


class HttpSettings(BaseModel):
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free port (`--port auto`)."""
    replicas: int = 1
    max_body_bytes: int = 1024**2
    """JSON bodies."""
    max_upload_bytes: int = 1 * GIB
    public_url: str | None = None


class DatabaseSettings(BaseModel):
    dsn: str | None = None
    """postgresql://…; None: the embedded server under the data folder."""
    pool_size: int = 10


class RaySettings(BaseModel):
    port: int = 0
    """GCS; 0: any free port. So for the others."""
    dashboard_port: int = 0
    temp_dir: Path | None = None
    """Must be short: Ray puts unix sockets there (107 characters at most)."""


class NodeDeclaration(BaseModel):
    """What this machine offers; None: detect."""

    kind: str | None = None
    slots: int | None = None
    memory_gb: float | None = None
    """GiB per slot."""
    market: Literal["on_demand", "spot"] = "on_demand"
    region: str = ""
    price_per_hour: float = Field(0.0, ge=0)
    """USD for one slot; 0: not known, and then no budget in USD."""
    park_gb: float | None = Field(None, ge=0)
    """GiB of host memory for jobs that have lost their turn; None: by the machine's memory."""
    notice_file: Path | None = None
    """What the provider's agent writes when the machine will be taken away; see `cluster.ports.NodeSettings`."""


class AuthSettings(BaseModel):
    issuer: str = "heliostat"
    audience: str = "heliostat"
    builtin: bool = True
    jwks_url: str | None = None
    """An OIDC issuer's keys, https (http only on 127.0.0.1)."""
    tenant_claim: str = "tenant"
    leeway_s: int = 30


class QuotaSettings(BaseModel):
    """Defaults for new tenants."""

    max_queued_jobs: int = 1000
    max_slots: int | None = None
    gpu_hours_per_month: float | None = None


class SchedulerTimes(BaseModel):
    lease_ttl_s: float = 30.0
    margin_s: float = 10.0
    poll_s: float = 2.0
    stage_limit_s: float = 900.0
    max_fruitless_attempts: int = 3
    """Attempts in a row without a new checkpoint or step before a job is given up."""
    quantum_s: float = Field(300.0, gt=0)
    """A turn's least length before a job can lose its slots to one that deserves them more."""
    min_run_s: float = Field(120.0, ge=0)
    """Nobody is stopped earlier, not even for an urgent job."""
    look_s: float = Field(300.0, gt=0)
    """While anybody waits, it is looked so often at what runners deserve, which falls as they run. Less is kinder to newcomers on a
    few slots; on a public trace of 64 nodes 60 gave a third more switches and 1 % longer jobs than 300."""
    park_max_s: float = Field(1800.0, ge=0)
    """A job that has been parked so long writes a checkpoint and ends, so that it can go on elsewhere."""
    reserve_after_s: float = Field(300.0, ge=0)
    """A gang that has waited so long has free slots kept for it."""
    yield_grace_s: float = Field(60.0, gt=0)
    """For a job to park; then for it to write a checkpoint and end; then it is killed."""
    ahead: int = Field(2, ge=0)
    """So many waiting jobs each node prepares for: environment, model and rows on its disk, and on `cpu` the imports done, at
    a low priority; 0: none."""

    def policy(self) -> Policy:
        shared = {one.name for one in fields(Policy)} & set(type(self).model_fields)
        return Policy(**{name: getattr(self, name) for name in shared})


class TrainingSettings(BaseModel):
    checkpoint_every_s: float = 60.0
    exact_match_rows: int = 200
    max_nodes: int = Field(1, ge=1)
    """Of one training (`resource_config.num_nodes`). The sandboxes of one that spans nodes share their network, and with it the
    ports that the cluster has there: more than 1 only where that is walled in, or tenants are trusted."""
    stage_base_models: list[str] = []
    """Names of base models that every node keeps on its disk, also before a job needs them there; `*`: all of them."""
    start_early: bool = True
    """The node's agent starts a training process as soon as its job has slots, or still waits for them (`scheduler.ahead`); else
    Ray's worker does, when it is there, and nodes prepare nothing for jobs that wait."""


class EnvironmentSettings(BaseModel):
    """What tenants' conda environments may be made of."""

    channels: dict[str, str] = {"conda-forge": "https://conda.anaconda.org/conda-forge"}
    """The names that an environment.yml may use → where each is: a URL, of a mirror too, or `file://` a folder that
    `heliostat channel build` made. No passwords: locks name these places."""
    denied_packages: list[str] = []
    """By their name on conda or pip, however it is spelt. Neither named in a file nor brought by what is."""
    max_packages: int = Field(1000, ge=1)
    max_gb: float = Field(30.0, gt=0)
    """GiB of packages, compressed, of one environment. A wheel of an index that does not tell sizes counts nothing."""
    disk_gb: float | None = Field(None, gt=0)
    """GiB on each node for environments and their caches; what was not used for longest goes first, what a job uses stays.
    None: as much as there is."""
    full_check_at: str | None = Field("03:00", pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    """HH:MM of a node's clock: all of its environments are read and repaired each day, some minutes later on each node. None:
    only when asked for."""
    bundle_key_file: Path | None = None
    """The Ed25519 key (PEM) that signs bundles, the same for all replicas; None: `keys/bundles.pem` under the data folder."""
    trusted_keys: dict[str, str] = {}
    """Whose bundles may be imported beside our own: a name → the public key (Base64) that the refusal tells."""
    max_bundle_gb: float = Field(20.0, gt=0)
    """GiB of one that is sent to us."""

    @field_validator("channels")
    @classmethod
    def _without_passwords(cls, channels: dict[str, str]) -> dict[str, str]:
        if named := [name for name, url in channels.items() if urlsplit(url).username]:
            raise ValueError(f"the URL of channel {named[0]} holds a user name or a password")
        return channels


class SandboxSettings(BaseModel):
    """Of each training child."""

    first_uid: int = Field(30_000, ge=1_000)
    last_uid: int = Field(59_999, ge=1_000)
    """Tenants' own users, where the platform runs as root: nobody else's on any node. Below 65536, so that they exist in
    rootless containers too; above where a distribution puts people's accounts. Tenants keep what they have."""
    tmp_gb: float = Field(4.0, gt=0)
    """GiB of its /tmp, where HOME and all caches are; memory, as /dev/shm is."""
    shm_gb: float = Field(2.0, gt=0)
    file_gb: float = Field(256.0, gt=0)
    """GiB of one file that it writes."""
    processes: int = Field(4096, ge=64)
    """And threads, of a tenant's jobs on one node together, where the platform runs as root; else of all tenants."""
    open_files: int = Field(4096, ge=64)

    @property
    def uids(self) -> range:
        return range(self.first_uid, self.last_uid + 1)

    def limits(self) -> Limits:
        return Limits(
            tmp_bytes=int(self.tmp_gb * GIB),
            shm_bytes=int(self.shm_gb * GIB),
            file_bytes=int(self.file_gb * GIB),
            processes=self.processes,
            open_files=self.open_files,
        )


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HELIOSTAT_", env_nested_delimiter="__", extra="forbid")

    profile: Literal["laptop", "production"] = "laptop"
    data_dir: Path = Field(default_factory=lambda: Path.home() / ".heliostat")
    storage_url: str | None = None
    """Folder or s3://bucket/prefix; None: `objects` under the data folder."""
    isolation: Literal["required", "preferred", "off"] = "preferred"
    """Of tenants' code. `preferred`: as much as the host can do, with a warning in the job's events where that is nothing."""
    gpu_type_fallback: Literal["any", "none"] = "none"
    pip_index_url: str | None = None
    """Where tenants' packages come from; None: the machine's own pip settings."""
    pip_find_links: list[str] = []
    http: HttpSettings = HttpSettings()
    database: DatabaseSettings = DatabaseSettings()
    ray: RaySettings = RaySettings()
    node: NodeDeclaration = NodeDeclaration()
    auth: AuthSettings = AuthSettings()
    quota: QuotaSettings = QuotaSettings()
    scheduler: SchedulerTimes = SchedulerTimes()
    training: TrainingSettings = TrainingSettings()
    sandbox: SandboxSettings = SandboxSettings()
    environments: EnvironmentSettings = EnvironmentSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(CONFIG_VARIABLE)
        if not file:
            return (init_settings, env_settings)
        # The supervisor's resolved file is JSON: written by a program, read by its children.
        reader = JsonConfigSettingsSource if file.endswith(".json") else TomlConfigSettingsSource
        return (init_settings, env_settings, reader(settings_cls, Path(file)))

    # Places under the data folder, named once.
    @property
    def objects_url(self) -> str:
        return self.storage_url or str(self.data_dir / "objects")

    @property
    def node_root(self) -> Path:
        return self.data_dir / "node"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def postgres_dir(self) -> Path:
        return self.data_dir / "postgres"

    @property
    def issuer_key_file(self) -> Path:
        return self.data_dir / "keys" / "issuer.json"


CONFIG_VARIABLE = "HELIOSTAT_CONFIG_FILE"
"""Names the file; every process that the supervisor starts inherits the name of the resolved one."""


def load_settings(file: Path | None = None, **overrides: Any) -> Settings:
    """Raises pydantic.ValidationError; a missing file raises FileNotFoundError."""
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(file)
        os.environ[CONFIG_VARIABLE] = str(file)
    return Settings(**overrides)
