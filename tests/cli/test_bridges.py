"""`dcpstore import` and `export`: their output, exit codes and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run

FILES = {"dcp": ".metadata", "safetensors": "model.safetensors", "zarr": "zarr.json"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of torch.save."""
    path = tmp_path / "in.pt"
    torch.save({"w": torch.arange(6.0), "n": torch.arange(3), "lr": 0.5}, path)
    return path


@pytest.fixture
def filled(empty: str, run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a repository with one version; the current folder has what it came from."""
    monkeypatch.chdir(source.parent)
    Path("bad.pt").write_bytes(source.read_bytes()[:-40])
    Path("bad.safetensors").write_bytes(b"\xff" * 20)
    Path("void").mkdir()
    assert run("import", "in.pt", repo=empty).exit_code == 0
    return empty


def test_an_import_and_every_export(empty: str, run: Run, source: Path, tmp_path: Path) -> None:
    args = ("--branch", "hub", "--tag", "a", "--tag", "b", "--step", "9", "-m", "hi")
    done = run("import", str(source), *args, repo=empty)
    assert (done.exit_code, done.output) == (0, "imported v1 on branch hub: 48 B, 0 B reused\n")
    (shown,) = json.loads(run("log", "--json", repo=empty).output)
    assert (shown["branch"], shown["tags"], shown["step"], shown["message"]) == (
        "hub",
        ["a", "b"],
        9,
        "hi",
    )
    for form, name in FILES.items():
        out = tmp_path / form
        done = run("export", "a", str(out), "--format", form, repo=empty)
        assert done.exit_code == 0, done.output
        assert done.output.startswith(f"exported v1 to {out}: 2 tensors and 1 value, 48 B in ")
        assert (out / name).is_file()
        again = run("import", str(out), repo=empty) if form != "zarr" else done
        assert again.exit_code == 0, again.output
    done = run("export", "a", str(tmp_path / "out.pt"), "--format", "torch", repo=empty)
    assert done.exit_code == 0
    assert torch.load(tmp_path / "out.pt")["lr"] == 0.5


def test_json(empty: str, run: Run, source: Path, tmp_path: Path) -> None:
    done = run("import", str(source), "--dtype", "bf16", "--json", repo=empty)
    version = json.loads(done.stdout)
    assert (version["number"], version["nbytes"]) == (1, 36)
    out = tmp_path / "out.safetensors"
    args = ("--format", "safetensors", "--dtype", "fp32", "--tensors-only", "--json")
    report = json.loads(run("export", "main", str(out), *args, repo=empty).stdout)
    assert report["version"] == version
    assert {key: report[key] for key in report if key != "version"} == {
        "path": str(out),
        "format": "safetensors",
        "files": 1,
        "tensors": 2,
        "values": 0,
        "nbytes": 48,
    }
    assert load_file(out)["w"].dtype == torch.float32


def test_several_files_and_shards(empty: str, run: Run, tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(100)}, tmp_path / f"{name}.safetensors")
    files = [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert run("import", *files, repo=empty).exit_code == 0
    args = ("--format", "safetensors", "--max-shard-size", "400B")
    done = run("export", "v1", str(tmp_path / "out"), *args, repo=empty)
    assert done.output.endswith(" in 3 files\n")
    assert run("import", *files, str(tmp_path), repo=empty).exit_code == 2


def test_weights_alone_under_other_names(empty: str, run: Run, tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2), "b": torch.ones(3)}, "optim": {"m": torch.ones(2)}}
    torch.save(state, tmp_path / "in.pt")
    assert run("import", str(tmp_path / "in.pt"), repo=empty).exit_code == 0
    out = tmp_path / "adapter_model.safetensors"
    args = ("--include", "model", "--exclude", "*.b", "--strip-prefix", "model.")
    done = run("export", "v1", str(out), "--format", "safetensors", *args, repo=empty)
    assert done.exit_code == 0, done.output
    assert "1 tensor and 0 values" in done.output
    assert load_file(out).keys() == {"w"}
    args = ("--format", "torch", "--rename", "model.w=a", "--rename", "optim.m=b=c")
    assert run("export", "v1", str(tmp_path / "x.pt"), *args, repo=empty).exit_code == 0
    assert torch.load(tmp_path / "x.pt").keys() == {"a", "b=c", "model"}


FAILURES: list[tuple[tuple[str, ...], int, str]] = [
    (("import", "nix"), 1, "nothing is at 'nix'"),
    (("import", "void"), 1, "neither"),
    (("import", "in.pt", "in.pt"), 2, "not a safetensors file"),
    (("import", "bad.pt"), 3, "truncated"),
    (("import", "bad.safetensors"), 3, "safetensors"),
    (("import", "in.pt", "--dtype", "int7"), 2, "int7"),
    (("import", "in.pt", "--branch", "a..b"), 2, "a..b"),
    (("import",), 2, "SOURCE"),
    (("export", "main", "in.pt", "--format", "torch"), 11, "exists"),
    (("export", "nix", "out", "--format", "torch"), 1, "nix"),
    (("export", "main", "no/out", "--format", "zarr"), 1, "missing"),
    (("export", "main", "out", "--format", "zarr", "--include", "nix"), 1, "'dcpstore ls v1'"),
    (("export", "main", "out", "--format", "zarr", "--rename", "w"), 2, "OLD=NEW"),
    (("export", "main", "out", "--format", "zarr", "--rename", "w=n"), 2, "both be exported"),
    (("export", "main", "out"), 2, "--format"),
    (("export", "main", "out", "--format", "dcp", "--max-shard-size", "1"), 2, "safetensors"),
    (("export", "main", "out", "--format", "zarr", "--allow-pickle"), 2, "pickle"),
    (("export", "main", "out", "--format", "safetensors", "--max-shard-size", "x"), 2, "'x'"),
]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_failures(filled: str, run: Run, subtests: pytest.Subtests) -> None:
    for args, code, message in FAILURES:
        with subtests.test(args=args):
            done = run(*args, repo=filled)
            assert (done.exit_code, message in done.output) == (code, True), done.output
            assert len(json.loads(run("log", "--json", repo=filled).output)) == 1


def test_no_repository(run: Run, source: Path, tmp_path: Path) -> None:
    repo = str(tmp_path / "none")
    assert run("import", str(source), repo=repo).exit_code == 10
    assert not Path(repo).exists()


class Odd:
    """A class that runs nothing, but would have to be imported."""


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_pickles_need_leave(empty: str, run: Run, tmp_path: Path) -> None:
    torch.save({"odd": Odd()}, tmp_path / "in.pt")
    refused = run("import", str(tmp_path / "in.pt"), "--json", repo=empty)
    assert refused.exit_code == 1
    assert json.loads(refused.stderr.splitlines()[-1])["error"]["kind"] == "unsafe_data"
    assert run("import", str(tmp_path / "in.pt"), "--allow-pickle", repo=empty).exit_code == 0
    out = str(tmp_path / "out.pt")
    assert run("export", "main", out, "--format", "torch", repo=empty).exit_code == 1
    args = ("--format", "torch", "--allow-pickle")
    assert run("export", "main", out, *args, repo=empty).exit_code == 0
