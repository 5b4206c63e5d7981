"""How long an idle engine on a CPU waits for company before it begins a step.

Requests that are sent together share the first step; what comes while others decode gets what these can spare, in
small steps, and those cost more a token. So the engine waits until none has come for a lull, which hardly matters
beside what the step will take; for some lulls at most; and not where the step is full.
"""

from vibe_sgl_lite.scheduler.cost import CostModel, chunk_work

LULL_SHARE, LEAST_LULL_S, MOST_LULL_S = 0.01, 0.001, 0.005  # of what the step should take, and its bounds
MOST_LULLS = 5


def wait_s(cost: CostModel, tokens: int, room: int, waited_s: float) -> float:
    """For another request, at most; 0: begin. tokens: of the prompts that have come, in a step that has `room`.
    waited_s: since the first of them."""
    if tokens >= room:
        return 0.0
    step_s = cost.seconds(chunk_work(0, tokens)) if cost.measured else 0.0
    lull_s = min(max(LEAST_LULL_S, LULL_SHARE * step_s), MOST_LULL_S)
    return max(0.0, min(lull_s, MOST_LULLS * lull_s - waited_s))
