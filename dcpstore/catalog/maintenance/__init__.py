"""Retention, garbage, checks, restoring and the journal: what keeps a catalog in order."""
