PRAGMA application_id = 1330791240;
PRAGMA user_version = 5;
BEGIN TRANSACTION;
CREATE TABLE agent (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            seen_at REAL NOT NULL
        , is_drained INTEGER NOT NULL DEFAULT 0, secret_sha256 TEXT, away_seconds REAL NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "agent" VALUES('a2ab1033591d40d58856c0f996e92fcd','local',1.79561516462228226665e+09,0,NULL,0.0);
CREATE TABLE agent_history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            name TEXT NOT NULL,
            at REAL NOT NULL,
            kind TEXT NOT NULL
        );
INSERT INTO "agent_history" VALUES(1,'a2ab1033591d40d58856c0f996e92fcd','local',1.79561516462266492844e+09,'connected');
CREATE TABLE attempt (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            number INTEGER NOT NULL,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            exit_code INTEGER,
            result_blob INTEGER REFERENCES blob (id), is_output_doomed INTEGER NOT NULL DEFAULT 0, cpu_seconds REAL, peak_memory INTEGER, wall_seconds REAL,
            UNIQUE (job_id, number)
        );
INSERT INTO "attempt" VALUES(1,1,1,'a2ab1033591d40d58856c0f996e92fcd',0,3,0,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES(2,2,1,'a2ab1033591d40d58856c0f996e92fcd',3,6,0,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES(3,3,1,'a2ab1033591d40d58856c0f996e92fcd',NULL,NULL,0,NULL,NULL,NULL);
CREATE TABLE blob (
            id INTEGER PRIMARY KEY,
            state TEXT NOT NULL CHECK (state IN ('open', 'sealed', 'doomed')),
            size INTEGER NOT NULL,
            sha256 TEXT
        );
INSERT INTO "blob" VALUES(1,'sealed',26,'470321ca8ddfc21da4e25eafeb8f72317a106752299866d52bd30a6a5389a377');
INSERT INTO "blob" VALUES(2,'sealed',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f');
INSERT INTO "blob" VALUES(3,'sealed',611,'0154839a5e245c4e0bf9f787109973adab11e8f3ead808e1abe7f27045677840');
INSERT INTO "blob" VALUES(4,'sealed',6,'f83f8905b4f3be6305a76adaa981467528d13853f18cc464da8221c06bf35411');
INSERT INTO "blob" VALUES(5,'sealed',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f');
INSERT INTO "blob" VALUES(6,'sealed',474,'c11131d6cef26e8a0b2775ad54055df4fdc427fb84e55374f9961b29b019cda8');
INSERT INTO "blob" VALUES(7,'sealed',10,'c43cd73daa3bad734f123ab6cf497658b7c83d306d0f4028b40bda6a137adaf2');
INSERT INTO "blob" VALUES(8,'sealed',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f');
INSERT INTO "blob" VALUES(9,'sealed',4,'b5bea41b6c623f7c09f1bf24dcae58ebab3c0cdd90ad966bc43a45b44867e12b');
INSERT INTO "blob" VALUES(10,'sealed',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f');
CREATE TABLE chunk (id INTEGER PRIMARY KEY, data BLOB NOT NULL, crc32 INTEGER);
INSERT INTO "chunk" VALUES(1048576,X'6361742064617461203E20636F70793B206563686F20646F6E65',3513808048);
INSERT INTO "chunk" VALUES(2097152,X'736F6D6520646174610A',829922127);
INSERT INTO "chunk" VALUES(3145728,X'504B03041400000000006C6F795D19F901C80A0000000A00000004000900636F70795554050001BCE9066B736F6D6520646174610A504B03041400000000006C6F795D19F901C80A0000000A00000004000900646174615554050001BCE9066B736F6D6520646174610A504B03041400000000006C6F795D8D0B1BAE1A0000001A0000000600090072756E2E73685554050001BCE9066B6361742064617461203E20636F70793B206563686F20646F6E65504B03041400000000006C6F795D1351C37305000000050000000A0009007374646F75742E6C6F675554050001BCE9066B646F6E650A504B03041400000000006C6F795D0000000000000000000000000A0009007374646572722E6C6F675554050001BCE9066B504B010214031400000000006C6F795D19F901C80A0000000A000000040009000000000000000000A48100000000636F70795554050001BCE9066B504B010214031400000000006C6F795D19F901C80A0000000A000000040009000000000000000000A48135000000646174615554050001BCE9066B504B010214031400000000006C6F795D8D0B1BAE1A0000001A000000060009000000000000000000A4816A00000072756E2E73685554050001BCE9066B504B010214031400000000006C6F795D1351C37305000000050000000A0009000000000000000000A481B10000007374646F75742E6C6F675554050001BCE9066B504B010214031400000000006C6F795D0000000000000000000000000A0009000000000000000000A481E70000007374646572722E6C6F675554050001BCE9066B504B0506000000000500050035010000180100000000',2610694009);
INSERT INTO "chunk" VALUES(4194304,X'657869742033',2228220360);
INSERT INTO "chunk" VALUES(5242880,X'736F6D6520646174610A',2636581599);
INSERT INTO "chunk" VALUES(6291456,X'504B03041400000000006C6F795D19F901C80A0000000A00000004000900646174615554050001BCE9066B736F6D6520646174610A504B03041400000000006C6F795DF5A9DB1F06000000060000000600090072756E2E73685554050001BCE9066B657869742033504B03041400000000006C6F795D0000000000000000000000000A0009007374646F75742E6C6F675554050001BCE9066B504B03041400000000006C6F795D0000000000000000000000000A0009007374646572722E6C6F675554050001BCE9066B504B010214031400000000006C6F795D19F901C80A0000000A000000040009000000000000000000A48100000000646174615554050001BCE9066B504B010214031400000000006C6F795DF5A9DB1F0600000006000000060009000000000000000000A4813500000072756E2E73685554050001BCE9066B504B010214031400000000006C6F795D0000000000000000000000000A0009000000000000000000A481680000007374646F75742E6C6F675554050001BCE9066B504B010214031400000000006C6F795D0000000000000000000000000A0009000000000000000000A481990000007374646572722E6C6F675554050001BCE9066B504B05060000000004000400FA000000CA0000000000',1334196864);
INSERT INTO "chunk" VALUES(7340032,X'736C6565702031303030',4143326878);
INSERT INTO "chunk" VALUES(8388608,X'736F6D6520646174610A',2604301507);
INSERT INTO "chunk" VALUES(9437184,X'74727565',2361247383);
INSERT INTO "chunk" VALUES(10485760,X'736F6D6520646174610A',1649155733);
CREATE TABLE history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            attempt INTEGER NOT NULL,
            at REAL NOT NULL,
            from_state TEXT,
            to_state TEXT NOT NULL,
            reason TEXT NOT NULL
        , crc32 INTEGER);
INSERT INTO "history" VALUES(1,1,0,1795615163.84031,NULL,'Queued','uploaded',4138397006);
INSERT INTO "history" VALUES(2,1,1,1.79561516463072514534e+09,'Queued','Processing','to agent local',3413510919);
INSERT INTO "history" VALUES(3,1,1,1.79561516464434862139e+09,'Processing','Submitted','input received',908793471);
INSERT INTO "history" VALUES(4,1,1,1.7956151646653239727e+09,'Submitted','Running','process started',2397192502);
INSERT INTO "history" VALUES(5,1,1,1.79561516467287135122e+09,'Running','Completed','finished',612851766);
INSERT INTO "history" VALUES(6,2,0,1.79561516480221104621e+09,NULL,'Queued','uploaded',1438306673);
INSERT INTO "history" VALUES(7,2,1,1.79561516480253338806e+09,'Queued','Processing','to agent local',4176055459);
INSERT INTO "history" VALUES(8,2,1,1.79561516482030844683e+09,'Processing','Submitted','input received',3591234159);
INSERT INTO "history" VALUES(9,2,1,1.79561516483250236514e+09,'Submitted','Running','process started',3153762246);
INSERT INTO "history" VALUES(10,2,1,1.79561516483669233318e+09,'Running','Failed','run.sh ended with exit code 3',41260960);
INSERT INTO "history" VALUES(11,3,0,1.79561516499212050438e+09,NULL,'Queued','uploaded',1383865240);
INSERT INTO "history" VALUES(12,3,1,1.79561516499241733552e+09,'Queued','Processing','to agent local',1997367251);
INSERT INTO "history" VALUES(13,3,1,1.79561516501510071751e+09,'Processing','Submitted','input received',3746082265);
INSERT INTO "history" VALUES(14,3,1,1.79561516502371215815e+09,'Submitted','Running','process started',2909623274);
INSERT INTO "history" VALUES(15,4,0,1.79561516513732361789e+09,NULL,'Queued','uploaded',1615967417);
CREATE TABLE idempotency (
            user_id INTEGER NOT NULL,
            key TEXT NOT NULL,
            content_sha256 TEXT NOT NULL,
            job_id INTEGER NOT NULL REFERENCES job (id),
            created_at REAL NOT NULL,
            PRIMARY KEY (user_id, key)
        ) WITHOUT ROWID;
CREATE TABLE incarnation (
            first_attempt INTEGER PRIMARY KEY,
            name TEXT NOT NULL
        );
INSERT INTO "incarnation" VALUES(1,'ec854c2d6e7452a1');
CREATE TABLE input_file (
            job_id INTEGER NOT NULL REFERENCES job (id),
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            size INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            blob_id INTEGER REFERENCES blob (id), crc32 INTEGER,
            PRIMARY KEY (job_id, position),
            UNIQUE (job_id, name)
        ) WITHOUT ROWID;
INSERT INTO "input_file" VALUES(1,0,'run.sh',26,'470321ca8ddfc21da4e25eafeb8f72317a106752299866d52bd30a6a5389a377',1,2890641449);
INSERT INTO "input_file" VALUES(1,1,'data',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f',2,2292816407);
INSERT INTO "input_file" VALUES(2,0,'run.sh',6,'f83f8905b4f3be6305a76adaa981467528d13853f18cc464da8221c06bf35411',4,3931775583);
INSERT INTO "input_file" VALUES(2,1,'data',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f',5,2292816407);
INSERT INTO "input_file" VALUES(3,0,'run.sh',10,'c43cd73daa3bad734f123ab6cf497658b7c83d306d0f4028b40bda6a137adaf2',7,3549657663);
INSERT INTO "input_file" VALUES(3,1,'data',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f',8,2292816407);
INSERT INTO "input_file" VALUES(4,0,'run.sh',4,'b5bea41b6c623f7c09f1bf24dcae58ebab3c0cdd90ad966bc43a45b44867e12b',9,248816595);
INSERT INTO "input_file" VALUES(4,1,'data',10,'5aa03f96c77536579166fba147929626cc3a97960e994057a9d80271a736d10f',10,2292816407);
CREATE TABLE job (
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
        , name TEXT NOT NULL DEFAULT '', timeout INTEGER, started_at REAL, finished_at REAL, outcome TEXT, aged_from REAL, cpus INTEGER, memory INTEGER, gpus INTEGER, crc32 INTEGER, needed_cpus INTEGER NOT NULL DEFAULT 1, needed_memory INTEGER NOT NULL DEFAULT 0, needed_gpus INTEGER NOT NULL DEFAULT 0, avoided TEXT NOT NULL DEFAULT '', early_losses INTEGER NOT NULL DEFAULT 0);
INSERT INTO "job" VALUES(1,7,'example','Completed','',0,1,1,0,1795615163.84031,1.79561516467287135122e+09,'',NULL,1.7956151646653239727e+09,1.79561516467287135122e+09,'Completed',1.79561516467301082611e+09,NULL,NULL,NULL,77525238,1,0,0,'',0);
INSERT INTO "job" VALUES(2,7,'example','Failed','run.sh ended with exit code 3',0,2,1,0,1.79561516480221104621e+09,1.79561516483669233318e+09,'',NULL,1.79561516483250236514e+09,1.79561516483669233318e+09,'Failed',1.79561516483670377724e+09,NULL,NULL,NULL,2838797187,1,0,0,'',0);
INSERT INTO "job" VALUES(3,7,'example','Running','',0,3,1,0,1.79561516499212050438e+09,1.79561516502371215815e+09,'',NULL,1.79561516502371215815e+09,NULL,NULL,NULL,NULL,NULL,NULL,2418943876,1,0,0,'',0);
INSERT INTO "job" VALUES(4,7,'example','Queued','Job successfully uploaded',0,NULL,0,0,1.79561516513732361789e+09,1.79561516513732361789e+09,'',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,807002848,1,0,0,'',0);
CREATE TABLE job_count (
            user_id INTEGER NOT NULL,
            state TEXT NOT NULL,
            service TEXT NOT NULL,
            jobs INTEGER NOT NULL,
            PRIMARY KEY (user_id, state, service)
        ) WITHOUT ROWID;
INSERT INTO "job_count" VALUES(7,'Completed','example',1);
INSERT INTO "job_count" VALUES(7,'Failed','example',1);
INSERT INTO "job_count" VALUES(7,'Processing','example',0);
INSERT INTO "job_count" VALUES(7,'Queued','example',1);
INSERT INTO "job_count" VALUES(7,'Running','example',1);
INSERT INTO "job_count" VALUES(7,'Submitted','example',0);
CREATE TABLE output (
            attempt_id INTEGER NOT NULL REFERENCES attempt (id),
            stream INTEGER NOT NULL,
            start INTEGER NOT NULL,
            data BLOB NOT NULL, crc32 INTEGER,
            PRIMARY KEY (attempt_id, stream, start)
        );
INSERT INTO "output" VALUES(1,2,0,X'646F6E650A',1942180115);
CREATE TABLE setting (
            name TEXT PRIMARY KEY,
            value TEXT NOT NULL
        ) WITHOUT ROWID;
INSERT INTO "setting" VALUES('agent_token','AQS6R_IlE3HNzKhBojSsI9EP4SFtskL0F0hjzotLZuQ');
INSERT INTO "setting" VALUES('probe','');
INSERT INTO "setting" VALUES('steady_clock','{"steady": 1795615163.7883031, "wall": 1795615163.7883127, "uptime": 4152.1844623, "boot": "e67293f5-759f-4d02-88c2-db3ec1ea49a4"}');
CREATE TABLE statistic (
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
        ) WITHOUT ROWID;
INSERT INTO "statistic" VALUES(60,1795615140,'example',4,1,1,0,0,3,8.86896848678588867187e-01,2,1.1737346649169921875e-02);
CREATE TABLE tag (
            job_id INTEGER NOT NULL REFERENCES job (id),
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (job_id, key)
        ) WITHOUT ROWID;
CREATE TABLE token (
            name TEXT PRIMARY KEY,
            sha256 TEXT NOT NULL UNIQUE,
            user_id INTEGER,
            role TEXT NOT NULL,
            created_at REAL NOT NULL
        ) WITHOUT ROWID;
CREATE INDEX job_active ON job (id)
            WHERE state IN ('Processing', 'Submitted', 'Running');
CREATE INDEX input_file_blob ON input_file (blob_id);
CREATE INDEX attempt_result ON attempt (result_blob) WHERE result_blob IS NOT NULL;
CREATE INDEX history_job ON history (job_id, id);
CREATE TRIGGER history_is_not_changed BEFORE UPDATE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END;
CREATE TRIGGER history_is_not_deleted BEFORE DELETE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END;
CREATE INDEX job_queued ON job (service, user_id, priority DESC, id)
            WHERE state = 'Queued';
CREATE INDEX blob_open ON blob (id) WHERE state = 'open';
CREATE INDEX blob_doomed ON blob (id) WHERE state = 'doomed';
CREATE INDEX job_user ON job (user_id, id);
CREATE INDEX job_service ON job (service, id);
CREATE INDEX job_created ON job (created_at);
CREATE INDEX job_waiting ON job (id) WHERE state = 'Queued';
CREATE INDEX job_unsuccessful ON job (id)
            WHERE state IN ('Failed', 'Invalid', 'Killed');
CREATE INDEX tag_search ON tag (key, value, job_id);
CREATE INDEX idempotency_age ON idempotency (created_at);
CREATE INDEX attempt_output_doomed ON attempt (id) WHERE is_output_doomed = 1;
CREATE INDEX job_final ON job (aged_from)
            WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed');
CREATE TRIGGER job_is_counted AFTER INSERT ON job
            BEGIN INSERT INTO job_count (user_id, state, service, jobs)
                VALUES (NEW.user_id, NEW.state, NEW.service, 1)
                ON CONFLICT DO UPDATE SET jobs = jobs + 1; END;
CREATE TRIGGER job_is_counted_anew AFTER UPDATE OF state ON job
            WHEN OLD.state <> NEW.state
            BEGIN
                UPDATE job_count SET jobs = jobs - 1 WHERE user_id = OLD.user_id
                    AND state = OLD.state AND service = OLD.service;
                INSERT INTO job_count (user_id, state, service, jobs)
                    VALUES (NEW.user_id, NEW.state, NEW.service, 1)
                    ON CONFLICT DO UPDATE SET jobs = jobs + 1; END;
CREATE INDEX job_demand ON job (service, user_id, needed_cpus, needed_memory,
                needed_gpus, avoided, priority DESC, id)
            WHERE state = 'Queued';
CREATE TRIGGER statistic_follows_history AFTER INSERT ON history
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
            END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('job',4);
INSERT INTO "sqlite_sequence" VALUES('history',15);
INSERT INTO "sqlite_sequence" VALUES('agent_history',1);
INSERT INTO "sqlite_sequence" VALUES('attempt',3);
COMMIT;
