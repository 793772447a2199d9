"""What a sandbox lets a program do: tried, not assumed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable


def run(answers: int, host_file: str, port: int) -> None:
    """Reports, as JSON, which of the things that a sandbox has to prevent could be done.

    Args:
        host_file: a file of the host that everybody may read.
        port: of 127.0.0.1 on the host, where somebody listens.
    """

    def start_process() -> None:
        if not os.fork():
            os._exit(0)

    def reach_network() -> None:
        with socket.socket(socket.AF_INET) as connection:
            connection.settimeout(2)
            connection.connect(("127.0.0.1", port))

    def read_host() -> None:
        os.stat(host_file)

    def write_root() -> None:
        os.mkdir("/written")
        os.rmdir("/written")

    def have_privileges() -> None:
        with open("/proc/self/status", encoding="ascii") as file:
            status = file.read().split()
        if not int(status[status.index("CapEff:") + 1], 16):
            raise PermissionError

    tries: dict[str, Callable[[], None]] = {
        "start processes": start_process,
        "reach the network": reach_network,
        "read the host's files": read_host,
        "write to its root folder": write_root,
        "use privileges": have_privileges,
    }
    done = []
    for name, attempt in tries.items():
        try:
            attempt()
        except OSError:
            continue
        done.append(name)
    os.write(answers, json.dumps(done).encode())
