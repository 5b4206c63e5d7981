"""The free list of KV pages. Knows page numbers only: nothing of requests, tokens or tensors."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0..num_pages-1, the most recently freed first (their memory is warm)."""

    __slots__ = ("_free", "num_pages")

    def __init__(self, num_pages: int) -> None:
        self.reset(num_pages)

    def reset(self, num_pages: int) -> None:
        """All pages are free."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages that nobody else holds. The caller has made sure that so many are free."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        return pages

    def free(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return list(self._free)
