"""${message}"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}  # four digits, one more than the last: the order tells old from new
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
