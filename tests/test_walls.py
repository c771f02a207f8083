"""Which room may import which: data goes one way, and nothing outside a system's room knows the system."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llava", "forgery_eval", "mmfr_generation", "scripts")

GROUND = {
    *(f"llava.{name}" for name in ("labels", "errors", "cli", "files", "images", "tables", "sources", "provenance")),
    *(f"llava.{name}" for name in ("endpoints",)),
    *(f"llava.{name}" for name in ("image_operations", "fetching", "frames", "tampered", "screening", "interrupts")),
}
VOCABULARY = {f"llava.{name}" for name in ("constants", "conversation", "mm_utils", "native_crops")}
ASK = {"llava.systems", "llava.systems.base", "llava.systems.registry"}
BELOW = GROUND | {"llava.report", "llava.assets", "llava.abstention", "llava.calibration", "llava.model_options"}
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    "llava.constants": set(),
    "llava.conversation": GROUND,
    "llava.mm_utils": GROUND | VOCABULARY,
    "llava.native_crops": GROUND,
    "llava.report": GROUND,
    "llava.calibration": GROUND | {"llava.report"},
    "llava.model_options": GROUND | {"llava.assets", "llava"},
    "llava.report_page": BELOW | {"llava.report_page"},
    "llava.abstention": GROUND,
    "llava.assets": GROUND,
    # The registry looks at a checkpoint's files, and resolves a hub id, when it is asked to.
    "llava.systems": BELOW | ASK | {"llava.model.checkpoint_files"},
    "llava.model": BELOW | VOCABULARY | ASK | {"llava.model"},
    "llava.systems.language_model": BELOW | VOCABULARY | ASK | {"llava.model"},
    "llava.data": BELOW | VOCABULARY | ASK | {"llava.model", "llava.data"},
    "llava.train": BELOW | VOCABULARY | ASK | {"llava.model", "llava.data", "llava.train", "llava.gpu_ceilings"},
    "llava.gpu_ceilings": GROUND,
    "llava.detector": BELOW | ASK,
    "llava.demo": BELOW | VOCABULARY | ASK | {"llava.model", "llava.data", "llava.demo", "llava.systems.fakereasoning"},
    "llava.serve": BELOW | {"llava", "llava.detector", "llava.report_page", "llava.serve"},
    "llava": BELOW | {"llava.detector", "llava.model.builder"},
    "llava.__main__": BELOW | ASK | {"llava"},
    "llava.doctor": BELOW | ASK | {"llava"},
    "llava.merge": BELOW | ASK | {"llava.model"},
    "llava.export": BELOW | ASK | {"llava.model", "llava.merge", "llava.systems.language_model"},
    "forgery_eval": BELOW | ASK | {"llava", "llava.detector", "llava.report_page", "forgery_eval"},
    "mmfr_generation": BELOW
    | {"llava.data.records", "llava.data.summary"}
    | {*ASK, "llava.systems.base", "llava.systems.fakereasoning.answer", "mmfr_generation"},
}
"""What the modules of each room may import: a name stands for the module and all below it, ``llava`` for itself."""
FORWARDED = {
    # Modules that only forward the name which a documented command had first.
    "llava.data.build_tokenizer": {"llava.demo.tokenizer"},
    "llava.train.towers": {"llava.demo.towers"},
}
TORCH_FREE = [
    *sorted(GROUND),
    "llava",
    "llava.report",
    "llava.abstention",
    "llava.calibration",
    "llava.detector",
    "llava.serve.command",
    "llava.serve.app",
    "llava.systems.base",
    "llava.systems.registry",
    "llava.systems.fakereasoning.answer",
    "llava.systems.fakereasoning.options",
    "llava.systems.fakeshield.answer",
    "llava.systems.fakeshield.options",
    "llava.systems.m2f2det.answer",
    "llava.systems.m2f2det.options",
    "llava.systems.m2f2det.protocol",
    "llava.systems.fakevlm.answer",
    "llava.systems.fakevlm.options",
    "llava.systems.fakevlm.protocol",
    "llava.systems.endpoint.answer",
    "llava.systems.endpoint.scores",
    "llava.systems.endpoint.system",
    "llava.data.records",
    "llava.data.summary",
    "llava.data.image_check",
    "llava.__main__",
    "llava.doctor",
    "llava.export",
    "forgery_eval.inference",
    "forgery_eval.eval",
    "forgery_eval.compare",
]


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """Every module of ours that a module imports, wherever in it: at its head, in a function, for types alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert all(alias.name != "*" for alias in node.names), f"{module} imports a star"
            names = [
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def is_below(module: str, room: str) -> bool:
    return module == room or (module.startswith(f"{room}.") and room != "llava")


def room_of(module: str) -> str | None:
    """The row of the table for a module: the longest that holds it."""
    rows = [room for room in ALLOWED if is_below(module, room)]
    return max(rows, key=len, default=None)


def own_room(module: str) -> str | None:
    """The room of a system, whose modules may import each other and all that is below systems."""
    parts = module.split(".")
    if module.startswith("llava.systems.") and (ROOT / "llava" / "systems" / parts[2]).is_dir():
        return ".".join(parts[:3])
    return None


def may_import(module: str, other: str) -> bool:
    if other in FORWARDED.get(module, set()):
        return True
    system = own_room(module)
    if system is not None:
        return is_below(other, system) or any(
            is_below(other, room)
            for room in {*ALLOWED["llava.systems.language_model"], "llava.systems.language_model", "llava.data"}
        )
    room = room_of(module)
    assert room is not None, f"{module} is in no room of the table"
    rooms = ALLOWED[room]
    # A system's room is reached only where the table names it or a module in it.
    named = own_room(other)
    return any(is_below(other, allowed) for allowed in rooms if named is None or allowed.startswith(named))


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("scripts")])
def test_a_module_imports_only_what_its_room_may(module):
    wrong = sorted({other for other in imported(module) if not may_import(module, other)})
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_the_walls_would_be_seen_to_break():
    assert not may_import("llava.model.builder", "llava.systems.fakereasoning.answer")
    assert not may_import("llava.data.records", "llava.train.train")
    assert not may_import("llava.detector", "llava.systems.fakereasoning.system")
    assert not may_import("forgery_eval.eval", "llava.model.checkpoint_files")
    assert not may_import("forgery_eval.store", "llava.systems.fakereasoning.answer")
    assert not may_import("mmfr_generation.validate", "llava.mm_utils")
    assert not may_import("llava.cli", "llava.report")
    assert not may_import("llava.systems.fakereasoning.system", "llava.train.train")
    assert may_import("llava.systems.fakereasoning.system", "llava.systems.language_model")


@pytest.mark.parametrize("package", ["llava/model", "llava/data", "llava/train", "forgery_eval", "llava/detector.py"])
def test_no_system_is_named_in_code(package):
    """A system's name stands in its room, in the registry's list, and in recipes: nowhere else in code."""
    path = ROOT / package
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Constant) and node.value in (
                "fakereasoning",
                "FakeReasoning",
                "fakevlm",
                "FakeVLM",
            )
            assert not named, f"{file.relative_to(ROOT)}, line {getattr(node, 'lineno', 0)}"


TORCH_FREE += [name for name in MODULES if name.startswith("mmfr_generation")]


def test_what_needs_no_torch_loads_none():
    """One process a half, since importing is slow: each module is imported after the others, and torch stays away."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    names = [name for name in TORCH_FREE if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("scripts.")])
def test_nothing_is_set_or_hidden(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"{module}, line {node.lineno}: .cuda()"
        if isinstance(node, ast.ExceptHandler) and node.type is not None and "ImportError" in ast.dump(node.type):
            assert not all(isinstance(inner, ast.Pass) for inner in node.body), f"{module} swallows an ImportError"
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            assert "'environ'" not in ast.dump(target), f"{module}, line {node.lineno}: sets a variable at import"
