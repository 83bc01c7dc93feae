"""Damage through hard links: found, put back from a checked cache, in every environment that shares the file, and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from builders_channel import ChannelServer, conda_yml

from runtime_envs.budget import Budget, keep
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import DAMAGED, EnvironmentProblem
from runtime_envs.materialize import Prepared
from runtime_envs.verify import READY

pytestmark = pytest.mark.integration
SITE = "lib/python3.11/site-packages"


def make(node: Environments, places: CondaPlaces, *conda: str, pip: tuple[str, ...] = ()) -> Prepared:
    return node.materialize(solve_environment(conda_yml(*conda, pip=pip), places).lock)


@pytest.fixture
def three(node: Environments, places: CondaPlaces) -> list[Prepared]:
    """Environments that share greeter 1.0, through the cache too."""
    return [make(node, places, *packages) for packages in (["greeter<2"], ["polite"], ["polite", "big"])]


def flip(path: Path) -> None:
    """In place, keeping size and time: only reading finds it."""
    status, data = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {
    "flip": flip,
    "truncate": truncate,
    "delete": Path.unlink,
}
FILES = {
    "a module": f"{SITE}/greeter.py",
    "byte code of the channel": f"{SITE}/__pycache__/greeter.cpython-311.pyc",
    "the interpreter": "bin/python3.11",
    "a file that holds the prefix": "lib/python3.11/_sysconfigdata__linux_x86_64-linux-gnu.py",
}


def contents(prepared: Prepared) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in prepared.prefix.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_three_share_is_put_back_in_all(
    damage: Callable[[Path], None], node: Environments, three: list[Prepared]
) -> None:
    before = [contents(one) for one in three]
    for name in FILES.values():
        damage(three[0].prefix / name)
    assert set(node.verify(three[0].fingerprint, full=True)) == set(FILES.values())
    in_place = damage is not Path.unlink
    hit = [one for one in three if node.verify(one.fingerprint, full=True)]
    assert len(hit) == (3 if in_place else 1)
    done = node.repair(three[0].fingerprint)
    assert set(done.files) == set(FILES.values()) and done.left == ()
    assert set(done.environments) == {one.fingerprint for one in hit}
    assert [contents(one) for one in three] == before
    for one in three:
        assert node.verify(one.fingerprint, full=True) == node.verify(one.fingerprint, full=False) == []


def test_it_is_fetched_only_when_the_cache_is_damaged_too(
    node: Environments, three: list[Prepared], channel: ChannelServer
) -> None:
    channel.log.clear()
    (three[0].prefix / SITE / "greeter.py").unlink()
    node.repair(three[0].fingerprint)
    assert channel.log == []
    flip(three[0].prefix / SITE / "greeter.py")
    node.repair(three[0].fingerprint)
    assert [path for path in channel.log if "greeter" in path] == ["/noarch/greeter-1.0-py_0.conda"]


def test_byte_code_of_this_node(node: Environments, places: CondaPlaces, three: list[Prepared], tmp_path: Path) -> None:
    """What a channel brings without byte code is compiled here, so it is compiled again."""
    name = f"{SITE}/big/__pycache__/m1.cpython-311.pyc"
    other = make(node, places, "big", pip=("greeter",))
    flip(other.prefix / name)
    node.repair(other.fingerprint)
    for one in (other, three[2]):
        assert node.verify(one.fingerprint, full=True) == []


def test_files_that_nobody_knows_go(node: Environments, three: list[Prepared]) -> None:
    stranger = three[0].prefix / SITE / "stranger.py"
    stranger.write_text("1\n")
    assert node.repair(three[0].fingerprint).files == (f"{SITE}/stranger.py",)
    assert not stranger.exists()


def test_what_pip_brought_is_made_again(node: Environments, places: CondaPlaces) -> None:
    made = make(node, places, pip=("greeter",))
    flip(made.prefix / SITE / "greeter.py")
    node.repair(made.fingerprint)
    assert node.verify(made.fingerprint, full=True) == []


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def metas(prepared: Prepared, name: str) -> Path:
    return next((prepared.prefix / "conda-meta").glob(f"{name}-*.json"))


@pytest.mark.parametrize("meta", ["greeter", "python"])
def test_metadata_that_cannot_be_read(meta: str, node: Environments, three: list[Prepared]) -> None:
    """One inode in what was cloned: with a damaged file beside it that only it can explain, in all of them."""
    flip(three[2].prefix / SITE / "greeter.py")
    zeros(metas(three[2], meta))
    (three[2].prefix / SITE / "big/__pycache__/m1.cpython-311.pyc").unlink()
    node.repair(three[2].fingerprint)
    for one in three:  # what shares them; else its own next check
        if node.verify(one.fingerprint, full=True):
            node.repair(one.fingerprint)
    assert [node.verify(one.fingerprint, full=True) for one in three] == [[]] * 3
    assert (three[0].prefix / SITE / "greeter.py").read_text() == 'VERSION = "1.0"\n'


def test_all_that_share_damaged_metadata_are_made_again(node: Environments, three: list[Prepared]) -> None:
    hit = [one for one in three if metas(one, "numpy").samefile(metas(three[2], "numpy"))]
    assert len(hit) > 1
    zeros(metas(three[2], "numpy"))
    assert set(node.repair(three[2].fingerprint).environments) == {one.fingerprint for one in hit}
    assert [node.verify(one.fingerprint, full=True) for one in three] == [[]] * 3


def test_what_cannot_be_read_is_no_obstacle_to_others(
    node: Environments, places: CondaPlaces, three: list[Prepared], tmp_path: Path
) -> None:
    for one in three:
        zeros(metas(one, "numpy"))
    cached = {path.name for path in (tmp_path / "node" / "pkgs").iterdir()}
    tight = Environments(tmp_path / "node", places.index, Budget(1))
    assert make(tight, places, "greeter>=2").fingerprint in tight.ready()
    assert cached <= {path.name for path in (tmp_path / "node" / "pkgs").iterdir()}  # all of them are used


def test_what_the_manifest_cannot_tell_any_more(node: Environments, three: list[Prepared]) -> None:
    """It is made again from a package that is damaged too."""
    flip(three[0].prefix / SITE / "greeter.py")
    (three[0].prefix.parent / "manifest.json.gz").write_bytes(b"")
    node.repair(three[0].fingerprint)
    assert [node.verify(one.fingerprint, full=True) for one in three] == [[]] * 3


def test_a_prefix_that_is_gone(node: Environments, three: list[Prepared]) -> None:
    shutil.rmtree(three[0].prefix)
    node.repair(three[0].fingerprint)
    assert node.verify(three[0].fingerprint, full=True) == []


def test_not_under_a_job_that_uses_it(node: Environments, places: CondaPlaces) -> None:
    made = make(node, places, pip=("greeter",))
    truncate(made.prefix / SITE / "greeter.py")
    with subprocess.Popen([made.python, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as job:
        with pytest.raises(EnvironmentProblem, match="is being used") as caught:
            node.repair(made.fingerprint)
        job.communicate()
    assert caught.value.code == DAMAGED
    node.repair(made.fingerprint)


def test_the_least_recently_used_goes_first(node: Environments, three: list[Prepared], tmp_path: Path) -> None:
    root, old = tmp_path / "node", 1_700_000_000
    for age, one in enumerate(three):
        os.utime(one.prefix.parent / READY, (old + age, old + age))
    with subprocess.Popen([three[0].python, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as job:
        removed = keep(root, Budget(0), spare={three[2].fingerprint})
        job.communicate()
    assert removed == [three[1].fingerprint]
    assert node.ready() == {three[0].fingerprint, three[2].fingerprint}
    assert keep(root, Budget(0)) == [three[0].fingerprint, three[2].fingerprint]
    assert [path for path in (root / "pkgs").iterdir() if not path.name.startswith(".")] == []


def test_a_new_one_pushes_out_old_ones(places: CondaPlaces, tmp_path: Path) -> None:
    node = Environments(tmp_path / "node", places.index, Budget(1, grace_s=0))
    first, second = make(node, places, "greeter"), make(node, places, "polite")
    assert node.ready() == {second.fingerprint} != {first.fingerprint}
    shutil.rmtree(second.prefix.parent)
