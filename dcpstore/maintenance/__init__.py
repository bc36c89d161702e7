"""Upkeep of a repository: collect garbage, find damage, restore a lost catalog, copy versions."""
