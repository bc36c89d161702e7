"""The database: URL, engine, transactions, errors, and many rows or keys at once."""
