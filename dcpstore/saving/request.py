"""What a caller asks of a save: the arguments that describe the new version, defined here once.

`save`, `async_save` and `RepositoryWriter` take them as `**options: Unpack[SaveOptions]`. Their
types are in the typed dicts, their defaults in `SaveRequest`, and their checks in `make_request`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import (
    Any,
    ForwardRef,
    Literal,
    SupportsFloat,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
)

from dcpstore.catalog.maintenance.retention import Retention
from dcpstore.catalog.validation import as_labels, as_metrics, check_draft
from dcpstore.core.syntax import rank_name
from dcpstore.errors import InvalidInputError
from dcpstore.records import RefLike, SentRef, VersionDraft, VersionRef

__all__ = [
    "MetricsFrom",
    "SaveOptions",
    "SaveRequest",
    "VersionOptions",
    "check_options",
    "draft_of",
    "make_request",
    "own_request",
    "shows_options",
]

MetricsFrom = Literal["all", "rank0"]
_Call = TypeVar("_Call", bound=Callable[..., object])


class VersionOptions(TypedDict, total=False):
    """The arguments of a save that describe the new version; `dcpstore.save` explains each."""

    branch: str
    step: int | None
    tags: Iterable[str]
    message: str
    metrics: Mapping[str, SupportsFloat] | None
    labels: Mapping[str, object] | None
    author: str
    parent: RefLike | None
    expect_tip: RefLike | None
    retention: Retention | None


class SaveOptions(VersionOptions, total=False):
    """The same for a call on every rank, which also says whose metrics and labels count."""

    metrics_from: MetricsFrom


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the caller says about the new version; `parent` and `expect_tip` are refs.

    `retention` says which versions of the branch are kept once this one is committed, and
    `metrics_from` whether all ranks must give the same metrics and labels, or only those of rank 0
    count.
    """

    branch: str = "main"
    step: int | None = None
    message: str = ""
    tags: tuple[str, ...] = ()
    metrics_from: MetricsFrom = "all"
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    parent: SentRef | None = None
    expect_tip: SentRef | None = None
    retention: Retention | None = None

    @property
    def non_defaults(self) -> list[str]:
        """The names of the arguments whose values are not the defaults."""
        default = SaveRequest()
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]


def shows_options(
    kind: type, defaults: Mapping[str, object] | None = None
) -> Callable[[_Call], _Call]:
    """Return a decorator: `inspect.signature` then lists each option of `**options: Unpack[kind]`.

    So help(), editors and the API pages show what `**options` takes. `kind` is a typed dict, and
    `defaults` are its defaults by name. Without them they are those of `SaveRequest`, where an
    option whose default is made by a factory is shown with None.
    """
    defaults = defaults or {
        field.name: None if field.default is MISSING else field.default
        for field in fields(SaveRequest)
    }

    def decorate(call: _Call) -> _Call:
        signature = inspect.signature(call)
        listed = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults[name],
                annotation=hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint,
            )
            for name, hint in kind.__annotations__.items()
        ]
        others = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        positional = [one for one in others if one.kind is not one.KEYWORD_ONLY]
        shown = signature.replace(parameters=[*positional, *listed, *others[len(positional) :]])
        vars(call)["__signature__"] = shown
        return call

    return decorate


def check_options(call: str, options: Mapping[str, object], kind: type = SaveOptions) -> None:
    """Check that `kind` has all these options, as Python checks the arguments of a function.

    Raises:
        TypeError: `kind` lacks one; names it.
    """
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def make_request(*, leads: bool = True, **options: Unpack[SaveOptions]) -> SaveRequest:
    """Return the request that a caller's arguments mean: metrics as floats, labels as text.

    `leads` says whether this rank is the coordinator. With `metrics_from="rank0"` the metrics and
    labels of the other ranks are left out, and not read.

    Raises:
        InvalidInputError: `tags` is not a list of texts, `metrics` or `labels` not a mapping, a
            metric not a number, `retention` not a Retention, or `metrics_from` neither of its
            values; or a catalog cannot store a name, step or text.
        AlreadyExistsError: the branch is one of the tags.
    """
    given: dict[str, Any] = {**options}
    tags, retention = given.get("tags", ()), given.get("retention")
    if isinstance(tags, str):
        raise InvalidInputError(f"tags={tags!r} is one text; pass a list: [{tags!r}].")
    if not isinstance(tags, Iterable):
        raise InvalidInputError(f"tags={tags!r} is not a list; pass one, such as ['best'], or [].")
    if retention is not None and not isinstance(retention, Retention):
        raise InvalidInputError(
            f"retention={retention!r} is not a set of rules; pass one, such as "
            "dcpstore.Retention(keep_last=5)."
        )
    metrics_from = given.get("metrics_from", "all")
    if metrics_from not in get_args(MetricsFrom):
        raise InvalidInputError(
            f"metrics_from={metrics_from!r}; write 'all', and every rank must give the same "
            "metrics and labels, or 'rank0', and only those of rank 0 count."
        )
    is_read = leads or metrics_from == "all"
    given["step"] = _as_int(given.get("step"))
    given["tags"] = tuple(tags)
    given["parent"] = VersionRef.reduced(given.get("parent"))
    given["expect_tip"] = VersionRef.reduced(given.get("expect_tip"))
    given["metrics"] = as_metrics(given.get("metrics") if is_read else None)
    given["labels"] = as_labels(given.get("labels") if is_read else None)
    request = SaveRequest(**given)
    check_draft(draft_of(request, author=request.author))
    return request


def own_request(request: SaveRequest, rank: int) -> SaveRequest:
    """Return the request for what one rank saves by itself: with a branch and tags of its own.

    Raises:
        InvalidInputError: the metrics must come from another rank.
    """
    if request.metrics_from != "all":
        raise InvalidInputError(
            f"metrics_from={request.metrics_from!r} needs what another rank gives, and with "
            "use_collectives=False ranks exchange nothing; leave it out: each version then has the "
            "metrics and labels of its rank."
        )
    tags = tuple(rank_name(tag, rank) for tag in request.tags)
    return replace(request, branch=rank_name(request.branch, rank), tags=tags)


def _as_int(step: int | None) -> int | None:
    """Return a step, such as a NumPy integer, as an int; `check_draft` refuses what is not one."""
    try:
        # a bool has an index too, and is certainly a mistake
        return step if step is None or isinstance(step, bool) else operator.index(step)
    except TypeError:
        return step


def draft_of(request: SaveRequest, *, author: str) -> VersionDraft:
    """Return the part of a draft that a request gives; a catalog is not needed for it."""
    return VersionDraft(
        uid="",
        branch=request.branch,
        step=request.step,
        message=request.message,
        tags=request.tags,
        metrics=request.metrics,
        labels=request.labels,
        author=author,
    )
