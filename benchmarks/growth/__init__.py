"""What a version costs as tensors, versions, ranks and writers grow: `make bench-scale`."""
