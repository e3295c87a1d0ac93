"""Writes tests/golden/data/sets: one small data set of captioned pictures as people keep them, and chats with several pictures.

    python tests/golden/make_datasets.py        (Python 3.11, pyarrow 26.0.1, zstd 1.5.4 on PATH)

set.jsonl is the same set as set.tar, pax.tar, gnu.tar, set.tar.gz, set.tar.zst, shards-00000{0,1}.tar, set.parquet, stream.arrow, file.arrow, lz4.arrow, hub/ and saved/;
chat.jsonl as chat.parquet and chat.arrow.
"""
import gzip
import io
import json
import pathlib
import struct
import subprocess
import tarfile
import zlib

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

out = pathlib.Path(__file__).parent / "data" / "sets"
for folder in ["images", "hub/data", "saved"]:
    (out / folder).mkdir(parents=True, exist_ok=True)


def png(red, green, blue, size=12):
    """A picture of one colour; no imaging library is needed for that."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = (b"\0" + bytes([red, green, blue]) * size) * size
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


pictures = [png(40 * i, 255 - 50 * i, 7 * i) for i in range(5)]
texts = ["red heart", "a green apple", "ein rotes Herz – schön", "a red apple", "a green heart"]
captions = [["red heart", "a heart"], None, None, ["a red apple", "an apple", "a red thing"], None]
for i, picture in enumerate(pictures):
    (out / f"images/{i}.png").write_bytes(picture)


def jsonl(name, rows):
    (out / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


jsonl("set.jsonl", [{"image": f"images/{i}.png", "text": texts[i]} | ({"captions": captions[i]} if captions[i] else {}) for i in range(5)])


# WebDataset: the caption as .txt, further ones in .json, and what a reader passes over.
def members(rows, prefix):
    for i in rows:
        key = f"{prefix}{i:04d}"
        if captions[i]:
            yield f"{key}.json", json.dumps({"caption": texts[i], "captions": captions[i], "url": "https://example.org/x.png", "width": 12}).encode()
        yield f"{key}.{'img.PNG' if i == 2 else 'png'}", pictures[i]
        if i != 4:
            yield f"{key}.txt", texts[i].encode() + b"\n"
        else:
            yield f"{key}.json", json.dumps({"text": texts[i], "file_name": "as-it-was.png"}).encode()
        yield f"{key}.cls", b"7"


def tar(rows, prefix="train/", **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, data in members(rows, prefix):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


whole = tar(range(5), format=tarfile.USTAR_FORMAT)
(out / "set.tar").write_bytes(whole)
(out / "set.tar.gz").write_bytes(gzip.compress(whole, mtime=0))
(out / "set.tar.zst").write_bytes(subprocess.run(["zstd", "-q", "-19", "-c"], input=whole, stdout=subprocess.PIPE, check=True).stdout)
# Names of more than 100 bytes, and of other letters, take headers of their own.
(out / "pax.tar").write_bytes(tar(range(5), "größe/" + "x" * 180 + "/", format=tarfile.PAX_FORMAT))
(out / "gnu.tar").write_bytes(tar(range(5), "y" * 180 + "/", format=tarfile.GNU_FORMAT))
(out / "shards-000000.tar").write_bytes(tar(range(3)))
(out / "shards-000001.tar").write_bytes(tar(range(3, 5)))

# Hugging Face: an Image column is struct<bytes, path>.
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
table = pa.table({
    "image": pa.array([{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(pictures)], image),
    "text": texts,
    "captions": pa.array(captions, pa.list_(pa.string())),
    "label": pa.array(range(5), pa.int64()),
})


def arrow(path, table, new=pa.ipc.new_stream, **options):
    with pa.OSFile(str(out / path), "wb") as file, new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)


pq.write_table(table, out / "set.parquet", row_group_size=2)
arrow("stream.arrow", table)
arrow("file.arrow", table, pa.ipc.new_file)
arrow("lz4.arrow", table, compression="lz4")
for i, part in enumerate([table.slice(0, 3), table.slice(3)]):
    pq.write_table(part, out / f"hub/data/train-{i:05d}-of-00002.parquet")
    arrow(f"saved/data-{i:05d}-of-00002.arrow", part)
(out / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{i:05d}-of-00002.arrow"} for i in range(2)], "_fingerprint": "0"}))
(out / "saved/dataset_info.json").write_text("{}")

# The other ways a column holds pictures: bare bytes, names of files.
pq.write_table(pa.table({"image": pa.array(pictures, pa.binary()), "caption": texts}), out / "binary.parquet")
pq.write_table(pa.table({"file_name": [f"images/{i}.png" for i in range(5)], "caption": texts}), out / "names.parquet")

# Chats with several pictures.
chats = [("see ", [0, 1], "two pictures"), ("and ", [2], "one")]


def chat(text, count, answer, **keys):
    return [{"role": "user", "content": [{"type": "text", "text": text} | keys] + [{"type": "image"} | {k: None for k in keys}] * count},
            {"role": "assistant", "content": [{"type": "text", "text": answer} | keys]}]


jsonl("chat.jsonl", [{"images": [f"images/{i}.png" for i in which], "messages": chat(text, len(which), answer)} for text, which, answer in chats])
part = pa.struct([("type", pa.string()), ("text", pa.string()), ("index", pa.int32())])
turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
table = pa.table({
    "images": pa.array([[{"bytes": pictures[i], "path": None} for i in which] for _, which, _ in chats], pa.list_(image)),
    "messages": pa.array([chat(text, len(which), answer, index=None) for text, which, answer in chats], pa.list_(turn)),
})
pq.write_table(table, out / "chat.parquet")
arrow("chat.arrow", table)

# More rows in a row group than are decoded at a time; cells without a picture or text; columns under other names and of other types.
pq.write_table(pa.table({"image": pa.array([{"bytes": b"picture %d" % i, "path": None} for i in range(40)], image), "text": [f"text {i}" for i in range(40)]}), out / "long.parquet")
pq.write_table(pa.table({
    "image": pa.array([None, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}, {"bytes": None, "path": "images/0.png"}], image),
    "text": ["alone", "empty", None, "by path"],
}), out / "nulls.parquet")
pq.write_table(pa.table({"img": table["images"].combine_chunks().flatten(), "text": texts[:3]}), out / "renamed.parquet")
pq.write_table(pa.table({"images": pa.array([[b"x"]], pa.list_(pa.binary())), "text": ["bare"]}), out / "bare.parquet")

# The same two rows in every type that a column may have.
(out / "types").mkdir(exist_ok=True)
plain = {"image": pa.array([b"picture 0", b"picture 1"], pa.binary()), "text": pa.array(["a dog", "a cat"]), "captions": pa.array([["one", "two"], ["three", "four"]])}
for name, changed in {
    "plain": {},
    "large": {"image": plain["image"].cast(pa.large_binary()), "text": plain["text"].cast(pa.large_string()), "captions": plain["captions"].cast(pa.large_list(pa.large_string()))},
    "view": {"image": plain["image"].cast(pa.binary_view()), "text": plain["text"].cast(pa.string_view())},
    "fixed": {"image": plain["image"].cast(pa.binary(9)), "captions": plain["captions"].cast(pa.list_(pa.string(), 2))},
    "dictionary": {"image": plain["image"].dictionary_encode(), "text": plain["text"].dictionary_encode()},
    "struct": {"image": pa.array([{"bytes": b"picture 0", "path": None}, {"bytes": b"picture 1", "path": "x.png"}], image)},
    "bytes_as_text": {"text": plain["text"].cast(pa.binary())},
    "number_as_text": {"text": pa.array([1, 2])},
    "map_as_captions": {"captions": pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string()))},
    "two_pictures": {"mask": plain["image"]},
}.items():
    table = pa.table(plain | changed)
    pq.write_table(table, out / f"types/{name}.parquet")
    arrow(f"types/{name}.arrow", table)
