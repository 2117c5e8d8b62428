"""python -m examples.finetune.convert FROM TO: a state dict of torch.save, of whatever age, as safetensors."""

import sys

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    held = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, sys.argv[2])
