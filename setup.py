"""Package layout: the folder `kernels` is installed as `attnopt.kernels`.

`kernels` must never become a top-level package: Hugging Face publishes one of that name, and
transformers probes for it at import. So the folder has no `__init__.py` (a namespace package) and
is mapped below `attnopt` here. Everything else is declared in pyproject.toml.
"""

from setuptools import find_packages, setup

own = find_packages(include=["attnopt", "attnopt.*"])
kernels = [f"attnopt.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=[*own, "attnopt.kernels", *kernels],
    package_dir={"attnopt.kernels": "kernels"},
    package_data={"attnopt": ["py.typed"], "attnopt.report": ["*.j2"]},
)
