"""What a connecting agent holds, compared with what it should hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import config
from fleet.agent import Agent
from fleet.attempt import Attempt
from fleet.connection import Connection
from fleet.roster import Roster
from fleet.storing import until_stored
from jobs import ACTIVE_STATES
from records import Loss
from telemetry.logs import event
from wire import messages
from wire.frames import Stream

log = logging.getLogger("orchestrator.fleet")


class Reconciliation:
    """Welcomes an agent on a new connection."""

    def __init__(self, roster: Roster, agent: Agent, connection: Connection) -> None:
        self._roster = roster
        self._store = roster.store
        self._agent = agent
        self._connection = connection
        self._outbox = connection.outbox

    async def run(self, hello: messages.Hello) -> None:
        """Compare what the agent holds with what it should hold, and act on the difference."""
        agent = self._agent
        event(
            log,
            "agent_connected",
            agent=agent.name,
            id=agent.id,
            address=self._connection.address,
            slots=agent.slots,
            attempts=len(hello.attempts),
        )
        known = [held for held in hello.attempts if self._is_known(held)]
        if len(known) < len(hello.attempts):
            await self._skip_ids(hello.attempts)
        await self._find_remains(known)
        remains = self._connection.remains
        wanted = [held for held in known if held.attempt_id in {*agent.attempts, *remains}]
        self._outbox.put(
            messages.Welcome(
                protocol=messages.PROTOCOL_VERSION,
                version=config.VERSION,
                heartbeat_seconds=self._connection.heartbeat_seconds(),
                keep=tuple([await self._kept(held) for held in wanted]),
                incarnation=self._store.incarnations.current,
            )
        )
        # from here on, what is assigned goes straight to the agent
        self._connection.is_welcomed = True
        self._connection.ask_for_isolation()
        for attempt_id in remains:
            self._outbox.put(messages.Kill(attempt_id))
        present = {held.attempt_id for held in known}
        missing = [attempt for attempt in agent.attempts.values() if attempt.id not in present]
        for held in wanted:
            is_to_run = held.attempt_id in agent.attempts
            if is_to_run and held.phase is messages.AttemptPhase.RECEIVING:
                files = await self._store.attempts.input_files(held.attempt_id)
                self._connection.send_input(held.attempt_id, files, held.input_offset)
        for attempt in missing:
            reason = f"agent {agent.name} no longer has the job"
            await self._roster.give_back(agent, attempt, Loss.AGENT_AWAY, reason)

    async def _kept(self, held: messages.HeldAttempt) -> messages.KeptAttempt:
        return messages.KeptAttempt(
            held.attempt_id,
            await self._store.attempts.result_size(held.attempt_id),
            await self._store.output.end(held.attempt_id, Stream.STDOUT),
            await self._store.output.end(held.attempt_id, Stream.STDERR),
            held.incarnation,
        )

    def _is_known(self, held: messages.HeldAttempt) -> bool:
        """Say whether an attempt is of this database, not of one that it was copied from or to."""
        made_in = self._store.incarnations.of(held.attempt_id)
        mine = self._agent.attempts.get(held.attempt_id)
        is_of_this_job = mine is None or mine.job.id == held.job_id
        # one that does not say is of an agent, or a directory, from before there were incarnations
        return held.incarnation in ("", made_in) and is_of_this_job

    async def _skip_ids(self, attempts: Sequence[messages.HeldAttempt]) -> None:
        """Give out no ids that an agent knows from another life of the database."""
        last_attempt = max(held.attempt_id for held in attempts)
        last_job = max(held.job_id for held in attempts)
        event(
            log,
            "foreign_attempts",
            level=logging.WARNING,
            agent=self._agent.name,
            last_attempt=last_attempt,
            last_job=last_job,
        )
        await until_stored(lambda: self._store.incarnations.skip_ids(last_attempt, last_job))

    async def _find_remains(self, known: Sequence[messages.HeldAttempt]) -> None:
        """See whether the agent comes with what is left of jobs that were killed meanwhile."""
        for held in known:
            if held.attempt_id in self._agent.attempts:
                continue
            killed = await self._store.attempts.killed_without_result(
                held.attempt_id, self._agent.id
            )
            if killed is not None:
                # as far as can be: what the agent reports of its way no longer changes anything
                last = ACTIVE_STATES[-1]
                remains = replace(Attempt.of(killed), state=last)
                self._connection.remains[held.attempt_id] = remains
