"""Everything that can be read of Python objects: their state, their code, and the objects and packages they refer to.

A kept result is right only as long as the objects that computed it are the same. `Reader.read` lists their parts as
facts: a path such as `model.visual.act`, with a digest. Facts hold content, never an address or a date. Equal objects
thus give equal facts in every process.

Code of the standard library and of installed packages counts by its name and its package's version. Other code counts
by its instructions, constants, defaults, closures and the globals that it names.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import importlib.metadata
import io
import itertools
import logging
import marshal
import os
import site
import sys
import sysconfig
import threading
import types
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bclip_fast.io.hashing import sha256

MAX_OBJECTS = 100_000
"""Limit on the objects of one `read`, for closures that lead to a whole program. The rest counts by its types."""
_MAX_NESTING = 8
_PLAIN = {type(None), bool, int, float, complex, str, bytes}
# State of every module that decides no embedding: hooks of the backward pass and of state dicts, and compiled code.
_MODULE_STATE = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}
_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Paths that transformers keeps of a model or tokenizer.
_PLACES = {"_name_or_path", "name_or_path"}
# Objects without influence on a result. Their state differs from process to process.
_OPAQUE = (logging.Logger, logging.Handler, threading.Thread, Executor, io.IOBase)
_CLASS_NAMES = {
    "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__firstlineno__", "__static_attributes__",
    "__abstractmethods__", "_abc_impl",
}  # fmt: skip


class Reader:
    """Reads objects. It keeps the digests of their tensors for the next reading.

    packages: versions of the packages whose code the objects use.
    has_own_code: whether the objects use code that no package installed.
    """

    def __init__(self) -> None:
        """Start without facts."""
        self.packages: dict[str, str] = {}
        self.has_own_code = False
        self._tensors: dict[int, tuple[Tensor, int, str]] = {}
        self._facts: dict[str, str] = {}
        self._paths: dict[int, tuple[str, Any]] = {}
        self._classes: dict[int, type] = {}

    def read(self, **objects: Any) -> dict[str, str]:
        """Return the facts of the objects. Their paths start with the names of the arguments."""
        self._facts, self._paths, self._classes = {}, {}, {}
        for name, value in objects.items():
            self._visit(name, value)
        return self._facts

    def _visit(self, path: str, value: Any) -> None:
        if type(value) in _PLAIN:
            self._facts[path] = _text(value)
            return
        first, cls = self._paths.get(id(value)), _name(type(value))
        if first is not None or len(self._paths) >= MAX_OBJECTS:
            self._facts[path] = f"= {first[0]}" if first is not None else f"not read: {cls}"
            return
        self._paths[id(value)] = path, value  # the reference keeps the id from being used again
        if isinstance(value, Tensor):
            self._facts[path] = self._tensor(value)
        elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            array = np.asarray(value)
            self._facts[path] = f"{array.dtype} {array.shape} {sha256(np.ascontiguousarray(array).tobytes())}"
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, type):
            self._facts[path] = _name(value)
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self._parts(path, "method", {"__func__": value.__func__, "__self__": value.__self__})
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._package(getattr(value, "__module__", None))
            self._facts[path] = _name(value)
            if not isinstance(owner := getattr(value, "__self__", None), types.ModuleType | types.NoneType):
                self._visit(f"{path}.__self__", owner)
        elif isinstance(value, functools.partial):
            self._parts(path, "partial", {"func": value.func, "args": value.args, "keywords": value.keywords})
        elif isinstance(value, types.ModuleType):
            self._package(value.__name__)
            self._facts[path] = value.__name__
        elif isinstance(value, os.PathLike):
            self._facts[path] = _text(os.fspath(value))
        elif isinstance(value, Mapping | list | tuple | set | frozenset | deque):
            self._container(path, value)
        else:
            self._object(path, value)

    def _parts(self, path: str, name: str, parts: Mapping[str, Any]) -> None:
        self._facts[path] = name
        for part, value in parts.items():
            self._visit(f"{path}.{part}", value)

    def _tensor(self, tensor: Tensor) -> str:
        version = -1 if tensor.is_inference() else tensor._version
        known = self._tensors.get(id(tensor))
        if known is None or version < 0 or known[1] != version:
            known = self._tensors[id(tensor)] = tensor, version, _tensor_digest(tensor)
        return known[2]

    def _module(self, path: str, module: nn.Module) -> None:
        self._facts[path] = _name(type(module))
        self._class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            graphs = {name: str(module._c._get_method(name).graph) for name in module._c._method_names()}
            self._facts[f"{path}.graphs"] = sha256(repr(sorted(graphs.items())))
        weights = {**module._parameters, **module._buffers}
        missing = [tensor for tensor in weights.values() if tensor is not None and id(tensor) not in self._tensors]
        if sum(tensor.nbytes for tensor in missing) > 1 << 20:  # hashing in threads, which release the GIL
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(self._tensor, missing))
        state = {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}
        hooks = {name: list(module.__dict__.get(name, {}).values()) for name in _MODULE_HOOKS}
        for name, value in (weights | {name: hook for name, hook in hooks.items() if hook} | state).items():
            if name not in _PLACES:
                self._visit(f"{path}.{name}", value)
        for name, child in module._modules.items():
            self._visit(f"{path}.{name}", child)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__[:-1]:
            if id(base) in self._classes:
                continue
            self._classes[id(base)] = base
            path = f"class {_name(base)}"
            path += f" {len(self._classes)}" if path in self._facts else ""
            members = {name: value for name, value in vars(base).items() if name not in _CLASS_NAMES}
            if self._package(base.__module__):  # its version covers all members, but not those that someone replaced
                members = {
                    name: value
                    for name, value in members.items()
                    if isinstance(value, types.FunctionType) and _version(_package_of(value)) is None
                }
            self._facts[path] = ""
            for name in sorted(members):
                self._visit(f"{path}.{name}", members[name])

    def _function(self, path: str, function: types.FunctionType) -> None:
        parts: dict[str, Any] = {"__defaults__": function.__defaults__, "__kwdefaults__": function.__kwdefaults__}
        parts |= function.__dict__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                parts[name] = cell.cell_contents
            except ValueError:  # the variable has no value yet
                parts[name] = "unset"
        if self._package(_package_of(function)):
            self._parts(path, _name(function), {name: value for name, value in parts.items() if value})
            return
        names, loaded = _code_names(function.__code__)
        self._parts(path, _code_digest(function.__code__), parts)
        space = function.__globals__
        for name in sorted(loaded):
            value = space.get(name, sys.modules.get(name))  # the function may itself import a module
            if not isinstance(value, types.ModuleType) or self._package(value.__name__):
                if name in space:
                    self._visit(f"global {function.__module__}.{name}", value)
                continue
            for attribute in sorted(names & vars(value).keys()):
                self._visit(f"global {value.__name__}.{attribute}", vars(value)[attribute])

    def _container(self, path: str, value: Any) -> None:
        plain = _plain_digest(value)
        self._facts[path if plain else f"{path}#"] = plain or f"{_name(type(value))} {len(value)}"
        if plain is None and isinstance(value, Mapping):
            for i, (key, item) in enumerate(list(value.items())):
                self._visit(f"{path}[{key if type(key) in _PLAIN else i!r}]", item)
        elif plain is None:
            is_set = isinstance(value, set | frozenset)
            for i, item in enumerate(sorted(value, key=lambda x: _name(x) + _name(type(x))) if is_set else list(value)):
                self._visit(f"{path}[{i}]", item)
        if getattr(value, "__dict__", None):
            self._object(f"{path}.", value)

    def _object(self, path: str, value: Any) -> None:
        cls = type(value)
        self._facts[path] = _name(cls)
        self._class(cls)
        if isinstance(value, _OPAQUE) or cls.__module__.startswith(("torch._dynamo", "torch._inductor")):
            return
        state = dict(getattr(value, "__dict__", {}))
        for slots in (vars(base).get("__slots__", ()) for base in cls.__mro__):
            state |= {name: getattr(value, name, None) for name in ([slots] if isinstance(slots, str) else slots)}
        for name in sorted(state.keys() - _PLACES):
            self._visit(f"{path}.{name}", state[name])
        if isinstance(value, property | staticmethod | classmethod):
            self._visit(f"{path}()", value.fget if isinstance(value, property) else value.__func__)
        elif not state or getattr(cls, "__getstate__", None) is not getattr(object, "__getstate__", None):
            self._visit(f"{path}:", _reduced(value))

    def _package(self, module: str | None) -> bool:
        """Return whether a module belongs to Python or to an installed package, and note the package's version."""
        name = (module or "builtins").partition(".")[0]
        version = _version(name)
        if version is None:
            self.has_own_code = True
            return False
        self.packages[name] = version
        return True


def unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that two readings share. Calls in between change counters and memos, which decide no result."""
    sizes = [path for path in {**before, **after} if path.endswith("#") and before.get(path) != after.get(path)]
    changing = tuple(f"{path[:-1]}[" for path in sizes)
    return {
        path: fact
        for path, fact in after.items()
        if before.get(path) == fact and not (changing and path.startswith(changing))
    }


def digest(facts: Mapping[str, str]) -> str:
    """Return the SHA-256 of facts."""
    return sha256("\n".join(f"{path}\0{fact}" for path, fact in sorted(facts.items())).encode(errors="surrogatepass"))


@functools.cache
def _version(name: str) -> str | None:
    """Return the version of the package `name`, or None for code that no package installed."""
    if name in sys.stdlib_module_names or name == "builtins":
        return sys.version.partition(" ")[0] if name != "__main__" else None
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if name != "bclip_fast" and (file is None or not os.path.realpath(file).startswith(_package_folders())):
        return None
    if isinstance(version := getattr(module, "__version__", None), str):
        return version
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "unknown"


@functools.cache
def _package_folders() -> tuple[str, ...]:
    paths = [*site.getsitepackages(), site.getusersitepackages(), *map(sysconfig.get_path, ("purelib", "platlib"))]
    return tuple(os.path.realpath(path) + os.sep for path in paths if path)


def _package_of(function: types.FunctionType) -> str:
    """Return the package of the function's code. `__module__` may be that of a function that it wraps."""
    return str(function.__globals__.get("__name__", "__main__")).partition(".")[0]


