"""The GPU's own ways: Triton kernels (kernels/), attention over the paged pool, the layers' plan, captured graphs."""
