"""Numbers of tokens that a GPU fills steps with chunks of prompts up to: it captures a graph for each."""


def step_sizes(most: int) -> tuple[int, ...]:
    """Up to `most`, ascending; above 512 in steps of a quarter at most."""
    few = [32, 64, 128, 192, 256, 384, 512]
    many = [(4 + part) << power for power in range(7, most.bit_length()) for part in range(4)]
    return tuple(sorted({min(size, most) for size in (*few, *many)} if most else ()))
