"""The load path: a chunk query, verified reads, straight into the target tensors."""

from dcpstore.loading.flow import LoadSource, load_version
from dcpstore.loading.reading import BoxRequest, ReadCounts, read_boxes, read_values
from dcpstore.loading.selection import Index, read_entries

__all__ = [
    "BoxRequest",
    "Index",
    "LoadSource",
    "ReadCounts",
    "load_version",
    "read_boxes",
    "read_entries",
    "read_values",
]
