"""Package metadata. Everything that can change stands in settings.ini; nbdev reads the same file."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def words(key: str) -> list[str]:
    "The requirement list under `key`: one requirement a line or separated by spaces."
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    packages=[*find_packages(include=["product_retrieval", "product_retrieval.*"]), "product_retrieval.recipes"],
    package_dir={"product_retrieval.recipes": "recipes"},  # an installed package carries the recipes along
    package_data={"product_retrieval.recipes": ["*.toml"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=words("requirements"),
    extras_require={"dev": words("dev_requirements")},
    entry_points={"console_scripts": words("console_scripts"), "product_retrieval.encoders": words("encoder_kinds")},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
