"""Finds, in source code, what it uses of TensorRT's Python API, and tells in which versions that is missing.

Types are inferred as far as the project's code needs it: `trt` is the module, its calls return what the manifests say,
and some names stand for one class by convention. What cannot be inferred is not checked.
"""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from .trt_api import Signature, manifest, versions

# Parameters of these names are of these classes, in files that use TensorRT.
PARAMETERS = {
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "builder": "Builder",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime": "Runtime",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
}
# These names are so wherever they come from.
ALWAYS = {"network": "INetworkDefinition", "layer": "ILayer"}
# What module functions return whose signatures do not say.
RETURNED = {"get_plugin_registry": "IPluginRegistry"}
# Functions that take a name in an enum as their first argument.
NAMED = {
    "elementwise": "ElementWiseOperation",
    "_binary": "ElementWiseOperation",
    "_size_op": "ElementWiseOperation",
    "unary": "UnaryOperation",
}


@dataclass(frozen=True)
class Use:
    """One use: where, of what (`INetworkDefinition.add_topk`), and how."""

    place: str
    name: str
    how: str = "read"  # "read", "set" or "call"
    positional: int = 0
    keywords: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Versions in which this fails."""
        return [version for version in versions() if not self._works(manifest(version))]

    def _works(self, api: dict) -> bool:
        owner, _, member = self.name.rpartition(".")
        entries = [api[key] for key in self._keys(api, owner, member) if key in api]
        if not entries:
            return False
        if self.how == "set":
            return any(entry["kind"] == "property" and not entry.get("readonly") for entry in entries)
        if self.how == "call":
            return any(self._binds(entry) for entry in entries)
        return True

    def _keys(self, api: dict, owner: str, member: str) -> list[str]:
        if not owner:
            return [member]
        if owner == "ILayer":  # of unknown kind: any layer's will do
            kinds = [key for key, entry in api.items() if re.fullmatch(r"I\w*Layer", key)]
            return [f"{kind}.{member}" for kind in kinds]
        base = [f"ILayer.{member}"] if re.fullmatch(r"I\w+Layer", owner) else []
        return [self.name, *base]

    def _binds(self, entry: dict) -> bool:
        signatures = [Signature(text) for text in entry.get("sig") or ()]
        return not signatures or any(self._fits(signature.parameters) for signature in signatures)

    def _fits(self, parameters: list) -> bool:
        if self.positional > len(parameters):
            return False
        names = [name for name, *_ in parameters]
        given = {*names[: self.positional], *self.keywords}
        needed = {name for name, _, optional, _ in parameters if not optional}
        return needed <= given <= set(names) and len(given) == self.positional + len(self.keywords)


def _known(name: str) -> str | None:
    """Kind of a top-level name in any version."""
    return next((manifest(v)[name]["kind"] for v in reversed(versions()) if name in manifest(v)), None)


def _returned(owner: str, method: str) -> str | None:
    """Class that a method returns, from its newest signature."""
    owners = [owner, "ILayer"] if re.fullmatch(r"I\w+Layer", owner) else [owner]
    for version, kind in itertools.product(reversed(versions()), owners):
        for text in manifest(version).get(f"{kind}.{method}", {}).get("sig") or ():
            name = text.rpartition("-> ")[2].strip()
            if name in manifest(version):
                return name
    return None


class _Finder(ast.NodeVisitor):
    """Types are ("module",), ("class", X), ("object", X), ("method", X, name) or None."""

    def __init__(self, path: str):
        self.path = path
        self.uses: list[Use] = []
        self.scopes: list[dict] = [{}]
        self.attributes: dict[str, tuple | None] = {}

    def _use(self, node, name: str, how: str = "read", call: ast.Call | None = None) -> None:
        positional, keywords = 0, ()
        if call is not None:
            if any(isinstance(a, ast.Starred) for a in call.args) or any(
                k.arg is None for k in call.keywords
            ):
                how = "read"
            else:
                positional, keywords = len(call.args), tuple(k.arg for k in call.keywords)
                if name.endswith(".__init__"):  # called on the class, with self
                    positional -= 1
        self.uses.append(Use(f"{self.path}:{node.lineno}", name, how, positional, keywords))

    # Inference

    def infer(self, node) -> tuple | None:
        if isinstance(node, ast.Name):
            found = next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
            if found is None and node.id == "trt":
                return ("module",)
            return found or (("object", ALWAYS[node.id]) if node.id in ALWAYS else None)
        if isinstance(node, ast.Attribute):
            return self._infer_attribute(node)
        if isinstance(node, ast.Call):
            return self._infer_call(node)
        if isinstance(node, ast.IfExp):
            return self.infer(node.body) or self.infer(node.orelse)
        return None

    def _infer_attribute(self, node: ast.Attribute) -> tuple | None:
        if node.attr == "trt":
            return ("module",)
        base = self.infer(node.value)
        if base is None:
            if (
                isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and self.attributes.get(node.attr)
            ):
                return self.attributes[node.attr]
            return ("object", ALWAYS[node.attr]) if node.attr in ALWAYS else None
        if base[0] == "module":
            kind = _known(node.attr)
            return {"class": ("class", node.attr), "const": ("object", "DataType")}.get(
                kind, ("function", node.attr)
            )
        if base[0] in ("object", "class"):
            nested = f"{base[1]}.{node.attr}"
            entries = [manifest(v).get(nested, {}).get("kind") for v in versions()]
            if "class" in entries:
                return ("class", nested)
            if "enum" in entries:
                return ("object", base[1])
            return ("method", base[1], node.attr)
        return None

    def _infer_call(self, node: ast.Call) -> tuple | None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "tensorrt":
            return ("module",)
        function = self.infer(node.func)
        if function and function[0] == "class":
            return ("object", function[1])
        if function and function[0] == "method":
            returned = _returned(function[1], function[2])
            return ("object", returned) if returned else None
        if function and function[0] == "function" and function[1] in RETURNED:
            return ("object", RETURNED[function[1]])
        return None

    # Walking

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = {a.arg: ("object", PARAMETERS[a.arg]) for a in arguments if a.arg in PARAMETERS}
        self._scoped(node, names)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self._scoped(node, {})

    def _scoped(self, node, names):
        self.scopes.append(names)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node):
        outer, self.attributes = self.attributes, dict(self.attributes)
        # Attributes first: a method may come before the one that sets them.
        for child in ast.walk(node):
            if isinstance(child, ast.Assign):
                self._assign_attributes(child)
        self.generic_visit(node)
        self.attributes = outer

    def _assign_attributes(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                kind = self.infer(node.value)
                if kind:
                    self.attributes[target.attr] = kind

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts))
            for one, value in pairs:
                if isinstance(one, ast.Name):
                    self.scopes[-1][one.id] = self.infer(value)
                elif isinstance(one, ast.Tuple):
                    self.scopes[-1].update({e.id: None for e in one.elts if isinstance(e, ast.Name)})
                else:
                    self.visit(one)

    def visit_Call(self, node):
        function = self.infer(node.func)
        if function and function[0] == "method":
            self._use(node, f"{function[1]}.{function[2]}", "call", node)
            self.visit(node.func.value) if isinstance(node.func, ast.Attribute) else self.visit(node.func)
        elif function and function[0] == "function":
            self._use(node, function[1], "call", node)
        else:
            self.visit(node.func)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("getattr", "hasattr") and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            base = self.infer(node.args[0])
            if name == "getattr" and base and base[0] in ("class", "object"):
                self._use(node, f"{base[1]}.{node.args[1].value}")
        if name in NAMED and node.args and isinstance(node.args[0], ast.Constant):
            self._use(node, f"{NAMED[name]}.{node.args[0].value}")
        for argument in (*node.args, *node.keywords):
            self.visit(argument)

    def visit_Attribute(self, node):
        base = self.infer(node.value)
        if base and not node.attr.startswith("_"):
            how = "set" if isinstance(node.ctx, ast.Store) else "read"
            if base[0] == "module":
                self._use(node, node.attr, how)
            elif base[0] in ("class", "object"):
                self._use(node, f"{base[1]}.{node.attr}", how)
        self.visit(node.value)


def find_uses(source: str, path: str = "source") -> list[Use]:
    """Uses of TensorRT's API in a file's source; none in files that do not mention it."""
    tree = ast.parse(source)
    mentions = any(
        (isinstance(node, ast.Name) and node.id in ("trt", "network"))
        or (
            isinstance(node, ast.Attribute)
            and node.attr in ("trt", "network", "tensorrt", "execute_async_v3")
        )
        for node in ast.walk(tree)
    )
    if not mentions:
        return []
    finder = _Finder(path)
    finder.visit(tree)
    return finder.uses


def find_uses_below(folder: Path) -> list[Use]:
    """Uses in every Python file of a package."""
    uses = []
    for path in sorted(folder.rglob("*.py")):
        uses += find_uses(path.read_text(encoding="utf-8"), path.relative_to(folder.parent).as_posix())
    return uses
