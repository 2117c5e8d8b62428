"""Which axis of a boundary is channels, for every way that networks lay their activations out."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ondevice_trgl.model.blueprint import from_blueprint, to_blueprint
from ondevice_trgl.model.heads import build_head, head_behind
from ondevice_trgl.model.layout import Layout, axis_by_rank, layouts_of
from ondevice_trgl.model.partition import group, partition
from ondevice_trgl.model.trace import Chain, Segment, trace
from ondevice_trgl.model.zoo import build_model


class Written(nn.Module):
    """A forward pass written in a test; `layers` are its modules by name."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.written(self, x)
        return result

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def layout(forward: Callable[..., Tensor], shape: tuple[int, ...], **layers: nn.Module) -> Layout:
    """The layout of what `forward` returns for a batch of two samples of `shape`."""
    model = Written(forward, **layers)
    graph = _graph(model, torch.randn(2, *shape))
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    assert isinstance(result, fx.Node)
    return layouts_of(graph, dict(model.named_modules()))[result]


def _graph(model: nn.Module, x: Tensor) -> fx.Graph:
    """Traced with shapes alone, whatever the package traces with: methods stay methods and functions functions."""
    graph = fx.Tracer().trace(model)

    class Noted(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                n.meta["shape"] = tuple(result.shape)
            return result

    Noted(model, graph=graph).run(x)
    return graph


def boundaries(chain: Chain) -> list[tuple[tuple[int, ...], int]]:
    return [(segment.out_shape, segment.channel_axis) for segment in chain.segments[:-1]]


def conv(x: Tensor) -> Tensor:
    """(B, 4, H, W) -> (B, 6, H, W), made by a convolution."""
    return functional.conv2d(x, torch.ones(6, 4, 1, 1))


WEIGHT = torch.randn(6, 6)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv1d(6, 6, 1), (6, 6), 1),
        (nn.Conv3d(6, 6, 1), (6, 2, 6, 6), 1),
        (nn.ConvTranspose2d(6, 6, 1), (6, 6, 6), 1),
        (nn.BatchNorm1d(6), (6, 6), 1),
        (nn.InstanceNorm2d(6), (6, 6, 6), 1),
        (nn.GroupNorm(2, 6), (6, 6), 1),
        (nn.MaxPool2d(2), (6, 6, 6), 1),
        (nn.AdaptiveAvgPool1d(3), (6, 6), 1),
        (nn.LayerNorm(6), (6, 6, 6), 3),
        (nn.RMSNorm(6), (6, 6), 2),
        (nn.Linear(6, 6), (6, 6), 2),
        (nn.Embedding(9, 6), (6,), 2),
        (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (6, 6), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_that_tell(layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    x = torch.zeros(2, *shape, dtype=torch.int64 if isinstance(layer, nn.Embedding) else torch.float32)
    model = nn.Sequential(layer)
    graph = _graph(model, x)
    node = next(node for node in graph.nodes if node.op == "call_module")
    assert layouts_of(graph, dict(model.named_modules()))[node] == Layout(frozenset({axis}), frozenset({0}))


@pytest.mark.parametrize(
    ("function", "shape", "axis"),
    [
        (lambda m, x: functional.conv1d(x, torch.ones(6, 6, 1)), (6, 6), 1),
        (lambda m, x: torch.conv2d(x, torch.ones(6, 6, 1, 1)), (6, 6, 6), 1),
        (lambda m, x: functional.batch_norm(x, torch.zeros(6), torch.ones(6)), (6, 6), 1),
        (lambda m, x: functional.group_norm(x, 2), (6, 6, 6), 1),
        (lambda m, x: functional.instance_norm(x), (6, 6), 1),
        (lambda m, x: functional.max_pool2d(x, 2), (6, 6, 6), 1),
        (lambda m, x: functional.layer_norm(x, (6,)), (6, 6), 2),
        (lambda m, x: functional.rms_norm(x, [6]), (6, 6, 6), 3),
        (lambda m, x: functional.linear(x, WEIGHT), (6, 6), 2),
    ],
)
def test_functions_that_tell(function: Callable[..., Tensor], shape: tuple[int, ...], axis: int) -> None:
    assert layout(function, shape) == Layout(frozenset({axis}), frozenset({0}))


MOVES: list[tuple[Callable[[Tensor], Tensor], set[int]]] = [
    (lambda x: x.permute(0, 2, 3, 1), {3}),
    (lambda x: torch.permute(x, (0, 2, -3, 3)), {2}),
    (lambda x: x.transpose(1, -1), {3}),
    (lambda x: torch.swapaxes(x, 1, 2), {2}),
    (lambda x: x.movedim(1, -1), {3}),
    (lambda x: torch.movedim(x, (0, 1), (1, 0)), {0}),
    (lambda x: x.mT, {1}),
    (lambda x: x.flatten(2), {1}),
    (lambda x: torch.flatten(x, 2).transpose(1, 2), {2}),
    (lambda x: x.flatten(1), {1}),
    (lambda x: x.view(2, 6, -1), {1}),
    (lambda x: x.reshape(x.shape[0], x.size(1), 2, 2, -1), {1}),
    (lambda x: x.view(2, 3, 2, 4, 5), {1, 2}),
    (lambda x: x.view(2, 3, 2, 4, 5).transpose(1, 2).reshape(2, 6, 4, 5), {1}),
    (lambda x: x.unsqueeze(1), {2}),
    (lambda x: x.unsqueeze(-1).squeeze(-1), {1}),
    (lambda x: x[:, None].squeeze(1), {1}),
    (lambda x: x.mean(dim=(2, 3)), {1}),
    (lambda x: torch.mean(x, 3).mean(-1, keepdim=True), {1}),
    (lambda x: x.permute(0, 2, 3, 1).mean([1, 2]), {1}),
    (lambda x: torch.amax(x.permute(0, 2, 3, 1), dim=1), {2}),
    (lambda x: x.max(dim=2)[0], {1}),
    (lambda x: x[..., ::2, 1:], {1}),
    (lambda x: x.permute(0, 2, 1, 3)[:, 0], {1}),
    (lambda x: x.select(2, 0), {1}),
    (lambda x: x.transpose(1, 2).unbind(1)[1], {1}),
    (lambda x: torch.stack([x, x], 1), {2}),
    (lambda x: torch.cat([x, x], dim=1), {1}),
    (lambda x: x.chunk(2, dim=1)[0], {1}),
    (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1)), {1}),
    (lambda x: functional.interpolate(x, scale_factor=2), {1}),
    (lambda x: x.softmax(1).clone().add_(1).contiguous(), {1}),
    (lambda x: operator.add(x, 1) * x.sigmoid(), {1}),
    (lambda x: x * x.mean((2, 3), keepdim=True), {1}),
    (lambda x: torch.roll(x, 1, 2), {1}),
    (lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1), {1}),
    (lambda x: x.repeat(1, 2, 1, 1), {1}),
    (lambda x: x.sum(1), set()),
]


