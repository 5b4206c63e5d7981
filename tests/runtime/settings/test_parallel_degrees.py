"""Degrees of parallelism that divide a model are taken; others are refused, and the possible ones named."""

from pathlib import Path
from typing import Any

import pytest

from tests.runtime.settings.test_model_config import DENSE, MOE, read
from vibe_sgl_lite.runtime.errors import ModelConfigError
from vibe_sgl_lite.runtime.settings.parallel_degrees import check_parallel_degrees


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (4, 4), (8, 2)])
def test_possible_degrees(tmp_path: Path, tp: int, ep: int) -> None:
    check_parallel_degrees(read(tmp_path, MOE), tp, ep)


@pytest.mark.parametrize(
    ("config", "tp", "ep", "message"),
    [
        (DENSE, 3, 1, r"--tp 3 .* num_attention_heads=8 is not divisible by 3; possible: 1, 2, 4, 8"),
        (DENSE, 0, 1, "1 or more"),
        (DENSE, 2, 2, "--ep 2 .* has no experts; possible: 1"),
        (DENSE | {"vocab_size": 3, "eos_token_id": 2}, 4, 1, "vocab_size=3 has not a token for each of 4 ranks"),
        (DENSE | {"num_attention_heads": 12, "num_key_value_heads": 6}, 4, 1, "num_key_value_heads=6 neither"),
        (DENSE | {"intermediate_size": 6}, 4, 1, "intermediate_size=6 is not divisible by 4"),
        (MOE, 4, 3, "--tp 4 is not divisible by 3; possible: 1, 2, 4"),
        (MOE | {"num_experts": 6}, 4, 4, "num_experts=6 is not divisible by 4; possible: 1, 2"),
        (MOE | {"moe_intermediate_size": 6}, 4, 1, "moe_intermediate_size=6 is not divisible by tp / ep = 4"),
    ],
)
def test_impossible_degrees(tmp_path: Path, config: dict[str, Any], tp: int, ep: int, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        check_parallel_degrees(read(tmp_path, config), tp, ep)
