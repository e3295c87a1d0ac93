"""Makes tests/golden/codec: what transformers' JanusVQVAE does with tiny random models.

Command: .venv/bin/python tests/golden/make_codec.py      Versions: transformers 5.17.0, torch 2.11.0. Seed: 11.
The weights themselves are not stored: `weight` below gives them from the tensor's name, and the C++ test computes the same numbers.
"""
import json
import pathlib
import zlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

OUT = pathlib.Path(__file__).parent / "codec"

CASES = {
    # name: (config, prefix of the tensor names, as within a Janus checkpoint)
    "single_level": (dict(base_channels=32, channel_multiplier=[1], num_res_blocks=1, num_patches=8, latent_channels=8, embed_dim=4, num_embeddings=24), ""),
    "two_levels": (dict(base_channels=32, channel_multiplier=[2, 1], num_res_blocks=2, num_patches=4, latent_channels=12, embed_dim=8, num_embeddings=40), "model.vqmodel."),
    "three_levels": (dict(base_channels=64, channel_multiplier=[1, 1, 2], num_res_blocks=1, num_patches=3, latent_channels=20, embed_dim=8, num_embeddings=30), ""),
}


def weight(name, shape):
    """Uniform numbers of variance about 1/fan_in (vectors: about the norms' 1, or small biases), from a 32-bit mix of index and name."""
    count = int(np.prod(shape))
    x = (np.arange(count, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 2246822519) & 0xFFFFFFFF
    x ^= x >> 13
    x = (x * 3266489917) & 0xFFFFFFFF
    x ^= x >> 16
    u = x.astype(np.float64) / 2**31 - 1
    if len(shape) > 1:
        v = u * (3.0 / (count // shape[0])) ** 0.5
    else:
        v = 0.125 * u + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return torch.from_numpy(v.astype(np.float32).reshape(shape))


@torch.no_grad()
def main():
    torch.manual_seed(11)
    for name, (options, prefix) in CASES.items():
        config = JanusVQVAEConfig(**options)
        model = JanusVQVAE(config).eval()
        for key, parameter in model.state_dict().items():
            parameter.copy_(weight(key, tuple(parameter.shape)))
        # Codes where the encoder's outputs are, so that many of them are used.
        size = config.num_patches * 2 ** (len(config.channel_multiplier) - 1)
        pixels = torch.rand(2, 3, size, size)
        z = model.quant_conv(model.encoder(pixels * 2 - 1)).permute(0, 2, 3, 1).reshape(-1, config.embed_dim)
        picks = torch.randperm(len(z))[: config.num_embeddings]
        model.quantize.embedding.weight[: len(picks)].copy_(z[picks] + 0.05 * torch.randn(len(picks), config.embed_dim))
        ids = model.encode(pixels * 2 - 1).image_tokens.view(2, -1)
        rebuilt = model.decode(ids)
        written = config.to_dict()
        if prefix:  # a whole checkpoint: the grid comes from the vision tower
            written["num_patches"] = 99
            written = {"model_type": "janus", "vq_config": written, "vision_config": {"image_size": 16 * options["num_patches"], "patch_size": 16}}
        OUT.mkdir(parents=True, exist_ok=True)
        shapes = {prefix + k: list(v.shape) for k, v in model.state_dict().items()}
        (OUT / f"{name}.json").write_text(json.dumps({"config": written, "prefix": prefix, "shapes": shapes}, sort_keys=True) + "\n")
        save_file({"pixels": pixels, "ids": ids.contiguous(), "decoded": rebuilt.contiguous(), "codebook": model.quantize.embedding.weight.detach().contiguous()},
                  OUT / f"{name}.safetensors")
        print(name, "codes used:", ids.unique().numel(), "decoded:", rebuilt.min().item(), rebuilt.max().item(), "inside [0,1]:", ((rebuilt.abs() < 1).float().mean()).item())


if __name__ == "__main__":
    main()
