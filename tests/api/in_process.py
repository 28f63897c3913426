"""The API in the process of a test, with connections of the server's kind."""

from __future__ import annotations

from typing import Any

from aiohttp.test_utils import TestServer

from api.connection import ConnectionRunner


class ApiServer(TestServer):
    """aiohttp's server for tests, run as ``serve`` runs it."""

    async def _make_runner(self, **options: Any) -> ConnectionRunner:
        return ConnectionRunner(self.app, **options)
