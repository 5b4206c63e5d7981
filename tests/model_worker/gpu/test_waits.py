"""What kernels read before they wait for the kernel before them must have been there for longer than that one.

With programmatic dependent launch a kernel may begin while several before it still run: each of these lets the next one
begin as soon as it has begun itself. Waiting is for the one before, and so for all before that; what is read sooner may
be weights, and what the host or a kernel that lets nobody begin early has made of the step.
"""

import ast
from pathlib import Path

import pytest

import vibe_sgl_lite.model_worker.gpu.kernels as kernels

FOLDER = Path(kernels.__path__[0])
WEIGHTS = {"matrix", "weight", "gain", "words", "scales", "query_norm", "key_norm"}
OF_THE_STEP = {"order", "context_lengths", "slots", "positions", "page_table", "tiles", "query_start"}
OF_SLOTS = {"inverse_temperatures", "seeds", "top_ks", "top_ps", "max_distances"}
OF_EARLIER_STEPS = {"keys", "values"}  # the new token's places are not among what is read of these
# Kernels that make what is OF_THE_STEP.
MAKERS = {"expand_rows.py", "speculate.py"}


def early(function: ast.FunctionDef, access: str) -> set[str]:
    """Names of the tensors that are loaded from, or stored to, before the function waits; none if it does not."""
    waits = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Call) and _calls(node, "gdc_wait")]
    return _touched(function, access, min(waits)) if waits else set()


def _touched(function: ast.FunctionDef, access: str, end: float = float("inf")) -> set[str]:
    """In the lines before `end`, by itself or by a kernel's function that it gives them to."""
    found = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Call) or node.lineno >= end:
            continue
        if _calls(node, access):
            found.add(_pointer(node.args[0]))
        elif isinstance(node.func, ast.Name) and node.func.id in HELPERS:
            helper = HELPERS[node.func.id]
            given = dict(zip((argument.arg for argument in helper.args.args), node.args, strict=False))
            found |= {_pointer(given[name]) for name in _touched(helper, access) if name in given}
    moved = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.BinOp)
    }
    return {_pointer(moved[name]) if name in moved else name for name in found}


def _pointer(address: ast.expr) -> str:
    """Of `pointer + offset + ...`, or of some dimensions of it."""
    while isinstance(address, ast.BinOp | ast.Subscript):
        address = address.left if isinstance(address, ast.BinOp) else address.value
    assert isinstance(address, ast.Name), ast.unparse(address)
    return address.id


def _calls(node: ast.AST, name: str) -> bool:
    if not isinstance(node, ast.Call):
        return False
    return (isinstance(node.func, ast.Name) and node.func.id == name) or (
        isinstance(node.func, ast.Attribute) and node.func.attr == name
    )


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (path.name, node)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]


HELPERS = {node.name: node for _, node in functions()}
# The kernels that a dependent launch may start.
STARTED_EARLY = {
    f"{name}:{node.name}": node
    for name, node in functions()
    if any(argument.arg == "PDL" for argument in node.args.args) and node.name.startswith("_")
}


@pytest.mark.parametrize("kernel", STARTED_EARLY)
def test_only_what_is_old_is_read_before_the_wait(kernel: str) -> None:
    function = STARTED_EARLY[kernel]
    assert any(_calls(node, "gdc_wait") for node in ast.walk(function)), "it never waits"
    assert early(function, "load") - WEIGHTS - OF_THE_STEP - OF_SLOTS - OF_EARLIER_STEPS == set()
    assert early(function, "store") == set()


def test_some_read_early() -> None:
    assert "context_lengths" in early(STARTED_EARLY["decode_attention.py:_decode_attention"], "load")


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_makes_a_steps_tables_lets_nobody_begin_early(name: str) -> None:
    made = [node for file, node in functions() if file == name]
    assert made
    assert not any(_calls(node, "gdc_launch_dependents") for function in made for node in ast.walk(function))


def test_a_sum_begins_beside_its_product_once_that_has_waited() -> None:
    """It reads what the sum before it has left, without a wait of its own for that."""
    calls = [
        (condition, ast.unparse(statement))
        for node in ast.walk(STARTED_EARLY["rank_product.py:_rank_product"])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "PDL"
        for each in node.body
        for condition, statement in (
            [(ast.unparse(each.test), i) for i in each.body] if isinstance(each, ast.If) else [("", each)]
        )
    ]
    begun, wait = "gdc_launch_dependents()", ("", "gdc_wait()")
    assert calls.index(("not SEND", begun)) < calls.index(wait) < calls.index(("SEND", begun))
