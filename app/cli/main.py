"""`heliostat`: the command line. It loads neither torch nor Ray nor the database; `app.cli.command` says what commands share."""

from __future__ import annotations

from app.cli.command import group
from app.cli.commands import (
    base_models,
    channels,
    clusters,
    code,
    context,
    datasets,
    doctor,
    env_bundles,
    env_run,
    environments,
    estimate,
    finetune,
    jobs,
    logs,
    models,
    service,
    simulate,
    tenants,
    tokens,
)

app = group("Fine-tune large language models on your own machines. Start with `heliostat up`.")

# In the order of the help text.
for part in (service, doctor, context):
    part.register(app)
for name, part_app in (
    ("token", tokens.app),
    ("base-model", base_models.app),
    ("dataset", datasets.app),
    ("code", code.app),
):
    app.add_typer(part_app, name=name)
finetune.register(app)
logs.register(jobs.app)
env_run.register(environments.app)
env_bundles.register(environments.app)
for name, part_app in (
    ("jobs", jobs.app),
    ("env", environments.app),
    ("channel", channels.app),
    ("models", models.app),
):
    app.add_typer(part_app, name=name)
for later in (tenants, clusters, estimate, simulate):
    later.register(app)


def main() -> None:
    app(prog_name="heliostat")


if __name__ == "__main__":
    main()
