"""
The inside of the sandbox: puts up walls around this process, then runs the program in it.

Started by execution.run_python as `python -I -S -B execution_child.py LIMITS`, never imported.
Each wall is put up where the machine allows it; what stands is told on the first line of stderr:

    limits       rlimits: CPU seconds, address space, file size, open files, no core dump
    namespaces   Linux: user and network namespace, so there is no network device and no root
    mounts       with these: a root of its own, the library read-only and a tmpfs of 64 MiB
    landlock     Linux 5.13: the kernel refuses all files but the library and the own folder
    seccomp      Linux, x86-64 and arm64: the kernel refuses sockets, processes, signals to others
    audit        everywhere: CPython's own hooks refuse the same, with a readable message

None needs a privilege. The audit hook alone keeps accidents out but not a determined attacker
(PEP 578 says so; the frames of a refusal lead to it); the other walls are the kernel's. Where those
of `missing_walls` are not to be had, the program is not run unless LIMITS allows it. Standard
library only. Floor 0.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Where programs may read: Python's own library and the shared libraries its modules load
SYSTEM_READ = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/usr/share/zoneinfo", "/dev/null", "/dev/urandom",
)  # fmt: skip
MAX_FILES = 64  # files one program may open for writing, over its life
DISK = 64 << 20  # bytes all its files may take, where the kernel can be told


def missing_walls(standing: list[str]) -> list[str]:
    """What could get out between the walls that stand; nothing, where the kernel is the judge."""
    walls = {
        "files": {"landlock", "mounts"},
        "network": {"seccomp", "namespaces"},
        "processes": {"seccomp"},
        "CPU and memory": {"limits"},
    }
    return [what for what, any_of in walls.items() if not any_of & set(standing)]


def readable_places() -> list[str]:
    """Existing places a program may read, symbolic links resolved as well as not."""
    own = [os.path.join(p, "lib") for p in {sys.base_prefix, sys.base_exec_prefix}]
    places = [*SYSTEM_READ, *own, *sys.path]
    places += [os.path.realpath(p) for p in places]
    return sorted({p for p in places if p not in ("", "/") and os.path.exists(p)})


def set_limits(cpu_s: int, memory: int, file: int) -> bool:
    """rlimits, hard as well as soft. False where one of them cannot be had (Windows has none)."""
    try:
        import resource
    except ImportError:
        return False
    wanted = {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": memory,
        "RLIMIT_DATA": memory,
        "RLIMIT_FSIZE": file,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,  # root is exempt from this one: seccomp refuses new processes too
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    complete = True
    for name, value in wanted.items():
        try:
            _, hard = resource.getrlimit(getattr(resource, name))
            top = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(getattr(resource, name), (top, top))
        except (AttributeError, ValueError, OSError):
            complete = False  # macOS has no working RLIMIT_AS; the others still hold
    return complete


# -----------------------------------------------------------------------------
# The kernel's walls, by system call number (libc wraps none of these)

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
CLONE_NEWNS = 0x00020000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 2, -100, 0x8000, 1, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442  # the same on every architecture


def unshare(libc: Any, readable: list[str], folder: str) -> list[str]:
    """A user namespace drops root's powers; a network namespace has no device that is up; with a
    mount namespace most files do not exist."""
    uid, gid = os.getuid(), os.getgid()
    network = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC
    if libc.unshare(network | CLONE_NEWNS) != 0:
        return ["namespaces"] if libc.unshare(network) == 0 else []
    try:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
            with open(f"/proc/self/{name}", "w", encoding="ascii") as f:
                f.write(line)
        new_root(libc, readable, folder)
        return ["namespaces", "mounts"]
    except (OSError, KeyError):
        return ["namespaces"]


def new_root(libc: Any, readable: list[str], folder: str) -> None:
    """Changes into a root that holds `readable`, which nobody can write to, and an empty `folder`.

    OSError where the kernel says no, at any step; then the old root is still there."""
    import ctypes
    import struct

    def must(returned: int) -> None:
        if returned != 0:
            raise OSError(ctypes.get_errno(), "no root of its own")

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        must(libc.mount(*(x.encode() for x in (source, target, kind)), flags, options.encode()))

    def read_only(target: str, flags: int) -> None:
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
        place = ctypes.c_char_p(target.encode())
        must(libc.syscall(MOUNT_SETATTR, AT_FDCWD, place, flags, attributes, ctypes.c_size_t(32)))

    root = os.path.join(os.path.dirname(folder), "root")
    os.mkdir(root)
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for place in readable:  # sorted, so a folder comes before what is in it
        target = root + place
        if os.path.exists(target):
            continue
        if os.path.isdir(place):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        mount(place, target, "none", MS_BIND | MS_REC)
        read_only(target, AT_RECURSIVE)
    os.makedirs(root + folder)
    options = f"size={DISK},nr_inodes=4096,mode=700"
    mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    read_only(root, 0)
    os.chdir(root)
    try:
        # pivot_root(2): onto itself, then the old root, which lies on top, is taken off
        must(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."))
        must(libc.umount2(b".", MNT_DETACH))
    finally:
        os.chdir(folder)


def drop_capabilities(libc: Any) -> None:
    """A new user namespace comes with all powers over itself, such as changing the mounts."""
    import struct

    libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


# landlock(7): access rights of ABI 1, and the later ones by the ABI that brought them
LL_EXECUTE, LL_WRITE_FILE, LL_READ_FILE, LL_READ_DIR = 1, 2, 4, 8
LL_ABI1, LL_REFER, LL_TRUNCATE, LL_IOCTL_DEV = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
LL_SPECIAL = 0b111 << 9 | 1 << 6  # make socket, fifo, block or character device: nobody needs to
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture


def landlock(libc: Any, readable: list[str], writable: str) -> bool:
    """Every file access but reading `readable` and reading and writing `writable` is refused."""
    import ctypes
    import struct

    abi = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    handled = LL_ABI1
    for since, right in ((2, LL_REFER), (3, LL_TRUNCATE), (5, LL_IOCTL_DEV)):
        handled |= right if abi >= since else 0
    ruleset = libc.syscall(
        LANDLOCK_CREATE, struct.pack("=Q", handled), ctypes.c_size_t(8), 0
    )  # fs rights only: 8 bytes of the struct are known to every ABI
    if ruleset < 0:
        return False

    def allow(place: str, rights: int) -> None:
        if not os.path.isdir(
            place
        ):  # rights that only make sense for folders are an error on files
            rights &= LL_EXECUTE | LL_WRITE_FILE | LL_READ_FILE | LL_TRUNCATE
        parent = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, parent)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(parent)

    for place in readable:
        allow(place, LL_READ_FILE | LL_READ_DIR)
    allow(writable, handled & ~(LL_EXECUTE | LL_SPECIAL | LL_IOCTL_DEV))
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return bool(done)


# System calls refused, as {architecture: (audit number, {name: number})}
DENIED: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
        "ptrace": 101, "setns": 308, "unshare": 272, "mount": 165, "bpf": 321, "keyctl": 250,
        "add_key": 248, "request_key": 249, "perf_event_open": 298, "userfaultfd": 323,
        "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434, "pidfd_getfd": 438,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "setrlimit": 160, "prlimit64": 302,
        "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "setpgid": 109,
        "setsid": 112, "setpriority": 141, "sched_setaffinity": 203, "memfd_create": 319,
        "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "chmod": 90, "fchmod": 91,
        "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
        "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "umount2": 166, "pivot_root": 155, "chroot": 161, "mount_setattr": 442, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fspick": 433,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "socketpair": 199, "execve": 221, "execveat": 281,
        "ptrace": 117, "setns": 268, "unshare": 97, "mount": 40, "bpf": 280, "keyctl": 219,
        "add_key": 217, "request_key": 218, "perf_event_open": 241, "userfaultfd": 282,
        "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_open": 434, "pidfd_getfd": 438,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "setrlimit": 164, "prlimit64": 261,
        "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "setpgid": 154,
        "setsid": 157, "setpriority": 140, "sched_setaffinity": 122, "memfd_create": 279,
        "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "fchmod": 52,
        "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54, "utimensat": 88,
        "umount2": 39, "pivot_root": 41, "chroot": 51, "mount_setattr": 442, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fspick": 433,
    }),
}  # fmt: skip
CLONE = {"x86_64": 56, "aarch64": 220}  # a thread is a clone with CLONE_THREAD: allowed
KILL = {"x86_64": (62, 234), "aarch64": (129, 131)}  # kill, tgkill: of oneself only
CLONE3, CLONE_THREAD = 435, 0x10000
ALLOW, EPERM, ENOSYS, KILL_PROCESS = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def seccomp(libc: Any) -> bool:
    """A BPF program over (number, arch, arguments): the refused calls fail with EPERM."""
    import ctypes
    import struct

    machine = os.uname().machine
    if machine not in DENIED or sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return False
    arch, denied = DENIED[machine]
    load, equal, at_least, test_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
    number_at, arch_at, argument0_at = 0, 4, 16  # offsets in struct seccomp_data
    # Instructions are (code, jump if true, jump if false, value); jumps count what they skip
    program = [
        (load, 0, 0, arch_at),
        (equal, 1, 0, arch),
        (answer, 0, 0, KILL_PROCESS),  # another architecture's numbers mean other calls
        (load, 0, 0, number_at),
        (at_least, 0, 1, 0x40000000),  # x32, a second set of numbers on x86-64
        (answer, 0, 0, EPERM),
        (equal, 0, 1, CLONE3),  # its flags are behind a pointer: libc falls back to clone
        (answer, 0, 0, ENOSYS),
    ]
    for number in denied.values():
        program += [(equal, 0, 1, number), (answer, 0, 0, EPERM)]
    # Those two judge by their first argument, so they load it, and jump over it otherwise
    program += [
        (equal, 0, 4, CLONE[machine]),
        (load, 0, 0, argument0_at),
        (test_bits, 1, 0, CLONE_THREAD),
        (answer, 0, 0, EPERM),
        (answer, 0, 0, ALLOW),
    ]
    for number in KILL[machine]:
        program += [
            (equal, 0, 4, number),
            (load, 0, 0, argument0_at),
            (equal, 1, 0, os.getpid()),
            (answer, 0, 0, EPERM),
            (answer, 0, 0, ALLOW),
        ]
    program.append((answer, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in program))
    header = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(code))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


def kernel_walls(readable: list[str], folder: str) -> list[str]:
    """Puts up what Linux offers, and returns the names of what stands."""
    if sys.platform != "linux":
        return []
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        standing = unshare(libc, readable, folder)
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of the same user may ptrace or read it
        # Without new privileges, restricting oneself needs none (and setuid programs gain none)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            standing += ["landlock"] if landlock(libc, readable, folder) else []
            drop_capabilities(libc)
            standing += ["seccomp"] if seccomp(libc) else []
        return standing
    except (OSError, AttributeError):
        return []  # a libc without these symbols
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("ctypes", "_ctypes")]:
            del sys.modules[name]


# -----------------------------------------------------------------------------
# The audit hook

DENIED_EVENTS = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
    "os.kill", "os.link", "os.symlink", "os.chdir", "os.fchdir", "os.chmod", "os.chown",
    "os.lchown", "os.setxattr", "os.startfile", "pty.", "ctypes.", "signal.pthread_kill",
    "resource.", "syslog.", "webbrowser.", "urllib.", "ftplib.", "http.client.", "smtplib.",
    "winreg.", "_winapi.", "msvcrt.", "mmap.", "gc.get_", "code.__new__", "sys._current_",
    "cpython.run_", "sys.settrace", "sys.setprofile", "sys.monitoring", "sqlite3.enable_load",
    "fcntl.",
)  # fmt: skip
READ_EVENTS = (
    "os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.listxattr", "os.getxattr", "glob.glob",
    "pathlib.Path.",
)  # fmt: skip
WRITE_EVENTS = (
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "shutil.",
    "tempfile.", "sqlite3.connect", "dbm.open", "shelve.open",
)  # fmt: skip
DENIED_IMPORTS = (
    "ctypes", "_ctypes", "_ctypes_test", "_posixsubprocess", "_testcapi", "_testinternalcapi",
    "_socket", "multiprocessing", "_multiprocessing", "_posixshmem", "_xxsubinterpreters",
    "_interpreters", "_xxinterpchannels", "readline", "faulthandler",
)  # fmt: skip


def install_audit_hook(readable: list[str], folder: str) -> None:
    """Refuses, from here on and for ever, what the program has no business doing.

    The hook uses only names bound here: a program may replace anything in builtins or os."""
    _type, _str, _bytes, _int, _any = type, str, bytes, int, any
    _error, write_flags = PermissionError, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    denied, reads, changes, imports = DENIED_EVENTS, READ_EVENTS, WRITE_EVENTS, DENIED_IMPORTS
    roots = tuple(p.rstrip("/") for p in readable)
    own = tuple({folder, os.path.realpath(folder)})
    opened, most = [0], MAX_FILES

    def inside(path: Any, places: tuple[str, ...]) -> bool:
        if _type(path) is _bytes:
            path = path.decode("utf-8", "surrogateescape")
        if _type(path) is not _str:
            # a file descriptor has been opened already, by way of this hook; a subclass may lie
            return _type(path) is _int or path is None
        parts: list[str] = [] if path[:1] == "/" else own[0].split("/")[1:]
        for part in path.split("/"):  # purely textual: there are no links to follow in own folders
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts = [*parts, part]
        clean = "/" + "/".join(parts)
        return _any(clean == place or clean.startswith(place + "/") for place in places)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & write_flags if _type(flags) is _int else mode not in ("r", "rb")
            if writes and _type(path) is not _int:
                opened[0] += 1
            if not inside(path, own if writes else own + roots) or opened[0] > most:
                raise _error(f"the sandbox does not allow opening {path!r}")
        elif event == "import":
            if args[0] in imports:
                raise _error(f"the sandbox does not allow importing {args[0]}")
        elif event == "object.__setattr__":
            if args[1] in ("__code__", "__globals__", "__closure__"):
                raise _error("the sandbox does not allow rewriting functions")
        elif event.startswith(denied):
            raise _error(f"the sandbox does not allow {event}")
        elif event.startswith(reads) or event.startswith(changes):
            places = own + roots if event.startswith(reads) else own
            for value in args:
                if _type(value) in (_str, _bytes) and not inside(value, places):
                    raise _error(f"the sandbox does not allow {event} of {value!r}")

    sys.addaudithook(hook)


# -----------------------------------------------------------------------------


END_EVENT = "nanochat.end"


def install_end_mark(fd: int, frame: Any) -> None:
    """Makes sys.audit(END_EVENT), called by `frame` itself, write a secret word into the file `fd`.

    A program that reached its end is thus told from one that left early and claims it: the word has
    been read from the file and removed there, and is held only by a hook, which has no frame that a
    program could look into (it never raises), and which gc is not allowed to show."""
    word = os.read(fd, 64)
    os.ftruncate(fd, 0)
    getframe, write, event_name = sys._getframe, os.pwrite, END_EVENT

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == event_name and getframe(1) is frame:
            write(fd, word, 0)

    sys.addaudithook(hook)


def main(limits: dict[str, Any]) -> None:
    """Puts up the walls, then runs the program as __main__."""
    import traceback

    folder = os.getcwd()
    with open(limits["code"], encoding="utf-8", errors="replace") as f:
        source = f.read()
    end_fd = os.open(limits["end"], os.O_RDWR | os.O_CLOEXEC)
    readable = readable_places()
    # Limits first: seccomp refuses to change them
    limited = set_limits(limits["cpu_s"], limits["memory"], limits["file"])
    standing = ["limits"] * limited + kernel_walls(readable, folder)
    if missing_walls(standing) and limits["refused"]:
        os.pwrite(end_fd, os.read(end_fd, 64) + limits["refused"].encode(), 0)
        print("isolation:", *standing, file=sys.stderr, flush=True)
        os._exit(1)
    install_end_mark(end_fd, sys._getframe())
    install_audit_hook(readable, folder)
    standing.append("audit")
    print("isolation:", *standing, file=sys.stderr, flush=True)
    sys.argv, sys.orig_argv = ["program.py"], []
    try:
        # The one purpose of this process; the walls above make it safe
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102
        sys.audit(END_EVENT)
    except MemoryError:
        print("MemoryError: the program wanted more than its share", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
