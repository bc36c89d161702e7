"""Each kind of storage, by the contract that any storage must keep."""

from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from dcpstore.storage.interface import Storage
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.object_store import ObjectStore
from dcpstore.storage.traced import TracedStorage
from dcpstore.testing import StorageContract


class TestLocalFolder(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalFolder(tmp_path / "data", create=True)


class TestMemoryObjects(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return ObjectStore("memory://", MemoryStore())


class TestLocalObjects(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return ObjectStore(tmp_path.as_uri(), LocalStore(tmp_path))


class TestTraced(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return TracedStorage(LocalFolder(tmp_path / "data", create=True), lambda request: None)
