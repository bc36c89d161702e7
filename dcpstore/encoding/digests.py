"""Digests: BLAKE3 of raw bytes for a chunk, and of what a tensor is made of for its content.

Source of the hash: https://github.com/BLAKE3-team/BLAKE3-specs (32 bytes of output).
"""

from __future__ import annotations

import json
from collections.abc import Buffer, Iterable, Sequence

from blake3 import blake3

from dcpstore.geometry.grids import Grid

__all__ = ["chunk_digest", "content_digest", "text_digest"]
