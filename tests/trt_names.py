"""Collects from the source which of TensorRT's names it touches: what a version must have."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RECEIVERS", "Touched", "Use", "read_source"]

# What the code calls an object of which class. An attribute of TensorRT on any other name fails the test.
RECEIVERS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "kept": "ITimingCache",
    "tensor": "ITensor",
    "layer": "ILayer",
    "error": "ParserError",
}


@dataclass(frozen=True)
class Use:
    """One place. `path`: such as `ICudaEngine.get_tensor_name`; `arguments`: of a call, else None."""

    path: str
    arguments: int | None
    keywords: frozenset[str]
    where: str
    receiver: bool  # of an object, whose class RECEIVERS tells


@dataclass(frozen=True)
class Touched:
    """All uses; names that the code asks for before it uses them; attributes on objects of unknown class; own names."""

    uses: tuple[Use, ...]
    asked: frozenset[str]
    unknown: tuple[tuple[str, str], ...]
    own: frozenset[str]


def read_source(folder: Path) -> Touched:
    """Read the modules of a folder that have to do with TensorRT."""
    uses: list[Use] = []
    asked: set[str] = set()
    unknown: list[tuple[str, str]] = []
    own: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        own |= set(_own_names(tree))
        if "trt" in path.read_text().lower():
            reader = _Reader(path.name, tree)
            uses += reader.uses
            asked |= reader.asked
            unknown += reader.unknown
    return Touched(tuple(uses), frozenset(asked), tuple(unknown), frozenset(own))


def _own_names(tree: ast.AST) -> Iterator[str]:
    """Yield attributes and methods that our own classes have; those of TensorRT's are not ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not any(isinstance(base, ast.Attribute) for base in node.bases):
            for inner in ast.walk(node):
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield inner.target.id
                elif isinstance(inner, ast.FunctionDef):
                    yield inner.name
                elif (
                    isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and _last(inner.value) == "self"
                ):
                    yield inner.attr


def _last(node: ast.AST) -> str:
    """Return the last name of `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class _Reader:
    def __init__(self, file: str, tree: ast.AST) -> None:
        self.uses: list[Use] = []
        self.asked: set[str] = set()
        self.unknown: list[tuple[str, str]] = []
        self._file = file
        self._aliases: dict[str, str] = {}
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                self._assignment(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                self._attribute(node, calls.get(id(node)))
            elif isinstance(node, ast.Call):
                self._asking(node)

    def _assignment(self, node: ast.Assign) -> None:
        target = node.targets[0]
        tuples = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs = zip(target.elts, node.value.elts, strict=False) if tuples else [(target, node.value)]  # type: ignore[attr-defined]
        for name, value in pairs:
            path = self._module_path(value)
            if isinstance(name, ast.Name) and path is not None:
                self._aliases[name.id] = path

    def _module_path(self, node: ast.AST) -> str | None:
        """Return the path below TensorRT's module, "" for the module itself, None for anything else."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr == "module":
                return ""
            path = self._module_path(node.value)
            return None if path is None else f"{path}.{node.attr}".lstrip(".")
        return None

    def _attribute(self, node: ast.Attribute, call: ast.Call | None) -> None:
        where = f"{self._file}:{node.lineno}"
        path = self._module_path(node)
        if path == "":
            return
        owner = RECEIVERS.get(_last(node.value).lstrip("_"))
        if path is None and owner is None:
            self.unknown.append((node.attr, where))
            return
        spread = call is not None and any(isinstance(argument, ast.Starred) for argument in call.args)
        counted = None if call is None or spread else len(call.args)
        keywords = frozenset(k.arg for k in call.keywords if k.arg) if call else frozenset()
        self.uses.append(Use(path or f"{owner}.{node.attr}", counted, keywords, where, path is None))

    def _asking(self, call: ast.Call) -> None:
        """Note the names in `has("A.B")`, `hasattr(x, "b")` and `getattr(x, "b", default)`."""
        name = _last(call.func)
        at = {"has": 0, "hasattr": 1, "getattr": 1}.get(name)
        if at is not None and len(call.args) > at:
            argument = call.args[at]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                self.asked.add(argument.value)
