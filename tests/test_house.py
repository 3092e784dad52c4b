"""Rules of the house: who imports whom, what is lazy, documented, typed, small and declared."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module may import from its own layer and from layers below, never from above.
LAYERS = """
errors kernels.common kernels.rows kernels.checks
kernels.dispatch kernels.interpreter kernels.packing
kernels.*.*
kernels.*.op
kernels.* testing testing.* attention.config attention.*.config
attention attention.* attention.*.*
convert convert.* calibration nn
hub checkpoints modules lora arguments data demo_text generate teacher_text losses
metrics text_metrics history matching stages trainer runs distill
pretrain evaluate samples report report.* doctor
bench.* bench.*.*
demo demo_recipe
cli cli_attention cli_bench
__main__
"""
LAYERS = [[f"attnopt.{name}" for name in line.split()] for line in LAYERS.split("\n")[1:-1]]
# Mechanisms stand alone, except that these may call the band of lastk.
MAY_USE_LASTK = {"nsa", "favor"}


def sources() -> dict[str, Path]:
    """Module name -> file, for everything that is installed."""
    found = {}
    for prefix, folder in {
        "attnopt": "attnopt", "attnopt.kernels": "kernels", "attnopt.bench": "bench",
    }.items():  # fmt: skip
        folder = ROOT / folder
        for path in sorted({*folder.rglob("*.py")} - {*folder.glob("suites/*.py")}):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *[p for p in parts if p != "__init__"]])] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def nodes_now(tree: ast.AST):
    """Nodes that run at import: not function bodies, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_now(node)


def imports(name: str, nodes=None) -> list[str]:
    """Modules that the module names in import statements, submodules resolved."""
    found = []
    for node in ast.walk(TREES[name]) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively (line {node.lineno})"
            base = node.module or ""
            found += [
                f"{base}.{a.name}" if f"{base}.{a.name}" in SOURCES else base for a in node.names
            ]
    return found


def layer(name: str) -> int | None:
    """Index of the layer whose pattern fits best (the longest)."""
    fits = []
    for rank, patterns in enumerate(LAYERS):
        for pattern in patterns:
            regex = pattern.replace(".", r"\.").replace("*", r"\w+")
            if re.fullmatch(regex, name):
                fits.append((len(pattern.replace("*", "")), rank))
    return max(fits)[1] if fits else None


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"attnopt"}))
def test_imports_run_one_way(name):
    own = layer(name)
    assert own is not None, f"{name} has no layer: add it to LAYERS"
    for target in imports(name):
        if target == "attnopt":  # only for __version__
            assert own >= layer("attnopt.distill"), f"{name} imports the package itself"
        elif target.startswith("attnopt."):
            assert layer(target) is not None, f"{name} imports {target}, which has no layer"
            assert layer(target) <= own, f"{name} imports {target}, which lies above it"


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("attnopt.kernels.")])
def test_kernels_stand_alone(name):
    mechanism = name.split(".")[2]
    shared = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    allowed = {mechanism} | shared | ({"lastk"} if mechanism in MAY_USE_LASTK else set())
    foreign = {"torch", "triton"} | ({"numpy"} if mechanism == "interpreter" else set())
    for target in imports(name):
        assert target.split(".")[0] in {"attnopt", *foreign, *sys.stdlib_module_names}, (
            f"{name} imports {target}: kernels need torch and triton only"
        )
        if target.startswith("attnopt."):
            assert target.startswith("attnopt.kernels."), f"{name} imports {target}"
            assert target.split(".")[2] in allowed, f"{name} reaches into {target}"
    is_triton = name.split(".")[-1].startswith("triton_") or mechanism == "common"
    if not is_triton:
        now = imports(name, nodes_now(TREES[name]))
        assert not [t for t in now if "triton" in t], f"{name} loads triton at import"


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after the statement."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    heavy = {"torch", "triton", "transformers", "datasets", "numpy", "matplotlib"}
    assert not loaded_after("import attnopt; attnopt.LastK; attnopt.UserError") & heavy


