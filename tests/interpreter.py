"""Triton's interpreter, with the work left out that it repeats for nothing.

Triton 3.6 puts its own functions in the place of all those of ``triton.language`` when a kernel is launched, which is
needed, and again at every call of a function by the kernel, which finds them in place already. It also makes a table of
all dtypes whenever it looks one up. Both together take a third of the time of a test, and change nothing that a
kernel computes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def speed_up() -> None:
    """Makes the interpreter prepare each module of ``triton.language`` once a launch, and remember dtypes. Versions of
    Triton without the functions that this replaces are left as they are."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        return
    if hasattr(interpreter._patch_lang, "once"):
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang
    dtype_of: Callable[[Any], Any] = interpreter._get_np_dtype
    language = (interpreter.tl, interpreter.tl.core)
    modules: dict[Any, set[int]] = {}  # that a function sees
    patched: set[int] = set()  # in the present launch

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        """What a launch restores when it ends."""

        def restore(self) -> None:
            super().restore()
            patched.clear()

    def patch_lang(fn: Any) -> Any:
        if fn not in modules:
            seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            modules[fn] = {id(value) for value in seen if value in language}
        if modules[fn] <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.update(modules[fn])
        return scope

    @functools.cache
    def scalar_dtype(dtype: Any) -> Any:
        return dtype_of(dtype)

    def np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, interpreter.tl.block_type):
            dtype = dtype.element_ty
        return scalar_dtype(dtype) if type(dtype) is interpreter.tl.dtype else dtype_of(dtype)

    patch_lang.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = np_dtype
    interpreter._LangPatchScope = Scope
