"""Planners: what each rank writes and reads, in torch's classes."""

from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.state.load_options import LoadOptions
from dcpstore.state.per_rank import PerRank

__all__ = ["DefaultLoadPlanner", "DefaultSavePlanner", "LoadOptions", "PerRank"]
