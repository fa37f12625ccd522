"""The convolutional networks for small images: plain ones, and ResNets in several forms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

#: Below so many channels, the backward pass of a 1x1 convolution with a stride overwrites foreign memory on a CPU
#: without AVX-512 (oneDNN in PyTorch 2.14, images in channels_last order): tests/training/models/test_models.py.
NARROW = 8


def normalization(channels: int, norm: str) -> nn.Module:
    """BatchNorm, or GroupNorm with eight channels per group (which keeps no statistics of skewed data)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // 8), channels)


def convolution(
    inputs: int, outputs: int, norm: str, stride: int = 1, kernel: int = 3, groups: int = 1
) -> nn.Sequential:
    """Convolution without bias, then normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, normalization(outputs, norm))


def cnn(classes: int, norm: str, width: int) -> nn.Sequential:
    """Three convolutions with pooling between them, then one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        # The same bits as ReLU before pooling at a quarter of the work: ReLU keeps the order of values.
        layers += [convolution(inputs, outputs, norm), nn.MaxPool2d(2), nn.ReLU()]
    layers += [MeanPooling(4), nn.Flatten(), nn.Linear(2 * width * 16, classes)]
    return nn.Sequential(*layers)


class MeanPooling(nn.Module):
    """Mean pooling to ``side`` x ``side``, the size that images of the expected size have here."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        is_expected = x.shape[-2:] == (self.side, self.side)
        return x if is_expected else nn.functional.adaptive_avg_pool2d(x, self.side)


class Gray(nn.Module):
    """The mean of the channels. Grayscale images have three equal ones here."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


def two_convolutions(
    widths: Sequence[int],
    hidden: Sequence[int],
    classes: int,
    *,
    pixels: int,
    padding: int,
    gray: bool,
    projection: int,
) -> nn.Sequential:
    """Two 5x5 convolutions with pooling, hidden linear layers with ReLU, and the classifier.

    ``pixels`` is the size of images for which no other pooling is needed. ``projection`` is the width of the output of
    MOON's projection head of two layers before the classifier (0: none).
    """
    layers: list[nn.Module] = [Gray()] if gray else []
    side, inputs = pixels, 1 if gray else 3
    for width in widths:
        # As in `cnn`, pooling comes before ReLU, with the same bits.
        layers += [nn.Conv2d(inputs, width, 5, padding=padding), nn.MaxPool2d(2), nn.ReLU()]
        side, inputs = (side + 2 * padding - 4) // 2, width
    if side < 1:
        raise ValueError(f"pixels={pixels} is too small for its convolutions")
    layers += [MeanPooling(side), nn.Flatten()]
    inputs *= side * side
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    if projection:
        layers += [nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, projection)]
    return nn.Sequential(*layers, nn.Linear(projection or inputs, classes))


