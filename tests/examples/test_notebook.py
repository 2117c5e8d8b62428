"""examples/notebook.ipynb runs from top to bottom in a fresh process, and holds nothing of where it was made."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def sources(notebook: Any) -> list[str]:
    """Of its code cells, in order."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_as_the_format_says(notebook: Any) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert notebook["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    assert all(re.fullmatch("[a-zA-Z0-9-_]{1,64}", identity) for identity in identities)
    for cell in notebook["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == (common | {"execution_count", "outputs"} if cell["cell_type"] == "code" else common)
        lines = cell["source"]
        assert all(line.endswith("\n") for line in lines[:-1])
        assert not lines[-1].endswith("\n")


def test_nothing_of_a_run_is_kept_and_cells_are_plain_python(notebook: Any) -> None:
    for cell in notebook["cells"]:
        assert (cell.get("outputs", []), cell.get("execution_count")) == ([], None)
    for source in sources(notebook):
        ast.parse(source)  # no magics, no await


def test_it_runs_from_top_to_bottom(notebook: Any, tmp_path: Path) -> None:
    # each cell compiled on its own, as a kernel does it; the budget is of the whole process, so it is a fresh one
    runner = (
        "import json, sys\nspace = {'__name__': '__main__'}\n"
        "for index, source in enumerate(json.load(sys.stdin)):\n"
        "    exec(compile(source, f'cell {index}', 'exec'), space)\n"
        "report = space['report']\n"
        "print(json.dumps([report.status, report.measured_peak_bytes, report.budget_bytes, report.accuracy.test]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", runner],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=json.dumps(sources(notebook)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    status, peak, budget, accuracy = json.loads(lines[-1])
    assert (status, budget) == ("completed", 400_000_000)
    assert 50_000_000 < peak <= budget
    assert accuracy > 0.5  # chance is 0.1
    assert sum(line.startswith("module ") for line in lines) == 2
    assert re.fullmatch(r"predicted \[\d(, \d){7}\]", lines[-4])
    assert re.fullmatch(r"labels    \[\d(, \d){7}\]", lines[-3])
    assert [path.name for path in tmp_path.iterdir()] == ["digits-run"]
