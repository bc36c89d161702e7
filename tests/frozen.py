"""What was loaded before this module is left alone by the garbage collector from now on.

There are half a million objects of torch, and a walk over them takes a third of a second; in a
process that was forked it copies them, too.
"""

import gc

gc.collect()
gc.freeze()
