"""Changing what one module does by changing its class, and changing it back.

``swap(module, mixin)`` sets the class of this instance, and of no other, to a subclass of it that puts ``mixin`` in front. Parameters,
hooks and ``state_dict`` stay where they are, and ``unswap`` leaves no trace. The subclass carries the name of the class it stands for,
because libraries look classes up by name (what may be recorded, which modules not to split); it is made on the fly, so an instance is
pickled and copied as "this mixin before that class".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex
from weakref import WeakValueDictionary

from torch import nn

__all__ = ["Swapped", "changed_since", "has_forward_of_its_own", "swap", "unswap"]


class Swapped(nn.Module):
    """Base of the mixins. ``_added`` names the attributes that a mixin's instances carry beyond those of the plain class."""

    _added: ClassVar[tuple[str, ...]] = ()
    _mixin: ClassVar[type[nn.Module]]
    _plain: ClassVar[type[nn.Module]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what the plain class has is not known here

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        saved: Any = super().__reduce_ex__(protocol)
        return _blank, (self._mixin, self._plain), *saved[2:]


def swap(module: nn.Module, mixin: type[Swapped], **added: Any) -> None:
    """Put ``mixin`` in front of the class of ``module`` and set the attributes it adds."""
    module.__class__ = _swapped_class(mixin, type(module))
    assert set(added) == set(mixin._added)
    for name, value in added.items():
        module.__dict__[name] = value  # not through setattr, which would register a module as a submodule


def unswap(module: Any) -> None:
    """Undo `swap`, where `changed_since` tells of nothing that stands on it."""
    if "forward" in module.__dict__ and not has_forward_of_its_own(module):
        del module.__dict__["forward"]  # the mixin's
    for name in module._added:
        del module.__dict__[name]
    module.__class__ = module._plain


def changed_since(module: Any) -> str | None:
    """What others have made of a module's class or forward since `swap`, in words; None if nothing."""
    if "_plain" not in vars(type(module)):
        return f"the class was exchanged for {type(module).__qualname__}"
    if type(module).forward is not module._plain.forward and has_forward_of_its_own(module):
        return "the forward was wrapped"
    return None


# Each lives as long as an instance of it, and so does the class it stands for: that may have been made on the fly, too.
_classes: WeakValueDictionary[tuple[type, type], type] = WeakValueDictionary()


def _swapped_class(mixin: type[nn.Module], plain: type[nn.Module]) -> Any:
    made = _classes.get((mixin, plain))
    if made is None:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        made = _classes[mixin, plain] = type(plain.__name__, (mixin, plain), {**names, "_mixin": mixin, "_plain": plain})
    return made


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody has put another forward before that of the module's class.

    Who takes such a wrapper off may leave the class's own there, as a method of this instance; that counts for nothing.
    """
    own = module.__dict__.get("forward")
    return own is not None and (getattr(own, "__self__", None) is not module or own.__func__ is not type(module).forward)


def _blank(mixin: type[Swapped], plain: type[nn.Module]) -> nn.Module:
    """An instance without attributes; pickle and copy give it the state of the one they saved."""
    cls = _swapped_class(mixin, plain)
    instance: nn.Module = cls.__new__(cls)
    return instance
