"""`docs/dcp.md`: every public name and argument of torch.distributed.checkpoint, and ours.

The page is made of both modules as they are installed. What ours lacks or changes needs a reason
here, or there is no page.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcpstore
from tests.dcp.rows import ROWS, Row
from tests.torch_release import of_newest

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # of no process group
    of_newest,
]

PAGE = Path(dcpstore.__file__).parent.parent / "docs" / "dcp.md"
PACKAGE = "torch.distributed.checkpoint"

HEAD = f"""# torch.distributed.checkpoint, name by name

Every public name of `{PACKAGE}` 2.13 and its modules, and every argument of those that dcpstore
offers too: "same", "wider" (torch's and more), or "refused", with the reason.
[Migrating from DCP](migrating-from-dcp.md) says how to move a program. This page is written by
`tests/dcp/test_page.py` from both modules as they are. It fails where dcpstore lacks something
without a reason, and calls what each row says (`tests/dcp/rows.py`).

A program only needs another import:

```text
import dcpstore as dcp
from dcpstore.state_dict import get_state_dict, set_state_dict
```

## Different on purpose

- **Nothing is overwritten.** A second save to the same place is a new version; torch replaces the
  files of the first.
- **No pickle.** Values are stored as data, and a load runs no code. A value that only pickle can
  carry is refused, unless `allow_pickle=True`.
- **A dtype that differs is an error**, as a shape that differs is; torch converts silently.
  `on_dtype="cast"` converts.
- **Everything that does not fit is named** in one error, for all ranks; torch names the first
  missing key. No tensor is touched before all ranks agree that all fits.
- **Every byte is checked** against its digest before it reaches a tensor; `verify=False` does not.
- **Errors are exceptions** (`dcpstore.DcpstoreError`): one that all ranks share is raised as it
  is; different ones as `RankFailure`. Torch raises `CheckpointException`, a `BaseException`.
- **A new optimizer is filled.** Torch asks it what to load, and before its first step it has no
  state to name.
- **Models on the meta device are filled**, and no process group is needed for it.
- **Values that a partial load does not find stay.** Torch turns those whose kind it does not know
  (a set, a complex number) into None.
"""

TESTS = """
## Torch's own tests

The tests of distributed checkpointing of PyTorch 2.6 (the source package of Debian 13) were run
against torch 2.13 on the CPU with gloo, those for GPUs too: checkpoint, file system, planner,
DTensor, FSDP1, FSDP2, HSDP, tensor parallelism, pipelines, end to end, format tools, state dict.
Of 136 tests 123 pass with torch's own storage; the others need an accelerator or what torch has
changed since. Of these 123 pass

- **122** through torch's functions on `FileSystemWriter` and `FileSystemReader`;
- **119** through `dcpstore.save`, `load` and `async_save` into a repository, in the place of
  torch's functions.

What does not pass, and why:

- One test, in both, saves with torch's `FsspecWriter` and loads by the folder's name. A folder of
  torch's own files is not a repository: the error names it, and `dcpstore import` stores it as a
  version.
- Three tests ask, through `dcpstore.save` and `load`, for the type of an error that is another one
  here: of a missing key, of another shape, of a place with an unknown scheme. See below.
"""

# What goes wrong, in the same way with torch's functions and with ours.
ERRORS: dict[str, Callable[[Any, Path], object]] = {
    "a key of the state is not in the checkpoint": lambda it, folder: it.load(
        {"w": torch.zeros(2), "other": torch.zeros(2)}, checkpoint_id=folder
    ),
    "a tensor of the state has another shape": lambda it, folder: it.load(
        {"w": torch.zeros(3)}, checkpoint_id=folder
    ),
    "nothing was saved there": lambda it, folder: it.load(
        {"w": torch.zeros(2)}, checkpoint_id=folder / "other"
    ),
    "the place has an unknown scheme": lambda it, folder: it.save(
        {"w": torch.zeros(2)}, checkpoint_id="abc://there"
    ),
    "no place is given": lambda it, folder: it.save({"w": torch.zeros(2)}),
    "a value cannot even be pickled": lambda it, folder: it.save(
        {"w": lambda: None}, checkpoint_id=folder
    ),
}

SAME, WIDER, REFUSED = "same", "wider", "refused"

AS_IT_IS = (SAME, "torch's own; dcpstore takes and gives it as it is")
TYPE = (SAME, "a type of torch's state-dict functions; import it from torch")
INSIDE = (SAME, "import it from torch: it works on our plans and descriptions")

# What the page says of a name that dcpstore does not offer.
LACKING = {
    "CheckpointException": (
        REFUSED,
        "because it is not an `Exception`: `RankFailure`, or the error that all ranks share. "
        "Torch's own calls raise it, on our storage too",
    ),
    "BytesStorageMetadata": AS_IT_IS,
    "ChunkStorageMetadata": AS_IT_IS,
    "TensorStorageMetadata": AS_IT_IS,
    "Metadata": (SAME, "planners are given it, with `version`, `storage_meta` and `planner_data`"),
    "MetadataIndex": AS_IT_IS,
    "TensorProperties": (SAME, "of what was saved, `dtype` is kept"),
    "StorageMeta": (
        SAME,
        "`save_id` is the uid of the version, so a writer that is used again has a new one",
    ),
    "WriteItemType": AS_IT_IS,
    "LoadItemType": AS_IT_IS,
    "BytesIOWriteData": AS_IT_IS,
    "TensorWriteData": AS_IT_IS,
    "WriteResult": AS_IT_IS,
    "SerializationFormat": (SAME, "taken by `FileSystemWriter`, and of no effect: packs have one"),
    "StatefulT": TYPE,
    "FQNS_T": TYPE,
    "PrimitiveType": TYPE,
    "ValueType": TYPE,
    "DictValueType": TYPE,
    "ListDictValueType": TYPE,
    "OptimizerStateType": TYPE,
    "HuggingFaceStorageReader": (
        SAME,
        "torch's own as `storage_reader=`; `dcpstore import` reads safetensors into versions",
    ),
    "HuggingFaceStorageWriter": (
        SAME,
        "torch's own as `storage_writer=`; `dcpstore export` writes safetensors. An `hf://` id is "
        "refused: it names no repository",
    ),
    "QuantizedHuggingFaceStorageReader": (SAME, "torch's own as `storage_reader=`"),
    "load_sharded_optimizer_state_dict": (
        REFUSED,
        "because torch deprecates it for `dcpstore.state_dict` and `load`; torch's own takes our "
        "readers in a process group",
    ),
    "create_default_local_load_plan": INSIDE,
    "create_default_global_load_plan": INSIDE,
    "create_default_local_save_plan": INSIDE,
    "create_default_global_save_plan": INSIDE,
    "create_read_items_for_chunk_list": INSIDE,
    "find_tensor_shard": INSIDE,
    "find_state_dict_object": INSIDE,
    "FileSystem": INSIDE,
    "FileSystemBase": INSIDE,
    "dcp_to_torch_save": (
        REFUSED,
        "because it opens torch's own files; `dcpstore export` writes one of a version",
    ),
    "torch_save_to_dcp": (SAME, "torch's own; `dcpstore import` takes both kinds of files"),
    "BroadcastingTorchSaveReader": (SAME, "as `storage_reader=`, as any of torch's readers"),
    "DynamicMetaLoadPlanner": (SAME, "as `planner=`, as any of torch's planners"),
    "AsyncStager": (SAME, "as `async_stager=`; without one, ours uses its buffers again"),
    "BlockingAsyncStager": (SAME, "as `AsyncStager`"),
    "DefaultStager": (SAME, "as `AsyncStager`"),
    "StagingOptions": (SAME, "as `AsyncStager`; `staging_limit=` bounds the bytes of our own copy"),
    "AsyncCheckpointerType": (SAME, "as `async_checkpointer_type=`"),
    "AsyncSaveResponse": (WIDER, "every `PendingSave` is one, and a `Future` of the version"),
}
# Names that torch keeps private and that programs use.
PRIVATE = {
    "_load_state_dict_from_keys": (SAME, "with our readers; `repo.read` needs no template either"),
    "_EmptyStateDictLoadPlanner": (SAME, "with our readers"),
    "FsspecWriter": (
        SAME,
        "torch's own as `storage_writer=`. A repository's data lie in an object store by "
        "`dcpstore.open(database, data='s3://bucket/prefix')`; an `s3://` id alone is refused, "
        "because a catalog cannot be kept there",
    ),
    "FsspecReader": (SAME, "torch's own as `storage_reader=`"),
}
# What programs do with torch's calls, beyond names and arguments.
HABITS = {
    "steps by folder": (
        SAME,
        "`checkpoint_id=f'ckpts/step_{n}'` makes one repository per step, as torch makes one "
        "folder. One repository with `step=n` shares unchanged chunks and has a history",
    ),
    "pickled values": (REFUSED, "because a load would run code; `allow_pickle=True` allows them"),
}

OWN_STORAGE = (
    SAME,
    "any of torch's too; torch then works, with our planner. Second without its "
    "name, it is taken with torch's warning",
)
NO_EFFECT = "of no effect: it says how torch lays out its files"

# What an argument of torch's does, where "the same" does not say all.
ARGUMENTS = {
    ("async_save", "storage_writer"): OWN_STORAGE,
    ("save", "storage_writer"): OWN_STORAGE,
    ("load", "storage_reader"): OWN_STORAGE,
    ("async_save", "async_checkpointer_type"): (
        SAME,
        "PROCESS needs a process group, of all ranks, and a state and planner that can be pickled; "
        "else it is refused",
    ),
    ("async_save", "async_stager"): (SAME, "the caller closes it"),
    ("save", "use_collectives"): (
        SAME,
        "False saves what each rank holds as its own version, on its own branch",
    ),
    ("async_save", "use_collectives"): (SAME, "as for `save`; refused with PROCESS"),
    ("save", "checkpoint_id"): (
        WIDER,
        "another name for `repo`, where a second save adds a version; a tag where "
        "`storage_writer` is a `RepositoryWriter`",
    ),
    ("async_save", "checkpoint_id"): (WIDER, "as for `save`"),
    ("load", "checkpoint_id"): (
        WIDER,
        "another name for `repo`; a ref where `storage_reader` is a `RepositoryReader`",
    ),
    ("save", "no_dist"): (
        SAME,
        "False without a process group saves this process, without warning",
    ),
    ("DefaultSavePlanner", "dedup_replicated_tensors"): (
        SAME,
        "deprecated by torch, of no effect there",
    ),
    ("DefaultSavePlanner", "dedup_save_to_lowest_rank"): (
        SAME,
        "else replicas go to the rank with the fewest bytes of its own",
    ),
    ("DefaultSavePlanner", "enable_plan_caching"): (
        SAME,
        "of no effect: an unchanged plan is found by its digest, and never used for another state",
    ),
    ("DefaultLoadPlanner", "allow_partial_load"): (SAME, "as `strict=False` of `load`"),
    ("FileSystemWriter", "single_file_per_rank"): (SAME, NO_EFFECT),
    ("FileSystemWriter", "sync_files"): (WIDER, "of no effect: a save is always durable"),
    ("FileSystemWriter", "thread_count"): (
        SAME,
        "of no effect: as many as torch.get_num_threads() says",
    ),
    ("FileSystemWriter", "per_thread_copy_ahead"): (SAME, NO_EFFECT),
    ("FileSystemWriter", "cache_staged_state_dict"): (SAME, "of no effect: ours stages nothing"),
    ("FileSystemWriter", "overwrite"): (
        WIDER,
        "True adds a version, and nothing is lost; False refuses a folder that has one",
    ),
    ("FileSystemWriter", "_extensions"): (
        REFUSED,
        "because they change the stored bytes, which are read by range; an empty list is taken",
    ),
    ("FileSystemWriter", "serialization_format"): (SAME, NO_EFFECT),
    ("FileSystemReader", "_extension_registry"): (
        SAME,
        "of no effect: no stored byte went through an extension",
    ),
}

# Public members of torch's classes that ours of the same name lack.
MEMBERS = {
    ("FileSystemWriter", "stage"): "torch's `async_save` stages with its `DefaultStager` instead",
    ("FileSystemWriter", "synchronize_staging"): "as `stage`",
    ("FileSystemWriter", "should_synchronize_after_execute"): "as `stage`",
    ("FileSystemWriter", "close"): "as `stage`",
}


def public_names() -> dict[str, object]:
    """Return what torch's package and its modules declare public, by name."""
    names = {
        name: thing
        for name, thing in vars(dcp).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    for module in pkgutil.iter_modules(dcp.__path__, f"{PACKAGE}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            found = importlib.import_module(module.name)
            names.update((name, getattr(found, name)) for name in found.__all__)
    return dict(sorted(names.items()))


def ours(name: str) -> tuple[str, object] | None:
    """Return where dcpstore offers a name of torch's, and what it is."""
    if name in dcpstore.__all__:
        return f"dcpstore.{name}", getattr(dcpstore, name)
    if name in dcpstore.state_dict.__all__:
        return f"dcpstore.state_dict.{name}", getattr(dcpstore.state_dict, name)
    return None


def arguments(thing: object) -> dict[str, inspect.Parameter]:
    assert callable(thing)
    return dict(inspect.signature(thing).parameters)


def reworked() -> Iterator[tuple[str, object, object]]:
    """Yield the names that dcpstore offers as its own: torch's thing and ours."""
    for name, thing in public_names().items():
        found = ours(name)
        if found is not None and found[1] is not thing:
            yield name, thing, found[1]


def argument_lines(name: str, theirs: object, own: object) -> Iterator[str]:
    """Yield a line for each argument of torch's, and one for what ours adds.

    Raises:
        AssertionError: ours lacks one, or has another default, and no reason is written.
    """
    given = arguments(own)
    for position, (argument, parameter) in enumerate(arguments(theirs).items()):
        row = ARGUMENTS.get((name, argument))
        assert argument in given, f"{name}({argument}=) is lacking; take it"
        same = given[argument].default == parameter.default
        assert same or row, f"{name}({argument}=) has another default; write a reason"
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert list(given).index(argument) == position, f"{name}({argument}=) has moved"
        kind, why = row or (SAME, "")
        yield f"| `{argument}` | {kind} | {why} |"
    added = [f"`{argument}`" for argument in given if argument not in arguments(theirs)]
    if added:
        yield f"| | adds | {', '.join(added)} |"


def rows_of(names: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for name, (kind, why) in names.items():
        shown = name if " " in name else f"`{name}`"
        yield f"| {shown} | {kind} | {why} |"


@functools.cache
def error_table() -> str:
    """Return what torch's functions and ours raise where the same goes wrong."""
    lines = ["| what goes wrong | torch raises | dcpstore raises |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        faces = {name: Path(folder, name) for name in ("torch", "dcpstore")}
        for name, fails in ERRORS.items():
            raised = []
            for face, place in faces.items():
                it = dcp if face == "torch" else dcpstore
                it.save({"w": torch.ones(2)}, checkpoint_id=place)
                with pytest.raises((Exception, dcp.CheckpointException)) as caught:
                    fails(it, place)
                raised.append(_named(caught.value))
            lines.append(f"| {name} | {raised[0]} | {raised[1]} |")
    return "\n".join(lines)


def _named(error: BaseException) -> str:
    kind = f"`{type(error).__name__}`"
    if isinstance(error, dcp.CheckpointException):
        ((inner, _),) = error.failures.values()
        return f"{kind}, of `{type(inner).__name__}`"
    return kind


def page() -> str:
    lines = ["| torch's name | | dcpstore's |", "|---|---|---|"]
    for name, thing in public_names().items():
        found = ours(name)
        if found is None:
            assert name in LACKING, f"{name} is lacking; write a reason, or offer it"
            lines += rows_of({name: LACKING[name]})
        elif found[1] is thing:
            lines.append(f"| `{name}` | {SAME} | `{found[0]}`: the same object |")
        else:
            lines.append(f"| `{name}` | {WIDER} | `{found[0]}`: its own, see below |")
    text = f"{HEAD}{TESTS}\n## Errors\n\n{error_table()}\n"
    text += "\n## Names\n\n" + "\n".join(lines) + "\n"
    for title, rows in (("Private names", PRIVATE), ("Habits", HABITS)):
        text += f"\n## {title}\n\n| | | |\n|---|---|---|\n" + "\n".join(rows_of(rows)) + "\n"
    text += "\n## Arguments\n"
    for name, theirs, own in reworked():
        table = "\n".join(argument_lines(name, theirs, own))
        text += f"\n### `{name}`\n\n| torch's argument | | |\n|---|---|---|\n{table}\n"
        left_out = [f"`{m}` ({why})" for (owner, m), why in MEMBERS.items() if owner == name]
        text += f"\nNot offered: {'; '.join(left_out)}.\n" if left_out else ""
    return text


def test_the_page_is_what_both_modules_are() -> None:
    written = page()
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        PAGE.write_text(written)
    assert PAGE.read_text() == written, "run 'make docs' and look at the difference"


def test_no_reason_is_out_of_date() -> None:
    lacking = {name for name in public_names() if ours(name) is None}
    assert LACKING.keys() == lacking
    known = {(name, a) for name, theirs, _ in reworked() for a in arguments(theirs)}
    assert ARGUMENTS.keys() <= known


def test_each_row_has_a_call_behind_it() -> None:
    """Those of the names that dcpstore offers are in test_names."""
    arguments_of = {f"{name}({a}=)" for name, theirs, _ in reworked() for a in arguments(theirs)}
    assert ROWS.keys() == arguments_of | LACKING.keys() | PRIVATE.keys() | HABITS.keys()


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is",
    "ignore:Detected an existing",
    "ignore:.*_get_pg_default_device",  # torch's own reader calls what torch deprecates
    "ignore:Multiple backends are registered",
    "ignore:.*deprecated:FutureWarning",
)
@pytest.mark.parametrize("call", dict.fromkeys(ROWS.values()), ids=lambda call: call.__name__)
def test_what_a_row_says_is_so(call: Row, tmp_path: Path) -> None:
    call(tmp_path)


@pytest.mark.parametrize(
    "name", [name for name, theirs, _ in reworked() if inspect.isclass(theirs)]
)
def test_our_classes_have_the_members_of_torchs(name: str) -> None:
    theirs = public_names()[name]
    own = {n: m for n, _, m in reworked()}[name]
    lacking = {m for m in dir(theirs) if not m.startswith("_") and not hasattr(own, m)}
    assert lacking == {member for owner, member in MEMBERS if owner == name}


def test_an_argument_without_a_reason_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    error_table()  # which is made once, and by the functions as they are
    with monkeypatch.context() as patch:
        patch.setattr(dcpstore, "load", lambda state_dict, **options: None)
        with pytest.raises(AssertionError, match=r"load\(\w+=\) is lacking"):
            page()
    monkeypatch.delitem(LACKING, "Metadata")
    with pytest.raises(AssertionError, match="Metadata is lacking"):
        page()
