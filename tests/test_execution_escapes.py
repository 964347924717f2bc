"""
Ways out of the sandbox, all tried: those that must be refused, those that must end at a limit, and
those that pretend to have succeeded.

Each is tried behind all walls and behind fewer: the kernel's without CPython's hook, without
namespaces, without landlock, and the hook alone. So no wall hides a hole in another.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import ExecutionResult, allow_weak_sandbox, run_python
from tests.conftest import REPO

# Name -> a program that gets out if it runs to its end. {secret}: a file of ours; {folder}: where
# it is; {parent}: our process id; {port}: a TCP server of ours; {unix}, {abstract}: sockets of ours
REFUSED = {
    # first, for what follows opens some
    "inherited files": "assert any(os.pread(fd, 9, 0) for fd in range(3, 64) if is_open(fd))",
    # processes
    "fork": "os.fork() or os._exit(0)",
    "forkpty": "import pty; pty.fork()[0] or os._exit(0)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "subprocess": "import subprocess; subprocess.run([sys.executable, '-c', '1'])",
    "shell": "assert os.system('true') == 0",
    "exec": "os.execv('/bin/true', ['true'])",
    "exec python": "os.execv(sys.executable, [sys.executable, '-c', '1'])",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start()",
    "raw fork": "import ctypes; assert (ctypes.CDLL(None).fork() or os._exit(0)) > 0",
    "raw vfork by number": "syscall(58 if x86 else 9999)",
    "raw clone": "syscall(56 if x86 else 220, 17, 0, 0, 0, 0) or os._exit(0)",
    "raw clone3": "import ctypes; b = ctypes.create_string_buffer(64); syscall(435, b, 64)",
    "exec from memory": "fd = os.memfd_create('a'); os.execve(fd, ['a'], {{}})",
    "leave the session": "os.setsid()",
    "leave the group": "os.setpgid(0, 0)",
    # network
    "tcp": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "tcp server": "import socket; socket.create_server(('127.0.0.1', 0))",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    ".sendto(b'x', ('127.0.0.1', {port}))",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})",
    "abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect({abstract!r})",
    "socketpair": "import socket; socket.socketpair()",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "dns": "import socket; socket.getaddrinfo('localhost', 80)[0]; "
    "socket.create_connection(('localhost', {port}), 2)",
    "http": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)",
    "raw socket call": "syscall(41 if x86 else 198, 2, 1, 0)",
    "io_uring": "import ctypes; syscall(425, 1, ctypes.create_string_buffer(256))",
    # reading
    "secret": "open({secret!r}).read()",
    "secret by os": "os.read(os.open({secret!r}, os.O_RDONLY), 9)",
    "secret by bytes": "open({secret!r}.encode()).read()",
    "secret by relative path": "open(os.path.relpath({secret!r})).read()",
    "secret by a lying string": "import io\nclass S(str): pass\nio.FileIO(S({secret!r}))",
    "secret by raw open": "import ctypes; "
    "assert ctypes.CDLL(None).open({secret!r}.encode(), 0) > 0",
    "folder": "os.listdir({folder!r})",
    "scandir": "list(os.scandir({folder!r}))",
    "home": "os.listdir(os.path.expanduser('~'))",
    "users": "open('/etc/passwd').read()",
    "hosts": "open('/etc/hosts').read()",
    "the parent's environment": "open('/proc/{parent}/environ').read()",
    "the parent's memory": "open('/proc/{parent}/mem', 'rb')",
    "the parent's files": "os.listdir('/proc/{parent}/fd')",
    "the root by proc": "os.listdir('/proc/self/root' + {folder!r})",
    "own command line": "open('/proc/self/cmdline').read()",
    "the sandbox's folder": "os.listdir('../io')",
    "environment variables": "assert 'NANOCHAT_TEST_SECRET' in os.environ",
    "this project": "import nanochat",
    "installed packages": "import numpy",
    # writing
    "write beside": "open({secret!r} + '.new', 'w')",
    "append": "open({secret!r}, 'a').write('x')",
    "truncate": "os.truncate({secret!r}, 0)",
    "remove": "os.remove({secret!r})",
    "rename": "open('mine', 'w').close(); os.rename('mine', {secret!r})",
    "folder outside": "os.mkdir({folder!r} + '/new')",
    "temporary file outside": "open('/tmp/nanochat-escaped', 'w')",
    "shared memory": "open('/dev/shm/nanochat-escaped', 'w')",
    "the library": "open(os.__file__ + 'x', 'w')",
    "symlink": "os.symlink({secret!r}, 'a'); open('a').read()",
    "symlink to the root": "os.symlink('/', 'b'); os.listdir('b' + {folder!r})",
    "hard link": "os.link({secret!r}, 'c')",
    "hard link by proc": "os.link('/proc/self/exe', 'd')",
    "mode": "os.chmod({secret!r}, 0o777)",
    "owner": "os.chown({secret!r}, os.getuid(), os.getgid())",
    "times": "os.utime({secret!r}, (0, 0))",
    "setuid program": "open('e', 'w').close(); os.chmod('e', 0o4755)",
    "device": "os.mknod('f', 0o20600, os.makedev(1, 3))",
    "disk device": "open('/dev/mem', 'rb')",
    "terminal": "open('/dev/tty', 'w')",
    # signals, other processes
    "ask for the parent": "os.kill({parent}, 0)",
    "ask for the parent by ppid": "os.kill(os.getppid() or {parent}, 0)",
    "signal all": "os.kill(-1, 0)",
    "signal the group": "os.killpg(0, 0)",
    "signal by queue": "syscall(129 if x86 else 138, {parent}, 0, 0)",
    "pidfd": "os.pidfd_open({parent})",
    "ptrace": "syscall(101 if x86 else 117, 16, {parent}, 0, 0)",
    "read memory": "import ctypes; b = ctypes.create_string_buffer(64); "
    "syscall(310 if x86 else 270, {parent}, b, 1, b, 1, 0)",
    "the parent's limits": "import resource; resource.prlimit({parent}, resource.RLIMIT_CORE)",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    # powers
    "other user": "os.setuid(12345)",
    "other group": "os.setgroups([12345])",
    "own limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    "namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes; assert "
    "ctypes.CDLL(None).mount(b'none', os.getcwd().encode(), b'proc', 0, None) == 0",
    "unmount": "import ctypes; assert ctypes.CDLL(None).umount2(os.getcwd().encode(), 2) == 0",
    "chroot": "os.chroot('.')",
    "keys": "syscall(250 if x86 else 219, 0, -3, 1)",
    "bpf": "import ctypes; syscall(321 if x86 else 280, 0, ctypes.create_string_buffer(128), 128)",
    "performance counters": "import ctypes; "
    "syscall(298 if x86 else 241, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "system v memory": "syscall(29 if x86 else 194, 0, 4096, 0o1666)",
    "another table of calls": "syscall(0x40000000 + 39)",
}  # fmt: skip

PREAMBLE = """
import json, os, sys
x86 = os.uname().machine == "x86_64"
def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False
def syscall(*args):
    import ctypes
    result = ctypes.CDLL(None, use_errno=True).syscall(*args)
    assert result >= 0, ctypes.get_errno()
    return result
