"""What each isolation adds to a trivial job: ``isolation``, for those that can be had here."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from bench import client, container_image
from bench.client import Connection
from bench.measure import Figure, Floor, Unit, milliseconds, ratio_at_most, server_memory
from bench.processes import Stage
from bench.scale import Scale

_SLOTS = 2
_WARM_UP_JOBS = 3
_PLAIN = "plain"
_WITH_TARGET = "example"
_SERVICES = (_PLAIN, _WITH_TARGET, "bubblewrap", "podman")
_ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.1


async def isolation(stage: Stage, scale: Scale) -> list[Figure]:
    """Time the same job with each isolation in turn, so that all have the same machine."""
    with container_image.made_in(stage.directory):
        return await _measure(stage, scale)


async def _measure(stage: Stage, scale: Scale) -> list[Figure]:
    server = await stage.server()
    options = ("--allow-root-jobs", "--services", ",".join(_SERVICES))
    # the benchmarks are often run as root, who must say that that is meant
    await stage.agent(server, _SLOTS, options=options)
    services, default = await _offered(server.url)
    order = random.Random(1)
    samples: dict[str, list[float]] = {service: [] for service in services}
    async with client.connected(server.url) as connection:
        for service in services:
            for _ in range(_WARM_UP_JOBS):
                await _time_job(connection, server.url, service)
        for _ in range(scale.latency_jobs):
            # in another order each time: what one leaves to be tidied up, the next one pays for
            for service in order.sample(services, len(services)):
                samples[service].append(await _time_job(connection, server.url, service))
    floor = Floor("the same without an isolation", milliseconds(samples[_PLAIN]))
    return [
        *(
            Figure(
                "isolation",
                f"upload to ZIP in hand, {default if service == _WITH_TARGET else service}",
                Unit.MILLISECONDS,
                milliseconds(seconds),
                floor,
                ratio_at_most(1.05) if service == _WITH_TARGET else None,
            )
            for service, seconds in samples.items()
            if service != _PLAIN
        ),
        server_memory("isolation", server.peak_memory()),
    ]


async def _offered(url: str) -> tuple[list[str], str]:
    """Wait until the agent has said what it can isolate; returns services, and its default."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/agents") as response:
                (agent,) = (await response.json())["agents"]
            lacking = {
                entry["service"]: entry["reason"] for entry in agent["isolation"]["not_offered"]
            }
            if not any("not yet said" in reason for reason in lacking.values()):
                return [name for name in _SERVICES if name not in lacking], agent["isolation"][
                    "default"
                ]
            assert time.monotonic() < deadline, lacking
            await asyncio.sleep(_POLL_SECONDS)


async def _time_job(connection: Connection, url: str, service: str) -> float:
    request = client.upload(url, user=1, service=service)
    started = time.perf_counter()
    job_id = await client.submit(connection, request)
    await client.wait_for_result(connection, url, job_id)
    return time.perf_counter() - started
