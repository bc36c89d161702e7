"""What is measured: one module a concern, each a function from a `Bench` to rows."""

from __future__ import annotations

from benchmarks.workloads.again import measure_layer, measure_unchanged
from benchmarks.workloads.bench import Bench, Workload
from benchmarks.workloads.blocked import measure_blocked
from benchmarks.workloads.coordinator import measure_planning
from benchmarks.workloads.meshes import measure_meshes
from benchmarks.workloads.peak import measure_peak
from benchmarks.workloads.whole import measure_bf16, measure_fp32, measure_small

__all__ = ["WORKLOADS", "Bench", "Workload"]

# By the letters of docs/performance.md.
WORKLOADS: dict[str, Workload] = {
    "a": measure_fp32,
    "b": measure_bf16,
    "c": measure_small,
    "d": measure_unchanged,
    "e": measure_layer,
    "f": measure_meshes,
    "g": measure_blocked,
    "h": measure_planning,
    "i": measure_peak,
}
