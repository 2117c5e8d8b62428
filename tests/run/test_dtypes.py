"""Networks that compute in another number format inside: cut where activations are float32, or refused by name."""

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl import PartitionError
from tests.asked_here import Trainer
from tests.run.conftest import CLASSES, Fit, config, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")


class Mixed(nn.Module):
    """(B, 1, 6, 6) -> (B, 3): `dtype` from the second layer on, float32 again behind the third, or not at all."""

    def __init__(self, dtype: torch.dtype, *, back: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype, self.back = dtype, back
        self.a = nn.Linear(36, 12)
        self.b, self.c = (nn.Sequential(nn.Linear(12, 12), nn.ReLU()).to(dtype) for _ in range(2))
        self.d, self.classifier = nn.Linear(12, 12), nn.Linear(12, CLASSES)
        if not back:
            self.d, self.classifier = self.d.to(dtype), self.classifier.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.a(x.flatten(1))).to(self.dtype)
        z = self.c(self.b(z))
        if self.back:
            z = z.to(torch.float32)
        out: Tensor = self.classifier(torch.relu(self.d(z)))
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modules", ["auto", 1, 2])
def test_modules_end_where_activations_are_float32(fit: Fit, dtype: torch.dtype, modules: str | int) -> None:
    model = Mixed(dtype)
    trainer = Trainer(model, config(modules=modules, epochs=1), run_dir=fit.path("run"))
    report = trainer.fit(samples(26), samples(9, 1), samples(9, 2))
    assert [module.name for module in report.modules] == (["a..classifier"] if modules == 1 else ["a..c", "d"])
    images, labels = samples(9, 2).tensors
    with torch.no_grad():
        right = float((trainer.export("last")(images).argmax(1) == labels).double().mean())
    assert right == report.heads[-1].test_accuracy
    assert {p.dtype for p in model.b.parameters()} == {dtype}


def test_a_cut_that_was_asked_for_elsewhere_is_refused_by_name(fit: Fit) -> None:
    with pytest.raises(PartitionError, match=r"activations behind b are torch.bfloat16; .*\n.*\.float\(\)"):
        fit("run", model=Mixed(torch.bfloat16), modules=("b",))
    with pytest.raises(PartitionError, match=r"are torch\.bfloat16"):
        fit("run", model=Mixed(torch.bfloat16), modules=4)
    assert not fit.path("run").exists()


def test_a_network_without_such_a_place_trains_as_one_module(fit: Fit) -> None:
    with pytest.raises(PartitionError, match="train with"):
        fit("run", model=Mixed(torch.float64, back=False), modules="auto")
    assert fit("run", model=Mixed(torch.float64, back=False), modules=1).status == "completed"
