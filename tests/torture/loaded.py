"""What the fork server loads once for all its children; nothing of it is used here."""

import importlib

from dcpstore.encoding.codecs import encode

NAMES = [
    "alembic.command",
    "dcpstore.api",
    "dcpstore.asynchronous.async_save",
    "dcpstore.catalog.schema.migrate",
    "dcpstore.maintenance.rebuild",
    "dcpstore.maintenance.copy",
    "dcpstore.maintenance.rewrite",
    "dcpstore.maintenance.rewrite",
    "dcpstore.zarr.store",
    "psycopg",
    "pytest",
    "sqlalchemy.dialects.postgresql.psycopg",
    "tests.soundness",
    "tests.torture.listing",
    "tests.frozen",
]

for name in NAMES:
    importlib.import_module(name)
# Blosc makes a lock at its first use, of which a killed child would leave a semaphore behind.
encode("blosc", memoryview(bytes(64)), 4)
