"""The law of classes: inherited from means abstract, everything else is final."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

EXCEPTIONS = {"Exception", "BaseException"}
FINAL = "nothing inherits from it, so it must be @final"


@dataclass
class Module:
    """A file: what its names mean, its classes, and the exceptions that it raises."""

    names: dict[str, str] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    raised: set[str] = field(default_factory=set)


def broken_laws(files: Mapping[str, str]) -> list[str]:
    """A line for every class of these files (module -> code) that breaks the law."""
    modules = {name: _module(name, code) for name, code in files.items()}
    found = {
        f"{name}.{path}": (name, node)
        for name, module in modules.items()
        for path, node in module.classes.items()
    }

    def resolve(name: str) -> str:
        """The full name of a class, through the modules that import it from another."""
        module, _, last = name.rpartition(".")
        if name in found or module not in modules or last not in modules[module].names:
            return name
        return resolve(modules[module].names[last])

    def bases(name: str) -> list[str]:
        module, node = found[name]
        written = (ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases)
        return [resolve(_absolute(base, module, modules[module])) for base in written]

    def abstract(name: str) -> set[str]:
        """Names of the methods that a subclass still has to write."""
        if name not in found:
            return set()
        own = set(_own_names(found[name][1]))
        return set().union(*map(abstract, bases(name))) - own | set(_marked(found[name][1]))

    def is_exception(name: str) -> bool:
        return name in EXCEPTIONS or (name in found and any(map(is_exception, bases(name))))

    inherited = {base for name in found for base in bases(name)}
    raised = {
        resolve(_absolute(name, path, module))
        for path, module in modules.items()
        for name in module.raised
    }
    wrong = []
    for name, (_, node) in found.items():
        final = any(ast.unparse(d).split(".")[-1] == "final" for d in node.decorator_list)
        open_ended = bool(abstract(name)) or "typing.Protocol" in bases(name)
        if name in inherited:
            if is_exception(name):
                open_ended = name not in raised
            if not open_ended:
                wrong.append(f"{name}: is inherited from, so it must be abstract")
            if final:
                wrong.append(f"{name}: is inherited from, so it cannot be final")
        elif final == open_ended:  # an abstract class is there for parts to come
            what = "is abstract, so it cannot be final" if final else FINAL
            wrong.append(f"{name}: {what}")
    return wrong


def _module(name: str, code: str) -> Module:
    module, tree = Module(), ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.names[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            module.raised.add(ast.unparse(error))
    module.classes = dict(_classes(tree))
    return module


def _classes(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{inside}{child.name}", child
        name = f"{child.name}." if isinstance(child, ast.ClassDef | ast.FunctionDef) else ""
        yield from _classes(child, inside + name)


def _absolute(name: str, path: str, module: Module) -> str:
    """A name as another module would write it."""
    if name in module.classes:
        return f"{path}.{name}"
    first, dot, rest = name.partition(".")
    return module.names.get(first, first) + dot + rest


def _own_names(node: ast.ClassDef) -> Iterator[str]:
    """Methods and attributes that a class defines."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child.name
        elif isinstance(child, ast.AnnAssign):
            yield ast.unparse(child.target)
        elif isinstance(child, ast.Assign):
            yield from map(ast.unparse, child.targets)


def _marked(node: ast.ClassDef) -> Iterator[str]:
    """Its own abstract methods."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and any(
            ast.unparse(mark).split(".")[-1] == "abstractmethod" for mark in child.decorator_list
        ):
            yield child.name
