"""Retention: which versions are kept, by a union of rules.

Invariant: whatever the rules, a branch tip, a tagged version and the newest version never expire.

The rules are conditions in SQL, and only what expires, or what a report is asked for, leaves the
database. So a save with rules costs the same after a hundred versions and after a hundred thousand.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Select,
    and_,
    exists,
    func,
    literal,
    not_,
    select,
)

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.maintenance.expire import SLICE, expire_slice
from dcpstore.catalog.read.known_names import distinct_names
from dcpstore.catalog.read.log_filter import best_ids, has_metric, known_metrics
from dcpstore.catalog.read.versions import is_visible, load_versions
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import Words
from dcpstore.catalog.validation import check_text
from dcpstore.core.durations import as_duration, in_utc
from dcpstore.errors import DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.records import Version

__all__ = ["ExpireReport", "Retention", "Verdict", "expire", "retain"]

_log = logging.getLogger(__name__)
_version, _ref = tables.version, tables.ref
_MOST = 2**63 - 1  # the largest integer of both databases
_GLANCE = 100  # versions that are read to see whether any expires
_OFFERED = 500  # names among which the nearest is looked for

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


class ExpireReport:
    """The versions that expired, or would without `dry_run`: a verdict on each, oldest first.

    There may be very many versions, so verdicts are read from the catalog when they are first
    asked for. They are on the versions that there were when the rules were applied.

    Attributes:
        dry_run: whether nothing was changed.
    """

    def __init__(
        self, catalog: Catalog, judge: _Judge, found: Sequence[int], *, dry_run: bool
    ) -> None:
        self.dry_run = dry_run
        self._catalog = catalog
        self._judge = judge
        self._found = found

    @cached_property
    def expired(self) -> tuple[int, ...]:
        """The numbers of the versions that expired."""
        if self.dry_run and len(self._found) > _GLANCE:  # these are only some of them
            self._found = _find_all(self._catalog, self._judge)
        return tuple(sorted(self._found))

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the versions that are kept."""
        return tuple(v.version.number for v in self.verdicts if v.kept_by)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """A verdict on each version to which the rules were applied."""
        return _verdicts(self._catalog, self._judge, () if self.dry_run else self.expired)

    def __repr__(self) -> str:
        return f"ExpireReport(expired={self.expired!r}, dry_run={self.dry_run!r})"


def expire(
    catalog: Catalog,
    rules: Retention,
    *,
    author: str,
    branch: str | None = None,
    dry_run: bool = False,
) -> ExpireReport:
    """Expire the versions that no rule keeps; with `branch`, only those saved to it.

    Nobody waits for a dry run, or while nothing is found that expires.

    Raises:
        NotFoundError: no version has the metric of `keep_best`, or was saved to `branch`.
    """
    if rules.keep_since is not None:  # a span ends now, in every slice
        rules = replace(rules, keep_since=_since(rules.keep_since))
    judge, found = _look(catalog, rules, branch)
    if dry_run or not found:
        return ExpireReport(catalog, judge, found, dry_run=dry_run)

    def find(connection: Connection) -> Sequence[int]:
        judge = _judge(connection, rules, branch)
        return connection.scalars(judge.doomed(connection).limit(SLICE)).all()

    expired: list[int] = []
    while True:
        going = expire_slice(catalog, find, author=author, rules=_rules_as_json(rules))
        expired += going
        if len(going) < SLICE:
            return ExpireReport(catalog, judge, expired, dry_run=False)


def retain(catalog: Catalog, rules: Retention, *, branch: str, author: str) -> None:
    """Expire after a save to `branch`; a failure is logged, for the save itself succeeded."""
    try:
        expire(catalog, rules, author=author, branch=branch)
    except DcpstoreError as error:
        _log.warning("nothing expired after the save to %r: %s", branch, error)
    except Exception:  # a bug here must not make a finished save look like a failed one
        _log.warning("nothing expired after the save to %r", branch, exc_info=True)


