"""Lookups by every kind of reference, pages, and other tenants' objects."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from builders_db import make_base_model, make_dataset, make_environment, make_job, make_tenant
from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db import ids
from app.db.models import Dataset, Environment, Job, Model, ModelVersion
from app.db.repository import PageRequest, Repository
from app.db.session import Database
from app.db.tenants import UIDS, ensure_tenant, set_quota
from app.settings import QuotaSettings
from cluster.errors import InvalidRequest, NotFound, Unavailable


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """The platform's, so that the repository's own filter is what is tested, not row-level security."""
    with database.platform() as session:
        yield session


@pytest.fixture
def acme(session: Session) -> Repository:
    make_tenant(session)
    return Repository(session, "acme")


def make_version(session: Session, model: Model, number: int) -> ModelVersion:
    version = ModelVersion(
        id=f"mv-{model.id}-{number}",
        model_id=model.id,
        tenant_id=model.tenant_id,
        version=number,
        job_id=make_job(session, model.tenant_id).id,
        kind="adapter",
        prefix="p",
        files={},
        metrics={},
        lineage={},
    )
    session.add(version)
    session.flush()
    return version


def make_model(session: Session, tenant: str = "acme", name: str = "tuned") -> Model:
    make_tenant(session, tenant)
    model = Model(id=f"model-{tenant}-{name}", tenant_id=tenant, name=name)
    session.add(model)
    session.flush()
    return model


def test_a_dataset_by_id_name_and_version(session: Session, acme: Repository) -> None:
    first, second = make_dataset(session), make_dataset(session, version=2)
    assert acme.dataset(first.id) == first
    assert acme.dataset("rows") == second
    assert acme.dataset("rows@1") == first
    second.deleted_at = func.now()
    assert acme.dataset("rows") == first
    assert acme.next_version(Dataset, "rows") == 3


def test_a_version_is_compared_with_the_one_of_the_highest_number(session: Session, acme: Repository) -> None:
    """Its transaction may have begun before the others', and waited for their lock."""
    make_environment(session, fingerprint="f1", created_at=datetime(2030, 1, 1, tzinfo=UTC))
    second = make_environment(session, version=2, fingerprint="f2", created_at=datetime(2020, 1, 1, tzinfo=UTC))

    def again(fingerprint: str) -> Environment:
        named = {name: getattr(second, name) for name in ("tenant_id", "name", "spec", "lock", "dependency_md5")}
        row = Environment(id=ids.new_id(ids.ENVIRONMENT), **named, fingerprint=fingerprint)
        return acme.add_version(row, lambda row: row.fingerprint)

    assert again("f2") is second
    assert again("f1").version == 3, "what was meant before is a new version"


@pytest.mark.parametrize("ref", ["none", "rows@3", "rows@x", "rows@²", "rows@", "@", "", "rows@99999999999999999999"])
def test_a_reference_to_nothing_is_not_found(session: Session, acme: Repository, ref: str) -> None:
    make_dataset(session)
    if ref == "rows@":
        assert acme.dataset(ref).name == "rows"
        return
    with pytest.raises(NotFound) as caught:
        acme.dataset(ref)
    assert caught.value.code == "dataset_not_found"


def test_another_tenant_s_objects_are_as_missing(session: Session, acme: Repository) -> None:
    job, rows, env = make_job(session, "rival"), make_dataset(session, "rival"), make_environment(session, "rival")
    model = make_model(session, "rival")
    version = make_version(session, model, 1)
    for look in (
        lambda: acme.job(job.id),
        lambda: acme.dataset(rows.id),
        lambda: acme.dataset("rows"),
        lambda: acme.environment(env.id),
        lambda: acme.model(model.id),
        lambda: acme.model_version(version.id),
        lambda: acme.model_version("tuned@1"),
    ):
        with pytest.raises(NotFound):
            look()
    assert acme.page(Job, PageRequest()).data == []
    with pytest.raises(InvalidRequest):
        acme.page(Job, PageRequest(after=job.id))


def test_a_model_by_version_and_alias(session: Session, acme: Repository) -> None:
    model = make_model(session)
    one, two = make_version(session, model, 1), make_version(session, model, 2)
    assert (acme.model_version("tuned"), acme.model_version("tuned@1")) == (two, one)
    assert acme.model_version(f"{model.id}@2") == two
    acme.set_alias(one, "prod")
    assert acme.model_version("tuned@prod") == one
    acme.set_alias(two, "prod")
    assert acme.model_version("tuned@prod") == two
    with pytest.raises(NotFound):
        acme.model_version("tuned@canary")


def test_base_models_belong_to_all(session: Session, acme: Repository) -> None:
    base = make_base_model(session, "llama-7b")
    assert acme.base_model("llama-7b") == acme.base_model(base.id) == base
    with pytest.raises(NotFound):
        acme.base_model("llama-8b")


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_show_every_row_once_in_order(session: Session, acme: Repository, newest_first: bool) -> None:
    """All of one transaction, so of one time: the id decides."""
    made = {make_dataset(session, name=f"d{number}").id for number in range(7)}
    make_dataset(session, "rival")
    seen: list[str] = []
    more = True
    while more:
        page = acme.page(Dataset, PageRequest(seen[-1] if seen else None, limit=3, newest_first=newest_first))
        seen += [row.id for row in page.data]
        more = page.has_more
    assert set(seen) == made and len(seen) == 7
    assert seen == sorted(seen, reverse=newest_first)


def test_a_page_can_be_filtered(session: Session, acme: Repository) -> None:
    make_job(session, state="running")
    queued = make_job(session)
    assert acme.page(Job, PageRequest(), Job.state == "queued").data == [queued]


def test_each_tenant_has_a_user_id_of_its_own(session: Session) -> None:
    one, two = ensure_tenant(session, "one"), ensure_tenant(session, "user_456")
    assert {one.uid, two.uid} == {UIDS.start, UIDS.start + 1}
    assert ensure_tenant(session, "one").uid == one.uid
    assert set_quota(session, "one", QuotaSettings(max_queued_jobs=3)).max_queued_jobs == 3
    moved = range(70_000, 70_001)  # by an operator, later: others keep theirs
    assert ensure_tenant(session, "three", uids=moved).uid == 70_000
    with pytest.raises(Unavailable, match="70000 to 70000"):
        ensure_tenant(session, "four", uids=moved)


@pytest.mark.parametrize("name", ["", "../x", "a b", "-a", "a" * 65, "ä"])
def test_what_cannot_be_a_tenant_is_refused(session: Session, name: str) -> None:
    with pytest.raises(InvalidRequest):
        ensure_tenant(session, name)
