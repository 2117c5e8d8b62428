"""bfloat16 where the processor has it; where not, fp32 or a refusal that says why."""

from pathlib import Path

import pytest
import torch

from ondevice_trgl.device import precision
from ondevice_trgl.device.precision import autocast_dtype, computes_bf16
from ondevice_trgl.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags : avx2 amx_bf16 amx_tile\n", True),
        ("Features : fp asimd i8mm bf16\n", True),
        ("flags : fpu avx2 avx512f\nmodel name : no_bf16\n", False),
        (None, False),
    ],
)
def test_the_processor_says_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, has: bool
) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags, encoding="utf-8")
    assert computes_bf16(CPU) is has
    assert autocast_dtype("auto", CPU) is (torch.bfloat16 if has else None)
    assert autocast_dtype("fp32", CPU) is None
    if has:
        assert autocast_dtype("bf16", CPU) is torch.bfloat16
        return
    with pytest.raises(ConfigError, match=r"this cpu has no avx512_bf16 or amx_bf16; .* times as long") as caught:
        autocast_dtype("bf16", CPU)
    assert "auto" in str(caught.value.hint)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_says_so_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert computes_bf16(CUDA) is has
    if not has:
        with pytest.raises(ConfigError, match="this cuda has no bfloat16"):
            autocast_dtype("bf16", CUDA)
