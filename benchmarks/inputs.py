"""Small good files of every kind that the project reads, written here: what benchmarks/fuzz.py damages.

All slides show `picture`; MRXS and VMS are whole, as OpenSlide reads them. A DICOM slide cannot be written here.
"""

import io
import json
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch
from PIL import Image

from sparsewsi import Bag, save_bag

REGION = {"type": "Polygon", "coordinates": [[[0, 0], [900, 0], [900, 900], [0, 900], [0, 0]]]}
ROWS = [
    {"slide": "s", "question": "Which tissue?", "options": ["liver", "skin"], "answer": "skin", "category": "tissue"}
]
TABLE = (
    "Slide,Question,A,B,C,D,Answer,Broad Category\ns1,Which?,liver,skin,lung,bone,B,Organ\ns2,Which?,a,b,c,d,A,Organ\n"
)
APERIO = "Aperio Image Library v11.2.1\r\n768x768 [0,0 768x768] (128x128) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"


def make_inputs(folder: Path, dicom: Path | None = None) -> dict[str, tuple[str, bytes | dict[str, bytes]]]:
    """kind -> (name of the file, its content, or its parts by their names in a zip).

    folder: for scratch; dicom: the folder of a DICOM slide
    """
    made: dict[str, tuple[str, bytes | dict[str, bytes]]] = {
        "svs": ("slide.svs", make_tiff("jpeg", APERIO)),
        "tiff": ("slide.tiff", make_tiff("zlib")),
        "bigtiff": ("slide.tif", make_tiff("jpeg", bigtiff=True)),
        "png": ("slide.png", make_image(picture(300), "PNG")),
        "jpeg": ("slide.jpg", make_image(picture(300), "JPEG")),
        "mrxs": ("slide.zip", make_mrxs()),
        "vms": ("slide.zip", make_vms()),
        "h5": ("bag.h5", make_features(folder, "h5")),
        "npy": ("bag.npy", make_features(folder, "npy")),
        "safetensors": ("bag.safetensors", make_features(folder, "safetensors")),
        "geojson": ("regions.geojson", json.dumps({"type": "Feature", "geometry": REGION}).encode()),
        "csv": ("questions.csv", TABLE.encode()),
        "json": ("questions.json", json.dumps(ROWS).encode()),
    }
    if dicom is not None:
        made["dicom"] = ("slide.zip", {file.name: file.read_bytes() for file in sorted(dicom.iterdir())})
    return made


