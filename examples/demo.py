"""`make demo`: train on 2 ranks, resume the best version on 1, 4 and 2, and prove each result.

Writes into the folder that it is given, which it empties first. Any proof that fails, and any
command that fails or takes too long, ends it with a message and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fingerprint import fingerprint

import dcpstore

EXAMPLE = os.path.relpath(Path(__file__).with_name("train_gpt.py"))
PATIENCE = 150.0  # seconds for one command
TOLERANCE = 1e-4  # of a loss, where another number of ranks adds the same floats in another order

STRAIGHT = "never-stopped"
RESUMED = {"one-rank": 1, "four-ranks": 4, "two-ranks": 2}
QUERY = """SELECT h.step, h.version, h.branch, h.ranks, t.value AS train_loss, v.value AS val_loss
  FROM history h JOIN metrics t ON t.version = h.version AND t.name = 'train_loss'
                 JOIN metrics v ON v.version = h.version AND v.name = 'val_loss'
 WHERE h.step > (SELECT step FROM history WHERE tags = 'best') ORDER BY h.step, h.version"""


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is emptied first")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    target = str(folder / "ckpts")

    say("2 ranks train; the run is stopped after 40 of 60 steps, and its best version is tagged")
    train(2, target, "--stop-after", "40", "--tag-best", "best")
    say("The same run, never stopped, to compare with; it writes only what the other did not")
    train(2, target, "--branch", STRAIGHT)
    for branch, ranks in RESUMED.items():
        say(f"Resuming the best version on {ranks} rank{'s' * (ranks > 1)}")
        train(ranks, target, "--resume", "best", "--branch", branch)

    say("Proofs")
    with dcpstore.open(target, create=False) as repo:
        prove_versions(repo)
        for branch, ranks in RESUMED.items():
            prove_resumed(repo, branch, exact=ranks == repo.show("best").ranks)

    say("The history in the shell")
    for command in (["log"], ["show", "best"], ["ls", "best", "model.blocks.0.*", "*lr"]):
        run([sys.executable, "-m", "dcpstore", "--repo", target, *command], shown="dcpstore")
    run([sys.executable, "-m", "dcpstore", "--repo", target, "sql", QUERY], shown="dcpstore")
    print(f"\nAll proofs hold. The repository is in {target}: it is yours to explore.")


def train(ranks: int, target: str, *options: str) -> None:
    """Run the example under torchrun."""
    run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", str(ranks)),
            *(EXAMPLE, "--repo", target, *options),
        ],
        shown="torchrun",
    )


def run(command: Sequence[str], *, shown: str) -> None:
    """Run a Python module and wait, but not for ever; what it started ends with it."""
    print("$", shown, *map(quoted, command[3:]), flush=True)
    threads = {"OMP_NUM_THREADS": "1"}  # torchrun sets it too, but warns
    process = subprocess.Popen(command, env=os.environ | threads, start_new_session=True)
    try:
        code = process.wait(PATIENCE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise SystemExit(f"FAILED: it did not end in {PATIENCE:g} s.") from error
        raise
    if code:
        raise SystemExit(f"FAILED: it ended with exit code {code}.")


def quoted(word: str) -> str:
    """Return a word as one would type it in a shell; none of ours holds what double quotes miss."""
    return word if re.fullmatch(r"[\w./:=@-]+", word) else f'"{word}"'


def prove_versions(repo: dcpstore.Repository) -> None:
    """Prove that every version, read without a template, is what its ranks held when they saved."""
    versions = repo.log()
    for version in versions:
        found = fingerprint(repo.read(version.number))
        expect(
            found == version.labels["sha256"],
            f"{version} was saved as {version.labels['sha256']}, but reads as {found}",
        )
    print(f"all {len(versions)} versions read back bit for bit as the ranks held them")


def prove_resumed(repo: dcpstore.Repository, branch: str, *, exact: bool) -> None:
    """Prove that a resumed run equals the run that never stopped, at every step that both saved.

    With `exact` to the last bit of each tensor and loss; else each loss within the tolerance.
    """
    start = repo.show("best")
    straight = {version.step: version for version in repo.log(STRAIGHT)}
    resumed = [version for version in repo.log(branch) if version.branch == branch]
    expect(bool(resumed), f"branch {branch} has no version of its own")
    expect(
        resumed[-1].parent == start.number,
        f"branch {branch} begins at v{resumed[-1].parent}, not at {start}",
    )
    furthest = 0.0
    for version in resumed:
        other = straight[version.step]
        for name, loss in version.metrics.items():
            gap = abs(loss - other.metrics[name])
            furthest = max(furthest, gap)
            expect(
                gap <= (0 if exact else TOLERANCE),
                f"step {version.step}: {name} is {loss!r} on {branch} ({version}) and "
                f"{other.metrics[name]!r} on {STRAIGHT} ({other})",
            )
        if exact:
            expect(
                contents(repo, version) == contents(repo, other),
                f"step {version.step}: {version} and {other} do not hold the same",
            )
    steps = ", ".join(str(version.step) for version in reversed(resumed))
    how = (
        "every tensor and loss equal to the last bit, so no bytes were stored again"
        if exact
        else f"losses within {TOLERANCE:g} (furthest {furthest:.1e}: floats added in another order)"
    )
    print(f"{branch} equals {STRAIGHT} at steps {steps}: {how}")


def contents(repo: dcpstore.Repository, version: dcpstore.Version) -> dict[str, str | None]:
    """Return what a version holds, by FQN: the digest of each tensor, or the value."""
    entries = repo.entries(version.number)
    return {e.fqn: e.value if e.tensor is None else e.tensor.digest for e in entries}


def expect(holds: bool, failure: str) -> None:
    """End the demo unless a proof holds."""
    if not holds:
        raise SystemExit(f"FAILED: {failure}.")


def say(title: str) -> None:
    """Print what comes next."""
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    main()
