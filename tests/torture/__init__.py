"""Torture: everything that can go wrong is made to, and counted: `make torture` prints the table.

`README.md` says how it works, and how to add a kind of fault.
"""
