"""The algorithm beside each digest; until now it was BLAKE3."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

WORDS = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    for table in ("tensor", "plan"):
        op.add_column(table, sa.Column("algorithm", WORDS, nullable=False, server_default="blake3"))
