"""Runs migrations on the connection that the catalog hands over, inside its transaction."""

from alembic import context

from dcpstore.catalog.views import create_views, drop_views

connection = context.config.attributes["connection"]
context.configure(connection=connection)
drop_views(connection)
with context.begin_transaction():
    context.run_migrations()
create_views(connection)
