"""The tables of the first release."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# Types as they were then: a migration never changes, so it takes nothing from the schema of today.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
WORDS = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "plan",
        sa.Column("id", KEY, nullable=False),
        sa.Column("digest", WORDS, nullable=False),
        sa.Column("ranks", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plan"),
        sa.UniqueConstraint("digest", name="uq_plan_digest"),
    )

    op.create_table(
        "repository",
        sa.Column("id", KEY, nullable=False),
        sa.Column("uid", WORDS, nullable=False),
        sa.Column("format_version", sa.BigInteger(), nullable=False),
        sa.Column("data_url", WORDS, nullable=False),
        sa.Column("chunk_nbytes", sa.BigInteger(), nullable=False),
        sa.Column("chunk_codec", WORDS, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_version", sa.BigInteger(), nullable=False),
        sa.Column("last_operation", sa.BigInteger(), nullable=False),
        sa.Column("last_journaled", sa.BigInteger(), nullable=False),
        sa.Column("verify_began_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_repository_one_row")),
        sa.PrimaryKeyConstraint("id", name="pk_repository"),
    )

    op.create_table(
        "tensor",
        sa.Column("id", KEY, nullable=False),
        sa.Column("digest", WORDS, nullable=False),
        sa.Column("dtype", WORDS, nullable=False),
        sa.Column("shape", WORDS, nullable=False),
        sa.Column("codec", WORDS, nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tensor"),
        sa.UniqueConstraint("digest", name="uq_tensor_digest"),
        sqlite_autoincrement=True,
    )

    op.create_table(
        "alias",
        sa.Column("digest", WORDS, nullable=False),
        sa.Column("tensor", KEY, nullable=False),
        sa.ForeignKeyConstraint(["tensor"], ["tensor.id"], name="fk_alias_tensor"),
        sa.PrimaryKeyConstraint("digest", name="pk_alias"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_alias_tensor", "alias", ["tensor"])

    op.create_table(
        "part",
        sa.Column("tensor", KEY, nullable=False),
        sa.Column("part", KEY, autoincrement=False, nullable=False),
        sa.Column("offsets", WORDS, nullable=False),
        sa.Column("shape", WORDS, nullable=False),
        sa.Column("chunk_shape", WORDS, nullable=False),
        sa.ForeignKeyConstraint(["tensor"], ["tensor.id"], name="fk_part_tensor"),
        sa.PrimaryKeyConstraint("tensor", "part", name="pk_part"),
        sqlite_with_rowid=False,
    )

    op.create_table(
        "shard",
        sa.Column("plan", KEY, nullable=False),
        sa.Column("fqn", WORDS, nullable=False),
        sa.Column("rank", KEY, autoincrement=False, nullable=False),
        sa.Column("ordinal", KEY, autoincrement=False, nullable=False),
        sa.Column("offsets", WORDS, nullable=False),
        sa.Column("sizes", WORDS, nullable=False),
        sa.ForeignKeyConstraint(["plan"], ["plan.id"], name="fk_shard_plan"),
        sa.PrimaryKeyConstraint("plan", "fqn", "rank", "ordinal", name="pk_shard"),
        sqlite_with_rowid=False,
    )

    op.create_table(
        "version",
        sa.Column("id", KEY, nullable=False),
        sa.Column("uid", WORDS, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=True),
        sa.Column("status", WORDS, nullable=False),
        sa.Column("parent", KEY, nullable=True),
        sa.Column("depth", sa.BigInteger(), nullable=True),
        sa.Column("jump", KEY, nullable=True),
        sa.Column("branch", WORDS, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("message", WORDS, nullable=False),
        sa.Column("labels", WORDS, nullable=False),
        sa.Column("author", WORDS, nullable=False),
        sa.Column("host", WORDS, nullable=False),
        sa.Column("ranks", sa.BigInteger(), nullable=False),
        sa.Column("plan", KEY, nullable=True),
        sa.Column("planner_data", WORDS, nullable=True),
        sa.Column("wanted_tags", WORDS, nullable=False),
        sa.Column("expect_tip", sa.BigInteger(), nullable=True),
        sa.Column("nbytes", sa.BigInteger(), nullable=True),
        sa.Column("nbytes_written", sa.BigInteger(), nullable=True),
        sa.Column("nbytes_reused", sa.BigInteger(), nullable=True),
        sa.Column("seconds", WORDS, nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stale", WORDS, nullable=True),
        sa.Column("error", WORDS, nullable=True),
        sa.CheckConstraint(
            "(status IN ('committed', 'expired')) = (number IS NOT NULL)",
            name=op.f("ck_version_numbered"),
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'committed', 'aborted', 'expired')",
            name=op.f("ck_version_status"),
        ),
        sa.ForeignKeyConstraint(["jump"], ["version.id"], name="fk_version_jump"),
        sa.ForeignKeyConstraint(["parent"], ["version.id"], name="fk_version_parent"),
        sa.ForeignKeyConstraint(["plan"], ["plan.id"], name="fk_version_plan"),
        sa.PrimaryKeyConstraint("id", name="pk_version"),
        sa.UniqueConstraint("number", name="uq_version_number"),
        sa.UniqueConstraint("uid", name="uq_version_uid"),
    )
    op.create_index("ix_version_branch_number", "version", ["branch", "number"])
    op.create_index("ix_version_jump", "version", ["jump"])
    op.create_index("ix_version_parent", "version", ["parent"])
    op.create_index("ix_version_plan", "version", ["plan"])
    op.create_index("ix_version_step_number", "version", ["step", "number"])
    op.create_index("ix_version_status_touched_at", "version", ["status", "touched_at"])

    op.create_table(
        "entry",
        sa.Column("version", KEY, nullable=False),
        sa.Column("fqn", WORDS, nullable=False),
        sa.Column("path", WORDS, nullable=False),
        sa.Column("kind", WORDS, nullable=False),
        sa.Column("tensor", KEY, nullable=True),
        sa.Column("value", WORDS, nullable=True),
        sa.CheckConstraint("kind IN ('tensor', 'value', 'blob')", name=op.f("ck_entry_kind")),
        sa.ForeignKeyConstraint(["tensor"], ["tensor.id"], name="fk_entry_tensor"),
        sa.ForeignKeyConstraint(["version"], ["version.id"], name="fk_entry_version"),
        sa.PrimaryKeyConstraint("version", "fqn", name="pk_entry"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_entry_fqn_version", "entry", ["fqn", "version"])
    op.create_index("ix_entry_tensor", "entry", ["tensor"])

    op.create_table(
        "metric",
        sa.Column("version", KEY, nullable=False),
        sa.Column("name", WORDS, nullable=False),
        sa.Column("value", sa.Float(53), nullable=True),
        sa.ForeignKeyConstraint(["version"], ["version.id"], name="fk_metric_version"),
        sa.PrimaryKeyConstraint("version", "name", name="pk_metric"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_metric_name_value", "metric", ["name", "value"])

    op.create_table(
        "progress",
        sa.Column("version", KEY, nullable=False),
        sa.Column("rank", KEY, autoincrement=False, nullable=False),
        sa.Column("phase", WORDS, nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version"], ["version.id"], name="fk_progress_version"),
        sa.PrimaryKeyConstraint("version", "rank", name="pk_progress"),
        sqlite_with_rowid=False,
    )

    op.create_table(
        "operation",
        sa.Column("number", KEY, autoincrement=False, nullable=False),
        sa.Column("kind", WORDS, nullable=False),
        sa.Column("target", WORDS, nullable=False),
        sa.Column("old", KEY, nullable=True),
        sa.Column("new", KEY, nullable=True),
        sa.Column("author", WORDS, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("detail", WORDS, nullable=True),
        sa.ForeignKeyConstraint(["new"], ["version.id"], name="fk_operation_new"),
        sa.ForeignKeyConstraint(["old"], ["version.id"], name="fk_operation_old"),
        sa.PrimaryKeyConstraint("number", name="pk_operation"),
    )
    op.create_index("ix_operation_new", "operation", ["new"])
    op.create_index("ix_operation_old", "operation", ["old"])

    op.create_table(
        "pack",
        sa.Column("id", KEY, nullable=False),
        sa.Column("key", WORDS, nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("version", KEY, nullable=False),
        sa.Column("status", WORDS, nullable=False),
        sa.Column("planned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("condemned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("damage", WORDS, nullable=True),
        sa.CheckConstraint(
            "status IN ('planned', 'live', 'condemned')", name=op.f("ck_pack_status")
        ),
        sa.ForeignKeyConstraint(["version"], ["version.id"], name="fk_pack_version"),
        sa.PrimaryKeyConstraint("id", name="pk_pack"),
        sa.UniqueConstraint("key", name="uq_pack_key"),
    )
    op.create_index("ix_pack_status", "pack", ["status"])
    op.create_index("ix_pack_version", "pack", ["version"])

    op.create_table(
        "ref",
        sa.Column("name", WORDS, nullable=False),
        sa.Column("kind", WORDS, nullable=False),
        sa.Column("version", KEY, nullable=False),
        sa.CheckConstraint("kind IN ('tag', 'branch')", name=op.f("ck_ref_kind")),
        sa.ForeignKeyConstraint(["version"], ["version.id"], name="fk_ref_version"),
        sa.PrimaryKeyConstraint("name", name="pk_ref"),
    )
    op.create_index("ix_ref_version_kind_name", "ref", ["version", "kind", "name"])

    op.create_table(
        "chunk",
        sa.Column("tensor", KEY, nullable=False),
        sa.Column("part", KEY, autoincrement=False, nullable=False),
        sa.Column("ordinal", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("pack", KEY, nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["pack"], ["pack.id"], name="fk_chunk_pack"),
        sa.ForeignKeyConstraint(
            ["tensor", "part"], ["part.tensor", "part.part"], name="fk_chunk_tensor_part"
        ),
        sa.PrimaryKeyConstraint("tensor", "part", "ordinal", name="pk_chunk"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_chunk_digest_tensor", "chunk", ["digest", "tensor"])
    op.create_index("ix_chunk_pack", "chunk", ["pack"])
