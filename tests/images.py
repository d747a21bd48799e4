"""Stand-ins for image data sets, ImageNet's schema and its oddities among them."""

import io
import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image

from hf_guidance.tasks import image_classification
from hf_guidance.tasks.image_decoding import PixelFormat

CLASSES = 1000
SMALL = PixelFormat(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def pixels(number, size=(40, 30), channels=3):
    """An image that no other number has: a smooth random field, its mean told by the number."""
    field = np.random.default_rng(number).normal(size=(4, 4, channels)).repeat(size[1] // 4 + 1, 0)[: size[1]]
    field = field.repeat(size[0] // 4 + 1, 1)[:, : size[0]]
    return (40 * field + 128).clip(0, 255).astype(np.uint8)


def encode(array, mode="RGB", kind="JPEG"):
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array, mode=None)
    image.convert(mode).save(buffer, kind)
    return buffer.getvalue()


def imagenet_rows(count, first=0, odd=True):
    """Rows of ILSVRC/imagenet-1k: JPEGs of many sizes; some grey, one CMYK."""
    rows = []
    for number in range(first, first + count):
        size = (40 + 7 * (number % 5), 30 + 11 * (number % 4))
        mode = "L" if odd and number % 6 == 5 else "CMYK" if odd and number == first + 3 else "RGB"
        name = f"n{number:08d}.JPEG"
        rows.append({"image": {"bytes": encode(pixels(number, size), mode), "path": name}, "label": number % CLASSES})
    return rows


def truncate(row):
    """The row with the second half of its file missing."""
    content = row["image"]["bytes"]
    return {**row, "image": {**row["image"], "bytes": content[: len(content) // 2]}}


def parquet(rows):
    """Bytes of a parquet file with ImageNet's schema."""
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {i}" for i in range(CLASSES)])})
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": struct, "label": pa.int64()})
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features.to_dict()}})})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


def imagenet_files(train=48, shards=4, evaluation=12, odd=True):
    """Path → bytes of a small ImageNet: train in shards, validation with and test without labels."""
    rows = imagenet_rows(train, odd=odd)
    files = {
        f"data/train-{i:05d}-of-{shards:05d}.parquet": parquet(rows[i * train // shards : (i + 1) * train // shards])
        for i in range(shards)
    }
    files["data/validation-00000-of-00001.parquet"] = parquet(imagenet_rows(evaluation, 500, odd))
    unlabelled = [{**row, "label": -1} for row in imagenet_rows(4, 900, odd)]
    return files | {"data/test-00000-of-00001.parquet": parquet(unlabelled)}


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


def load(folder, **options):
    """The task of a folder's images in a small size."""
    return image_classification(folder, **{"target": SMALL, **options})
