"""`docs/dcp.md`: every public name and argument of torch.distributed.checkpoint, and ours.

The page is made of both modules as they are installed. What ours lacks or changes needs a reason
here, or there is no page.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

import dcpstore

PAGE = Path(dcpstore.__file__).parent.parent / "docs" / "dcp.md"
PACKAGE = "torch.distributed.checkpoint"

HEAD = f"""# torch.distributed.checkpoint, name by name

Every public name of `{PACKAGE}` 2.13 and its modules, and every argument of those that dcpstore
offers too. This page is written by `tests/dcp/test_page.py` from both modules as they are; it fails
where dcpstore lacks something without a reason.

A program changes its import and goes on:

```text
import dcpstore as dcp
from dcpstore.state_dict import get_state_dict, set_state_dict
```

## Different on purpose

- **Nothing is overwritten.** A second save to the same place is a new version; torch replaces the
  files of the first.
- **No pickle.** Values are stored as data, and a load runs no code. A value that only pickle can
  carry is refused, unless `allow_pickle=True`.
- **A dtype that differs is an error**, as a shape that differs is; torch converts without a word.
  `on_dtype="cast"` converts.
- **Everything that does not fit is named** in one error, for all ranks; torch names the first
  missing key. No tensor is touched before all ranks agree that all fits.
- **Every byte is checked** against its digest before it reaches a tensor; `verify=False` does not.
- **Errors are exceptions** (`dcpstore.DcpstoreError`): one that all ranks share is raised as it
  is, others as `RankFailure`. Torch raises `CheckpointException`, which is a `BaseException`.
- **A new optimizer is filled.** Torch asks it what to load, and before its first step it has no
  state to name.
- **Models on the meta device are filled**, and no process group is needed for it.
- **What ranks hold alike must be alike.** `save` and `async_save` compare plain values and tensors
  by digest and refuse those that differ; torch saves one rank's. Under torch's own `save`,
  `RepositoryWriter` does what torch's writers do ([more](guarantees.md#what-is-not-promised)).
- **Each rank for itself** (`use_collectives=False`): torch waits in a barrier at the end of the
  save and the load, `dcpstore.save` and `load` for nobody. Rank 3 saves to the branch
  `main/rank-3`, its tags end in `/rank-3`, and `load` without such a name finds the rank's own, as
  torch's does, where no version has the plain name. Retention, `parent` and `expect_tip` are of
  that branch.
- **Values that a partial load does not find stay.** Torch turns those whose kind it does not know
  (a set, a complex number) into None.