def picture(side: int) -> np.ndarray:
    """Noise in the colours of tissue on white: uint8 (side, side, 3)."""
    pixels = np.full((side, side, 3), 240, np.uint8)
    middle = slice(side // 4, 3 * side // 4)
    grain = np.random.default_rng(0).integers(0, 60, (*pixels[middle, middle].shape[:2], 1), np.uint8)
    pixels[middle, middle] = np.array([170, 90, 150], np.uint8) + grain
    return pixels


def make_tiff(compression: str, description: str | None = None, bigtiff: bool = False) -> bytes:
    """Two levels of 128 px tiles."""
    out, pixels = io.BytesIO(), picture(768)
    with tifffile.TiffWriter(out, bigtiff=bigtiff) as file:
        for i, step in enumerate((1, 4)):
            file.write(
                pixels[::step, ::step],
                photometric="rgb",
                tile=(128, 128),
                compression=compression,
                description=description,
                metadata=None,
                subfiletype=1 if i else 0,
                resolution=(20_000 / step, 20_000 / step),
                resolutionunit="CENTIMETER",
            )
    return out.getvalue()


def make_image(pixels: np.ndarray, kind: str, **how) -> bytes:
    """Pixels (h, w, 3) as Pillow writes them."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


def pack(files: dict[str, bytes]) -> bytes:
    """A zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def make_mrxs(facts: str = "") -> dict[str, bytes]:
    """An MRXS slide of 512 px, two levels, one picture of 128 px a position. facts: more lines of [GENERAL]."""
    side, across, levels = 128, 4, [picture(512), np.asarray(Image.fromarray(picture(512)).reduce(2))]
    text = "[GENERAL]\nSLIDE_VERSION = 01.02\nSLIDE_ID = 1F\nOBJECTIVE_MAGNIFICATION = 20\n"
    text += f"IMAGENUMBER_X = {across}\nIMAGENUMBER_Y = {across}\nCameraImageDivisionsPerSide = 1\n{facts}"
    text += "[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\nINDEXFILE = Index.dat\n"
    text += f"HIER_0_NAME = Slide zoom level\nHIER_0_COUNT = {len(levels)}\n"
    text += "".join(f"HIER_0_VAL_{level}_SECTION = LEVEL_{level}\n" for level in range(len(levels)))
    text += "[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    data, at = b"", 7 + 8 + 4 * len(levels)  # behind version and id: pointers to the list of levels and to no other
    pointers, pages = [], b""
    for level, pixels in enumerate(levels):
        text += f"[LEVEL_{level}]\nOVERLAP_X = 0\nOVERLAP_Y = 0\nIMAGE_FORMAT = JPEG\nIMAGE_CONCAT_FACTOR = {level}\n"
        text += f"MICROMETER_PER_PIXEL_X = {0.5 * 2**level}\nMICROMETER_PER_PIXEL_Y = {0.5 * 2**level}\n"
        text += f"IMAGE_FILL_COLOR_BGR = 16777215\nDIGITIZER_WIDTH = {side}\nDIGITIZER_HEIGHT = {side}\n"
        rows = []
        for y in range(0, len(pixels), side):
            for x in range(0, len(pixels), side):
                part = make_image(pixels[y : y + side, x : x + side], "JPEG", subsampling=0)
                rows.append(((y // side * across + x // side) << level, len(data), len(part), 0))
                data += part
        pointers.append(at)
        page = struct.pack("<4i", 0, at + 8, len(rows), 0) + b"".join(struct.pack("<4i", *row) for row in rows)
        pages, at = pages + page, at + len(page)
    index = b"01.021F" + struct.pack(f"<{2 + len(pointers)}i", 15, 0, *pointers) + pages
    return {
        "a.mrxs": make_image(picture(64), "JPEG"),
        "a/Slidedat.ini": b"\xef\xbb\xbf" + text.encode(),
        "a/Index.dat": index,
        "a/Data0000.dat": data,
    }


def make_vms(facts: str = "") -> dict[str, bytes]:
    """A VMS slide of 512 px: JPEGs whose restart markers cut them into tiles. facts: more lines of its text."""
    text = "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=a.jpg\n"
    text += "MapFile=map.jpg\nOptimisationFile=a.opt\nMacroImage=macro.jpg\nSourceLens=20\n"
    text += f"PhysicalWidth=256000\nPhysicalHeight=256000\n{facts}"
    small = np.asarray(Image.fromarray(picture(512)).reduce(8))
    return {
        "a.vms": text.encode(),
        "a.jpg": make_image(picture(512), "JPEG", subsampling=0, restart_marker_blocks=16),
        "map.jpg": make_image(small, "JPEG", subsampling=0, restart_marker_blocks=8),
        "macro.jpg": make_image(picture(64), "JPEG"),
    }


def make_features(folder: Path, kind: str) -> bytes:
    """A file of 40 patches with 16 features each, in the layout of others or ours."""
    path = folder / f"made.{kind}"
    rows = np.random.default_rng(0).random((40, 16), dtype=np.float32)
    coords = np.stack([np.arange(40) % 8 * 224, np.arange(40) // 8 * 224], 1).astype(np.int32)
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = rows, coords
            file["coords"].attrs["patch_size_level0"] = 224
    elif kind == "npy":
        np.save(path, rows)
    else:
        save_bag(Bag(torch.from_numpy(rows), torch.from_numpy(coords), 224, 0.5, "x", "slide 1"), path)
    return path.read_bytes()
