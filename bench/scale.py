"""How large each benchmark is: in a whole run, and in a smoke run that only shows that it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all benchmarks. Times are in seconds, sizes in bytes.

    ``repeats``: of everything that is not sampled more often. ``idle_servers``: how many pairs of
    server and agent idle side by side, each of which is one repeat.
    """

    name: str
    repeats: int
    latency_jobs: int
    throughput_jobs: int
    throughput_users: int
    throughput_connections: int
    throughput_slots: int
    transfer_bytes: int
    result_bytes: int
    backlogs: tuple[int, ...]
    backlog_users: int
    backlog_rounds: int
    decisions: int
    agents: int
    agents_idle_seconds: float
    agents_jobs: int
    idle_servers: int
    idle_seconds: float
    poll_connections: int
    poll_seconds: float
    poll_jobs: int
    dashboards: int
    dashboard_transitions: int
    dashboard_seconds: float
    slurm_jobs: int
    slurm_samples: int


WHOLE = Scale(
    name="whole",
    repeats=5,
    latency_jobs=60,
    throughput_jobs=2000,
    throughput_users=8,
    throughput_connections=16,
    throughput_slots=8,
    transfer_bytes=419_000_000,  # the form around it stays below the limit of 419,430,400
    result_bytes=1_000_000_000,
    backlogs=(1_000, 100_000, 1_000_000),
    backlog_users=1_000,
    backlog_rounds=20,
    decisions=200,
    agents=200,
    agents_idle_seconds=20.0,
    agents_jobs=400,
    idle_servers=5,
    idle_seconds=30.0,
    poll_connections=64,
    poll_seconds=2.0,
    poll_jobs=60,
    dashboards=50,
    dashboard_transitions=50,
    dashboard_seconds=10.0,
    slurm_jobs=100,
    slurm_samples=15,
)

SMOKE = Scale(
    name="smoke",
    repeats=2,
    latency_jobs=3,
    throughput_jobs=12,
    throughput_users=4,
    throughput_connections=4,
    throughput_slots=4,
    transfer_bytes=2_000_000,
    result_bytes=3_000_000,
    backlogs=(20, 100, 1_000),
    backlog_users=10,
    backlog_rounds=2,
    decisions=5,
    agents=8,
    agents_idle_seconds=0.5,
    agents_jobs=12,
    idle_servers=1,
    idle_seconds=0.5,
    poll_connections=8,
    poll_seconds=0.2,
    poll_jobs=6,
    dashboards=3,
    dashboard_transitions=50,
    dashboard_seconds=0.5,
    slurm_jobs=8,
    slurm_samples=2,
)
