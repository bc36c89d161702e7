"""Saves that run while training goes on, or before a job is ended."""
