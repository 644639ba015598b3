"""What pyproject.toml cannot say: the folders methods/ and tasks/ install under other names, sub-packages included."""

from setuptools import find_packages, setup

packages = find_packages(include=["effbench", "effbench.*"])
for folder in ("methods", "tasks"):
    packages += [f"effbench_{name}" for name in find_packages(include=[folder, f"{folder}.*"])]
setup(packages=packages)
