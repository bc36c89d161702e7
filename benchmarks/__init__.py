"""What dcpstore costs, side by side with other ways to keep a checkpoint: `make bench`."""
