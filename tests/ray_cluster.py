"""A real Ray cluster on this machine: a head and more nodes, with a token, started and ended by their pids.

All processes of a node are known by a variable in their environment, for Ray starts some of them in sessions of their
own; `ray stop` would end everybody's.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

MARK = "XLAB_TEST_CLUSTER"


class Cluster:
    """address: of the head; environment: what a driver needs, the token among it."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ray"))  # a short path: sockets stand in it
        self.token = secrets.token_hex(16)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = os.environ | auth
        self.nodes: dict[str, str] = {}  # name -> the mark of its processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        head = ("--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false")
        said = self.start("head", *head)
        # Ray listens on another address of this machine's, whatever it is told.
        found = re.search(r"Local node IP: (\S+)", said)
        assert found is not None, said
        self.address = f"{found[1]}:{port}"

    def start(self, name: str, *how: str, cpus: int = 2) -> str:
        """A node; without more words one beside the head. -> what Ray says."""
        how = how or (f"--address={self.address}",)
        self.nodes[name] = secrets.token_hex(8)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *how, f"--num-cpus={cpus}", "--num-gpus=0"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000"]
        command += [f"--temp-dir={self.folder}"] if "--head" in how else []
        environment = self.environment | {MARK: self.nodes[name]}
        ran = subprocess.run(command, env=environment, check=True, text=True, timeout=120, capture_output=True)
        return ran.stdout + ran.stderr

    def processes(self, node: str, name: str = "") -> list[int]:
        """The pids of a node, of those processes alone that have `name` in their command."""
        mark, found = f"{MARK}={self.nodes[node]}".encode(), []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = mark in (folder / "environ").read_bytes().split(b"\0")
                if mine and name in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(folder.name))
        return found

    def kill(self, node: str, name: str = "") -> list[int]:
        """SIGKILL for processes of a node; -> which."""
        pids = self.processes(node, name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def close(self) -> None:
        """End what is left of it."""
        for node in self.nodes:
            while self.kill(node):
                time.sleep(0.2)
        shutil.rmtree(self.folder, ignore_errors=True)
