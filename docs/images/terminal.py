"""Draws `terminal.svg`, the picture of the README: a real session in a real repository.

    python docs/images/terminal.py docs/images/terminal.svg

Every command is run in an empty folder, and what it prints is drawn as a terminal would show it.
The picture has a dark ground of its own, so that it reads well on light and dark pages.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parent.parent.parent
WIDTH = 100  # columns
QUERY = "SELECT step, value FROM history JOIN metrics USING (version) ORDER BY value LIMIT 2"
SESSION = (  # a comment, or a command
    ("A training run on 2 ranks (FSDP2) is stopped; it resumes on 3.", ""),
    ("", "torchrun --standalone --nproc-per-node 2 train.py --repo ckpts --steps 10"),
    ("", "torchrun --standalone --nproc-per-node 3 train.py --repo ckpts --steps 20"),
    ("Every checkpoint is a version, with its history and metrics.", ""),
    ("", "dcpstore tag best main~1"),
    ("", "dcpstore log"),
    ("", "dcpstore diff best main --depth 1"),
    ("The catalog is a database.", ""),
    ("", f"dcpstore sql '{QUERY}'"),
)
THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255)],
)
# Rich's own form, without its frame's title, and without fonts that a browser would have to fetch.
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>A session with dcpstore in a terminal</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def main(target: Path) -> None:
    """Run the session, and write its picture to `target`."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").symlink_to(ROOT / "examples" / "fsdp2_resume.py")
        for comment, command in SESSION:
            if comment:
                gap = "\n" if console.export_text(clear=False) else ""
                console.print(Text(f"{gap}# {comment}", "blue"))
                continue
            console.print(Text.assemble(("$ ", "green"), (command, "bold")))
            console.print(Text(printed(command, folder)), end="")
    svg = console.export_svg(title="", theme=THEME, code_format=FORMAT, unique_id="terminal")
    target.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


def printed(command: str, folder: str) -> str:
    """Return what a command prints.

    Raises:
        SystemExit: it fails; `dcpstore diff` ends with 1 where something changed.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DCPSTORE_REPO": "ckpts",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode > ("diff" in command):
        raise SystemExit(f"{command!r} ended with {done.returncode}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
