"""The load path: one report of what fits, a chunk query, verified reads into the target tensors."""
