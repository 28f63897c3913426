"""The tables: every version of the schema, and the way from any to the newest."""

from __future__ import annotations

import logging
import re
import sqlite3
from contextlib import closing

from records import StoreDamaged, StoreRefused
from storage.database import Database
from telemetry.logs import event

log = logging.getLogger("orchestrator.store")

APPLICATION_ID = 0x4F524348  # "ORCH", so that another program's file is not taken for ours
_PAGE_BYTES = 8192


# Statements, not a script: sqlite3's executescript() commits before it runs, and a
# migration must be one transaction.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE setting (
            name TEXT PRIMARY KEY,
            value TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE blob (
            id INTEGER PRIMARY KEY,
            state TEXT NOT NULL CHECK (state IN ('open', 'sealed', 'doomed')),
            size INTEGER NOT NULL,
            sha256 TEXT
        )""",
        "CREATE INDEX blob_unsealed ON blob (state, id) WHERE state IN ('open', 'doomed')",
        # id = blob id * 2**20 + index: one b-tree, in the order in which it is read
        "CREATE TABLE chunk (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
        """CREATE TABLE agent (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            seen_at REAL NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE job (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            user_id INTEGER NOT NULL,
            service TEXT NOT NULL,
            state TEXT NOT NULL,
            message TEXT NOT NULL,
            priority INTEGER NOT NULL DEFAULT 0,
            attempt_id INTEGER REFERENCES attempt (id),
            attempts INTEGER NOT NULL DEFAULT 0,
            lost_starts INTEGER NOT NULL DEFAULT 0,
            created_at REAL NOT NULL,
            changed_at REAL NOT NULL
        )""",
        "CREATE INDEX job_queued ON job (id) WHERE state = 'Queued'",
        """CREATE INDEX job_active ON job (id)
            WHERE state IN ('Processing', 'Submitted', 'Running')""",
        """CREATE INDEX job_final ON job (changed_at)
            WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')""",
        """CREATE TABLE input_file (
            job_id INTEGER NOT NULL REFERENCES job (id),
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            size INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            blob_id INTEGER REFERENCES blob (id),
            PRIMARY KEY (job_id, position),
            UNIQUE (job_id, name)
        ) WITHOUT ROWID""",
        "CREATE INDEX input_file_blob ON input_file (blob_id)",
        """CREATE TABLE attempt (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            number INTEGER NOT NULL,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            exit_code INTEGER,
            result_blob INTEGER REFERENCES blob (id),
            UNIQUE (job_id, number)
        )""",
        "CREATE INDEX attempt_result ON attempt (result_blob) WHERE result_blob IS NOT NULL",
        """CREATE TABLE history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            attempt INTEGER NOT NULL,
            at REAL NOT NULL,
            from_state TEXT,
            to_state TEXT NOT NULL,
            reason TEXT NOT NULL
        )""",
        "CREATE INDEX history_job ON history (job_id, id)",
        """CREATE TRIGGER history_is_not_changed BEFORE UPDATE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END""",
        """CREATE TRIGGER history_is_not_deleted BEFORE DELETE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END""",
    ),
    (
        "ALTER TABLE job ADD COLUMN name TEXT NOT NULL DEFAULT ''",
        # seconds that the submitter asked for; NULL: the service's limit alone
        "ALTER TABLE job ADD COLUMN timeout INTEGER",
        "ALTER TABLE job ADD COLUMN started_at REAL",
        "ALTER TABLE job ADD COLUMN finished_at REAL",
        """UPDATE job SET
            started_at = (SELECT max(at) FROM history
                          WHERE job_id = job.id AND to_state = 'Running'),
            finished_at = (SELECT max(at) FROM history WHERE job_id = job.id
                           AND to_state IN ('Completed', 'Failed', 'Invalid', 'Killed'))
            WHERE state NOT IN ('Queued', 'Processing', 'Submitted')""",
        # each queue (service, user) in the order in which it is served
        "DROP INDEX job_queued",
        """CREATE INDEX job_queued ON job (service, user_id, priority DESC, id)
            WHERE state = 'Queued'""",
        # a partial index serves a query only if the query repeats its condition word for word
        # (sqlite.org/partialindex.html), so one for both states served neither
        "DROP INDEX blob_unsealed",
        "CREATE INDEX blob_open ON blob (id) WHERE state = 'open'",
        "CREATE INDEX blob_doomed ON blob (id) WHERE state = 'doomed'",
        "CREATE INDEX job_user ON job (user_id, id)",
        "CREATE INDEX job_service ON job (service, id)",
        "CREATE INDEX job_created ON job (created_at)",
        "CREATE INDEX job_waiting ON job (id) WHERE state = 'Queued'",
        """CREATE INDEX job_unsuccessful ON job (id)
            WHERE state IN ('Failed', 'Invalid', 'Killed')""",
        """CREATE TABLE tag (
            job_id INTEGER NOT NULL REFERENCES job (id),
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (job_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX tag_search ON tag (key, value, job_id)",
        # what a client called its request, so that the same one again makes no second job
        """CREATE TABLE idempotency (
            user_id INTEGER NOT NULL,
            key TEXT NOT NULL,
            content_sha256 TEXT NOT NULL,
            job_id INTEGER NOT NULL REFERENCES job (id),
            created_at REAL NOT NULL,
            PRIMARY KEY (user_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX idempotency_age ON idempotency (created_at)",
        # how many jobs of each user wait: asked at every upload, too many to be counted then
        """CREATE TABLE queue_length (
            user_id INTEGER PRIMARY KEY,
            jobs INTEGER NOT NULL
        )""",
        """INSERT INTO queue_length (user_id, jobs)
            SELECT user_id, count(*) FROM job WHERE state = 'Queued' GROUP BY user_id""",
        """CREATE TRIGGER queue_gains_a_new_job AFTER INSERT ON job WHEN NEW.state = 'Queued'
            BEGIN INSERT INTO queue_length (user_id, jobs) VALUES (NEW.user_id, 1)
                ON CONFLICT (user_id) DO UPDATE SET jobs = jobs + 1; END""",
        """CREATE TRIGGER queue_gains_a_job_again AFTER UPDATE OF state ON job
            WHEN NEW.state = 'Queued' AND OLD.state <> 'Queued'
            BEGIN INSERT INTO queue_length (user_id, jobs) VALUES (NEW.user_id, 1)
                ON CONFLICT (user_id) DO UPDATE SET jobs = jobs + 1; END""",
        """CREATE TRIGGER queue_loses_a_job AFTER UPDATE OF state ON job
            WHEN OLD.state = 'Queued' AND NEW.state <> 'Queued'
            BEGIN UPDATE queue_length SET jobs = jobs - 1 WHERE user_id = NEW.user_id; END""",
        # live output; start: where the piece stands in what the process wrote (gaps are allowed)
        """CREATE TABLE output (
            attempt_id INTEGER NOT NULL REFERENCES attempt (id),
            stream INTEGER NOT NULL,
            start INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (attempt_id, stream, start)
        )""",
        # its output waits to be erased
        "ALTER TABLE attempt ADD COLUMN is_output_doomed INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX attempt_output_doomed ON attempt (id) WHERE is_output_doomed = 1",
        "ALTER TABLE agent ADD COLUMN is_drained INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE agent_history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            name TEXT NOT NULL,
            at REAL NOT NULL,
            kind TEXT NOT NULL
        )""",
        """CREATE TABLE token (
            name TEXT PRIMARY KEY,
            sha256 TEXT NOT NULL UNIQUE,
            user_id INTEGER,
            role TEXT NOT NULL,
            created_at REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    (
        # how the job ended: kept when it is cleaned
        "ALTER TABLE job ADD COLUMN outcome TEXT",
        """UPDATE job SET outcome = CASE state WHEN 'Cleaned' THEN
                (SELECT from_state FROM history WHERE job_id = job.id AND to_state = 'Cleaned')
                ELSE state END
            WHERE state NOT IN ('Queued', 'Processing', 'Submitted', 'Running')""",
        # when it ended by a clock that does not jump (clock.py), from which retention counts;
        # when this column is made, that clock and the wall clock agree
        "ALTER TABLE job ADD COLUMN aged_from REAL",
        "UPDATE job SET aged_from = changed_at WHERE outcome IS NOT NULL",
        "DROP INDEX job_final",
        """CREATE INDEX job_final ON job (aged_from)
            WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')""",
        # what the submitter asked for; NULL: what the service says
        "ALTER TABLE job ADD COLUMN cpus INTEGER",
        "ALTER TABLE job ADD COLUMN memory INTEGER",
        "ALTER TABLE job ADD COLUMN gpus INTEGER",
        # what an attempt used; NULL: not known
        "ALTER TABLE attempt ADD COLUMN cpu_seconds REAL",
        "ALTER TABLE attempt ADD COLUMN peak_memory INTEGER",
        "ALTER TABLE attempt ADD COLUMN wall_seconds REAL",
        # checksums of rows, so that damage is seen; NULL: written by a version before
        "ALTER TABLE chunk ADD COLUMN crc32 INTEGER",
        "ALTER TABLE output ADD COLUMN crc32 INTEGER",
        "ALTER TABLE history ADD COLUMN crc32 INTEGER",
        # of what the submitter said, which never changes
        "ALTER TABLE job ADD COLUMN crc32 INTEGER",
        "ALTER TABLE input_file ADD COLUMN crc32 INTEGER",
        # how many jobs each user has in each state: asked at every upload and by every overview,
        # too many to be counted then
        "DROP TRIGGER queue_gains_a_new_job",
        "DROP TRIGGER queue_gains_a_job_again",
        "DROP TRIGGER queue_loses_a_job",
        "DROP TABLE queue_length",
        """CREATE TABLE job_count (
            user_id INTEGER NOT NULL,
            state TEXT NOT NULL,
            service TEXT NOT NULL,
            jobs INTEGER NOT NULL,
            PRIMARY KEY (user_id, state, service)
        ) WITHOUT ROWID""",
        """INSERT INTO job_count (user_id, state, service, jobs)
            SELECT user_id, state, service, count(*) FROM job GROUP BY user_id, state, service""",
        """CREATE TRIGGER job_is_counted AFTER INSERT ON job
            BEGIN INSERT INTO job_count (user_id, state, service, jobs)
                VALUES (NEW.user_id, NEW.state, NEW.service, 1)
                ON CONFLICT DO UPDATE SET jobs = jobs + 1; END""",
        """CREATE TRIGGER job_is_counted_anew AFTER UPDATE OF state ON job
            WHEN OLD.state <> NEW.state
            BEGIN
                UPDATE job_count SET jobs = jobs - 1 WHERE user_id = OLD.user_id
                    AND state = OLD.state AND service = OLD.service;
                INSERT INTO job_count (user_id, state, service, jobs)
                    VALUES (NEW.user_id, NEW.state, NEW.service, 1)
                    ON CONFLICT DO UPDATE SET jobs = jobs + 1; END""",
    ),
    (
        # what the job needs: what was asked for, or what the service said then; memory 0: no limit
        "ALTER TABLE job ADD COLUMN needed_cpus INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE job ADD COLUMN needed_memory INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE job ADD COLUMN needed_gpus INTEGER NOT NULL DEFAULT 0",
        # agents that lost it, by their ids with spaces between: it goes to others first
        "ALTER TABLE job ADD COLUMN avoided TEXT NOT NULL DEFAULT ''",
        # attempts that were lost before their process started
        "ALTER TABLE job ADD COLUMN early_losses INTEGER NOT NULL DEFAULT 0",
        # the queue of each user by what its jobs demand
        """CREATE INDEX job_demand ON job (service, user_id, needed_cpus, needed_memory,
                needed_gpus, avoided, priority DESC, id)
            WHERE state = 'Queued'""",
        # each life of the database, and the first attempt that was, or will be, made in it
        """CREATE TABLE incarnation (
            first_attempt INTEGER PRIMARY KEY,
            name TEXT NOT NULL
        )""",
        # what an agent must know to be taken for the one that first came with its id
        "ALTER TABLE agent ADD COLUMN secret_sha256 TEXT",
        # of its lease, how much has run
        "ALTER TABLE agent ADD COLUMN away_seconds REAL NOT NULL DEFAULT 0",
    ),
    (
        # what came and ended: one row a minute (later an hour) and service; see statistics.py
        """CREATE TABLE statistic (
            step INTEGER NOT NULL CHECK (step IN (60, 3600)),
            time INTEGER NOT NULL,
            service TEXT NOT NULL,
            submitted INTEGER NOT NULL,
            completed INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            killed INTEGER NOT NULL,
            invalid INTEGER NOT NULL,
            waits INTEGER NOT NULL,
            wait_seconds REAL NOT NULL,
            runs INTEGER NOT NULL,
            run_seconds REAL NOT NULL,
            PRIMARY KEY (step, time, service)
        ) WITHOUT ROWID""",
        # the job has its new state and times already when its history is written
        """CREATE TRIGGER statistic_follows_history AFTER INSERT ON history
            WHEN NEW.from_state IS NULL
                OR NEW.to_state IN ('Running', 'Completed', 'Failed', 'Killed', 'Invalid')
            BEGIN INSERT INTO statistic
                SELECT 60, CAST(NEW.at AS INTEGER) / 60 * 60, service, NEW.from_state IS NULL,
                    NEW.to_state = 'Completed', NEW.to_state = 'Failed',
                    NEW.to_state = 'Killed', NEW.to_state = 'Invalid', NEW.to_state = 'Running',
                    iif(NEW.to_state = 'Running', max(NEW.at - created_at, 0), 0),
                    NEW.from_state IS 'Running' AND started_at IS NOT NULL,
                    iif(NEW.from_state IS 'Running' AND started_at IS NOT NULL,
                        max(NEW.at - started_at, 0), 0)
                FROM job WHERE id = NEW.job_id
                ON CONFLICT (step, time, service) DO UPDATE SET
                    submitted = submitted + excluded.submitted,
                    completed = completed + excluded.completed,
                    failed = failed + excluded.failed, killed = killed + excluded.killed,
                    invalid = invalid + excluded.invalid, waits = waits + excluded.waits,
                    wait_seconds = wait_seconds + excluded.wait_seconds,
                    runs = runs + excluded.runs, run_seconds = run_seconds + excluded.run_seconds;
            END""",
    ),
    (
        # counted once a transaction instead, by statistics.py
        "DROP TRIGGER statistic_follows_history",
    ),
)


def demand_ours(db: sqlite3.Connection, path: str) -> None:
    """Raise :class:`StoreRefused` if a file that a command opened is not one of ours."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreRefused(f"{path}: not a database of Orchestrator")


def damaged_objects(db: sqlite3.Connection, version: int) -> list[str]:
    """Return the names of the tables, indices and triggers that are not as that version made them.

    What others added to the file is their business.
    """
    statement = "SELECT type, name, tbl_name, sql FROM sqlite_schema"
    with closing(sqlite3.connect(":memory:")) as model:
        for migration in MIGRATIONS[:version]:
            for step in migration:
                model.execute(step)
        expected = set(model.execute(statement))
    return sorted(row[1] for row in expected - set(db.execute(statement)))


_GROWN_VERSION = 2
_OBJECT = re.compile(r"CREATE (?:TABLE|INDEX|TRIGGER) (\w+)|ALTER TABLE (\w+) ADD COLUMN (\w+)")


def _complete_grown_version(db: Database) -> None:
    """Add to a file of version 2 what that version gained after it had been given its number.

    Five states of it were written within an hour. Each has some of its statements, in the words
    in which they stand above.
    """
    db.execute("DROP INDEX IF EXISTS blob_unsealed")
    for statement in MIGRATIONS[_GROWN_VERSION - 1]:
        match = _OBJECT.match(statement)
        if match is None:
            continue
        created, table, column = match.groups()
        if created:
            found = db.execute(
                "SELECT sql FROM sqlite_schema WHERE name = ?", (created,)
            ).fetchone()
            if found is not None and " ".join(found[0].split()) != " ".join(statement.split()):
                assert created == "job_queued", "the one that was given another meaning"
                db.execute("DROP INDEX job_queued")
                found = None
            if found is None:
                db.execute(statement)
        elif column not in [row[1] for row in db.execute(f"PRAGMA table_info({table})")]:
            db.execute(statement)


def migrate(db: Database) -> None:
    """Bring the file to the newest version, in one transaction. Raises :class:`StoreRefused`."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    is_new = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if not is_new and application != APPLICATION_ID:
        raise StoreRefused("the file is a database of another program")
    if version > len(MIGRATIONS):
        raise StoreRefused(
            f"the file has version {version}, written by a newer Orchestrator;"
            f" this one knows up to {len(MIGRATIONS)}: upgrade it, or use another file"
        )
    if is_new:
        # both take effect only before the first page is written
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN EXCLUSIVE")
    try:
        if version == _GROWN_VERSION:
            _complete_grown_version(db)
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            event(log, "migrated", version=number)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        if damaged := damaged_objects(db, len(MIGRATIONS)):
            raise StoreDamaged(f"the schema is damaged: {', '.join(damaged)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
