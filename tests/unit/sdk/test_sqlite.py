import sqlite3

import pytest

from edgellm.sqlite import transaction


def test_a_commit_that_fails_does_not_block_the_next_one(tmp_path):
    database = sqlite3.connect(tmp_path / "any.db", isolation_level=None)
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("CREATE TABLE t (id INTEGER, up REFERENCES u (id) DEFERRABLE INITIALLY DEFERRED)")
    database.execute("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    # Deferred: it is the commit itself that fails, and SQLite leaves the transaction open then.
    with pytest.raises(sqlite3.IntegrityError), transaction(database):
        database.execute("INSERT INTO t VALUES (1, 2)")
    with transaction(database):
        database.execute("INSERT INTO t VALUES (3, NULL)")
    assert database.execute("SELECT id FROM t").fetchall() == [(3,)]
    database.close()
