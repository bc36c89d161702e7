"""Torture: everything that can go wrong is made to, and counted: `make torture` prints the table.

A **kind** of fault has a name, its points (places where the fault can strike), and a way to try
one. Trying a point lets the fault strike a real repository and then looks whether what was
committed is still there, bit for bit, and nothing half-made is seen. To add a kind:

1. Write a class with `name`, `points()` and `try_point(point)`, as `tests.torture.kinds.Kind` says,
   in a module `tests/torture/<faults>.py` with a function `kinds(ground) -> Iterable[Kind]`.
   `ground.folder()` is a new folder, `ground.database("postgres")` a new empty database, and
   `ground.pick(points, few)` all points in the long form, and a few of them in the short one;
   `ground.pick(points, few, many)` many in the long one.
   A fault that strikes a whole process strikes a child of `tests.torture.children`, forked from a
   process that has torch loaded already. A try must bound itself: what waits for a child gives it a
   deadline, and says HUNG when that passes.
2. Add the module to `MODULES` in `tests/torture/listing.py`.

The short form (`tests/torture/test_torture.py`) runs with the tests, the long one is
`python -m tests.torture --long`; `--only NAME` takes the kinds whose name holds NAME.
"""
