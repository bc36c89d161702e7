"""Entry sets: about 64 neighbours, shared by what did not change, with boundaries that stay."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dcpstore.formats.entry_tree import EntryTree, cut, grow, regrow
from dcpstore.records import NewEntry

LAYERS = 400


def entries(layers: Sequence[str], changed: frozenset[str] = frozenset()) -> list[NewEntry]:
    """Return twelve entries for each layer; those of `changed` FQNs hold something else."""
    found = []
    for layer in layers:
        for i in range(12):
            fqn = f"model.layers.{layer}.weight.{i}"
            found.append(NewEntry(fqn, (fqn,), "tensor", ("b" if fqn in changed else "a") * 64))
    return found


def names(layers: int) -> list[str]:
    return [f"{i:04}" for i in range(layers)]


def nodes(tree: EntryTree) -> set[bytes]:
    return {
        *(one.digest for one in tree.sets),
        *(one.digest for one in tree.groups),
        tree.root.digest,
    }


def test_sets_have_about_64_entries():
    sizes = [len(one.entries) for one in grow(entries(names(LAYERS))).sets]
    assert 48 < sum(sizes) / len(sizes) < 80
    assert min(sizes) > 32
    assert max(sizes) < 256


def test_the_tree_holds_every_entry_once_in_order():
    listed = entries(names(LAYERS))
    tree = grow(reversed(listed))
    assert [entry for one in tree.sets for entry in one.entries] == sorted(listed)
    below = [child for one in tree.groups for child in one.children]
    assert below == [one.child for one in tree.sets]
    assert list(tree.root.children) == [one.child for one in tree.groups]


def test_one_changed_entry_is_one_new_node_on_each_level():
    before = grow(entries(names(LAYERS)))
    after = grow(entries(names(LAYERS), frozenset({"model.layers.0200.weight.5"})))
    assert len(nodes(after) - nodes(before)) == 3


def test_a_layer_that_is_added_anywhere_moves_only_the_boundaries_beside_it():
    before = nodes(grow(entries(names(LAYERS))))
    for layer in ("-1", "0107a", "0250a", "9999"):
        after = grow(entries(sorted([*names(LAYERS), layer])))
        new = [one for one in after.sets if one.digest not in before]
        assert 1 <= len(new) <= 4, layer


def test_the_digest_covers_each_fact_of_an_entry():
    entry = NewEntry("w", ("w",), "blob", "a" * 64, "x")
    others = [
        entry._replace(fqn="v"),
        entry._replace(path=("w", 0)),
        entry._replace(kind="tensor"),
        entry._replace(tensor_digest="b" * 64),
        entry._replace(value="y"),
        entry._replace(value=None),
    ]
    assert len({grow([one]).root.digest for one in [entry, *others]}) == 7


def test_few_entries_are_one_set_and_no_entries_an_empty_one():
    assert [len(one.entries) for one in grow(entries(names(2))).sets] == [24]
    empty = grow([])
    assert [one.entries for one in empty.sets] == [[]]
    assert empty.root.children[0].first == ""
    assert cut([]) == [0]


@given(st.sets(st.integers(0, 499), max_size=20))
def test_a_tree_with_other_values_is_the_one_that_grows_from_them(places: set[int]) -> None:
    every = [NewEntry(f"layer.{i}.w", ("w", i), "value", value=str(i)) for i in range(500)]
    tree = grow(every)
    changed = {every[i].fqn: every[i]._replace(value="other") for i in places}
    again = regrow(tree, changed)
    assert again == grow(changed.get(entry.fqn, entry) for entry in every)
    kept = {id(one) for one in (*tree.sets, *tree.groups)}
    touched = {id(one) for one in again.sets} - kept
    assert len(touched) <= len(places)
