"""Triton kernels, one concern a file, each with a typed function that launches it on tensors.

All of them take part in programmatic dependent launch where the card has it (`pdl`): a kernel lets its successor start
at once, and touches what its predecessor wrote only after `gdc_wait`, which returns when the predecessor has ended.
"""
