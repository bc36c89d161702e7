"""What changed between versions: by digest from the catalog, and in numbers from chunks.

The diff itself needs neither torch nor numpy; `measure` does, and `plots` matplotlib: they are
imported by who asks for them.
"""

from __future__ import annotations

from dcpstore.history.diff import Diff, EntryDiff, ModuleDiff, TensorStats, diff_versions, fold_diff

__all__ = ["Diff", "EntryDiff", "ModuleDiff", "TensorStats", "diff_versions", "fold_diff"]
