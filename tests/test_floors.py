"""Imports point down, and what costs seconds or belongs to one floor stays there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedmm

PACKAGE = Path(fedmm.__file__).parent
FLOORS = [
    ("fedmm", "fedmm.types", "fedmm.tree", "fedmm.seeds", "fedmm.bounds", "fedmm.storage", "fedmm.shown", "fedmm.peak"),
    ("fedmm.adapters", "fedmm.losses", "fedmm.codecs"),
    ("fedmm.edge", "fedmm.aggregate", "fedmm.data", "fedmm.link"),
    ("fedmm.llm", "fedmm.model"),
    ("fedmm.serving",),
    ("fedmm.methods", "fedmm.train", "fedmm.faults", "fedmm.stages", "fedmm.evaluate"),
    ("fedmm.config",),
    ("fedmm.runs",),
    ("fedmm.federation",),
    ("fedmm.results",),
    ("fedmm.sweep",),
    ("fedmm.flower",),
    ("fedmm.cli", "fedmm.bench"),
]
ONLY_IN = {
    "flwr": ("fedmm.flower",),
    "grpc": ("fedmm.link", "fedmm.serving", "fedmm.bench.bare"),  # bench: the floor that the link is measured against
    "hydra": ("fedmm.config.composition", "fedmm.config.targets"),
    "matplotlib": ("fedmm.results.plots", "fedmm.data"),  # data: the fonts that it carries
    "sklearn": ("fedmm.data",),
    "peft": ("fedmm.adapters", "fedmm.edge"),
    "ray": (),
    "pickle": (),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for floor, names in enumerate(FLOORS):
        if any(module == name or (name != "fedmm" and module.startswith(f"{name}.")) for name in names):
            return floor
    raise AssertionError(f"{module} stands on no floor; give it one here and in CONTRIBUTING.md")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = PACKAGE.parent / Path(*f"{node.module}.{alias.name}".split("."))
                found.add(
                    f"{node.module}.{alias.name}"
                    if inner.with_suffix(".py").exists() or inner.is_dir()
                    else str(node.module)
                )
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    own = floor_of(module_of(path))
    for name in imports_of(path):
        if name.split(".")[0] == "fedmm":
            assert floor_of(name) <= own, f"{module_of(path)} on floor {own} imports {name} on floor {floor_of(name)}"
        top = name.split(".")[0]
        if top in ONLY_IN:
            assert module_of(path).startswith(ONLY_IN[top] or ("nowhere",)), f"{module_of(path)} imports {name}"


def test_no_import_leads_back_to_where_it_started():
    """A circle has no order in which it can be understood."""
    modules = {module_of(path): imports_of(path) for path in FILES}
    waiting = {name: {other for other in found if other in modules} - {name} for name, found in modules.items()}
    while free := [name for name, left in waiting.items() if not left]:
        for name in free:
            del waiting[name]
        waiting = {name: left - {*free} for name, left in waiting.items()}
    assert not waiting, f"these import each other: {', '.join(sorted(waiting))}"


def test_remote_knows_neither_host_nor_local():
    assert floor_of("fedmm.link.remote") < min(floor_of("fedmm.serving.host"), floor_of("fedmm.llm.local"))


def test_a_wrong_import_would_be_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from fedmm.config import composition\nimport fedmm.flower.rounds\n")
    assert imports_of(wrong) == {"fedmm.config.composition", "fedmm.flower.rounds"}
    assert (
        floor_of("fedmm.config.composition")
        > floor_of("fedmm.serving.host")
        > floor_of("fedmm.edge.frozen_modules")
        > floor_of("fedmm.tree")
    )


def loads_none_of(heavy: set[str], modules: str) -> None:
    code = f"import sys, {modules}; found = {heavy} & sys.modules.keys(); sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_fedmm_costs_nothing():
    loads_none_of({"torch", "transformers", "flwr", "hydra", "grpc"}, "fedmm")


def test_the_mathematics_needs_no_transformers_and_no_flower():
    mathematics = (
        "fedmm.aggregate.fisher, fedmm.methods.fednano, fedmm.train, fedmm.data.scenes, fedmm.evaluate.answers"
    )
    loads_none_of({"transformers", "peft", "flwr", "hydra", "grpc"}, mathematics)


LINES_OF_A_FILE, LINES_OF_A_ROOM, FILES_OF_A_ROOM, PARAMETERS = 400, 2_500, 14, 8
ROOMS = sorted({path.parent for path in FILES})
SEES_CONFIGURATION = {"config", "federation", "runs", "results", "sweep", "flower", "cli", "bench"}
REASON = re.compile(r"\s*# parameters: \S.*")


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_is_read_in_one_sitting(path):
    assert lines_of(path) <= LINES_OF_A_FILE


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_is_small_enough_to_know(room):
    files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= FILES_OF_A_ROOM and sum(map(lines_of, files)) <= LINES_OF_A_ROOM


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_function_takes_few_parameters_or_says_why_not(path):
    """The reason stands in the line before it: `# parameters: each is a setting of conf/rule/creff.yaml`."""
    text = path.read_text()
    assert not long_functions(text), "take a record, or say why not in a line before the function: # parameters: ..."


def long_functions(text: str) -> list[str]:
    """Functions of too many parameters without a reason in the line before them, or before their first decorator."""
    lines, names = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            takes = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(parameter.arg not in ("self", "cls") for parameter in takes)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if count > PARAMETERS and not REASON.fullmatch(lines[first - 2]):
                names.append(node.name)
    return names


def test_a_function_of_nine_parameters_would_be_seen():
    nine = ", ".join(f"p{i}" for i in range(9))
    assert long_functions(f"\ndef f({nine}): ...") == ["f"]
    assert long_functions(f"\ndef f(self, {nine[4:]}): ...") == []
    assert long_functions(f"# parameters: a yaml names each\n@cache\ndef f(*, {nine}): ...") == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_upper_rooms_see_the_composed_configuration(path):
    room = [*module_of(path).split("."), "fedmm"][1]
    seen = {name for name in imports_of(path) if name.startswith(("fedmm.config", "omegaconf"))}
    assert room in SEES_CONFIGURATION or not seen
