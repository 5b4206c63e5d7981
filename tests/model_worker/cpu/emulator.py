"""Kernels of another architecture, run by qemu-user: for `CpuKernels` a library like any other.

A call goes to a small program (emulated.cpp) together with all memory that its structure points to, and what comes back
is put in its place. How much memory that is, a structure does not say; but all of it is tensors', and `know` is told of
those whose address is asked for.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Callable, Sequence
from ctypes import Structure, c_void_p
from pathlib import Path
from typing import Any

import torch

from vibe_sgl_lite.model_worker.cpu.library import function_name, structures

SOURCE = Path(__file__).with_name("emulated.cpp")
# Pointers to structures, and which field has their number; None: there is one.
ARRAYS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("Experts", "gate_up"): ("Matrix", "count"),
    ("Experts", "down"): ("Matrix", "count"),
    ("Operation", "experts"): ("Experts", None),
    ("RunProgramCall", "operations"): ("Operation", "count"),
}


class EmulatedLibrary:
    """emulator: the command that runs `program`, which is emulated.cpp, compiled, with `library`."""

    def __init__(self, emulator: Sequence[str], program: Path, library: Path) -> None:
        self._calls = [name for name in structures() if name.endswith("Call")]
        command = [*emulator, str(program), str(library), *map(function_name, self._calls)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._name = self._answers.readline().strip()
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address gets a second meaning

    def know(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage

    def close(self) -> None:
        self._requests.close()
        assert self._process.wait(timeout=30) == 0

    def vsl_create(self, parallel: object, threads: int) -> int:
        return 1

    def vsl_destroy(self, context: int) -> None:
        """The program's context lives as long as the program."""

    def vsl_instruction_set(self, context: int) -> bytes:
        return self._name

    def __getattr__(self, name: str) -> Callable[[int, Any], None]:
        number = [function_name(call) for call in self._calls].index(name)
        return lambda context, reference: self._call(number, reference._obj)

    def _call(self, number: int, structure: Structure) -> None:
        request = _Request(self._storages)
        request.add(structure)
        memory = request.memory()
        blocks = [(ctypes.addressof(table), ctypes.sizeof(table)) for table in request.tables] + memory
        pointers = request.pointers([address for address, _ in memory])
        head = [number, len(blocks), len(request.tables), len(pointers) // 4, *(size for _, size in blocks), *pointers]
        self._requests.write(struct.pack(f"<{len(head)}Q", *head))
        for address, size in blocks:
            self._requests.write(ctypes.string_at(address, size))
        self._requests.flush()
        for address, size in memory:
            answer = self._answers.read(size)
            assert len(answer) == size, f"the program ended: {self._process.wait(timeout=30)}"
            ctypes.memmove(address, answer, size)


class _Request:
    """What goes along with a structure: tables (it and those that it points to), and tensors' memory."""

    def __init__(self, storages: dict[int, torch.UntypedStorage]) -> None:
        self._storages = storages
        self.tables: list[Any] = []
        self._to_tables: list[tuple[int, int, int]] = []  # table, place in it, table pointed to
        self._to_memory: list[tuple[int, int, int]] = []  # table, place in it, address

    def add(self, table: Any) -> int:
        self.tables.append(table)
        number = len(self.tables) - 1
        elements = [table] if isinstance(table, Structure) else list(table)
        for place, element in enumerate(elements):
            self._walk(element, number, place * ctypes.sizeof(element))
        return number

    def _walk(self, structure: Any, table: int, offset: int) -> None:
        for field, kind, *_ in structure._fields_:
            value, place = getattr(structure, field), offset + getattr(type(structure), field).offset
            if isinstance(value, Structure):
                self._walk(value, table, place)
            elif kind is c_void_p and value:
                array = ARRAYS.get((type(structure).__name__, field))
                if array is None:
                    self._to_memory.append((table, place, value))
                else:
                    elements = structures()[array[0]] * (1 if array[1] is None else getattr(structure, array[1]))
                    self._to_tables.append((table, place, self.add(elements.from_address(value))))

    def _storage(self, address: int) -> int:
        return next(s for s, storage in self._storages.items() if s <= address <= s + storage.nbytes())

    def memory(self) -> list[tuple[int, int]]:
        """Address and size, of each storage from the first place on that is pointed to."""
        first: dict[int, int] = {}
        for _, _, address in self._to_memory:
            storage = self._storage(address)
            first[storage] = min(address, first.get(storage, address))
        return [(address, s + self._storages[s].nbytes() - address) for s, address in first.items()]

    def pointers(self, memory: list[int]) -> list[int]:
        numbers: list[int] = []
        for table, place, target in self._to_tables:
            numbers += [table, place, target, 0]
        for table, place, address in self._to_memory:
            block = max((start, number) for number, start in enumerate(memory) if start <= address)[1]
            numbers += [table, place, len(self.tables) + block, address - memory[block]]
        return numbers
