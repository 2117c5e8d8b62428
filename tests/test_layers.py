"""The layout keeps its promises: imports point one way, costly packages have one door, files stay short."""

import ast
import graphlib
import importlib
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "ondevice_trgl"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 320

# A file may import from its own room and from rooms further up. `report.model` is the record that the run hands to the
# renderers, so it stands above the run and they below it.
ROOMS = (
    "errors",
    "bounded",
    "typed",
    "durable",
    "imported",
    "processes",
    "units",
    "policy",
    "tasks",
    "buffers",
    "checks",
    "workload_settings",
    "cache_settings",
    "condition_settings",
    "optimizer_settings",
    "config",
    "resolved",
    "report.model",
    "device",
    "data",
    "model",
    "cache",
    "trgl",
    "plan",
    "run",
    "workload",
    "job",
    "end_to_end",
    "baseline",
    "export",
    "report",
    "evaluate",
    "named",
    "setup",
    "isolated",
    "trainer",
    "jobs",
    "compare",
    "cli",
)
DOORS = {
    "torchvision": lambda path: path.name == "_torchvision.py",
    "rich": lambda path: path.is_relative_to(PACKAGE / "cli"),
    "typer": lambda path: path.is_relative_to(PACKAGE / "cli"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def rank(module: str) -> int:
    """Place of a module's room from the top; the package itself, which only gathers names, comes last."""
    inside = module.partition(".")[2]
    if inside == "" or inside == "__main__":
        return len(ROOMS)
    if inside in ("report", "report.model"):  # report/__init__.py runs whenever the record is imported
        return ROOMS.index("report.model")
    if inside == "_torchvision":
        return ROOMS.index("config")
    return ROOMS.index(inside.split(".")[0])


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, at the top or inside functions; type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def own_imports(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    return {name for name in imports(MODULES[module]) if name.split(".")[0] == PACKAGE.name and name != module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_file_belongs_to_a_room(module: str) -> None:
    assert 0 <= rank(module) <= len(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_up(module: str) -> None:
    unknown = own_imports(module) - set(MODULES)
    assert not unknown, f"{module} imports {unknown}, which do not exist"
    downward = {name for name in own_imports(module) if rank(name) > rank(module)}
    assert not downward, f"{module} imports {downward} from further down than itself"


def test_no_circles_between_files() -> None:
    order = graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", sorted(DOORS))
def test_costly_packages_have_one_door(package: str) -> None:
    users = [path for path in FILES if package in {name.split(".")[0] for name in imports(path)}]
    outside = [str(path.relative_to(REPOSITORY)) for path in users if not DOORS[package](path)]
    assert not outside, f"{package} is imported by {outside}"
    if package == "torchvision":
        assert len(users) <= 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_only_the_front_door_lists_public_names() -> None:
    front = PACKAGE / "__init__.py"
    assert [path for path in FILES if path != front and "\n__all__" in path.read_text(encoding="utf-8")] == []


def test_the_public_names_exist_and_are_what_type_checkers_are_told() -> None:
    package = importlib.import_module("ondevice_trgl")
    names: list[str] = package.__all__
    assert len(names) == len(set(names))
    told = {
        alias.asname or alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ondevice_trgl")
        for alias in node.names
    }
    assert {name: getattr(package, name) for name in names} == told
    assert not hasattr(package, "no_such_name")


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.import_module("ondevice_trgl").__version__ == project["version"]


@pytest.mark.parametrize("use", ["", "[getattr(ondevice_trgl, name) for name in ondevice_trgl.__all__];"])
def test_import_is_lean(use: str, run_python: Callable[..., str]) -> None:
    """Neither the package nor any public name costs what training a caller's own module has no need of."""
    loaded = json.loads(run_python(f"import ondevice_trgl, sys, json; {use} print(json.dumps(sorted(sys.modules)))"))
    costly = ("torchvision", "rich", "typer", "PIL", "torch._dynamo", "matplotlib")
    assert not [name for name in loaded if any(name == c or name.startswith(f"{c}.") for c in costly)]


def test_what_training_does_loads_nothing_costly(run_python: Callable[..., str]) -> None:
    """torch.utils.checkpoint, torch.optim and friends would bring in torch._dynamo: 75 MB."""
    steps = {
        "the checkpointed pass": "from ondevice_trgl.trgl.checkpoint import checkpointed\n"
        "checkpointed([torch.nn.Linear(2, 2)])(torch.ones(1, 2)).sum().backward()",
        "live bytes": "from ondevice_trgl.plan.live_bytes import LiveBytes\n"
        "with LiveBytes(): (torch.ones(3, requires_grad=True) * 2).sum().backward()",
        "optimizers": "from ondevice_trgl.trgl.optim import Optimizer\n"
        "for kind in ('sgd', 'adamw'):\n"
        "    p = torch.nn.Parameter(torch.ones(2, 2)); p.grad = torch.ones(2, 2)\n"
        "    Optimizer(kind, {'p': p}).step(0.1)",
        "the environment": "from ondevice_trgl.device.environment import describe_environment\n"
        "describe_environment(threads=1, device='cpu')",
        "blueprints": "from ondevice_trgl.model.blueprint import from_blueprint, to_blueprint\n"
        "from ondevice_trgl.model.trace import trace\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))\n"
        "from_blueprint(to_blueprint(trace(net, torch.zeros(2, 2))))",
        "jobs": "import ondevice_trgl.named, ondevice_trgl.setup.planning",
    }
    costly = "[name for name in ('torch._dynamo', 'torchvision', 'rich') if name in sys.modules]"
    source = "import sys, torch\n" + "\n".join(
        f"{code}\nassert not {costly}, ({what!r}, {costly})" for what, code in steps.items()
    )
    run_python(source)
