"""A line is completed by the script of a shell: commands, options, and refs of a repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, process_environment


def completed(*words: str, repo: str | None, shell: str, folder: Path) -> list[str]:
    """Return what a shell's script gets from `dcpstore` for a line; the last word is begun."""
    environment = process_environment(repo) | {
        "_DCPSTORE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["dcpstore", *words]),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    done = subprocess.run(
        [*command(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def command(folder: Path) -> list[str]:
    """Return a program called `dcpstore`, made in a folder."""
    program = folder / "dcpstore"
    program.write_text(f"#!{sys.executable}\nfrom dcpstore.cli import main\nmain()\n")
    program.chmod(0o755)
    return [str(program)]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_options_and_refs_are_offered(target: str, shell: str, tmp_path: Path) -> None:
    def offered(*words: str, repo: str | None = target) -> str:
        return " ".join(completed(*words, repo=repo, shell=shell, folder=tmp_path))

    assert "rollback" in offered("roll")
    assert "--graph" in offered("log", "--gr")
    assert "best" in offered("show", "b")
    assert "main" not in offered("show", "b")
    assert "main" in offered("diff", "best", "m")
    assert "main" in offered("log", "--branch", "m")
    assert "best" in offered("show", "--repo", target, "b", repo=None)
    assert "best" not in offered("tag", "x")


@pytest.mark.parametrize("repo", [None, "/no/repository", "postgresql://u@127.0.0.1:1/db"])
def test_without_a_repository_nothing_is_offered_and_nothing_is_said(
    repo: str | None, tmp_path: Path
) -> None:
    assert completed("show", "b", repo=repo, shell="bash", folder=tmp_path) == []
    assert completed("stat", repo=repo, shell="bash", folder=tmp_path) == ["plain,status"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_script_works_in_bash(target: str, tmp_path: Path) -> None:
    command(tmp_path)
    script = """
        eval "$(dcpstore completion bash)"
        complete -p dcpstore
        COMP_WORDS=(dcpstore show b); COMP_CWORD=2
        _dcpstore_completion dcpstore b show
        echo "offered ${COMPREPLY[*]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=process_environment(target) | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "-F _dcpstore_completion dcpstore" in done.stdout
    assert done.stdout.endswith("offered best\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_is_valid_in_its_shell(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_DCPSTORE_COMPLETE" in script
    program = shutil.which(shell)
    if program is not None:  # few machines have both
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_another_shell_is_refused(run: Run) -> None:
    result = run("completion", "tcsh")
    assert (result.exit_code, result.stdout) == (2, "")
