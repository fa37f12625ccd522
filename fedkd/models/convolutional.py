"""The small convolutional networks: a plain one and the CIFAR ResNets."""

from __future__ import annotations

from torch import Tensor, nn


def normalization(channels: int, norm: str) -> nn.Module:
    """BatchNorm, or GroupNorm with eight channels per group (which keeps no statistics of skewed data)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // 8), channels)


def convolution(inputs: int, outputs: int, norm: str, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution without bias, then normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, normalization(outputs, norm))


def cnn(classes: int, norm: str, width: int) -> nn.Sequential:
    """Three convolutions with pooling between them, then one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        # The same bits as ReLU before pooling at a quarter of the work: ReLU keeps the order of values.
        layers += [convolution(inputs, outputs, norm), nn.MaxPool2d(2), nn.ReLU()]
    layers += [FourByFour(), nn.Flatten(), nn.Linear(2 * width * 16, classes)]
    return nn.Sequential(*layers)


class FourByFour(nn.Module):
    """Mean pooling to 4x4, the size that images of 32 pixels have here."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (4, 4) else nn.functional.adaptive_avg_pool2d(x, 4)


class Block(nn.Module):
    """Two convolutions and a shortcut; if the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, norm, stride)
        self.second = convolution(outputs, outputs, norm)
        keeps = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if keeps else convolution(inputs, outputs, norm, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.first(x).relu())
        total: Tensor = (inner + self.shortcut(x)).relu()
        return total


class ResNet(nn.Module):
    """The 6n + 2 layer ResNet for CIFAR: three stages of ``blocks`` blocks, widths w, 2w, 4w."""

    def __init__(self, blocks: int, classes: int, norm: str, width: int) -> None:
        super().__init__()
        self.stem = convolution(3, width, norm)
        self.layer1 = _stage(width, width, blocks, norm, 1)
        self.layer2 = _stage(width, 2 * width, blocks, norm, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, norm, 2)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.stem(x).relu())))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, norm: str, stride: int) -> nn.Sequential:
    """Blocks of one width; the first of them changes width and size."""
    return nn.Sequential(*(Block(outputs if i else inputs, outputs, norm, 1 if i else stride) for i in range(blocks)))
