"""Every third-party import of the package is a declared dependency, or optional and guarded."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE = {"pillow": "PIL", "flash-attn": "flash_attn"}


def modules(requirements: list[str]) -> set[str]:
    names = {re.split(r"[<>=!~;\[ ]", r, maxsplit=1)[0].lower() for r in requirements}
    return {MODULE.get(n, n.replace("-", "_")) for n in names}


# What transformers itself requires comes with it.
WITH_TRANSFORMERS = {"huggingface_hub", "safetensors", "tokenizers"}
CORE = modules(PROJECT["dependencies"])
EXTRA = {m for group in PROJECT["optional-dependencies"].values() for m in modules(group)} - {"vidtok"}
# Folders that are imported only where their package is.
ONLY_WITH = {"triton": "python/vidtok/kernels/triton/"}
# What the demo and doctor look for and do without.
LOOKED_FOR = {"skvideo", "psutil"}


def imports(node: ast.AST, guarded: bool = False) -> list[tuple[str, bool]]:
    """(module, whether inside a try or a function) of every absolute import under ``node``."""
    found: list[tuple[str, bool]] = []
    for child in ast.iter_child_nodes(node):
        inside = guarded or isinstance(child, ast.Try | ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            found += [(alias.name.split(".")[0], inside) for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and not child.level and child.module:
            found.append((child.module.split(".")[0], inside))
        found += imports(child, inside)
    return found


def test_imports_are_declared() -> None:
    wrong = []
    for file in sorted((ROOT / "python/vidtok").rglob("*.py")):
        for module, guarded in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module in sys.stdlib_module_names or module == "vidtok" or module in CORE | WITH_TRANSFORMERS:
                continue
            if module in EXTRA | LOOKED_FOR and guarded:
                continue
            if module in ONLY_WITH and file.relative_to(ROOT).as_posix().startswith(ONLY_WITH[module]):
                continue
            wrong.append(f"{file.relative_to(ROOT)}: {module}")
    assert wrong == []


def test_nothing_imports_those_folders_at_once() -> None:
    """They are reached by importlib inside functions; an import at the top of another file would need the package."""
    for file in sorted((ROOT / "python/vidtok").rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for package, folder in ONLY_WITH.items():
            dotted = folder.removeprefix("python/").rstrip("/").replace("/", ".")
            if name.startswith(folder):
                continue
            tops = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            seen = {n.module or "" for n in tops if isinstance(n, ast.ImportFrom)}
            seen |= {alias.name for n in tops if isinstance(n, ast.Import) for alias in n.names}
            assert not any(m.startswith(dotted) or m == package for m in seen), name


def test_core_dependencies_are_used() -> None:
    seen = {
        module
        for file in (ROOT / "python/vidtok").rglob("*.py")
        for module, _ in imports(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert CORE - seen == set()


def test_extras_exist() -> None:
    assert set(PROJECT["optional-dependencies"]) >= {"video", "train", "eval", "gpu", "flash"}


def test_every_requirement_is_pinned() -> None:
    pinned = modules((ROOT / "constraints/dev.txt").read_text(encoding="utf-8").splitlines())
    lines = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()
    wanted = modules([line for line in lines if line and not line.startswith("#")])
    assert wanted - pinned == set()
