"""Of which network an engine is: weights and modules, and whether they are the same still."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from . import cache_key
from .module_tree import describe_modules


class NetworkChanged(Exception):
    """The model is not the one any more that the key was made from."""


@dataclass(frozen=True)
class NetworkDigest:
    """sha256 of a model's weights, and its modules as describe_modules has them."""

    weights: str
    modules: Mapping[str, str]

    def modules_digest(self) -> str:
        return cache_key.digest(self.modules)

    def types(self) -> dict[str, str]:
        return {path: name for path, name in self.modules.items() if ":" not in path}


class NetworkWatch:
    """Reads a model's digest again and again.

    Attributes that running the model changes, such as counters and tables it fills, are no other network: they keep the
    value that they had first.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._moved: dict[str, str | None] = {}

    def read(self) -> NetworkDigest:
        """
        Raises:
            CacheError: see cache_key.weights_digest.
        """
        modules = {**describe_modules(self._model), **self._moved}
        kept = {path: value for path, value in modules.items() if value is not None}
        return NetworkDigest(cache_key.weights_digest(self._model), kept)

    def forget(self) -> None:
        """Every attribute counts again: the user says that the model is another."""
        self._moved.clear()

    @contextlib.contextmanager
    def unchanged(self, digest: NetworkDigest) -> Iterator[None]:
        """Around what runs the model for an engine of `digest`.

        Raises:
            NetworkChanged: the model is another before, or it became another meanwhile. What failed then says nothing.
        """
        if self.read() != digest:
            raise NetworkChanged
        try:
            yield
        except Exception as error:
            if self._became_another(digest):
                raise NetworkChanged from error
            raise
        now = self.read()
        if _is_another(now, digest):
            raise NetworkChanged
        for path in {*digest.modules, *now.modules}:
            if digest.modules.get(path) != now.modules.get(path):
                self._moved[path] = digest.modules.get(path)

    def _became_another(self, digest: NetworkDigest) -> bool:
        try:
            return _is_another(self.read(), digest)
        except Exception:  # a GPU that failed gives nothing to digest
            return False


def call_on_load(model: nn.Module, method: Callable[[], None]) -> None:
    """Have a method called after every load_state_dict on a model or a part of it.

    The model does not keep alive the method's object: a backend, with its engines, that it has no more.
    """
    notice = _Notice(method)
    for module in model.modules():  # the hooks of a part run when that part alone is loaded
        module.register_load_state_dict_post_hook(notice)


class _Notice:
    """A hook that calls a method while its object lives. In a copy of the model it does nothing."""

    def __init__(self, method: Callable[[], None] | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, module, incompatible_keys) -> None:
        call = None if self._method is None else self._method()
        if call is not None:
            call()

    def __reduce__(self):
        return _Notice, ()


def _is_another(now: NetworkDigest, before: NetworkDigest) -> bool:
    return (now.weights, now.types()) != (before.weights, before.types())
