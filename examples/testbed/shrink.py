"""Shrink the portraits from 128 to 64 pixels, the size of the testbed, into one parquet file.

python examples/testbed/shrink.py ../shared/testbed examples/testbed/portraits64.parquet
"""

import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 64
QUALITY = 90  # of WebP; 18 MB in total


def shrink(webp: bytes) -> bytes:
    """Shrink an encoded image to 64 pixels, as WebP."""
    image = (
        Image.open(io.BytesIO(webp)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    )
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def main(source: Path, target: Path) -> None:
    """Shrink all images and halve their face boxes; all labels stay."""
    table = pq.read_table(sorted(source.glob("portraits-*.parquet")))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["image"] = [shrink(webp) for webp in columns["image"]]
    for face in ("face1", "face2"):
        columns[face] = [box and [x / 2 for x in box] for box in columns[face]]
    pq.write_table(pa.table(columns, schema=table.schema), target, compression="zstd")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