@reads
def _look(
    connection: Connection, rules: Retention, branch: str | None
) -> tuple[_Judge, Sequence[int]]:
    """Return the judge of the versions as they are, and the numbers of those that would expire.

    If there are more than `_GLANCE`, these are some of them, and more than `_GLANCE`.
    """
    judge = _judge(connection, rules, branch)
    rows = connection.execute(judge.doomed(connection).limit(_GLANCE + 1))
    return judge, [row.number for row in rows]


@reads
def _find_all(connection: Connection, judge: _Judge) -> Sequence[int]:
    """Return the numbers of all versions that would expire."""
    doomed = judge.doomed(connection).subquery("doomed")
    return connection.scalars(select(doomed.c.number)).all()


@reads
def _verdicts(
    connection: Connection, judge: _Judge, expired: Collection[int]
) -> tuple[Verdict, ...]:
    """Return the verdicts on all versions; those of the numbers `expired` have expired since."""
    query = judge.considered(connection, expired)
    names = connection.execute(
        select(_ref.c.version, _ref.c.kind, _ref.c.name)
        .where(_ref.c.version.in_(select(query.subquery("considered").c.id)))
        .order_by(_ref.c.name)
    )
    named: dict[int, list[str]] = {}
    for row in names:
        what = "tag" if row.kind == "tag" else "tip of"
        named.setdefault(row.version, []).append(f"{what} {row.name}")
    rules = judge.rules(connection)
    rows = connection.execute(query.add_columns(*(rule.keeps for rule in rules))).all()
    ids = wanted_ids(connection, [row.id for row in rows])
    versions = {v.number: v for v in load_versions(connection, ids, with_expired=True)}
    gone = set(expired)
    verdicts = []
    for id_, number, branch, *keeps in sorted(rows, key=lambda row: row.number):
        reasons = named.get(id_, [])
        for rule, does_keep in zip(rules, keeps, strict=True):
            if does_keep:
                reasons.append(rule.reason.format(branch=branch))
        verdicts.append(Verdict(versions[number], () if number in gone else tuple(reasons)))
    return tuple(verdicts)


class _Rule(NamedTuple):
    """A rule as a condition on a row of `version`; `reason` may have a field `branch`."""

    keeps: ColumnElement[bool]
    reason: str


