"""What is measured: one module a concern, each a function from a `Bench` to rows."""

from __future__ import annotations

from benchmarks.workloads.bench import Bench, Workload
from benchmarks.workloads.whole import measure_bf16, measure_fp32, measure_small

__all__ = ["WORKLOADS", "Bench", "Workload"]

WORKLOADS: dict[str, Workload] = {
    "a": measure_fp32,
    "b": measure_bf16,
    "c": measure_small,
}
