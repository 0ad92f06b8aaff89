"""Imports follow the data: a room imports only from rows below its own, at module level and inside functions alike."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trivium

SOURCE = Path(trivium.__file__).parent

# From top to bottom, as the house stands in DESIGN: rooms of one row don't import each other.
ROWS = [
    {"trivium"},
    {"cli"},
    {"commands"},
    {"doctor", "playground"},
    {"study", "bench"},
    {"train"},
    {"evaluate"},
    {"generate", "hub"},
    {"model"},
    {"mixers"},
    {"data", "ops"},
    {"tasks"},
    {"report"},
    {"config"},
    {"registry"},
]
HEIGHT = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}


def room_of(module: str) -> str:
    """Return the room of a dotted module name; the package's own front door is the room "trivium"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """Return (line, dotted module) of every import of this package in `tree`, lazy ones and strings included."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name != "trivium"]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "trivium"
            and node.attr[:2] != "__"
        ):
            found.append((node.lineno, _through_the_front_door(node.attr)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base == "trivium":
                # `from trivium import tasks` reaches a room; the version is a constant that every room may name.
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                found += [(node.lineno, _through_the_front_door(name)) for name in names]
            else:
                found.append((node.lineno, base))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return [(line, module) for line, module in found if module.split(".")[0] == "trivium"]


def _through_the_front_door(name: str) -> str:
    return f"trivium.{name}" if name in HEIGHT else "trivium"


def wrong_arrows(source: Path) -> list[str]:
    """Return one line for each import under `source` that does not point to a lower row."""
    wrong = []
    for path in sorted(source.rglob("*.py")):
        inside = path.relative_to(source)
        parts = ["trivium", *inside.with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        package = module if is_package else module.rpartition(".")[0]
        room = room_of(module)
        if room not in HEIGHT:
            wrong.append(f"{inside}: the room {room!r} has no row")
            continue
        for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), package):
            target = room_of(name)
            if target != room and HEIGHT.get(target, len(ROWS) + 1) >= HEIGHT[room]:
                wrong.append(f"{inside}:{line}: {room} imports {name}")
    return wrong


def test_every_import_points_downward():
    assert wrong_arrows(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tasks/addition.py", "from trivium.model.decoder import DecoderConfig\n"),
        ("ops/scan.py", "def late():\n    import trivium.data.stream\n"),
        ("model/decoder.py", "from ..train import loop\n"),
        ("generate/chat.py", "from trivium import hub\n"),
        ("report/run.py", "import importlib\nmodule = importlib.import_module('trivium.study.compare')\n"),
        ("train/loop.py", "from trivium import load\n"),
        ("hub/folder.py", "import trivium\nmodel = trivium.build({})\n"),
        ("odd_room/thing.py", "x = 1\n"),
    ],
)
def test_a_planted_upward_import_is_caught(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(wrong_arrows(tmp_path)) == 1


def test_downward_imports_are_let_through(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "loop.py").write_text(
        "import torch\nimport trivium\nfrom trivium import __version__\nfrom trivium.tasks import base\n"
        "from .config import TrainConfig\nprint(trivium.__version__)\n"
    )
    assert wrong_arrows(tmp_path) == []


def fresh_modules(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `code`."""
    command = f"{code}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"torch", "numpy", "matplotlib", "tyro", "rich", "yaml", "transformers"}
    assert fresh_modules("import trivium") & heavy == set()


def test_the_help_text_needs_no_torch():
    code = "from trivium.cli import main\nassert main(['--help']) == 0"
    assert fresh_modules(code) & {"torch", "numpy", "tyro", "matplotlib"} == set()
