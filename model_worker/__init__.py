"""The rank process and all that it computes with.

Importing this package settles, before torch loads its OpenMP runtime, how that runtime's threads wait for each other.
"""

import os

# libgomp reads this once. At its default an idle thread spins for some 15 ms before it sleeps, and when another process
# has one of our cores, the others spin away their whole share of time: a decode step of the 0.6B shape on 2 cores with
# four busy processes beside it took 2080 ms in place of 420. These 2,000 rounds, about 0.1 ms, still bridge the gaps
# between the operations of a step, so threads do not fall asleep within one.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
