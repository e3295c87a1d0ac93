"""Makes tests/golden/io: safetensors files and pictures written by the reference packages.

Run from the repository root: .venv/bin/python tests/golden/make_io.py   (torch 2.11.0, safetensors 0.8.0, pillow 13.0.0, numpy)
"""
import pathlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "io"
OUT.mkdir(exist_ok=True)

# Value i of each tensor is i/4 - 1 (floats) or i (integers): exact in every dtype here.
ramp = torch.arange(12).reshape(3, 4)
floats = ramp.double() / 4 - 1
save_file(
    {
        "f64": floats.double(), "f32": floats.float(), "f16": floats.half(), "bf16": floats.bfloat16(),
        "e4m3": floats.to(torch.float8_e4m3fn), "e5m2": floats.float().to(torch.float8_e5m2),
        "i64": ramp.long(), "i32": ramp.int(), "i16": ramp.short(), "i8": ramp.to(torch.int8), "u8": ramp.to(torch.uint8),
        "bool": ramp % 3 == 0, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "name with \"quotes\" and ü": torch.ones(1),
    },
    OUT / "dtypes.safetensors",
    metadata={"format": "pt", "note": "made by the Python package"},
)

# 6x4 pictures: red = 40*x, green = 60*y, blue = 10*(x+y).
H, W = 4, 6
y, x = np.mgrid[0:H, 0:W]
rgb = np.stack([40 * x, 60 * y, 10 * (x + y)], -1).astype(np.uint8)
Image.fromarray(rgb).save(OUT / "rgb.png")
Image.fromarray(rgb).quantize(24).save(OUT / "palette.png")
# The same picture in other formats, upright and turned (orientation 6: stored rows are shown columns, right to left).
turn = Image.Exif()
turn[0x0112] = 6
for name, options in {"webp": dict(lossless=True), "bmp": {}, "tif": {}}.items():
    Image.fromarray(rgb).save(OUT / f"rgb.{name}", **options)
Image.fromarray(rgb).quantize(24).save(OUT / "rgb.gif")
Image.fromarray(rgb).save(OUT / "deflated.tif", compression="tiff_deflate")
Image.fromarray(rgb).save(OUT / "turned.webp", lossless=True, exif=turn)
Image.fromarray(rgb).save(OUT / "turned.png", exif=turn)
Image.fromarray(rgb).save(OUT / "turned.tif", tiffinfo={0x0112: 6})
Image.fromarray((30 * x + 10 * y).astype(np.uint8), "L").save(OUT / "gray.png")
Image.fromarray((30 * x + 10 * y).astype(np.uint8), "L").point(lambda v: 255 * (v > 90)).convert("1").save(OUT / "bits1.png")
Image.fromarray((257 * (30 * x + 10 * y)).astype(np.uint16)).save(OUT / "gray16.png")
alpha = np.where(x < 3, 0, np.where(x < 5, 128, 255)).astype(np.uint8)
Image.fromarray(np.concatenate([rgb, alpha[..., None]], -1), "RGBA").save(OUT / "rgba.png")
Image.fromarray(np.stack([(30 * x + 10 * y).astype(np.uint8), alpha], -1), "LA").save(OUT / "la.png")
# TIFF of every kind that the RGBA interface of libtiff turns to 8 bits.
Image.open(OUT / "bits1.png").save(OUT / "bits1.tif")
Image.open(OUT / "bits1.png").save(OUT / "fax.tif", compression="group4")
Image.open(OUT / "palette.png").save(OUT / "palette.tif")
Image.open(OUT / "gray16.png").save(OUT / "gray16.tif")
Image.open(OUT / "rgba.png").save(OUT / "rgba.tif")
Image.fromarray(rgb).convert("CMYK").save(OUT / "cmyk.tif")
palette = Image.fromarray(rgb).quantize(24)
palette.save(OUT / "palette_transparent.png", transparency=palette.getpixel((0, 0)))

# JPEGs of smooth pictures, and the pixels pillow decodes from them.
big = np.stack(np.broadcast_arrays(np.linspace(0, 255, 32)[None, :], np.linspace(255, 0, 24)[:, None], 100), -1).astype(np.uint8)
Image.fromarray(big).save(OUT / "rgb.jpg", quality=90, subsampling=0)
Image.fromarray(big).convert("L").save(OUT / "gray.jpg", quality=90)
Image.fromarray(big).save(OUT / "progressive.jpg", quality=90, subsampling=0, progressive=True)
Image.fromarray(big).convert("CMYK").save(OUT / "cmyk.jpg", quality=95)
exif = Image.Exif()
exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
Image.fromarray(big).save(OUT / "rotated.jpg", quality=90, subsampling=0, exif=exif)


def chw(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


# Away from 0 and 255: Pillow clips what overshoots between its two passes.
noise = np.random.default_rng(17).integers(64, 192, (40, 56, 3), dtype=np.uint8)
Image.fromarray(noise).save(OUT / "noise.png")
small = Image.fromarray(noise).resize((28, 20), Image.BICUBIC)
save_file(
    {
        "rgb.jpg": chw(OUT / "rgb.jpg"), "gray.jpg": chw(OUT / "gray.jpg"), "progressive.jpg": chw(OUT / "progressive.jpg"), "cmyk.jpg": chw(OUT / "cmyk.jpg"),
        "noise_20x28": torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous(),
    },
    OUT / "pixels.safetensors",
)
