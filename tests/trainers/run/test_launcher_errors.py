"""Whatever Ray answers, the scheduler hears one of: alive, gone, cannot tell, unavailable."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RaySystemError, RuntimeEnvSetupError

from cluster.errors import Unavailable
from trainers.run.launch import RayDriverLauncher


class Actor:
    class ping:
        @staticmethod
        def remote() -> None: ...


def raising(error: Exception) -> Any:
    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    return raise_it


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> RayDriverLauncher:
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: Actor)
    return RayDriverLauncher(lambda: pytest.fail("not here"))


@pytest.mark.parametrize(
    ("error", "alive"),
    [(ActorDiedError(), False), (GetTimeoutError("late"), None), (RuntimeEnvSetupError("no room"), None)],
)
def test_what_a_ping_means(
    launcher: RayDriverLauncher, monkeypatch: pytest.MonkeyPatch, error: Exception, alive: bool | None
) -> None:
    monkeypatch.setattr(ray, "get", raising(error))
    assert launcher.alive("j", 1) is alive


@pytest.mark.parametrize("error", [RaySystemError("no GCS"), GetTimeoutError("late")])
def test_a_silent_ray_is_unavailable(
    launcher: RayDriverLauncher, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(ray, "remote", raising(error))
    monkeypatch.setattr(ray, "get_actor", raising(error))
    for ask in (launcher.start, launcher.end):
        with pytest.raises(Unavailable) as caught:
            ask("j", 1)
        assert caught.value.code == "ray_unavailable"
