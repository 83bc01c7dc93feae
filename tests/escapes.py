"""What hostile code tries from inside a sandbox. Standard library only: it runs as a script, and as a tenant's package.

Each attack returns what it got, or raises OSError, which is what should happen. `TARGETS` (JSON) says what lies outside."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

# ruff: noqa: ANN001, ANN201, ANN202, PTH115, PTH123, PTH208, SIM115, RUF005, C409

TARGETS = {}
SAYS = "ESCAPES "
CLONE_NEWUSER = 0x10000000
SYSCALLS = {"mount": 165, "ptrace": 101, "bpf": 321, "keyctl": 250, "io_uring_setup": 425, "clone3": 435, "shmget": 29}
DEVICES = ("vda", "mem", "kmsg", "fuse", "kvm", "net/tun", "loop-control")
VSOCK = 40
_libc = ctypes.CDLL(None, use_errno=True)


def attempt(attacks):
    """{name: "held: why" or "ESCAPED: with what"}."""
    return {attack.__name__: _outcome(attack) for attack in attacks}


def _outcome(attack):
    try:
        got = attack()
    except OSError as error:
        return f"held: {error}"
    return f"ESCAPED: {got!r}" if got else "held: nothing there"


def say(results):
    print(SAYS + json.dumps(results), flush=True)


def targets(kind):
    return TARGETS.get(kind, [])


def other_files():
    """Of other tenants, the platform's keys and settings, the system's secrets."""
    return [
        path for path in [*targets("files"), "/etc/shadow", "/root/.bashrc"] if _works(lambda path=path: open(path))
    ]


def kernel_settings():
    names = (
        "sys/kernel/core_pattern",
        "sys/kernel/modprobe",
        "sys/vm/overcommit_memory",
        "sysrq-trigger",
        "self/oom_score_adj",
    )
    writable = [name for name in names[:-1] if _works(lambda name=name: open(f"/proc/{name}", "w"))]
    return (
        writable + ["oom_score_adj"]
        if _works(lambda: Path("/proc/self/oom_score_adj").write_text("-900"))
        else writable
    )


def ports():
    return [
        port for port in targets("ports") if _works(lambda port=port: socket.create_connection(("127.0.0.1", port), 2))
    ]


def addresses():
    """The host's own, the cloud's metadata service, any name."""
    wanted = [*targets("hosts"), ("169.254.169.254", 80), ("1.1.1.1", 53)]
    return [host for host in wanted if _works(lambda host=host: socket.create_connection(tuple(host), 2))]


def abstract_sockets():
    def connect(name):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect("\0" + name)

    return [name for name in targets("abstract") if _works(lambda name=name: connect(name))]


def odd_sockets():
    kinds = {"vsock": (VSOCK, socket.SOCK_STREAM), "packet": (socket.AF_PACKET, socket.SOCK_RAW), "alg": (38, 5)}
    kinds["raw"] = (socket.AF_INET, socket.SOCK_RAW)
    return [name for name, kind in kinds.items() if _works(lambda kind=kind: socket.socket(*kind).close())]


def tokens():
    """Variables of this process, and of those that made it."""
    words = ("_TOKEN", "RAY_", "AWS_", "HELIOSTAT_DATABASE", "PASSWORD")
    found = [name for name in os.environ if any(word in name for word in words)]
    for pid in ("1", str(os.getppid())):
        with contextlib.suppress(OSError):
            told = Path(f"/proc/{pid}/environ").read_text()
            found += [f"{word} of {pid}" for word in words if word in told]
    return found


def descriptors():
    """All that was open when this process began: its output, its control socket."""
    kept = {0, 1, 2, int(os.environ.get("HELIOSTAT_CONTROL_FD", "-1"))}
    links = {}
    for name in set(map(int, os.listdir("/proc/self/fd"))) - kept:
        with contextlib.suppress(OSError):
            links[name] = os.readlink(f"/proc/self/fd/{name}")
    ours = tuple([sys.prefix, sys.base_prefix, "/usr/", "/proc/self/fd", f"/proc/{os.getpid()}/fd"])
    return {fd: link for fd, link in links.items() if not link.startswith(ours)}


def processes():
    """Anybody but this process, its parents and its children."""
    names = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdecimal():
                names.append(Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[0].decode())
    strangers = [
        name for name in names if any(word in name for word in ("raylet", "gcs_server", "postgres", "systemd"))
    ]
    killable = [pid for pid in targets("pids") if _works(lambda pid=pid: os.kill(pid, 0))]
    return strangers + killable


def become_root():
    for become in (os.setuid, os.setgid, os.seteuid):
        if _works(lambda become=become: become(0)):
            return become.__name__
    status = Path("/proc/self/status").read_text()
    told = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    powers = [name for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb") if int(told[name], 16)]
    return powers + ([] if told["NoNewPrivs"] == "1" else ["new privileges"])


def setuid_programs():
    """Folders where such a program would run as its owner."""
    return [place for place in ("/usr", "/tmp", "/", sys.prefix) if not os.statvfs(place).f_flag & os.ST_NOSUID]


def namespaces():
    made = [name for name in ("user", "mnt", "net", "pid") if _works(lambda name=name: _unshare(name))]
    pid = _libc.syscall(56, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0)
        made.append("clone")
    return made


def _unshare(name):
    flags = {"user": CLONE_NEWUSER, "mnt": 0x20000, "net": 0x40000000, "pid": 0x20000000}
    if os.fork() == 0:
        os._exit(_libc.unshare(flags[name]) and 1)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        raise PermissionError(name)


def system_calls():
    """What came back was neither "not permitted" nor "no such call"."""
    taken = []
    for name, number in SYSCALLS.items():
        ctypes.set_errno(0)
        if _libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38):
            taken.append(name)
    return taken


def read_only_places():
    """Its own environment, the shipped code, the model, the data, the root, the devices."""
    own = [str(Path(sys.executable).parent), os.environ.get("PYTHONPATH", "/usr").split(":")[0]]
    places = ["/", "/usr/bin", "/etc", "/dev", "/root", *own, *targets("read_only")]
    return [place for place in places if _works(lambda place=place: open(f"{place}/planted", "w"))]


def devices():
    found = [name for name in DEVICES if _works(lambda name=name: os.open(f"/dev/{name}", os.O_RDONLY))]
    return found + (["mknod"] if _works(lambda: os.mknod("/tmp/disk", 0o660 | 0o060000, os.makedev(254, 0))) else [])


def full_tmpfs():
    """Bytes that its temporary folders took together, when that is more than they may."""
    taken = sum(_fill(folder) for folder in ("/tmp", "/dev/shm"))
    return taken if taken > TARGETS["tmpfs_bytes"] else 0


def _fill(folder):
    taken, block, path = 0, bytes(1 << 20), Path(folder, "filler")
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            taken += file.write(block)
    path.unlink()
    return taken


def fork_bomb():
    """How many processes it got, when that is more than it may."""
    children = []
    try:
        while len(children) <= TARGETS["processes"]:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except BlockingIOError:
        pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return len(children) if len(children) > TARGETS["processes"] else 0


def leave_somebody_behind():
    """A daemon without its parent's variables and session; the test looks whether it outlives the job."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            command = [sys.executable, "-S", "-c", "import time; time.sleep(600)", TARGETS["marker"]]
            os.execve(sys.executable, command, {})
        os._exit(0)
    os.wait()


