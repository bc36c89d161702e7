"""dcpstore: a versioned checkpoint store with a database for a memory."""
