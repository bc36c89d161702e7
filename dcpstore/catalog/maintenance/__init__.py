"""Retention, garbage, checks, rebuild and the journal: what keeps a catalog in order."""
