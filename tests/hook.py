"""The checks of the annotations, at less cost than jaxtyping's own decorator.

jaxtyping's import hook decorates every function of the package. Its decorator binds the arguments of each call to names
and checks them twice, before and after, so that sizes of the same name agree; that cost more than half of the suite.
Here beartype's wrapper checks each argument and result once, within jaxtyping's context of sizes where an annotation
has an array, and without it elsewhere.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_PLAIN = (None, Any, ...)


def install() -> None:
    """Become the decorator that jaxtyping's hook puts on functions and classes; the package is imported after this."""
    jaxtyping.jaxtyped = checked  # type: ignore[assignment]


def checked(decorated: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Decorate as `jaxtyping.jaxtyped` does."""
    if decorated is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isfunction(decorated):
        sizes = _may_have_sizes(decorated)
        names = any(isinstance(hint, str) for hint in decorated.__annotations__.values())  # beartype must resolve them
        if not names and not (sizes and inspect.isgeneratorfunction(decorated)):  # jaxtyping would spoil their hints
            return _checked_once(decorated, typechecker, sizes)
    elif dataclasses.is_dataclass(decorated) and inspect.isfunction(vars(decorated).get("__init__")):
        setattr(decorated, "__init__", checked(vars(decorated)["__init__"], typechecker=typechecker))  # noqa: B010
        return decorated
    return _jaxtyped(decorated, typechecker=typechecker)


def _checked_once(function: Callable[..., Any], typechecker: Callable[[Any], Any], sizes: bool) -> Callable[..., Any]:
    strict: Callable[..., Any] = typechecker(function)
    if strict is function:  # nothing is annotated
        return function
    if sizes:
        strict = _jaxtyped(strict, typechecker=None)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return wrapped


def _may_have_sizes(hint: Any) -> bool:
    """Say whether an array is in a hint, or in those of a function; whatever is not surely another type may be one."""
    if inspect.isfunction(hint):
        return any(map(_may_have_sizes, hint.__annotations__.values()))
    if isinstance(hint, list | tuple):  # parameters of a Callable
        return any(map(_may_have_sizes, hint))
    if get_origin(hint) is Literal:
        return False
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = get_args(hint)
    return any(map(_may_have_sizes, parts)) if parts else not (hint in _PLAIN or inspect.isclass(hint))