for name, code in json.loads({tries!r}).items():
    try:
        exec(code, dict(globals()))
    except BaseException as e:
        print("refused", name, type(e).__name__, e, flush=True)
    else:
        print("ESCAPED", name, flush=True)
print("all tried")
"""

# Which walls are left, as a replacement for the child
WALLS = {
    "all": "",
    "kernel": "child.install_audit_hook = lambda *a: None",
    "no namespaces": "child.install_audit_hook = lambda *a: None\nchild.unshare = lambda *a: []",
    "no landlock": "child.install_audit_hook = lambda *a: None\nchild.landlock = lambda *a: False",
    "hook": "child.kernel_walls = lambda *a: []",
}
# What needs a wall of the kernel's: no event of CPython's tells of it
KERNEL_ONLY = {"pidfd", "leave the session", "leave the group", "the parent's priority",
               "other user", "other group", "chroot", "terminal", "device"}  # fmt: skip


@pytest.fixture
def walls(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the sandbox's child with fewer walls; skips where this machine has not even those."""
    name = str(request.param)
    use_walls(name, tmp_path, monkeypatch)
    monkeypatch.setattr(execution, "_weak_allowed", name == "hook")
    standing = set(run_python("pass").isolation)
    wanted = {
        "kernel": {"seccomp"}, "no namespaces": {"landlock", "seccomp"},
        "no landlock": {"mounts", "seccomp"},
    }.get(name, set())  # fmt: skip
    if not wanted <= standing:
        pytest.skip(f"this machine offers only: {', '.join(standing)}")
    return name


