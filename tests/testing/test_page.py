"""`docs/testing.md`: its examples pass under pytest, and its table lists what is public."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import dcpstore
from dcpstore import testing

ROOT = Path(dcpstore.__file__).parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text()


def test_the_examples_pass(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"test_example_{number}.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 10


def test_the_table_lists_every_public_name() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert named == set(testing.__all__)
    assert testing.__all__ == sorted(testing.__all__)
