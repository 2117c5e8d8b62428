"""The network's own classifier as a segment of its own, and the same kind of head in front of it as everywhere."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.model.blueprint import from_blueprint, to_blueprint
from ondevice_trgl.model.partition import group, segments_of
from ondevice_trgl.model.proof import prove
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model


def zoo(name: str, side: int = 32) -> Chain:
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, in_shape=(3, side, side))
    return trace(model, torch.randn(2, 3, side, side), apart=True)


@pytest.mark.parametrize(
    ("name", "shape", "classifier"),
    [
        ("resnet-small", (64, 16, 16), "classifier"),
        ("resnet-preact-3x8", (8, 64, 64), "classifier"),
        ("resnet18", (512, 2, 2), "fc"),
        ("vgg11_bn", (4096,), "classifier.6"),
        ("vit_b_16", (17, 768), "heads.head"),
        ("mobilenet_v2", (1280, 2, 2), "classifier.1"),
        ("squeezenet1_1", (512, 3, 3), "classifier.1"),
        ("convnext_tiny", (768, 2, 2), "classifier.2"),
    ],
)
def test_the_trunk_ends_before_pooling_and_the_classifier(name: str, shape: tuple[int, ...], classifier: str) -> None:
    chain = zoo(name, 64)
    assert (chain.trunk, chain.segments[chain.trunk - 1].out_shape) == (len(chain.segments) - 1, shape)
    layers = dict(chain.root.named_modules())
    targets = [str(node.target) for node in chain.segments[-1].nodes if node.op == "call_module"]
    assert classifier in targets
    wide = [target for target in targets if isinstance(layers[target], nn.Linear | nn.Conv2d)]
    assert wide == [classifier]


def test_it_is_the_same_network_and_its_blueprint_keeps_the_place() -> None:
    chain = zoo("resnet-small")
    prove(chain, segments_of(chain), torch.randn(4, 3, 32, 32))
    again = from_blueprint(json.loads(json.dumps(to_blueprint(chain))))
    assert (again.trunk, [s.name for s in again.segments]) == (chain.trunk, [s.name for s in chain.segments])
    assert group(again, (0, 3, chain.trunk, len(chain.segments))).modules[-1].in_shape == (64, 8, 8)


def test_a_blueprint_from_before_has_the_classifier_in_its_last_segment() -> None:
    torch.manual_seed(0)
    model = build_model("resnet-small", num_classes=5, in_shape=(3, 32, 32))
    old = trace(model, torch.randn(2, 3, 32, 32))
    record: dict[str, Any] = to_blueprint(old)
    del record["trunk"]
    again = from_blueprint(record)
    assert again.trunk == len(again.segments) == len(old.segments)


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_of_linear_layers_alone_the_last_is_the_classifier() -> None:
    chain = trace(
        Net(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 8), apart=True
    )
    assert (len(chain.segments), chain.trunk) == (3, 2)
    assert chain.segments[chain.trunk].name == "layers.4"


def test_a_convolution_can_be_the_classifier() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    chain = trace(Net(*layers), torch.randn(2, 3, 8, 8), apart=True)
    assert (len(chain.segments), chain.trunk) == (2, 1)
    assert chain.segments[0].out_shape == (8, 6, 6)


def test_a_network_in_one_piece_has_none() -> None:
    chain = trace(Net(nn.Flatten(), nn.Linear(12, 3)), torch.randn(2, 3, 2, 2), apart=True)
    assert chain.trunk == len(chain.segments) == 1
