"""Statements that are sent together: none needs the answer to another one, so one round trip does.

Invariant: they have the effect, and raise the errors, that they would have one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from sqlalchemy import Connection

from dcpstore.catalog.db.db_errors import driver_errors

__all__ = ["TOGETHER", "sent_together"]

TOGETHER = "dcpstore_together"  # in `Connection.info`: the statements of the block so far


@contextmanager
def sent_together(connection: Connection) -> Iterator[None]:
    """Send the statements that the block executes to a server at once, when the block ends.

    They change rows, and return none. A trace has them as one statement. A file has no round trips:
    there each is executed in its turn.
    """
    statements: list[str] = []
    connection.info[TOGETHER] = statements
    try:
        driver: Any = connection.connection.driver_connection
        if (
            connection.dialect.name == "sqlite"
            or not import_module("psycopg").Pipeline.is_supported()
        ):
            yield
        else:
            with driver_errors(connection), driver.pipeline():
                yield
    finally:
        del connection.info[TOGETHER]
    report = connection.get_execution_options().get(TOGETHER)
    if report is not None and statements:
        report(";\n".join(statements))
