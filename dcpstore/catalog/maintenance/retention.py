"""Retention: which versions are kept, by a union of rules.

Invariant: whatever the rules, a branch tip, a tagged version and the newest version never expire.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.expire import expire_versions
from dcpstore.catalog.validation import check_text
from dcpstore.core.durations import as_duration, in_utc
from dcpstore.errors import DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.records import RefRecord, Version

__all__ = ["ExpireReport", "Retention", "Verdict", "expire", "retain"]

_log = logging.getLogger(__name__)

Best = tuple[str, int] | tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules by which versions are kept: a version stays if any rule keeps it.

    Args:
        keep_last: keeps so many of the newest versions of each branch.
        keep_every: keeps versions whose step is a multiple of this.
        keep_best: `("val_loss", 3)` keeps the three versions with the smallest val_loss, and
            `("accuracy", 3, "max")` those with the largest.
        keep_tagged: keeps tagged versions. Every set of rules does; this is for a set without
            another rule.
        keep_since: keeps versions created since a time, or within a duration such as `"7d"`.

    Raises:
        InvalidInputError: there is no rule, or an invalid one.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: Best | None = None
    keep_tagged: bool = False
    keep_since: datetime | timedelta | str | None = None

    def __post_init__(self) -> None:
        if not any(asdict(self).values()) and self.keep_since is None:
            raise InvalidInputError(
                "no rule says which versions to keep; give one, such as keep_last=5 "
                "(--keep-last 5)."
            )
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidInputError(f"{name} is {value!r}; give a whole number from 1.")
        self._check_best()
        if self.keep_since is not None:
            _since(self.keep_since)

    def _check_best(self) -> None:
        match self.keep_best:
            case None | (str(), int(), "min" | "max") | (str(), int()):
                if self.keep_best is None or self.keep_best[1] >= 1:
                    return
        raise InvalidInputError(
            f"keep_best is {self.keep_best!r}; give a metric, how many, and 'min' (the default) or "
            "'max', such as ('val_loss', 3)."
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one version is kept: `kept_by` has every reason; without any, it expires."""

    version: Version
    kept_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpireReport:
    """The versions that expired, or would without `dry_run`: a verdict on each, oldest first."""

    verdicts: tuple[Verdict, ...]
    dry_run: bool

    @property
    def expired(self) -> tuple[int, ...]:
        """The numbers of the versions that expired."""
        return tuple(v.version.number for v in self.verdicts if not v.kept_by)

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the versions that are kept."""
        return tuple(v.version.number for v in self.verdicts if v.kept_by)


def expire(
    catalog: Catalog,
    rules: Retention,
    *,
    author: str,
    branch: str | None = None,
    dry_run: bool = False,
) -> ExpireReport:
    """Expire the versions that no rule keeps; with `branch`, only those saved to it.

    Raises:
        NotFoundError: no version has the metric of `keep_best`, or was saved to `branch`.
    """
    verdicts: tuple[Verdict, ...] = ()

    def choose(versions: Sequence[Version], refs: Sequence[RefRecord]) -> Collection[int]:
        # Assigned, never added to: a retry of the transaction calls this again.
        nonlocal verdicts
        verdicts = _judge(rules, versions, refs, branch=branch)
        return [v.version.number for v in verdicts if not v.kept_by and not dry_run]

    expire_versions(catalog, choose, author=author, rules=_rules_as_json(rules))
    return ExpireReport(verdicts, dry_run)


def retain(catalog: Catalog, rules: Retention, *, branch: str, author: str) -> None:
    """Expire after a save to `branch`; a failure is logged, for the save itself succeeded."""
    try:
        expire(catalog, rules, author=author, branch=branch)
    except DcpstoreError as error:
        _log.warning("nothing expired after the save to %r: %s", branch, error)
    except Exception:  # a bug here must not make a finished save look like a failed one
        _log.warning("nothing expired after the save to %r", branch, exc_info=True)


def _judge(
    rules: Retention,
    versions: Sequence[Version],
    refs: Sequence[RefRecord],
    *,
    branch: str | None,
) -> tuple[Verdict, ...]:
    reasons: dict[int, list[str]] = {version.number: [] for version in versions}
    for ref in refs:
        reasons[ref.version].append(f"{'tag' if ref.kind == 'tag' else 'tip of'} {ref.name}")
    if versions:
        reasons[max(reasons)].append("newest")
    chosen = [version for version in versions if branch in (None, version.branch)]
    if branch is not None and not chosen:
        check_text(branch, what="branch")
        raise NotFoundError.near(
            "branch with versions",
            branch,
            sorted({version.branch for version in versions}),
            "See 'dcpstore branch' for all of them.",
        )
    for number, reason in _kept(rules, chosen):
        reasons[number].append(reason)
    return tuple(
        Verdict(version, tuple(reasons[version.number]))
        for version in sorted(chosen, key=lambda version: version.number)
    )


def _kept(rules: Retention, versions: Sequence[Version]) -> Iterator[tuple[int, str]]:
    """Yield each version that a rule keeps, with the rule; `versions` are sorted newest first."""
    if rules.keep_last is not None:
        seen: dict[str, int] = {}
        for version in versions:
            seen[version.branch] = seen.get(version.branch, 0) + 1
            if seen[version.branch] <= rules.keep_last:
                yield version.number, f"last {rules.keep_last} of {version.branch}"
    if rules.keep_every is not None:
        for version in versions:
            if version.step is not None and version.step % rules.keep_every == 0:
                yield version.number, f"every {rules.keep_every} steps"
    if rules.keep_best is not None:
        name, count = rules.keep_best[:2]
        for number in _best(rules.keep_best, versions)[:count]:
            yield number, f"best {count} by {name}"
    if rules.keep_since is not None:
        since = _since(rules.keep_since)
        for version in versions:
            if version.created_at >= since:
                yield version.number, f"since {since:%Y-%m-%d %H:%M} UTC"


def _best(rule: Best, versions: Sequence[Version]) -> list[int]:
    """Return the numbers of the versions with a metric, the best first; of equals the newer."""
    name, sign = rule[0], -1.0 if "max" in rule[2:] else 1.0
    known = {metric for version in versions for metric in version.metrics}
    if versions and name not in known:
        raise NotFoundError.near(
            "metric", name, sorted(known), "Nothing was expired; 'dcpstore show' names metrics."
        )
    rated = [
        (sign * version.metrics[name], -version.number)
        for version in versions
        if not math.isnan(version.metrics.get(name, math.nan))
    ]
    return [-number for _, number in sorted(rated)]


def _since(given: datetime | timedelta | str) -> datetime:
    if not isinstance(given, datetime):
        return datetime.now(UTC) - as_duration(given, what="keep_since")
    if given.tzinfo is None:
        raise InvalidInputError(f"keep_since {given} has no time zone; give it one, such as UTC.")
    return in_utc(given, what="keep_since")


def _rules_as_json(rules: Retention) -> dict[str, object]:
    """Return the rules as JSON, for the operation."""
    given = {name: value for name, value in asdict(rules).items() if value}
    if rules.keep_since is not None:
        given["keep_since"] = _since(rules.keep_since).isoformat()
    return given
