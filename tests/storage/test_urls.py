"""Data URLs: paths, file URLs, and what is refused."""

from pathlib import Path

import pytest

from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.storage.urls import open_storage


def test_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    place = tmp_path / "my data%"
    assert open_storage("my data%", base=tmp_path, create=True).url == str(place)
    assert open_storage(str(place)).url == str(place)
    assert open_storage(place.as_uri()).url == str(place)
    assert open_storage(".", base=place).url == str(place)
    with pytest.raises(NotFoundError):
        open_storage("gone", base=tmp_path)


@pytest.mark.parametrize("url", ["", "a\0b", "file://", "file://host/path", "ftp://x/y", "x://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError):
        open_storage(url)
