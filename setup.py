"""What an installation consists of. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup


# See pvm/shipped.py.
SHIPPED = {"pvm.recipes": "recipes", "pvm.recipes.accelerate": "recipes/accelerate", "pvm.assets": "assets"}

setup(
    packages=[*find_packages(include=["pvm", "pvm.*"]), "pvm.app.static", *SHIPPED],
    package_dir={"": ".", **SHIPPED},
    # As modules: `custom_object_save` copies them from where they are imported into every checkpoint.
    py_modules=sorted(file.stem for file in Path(__file__).parent.glob("*_qwen3vl_pvm.py")),
    package_data={"": ["**/*"]},
    exclude_package_data={"": ["*.pyc"]},
)