def _reduced(value: Any) -> Any:
    """Return what pickle would keep of an object, or a text for objects that it refuses."""
    if type(value).__name__ == "Pattern":  # its state for pickle differs from process to process
        return [getattr(value, "pattern", None), getattr(value, "flags", None)]
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        content = reduce(value) if reduce else value.__reduce_ex__(2)
    except Exception:  # a type may raise any exception
        return "unreadable"
    parts: Any = [content] if isinstance(content, str) else content
    return [list(part) if hasattr(part, "__next__") else part for part in parts]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _text(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{type(value).__name__} {sha256(text.encode(errors='surrogatepass'))}"


def _tensor_digest(tensor: Tensor) -> str:
    description = f"{_name(type(tensor))} {tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta:
        return description
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return f"{description} {sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())}"


def _is_plain(value: Any) -> bool:
    items = list(value)
    for _ in range(_MAX_NESTING):  # a list may contain itself
        kinds = set(map(type, items))
        if kinds <= _PLAIN or not kinds <= _PLAIN | {tuple, list}:
            return kinds <= _PLAIN
        items = list(itertools.chain.from_iterable(item for item in items if type(item) in (tuple, list)))
    return False


def _plain_digest(value: Any) -> str | None:
    """Return the digest of a container without objects, or None for others. It is fast: a vocabulary may be large."""
    if isinstance(value, set | frozenset):
        return sha256(repr(sorted(map(_text, value)))) if set(map(type, value)) <= _PLAIN else None
    if isinstance(value, Mapping):
        if not (_is_plain(value.keys()) and _is_plain(value.values())):
            return None
        value = [*value.keys(), *value.values()]
    elif not _is_plain(value):
        return None
    # Version 0 of the format marks neither interned nor repeated objects, so equal contents give equal bytes.
    return f"{len(value)} {sha256(marshal.dumps(list(value), 0))}"


def _code_names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return all names in the code, and those of globals and of modules that it imports."""
    operations = ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")
    loaded = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    nested = [_code_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*(names for names, _ in nested)), loaded.union(*(names for _, names in nested))


def _code_digest(code: types.CodeType) -> str:
    constants = [_constant(constant) for constant in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    parts = code.co_code, constants, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags
    return f"code {sha256(repr(parts).encode(errors='surrogatepass'))}"


def _constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return _code_digest(constant)
    if isinstance(constant, frozenset):
        return sorted(map(_text, constant))
    return [_constant(item) for item in constant] if isinstance(constant, tuple) else _text(constant)