def use_walls(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a child in place whose missing walls cannot be had."""
    child = folder / "child.py"
    package = str(REPO / "nanochat")
    child.write_text(
        f"import json, sys\nsys.path.insert(0, {package!r})\nimport execution_child as child\n"
        f"del sys.path[0]\n{WALLS[name]}\nchild.main(json.loads(sys.argv[1]))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(execution, "_CHILD", child)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Something to get at: a file, an environment variable, servers."""
    folder = tmp_path / "private"
    folder.mkdir()
    secret = folder / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "secret")
    abstract = f"\0nanochat-{os.getpid()}"
    # A path of a socket has a hundred characters at most
    with tempfile.TemporaryDirectory() as short, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(short + "/s")
        hidden = socket.socket(socket.AF_UNIX)
        hidden.bind(abstract)
        for server in (unix, hidden):
            server.listen()
        yield {
            "secret": str(secret), "folder": str(folder), "parent": os.getpid(),
            "port": tcp.getsockname()[1], "unix": short + "/s", "abstract": abstract,
        }  # fmt: skip
        unix.close()
        hidden.close()


def program_of(tries: dict[str, str], world: dict[str, object]) -> str:
    """One program that tries all of them and says how each went."""
    filled = json.dumps({name: code.format(**world) for name, code in tries.items()})
    return PREAMBLE.replace("{tries!r}", repr(filled))


def lines(text: str, first: str) -> set[str]:
    names = sorted(REFUSED, key=len, reverse=True)
    return {
        next(n for n in names if line.removeprefix(first + " ").startswith(n))
        for line in text.splitlines()
        if line.startswith(first)
    }


linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's walls are Linux's")


@linux
@pytest.mark.parametrize("walls", WALLS, indirect=True)
def test_ways_out_are_refused(walls: str, world: dict[str, object]) -> None:
    assert len(REFUSED) >= 40
    tries = {n: c for n, c in REFUSED.items() if walls != "hook" or n not in KERNEL_ONLY}
    if os.uname().machine != "x86_64":  # numbers that mean nothing elsewhere
        del tries["raw vfork by number"], tries["another table of calls"]
    result = run_python(program_of(tries, world), timeout=30)
    assert result.stdout.endswith("all tried\n"), result
    assert lines(result.stdout, "ESCAPED") == set(), result.stdout
    assert lines(result.stdout, "refused") == set(tries)
    secret = Path(str(world["secret"]))
    assert secret.read_text(encoding="utf-8") == "secret"
    assert os.listdir(str(world["folder"])) == ["secret.txt"]
    assert not Path("/tmp/nanochat-escaped").exists()
    assert not Path("/dev/shm/nanochat-escaped").exists()


