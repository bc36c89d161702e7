"""Planners: what each rank writes and reads, in torch's classes."""

from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.planning.save_planner import DefaultSavePlanner

__all__ = ["DefaultLoadPlanner", "DefaultSavePlanner"]
