"""The package list, the mapping of folders and the links agree, and sdist and wheel hold everything."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

FOLDERS = ["configuration", "data", "metrics", "model_cards", "modeling", "pipelines", "processing", "trainers"]
NOT_SHIPPED = shutil.ignore_patterns(
    ".*", "build", "dist", "demo", "runs", "shared", "__pycache__", "*.egg-info", "*.log", *FOLDERS
)


@pytest.fixture(scope="module")
def settings(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_packages_mapping_and_links_agree(root: Path, settings: dict):
    found = ["regard"]
    for folder in FOLDERS:
        assert (root / folder / "__init__.py").is_file(), folder
        modules = sorted((root / folder).rglob("__init__.py"))
        found += [".".join(("regard", *module.parent.relative_to(root).parts)) for module in modules]
        link = root / "src/regard" / folder
        assert os.readlink(link) == f"../../{folder}"
        assert link.samefile(root / folder)
    assert sorted(settings["packages"]) == sorted(found)
    assert settings["package-dir"] == {"": "src"} | {f"regard.{folder}": folder for folder in FOLDERS}
    links = [path.name for path in (root / "src/regard").iterdir() if path.is_symlink()]
    assert sorted(links) == FOLDERS


def test_file_names_are_unique_where_checkpoints_take_code_from(root: Path):
    """So that a checkpoint's code can be laid flat into one directory."""
    folders = ("configuration", "modeling", "pipelines", "processing")
    names = [path.name for folder in folders for path in (root / folder).rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist made from a copy of the tree without its links, and the wheel made from that sdist."""
    tree = tmp_path_factory.mktemp("build") / "regard"
    shutil.copytree(root, tree, ignore=lambda path, names: left_out(root, str(path), names))
    assert not any(path.is_symlink() for path in (tree / "src/regard").iterdir())
    out = tree.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def left_out(root: Path, path: str, names: list[str]) -> set[str]:
    """What a copy of the tree leaves out; the mapped folders come along, the links of the same names do not."""
    return set(NOT_SHIPPED(path, names)) - (set(FOLDERS) if Path(path) == root else set())


def shipped_files(root: Path) -> set[str]:
    """What the wheel must hold, by its place in it."""
    files = {f"regard/{path.name}" for path in (root / "src/regard").glob("*.py")} | {
        "regard/card_template.md",
        "regard/py.typed",
        "regard_cli.py",
    }
    for folder in FOLDERS:
        files |= {f"regard/{path.relative_to(root)}" for path in (root / folder).rglob("*.py")}
    for pattern in ("data/*.json", "data/*.txt", "trainers/*/*.yaml", "model_cards/*/*"):
        files |= {f"regard/{path.relative_to(root)}" for path in root.glob(pattern)}
    return files


def test_the_wheel_holds_exactly_the_package(root: Path, built: tuple[Path, Path]):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == shipped_files(root)
    for checkpoint in ("image-text-slot-5m", "qavit-tiny-fashion-mnist", "query-conditioned-vqa-scenes"):
        assert f"regard/model_cards/{checkpoint}/model.safetensors" in names
    assert "regard/data/apt-packages.txt" in names


def test_the_sdist_holds_the_package_its_tests_and_its_tools(root: Path, built: tuple[Path, Path]):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    expected = {
        "Makefile",
        "constraints.txt",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/regard_cli.py",
    }
    for folder in ("tests", "benchmarks", "samples", "docs", *FOLDERS):
        files = (path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        expected |= {str(path.relative_to(root)) for path in files}
    assert expected - names == set()


def test_every_module_of_the_installed_wheel_imports(built: tuple[Path, Path], tmp_path: Path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*command, str(built[1])], check=True, capture_output=True)
    script = """
import importlib, pkgutil, sys
import regard, regard_cli
names = [module.name for module in pkgutil.walk_packages(regard.__path__, "regard.")]
for name in names:
    if name != "regard.__main__":
        module = importlib.import_module(name)
        assert module.__spec__.origin.startswith(sys.argv[1]), module
from regard.hub import resolve
assert resolve().startswith(sys.argv[1])
print(len(names))
"""
    options = {
        "capture_output": True,
        "text": True,
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(tmp_path)},
    }
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], **options)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
    done = subprocess.run([tmp_path / "bin/regard", "read", "--help"], **options)
    assert done.stdout.startswith("usage: regard read"), done.stderr


def test_import_leaves_training_and_data_aside():
    script = "import sys, regard; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = [
        "datasets",
        "evaluate",
        "pandas",
        "peft",
        "regard.trainers.base",
        "regard.visualize",
        "transformers.trainer",
    ]
    done = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
