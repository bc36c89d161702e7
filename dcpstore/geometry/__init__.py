"""Boxes of tensors and the chunk grids that cut them: pure arithmetic, no torch, no zarr."""
