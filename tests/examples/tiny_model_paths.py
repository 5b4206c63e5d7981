"""Where the two tiny checkpoints lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DENSE = ROOT / "vibe_sgl_lite" / "models" / "tiny"
MOE = ROOT / "examples" / "tiny_model" / "moe"
