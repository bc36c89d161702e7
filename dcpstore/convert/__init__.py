"""Bridges: checkpoints of other formats into a repository, and versions out of it.

One module a format; what they share is `importing` (a foreign checkpoint through the real save),
`exporting` (a version, box after box) and `targets` (output that appears whole or not at all).
Invariant: no bridge holds more than a few chunks, or one box of a tensor, at a time.
"""

from dcpstore.convert.dcp import import_dcp
from dcpstore.convert.safetensors_files import import_safetensors
from dcpstore.convert.torch_files import import_torch

__all__ = ["import_dcp", "import_safetensors", "import_torch"]
