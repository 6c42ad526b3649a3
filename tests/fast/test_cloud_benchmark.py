"""What `benchmarks/cloud.py` makes of its trials' clocks, and what stands in the place of Ray's agents."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    get_port_filename,
)

from benchmarks import absent_agent
from benchmarks.cloud import busy_share, full_span
from benchmarks.sweeps import Work

NODE = "ab" * 28
WORKS = [Work("a", 0.0, 10.0), Work("b", 2.0, 12.0), Work("c", 11.0, 21.0), Work("d", 12.0, 22.0)]


def test_gpus_are_busy_for_the_share_of_the_slots_time_that_trials_worked() -> None:
    assert busy_share(WORKS, 2, 0.0, 22.0) == pytest.approx(40 / 44)
    assert busy_share(WORKS, 2, 5.0, 11.0) == pytest.approx(11 / 12)


def test_the_slots_are_full_from_the_last_ones_first_trial_until_no_trial_waits() -> None:
    assert full_span(WORKS, 2) == (2.0, 12.0)


@pytest.mark.parametrize(
    ("agent", "names"),
    [
        (
            "ray/dashboard/agent.py",
            [METRICS_AGENT_PORT_NAME, METRICS_EXPORT_PORT_NAME, DASHBOARD_AGENT_LISTEN_PORT_NAME],
        ),
        ("ray/_private/runtime_env/agent/main.py", [RUNTIME_ENV_AGENT_PORT_NAME]),
    ],
)
def test_an_absent_agent_writes_the_ports_that_its_raylet_waits_for(
    tmp_path: Path, agent: str, names: list[str]
) -> None:
    absent_agent.write_ports(agent, [f"--session-dir={tmp_path}", f"--node-id={NODE}", "--head", "--log-dir=/a=b"])
    assert {file.name for file in tmp_path.iterdir()} == {get_port_filename(NODE, name) for name in names}
    assert {file.read_text() for file in tmp_path.iterdir()} == {absent_agent.NOWHERE}
