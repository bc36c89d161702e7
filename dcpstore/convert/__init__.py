"""Bridges: checkpoints of other formats into a repository, and versions out of it.

One or two modules for each format; what they share is `importing` (a foreign checkpoint through the
real save), `exporting` (a version, box after box) and `paths` (output that appears whole or not at
all).
Invariant: no bridge holds more than a few chunks, or some boxes of a tensor, at a time.
"""

from dcpstore.convert.dcp_folder import export_dcp, import_dcp
from dcpstore.convert.exporting import Exported
from dcpstore.convert.formats import import_any
from dcpstore.convert.safetensors_files import export_safetensors, import_safetensors
from dcpstore.convert.torch_files import export_torch, import_torch
from dcpstore.convert.zarr_folder import export_zarr

__all__ = [
    "Exported",
    "export_dcp",
    "export_safetensors",
    "export_torch",
    "export_zarr",
    "import_any",
    "import_dcp",
    "import_safetensors",
    "import_torch",
]