@pytest.mark.parametrize(("move", "expected"), MOVES)
def test_what_moves_axes_is_followed(move: Callable[[Tensor], Tensor], expected: set[int]) -> None:
    assert layout(lambda m, x: move(conv(x)), (4, 4, 5)).channels == frozenset(expected)


@pytest.mark.parametrize(("move", "expected"), MOVES)
def test_the_axis_that_is_followed_is_the_one_that_varies_with_channels(
    move: Callable[[Tensor], Tensor], expected: set[int]
) -> None:
    x = torch.arange(1.0, 7.0).view(1, 6, 1, 1).expand(2, 6, 4, 5).contiguous()
    out = move(x)
    varies = {axis for axis in range(out.ndim) if not torch.equal(out, out.roll(1, axis))}
    assert varies == expected


def test_axes_that_a_view_mixes_are_unknown_and_those_that_a_shuffle_mixes_stay() -> None:
    assert layout(lambda m, x: conv(x).reshape(2, 8, 15), (4, 4, 5)).channels == frozenset()
    assert layout(lambda m, x: functional.pixel_shuffle(conv(x)[:, :4], 2), (4, 4, 5)).channels == {1}


def test_a_permute_layer_of_another_package_is_followed() -> None:
    class Permute(nn.Module):
        def __init__(self, *dims: int) -> None:
            super().__init__()
            self.dims = list(dims)

        def forward(self, x: Tensor) -> Tensor:
            return x.permute(self.dims)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Permute(0, 2, 3, 1), nn.GELU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model.append(nn.Flatten()).append(nn.Linear(48, 3))
    assert boundaries(trace(model, torch.randn(2, 4, 4, 4)))[0] == ((4, 4, 4), 2)


