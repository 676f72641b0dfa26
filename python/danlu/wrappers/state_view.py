"""The states of an optimizer and of what a wrapper keeps beside them, as one mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

Dict = MutableMapping[Any, Any]


class StateView(MutableMapping[Any, Any]):
    """What `wrapper.state` is: of each parameter the optimizer's states and the wrapper's, under their names
    in a state_dict.

    Everything is read from where it is kept, and written there. The view is false while the optimizer inside
    has no state, whatever the wrapper has: that is how torch.distributed.checkpoint finds out whether it must
    ask for it.

    Args:
        inner: the state of the optimizer.
        own: the wrapper's, by parameter.
        names: names in `own`, by the name that is shown.
        changed: called before something in `own` changes.
    """

    def __init__(
        self, inner: Dict, own: Dict, names: Mapping[str, str], changed: Callable[[], object] = bool
    ) -> None:
        self._inner, self._own, self._names, self._changed = inner, own, names, changed

    def __bool__(self) -> bool:
        return bool(self._inner)

    def __getitem__(self, key: Any) -> Any:
        inner = self._inner[key] if key in self._inner or key not in self._own else None
        if inner is not None and not isinstance(inner, MutableMapping):
            return inner  # of the whole optimizer, not of a parameter
        return _Entry(self, key, inner, self._own.get(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(value, Mapping):
            self._inner[key] = value
            return
        own = {self._names[name]: x for name, x in value.items() if name in self._names}
        inner = {name: x for name, x in value.items() if name not in self._names}
        self._changed()
        self._own.pop(key, None)
        if own:
            self._own[key] = own
        if inner or not own:
            self._inner[key] = inner
        else:
            self._inner.pop(key, None)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._changed()
        self._inner.pop(key, None)
        self._own.pop(key, None)

    # torch's state makes an entry where it is asked for a missing one by [], and only there

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            return self[key]
        return default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self and default:
            return default[0]
        value = self.get(key)
        del self[key]
        return value

    def __iter__(self) -> Iterator[Any]:
        yield from self._inner
        yield from (key for key in self._own if key not in self._inner)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self._inner or key in self._own

    def __repr__(self) -> str:
        return repr({key: dict(value) if isinstance(value, _Entry) else value for key, value in self.items()})


class _Entry(MutableMapping[str, Any]):
    """Of one parameter. It goes on to show its states when they are no longer the parameter's, as an entry of
    torch's does that is moved from one parameter to another.
    """

    def __init__(self, view: StateView, key: Any, inner: Dict | None, own: Dict | None) -> None:
        self._view, self._key, self._inner, self._own = view, key, inner, own

    def __getitem__(self, name: str) -> Any:
        own = self._view._names.get(name)
        kept = self._inner if own is None else self._own
        if kept is None:
            raise KeyError(name)
        return kept[name if own is None else own]

    def __setitem__(self, name: str, value: Any) -> None:
        own = self._view._names.get(name)
        if own is not None:
            self._view._changed()
            if self._own is None:
                self._own = self._view._own[self._key] = {}
            self._own[own] = value
        else:
            if self._inner is None:
                self._view._inner[self._key] = {}
                self._inner = self._view._inner[self._key]
            self._inner[name] = value

    def __delitem__(self, name: str) -> None:
        own = self._view._names.get(name)
        kept = self._inner if own is None else self._own
        if kept is None:
            raise KeyError(name)
        self._view._changed()
        del kept[name if own is None else own]

    def __iter__(self) -> Iterator[str]:
        yield from self._inner or ()
        yield from (name for name, own in self._view._names.items() if own in (self._own or ()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
