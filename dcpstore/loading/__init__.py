"""The load path: one report of what fits, a chunk query, verified reads into the target tensors."""

from dcpstore.loading.load_pipeline import LoadSource, load_version

__all__ = ["LoadSource", "load_version"]
