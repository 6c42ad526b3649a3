"""In the place of a Ray node's two agents: says that it listens nowhere, and sleeps as long as its raylet lives.

The agents serve the dashboard, metrics and runtime environments, and a simulation asks them for nothing. A raylet runs
this as a script, with the command line of the agent that it stands for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PORTS = {
    "dashboard": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
    "runtime_env": ("runtime_env_agent_port",),
}
"""What a raylet waits for, by a folder in the agent's path (ray 2.60.0)."""
NOWHERE = "9"  # the discard port: refused at once, were anybody to ask
PR_SET_PDEATHSIG = 1


def replace_agents() -> None:
    """Nodes that this process starts from here on have this module in the place of their agents."""
    from ray._private import services

    def command(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
        if component.endswith("_agent"):
            return [sys.executable, "-I", "-S", __file__]
        return build(component, session_dir, unbuffered)

    build = services._build_python_executable_command_memory_profileable
    services._build_python_executable_command_memory_profileable = command


def write_ports(agent: str, options: Sequence[str]) -> None:
    """The files in which an agent's raylet looks for its ports."""
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    (names,) = (names for folder, names in PORTS.items() if folder in Path(agent).parts)
    for name in names:
        partial = Path(given["session-dir"], f".{name}_{given['node-id']}")
        partial.write_text(NOWHERE)
        partial.rename(partial.with_name(partial.name[1:]))


def main() -> None:
    # Survives the exec: nothing of Python stays in memory.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    write_ports(sys.argv[1], sys.argv[2:])
    os.execvp("sleep", ["sleep", "infinity"])


if __name__ == "__main__":
    main()