@linux
def test_without_the_sandbox_the_ways_are_open(world: dict[str, object], tmp_path: Path) -> None:
    """So the suite tries something: most of it succeeds in a plain interpreter."""
    harmless = {
        name: REFUSED[name]
        for name in (
            "fork", "posix_spawn", "subprocess", "shell", "raw fork", "leave the group", "tcp",
            "tcp server", "udp", "unix socket", "abstract socket", "socketpair", "dns", "secret",
            "secret by os", "secret by bytes", "secret by relative path", "secret by raw open",
            "secret by a lying string", "folder", "scandir", "users",
            "the parent's environment", "the parent's files", "the root by proc",
            "environment variables", "symlink", "hard link", "write beside", "append", "mode",
            "ask for the parent", "ask for the parent by ppid", "pidfd", "the parent's limits",
        )
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program_of(harmless, world)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    refused = lines(done.stdout, "refused")
    assert refused <= {"pidfd", "the parent's environment"}, done.stdout  # old kernels, containers


# -----------------------------------------------------------------------------
# What must end at a limit

ENDLESS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "wait for input": "import select, sys\nwhile True: sys.stdin.read()",
    "regular expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "huge integer": "x = 7 ** 10 ** 8; print(x % 10 ** 9)\nwhile True: x = x * x",
    "threads that spin": "import threading\ndef f():\n    while True: pass\n"
    "[threading.Thread(target=f).start() for _ in range(4)]",
    "ignored signals": "import signal\n"
    "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "alarm games": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: None)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nwhile True: pass",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "no way to the end": "import atexit\ndef f():\n    while True: pass\natexit.register(f)",
    "closed files": "import os\nos.closerange(0, 64)\nwhile True: pass",
}  # fmt: skip
LIMITED = {
    "list": "x = [0] * 10 ** 9",
    "many strings": "x = []\nwhile True: x.append('a' * 10 ** 6)",
    "decompression": "import zlib\nx = zlib.compress(b'x' * 10 ** 7)\n"
    "y = [zlib.decompress(x) for _ in range(1000)]",
    "output": "while True: print('x' * 1000)",
    "output by os": "import os\nwhile True: os.write(2, b'x' * 10 ** 5)",
    "large file": "f = open('a', 'wb')\nwhile True: f.write(b'x' * 10 ** 6)",
    "sparse file": "f = open('a', 'wb'); f.truncate(10 ** 12)",
    "many files": "i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(b'x' * 10 ** 6); i += 1",
    "recursion": "def f(): f()\nf()",
    "deep source": "eval('(' * 10 ** 6)",
    "thread bomb": "import threading, time\nwhile True:\n"
    "    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
}  # fmt: skip


def contained(name: str, code: str, timeout: float) -> ExecutionResult:
    started = time.monotonic()
    result = run_python(code, timeout=timeout, memory_mb=192)
    assert time.monotonic() - started < timeout + 10, name
    assert not result.success and not result.finished, (name, result)
    assert len(result.stdout) <= execution.MAX_OUTPUT + 100
    assert len(result.stderr) <= execution.MAX_OUTPUT + 100
    return result


@linux
@pytest.mark.slow
@pytest.mark.parametrize("walls", ["all", "kernel"], indirect=True)
def test_endless_programs_are_ended(walls: str) -> None:
    for name, code in ENDLESS.items():
        assert contained(name, code, 0.7).timed_out or name == "stopped", name


@linux
@pytest.mark.slow
@pytest.mark.parametrize("walls", ["all", "kernel"], indirect=True)
def test_greedy_programs_are_limited(walls: str) -> None:
    for name, code in LIMITED.items():
        result = contained(name, code, 20)
        assert not result.timed_out, name  # refused at a size, not left to run


@linux
@pytest.mark.parametrize("walls", ["kernel"], indirect=True)
def test_the_disk_is_bounded_by_the_kernel(walls: str) -> None:
    if "mounts" not in run_python("pass").isolation:
        pytest.skip("no mount namespace here, so no disk of its own")
    code = "i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(b'x' * 10 ** 6); i += 1"
    assert "No space left" in run_python(code, timeout=20).stderr
    code = "import os\ni = 0\nwhile True:\n    os.mkdir(f'f{i}'); i += 1"
    assert "No space left" in run_python(code, timeout=20).stderr


