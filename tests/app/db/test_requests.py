"""Idempotency keys: one object a key, whoever asks how often, and the first answer again."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders_db import make_job, make_tenant
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update

from app.db.models import IdempotencyKey, Job
from app.db.requests import RequestKey, idempotent
from app.db.session import Database
from cluster.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _tenant(database: Database) -> None:
    with database.platform() as session:
        make_tenant(session)
        make_job(session, output_model="other")  # and with it base model and dataset


def post(database: Database, key: str | None, body: object = None, fails: bool = False) -> str:
    """What a route does: a job and its answer, or the answer of the first."""
    with database.tenant("acme") as session:
        with idempotent(session, RequestKey("acme", "POST /finetune", key, body)) as once:
            if once.replay is not None:
                return str(once.replay["id"])
            first = session.scalars(select(Job).where(Job.output_model == "other")).one()
            job = make_job(session, base_model_id=first.base_model_id, dataset_id=first.dataset_id)
            if fails:
                raise RuntimeError
            once.answer(202, {"id": job.id})
            return job.id


def jobs(database: Database) -> int:
    with database.platform() as session:
        return session.scalar(select(func.count()).where(Job.output_model == "tuned")) or 0


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a race does not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plan=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=8, max_size=24))
def test_concurrent_duplicates_make_one_object(database: Database, plan: list[tuple[int, bool]]) -> None:
    """Some of the attempts fail after their work: they make nothing, and another one takes their turn."""
    with database.platform() as session:
        session.execute(text("DELETE FROM idempotency_keys"))
    before = jobs(database)

    def attempt(which: int, fails: bool) -> tuple[int, str | None]:
        try:
            return which, post(database, f"key-{which}", {"n": which}, fails)
        except RuntimeError:
            return which, None

    with ThreadPoolExecutor(8) as pool:
        answers = [future.result() for future in [pool.submit(attempt, *step) for step in plan]]
    made = {answer for answer in answers if answer[1] is not None}
    assert max(Counter(which for which, _ in made).values(), default=0) <= 1
    assert {which for which, _ in made} >= {which for which, fails in plan if not fails}
    assert jobs(database) - before == len(made)


def test_two_hundred_requests_with_twenty_keys_make_twenty_jobs(database: Database) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda number: post(database, f"key-{number % 20}"), range(200)))
    assert len(set(answers)) == 20 == jobs(database)


def test_another_body_under_the_same_key_is_refused(database: Database) -> None:
    post(database, "k", {"a": 1, "b": 2})
    post(database, "k", {"b": 2, "a": 1})
    with pytest.raises(InvalidRequest) as caught:
        post(database, "k", {"a": 2})
    assert caught.value.code == "idempotency_key_reused" and jobs(database) == 1


def test_without_a_key_each_request_makes_its_own(database: Database) -> None:
    assert post(database, None) != post(database, None)


def test_a_key_is_forgotten_after_a_day(database: Database) -> None:
    first = post(database, "k", {"a": 1})
    with database.platform() as session:
        session.execute(update(IdempotencyKey).values(created_at=func.now() - func.make_interval(0, 0, 0, 0, 25)))
    second = post(database, "k", {"a": 2})
    assert second != first and post(database, "k", {"a": 2}) == second


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb"])
def test_a_strange_key_is_refused(database: Database, key: str) -> None:
    with pytest.raises(InvalidRequest):
        post(database, key)
