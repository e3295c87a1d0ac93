"""Writes tests/golden/data/shard.safetensors: a shard as a foreign tool would tokenise it.

    .venv/bin/python tests/golden/make_data.py        (safetensors 0.8.0, numpy 2.4)
"""
import pathlib

import numpy as np
from safetensors.numpy import save_file

documents = [
    ([5, 6, 7], [0, 0, 0]),                             # text alone
    ([8, 9, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),           # caption, then a picture of four codes
    ([3, 2, 1, 0, 4, 4, 4, 4, 10], [1] * 8 + [0]),      # two pictures, then text
]
ids = np.array([i for d, _ in documents for i in d], np.int32)
modality = np.array([m for _, d in documents for m in d], np.uint8)
offsets = np.cumsum([0] + [len(d) for d, _ in documents]).astype(np.int64)
save_file(
    {"ids": ids, "modality": modality, "document_offsets": offsets},
    pathlib.Path(__file__).parent / "data" / "shard.safetensors",
    metadata={"format": "moegraft.shard", "version": "1", "modalities": "text,image", "text_vocab": "11",
              "codes_image": "5", "item_length_image": "4"},
)
