"""The catalog: every SQL statement of dcpstore, on SQLite and Postgres; never returns rows."""
