"""The child process of `vision.py`: `python -m ondevice_trgl.data.vision_child ORDER`, ORDER being JSON.

Loads one split of a torchvision dataset and writes it to the file descriptor that the order names.
"""

import json
import os
import sys
from typing import Any, BinaryIO

import torch

from ondevice_trgl._torchvision import torchvision_module
from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.records import chunk_rows


def main(order_text: str) -> None:
    """Carry out the order. An error's last line is what the parent shows."""
    order = json.loads(order_text)
    datasets = torchvision_module().datasets
    common = {"root": order["root"], "download": order["download"]}
    train = order["split"] == "train"
    if order["name"] == "stl10":
        dataset = datasets.STL10(split=order["split"], **common)
        labels, images = dataset.labels, dataset.data
    else:
        dataset = getattr(datasets, order["name"].upper())(train=train, **common)
        labels, images = dataset.targets, dataset.data.transpose(0, 3, 1, 2)
    with os.fdopen(order["output"], "wb") as file:
        write(file, [int(label) for label in labels], images, list(dataset.classes))


def write(file: BinaryIO, labels: list[int], images: Any, classes: list[str]) -> None:
    """A line of JSON, the labels as bytes, the images (a uint8 array N x C x H x W) as bytes."""
    file.write(json.dumps({"count": len(labels), "classes": classes}).encode() + b"\n" + bytes(labels))
    rows = chunk_rows(images[0].size)
    for start in range(0, len(labels), rows):
        file.write(bytes_of(torch.from_numpy(images[start : start + rows]).contiguous()))


if __name__ == "__main__":
    main(sys.argv[1])