@dataclass(frozen=True, slots=True)
class _Judge:
    """What decides which versions expire, in one state of the catalog.

    Attributes:
        given: the rules; `keep_since` is a time.
        branch: the branch whose versions are judged, or None for all.
        newest: the number of the newest version; later ones are not judged.
        best: the ids of the versions that `keep_best` keeps.
    """

    given: Retention
    branch: str | None
    newest: int
    best: Sequence[int]

    def considered(self, connection: Connection, expired: Collection[int]) -> Select[Any]:
        """Return a query (id, number, branch) of the versions that are judged.

        Those of the numbers `expired` are among them, though they have expired.
        """
        visible = is_visible() & (_version.c.number <= self.newest)
        if expired:
            visible |= _version.c.number.in_(wanted_ids(connection, expired))
        query = select(_version.c.id, _version.c.number, _version.c.branch).where(visible)
        return query if self.branch is None else query.where(_version.c.branch == self.branch)

    def doomed(self, connection: Connection) -> Select[Any]:
        """Return a query (id, number) of the versions that no rule keeps, in any order.

        An index of live versions has all that the rules ask for, by branch.
        """
        query = select(_version.c.id, _version.c.number).where(
            is_visible(),
            _version.c.number < self.newest,
            ~exists().where(_ref.c.version == _version.c.id),
        )
        if self.branch is not None:
            query = query.where(_version.c.branch == self.branch)
        if self.given.keep_last is None and self.branch is None:
            names = distinct_names(_version.c.branch, is_visible())
            query = query.join_from(names, _version, _version.c.branch == names.c.name)
        elif self.given.keep_last is not None:  # only what is older than the last ones
            last = self._last(self.given.keep_last)
            query = query.join_from(last, _version, _version.c.branch == last.c.name).where(
                _version.c.number < last.c.first
            )
        return query.where(*(not_(keeps) for keeps, _ in self._by_row(connection)))

    def rules(self, connection: Connection) -> list[_Rule]:
        """Return the rules that may keep a version which no ref names."""
        rules = [_Rule(_version.c.number == self.newest, "newest")]
        if (count := self.given.keep_last) is not None:
            last = self._last(count)
            first = select(last.c.first).where(last.c.name == _version.c.branch).scalar_subquery()
            is_last = _version.c.number >= func.coalesce(first, 0)
            rules.append(_Rule(is_last, f"last {count} of {{branch}}"))
        return rules + self._by_row(connection)

    def _by_row(self, connection: Connection) -> list[_Rule]:
        """Return the rules that need no other row."""
        rules = []
        if (every := self.given.keep_every) is not None:
            step = _version.c.step
            is_multiple = and_(step.is_not(None), step % min(every, _MOST) == 0)
            rules.append(_Rule(is_multiple, f"every {every} steps"))
        if self.given.keep_best is not None:
            name, count = self.given.keep_best[:2]
            is_best = _version.c.id.in_(wanted_ids(connection, self.best))
            rules.append(_Rule(is_best, f"best {count} by {_braced(name)}"))
        if isinstance(since := self.given.keep_since, datetime):
            rules.append(_Rule(_version.c.created_at >= since, f"since {since:%Y-%m-%d %H:%M} UTC"))
        return rules

    def _last(self, count: int) -> CTE:
        """Return a table (name, first): each branch, and its oldest version of the last `count`.

        `first` is NULL where it has fewer.
        """
        if self.branch is None:
            names = distinct_names(_version.c.branch, is_visible())
        else:
            names = select(literal(self.branch, Words).label("name")).cte("known_name")
        first = (
            select(_version.c.number)
            .where(_version.c.branch == names.c.name, _version.c.number <= self.newest)
            .where(is_visible())
            .order_by(_version.c.number.desc())
            .offset(min(count, _MOST) - 1)
            .limit(1)
            .scalar_subquery()
        )
        return select(names.c.name, first.label("first")).cte("last")


def _braced(text: str) -> str:
    """Return a text that `str.format` returns unchanged."""
    return text.replace("{", "{{").replace("}", "}}")


def _judge(connection: Connection, rules: Retention, branch: str | None) -> _Judge:
    """Return the judge of the versions as they are.

    Raises:
        NotFoundError: no version has the metric of `keep_best`, or was saved to `branch`.
    """
    among = () if branch is None else (_version.c.branch == branch,)
    newest = select(_version.c.number).where(is_visible()).order_by(_version.c.number.desc())
    has_versions = select(_version.c.id).where(is_visible(), *among).exists()
    number, is_known = connection.execute(
        select(newest.limit(1).scalar_subquery(), has_versions)
    ).one()
    if branch is not None and not is_known:
        check_text(branch, what="branch")
        names = distinct_names(_version.c.branch, is_visible(), most=_OFFERED)
        raise NotFoundError.near(
            "branch with versions",
            branch,
            connection.scalars(select(names.c.name)).all(),
            "See 'dcpstore branch' for all of them.",
        )
    best: Sequence[int] = ()
    if rules.keep_best is not None and is_known:
        name, count = rules.keep_best[:2]
        mode = "max" if "max" in rules.keep_best[2:] else "min"
        best = best_ids(
            connection,
            name,
            min(count, _MOST),
            mode=mode,
            among=among,
            newer=True,
        )
        if not best and not has_metric(connection, name, among=among):
            raise NotFoundError.near(
                "metric",
                name,
                known_metrics(connection, among=among),
                "Nothing was expired; 'dcpstore show' names metrics.",
            )
    return _Judge(rules, branch, number or 0, best)


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
