"""The exception tree: exit codes, messages, and the drawing in the docstring."""

import inspect
import pickle
import re

import pytest

from ondevice_trgl import errors
from ondevice_trgl.errors import (
    BudgetExceededError,
    BudgetInfeasibleError,
    ConfigError,
    DamagedFileError,
    StorageError,
    TrglError,
    UnknownNameError,
    UsageError,
)

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, TrglError)}


def drawn() -> dict[str, int]:
    rows = re.findall(r"^[│├└─ ]*(\w+Error) +(\d)  ", errors.__doc__ or "", flags=re.MULTILINE)
    return {name: int(code) for name, code in rows}


def test_the_drawing_shows_every_class_with_its_exit_code() -> None:
    assert drawn() == {name: cls.exit_code for name, cls in CLASSES.items()}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_exit_codes_are_those_of_the_command_line(name: str) -> None:
    assert CLASSES[name].exit_code in (1, 2, 3, 4)


def test_a_mistake_of_the_caller_exits_with_2() -> None:
    assert {cls.exit_code for cls in CLASSES.values() if issubclass(cls, UsageError)} == {2}


def test_the_hint_is_on_a_line_of_its_own() -> None:
    assert str(TrglError("it broke", hint="mend it")) == "it broke\n  hint: mend it"
    assert str(TrglError("it broke")) == "it broke"


def test_config_error_lists_every_fault() -> None:
    error = ConfigError(["a is wrong", "b is wrong"], source="run.toml", hint="see --help")
    assert error.faults == ("a is wrong", "b is wrong")
    assert str(error) == "2 faults in run.toml:\n  - a is wrong\n  - b is wrong\n  hint: see --help"
    assert str(ConfigError(["a"])).startswith("1 fault:")


def test_unknown_name_suggests_the_nearest_and_lists_the_valid() -> None:
    error = UnknownNameError("model", "resnet81", ["vgg16", "resnet18", "resnet50"])
    assert error.suggestions[0] == "resnet18"
    assert "unknown model 'resnet81'; did you mean resnet18" in str(error)
    assert "valid: resnet18, resnet50, vgg16" in str(error)


def test_unknown_name_without_a_near_one_suggests_nothing() -> None:
    assert "did you mean" not in str(UnknownNameError("model", "zzz", ["resnet18"]))


def test_infeasible_carries_the_smallest_budget() -> None:
    error = BudgetInfeasibleError("too small", budget_bytes=10, smallest_feasible_budget_bytes=20)
    assert (error.exit_code, error.budget_bytes, error.smallest_feasible_budget_bytes) == (3, 10, 20)
    assert BudgetExceededError("over").exit_code == 4


def test_a_damaged_file_is_a_storage_failure() -> None:
    with pytest.raises(StorageError):
        raise DamagedFileError("torn")


def test_errors_cross_processes_with_their_message() -> None:
    assert str(pickle.loads(pickle.dumps(TrglError("it broke")))) == "it broke"
