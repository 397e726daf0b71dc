"""Portraits of 128 px -> one parquet of 64 px, the size the testbed learns from.

python examples/testbed/shrink.py ../shared/testbed examples/testbed/portraits64.parquet
"""

import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 64
QUALITY = 90  # WebP; 18 MB in all


def shrink(webp: bytes) -> bytes:
    """One encoded picture at 64 px, WebP again."""
    picture = (
        Image.open(io.BytesIO(webp)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    )
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def main(source: Path, target: Path) -> None:
    """Every label is kept; face boxes are halved with the picture."""
    table = pq.read_table(sorted(source.glob("portraits-*.parquet")))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["image"] = [shrink(webp) for webp in columns["image"]]
    for face in ("face1", "face2"):
        columns[face] = [box and [x / 2 for x in box] for box in columns[face]]
    pq.write_table(pa.table(columns, schema=table.schema), target, compression="zstd")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
