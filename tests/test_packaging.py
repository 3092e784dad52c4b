"""Every way to install gives a working `attnopt.kernels` and leaves Hugging Face's `kernels` alone.

Each way gets a bare virtual environment that sees the dependencies of the running one through a
path file, but not an editable installation of attnopt there.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.util, json
import attnopt, attnopt.kernels.lastk.op as op
from attnopt.bench import files
theirs = importlib.util.find_spec("kernels")
theirs = theirs.origin if theirs else None
print(json.dumps({"attnopt": attnopt.__file__, "op": op.__file__, "theirs": theirs}))
"""
THEIRS = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""


class Environment:
    """A virtual environment without pip, and the commands run in it."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        (self.site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, code: str, cwd: Path, **env: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [str(self.python), "-c", code]
        done = subprocess.run(command, cwd=cwd, env=kept | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, *what: str) -> None:
        flags = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index", "-q"]
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        done = subprocess.run([*pip, *flags, *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def add_theirs(self) -> Path:
        """A package like Hugging Face's `kernels`, of a version that transformers accepts."""
        from transformers.utils import import_utils

        version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.9.0")
        init = self.site / "kernels" / "__init__.py"
        init.parent.mkdir()
        init.write_text(f"__version__ = {version!r}\n{THEIRS}")
        info = self.site / f"kernels-{version}.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
        (info / "METADATA").write_text(about)
        return init


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "venv")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "attnopt"
    skip = (".*", "__pycache__", "build", "dist", "*.egg-info", "docs", "runs", "demo-report")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skip))
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """Paths of the wheel, the sdist and a zip of the checkout."""
    out = tmp_path_factory.mktemp("dist")
    archive = shutil.make_archive(str(out / "checkout"), "zip", checkout.parent, checkout.name)
    code = (
        "from setuptools import build_meta as b\n"
        f"b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    return {"wheel": wheel, "sdist": sdist, "zip": Path(archive)}


def probe(environment: Environment, cwd: Path, **env: str) -> dict:
    return json.loads(environment.run(PROBE, cwd, **env).splitlines()[-1])


@pytest.mark.parametrize("kind", ["wheel", "sdist", "zip"])
def test_installed(kind, built, environment, tmp_path):
    theirs = environment.add_theirs()
    before = theirs.read_bytes()
    environment.install(str(built[kind]))
    found = probe(environment, tmp_path)
    assert Path(found["attnopt"]) == environment.site / "attnopt" / "__init__.py"
    assert Path(found["op"]) == environment.site / "attnopt" / "kernels" / "lastk" / "op.py"
    assert Path(found["theirs"]) == theirs
    assert theirs.read_bytes() == before
    assert [p.name for p in theirs.parent.glob("*.py")] == ["__init__.py"]
    for data in ("py.typed", "report/page.html.j2"):
        assert (environment.site / "attnopt" / data).exists(), f"{data} is not installed"
    assert not (environment.site / "tests").exists()


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable(mode, checkout, environment, tmp_path):
    environment.install("-e", str(checkout), "--config-settings", f"editable_mode={mode}")
    found = probe(environment, tmp_path)
    assert Path(found["op"]).resolve() == checkout / "kernels" / "lastk" / "op.py"
    if mode != "compat":  # compat puts the whole checkout on the path: a folder without __init__
        assert found["theirs"] is None
    shutil.rmtree(checkout / "build", ignore_errors=True)


def test_uninstalled_checkout(checkout, environment, tmp_path):
    found = probe(environment, tmp_path, PYTHONPATH=str(checkout))
    assert Path(found["op"]) == checkout / "kernels" / "lastk" / "op.py"


@pytest.mark.parametrize("theirs", [False, True], ids=["alone", "with-theirs"])
def test_transformers_works_in_the_repository_root(theirs, checkout, environment):
    if theirs:
        environment.add_theirs()
    code = (
        "from transformers import GPT2LMHeadModel; import attnopt.kernels.lastk.op, sys\n"
        "import importlib.util; spec = importlib.util.find_spec('kernels')\n"
        "print(GPT2LMHeadModel.__name__, spec.origin)"
    )
    name, origin = environment.run(code, checkout).split()[-2:]
    assert name == "GPT2LMHeadModel"
    assert (origin != "None") == theirs, "the folder `kernels` was taken for Hugging Face's package"


def test_commands(built, environment, tmp_path):
    environment.install(str(built["wheel"]))
    command = [str(environment.python.parent / "attnopt"), "--version"]
    for line in (command, [str(environment.python), "-m", "attnopt", "--version"]):
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("attnopt "), done.stdout