@linux
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither processes that outlive the program nor files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = tmp_path / "mark"
    code = f"""
        import os, time, threading
        for i in range(20):
            open(f"f{{i}}", "w").write("x")
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(1)
                    open({str(mark)!r}, "w").write("outlived")
                    os._exit(0)
        except OSError:
            pass
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print(os.getpid())
    """
    result = run_python(textwrap.dedent(code))
    assert result.success, result
    with pytest.raises(ProcessLookupError):
        os.killpg(int(result.stdout), 0)
    time.sleep(1.2)
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# What claims to have succeeded

CLAIMS = {
    "exit": "raise SystemExit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit by the handler": "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
    "the event": "import sys, os; sys.audit('nanochat.end'); os._exit(0)",
    "the event in a thread": "import sys, os, _thread, time\n"
    "_thread.start_new_thread(sys.audit, ('nanochat.end',)); time.sleep(0.2); os._exit(0)",
    "main's frame": "import sys, os\nf = sys._getframe(1)\n"
    "print({k: v for k, v in f.f_locals.items() if isinstance(v, bytes)})\n"
    "exec('import sys; sys.audit(\"nanochat.end\")', f.f_globals)\nos._exit(0)",
    "main again": "import sys, os\nf = sys._getframe(1)\n"
    "try: f.f_globals['main'](f.f_locals['limits'])\nexcept BaseException: pass\nos._exit(0)",
    "the file": "import os\nfor fd in range(3, 64):\n"
    "    try: os.pwrite(fd, b'x' * 16, 0)\n    except OSError: pass\nos._exit(0)",
    "the file, read": "import os\nword = b''\nfor fd in range(3, 64):\n"
    "    try: word += os.pread(fd, 64, 0)\n    except OSError: pass\nassert not word\nos._exit(0)",
    "a jump": "import sys, os\nf = sys._getframe(1)\ndef t(*a): return t\n"
    "try:\n    sys.settrace(t)\n    f.f_trace = t\n    print('JUMPED')\nexcept OSError: pass\n"
    "os._exit(0)",
    "the hooks": "import gc, os\ntry: print('JUMPED', gc.get_objects())\nexcept OSError: pass\n"
    "os._exit(0)",
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_only_the_end_is_the_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_weak_allowed", True)
    result = run_python(CLAIMS[name])
    assert not result.finished, result
    assert "JUMPED" not in result.stdout
    assert run_python("x = 1").finished


def test_a_refusal_cannot_be_faked() -> None:
    """It would end an evaluation, so the program must not be able to claim it."""
    if execution_is_weak():
        pytest.skip("no isolation on this machine")
    code = """
        import os
        for fd in range(3, 64):
            try:
                os.pwrite(fd, b"x" * 16 + b" refused", 0)
            except OSError:
                pass
        os.lseek(2, 0, 0)
        os.ftruncate(2, 0)
        os.write(2, b"isolation: audit\\n")
        os._exit(1)
    """
    assert not run_python(textwrap.dedent(code)).success


def execution_is_weak() -> bool:
    try:
        run_python("pass")
    except UserError:
        return True
    return False


def test_without_isolation_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_walls("hook", tmp_path, monkeypatch)
    monkeypatch.setattr(execution, "_weak_allowed", False)
    mark = tmp_path / "mark"
    with pytest.raises(UserError, match=r"no isolation that the kernel enforces.*--weak_sandbox"):
        run_python(f"print('ran')\nopen({str(mark)!r}, 'w')")
    assert not mark.exists()
    allow_weak_sandbox()
    assert run_python("print('ran')").stdout == "ran\n"
    allow_weak_sandbox(False)
    with pytest.raises(UserError):
        run_python("print('ran')")


def test_a_call_costs_little() -> None:
    """A fifth of a second on an idle core, most of it Python's start; the bound is loose."""
    if execution_is_weak():
        pytest.skip("no isolation on this machine")
    times = []
    for _ in range(5):
        started = time.monotonic()
        assert run_python("x = 1").finished
        times.append(time.monotonic() - started)
    assert min(times) < 2
