"""Sequences that make each item when it is asked for: all items together may not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, overload

_T = TypeVar("_T")


class ByNumber(Sequence[_T]):
    """Give items by number; a subclass implements `item`, for numbers from 0, and `__len__`."""

    def item(self, number: int) -> _T:
        """Return the item of a number."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> _T: ...
    @overload
    def __getitem__(self, number: slice) -> list[_T]: ...
    def __getitem__(self, number: int | slice) -> _T | list[_T]:
        if isinstance(number, slice):
            return [self.item(i) for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self.item(number % len(self))