def test_importing_an_op_does_not_load_triton_or_transformers():
    loaded = loaded_after("import attnopt; attnopt.lastk_attention")
    assert "torch" in loaded
    assert not loaded & {"triton", "transformers"}


def test_every_export_resolves_and_convert_stays_a_function():
    code = (
        "import attnopt, attnopt.convert\n"
        "from attnopt.convert import revert\n"
        "assert revert is attnopt.revert\n"
        "for name in attnopt.__all__: assert getattr(attnopt, name) is not None, name\n"
        "assert set(attnopt._EXPORTS) | {'__version__'} == set(attnopt.__all__)\n"
        "assert callable(attnopt.convert), attnopt.convert\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_attribute_is_an_attribute_error():
    import attnopt

    with pytest.raises(AttributeError, match="no attribute 'performer'"):
        _ = attnopt.performer


def test_kernels_cannot_be_taken_for_hugging_faces():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_setup_lists_every_package(monkeypatch):
    captured = {}
    monkeypatch.setattr("setuptools.setup", captured.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    wanted = {"attnopt.kernels", "attnopt.bench"}
    for name, path in SOURCES.items():
        wanted.add(name if path.name == "__init__.py" else name.rpartition(".")[0])
    assert set(captured["packages"]) == wanted
    assert captured["package_dir"] == {"attnopt.kernels": "kernels", "attnopt.bench": "bench"}


def public_functions(tree: ast.Module):
    """Public functions of a module and public methods of its public classes."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            continue
        for member in members:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                yield member, isinstance(node, ast.ClassDef)


@pytest.mark.parametrize("name", SOURCES)
def test_public_code_is_documented_and_typed(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
    for function, is_method in public_functions(tree):
        where = f"{name}:{function.lineno} {function.name}"
        assert ast.get_docstring(function) or is_method, f"{where} has no docstring"
        is_kernel = any("jit" in ast.unparse(d) for d in function.decorator_list)
        if is_kernel or "overload" in map(ast.unparse, function.decorator_list):
            continue
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        arguments = [x for x in arguments if x is not None and x.arg not in ("self", "cls")]
        bare = [x.arg for x in arguments if x.annotation is None]
        assert not bare, f"{where}: no annotation for {bare}"
        assert function.returns is not None, f"{where}: no return annotation"


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_stay_small(name):
    assert SOURCES[name].read_text().count("\n") <= 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 120, f"{name}.{node.name} is too long"


def declared(*extras: str) -> set[str]:
    """Distributions named in pyproject.toml: those of run time, and of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines}


def third_party(nodes) -> set[str]:
    """Top-level names of foreign packages that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"attnopt", "tomli"}


def test_every_dependency_is_declared_and_used():
    run_time, optional = declared(), declared("lora") - declared()
    now = set().union(*(third_party(nodes_now(tree)) for tree in TREES.values()))
    used = set().union(*(third_party(ast.walk(tree)) for tree in TREES.values()))
    assert now <= run_time, f"imported but not declared: {now - run_time}"
    assert used == run_time | optional, f"undeclared or unused: {used ^ (run_time | optional)}"
    assert optional <= declared("dev"), "`make test` runs without it"


@pytest.mark.parametrize("folder", ["tests", "bench/suites"])
def test_development_dependencies_are_declared(folder):
    everything = declared("dev")
    paths = sorted((ROOT / folder).rglob("*.py"))
    local = {path.stem for path in paths}
    for path in paths:
        used = third_party(ast.walk(ast.parse(path.read_text())))
        assert used - local <= everything, f"{path.name} imports {used - everything - local}"


def test_constraints_cover_every_dependency():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {name.lower().replace("-", "_") for name in pinned}
    assert declared("dev") - pinned == {"triton"}, "torch brings the triton that fits it"
