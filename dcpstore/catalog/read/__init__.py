"""Queries of the catalog; nothing here writes."""
