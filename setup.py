"""Package layout: the folders `kernels` and `bench` are installed below `attnopt`.

`kernels` must never become a top-level package: Hugging Face publishes one of that name, and
transformers probes for it at import. So the folder has no `__init__.py` (a namespace package) and
is mapped below `attnopt` here, as is `bench` beside it. Everything else is declared in
pyproject.toml.
"""

from setuptools import find_packages, setup

own = find_packages(include=["attnopt", "attnopt.*"])
mapped = {f"attnopt.{folder}": folder for folder in ("kernels", "bench")}
inside = [f"{name}.{package}" for name, folder in mapped.items() for package in
          find_packages(folder)]  # fmt: skip

setup(
    packages=[*own, *mapped, *inside],
    package_dir=mapped,
    package_data={
        "attnopt": ["py.typed"], "attnopt.report": ["*.j2"], "attnopt.bench.report": ["*.j2"],
    },
)
