"""What the fork server loads once for all its children; nothing of it is used here."""

import importlib

NAMES = [
    "alembic.command",
    "dcpstore.api",
    "dcpstore.background",
    "dcpstore.catalog.migrating",
    "dcpstore.upkeep.rebuild",
    "dcpstore.upkeep.copying",
    "dcpstore.upkeep.manifests",
    "dcpstore.upkeep.repacking",
    "dcpstore.zarr_view.store",
    "psycopg",
    "pytest",
    "sqlalchemy.dialects.postgresql.psycopg",
    "tests.soundness",
    "tests.torture.listing",
]

for name in NAMES:
    importlib.import_module(name)
