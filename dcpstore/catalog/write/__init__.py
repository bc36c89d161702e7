"""Mutations of the catalog: saves, refs, annotations, undo; each leaves an operation."""
