"""The load path: a chunk query, verified reads, straight into the target tensors."""

from dcpstore.loading.flow import LoadSource, load_version
from dcpstore.loading.reading import BoxRequest, ReadCounts, read_boxes, read_value

__all__ = [
    "BoxRequest",
    "LoadSource",
    "ReadCounts",
    "load_version",
    "read_boxes",
    "read_value",
]
