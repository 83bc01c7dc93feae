"""System calls that no training needs and that kernels have been broken through, as a program for bubblewrap's `--seccomp`.
A deny list: tenants bring libraries that we do not know."""

from __future__ import annotations

import errno
import tempfile
from functools import cache
from types import ModuleType

MOUNTS = """mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick
mount_setattr quotactl quotactl_fd swapon swapoff name_to_handle_at open_by_handle_at"""
NAMESPACES = "unshare setns"
SPYING = "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp perf_event_open userfaultfd"
KERNEL = """bpf io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key kexec_load kexec_file_load
init_module finit_module delete_module reboot syslog acct iopl ioperm modify_ldt vhangup lookup_dcookie"""
CLOCK_AND_NAMES = "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname"
UNBOUNDED = "shmget"
"""System V memory belongs to no process and no tmpfs: nothing here could limit it."""

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: without a user namespace around it, a new one would be a way up."""
FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. Others (vsock, for one) know no network namespace or are never needed."""


def denied() -> tuple[str, ...]:
    return tuple(" ".join((MOUNTS, NAMESPACES, SPYING, KERNEL, CLOCK_AND_NAMES, UNBOUNDED)).split())


@cache
def program() -> bytes | None:
    """The compiled filter; None where libseccomp is missing."""
    library = _library()
    return None if library is None else _compile(library)


def _library() -> ModuleType | None:
    try:
        import pyseccomp  # raises RuntimeError where the C library is missing
    except (ImportError, RuntimeError):
        return None
    return pyseccomp


def _compile(library: ModuleType) -> bytes:
    rules = library.SyscallFilter(library.ALLOW)
    refuse = library.ERRNO(errno.EPERM)
    for name in denied():
        if library.resolve_syscall(library.system_arch(), name) != -1:  # an older library does not know the newest
            rules.add_rule(refuse, name)
    # Its flags lie in memory, where no filter looks; told that it does not exist, libc takes clone.
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")
    for bit in _bits(NAMESPACE_FLAGS):
        rules.add_rule(refuse, "clone", library.Arg(0, library.MASKED_EQ, bit, bit))
    for family in set(range(max(FAMILIES))) - set(FAMILIES):
        rules.add_rule(refuse, "socket", library.Arg(0, library.EQ, family))
    rules.add_rule(refuse, "socket", library.Arg(0, library.GT, max(FAMILIES)))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _bits(flags: int) -> list[int]:
    return [1 << place for place in range(flags.bit_length()) if flags >> place & 1]
