"""
Several hosts on one machine: network namespaces, joined by a bridge as by a switch.

A host has a name, an address, and a network of its own: its processes reach the others through a
veth pair, which can be cut. A mount namespace for each program gives it an /etc/hosts, and folders
that only this host sees, or that it may read but not write. docs/many_machines.md does the same by
hand.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPO

PATIENCE = 240  # seconds for what should take some: CI's machines are slow and loaded
PORT = 29400  # where torchrun's agents meet, in a network of its own


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, encoding="utf-8")


class Host:
    """One machine of a Cluster."""

    def __init__(self, cluster: Cluster, number: int, name: str) -> None:
        self.cluster, self.name, self.address = cluster, name, f"10.77.0.{number}"
        self.namespace = f"{cluster.prefix}-{name}"
        self.link = f"{cluster.prefix}{number}"  # its end of the cable in the switch
        self.private: list[Path] = []  # folders of which it has its own
        self.read_only: list[Path] = []
        switch, inside = cluster.switch, ("ip", "-n", self.namespace)
        run("ip", "netns", "add", self.namespace)
        run(*inside, "link", "add", "eth0", "type", "veth", "peer", self.link, "netns", switch)
        run("ip", "-n", switch, "link", "set", self.link, "master", "bridge", "up")
        run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run(*inside, "link", "set", device, "up")

    def start(
        self, words: Sequence[str], output: Path, variables: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts a program on this host, with what it says in a file."""
        mounts = [f"mount --bind {self.cluster.hosts_file} /etc/hosts"]
        mounts += [f"mount -t tmpfs tmpfs {folder}" for folder in self.private]
        for folder in self.read_only:
            mounts.append(f"mount --bind {folder} {folder}")
            mounts.append(f"mount -o remount,bind,ro {folder}")
        setup = " && ".join([f"hostname {self.name}", *mounts, 'exec "$@"'])
        env = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1", **variables,
        }  # fmt: skip
        with open(output, "wb") as f:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c",
                 setup, "sh", *words],
                env=env, cwd=REPO, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def pids(self, having: str = "") -> list[int]:
        """Its processes, or those of them with some text in their command line."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True
        )
        found = []
        for pid in map(int, said.stdout.split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended since
                continue
            if having in command:
                found.append(pid)
        return found

    def cut(self) -> None:
        """Takes its link down, at the switch: the host itself does not notice."""
        run("ip", "-n", self.cluster.switch, "link", "set", self.link, "down")

    def kill(self) -> None:
        """Ends all its processes at once."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def vanish(self) -> None:
        """As if its power had failed: nobody gets so much as the end of a connection from it."""
        self.cut()
        self.kill()


class Cluster:
    """Hosts a, b, c, ... at 10.77.0.1, .2, .3, ... on one switch."""

    def __init__(self, folder: Path, size: int) -> None:
        self.prefix = f"nc{uuid.uuid4().hex[:6]}"  # a link's name has at most 15 letters
        self.switch = f"{self.prefix}-switch"
        self.hosts: list[Host] = []
        self.hosts_file = folder / "hosts"
        names = "abc"[:size]
        lines = [f"10.77.0.{n} {name}\n" for n, name in enumerate(names, 1)]
        self.hosts_file.write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="utf-8")
        try:
            run("ip", "netns", "add", self.switch)
            run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self.switch, "link", "set", "bridge", "up")
            for number, name in enumerate(names, 1):
                self.hosts.append(Host(self, number, name))
        except (OSError, subprocess.CalledProcessError):
            self.close()
            raise

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        names = [f"{self.prefix}-{name}" for name in ("a", "b", "c", "switch")]
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextmanager
def cluster(folder: Path, size: int) -> Iterator[Cluster]:
    """So many hosts for the length of the block; skips the test where that is not permitted."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the program `{tool}` (Debian: iproute2, util-linux)")
    try:
        made = Cluster(folder, size)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"network namespaces are not permitted here: {e.stderr.strip()}")
    try:
        yield made
    finally:
        made.close()


class Run:
    """scripts.<script> on several hosts under torchrun, which meet at the first of them, or at
    another. `variables` are of the environment."""

    def __init__(
        self,
        hosts: Sequence[Host],
        script: str,
        argv: Sequence[str],
        folder: Path,
        ranks: int = 1,
        nodes: str = "",
        torchrun: Sequence[str] = (),
        meet: Host | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.outputs = {host.name: folder / f"{host.name}.txt" for host in hosts}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        for host in hosts:
            words = [
                sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes or len(hosts)}",
                f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_id=test",
                f"--rdzv_endpoint={(meet or hosts[0]).address}:{PORT}",
                f"--local_addr={host.address}", *torchrun, "-m", f"scripts.{script}", "--", *argv,
            ]  # fmt: skip
            self.agents[host.name] = host.start(words, self.outputs[host.name], variables or {})

    def said(self, host: str) -> str:
        return self.outputs[host].read_text(encoding="utf-8", errors="replace")

    def everything(self) -> str:
        """What all hosts have said, for the message of a test that fails."""
        return "\n".join(f"---- host {name}\n{self.said(name)}" for name in self.outputs)

    def wait(self, *hosts: str) -> list[int]:
        """The exit status of these hosts' torchrun (of all by default), when they have ended."""
        try:
            return [self.agents[h].wait(PATIENCE) for h in hosts or self.agents]
        except subprocess.TimeoutExpired as e:
            raise AssertionError(f"no end after {PATIENCE} s:\n{self.everything()}") from e

    def until(self, there: Callable[[], bool], what: str) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < deadline, f"{what}: not in time\n{self.everything()}"
            ended = [name for name, agent in self.agents.items() if agent.poll() is not None]
            assert len(ended) < len(self.agents), f"{what}: has ended\n{self.everything()}"
            time.sleep(0.1)