def hog_memory():
    """In a process that the training itself does not look at; until somebody ends it."""
    if os.fork() == 0:
        kept = []
        while True:
            kept.append(bytearray(b"x") * (64 << 20))
            time.sleep(0.05)


def link_outputs():
    """Each folder that gets its name has links in it at once, to what is not its own."""
    rename = Path.rename

    def and_link(self, target):
        renamed = rename(self, target)
        for file in Path(target).glob("*.safetensors"):
            file.unlink()
            file.symlink_to(TARGETS["files"][0])
        return renamed

    Path.rename = and_link


LOOKING = (
    *(other_files, kernel_settings, ports, addresses, abstract_sockets, odd_sockets, tokens, descriptors, processes),
    *(become_root, setuid_programs, namespaces, system_calls, read_only_places, devices),
)
GREEDY = (full_tmpfs, fork_bomb)


def _works(try_it):
    try:
        got = try_it()
    except OSError:
        return False
    if hasattr(got, "close"):
        got.close()
    return True


def on_import():
    """As a tenant's package: attacks at once, and again in the rank, while it trains."""
    if TARGETS["attack"] == "look":
        say(attempt(LOOKING))
        _with_first_step(lambda: say(attempt([*(one for one in LOOKING if one is not descriptors), *GREEDY])))
    elif TARGETS["attack"] == "leave":
        leave_somebody_behind()
    elif TARGETS["attack"] == "hog":
        _with_first_step(hog_memory)
    elif TARGETS["attack"] == "link":
        link_outputs()


def _with_first_step(attack):
    launcher, hooks = os.getpid(), []

    def in_child():
        if os.getppid() == launcher and "torch.optim.optimizer" in sys.modules:
            register = sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook
            hooks.append(register(lambda *_: hooks and (hooks.pop().remove(), attack())))

    os.register_at_fork(after_in_child=in_child)


if __name__ == "__main__":
    TARGETS.update(json.loads(sys.argv[1]))
    say(attempt([*LOOKING, *GREEDY]))
