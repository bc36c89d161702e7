"""Torch's StorageWriter and StorageReader on a repository, and on a folder."""
