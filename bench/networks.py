"""Networks of the literature, 10 classes, for tests and benchmarks of the engines.

Written from the papers. ResNet-50 is ImageNet's, for 224x224 images. The others are in their CIFAR forms: the strides
are those of the usual ports to 32x32 images, so that 8x8 (GoogLeNet), 4x4 (MobileNet-V2) and 1x1 (VGG) values are left
where the classifier begins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm, as large as what comes in."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Inception(nn.Module):
    """Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), figure 2(b); 5x5 filters as two of 3x3, after the
    authors' "Rethinking the Inception Architecture" (CVPR 2016), section 3.1."""

    def __init__(self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int) -> None:
        super().__init__()
        relu = nn.ReLU
        self.one = nn.Sequential(*_unit(inputs, one, 1), relu())
        self.three = nn.Sequential(*_unit(inputs, reduce3, 1), relu(), *_unit(reduce3, three, 3), relu())
        self.five = nn.Sequential(
            *_unit(inputs, reduce5, 1), relu(), *_unit(reduce5, five, 3), relu(), *_unit(five, five, 3), relu()
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_unit(inputs, pool, 1), relu())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """Table 1 of the paper behind a 3x3 stem of 192 filters, with batch norm (Ioffe and Szegedy, ICML 2015)."""

    ROWS = (
        ((192, 64, 96, 128, 16, 32, 32), (256, 128, 128, 192, 32, 96, 64)),
        (
            (480, 192, 96, 208, 16, 48, 64),
            (512, 160, 112, 224, 24, 64, 64),
            (512, 128, 128, 256, 24, 64, 64),
            (512, 112, 144, 288, 32, 64, 64),
            (528, 256, 160, 320, 32, 128, 128),
        ),
        ((832, 256, 160, 320, 32, 128, 128), (832, 384, 192, 384, 48, 128, 128)),
    )

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_unit(3, 192, 3), nn.ReLU())
        self.stages = nn.ModuleList(nn.Sequential(*(Inception(*row) for row in rows)) for rows in self.ROWS)
        self.head = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 3, stride=2, padding=1) if i else x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    """Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), figure 4(d)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inputs
        expand = [*_unit(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        deep = [*_unit(wide, wide, 3, stride, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *deep, *_unit(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Table 2 of the paper; the stem and the row of 24 channels keep the size, which 32x32 images need."""

    ROWS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers, width = [*_unit(3, 32, 3), nn.ReLU6()], 32
        for expansion, outputs, number, stride in self.ROWS:
            for i in range(number):
                layers.append(InvertedResidual(width, outputs, 1 if i else stride, expansion))
                width = outputs
        self.features = nn.Sequential(*layers, *_unit(width, 1280, 1), nn.ReLU6())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class VGG16(nn.Module):
    """Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), column
    D of table 1, with batch norm; of the three linear layers one is left, as is usual for 32x32 images."""

    ROWS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int = 10, size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for row in self.ROWS:
            for outputs in row:
                layers += [*_unit(width, outputs, 3), nn.ReLU(inplace=True)]
                width = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(width * (size // 32) ** 2, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.view(x.size(0), -1))


class Bottleneck(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), figure 5; a stride is the 3x3 layer's."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs, relu = 4 * width, nn.ReLU
        self.body = nn.Sequential(
            *_unit(inputs, width, 1), relu(), *_unit(width, width, 3, stride), relu(), *_unit(width, outputs, 1)
        )
        self.shortcut = nn.Sequential(*_unit(inputs, outputs, 1, stride)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """Table 1 of the same paper."""

    ROWS = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_unit(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for width, blocks, stride in self.ROWS:
            for i in range(blocks):
                layers.append(Bottleneck(inputs, width, 1 if i else stride))
                inputs = 4 * width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


NETWORKS: dict[str, type[nn.Module]] = {
    "googlenet": GoogLeNet,
    "mobilenet_v2": MobileNetV2,
    "vgg16_bn": VGG16,
    "resnet50": ResNet50,
}


def size_of(name: str) -> int:
    """Side of the images of a network, of these or of `csam.models`."""
    return 224 if name == "resnet50" else 32


def build(name: str, size: int | None = None, seed: int = 0) -> nn.Module:
    """A network in eval mode; its batch norms have the statistics of noise images, so that values keep their size.

    size: side of those images, that of the network's unless given.
    """
    torch.manual_seed(seed)
    size = size or size_of(name)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what is seen
    with torch.no_grad():
        network.train()(torch.rand(8, 3, size, size))
    return network.eval()