class Block(nn.Module):
    """Two convolutions and a shortcut; if the shape changes, the shortcut is a 1x1 convolution."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, norm, stride)
        self.second = convolution(outputs, outputs, norm)
        self.shortcut = _shortcut(inputs, outputs, norm, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.first(x).relu())
        total: Tensor = (inner + self.shortcut(x)).relu()
        return total


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 to four times the width, and a shortcut as in `Block`."""

    expansion = 4

    def __init__(self, inputs: int, width: int, norm: str, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.first = convolution(inputs, width, norm, kernel=1)
        self.second = convolution(width, width, norm, stride)
        self.third = convolution(width, outputs, norm, kernel=1)
        self.shortcut = _shortcut(inputs, outputs, norm, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.third(self.second(self.first(x).relu()).relu())
        total: Tensor = (inner + self.shortcut(x)).relu()
        return total


class PreActivation(nn.Module):
    """Two convolutions, each after normalization and ReLU; if the width changes, the shortcut is a 1x1 convolution."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int) -> None:
        super().__init__()
        self.norm1 = normalization(inputs, norm)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = normalization(outputs, norm)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if inputs < NARROW and inputs != outputs:
            self.shortcut = Subsampled(stride, nn.Conv2d(inputs, outputs, 1, bias=False))
        elif inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm1(x).relu()
        inner = self.second(self.norm2(self.first(before)).relu())
        total: Tensor = inner + (x if self.shortcut is None else self.shortcut(before))
        return total


class ResNet(nn.Module):
    """A ResNet for small images: a 3x3 convolution, and a stage of ``blocks[i]`` blocks for each of ``widths``.

    The first convolution has ``stem`` channels (0: as many as the first width).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        classes: int,
        norm: str,
        *,
        stem: int = 0,
        block: type[Block | Bottleneck | PreActivation] = Block,
    ) -> None:
        super().__init__()
        inputs = stem or widths[0]
        is_pre_activated = block is PreActivation
        self.stem = nn.Conv2d(3, inputs, 3, 1, 1, bias=False) if is_pre_activated else convolution(3, inputs, norm)
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        for name, count, width in zip(self.stages, blocks, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            outputs = width * block.expansion
            rest = (block(outputs, width, norm, 1) for _ in range(count - 1))
            self.add_module(name, nn.Sequential(block(inputs, width, norm, stride), *rest))
            inputs = outputs
        self.last_norm = normalization(inputs, norm) if is_pre_activated else None
        self.head = nn.Linear(inputs, classes)
        _initialize_convolutions(self)
        if is_pre_activated:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.extract(x))

    def extract(self, x: Tensor) -> Tensor:
        """The feature maps after the first convolution."""
        x = self.stem(x)
        return x.relu() if self.last_norm is None else x

    def classify(self, x: Tensor) -> Tensor:
        """The logits for these feature maps."""
        for name in self.stages:
            x = self.get_submodule(name)(x)
        x = x if self.last_norm is None else self.last_norm(x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def vgg(
    stages: Sequence[Sequence[int]], classes: int, norm: str, pools: int, hidden: Sequence[int] = ()
) -> nn.Sequential:
    """VGG: stages of 3x3 convolutions, of which the first ``pools`` end with pooling, and ``hidden`` linear layers.

    ``norm`` may be empty. The linear layers see the mean over the image.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for i, widths in enumerate(stages):
        for width in widths:
            layers += [
                nn.Conv2d(inputs, width, 3, padding=1),
                *([normalization(width, norm)] if norm else []),
                nn.ReLU(),
            ]
            inputs = width
        if i < pools:
            layers[-1:] = [nn.MaxPool2d(2), nn.ReLU()]  # the same bits, as in `cnn`
    layers += [MeanPooling(1), nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    network = nn.Sequential(*layers, nn.Linear(inputs, classes))
    _initialize_convolutions(network)
    if norm and not hidden:
        _initialize_others(network)
    return network


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a 3x3 one on each channel, and a 1x1 one without ReLU; a shortcut if it fits."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.widen = convolution(inputs, width, norm, kernel=1)
        self.each = convolution(width, width, norm, stride, groups=width)
        self.narrow = convolution(width, outputs, norm, kernel=1)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.narrow(self.each(self.widen(x).relu()).relu())
        return x + inner if self.has_shortcut else inner


def mobilenetv2(classes: int, norm: str, width: float, stride: int) -> nn.Sequential:
    """MobileNetV2 for images of 32 pixels; ``stride`` is that of the first convolution."""
    if 16 * width < 1:
        raise ValueError(f"width={width:g} leaves a layer without channels")
    inputs = int(32 * width)
    layers: list[nn.Module] = [convolution(3, inputs, norm, stride), nn.ReLU()]
    for expansion, channels, count, first in MOBILENETV2:
        for i in range(count):
            outputs = int(channels * width)
            layers.append(InvertedResidual(inputs, outputs, norm, 1 if i else first, expansion))
            inputs = outputs
    last = int(1280 * max(width, 1))
    layers += [convolution(inputs, last, norm, kernel=1), nn.ReLU(), MeanPooling(1), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(last, classes))
    _initialize_convolutions(network)
    _initialize_others(network)
    return network


MOBILENETV2 = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _shortcut(inputs: int, outputs: int, norm: str, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if inputs < NARROW:
        return Subsampled(stride, *convolution(inputs, outputs, norm, kernel=1))
    return convolution(inputs, outputs, norm, stride, kernel=1)


class Subsampled(nn.Sequential):
    """Layers on every ``step``-th row and column; with a 1x1 convolution first, the same as its stride."""

    def __init__(self, step: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        step = self.step
        result: Tensor = super().forward(x[..., ::step, ::step] if step > 1 else x)  # type: ignore[no-untyped-call]
        return result


def _initialize_convolutions(network: nn.Module) -> None:
    """Weights as He et al. (2015); biases, and other layers, keep PyTorch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _initialize_others(network: nn.Module) -> None:
    """As RepDistiller's VGG and MobileNetV2: biases of zero, and small weights of the classifier."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
