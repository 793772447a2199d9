"""Limits that the kernel enforces on this process, none of which it can lift again."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
FILE_MIB = 16  # of a file, and of all files in /tmp
_FILES = 64  # open at once
_THREADS = 64
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Numbers of system calls: (x86_64, arm64). Refused are: other processes, programs and their memory; networks; mounts
# and namespaces; memory that no limit counts (shared segments, memory files); and old sources of kernel faults.
_REFUSED = {
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "acct": (163, 89)},
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431)},
    **{"fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "swapon": (167, 224)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280)},
    **{"perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "quotactl": (179, 60)},
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "pidfd_open": (434, 434), "syslog": (103, 116)},
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # place above, and how seccomp calls it
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD, _AF_UNIX = 0x10000, 1


def confine(seconds: float, memory: int, root: Sequence[str] | None) -> None:
    """Limits this process for good.

    Args:
        seconds: of processor time.
        memory: MiB of address space.
        root: paths that the root folder has, read-only; None: bubblewrap has made it.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if root is not None:
        _make_root(libc, root)
        _drop_capabilities(libc)
    limits = {
        resource.RLIMIT_AS: memory * MIB,
        resource.RLIMIT_CPU: math.ceil(seconds),
        resource.RLIMIT_FSIZE: FILE_MIB * MIB,
        resource.RLIMIT_NOFILE: _FILES,
        resource.RLIMIT_NPROC: _THREADS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    _call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if root is not None:
        _go_on_as_child()
    _refuse_system_calls(libc)


def _go_on_as_child() -> None:
    """The first process of a namespace gets few signals, and `unshare` does not say by which one it ended."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def _refuse_system_calls(libc: Any) -> None:
    # On other machines the limits and namespaces have to do; the trial says whether they do.
    if platform.machine() not in _MACHINES:
        return
    place, machine = _MACHINES[platform.machine()]
    load, equal, at_least, any_bit, done = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse = 0x00050000  # with an error number

    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, machine),
        (done, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    if place == 0:  # the second numbering of x86_64
        code += [(at_least, 0, 1, 0x40000000), (done, 0, 0, kill)]
    for number, check, value in (
        (_CLONE[place], any_bit, _CLONE_THREAD),  # threads, but no processes
        (_SOCKET[place], equal, _AF_UNIX),  # asyncio wakes itself through a pair of these
    ):
        code += [
            (equal, 0, 4, number),
            (load, 0, 0, 16),
            (check, 1, 0, value),
            (done, 0, 0, refuse | _EPERM),
            (done, 0, 0, allow),
        ]
    code += [(equal, 0, 1, _CLONE3[place]), (done, 0, 0, refuse | _ENOSYS)]  # the C library then calls clone
    for numbers in _REFUSED.values():
        if (number_here := numbers[place]) is not None:
            code += [(equal, 0, 1, number_here), (done, 0, 0, refuse | _EPERM)]
    code.append((done, 0, 0, allow))
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    _call(libc.prctl, 22, 2, ctypes.c_char_p(program), 0, 0)  # PR_SET_SECCOMP, a filter


def _make_root(libc: Any, paths: Sequence[str]) -> None:
    """A root folder of its own, in namespaces that `unshare` has made: `paths`, /proc, /tmp and a few devices."""
    read_only, no_suid, no_dev, no_exec, remount, bind, private = 1, 2, 4, 8, 32, 4096, (1 << 18) | (1 << 14)
    # Through open files: the new root hides what lies below it.
    sources = {path: os.open(path, os.O_PATH) for path in (*paths, *DEVICES) if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)}
    new = "/tmp"

    def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        told = [None if each is None else os.fsencode(each) for each in (source, target, kind, options)]
        _call(libc.mount, *told[:3], flags, told[3])

    mount(None, "/", None, private)
    mount("tmpfs", new, "tmpfs", no_suid | no_dev, f"mode=755,size={FILE_MIB}m")
    for path, link in links.items():
        os.symlink(link, new + path)
    for path, source in sources.items():
        target = Path(new + path)
        if os.path.isdir(f"/proc/self/fd/{source}"):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount(f"/proc/self/fd/{source}", str(target), None, bind)
        # A namespace may add to what its parent's mounts forbid, and takes nothing away.
        kept = os.statvfs(target).f_flag & (no_suid | no_dev | no_exec)
        device = path in DEVICES
        flags = remount | bind | read_only | no_suid | kept | (0 if device else no_dev)
        mount(None, str(target), None, flags)
        os.close(source)
    for name in ("/proc", "/tmp"):
        os.mkdir(new + name)
    mount("tmpfs", new + "/tmp", "tmpfs", no_suid | no_dev, f"mode=1777,size={FILE_MIB}m")
    # A container that hides parts of its /proc allows no new one; programs can do without.
    with contextlib.suppress(PermissionError):
        mount("proc", new + "/proc", "proc", read_only | no_suid | no_dev | no_exec)
    os.chdir(new)
    if platform.machine() not in _MACHINES:
        raise OSError(_ENOSYS, f"no number of pivot_root is known for {platform.machine()}")
    _call(libc.syscall, _REFUSED["pivot_root"][_MACHINES[platform.machine()][0]], b".", b".")
    _call(libc.umount2, b".", 2)  # the old root, which lies on top of the new one
    mount(None, "/", None, remount | bind | read_only | no_suid | no_dev)
    os.chdir("/tmp")


def _drop_capabilities(libc: Any) -> None:
    for number in range(64):
        libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; fails for the numbers that this kernel does not know
    header = struct.pack("Ii", 0x20080522, 0)
    _call(libc.capset, header, bytes(24))


def _call(function: Any, *arguments: Any) -> None:
    # A number is a word of the machine: the C library reads it as one.
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    if function(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