"""

AS_IT_IS = "torch's own; dcpstore takes and gives it as it is"
TYPE = "a type of torch's state-dict functions; import it from torch"
BRIDGE = "`dcpstore import` and `dcpstore export` read and write safetensors"
INSIDE = "a part of torch's own planner or storage; ours have their own"

# Why dcpstore does not offer a name.
LACKING = {
    "CheckpointException": "`RankFailure`, or the error that all ranks share: both are exceptions",
    "BytesStorageMetadata": AS_IT_IS,
    "ChunkStorageMetadata": AS_IT_IS,
    "TensorStorageMetadata": AS_IT_IS,
    "Metadata": AS_IT_IS,
    "MetadataIndex": AS_IT_IS,
    "TensorProperties": AS_IT_IS,
    "StorageMeta": AS_IT_IS,
    "WriteItemType": AS_IT_IS,
    "LoadItemType": AS_IT_IS,
    "BytesIOWriteData": AS_IT_IS,
    "TensorWriteData": AS_IT_IS,
    "WriteResult": AS_IT_IS,
    "SerializationFormat": "taken by `FileSystemWriter`, and of no effect: packs have one format",
    "StatefulT": TYPE,
    "FQNS_T": TYPE,
    "PrimitiveType": TYPE,
    "ValueType": TYPE,
    "DictValueType": TYPE,
    "ListDictValueType": TYPE,
    "OptimizerStateType": TYPE,
    "HuggingFaceStorageReader": BRIDGE,
    "HuggingFaceStorageWriter": BRIDGE,
    "QuantizedHuggingFaceStorageReader": BRIDGE + "; block-quantized ones with torch's reader",
    "load_sharded_optimizer_state_dict": "`dcpstore.state_dict` and `load`, as torch says itself",
    "create_default_local_load_plan": INSIDE,
    "create_default_global_load_plan": INSIDE,
    "create_default_local_save_plan": INSIDE,
    "create_default_global_save_plan": INSIDE,
    "create_read_items_for_chunk_list": INSIDE,
    "find_tensor_shard": INSIDE,
    "find_state_dict_object": INSIDE,
    "FileSystem": INSIDE,
    "FileSystemBase": INSIDE,
    "dcp_to_torch_save": "of torch's folders; `dcpstore export` for a repository",
    "torch_save_to_dcp": "to torch's folders; `dcpstore import` for a repository",
    "BroadcastingTorchSaveReader": "taken as `storage_reader=`, as any of torch's readers",
    "DynamicMetaLoadPlanner": "taken as `planner=`, as any of torch's planners",
    "AsyncStager": "for torch's own `async_save`; ours stages into buffers that it uses again",
    "BlockingAsyncStager": "as `AsyncStager`",
    "DefaultStager": "as `AsyncStager`",
    "StagingOptions": "as `AsyncStager`; `staging_limit=` bounds the bytes",
    "AsyncCheckpointerType": "`async_save` goes on in a thread; torch's own takes "
    "`RepositoryWriter` in threads and processes",
    "AsyncSaveResponse": "`PendingSave`, with `staged` and `result()`",
}

TORCHS_ASYNC = "for a `storage_writer`, to which torch's own `async_save` then saves"
ALONE = "False saves each rank's own on a branch of its own (`main/rank-0`), which `load` finds"
LAYS_OUT = "of no effect: it says how torch lays out its files"

# Why an argument of torch's is lacking, or what it does instead.
ARGUMENTS = {
    (
        "async_save",
        "storage_writer",
    ): "any of torch's; the save is then torch's own, with our planner",
    ("async_save", "async_checkpointer_type"): TORCHS_ASYNC,
    ("async_save", "async_stager"): TORCHS_ASYNC,
    ("async_save", "use_collectives"): ALONE,
    ("save", "checkpoint_id"): "another name for `repo`; a tag where `storage_writer` is ours",
    ("async_save", "checkpoint_id"): "another name for `repo`",
    ("load", "checkpoint_id"): "another name for `repo`; a ref where `storage_reader` is ours",
    ("save", "storage_writer"): "any of torch's; the save is then torch's own, with our planner",
    ("load", "storage_reader"): "any of torch's; the load is then torch's own, with our planner",
    ("save", "use_collectives"): ALONE,
    ("save", "no_dist"): "False without a process group saves this process, without a warning",
    ("DefaultSavePlanner", "dedup_replicated_tensors"): "deprecated by torch, of no effect there",
    ("DefaultSavePlanner", "dedup_save_to_lowest_rank"): "else replicas go to the rank with the "
    "fewest bytes of its own",
    (
        "DefaultSavePlanner",
        "enable_plan_caching",
    ): "of no effect: each save is planned, so that none is written by an old plan",
    ("DefaultLoadPlanner", "allow_partial_load"): "as `strict=False` of `load`",
    ("FileSystemWriter", "single_file_per_rank"): LAYS_OUT,
    ("FileSystemWriter", "sync_files"): "of no effect: a save is always durable",
    ("FileSystemWriter", "thread_count"): "of no effect: as many as torch.get_num_threads() says",
    ("FileSystemWriter", "per_thread_copy_ahead"): LAYS_OUT,
    ("FileSystemWriter", "cache_staged_state_dict"): "of no effect: ours stages nothing",
    ("FileSystemWriter", "overwrite"): "True adds a version; False refuses a folder that has one",
    ("FileSystemWriter", "_extensions"): "refused, for it changes the stored bytes",
    ("FileSystemWriter", "serialization_format"): LAYS_OUT,
    ("FileSystemReader", "_extension_registry"): "of no effect: ours writes none",
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


def argument_lines(name: str, theirs: object, mine: object) -> Iterator[str]:
    """Yield a line for each argument of torch's, and one for what ours adds.

    Raises:
        AssertionError: ours lacks one, or has another default, and no reason is written.
    """
    given = arguments(mine)
    for position, (argument, parameter) in enumerate(arguments(theirs).items()):
        reason = ARGUMENTS.get((name, argument))
        if argument not in given:
            assert reason, f"{name}({argument}=) is lacking; write a reason, or take it"
            yield f"| `{argument}` | no | {reason} |"
            continue
        same = given[argument].default == parameter.default
        assert same or reason, f"{name}({argument}=) has another default; write a reason"
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert list(given).index(argument) == position, f"{name}({argument}=) has moved"
        yield f"| `{argument}` | yes | {reason or 'the same'} |"
    added = [f"`{argument}`" for argument in given if argument not in arguments(theirs)]
    if added:
        yield f"| | adds | {', '.join(added)} |"


def page() -> str:
    lines = ["| torch's name | dcpstore's | |", "|---|---|---|"]
    for name, thing in public_names().items():
        found = ours(name)
        if found is None:
            assert name in LACKING, f"{name} is lacking; write a reason, or offer it"
            lines.append(f"| `{name}` | | {LACKING[name]} |")
        elif found[1] is thing:
            lines.append(f"| `{name}` | `{found[0]}` | the same object |")
        else:
            lines.append(f"| `{name}` | `{found[0]}` | its own: see below |")
    text = f"{HEAD}\n## Names\n\n" + "\n".join(lines) + "\n\n## Arguments\n"
    for name, theirs, mine in reworked():
        table = "\n".join(argument_lines(name, theirs, mine))
        text += f"\n### `{name}`\n\n| torch's argument | taken | |\n|---|---|---|\n{table}\n"
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


@pytest.mark.parametrize(
    "name", [name for name, theirs, _ in reworked() if inspect.isclass(theirs)]
)
def test_our_classes_have_the_members_of_torchs(name: str) -> None:
    theirs = public_names()[name]
    mine = {n: m for n, _, m in reworked()}[name]
    lacking = {m for m in dir(theirs) if not m.startswith("_") and not hasattr(mine, m)}
    assert lacking == {member for owner, member in MEMBERS if owner == name}


def test_an_argument_without_a_reason_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dcpstore, "load", lambda state_dict, **options: None)
        with pytest.raises(AssertionError, match=r"load\(\w+=\) is lacking"):
            page()
    monkeypatch.delitem(LACKING, "Metadata")
    with pytest.raises(AssertionError, match="Metadata is lacking"):
        page()
