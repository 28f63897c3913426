"""What is measured of a running server, beside what can be asked of its parts at any time."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Iterable

from events import Event, Transition
from jobs import FINAL_STATES, JobState, Usage
from records import JobTimes
from telemetry.metrics import Counter, Family, Histogram

_RECENT_JOBS = 100
_LAG_PAUSE_SECONDS = 1.0
_LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# from a job of an echo to a simulation of weeks
_JOB_BOUNDS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 86400.0, 604800.0)
_MEMORY_BOUNDS = tuple(float(2**power) for power in range(24, 41, 2))  # 16 MiB to 1 TiB
_NOT_KNOWN = Usage(None, None, None)


class JobInstruments:
    """How jobs ended, how long they waited and ran; follows the feed."""

    def __init__(self) -> None:
        self._finished = Counter(
            "orchestrator_jobs_finished_total",
            "Jobs that ended since the server started, by the state in which they ended.",
            ("service", "state"),
        )
        self._wait = Histogram(
            "orchestrator_job_wait_seconds",
            "Time from a job's upload until its process ran.",
            _JOB_BOUNDS,
            ("service",),
        )
        self._run = Histogram(
            "orchestrator_job_run_seconds",
            "Time from the start of a job's process until its result was stored.",
            _JOB_BOUNDS,
            ("service",),
        )
        self._cpu = Histogram(
            "orchestrator_job_cpu_seconds",
            "CPU time that the processes of a job used, with all that they started.",
            _JOB_BOUNDS,
            ("service",),
        )
        self._memory = Histogram(
            "orchestrator_job_peak_memory_bytes",
            "The most memory that a job used at a time.",
            _MEMORY_BOUNDS,
            ("service",),
        )
        self._waits: dict[str, deque[float]] = {}
        self._runs: dict[str, deque[float]] = {}
        self._cpus: dict[str, deque[float]] = {}
        self._memories: dict[str, deque[float]] = {}

    def begin(self, finished: Iterable[JobTimes]) -> None:
        """Take in jobs that ended before the server started, oldest first, for the medians."""
        for job in finished:
            self._remember(job)

    def follow(self, event: Event) -> None:
        """Take note of what happened."""
        if not isinstance(event, Transition) or event.created_at is None:
            return
        if event.after is JobState.RUNNING:
            self._wait.observe(max(event.at - event.created_at, 0.0), event.service)
        elif event.after in FINAL_STATES:
            self._finished.add(1, event.service, event.after)
            if event.before is JobState.RUNNING and event.started_at is not None:
                self._run.observe(max(event.at - event.started_at, 0.0), event.service)
            used = event.usage or _NOT_KNOWN
            if used.cpu_seconds is not None:
                self._cpu.observe(used.cpu_seconds, event.service)
            if used.peak_memory is not None:
                self._memory.observe(used.peak_memory, event.service)
            times = (event.created_at, event.started_at, event.at)
            self._remember(JobTimes(event.service, *times, used.cpu_seconds, used.peak_memory))

    def median_wait(self, service: str) -> float | None:
        """Return the median wait in seconds of the last jobs that ended, None if unknown."""
        return _median(self._waits.get(service))

    def median_run(self, service: str) -> float | None:
        """Return the median run time in seconds of the last jobs that ended, None if unknown."""
        return _median(self._runs.get(service))

    def median_cpu(self, service: str) -> float | None:
        """Return the median CPU time in seconds of the last jobs that ended, None if unknown."""
        return _median(self._cpus.get(service))

    def median_memory(self, service: str) -> float | None:
        """Return the median of the peak memory in bytes of the last jobs that ended."""
        return _median(self._memories.get(service))

    def families(self) -> tuple[Family, ...]:
        """Return what there is to tell."""
        histograms = (self._wait, self._run, self._cpu, self._memory)
        return self._finished.family(), *(histogram.family() for histogram in histograms)

    def _remember(self, job: JobTimes) -> None:
        if job.started_at is None:
            return
        # clocks are set back at times
        wait = max(job.started_at - job.created_at, 0.0)
        run = max(job.finished_at - job.started_at, 0.0)
        for recent, amount in (
            (self._waits, wait),
            (self._runs, run),
            (self._cpus, job.cpu_seconds),
            (self._memories, job.peak_memory),
        ):
            if amount is not None:
                recent.setdefault(job.service, deque(maxlen=_RECENT_JOBS)).append(amount)


def _median(amounts: deque[float] | None) -> float | None:
    return statistics.median(amounts) if amounts else None


class HttpInstruments:
    """Requests and what was sent in answer, by the path as it is documented."""

    def __init__(self) -> None:
        self._requests = Counter(
            "orchestrator_http_requests_total",
            "Answered requests.",
            ("method", "path", "status"),
        )
        self._sent = Counter(
            "orchestrator_http_response_bytes_total",
            "Bytes of answers, their headers included; /download/{id} has the downloads.",
            ("path",),
        )

    def note(self, method: str, path: str, status: int, sent_bytes: int) -> None:
        """Count an answered request."""
        self._requests.add(1, method, path, str(status))
        self._sent.add(sent_bytes, path)

    def families(self) -> tuple[Family, ...]:
        """Return what there is to tell."""
        return self._requests.family(), self._sent.family()


class Instruments:
    """All instruments of one server. Run :meth:`watch_loop` beside it."""

    def __init__(self) -> None:
        self.jobs = JobInstruments()
        self.http = HttpInstruments()
        self._started_at = time.monotonic()
        self._loop_lag = Histogram(
            "orchestrator_event_loop_lag_seconds",
            "How late a task ran that had asked to be woken, once a second.",
            _LAG_BOUNDS,
        )

    async def watch_loop(self) -> None:
        """Measure how late the event loop is, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PAUSE_SECONDS
            await asyncio.sleep(_LAG_PAUSE_SECONDS)
            self._loop_lag.observe(max(loop.time() - due, 0.0))

    def uptime(self) -> float:
        """Return for how many seconds the server has run."""
        return time.monotonic() - self._started_at

    def families(self) -> tuple[Family, ...]:
        """Return what there is to tell."""
        return (*self.jobs.families(), *self.http.families(), self._loop_lag.family())
