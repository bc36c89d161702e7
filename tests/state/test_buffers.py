"""Which tensors of a state are module buffers: those in which ranks may differ."""

from typing import Any

import pytest
import torch

from dcpstore.state.buffers import buffer_names, is_statistic

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def taken(state: Any) -> Any:
    """Return the plain state, as a save takes it."""
    if isinstance(state, torch.nn.Module):
        return state.state_dict()
    if isinstance(state, dict):
        return {key: taken(value) for key, value in state.items()}
    return [taken(value) for value in state] if isinstance(state, list) else state


def test_buffers_of_modules_are_found_at_any_depth() -> None:
    state = {"a": torch.nn.BatchNorm1d(2), "b": [1, {"c": torch.nn.BatchNorm1d(2)}]}
    assert buffer_names(state, taken(state)) == {
        *(f"a.{name}" for name in STATISTICS),
        *(f"b.1.c.{name}" for name in STATISTICS),
    }


def test_a_module_without_buffers_and_a_plain_dict_have_none() -> None:
    state = {"a": torch.nn.Linear(2, 2), "b": {"running_mean": torch.zeros(2)}}
    assert buffer_names(state, taken(state)) == frozenset()


def test_a_buffer_that_a_hook_renamed_is_known_by_its_memory() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))

    def rename(_: Any, given: dict[str, Any], prefix: str, __: Any) -> None:
        for name in list(given):
            given[f"{prefix}core.{name.removeprefix(prefix)}"] = given.pop(name)

    module.register_state_dict_post_hook(rename)
    names = buffer_names({"m": module}, taken({"m": module}))
    assert names == {f"m.core.0.{name}" for name in STATISTICS}


def test_a_buffer_that_is_not_persistent_is_not_in_the_state() -> None:
    module = torch.nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("cache", torch.ones(1), persistent=False)
    assert buffer_names({"m": module}, taken({"m": module})) == {"m.kept"}


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_a_statistic_is_known_by_its_name(name: str) -> None:
    assert is_statistic(f"model.bn.{name}")
    assert not is_statistic(f"model.{name}.weight")
