"""The way to the database: URL, engine, transactions, errors, and many rows at once."""
