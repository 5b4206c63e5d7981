"""Whether so many ranks can share a model: what tensor and expert parallelism split must come out even."""

from vibe_sgl_lite.runtime.errors import ModelConfigError
from vibe_sgl_lite.runtime.settings.model_config import ModelConfig


def check_parallel_degrees(config: ModelConfig, tp_size: int, ep_size: int) -> None:
    """Refuse tensor and expert parallel degrees that do not divide the model; ModelConfigError names the possible ones.

    There are `tp_size` ranks. `ep_size` divides them; each expert is split over tp_size / ep_size of them.
    """
    possible = [degree for degree in range(1, 129) if _tp_problem(config, degree) is None]
    problem = _tp_problem(config, tp_size)
    if problem is not None:
        raise ModelConfigError(
            f"--tp {tp_size} does not fit this model: {problem}; possible: {_join(possible)}", field="tp"
        )
    problem = _ep_problem(config, tp_size, ep_size)
    if problem is not None:
        possible = [degree for degree in range(1, tp_size + 1) if _ep_problem(config, tp_size, degree) is None]
        hint = _join(possible) if possible else "none, choose another --tp"
        raise ModelConfigError(f"--ep {ep_size} does not fit --tp {tp_size}: {problem}; possible: {hint}", field="ep")


def _tp_problem(config: ModelConfig, tp_size: int) -> str | None:
    if tp_size < 1:
        return "it must be 1 or more"
    if config.num_attention_heads % tp_size:
        return f"num_attention_heads={config.num_attention_heads} is not divisible by {tp_size}"
    kv_heads = config.num_key_value_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        return f"num_key_value_heads={kv_heads} neither divides {tp_size} nor is divisible by it"
    if config.vocab_size < tp_size:
        return f"vocab_size={config.vocab_size} has not a token for each of {tp_size} ranks"
    has_dense_layer = any(not config.layer_is_moe(layer) for layer in range(config.num_hidden_layers))
    if has_dense_layer and config.intermediate_size % tp_size:
        return f"intermediate_size={config.intermediate_size} is not divisible by {tp_size}"
    return None


def _ep_problem(config: ModelConfig, tp_size: int, ep_size: int) -> str | None:
    if ep_size < 1:
        return "it must be 1 or more"
    if not config.is_moe:
        return None if ep_size == 1 else f"{config.architecture} has no experts"
    if tp_size % ep_size:
        return f"--tp {tp_size} is not divisible by {ep_size}"
    if config.num_experts % ep_size:
        return f"num_experts={config.num_experts} is not divisible by {ep_size}"
    split = tp_size // ep_size
    if config.moe_intermediate_size % split:
        return f"moe_intermediate_size={config.moe_intermediate_size} is not divisible by tp / ep = {split}"
    return None


def _join(degrees: list[int]) -> str:
    return ", ".join(str(degree) for degree in degrees)
