"""A list of modules that tells type checkers what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

Item_co = TypeVar("Item_co", bound=nn.Module, covariant=True)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[Item_co]):
        """PyTorch's own list, which by itself promises no more than modules."""

        def __iter__(self) -> Iterator[Item_co]: ...

        def __getitem__(self, index: int) -> Item_co: ...  # type: ignore[override]

else:
    ModuleList = nn.ModuleList