class Opaque(nn.Module):
    """(B, 4, 4, 4), channels from axis 1 to the last; nothing tells from outside but who reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :3].permute(0, 2, 3, 1)


def test_behind_an_operator_that_nobody_knows_the_readers_tell() -> None:
    model = Written(
        lambda m, x: m.fc(m.mix(m.norm(functional.gelu(m.opaque(m.conv(x))))).mean((1, 2))),
        conv=nn.Conv2d(4, 4, 1),
        opaque=Opaque(),
        norm=nn.LayerNorm(4),
        mix=nn.Linear(4, 4),
        fc=nn.Linear(4, 3),
    )
    assert boundaries(trace(model, torch.randn(2, 4, 4, 4)))[0] == ((3, 4, 4), 2)


def test_before_any_operator_that_tells_the_readers_do() -> None:
    def forward(m: Written, x: Tensor) -> Any:
        x = x * m.scale.weight  # weighted, and says nothing
        return m.b(m.a(functional.relu(x)).transpose(1, 2)).mean((1, 2))

    model = Written(forward, scale=nn.Embedding(4, 5), a=nn.Conv1d(4, 5, 1), b=nn.Linear(5, 3))
    graph = _graph(model, torch.randn(2, 4, 5))
    layouts = layouts_of(graph, dict(model.named_modules()))
    relu = next(node for node in graph.nodes if node.name == "relu")
    assert layouts[relu].channels == {1}


def test_where_nothing_tells_the_rank_does() -> None:
    assert [axis_by_rank(shape) for shape in [(5,), (6, 5), (3, 4, 4), (3, 2, 4, 4)]] == [0, 1, 0, 0]
    nothing = Layout(frozenset(), frozenset())
    assert nothing.channel_axis((6, 5)) == 1
    assert nothing.rows_are_samples


def test_a_subclass_of_layer_norm_that_permutes_leaves_channels_where_they_were() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), LayerNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 4))
    assert boundaries(trace(model.append(nn.Flatten()), torch.randn(2, 4, 4, 4)))[0] == ((4, 4, 4), 0)


def test_of_two_that_disagree_the_shortcut_counts() -> None:
    def mixer(m: Written, x: Tensor) -> Any:
        x = m.embed(x).flatten(2).transpose(1, 2)
        x = x + m.tokens(m.norm(x).transpose(1, 2)).transpose(1, 2)
        return m.fc(x + m.channels(x)).mean(1)

    layers = {"embed": nn.Conv2d(3, 4, 2, 2), "norm": nn.LayerNorm(4), "tokens": nn.Linear(4, 4)}
    model = Written(mixer, **layers, channels=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    assert boundaries(trace(model, torch.randn(2, 3, 4, 4))) == [((4, 4), 1), ((4, 4), 1)]


def test_attention_written_by_hand_is_followed() -> None:
    def attention(m: Written, x: Tensor) -> Any:
        b, t, c = x.shape
        q, k, v = m.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        return (scores @ v).transpose(1, 2).reshape(b, t, c)

    assert layout(attention, (6, 6), qkv=nn.Linear(6, 18)) == Layout(frozenset({2}), frozenset({0}))

    def by_torch(m: Written, x: Tensor) -> Any:
        parts = m.qkv(x).view(2, 6, 2, 9).transpose(1, 2).chunk(3, -1)
        return functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])

    fused = layout(by_torch, (6, 6), qkv=nn.Linear(6, 18))
    assert fused.channels == {1, 3}
    assert fused.channel_axis((2, 6, 3)) == 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_channels_last(kind: Any) -> None:
    model = Written(
        lambda m, x: m.fc(m.b(functional.relu(m.a(x)[0]))[0][:, -1]),
        a=kind(4, 5, batch_first=True),
        b=kind(5, 5, batch_first=True),
        fc=nn.Linear(5, 3),
    )
    assert boundaries(trace(model, torch.randn(2, 6, 4))) == [((6, 5), 1)]


def test_rows_that_are_known_to_be_another_axis_are_no_cut_even_where_there_are_as_many() -> None:
    def sequence_first(m: Written, x: Tensor) -> Any:
        x = m.b(m.a(x).transpose(0, 1))
        return m.d(m.c(x).mean(0))

    layers = {name: nn.Linear(4, 4) for name in "abcd"}
    model = Written(sequence_first, **layers)
    assert boundaries(trace(model, torch.randn(2, 5, 4))) == [((5, 4), 1)]
    assert boundaries(trace(model, torch.randn(2, 2, 4))) == [((2, 4), 1)]


def test_an_encoder_that_works_sequence_first_is_cut_where_the_batch_is_first() -> None:
    def forward(m: Written, x: Tensor) -> Any:
        y = m.a(x).permute(1, 0, 2)
        y = (y + m.attention(y, y, y)[0]).permute(1, 0, 2)
        return m.d(m.c(y).mean(1))

    layers = {"a": nn.Linear(4, 4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 3)}
    chain = trace(Written(forward, **layers, attention=nn.MultiheadAttention(4, 2)), torch.randn(2, 2, 4))
    assert boundaries(chain) == [((2, 4), 1), ((2, 4), 1)]


@pytest.mark.parametrize("class_token", [True, False])
def test_vision_transformers_have_channels_last(class_token: bool) -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, 2)
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.positions = nn.Parameter(torch.zeros(1, 4 + class_token, 8))
            self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)))
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            if class_token:
                x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
            x = self.blocks(x + self.positions)
            return self.fc(x[:, 0])  # type: ignore[no-any-return]

    found = boundaries(trace(Vit(), torch.randn(2, 3, 4, 4)))
    assert len(found) >= 2
    assert {axis for _, axis in found} == {1}
    assert found[-1] == ((4 + class_token, 8), 1)


def test_windows_of_a_map_keep_their_channels_and_their_rows() -> None:
    """Swin: (B, H, W, C) to windows (B·n, 4, C) and back."""

    def forward(m: Written, x: Tensor) -> Any:
        b, h, w, c = (y := m.stem(x).permute(0, 2, 3, 1)).shape
        windows = m.norm(y).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        back = windows.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return y + back

    found = layout(forward, (3, 8, 8), stem=nn.Conv2d(3, 4, 2, 2), norm=nn.LayerNorm(4))
    assert found.channels == {3}
    assert found.rows_are_samples


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16", "convnext_tiny", "shufflenet_v2_x1_0", "resnet18"])
def test_networks_of_torchvision(name: str) -> None:
    model = build_model(name, num_classes=3, in_shape=(3, 32, 32))
    found = boundaries(trace(model, torch.zeros(2, 3, 32, 32)))
    expected = {1: 0, 2: 1, 3: 2 if name == "swin_t" else 0}
    assert [axis for _, axis in found] == [expected[len(shape)] for shape, _ in found]


class Audio(nn.Module):
    """(B, 1, T), in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(1, 8, 5, 2, 2), nn.Conv1d(8, 8, 5, 2, 2), nn.Conv1d(8, 8, 5, 2, 2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return self.fc(self.c(torch.relu(x)).mean(-1))  # type: ignore[no-any-return]


def as_images(model: Audio) -> nn.Module:
    """The same network on (B, 1, 1, T)."""
    twin = nn.Sequential()
    for one in (model.a, model.b, model.c):
        two = nn.Conv2d(one.in_channels, one.out_channels, (1, 5), (1, 2), (0, 2))
        two.load_state_dict({name: t if name == "bias" else t.unsqueeze(2) for name, t in one.state_dict().items()})
        twin.append(two).append(nn.ReLU())
    return nn.Sequential(*list(twin)[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)


@pytest.mark.parametrize("head", ["mlp", "pooled-linear"])
def test_a_network_on_sound_has_the_heads_of_its_twin_on_images(head: str) -> None:
    model = Audio()
    sound, image = partition(model, torch.randn(2, 1, 32)), partition(as_images(model), torch.randn(2, 1, 1, 32))
    assert [m.out_shape for m in sound.modules] == [(8, 16), (8, 8), (3,)]
    x = torch.randn(5, 1, 32)
    y = x.unsqueeze(2)
    for one, two in list(zip(sound.modules, image.modules, strict=True))[:-1]:
        x, y = one(x), two(y)
        heads = head_behind(one, head, 3), head_behind(two, head, 3)
        heads[1].load_state_dict(heads[0].state_dict())
        assert torch.allclose(heads[0](x), heads[1](y), atol=1e-5)


def heard_after_training(axis: int) -> float:
    """Accuracy on new sounds of an inner head whose channels are on `axis` of (32, 30): eight clicks at any time."""
    torch.manual_seed(0)
    clicks = 3.0 * torch.randn(8, 5)

    def sounds(count: int) -> tuple[Tensor, Tensor]:
        labels, x = torch.randint(0, 8, (count,)), 0.1 * torch.randn(count, 1, 64)
        for row, start, label in zip(x, 2 * torch.randint(0, 30, (count,)), labels, strict=True):
            row[0, start : start + 5] += clicks[label]
        return x, labels

    net = nn.Sequential(nn.Conv1d(1, 32, 5, 2), nn.ReLU(), nn.Conv1d(32, 8, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    module = partition(net.append(nn.Linear(8, 8)), torch.zeros(2, 1, 64)).modules[0]
    assert (module.out_shape, module.channel_axis) == ((32, 30), 0)
    head = build_head("pooled-linear", module.out_shape, 8, axis)
    parameters = [*module.parameters(), *head.parameters()]
    for _ in range(100):
        x, labels = sounds(64)
        loss = functional.cross_entropy(head(module(x)), labels)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= grad
    x, labels = sounds(500)
    return float((head(module(x)).argmax(1) == labels).float().mean())


def test_the_inner_head_of_a_network_on_sound_learns() -> None:
    assert heard_after_training(axis=0) > 0.9
    assert heard_after_training(axis=1) < 0.6  # pooled over channels: what the rank alone would say


def test_a_blueprint_gives_the_same_heads() -> None:
    chain = trace(Audio(), torch.randn(2, 1, 32))
    again = from_blueprint(to_blueprint(chain))

    def heads(segments: tuple[Segment, ...]) -> list[tuple[int, int]]:
        return [(segment.channel_axis, segment.head_limit) for segment in segments]

    assert heads(again.segments) == heads(chain.segments)
    assert [m.channel_axis for m in group(again, (0, 1, 3)).modules] == [0, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_gives_the_same_whichever_axis_its_channels_are_on(axis: int) -> None:
    first = build_head("mlp", (5, 6, 7), 3)
    x = torch.randn(4, 5, 6, 7)
    shape = list(x.movedim(1, axis + 1).shape[1:])
    head = build_head("mlp", tuple(shape), 3, channel_axis=axis)
    for own, other in zip(head.parameters(), first.parameters(), strict=True):
        own.data = other.data
    assert torch.equal(head(x.movedim(1, axis + 1)), first(x))
