"""Planners: what each rank writes and reads, in torch's classes."""

from dcpstore.planning.load_options import LoadOptions
from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.planning.per_rank import PerRank
from dcpstore.planning.save_planner import DefaultSavePlanner

__all__ = ["DefaultLoadPlanner", "DefaultSavePlanner", "LoadOptions", "PerRank"]
