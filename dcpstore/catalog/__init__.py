"""The catalog: every SQL statement of dcpstore, on SQLite and Postgres; records out, never rows."""
