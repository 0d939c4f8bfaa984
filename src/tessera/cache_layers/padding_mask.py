"""The mask of a call as transformers makes it from one of padding, made only if something has to see it whole.

It is (batch, 1, queries, slots), so for a long prompt it is large, and what it says is known from the (batch, slots) that it is
made of: whoever reads these needs no more than the rule by which queries see slots. Anything else that touches it, such as
another attention function, is given the mask itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tessera.readback import HostCopy


class PaddingMask(Tensor):
    """Stands for a mask, (batch, 1, queries, slots) bool; the last query is that of the last slot.

    Args:
        shape: shape of the mask.
        device: device of the mask.
        padding: (batch, slots) bool, False for padding; None: there is none.
        window: a query sees this many newest slots, itself included; None: all up to its own.
        make: makes the mask.

    Attributes:
        altered: it, or a view of it, may have been written to, so that only the mask itself says what it hides.
    """

    padding: HostCopy | None
    window: int | None
    altered: bool
    _make: Callable[[], Tensor]
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device,
        padding: HostCopy | None,
        window: int | None,
        make: Callable[[], Tensor],
    ) -> PaddingMask:
        """Make one that has no numbers of its own."""
        self: PaddingMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.padding, self.window, self._make, self._whole = padding, window, make, None
        self.altered = False
        return self

    def real_slots(self) -> NDArray[np.bool_] | None:
        """Return which slots are no padding, (batch, slots); None: all. The mask is read if it was not read before."""
        return None if self.padding is None else cast("NDArray[np.bool_]", self.padding.get())

    def on_cpu(self) -> Tensor:
        """The mask itself on the CPU, made there of the slots that are no padding."""
        batch, _, queries, slots = self.shape
        column = torch.arange(slots)
        seen = column <= column[slots - queries :, None]
        if self.window is not None:
            seen &= column > column[slots - queries :, None] - self.window
        real = self.real_slots()
        return seen.expand(batch, 1, -1, -1) if real is None else torch.as_tensor(real)[:, None, None] & seen

    @property
    def whole(self) -> Tensor:
        """The mask itself."""
        if self._whole is None:
            self._whole = self._make()
        return self._whole

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PaddingMask({tuple(self.shape)}, window={self.window})"

    # What does not come to `__torch_dispatch__`.

    def tolist(self) -> Any:
        """See `Tensor`."""
        return self.whole.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """See `Tensor`."""
        return self.whole.numpy(force=force)

    def __deepcopy__(self, memo: object) -> Tensor:
        return self.whole.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None and "dtype" not in kwargs:
            # To another device, as accelerate takes it from layer to layer: what has been read stays known.
            (mask,), device = args, torch.device(kwargs["device"])
            if not mask.altered:
                return PaddingMask(tuple(mask.shape), device, mask.padding, mask.window, lambda: mask.whole.to(device))
        if any(argument.alias_info is not None for argument in function._schema.arguments):
            # A write, or a view, which may be written to unseen.
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, PaddingMask):
                    each.altered = True
        args, kwargs = tree_map_only(PaddingMask, lambda mask: mask.whole, (args, kwargs))
        return function(*args, **kwargs)


def by_padding(mask: object) -> TypeGuard[PaddingMask]:
    """Whether a mask still is what its padding and its window say."""
    return isinstance(mask, PaddingMask) and not mask.altered


#: On a mask of one call, its copy on the host as bool, which others than the attention have had to read before.
READ = "_tessera_read"


def on_host(padding: Tensor, first: int, slots: int) -> HostCopy:
    """The columns from `first` on of a (batch, slots) mask of padding, as the host is to see them."""
    known: HostCopy | None = getattr(padding, READ, None)
    wanted = HostCopy(padding[:, first : first + slots])
    if known is not None:
        wanted.receive(known.get()[:, first : first + slots])
    return wanted
