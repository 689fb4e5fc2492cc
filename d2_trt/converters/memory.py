"""Which memory holds what was computed of the images, and who reads and writes it while the model is traced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree


def tensors_of(*values) -> list[torch.Tensor]:
    """Tensors among (nested) values."""
    return [x for x in _pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


class TracedTensor(torch.Tensor):
    """What traced tensors become. It carries the guard of its build to threads where no mode of PyTorch's is at work."""

    _guard: Callable[[], object] = staticmethod(lambda: None)  # a weak reference

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not all(issubclass(kind, torch.Tensor) for kind in types):
            return NotImplemented  # others decide
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in tensors_of(args, kwargs):
                guard = tensor._guard() if isinstance(tensor, TracedTensor) else None
                if guard is not None:
                    guard.check_thread(func)
            return func(*args, **kwargs)


class TracedMemory:
    """Storages of traced tensors, those that have a counterpart in the network.

    A traced tensor is known by its counterpart, which a function that PyTorch does not tell of (`nn.Parameter(x)`) loses.
    Its memory is then still known, also where it came back as another storage of the same address (DLPack).
    """

    def __init__(self, constants: Iterable[torch.Tensor] = ()):
        """
        Args:
            constants: parameters and buffers of the model.
        """
        # Whether the model's own code runs, and no function that is converted as a whole.
        self.outside: Callable[[], bool] = lambda: True
        self.converting = False  # a converter is at work, not the function that it converts
        self._guard: Callable[[], object] | None = None
        self._holders: dict[int, list[weakref.ref]] = {}  # traced tensors, by storage
        self._held: list[StorageWeakRef] = []  # so that no other storage gets the same key
        self._addresses: dict[int, StorageWeakRef] = {}
        self._constants: set[int] = set()
        self._constants.update(map(self._key, constants))
        self._written: set[int] = set()

    def _key(self, tensor: torch.Tensor) -> int | None:
        with torch._C.DisableTorchFunction():
            try:
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
            except (NotImplementedError, RuntimeError):  # of a sparse tensor, or one that stands for others
                return None
        held = self._addresses.get(address)
        # What a storage that is no more had may be another's.
        return storage._cdata if held is None or held.expired() else held.cdata

    def add(self, tensor: torch.Tensor, inputs: Iterable[torch.Tensor] = ()) -> None:
        """Note a traced tensor.

        Args:
            inputs: of the function that made it. Where it shows an untraced one, which was repeated for each image, the
                memory stays that of a constant.
        """
        self._put_under_guard(tensor)
        key = self._key(tensor)
        if key is None:
            return
        if key not in self._holders:
            with torch._C.DisableTorchFunction():
                storage = tensor.untyped_storage()
                self._held.append(StorageWeakRef(storage))
                if storage.data_ptr():
                    self._addresses[storage.data_ptr()] = self._held[-1]
        if any(not hasattr(x, "_trt") and self._key(x) == key for x in inputs):
            self._constants.add(key)
        self._holders.setdefault(key, []).append(weakref.ref(tensor))

    def guarded_by(self, guard) -> None:
        """Have traced tensors ask a guard for what may be called in other threads (check_thread). None: no longer."""
        self._guard = None if guard is None else weakref.ref(guard)
        for key in self._holders:
            for tensor in self._others(key, None):
                self._put_under_guard(tensor)

    def _put_under_guard(self, tensor: torch.Tensor) -> None:
        if self._guard is not None and type(tensor) is torch.Tensor:
            tensor.__class__ = TracedTensor
            tensor._guard = self._guard
        elif self._guard is None and type(tensor) is TracedTensor:
            tensor.__class__ = torch.Tensor
            del tensor._guard

    def is_traced(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed of the images."""
        return hasattr(tensor, "_trt") or self._is_untold(tensor)

    def _is_untold(self, tensor: torch.Tensor) -> bool:
        key = self._key(tensor)
        return key in self._holders and key not in self._constants

    def lost(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether one of these shows memory of a traced tensor and has no counterpart itself."""
        return any(not hasattr(x, "_trt") and self._is_untold(x) for x in tensors)

    def foreign(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether one of these has a counterpart that is of another network."""
        return any(
            hasattr(x, "_trt") and all(x is not y for y in self._others(self._key(x), None)) for x in tensors
        )

    # Writes

    def note_write(self, tensor: torch.Tensor) -> None:
        """A converted function writes to a tensor: one of its own, or one that the model has."""
        self._written.add(self._key(tensor))

    def shown(self, tensor: torch.Tensor) -> bool:
        """Whether a traced tensor that is still there shows the memory of this one."""
        return bool(self._others(self._key(tensor), None))

    def _others(self, key: int | None, tensor: torch.Tensor | None) -> list[torch.Tensor]:
        alive = [ref() for ref in self._holders.get(key, ())]
        return [x for x in alive if x is not None and x is not tensor]

    def forget_writes(self) -> None:
        self._written.clear()

    def lost_write(self, inputs: list[torch.Tensor], results: list[torch.Tensor]) -> str | None:
        """What would be lost of the writes of a function that just ran; None where nothing is.

        A tensor that is written to gets another counterpart. All others that show its memory would keep theirs.

        Args:
            inputs, results: tensors that the function took and returned.
        """
        traced = any(hasattr(x, "_trt") for x in inputs)
        for key in self._written:
            targets = {id(x): x for x in inputs if self._key(x) == key}
            target = next(iter(targets.values()), None)
            if target is None or not hasattr(target, "_trt"):
                if self._others(key, None) or (traced and (target is not None or key in self._constants)):
                    return "it writes to a tensor that is not traced itself; compute a new one instead"
                continue  # its own tensor, or a constant that depends on constants
            if len(targets) > 1 or self._others(key, target) or key in self._constants:
                return (
                    "it changes a tensor in place of which other tensors show a part (views): these would keep the old "
                    "values. Compute a new tensor instead"
                )
            if not any(target is x for x in results):
                return "it changes its argument in place and does not return it; compute a new tensor instead"
        return None
