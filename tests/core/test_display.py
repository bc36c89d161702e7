"""Values as people read them."""

from datetime import timedelta

import pytest

from dcpstore.core.display import human_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (34.2, "34 s"),
        (3600, "1 h"),
        (7530, "2 h 5 min"),
        (90_061, "1 d 1 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert human_duration(timedelta(seconds=seconds)) == text
