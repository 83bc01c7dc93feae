"""The control process: keeps the scheduler, the importer and the HTTP API of a running Ray cluster as they should be.

Level-triggered: every few seconds it looks at what there is and makes what is missing, so a killed actor, replica or controller
comes back whoever killed it. It holds nothing; the supervisor starts it again when it dies."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import ray
from ray.exceptions import RayError

from app import deploy
from app.importer import ensure_importer
from app.settings import Settings, load_settings
from app.wiring.agent import agent_parts
from app.wiring.importer import importer_parts
from app.wiring.scheduler import scheduler_parts
from cluster.client import ensure_agents, ensure_scheduler
from cluster.errors import HeliostatError

LOOK_EVERY_S = 3.0
NAMESPACE = "heliostat"

log = logging.getLogger("heliostat.control")


def keep(settings: Settings) -> None:
    """One look at everything."""
    ensure_scheduler(scheduler_parts)
    ensure_agents(agent_parts)
    ensure_importer(importer_parts)
    if not deploy.healthy():
        deploy.deploy(settings)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    settings = load_settings()
    ray.init(
        address=f"127.0.0.1:{settings.ray.port}",
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    deploy.deploy(settings)
    while not stopping.is_set():
        try:
            keep(settings)
        except (HeliostatError, RayError, RuntimeError, TimeoutError) as error:
            log.warning("a look failed, the next follows in %s s: %s", LOOK_EVERY_S, error)
        stopping.wait(LOOK_EVERY_S)


if __name__ == "__main__":
    main()
