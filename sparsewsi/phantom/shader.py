"""Pixels of a phantom slide: what tissue of each kind looks like, as functions of position alone.

Every value is a function of (position, salt) through integer hashes: no state, no generator, so any rectangle gives the
same pixels however a slide is cut. Positions are in native px of 0.5 um ("world" frame); three fields are painted,
the optical densities of haematoxylin, eosin and red cells, and Beer-Lambert turns them into colour.

Compiled by numba (cached on disk); no fastmath, so that a pixel's value does not depend on its place in a vector.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

GLASS, STROMA, MUSCLE, ADIPOSE, MUCOSA, CARCINOMA, LYMPHOID, MUCIN, NECROSIS, BLOOD = range(10)
CELL = 32  # world px per cell of the region map
REACH = 26  # world px: the largest distance from a nucleus's centre to its outline
LUT_SIZE, LUT_MAX = 8192, 4.0  # transmission table over optical density
WHOLE = 0xFFFFFFFF
# Odd 63-bit constants of the position hash: products wrap, so that every input bit reaches the upper half.
STEP_X, STEP_Y, STEP_SALT, STEP_MIX = 0x1E3779B97F4A7C15, 0x42B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x3F58476D1CE4E5B9
MIXED = 255  # mark in the `pure` map: cells near a border

# Cell types: mean and sd of the half axis a (px), ratio b/a, irregularity of the outline, how empty (vesicular) the
# nucleus is, haematoxylin density, its sd, nucleolus (0 or 1), orientation (0 free, 1 along the fibres).
FIBROBLAST, CIGAR, LYMPHOCYTE, PLASMA, TUMOUR, PYKNOTIC, DEBRIS, BLAST, FAT_NUCLEUS = range(9)
CELL_TYPES = np.array(
    [
        [7.6, 2.6, 0.27, 0.34, 0.10, 1.00, 0.35, 0.0, 1.0],
        [9.0, 2.6, 0.26, 0.26, 0.22, 0.72, 0.25, 0.0, 1.0],
        [5.2, 0.6, 0.92, 0.20, 0.12, 1.40, 0.28, 0.0, 0.0],
        [5.7, 0.9, 0.74, 0.20, 0.35, 1.10, 0.28, 0.0, 0.0],
        [9.6, 2.8, 0.72, 0.30, 0.55, 1.00, 0.34, 1.0, 0.0],
        [5.2, 1.6, 0.72, 0.55, 0.00, 1.80, 0.25, 0.0, 0.0],
        [1.9, 0.9, 0.75, 0.50, 0.00, 1.05, 0.40, 0.0, 0.0],
        [7.4, 1.0, 0.82, 0.22, 0.60, 0.88, 0.22, 1.0, 0.0],
        [6.0, 1.3, 0.34, 0.30, 0.00, 1.15, 0.25, 0.0, 1.0],
    ],
    dtype=np.float64,
)
# Per kind: spacing of the nuclei's grid in px, probability of a nucleus in a grid cell, least distance (in spacings).
NUCLEI = np.array(
    [
        [0.0, 0.0, 0.0],  # glass
        [21.0, 0.24, 0.6],  # stroma
        [21.0, 0.40, 0.6],  # smooth muscle
        [20.0, 0.45, 0.8],  # adipose: only in walls
        [11.6, 0.62, 0.8],  # colon mucosa: the lamina propria; epithelium has its own
        [13.8, 0.97, 0.93],  # carcinoma
        [9.4, 0.97, 0.92],  # lymphoid
        [26.0, 0.11, 0.6],  # mucin
        [11.0, 0.20, 0.5],  # necrosis
        [30.0, 0.05, 0.6],  # blood
    ],
    dtype=np.float64,
)


# ------------------------------------------------------------------------------------------- hashes and noise


def _compile(function: Callable) -> Any:
    """Machine code, kept on disk where there is a place for it: a container may have none."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compile
def stir(base):
    """32 well mixed bits of a linear combination of integers with STEP_X, STEP_Y and STEP_SALT (int64, wrapping)."""
    h = (base ^ (base >> 29)) * STEP_MIX
    return ((h ^ (h >> 31)) >> 24) & WHOLE


@_compile
def mix(ix, iy, salt):
    """32 well mixed bits of two integers and a salt."""
    return stir(ix * STEP_X + iy * STEP_Y + salt * STEP_SALT)


@_compile
def unit(ix, iy, salt):
    """A number in [0, 1) of two integers and a salt."""
    return mix(ix, iy, salt) * (1.0 / 4294967296.0)


@_compile
def noise(x, y, salt):
    """Gradient noise (Perlin's) in [0, 1], mean 0.5, sd 0.2; waves are about two units of x and y long."""
    x, y = 0.8 * x, 0.8 * y
    fx, fy = math.floor(x), math.floor(y)
    u, v = x - fx, y - fy
    s = u * u * u * (u * (u * 6.0 - 15.0) + 10.0)
    t = v * v * v * (v * (v * 6.0 - 15.0) + 10.0)
    base = fx * STEP_X + fy * STEP_Y + salt * STEP_SALT
    a, b = _slope(base, u, v), _slope(base + STEP_X, u - 1.0, v)
    c, d = _slope(base + STEP_Y, u, v - 1.0), _slope(base + STEP_X + STEP_Y, u - 1.0, v - 1.0)
    return min(1.0, max(0.0, 0.5 + 1.22 * (a + (b - a) * s + (c - a) * t + (a - b - c + d) * s * t)))


@_compile
def _slope(base, u, v):
    h = stir(base)
    return ((h & 0xFFFF) / 32768.0 - 1.0) * u + ((h >> 16) / 32768.0 - 1.0) * v


@_compile
def fbm(x, y, salt):
    """Three octaves of noise in [0, 1], turned against each other so that no lattice shows."""
    return (
        0.57 * noise(x, y, salt)
        + 0.29 * noise(1.62 * x - 1.22 * y, 1.22 * x + 1.62 * y, salt + 1)
        + 0.14 * noise(1.3 * x + 3.9 * y, 1.3 * y - 3.9 * x, salt + 2)
    )


@_compile
def ramp(x, low, high):
    """Smooth step: 0 below low, 1 above high."""
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3.0 - 2.0 * t)


@_compile
def voronoi(x, y, spacing, jitter, salt):
    """The nearest and second nearest of the points of a jittered grid.

    Returns (distance to the nearest, distance to the border between the two, x and y of the nearest minus the
    position, hash of the nearest); distances in the unit of x.
    """
    ix, iy = math.floor(x / spacing), math.floor(y / spacing)
    best = second = 1e18
    bx = by = sx = sy = 0.0
    key = 0
    for j in range(iy - 1, iy + 2):
        for i in range(ix - 1, ix + 2):
            h = mix(i, j, salt)
            px = (i + 0.5 + jitter * ((h & 0xFFFF) / 65536.0 - 0.5)) * spacing - x
            py = (j + 0.5 + jitter * ((h >> 16) / 65536.0 - 0.5)) * spacing - y
            d = px * px + py * py
            if d < best:
                second, sx, sy = best, bx, by
                best, bx, by, key = d, px, py, h
            elif d < second:
                second, sx, sy = d, px, py
    apart = math.sqrt((sx - bx) ** 2 + (sy - by) ** 2) + 1e-9
    return math.sqrt(best), 0.5 * (second - best) / apart, bx, by, key


# ------------------------------------------------------------------------------------------------- region map


@_compile
def kind_at(x, y, labels, pure, salt):
    """The tissue at a position relative to the map's corner, by vote of the four nearest cells, with a wobbly border.

    Returns (kind, kind on the other side of the nearest border, lead of the vote in [0, 1]); away from borders the two
    kinds are the same and the lead is 1, a lead of 0.1 is about 1.6 px from the border.
    """
    rows, columns = labels.shape
    ix, iy = math.floor(x / CELL), math.floor(y / CELL)
    if ix < 0 or iy < 0 or ix >= columns or iy >= rows:
        return GLASS, GLASS, 1.0
    if pure[iy, ix] != MIXED:
        return int(pure[iy, ix]), int(pure[iy, ix]), 1.0
    wx = x + 24.0 * (noise(x / 41.0, y / 41.0, salt + 901) - 0.5) + 12.0 * (noise(x / 11.0, y / 11.0, salt + 902) - 0.5)
    wy = y + 24.0 * (noise(x / 41.0, y / 41.0, salt + 903) - 0.5) + 12.0 * (noise(x / 11.0, y / 11.0, salt + 904) - 0.5)
    fx, fy = wx / CELL - 0.5, wy / CELL - 0.5
    ix, iy = math.floor(fx), math.floor(fy)
    u, v = fx - ix, fy - iy
    best, second = -1.0, 0.0
    winner = loser = GLASS
    for corner in range(4):
        kind = _cell(labels, iy + (corner >> 1), ix + (corner & 1))
        if kind == winner and best >= 0.0:
            continue
        votes = 0.0
        for other in range(4):
            c, d = other & 1, other >> 1
            if _cell(labels, iy + d, ix + c) == kind:
                votes += (u if c else 1.0 - u) * (v if d else 1.0 - v)
        if votes > best + 1e-12:
            best, winner, second, loser = votes, kind, max(0.0, best), winner
        elif votes > second:
            second, loser = votes, kind
    if second <= 0.0:
        return winner, winner, 1.0
    return winner, loser, best - second


@_compile
def _cell(labels, iy, ix):
    if iy < 0 or ix < 0 or iy >= labels.shape[0] or ix >= labels.shape[1]:
        return GLASS
    return int(labels[iy, ix])


@_compile
def kinds_at(xs, ys, labels, pure, salt):
    """Kind ids of many positions, uint8 (n,)."""
    out = np.empty(len(xs), np.uint8)
    for i in range(len(xs)):
        out[i] = kind_at(xs[i], ys[i], labels, pure, salt)[0]
    return out


# --------------------------------------------------------------------------------------------------- tissues
# Each returns (haematoxylin, eosin, red cells, room): densities without free nuclei, and whether one may lie here.


@_compile
def fibre_coordinates(x, y, angle, bend, salt):
    """Coordinates across and along the fibres, in px; bend 0 is straight."""
    s, c = math.sin(angle), math.cos(angle)
    across = x * s + y * c
    along = x * c - y * s
    across += bend * (
        520.0 * (noise(x / 1150.0, y / 1150.0, salt + 3) - 0.5)
        + 150.0 * (noise(x / 260.0, y / 260.0, salt) - 0.5)
        + 38.0 * (noise(x / 84.0, y / 84.0, salt + 1) - 0.5)
        + 9.0 * (noise(x / 26.0, y / 26.0, salt + 2) - 0.5)
    )
    return across, along


@_compile
def stroma(x, y, angle, salt):
    """Collagen: wavy bundles of fibrils, with clefts between them, looser in places."""
    across, along = fibre_coordinates(x, y, angle, 1.0, salt + 10)
    across += 2.4 * noise(x / 6.0, y / 6.0, salt + 12)
    fibril = noise(across / 1.6, along / 17.0, salt + 14)
    fine = noise(across / 3.6, along / 31.0, salt + 15)
    wide = noise(across / 14.0, along / 95.0, salt + 16)
    loose = noise(x / 330.0, y / 330.0, salt + 17)
    crimp = noise(across / 9.0, along / 11.0, salt + 18)
    cleft = ramp(0.5 * wide + 0.38 * fine + 0.12 * crimp + 0.42 * (loose - 0.5), 0.64, 0.74)
    hair = ramp(noise(across / 2.6, along / 21.0, salt + 19), 0.76, 0.9) * ramp(loose, 0.35, 0.7)
    pale = max((0.62 + 0.34 * loose) * cleft, 0.6 * hair)
    e = (0.12 + 0.20 * fibril + 0.24 * fine + 0.20 * wide + 0.14 * crimp) * (1.0 - pale)
    h = (0.03 + 0.10 * fine * loose) * (1.0 - 0.8 * pale)
    return h, e, 0.0, pale < 0.6


@_compile
def muscle(x, y, angle, salt):
    """Smooth muscle: long fine fibres in bundles, short clefts along them."""
    across, along = fibre_coordinates(x, y, angle, 0.42, salt + 20)
    fine = noise(across / 2.1, along / 60.0, salt + 24)
    mid = noise(across / 5.5, along / 90.0, salt + 25)
    bundle = noise(across / 48.0, along / 260.0, salt + 26)
    wave = noise(across / 11.0, along / 16.0, salt + 27)
    torn = 0.16 * noise(x / 600.0, y / 600.0, salt + 59)
    gap = ramp(0.8 * noise(across / 14.0, along / 180.0, salt + 28) + 0.2 * fine + torn, 0.86, 0.92)
    split = ramp(noise(across / 3.4, along / 24.0, salt + 29), 0.74, 0.86) * ramp(bundle, 0.42, 0.62)
    pale = max(0.90 * gap, 0.6 * split)
    e = (0.22 + 0.16 * fine + 0.16 * mid + 0.10 * bundle + 0.08 * wave) * (1.0 - pale)
    h = (0.07 + 0.08 * mid + 0.05 * fine + 0.05 * bundle) * (1.0 - pale)
    return h, e, 0.0, pale < 0.5


@_compile
def fat_cells(x, y, salt):
    """(distance to the centre, distance to the wall, hash) of the fat cell at a position; cells differ in size."""
    wx = (
        x + 190.0 * (noise(x / 260.0, y / 260.0, salt + 30) - 0.5) + 15.0 * (noise(x / 42.0, y / 42.0, salt + 36) - 0.5)
    )
    wy = (
        y + 190.0 * (noise(x / 260.0, y / 260.0, salt + 31) - 0.5) + 15.0 * (noise(x / 42.0, y / 42.0, salt + 37) - 0.5)
    )
    centre, border, _, _, key = voronoi(wx, wy, 108.0, 0.95, salt + 32)
    return centre, border, key


@_compile
def adipose(x, y, angle, salt):
    """Fat: empty cells in thin walls, now and then a fibrous septum."""
    septum = abs(noise(x / 620.0, y / 620.0, salt + 38) - 0.5)
    width = 0.022 * noise(x / 150.0, y / 150.0, salt + 39) * ramp(noise(x / 480.0, y / 480.0, salt + 54), 0.42, 0.60)
    if septum < width * (0.6 + 0.8 * noise(x / 14.0, y / 14.0, salt + 29)):
        h, e, red, room = stroma(x, y, angle, salt)
        return h, e, red, room
    centre, border, key = fat_cells(x, y, salt)
    sag = noise(x / 37.0, y / 37.0, salt + 33)
    thick = 0.25 + 2.4 * max(0.0, sag - 0.42)
    wall = 1.0 - ramp(border, thick, thick + 1.3)
    # A wall cut obliquely shows as a pale band beside the line.
    reach = 11.0 * sag
    oblique = ramp(noise(x / 80.0, y / 80.0, salt + 34), 0.52, 0.6)
    band = (1.0 - ramp(border, reach, reach + 1.2)) * oblique
    rim = max(0.0, 1.0 - abs(border - reach) / 1.2) * oblique
    corner = 1.0 - ramp(border + 0.3 * max(0.0, 76.0 - centre), 2.0, 6.0)
    uneven = noise(x / 6.0, y / 6.0, salt + 35)
    film = 0.02 * ramp(noise(x / 100.0, y / 100.0, (key & 0xFF) + salt), 0.5, 0.8)
    e = 0.010 + film + 0.34 * wall * (0.45 + 0.9 * uneven) + 0.07 * band + 0.10 * rim + 0.16 * corner * uneven
    return 0.006 + 0.13 * wall * uneven + 0.02 * band + 0.05 * corner, e, 0.0, border < 2.2


@_compile
def chromatin(x, y, salt):
    """Mottling of a nucleus, about 1 on average."""
    return 0.72 + 0.56 * noise(x / 2.1, y / 2.1, salt)


@_compile
def mucosa(x, y, angle, salt):
    """Crypts (capsules of columnar epithelium with goblet cells around a lumen) in a cellular lamina propria."""
    wx = x + 70.0 * (noise(x / 170.0, y / 170.0, salt + 40) - 0.5) + 9.0 * (noise(x / 26.0, y / 26.0, salt + 51) - 0.5)
    wy = y + 70.0 * (noise(x / 170.0, y / 170.0, salt + 41) - 0.5) + 9.0 * (noise(x / 26.0, y / 26.0, salt + 52) - 0.5)
    tilt = noise(x / 1500.0, y / 1500.0, salt + 42)
    spacing = 146.0
    ix, iy = math.floor(wx / spacing), math.floor(wy / spacing)
    best = second = 1e18
    key = 0
    qx = qy = slide = 0.0
    ca, sa = math.cos(angle), math.sin(angle)
    for j in range(iy - 2, iy + 3):
        for i in range(ix - 2, ix + 3):
            k = mix(i, j, salt + 43)
            px = wx - (i + 0.5 + 0.5 * (j & 1) - 0.25 + 0.42 * ((k & 0xFFFF) / 65536.0 - 0.5)) * spacing
            py = wy - (j + 0.5 + 0.42 * ((k >> 16) / 65536.0 - 0.5)) * spacing
            length = 55.0 * ramp(tilt, 0.45, 0.8) * ((k >> 8 & 0xFF) / 255.0)
            t = min(length, max(-length, px * ca + py * sa))
            dx, dy = px - t * ca, py - t * sa
            d = dx * dx + dy * dy
            if d < best:
                second = best
                best, key, qx, qy, slide = d, k, dx, dy, t
            elif d < second:
                second = d
    d = math.sqrt(best)
    border = 0.5 * (math.sqrt(second) - d)
    radius = 52.0 + 22.0 * ((key >> 4 & 0xFF) / 255.0)
    room = border - 5.0  # the lamina propria keeps a few px between crypts
    depth = min(radius - d, room)  # px inwards from the basement membrane
    if depth < 0.0:
        uneven = noise(x / 40.0, y / 40.0, salt + 55)
        fibre = noise(x / 5.5 + 1.6 * noise(x / 14.0, y / 14.0, salt + 53), y / 5.5, salt + 44)
        web = max(0.0, 1.0 - 3.2 * abs(fibre - 0.5))
        open_ = ramp(noise(x / 15.0, y / 15.0, salt + 45), 0.50, 0.66)
        sheath = 1.0 - ramp(-depth, 1.0, 4.0)
        e = 0.07 + 0.27 * web * (1.0 - 0.6 * open_) + 0.10 * (1.0 - open_) + 0.16 * sheath
        h = 0.04 + 0.07 * web + 0.07 * (1.0 - open_)
        if (key >> 26 & 3) == 0:  # some crypts shrink away from their bed
            halo = (1.0 - ramp(-depth, 3.0, 5.0)) * ramp(uneven, 0.35, 0.5)
            h, e = h * (1.0 - 0.9 * halo), e * (1.0 - 0.9 * halo)
        red = 0.0
        vessel = noise(x / 21.0, y / 21.0, salt + 46)
        if vessel > 0.77 and -depth > 6.0:
            r_h, r_e, red = red_cells(x, y, salt + 47, 0.75)
            h, e = r_h, r_e
        return h, e, red, -depth > 3.5 and vessel <= 0.77
    reach = max(14.0, d + depth)  # px from the axis to the basement membrane here
    turn = math.atan2(qx * -sa + qy * ca, qx * ca + qy * sa)
    side = 1 if turn >= 0.0 else 0
    rim = 62.0
    s = -slide + rim * (turn - 1.5707963) if side else slide + rim * (turn + 1.5707963)
    lumen = 7.0 + 13.0 * ((key >> 12 & 0xFF) / 255.0)
    tone = 0.85 + 0.3 * ((key >> 20 & 0xFF) / 255.0)
    # Basal nuclei: one per 8.6 px of the circumference, in a slightly uneven row.
    pitch = 8.6
    cell = math.floor(s / pitch)
    n = mix(int(cell), side, key)
    along = (s - (cell + 0.5) * pitch) * (d / rim) + 1.2 * ((n & 0xFF) / 255.0 - 0.5)
    row = 7.5 + 8.5 * ((n >> 8 & 0xFF) / 255.0)
    a, b = 3.3 + 0.9 * ((n >> 4 & 0xFF) / 255.0), 5.0 + 2.4 * ((n >> 16 & 0xFF) / 255.0)
    inside = (along / a) ** 2 + ((depth - row) / b) ** 2
    soft = 1.0 - ramp(inside, 0.75, 1.25)
    granular = noise(x / 2.7, y / 2.7, salt + 48)
    basal = 1.0 - ramp(depth, 15.0, 24.0)
    h = (0.20 + 0.20 * basal + 0.10 * granular) * tone
    e = 0.30 + 0.16 * granular
    # Goblets: wedges towards the lumen, most of them full of pale mucus.
    wide = 16.5 + 6.0 * ((key >> 16 & 0xFF) / 255.0)
    wedge = math.floor(s / wide + 0.35)
    g = mix(int(wedge), side + 2, key)
    if d > lumen:
        across = abs(s / wide + 0.35 - wedge - 0.5) * 2.0  # 0 in the middle, 1 between two cells
        up = (d - lumen) / max(8.0, reach - lumen)  # 0 at the lumen, 1 at the basement membrane
        middle = 0.46 + 0.26 * ((g >> 8 & 0xFF) / 255.0 - 0.5)
        height = 0.19 + 0.17 * ((g >> 16 & 0xFF) / 255.0)
        if (g & 0xFF) < 205:
            # Goblets are rounded, not wedges: their width is that of the wedge at their middle.
            belly = (0.92 - 0.2 * ((g >> 20 & 0xFF) / 255.0)) * (lumen + middle * (reach - lumen))
            full = (across * d / belly) ** 2 + abs((up - middle) / height) ** 2.4
            full = (1.0 - ramp(full, 0.75, 1.08)) * (1.0 - ramp(across, 0.86, 0.98))
            cloud = noise(x / 4.0, y / 4.0, salt + 49)
            mucus = (key >> 2 & 0xFF) / 255.0
            h += full * (0.03 + (0.05 + 0.10 * mucus) * (0.5 + cloud) - h)
            e += full * (0.02 + 0.06 * mucus + 0.05 * cloud - e)
    else:
        full = 1.0 - ramp(d, lumen - 2.5, lumen)
        h += full * (0.02 - h)
        e += full * (0.015 - e)
        soft = 0.0
    if soft > 0.0:
        dark = (0.95 + 0.45 * ((n >> 20 & 0xFF) / 255.0)) * chromatin(x, y, salt + 50) * tone
        h += soft * (dark - h)
        e += soft * (0.18 - e)
    edge = 1.0 - ramp(depth, 0.0, 1.5)
    e += 0.12 * edge
    return h, e, 0.0, False


@_compile
def nest(x, y, salt):
    """Where tumour grows: below 0 stroma between the nests, above 1 the lumen of a malignant gland."""
    field = 0.60 * noise(x / 95.0, y / 95.0, salt + 60) + 0.29 * noise(x / 38.0, y / 38.0, salt + 61)
    field += 0.11 * noise(x / 13.0, y / 13.0, salt + 62)
    return (field - 0.365) / 0.30


@_compile
def carcinoma(x, y, angle, salt):
    field = nest(x, y, salt)
    if field < 0.0:
        h, e, red, room = stroma(x, y, angle, salt + 63)
        return h + 0.08, 0.9 * e, red, room
    granular = 0.6 * noise(x / 1.9, y / 1.9, salt + 64) + 0.4 * noise(x / 4.5, y / 4.5, salt + 69)
    patchy = noise(x / 34.0, y / 34.0, salt + 65)
    _, border, _, _, key = voronoi(x + 6.0 * granular, y + 6.0 * patchy, 20.0, 0.95, salt + 66)
    membrane = 1.0 - ramp(border, 0.4, 1.8)
    own = (key >> 7 & 0xFF) / 255.0
    h = 0.16 + 0.22 * granular + 0.22 * (patchy - 0.5) + 0.10 * own
    e = 0.26 + 0.22 * granular + 0.22 * (patchy - 0.5) + 0.10 * membrane - 0.10 * own
    edge = 1.0 - ramp(field, 0.0, 0.05)  # retraction from the stroma
    gap = max(0.8 * edge * ramp(noise(x / 60.0, y / 60.0, salt + 67), 0.52, 0.6), ramp(field, 1.0, 1.03))
    split = ramp(noise(x / 9.0, y / 9.0, salt + 57), 0.80, 0.88) * (1.0 - ramp(border, 1.5, 5.0))
    gap = max(gap, 0.85 * split)
    if gap > 0.0:
        clump = 0.55 * noise(x / 16.0, y / 16.0, salt + 68) + 0.45 * noise(x / 3.4, y / 3.4, salt + 58)
        debris = ramp(clump, 0.56, 0.68) * ramp(field, 1.0, 1.1)
        h += gap * (0.02 + 0.40 * debris - h)
        e += gap * (0.02 + 0.42 * debris - e)
    return max(0.0, h), max(0.0, e), 0.0, gap < 0.3


@_compile
def germinal(x, y, salt):
    """Depth inside a germinal centre: above 0.5 inside."""
    return ramp(noise(x / 330.0, y / 330.0, salt + 70), 0.60, 0.70)


@_compile
def lymphoid(x, y, salt):
    """What shows between lymphocytes: scant cytoplasm, reticulum, pale gaps."""
    granular = noise(x / 2.2, y / 2.2, salt + 71)
    fibre = noise(x / 9.0 + 1.2 * granular, y / 9.0, salt + 72)
    web = max(0.0, 1.0 - 4.0 * abs(fibre - 0.5))
    gaps = ramp(noise(x / 7.5, y / 7.5, salt + 74), 0.44, 0.62)
    sinus = ramp(0.75 * noise(x / 46.0, y / 46.0, salt + 73) + 0.25 * noise(x / 12.0, y / 12.0, salt + 75), 0.74, 0.79)
    inside = germinal(x, y, salt)
    pale = max(0.85 * sinus, 0.75 * gaps * (1.0 - 0.7 * inside))
    h = (0.12 + 0.16 * granular) * (1.0 - pale)
    e = (0.10 + 0.14 * granular) * (1.0 - pale) + 0.15 * web * (1.0 - 0.8 * sinus)
    return h, e, 0.0, sinus < 0.5


@_compile
def mucin(x, y, angle, salt):
    """Pools of pale mucus with strands and froth, divided by thin septa."""
    wx = (
        x + 110.0 * (noise(x / 130.0, y / 130.0, salt + 80) - 0.5) + 22.0 * (noise(x / 30.0, y / 30.0, salt + 95) - 0.5)
    )
    wy = (
        y + 110.0 * (noise(x / 130.0, y / 130.0, salt + 81) - 0.5) + 22.0 * (noise(x / 30.0, y / 30.0, salt + 96) - 0.5)
    )
    _, border, _, _, key = voronoi(wx, wy, 330.0, 0.95, salt + 82)
    across, along = fibre_coordinates(x, y, angle + 0.02 * (key & 0xFF), 1.3, salt + 85)
    fine = noise(x / 2.1, y / 2.1, salt + 94)
    strand = 1.0 - abs(2.0 * noise(across / 15.0 + 0.5 * fine, along / 75.0, salt + 89) - 1.0)
    thread = 1.0 - abs(2.0 * noise(across / 5.5, along / 38.0, salt + 90) - 1.0)
    cloud = fbm(x / 52.0, y / 52.0, salt + 91)
    _, wall, _, _, _ = voronoi(x + 9.0 * (cloud - 0.5), y + 9.0 * (fine - 0.5), 19.0, 0.95, salt + 97)
    froth = (1.0 - ramp(wall, 0.3, 2.2)) * ramp(noise(x / 120.0, y / 120.0, salt + 98), 0.50, 0.66)
    strand, thread = strand**7, thread**6
    h = 0.045 + 0.10 * cloud + 0.17 * strand * cloud + 0.10 * thread * cloud + 0.08 * froth + 0.05 * (fine - 0.3)
    e = 0.012 + 0.06 * strand + 0.04 * cloud + 0.05 * froth
    thick = 1.5 + 26.0 * max(0.0, noise(x / 115.0, y / 115.0, salt + 83) - 0.42)
    if (key & 3) != 0 and border < thick + 3.0:
        # The fibrils of a septum run along it.
        fibril = noise(border / 1.8, (wx + wy) / 34.0, salt + 84)
        ragged = noise(x / 5.0, y / 5.0, salt + 99)
        solid = 1.0 - ramp(border, thick * (0.4 + 0.6 * ragged), thick * (0.4 + 0.6 * ragged) + 2.0)
        h += solid * (0.10 + 0.12 * ragged - h)
        e += solid * (0.22 + 0.26 * fibril + 0.14 * ragged - e)
    return max(0.0, h), max(0.0, e), 0.0, True


@_compile
def necrosis(x, y, salt):
    """Coagulated debris: granular, without living nuclei, torn by small cracks."""
    coarse = fbm(x / 46.0, y / 46.0, salt + 100)
    grain = noise(x / 1.9, y / 1.9, salt + 103)
    clump = noise(x / 5.2, y / 5.2, salt + 104)
    wx, wy = x + 8.0 * (clump - 0.5), y + 8.0 * (grain - 0.5)
    _, border, _, _, key = voronoi(wx, wy, 13.0, 0.95, salt + 105)
    ghost = 1.0 - ramp(border, 0.2, 2.0)  # what is left of cell borders
    own = (key & 0xFF) / 255.0
    crack = ramp(
        0.40 * clump + 0.35 * noise(x / 9.0, y / 9.0, salt + 106) + 0.25 * grain + 0.5 * (coarse - 0.5), 0.60, 0.72
    )
    pale = max(0.85 * crack, 0.45 * ghost * (0.4 + clump))
    h = (0.08 + 0.18 * grain + 0.34 * (coarse - 0.36) + 0.10 * own) * (1.0 - pale)
    e = (0.26 + 0.28 * grain + 0.22 * (clump - 0.4) + 0.12 * own) * (1.0 - pale)
    return max(0.0, h), max(0.0, e), 0.0, crack < 0.6


@_compile
def red_cells(x, y, salt, crowding):
    """Packed erythrocytes, two layers of them: (haematoxylin, eosin, red cells)."""
    wx = x + 3.0 * (noise(x / 8.0, y / 8.0, salt + 3) - 0.5)
    red = 0.0
    for layer in range(2):
        centre, border, _, _, key = voronoi(wx, y, 10.6, 0.9, salt + layer)
        if (key >> 9 & 0xFF) / 255.0 > (crowding if layer == 0 else 0.32 * crowding):
            continue
        radius = 4.9 + 1.3 * ((key >> 17 & 0xFF) / 255.0)
        disc = (1.0 - ramp(centre, radius - 0.8, radius + 0.8)) * ramp(border, -0.2, 0.8)
        dent = (1.0 - ramp(centre, 0.6, 3.4)) * ((key >> 5 & 0xFF) / 255.0)
        red = max(red, disc * (0.74 + 0.34 * ((key & 0xFF) / 255.0) - 0.34 * dent)) + 0.2 * layer * disc
    return 0.01, 0.05, red


@_compile
def blood(x, y, salt):
    """Extravasated blood: red cells, islands of plasma, shrinkage cracks."""
    plasma = ramp(noise(x / 75.0, y / 75.0, salt + 110) * 0.7 + 0.3 * noise(x / 22.0, y / 22.0, salt + 111), 0.66, 0.70)
    ridge = abs(fbm(x / 60.0, y / 60.0, salt + 112) - 0.5)
    crack = (1.0 - ramp(ridge, 0.006, 0.03)) * ramp(noise(x / 90.0, y / 90.0, salt + 116), 0.54, 0.68)
    h, e, red = red_cells(x, y, salt + 120, 0.99 - 0.8 * plasma)
    fine = noise(x / 2.0, y / 2.0, salt + 117)
    serum = ramp(noise(x / 130.0, y / 130.0, salt + 118), 0.40, 0.60)
    e = 0.03 + 0.16 * serum + (0.12 + 0.08 * fine) * plasma
    keep = 1.0 - 0.93 * crack * (1.0 - plasma)
    return h, e * keep, red * keep, True


@_compile
def tissue(kind, x, y, angle, salt):
    """Densities of a kind at a position, without free nuclei and vessels."""
    if kind == STROMA:
        return stroma(x, y, angle, salt)
    if kind == MUSCLE:
        return muscle(x, y, angle + 0.9, salt)
    if kind == ADIPOSE:
        return adipose(x, y, angle, salt)
    if kind == MUCOSA:
        return mucosa(x, y, angle + 0.4, salt)
    if kind == CARCINOMA:
        return carcinoma(x, y, angle, salt)
    if kind == LYMPHOID:
        return lymphoid(x, y, salt)
    if kind == MUCIN:
        return mucin(x, y, angle, salt)
    if kind == NECROSIS:
        return necrosis(x, y, salt)
    if kind == BLOOD:
        return blood(x, y, salt)
    return 0.0, 0.0, 0.0, False


@_compile
def border(h, e, red, room, kind, beyond, lead, x, y, angle, salt):
    """Densities near a border: a dense edge towards glass, a thin fibrous rim between a focus and its surroundings."""
    uneven = noise(x / 9.0, y / 9.0, salt + 405)
    if beyond == GLASS:
        thick = (1.0 - ramp(lead, 0.05, 0.25)) * (0.5 + uneven)
        if kind in (ADIPOSE, MUCIN):
            return h + 0.04 * thick, e + 0.16 * thick, red, room
        return h + 0.10 * thick, e + 0.20 * thick, red, room
    if kind < CARCINOMA and beyond < CARCINOMA:
        return h, e, red, room
    width = 0.13 + 0.9 * max(0.0, noise(x / 75.0, y / 75.0, salt + 406) - 0.3) + 0.12 * (uneven - 0.5)
    if kind == LYMPHOID or beyond == LYMPHOID:
        width *= 0.4
    blend = 1.0 - ramp(lead, width, width + 0.08)
    if blend <= 0.0:
        return h, e, red, room
    h2, e2, _, free = stroma(x, y, angle, salt)
    return h + blend * (h2 + 0.06 - h), e + blend * (e2 - e), red * (1.0 - blend), free and blend > 0.5


# ------------------------------------------------------------------------------------------- nuclei and vessels


@_compile
def cell_type(kind, x, y, dice, salt):
    """Which cell lies at a candidate place of a kind; -1 for none."""
    if kind == STROMA:
        infiltrate = ramp(noise(x / 240.0, y / 240.0, salt + 407), 0.62, 0.74)
        return FIBROBLAST if dice < 0.90 - 0.7 * infiltrate else LYMPHOCYTE
    if kind == MUSCLE:
        return CIGAR if dice < 0.96 else LYMPHOCYTE
    if kind == ADIPOSE:
        return FAT_NUCLEUS
    if kind == MUCOSA:
        return LYMPHOCYTE if dice < 0.42 else PLASMA if dice < 0.82 else FIBROBLAST
    if kind == CARCINOMA:
        if nest(x, y, salt) < 0.0:
            return FIBROBLAST if dice < 0.40 else LYMPHOCYTE if dice < 0.55 else -1
        return TUMOUR if dice < 0.955 else PYKNOTIC
    if kind == LYMPHOID:
        if germinal(x, y, salt) > 0.5:
            return BLAST if dice < 0.5 else LYMPHOCYTE if dice < 0.68 else -1
        return LYMPHOCYTE if dice < 0.93 else PLASMA
    if kind == MUCIN:
        return LYMPHOCYTE if dice < 0.5 else TUMOUR if dice < 0.6 else DEBRIS
    if kind == NECROSIS:
        return DEBRIS if dice < 0.82 else PYKNOTIC if dice < 0.95 else BLAST
    return LYMPHOCYTE


@_compile
def paint_nucleus(h, e, x, y, x0, y0, scale, kind, turn, key, salt):
    """Lay one nucleus centred at x, y (world px) over the fields of a block whose corner is x0, y0 (px)."""
    row = CELL_TYPES[kind]
    spread = ((key & 0xFF) + (key >> 8 & 0xFF) + (key >> 16 & 0xFF)) / 382.5 - 1.0  # roughly normal, sd 0.58
    a = max(1.2, row[0] + 1.7 * row[1] * spread)
    b = max(1.0, a * min(1.0, row[2] * (0.82 + 0.36 * ((key >> 12 & 0xFF) / 255.0))))
    dark = row[5] + 1.7 * row[6] * ((key >> 3 & 0xFF) / 127.5 - 1.0) * 0.6
    ca, sa = math.cos(turn), math.sin(turn)
    ox, oy = (key & 0xFFF) * 0.37, (key >> 12 & 0xFFF) * 0.37  # each nucleus has its own outline and chromatin
    nx = 0.42 * a * ((key >> 5 & 0xFF) / 127.5 - 1.0)
    ny = 0.42 * b * ((key >> 21 & 0xFF) / 127.5 - 1.0)
    reach = 1.35 * a / scale + 2.0
    cx, cy = x / scale - x0, y / scale - y0
    top, bottom = max(0, int(cy - reach)), min(h.shape[0] - 1, int(cy + reach) + 1)
    left, right = max(0, int(cx - reach)), min(h.shape[1] - 1, int(cx + reach) + 1)
    for py in range(top, bottom + 1):
        for px in range(left, right + 1):
            dx, dy = (x0 + px + 0.5) * scale - x, (y0 + py + 0.5) * scale - y
            u, v = dx * ca + dy * sa, dy * ca - dx * sa
            r = math.sqrt((u / a) ** 2 + (v / b) ** 2)
            if r > 1.6:
                continue
            r += row[3] * 1.6 * (noise(dx / (0.75 * a) + ox, dy / (0.75 * a) + oy, salt + 120) - 0.5)
            soft = min(1.0, max(0.0, (1.0 - r) * b / 1.3 + 0.5))
            if soft <= 0.0:
                continue
            mottle = noise(dx / 1.8 + ox, dy / 1.8 + oy, salt + 121)
            hollow = row[4] * (1.0 - ramp(r, 0.45, 0.95)) * (0.6 + 0.8 * (1.0 - mottle))
            value = dark * (0.66 + 0.68 * mottle) * (1.0 - 0.62 * min(1.0, hollow))
            if row[7] > 0.0:
                spot = math.sqrt((u - nx) ** 2 + (v - ny) ** 2)
                value += 0.55 * (1.0 - ramp(spot, 0.9, 2.3))
            h[py, px] += soft * (value + 0.15 * h[py, px] - h[py, px])
            e[py, px] += soft * (0.16 + 0.25 * e[py, px] - e[py, px])


@_compile
def candidate(i, j, spacing, salt):
    """Position (world px) and hash of grid cell (i, j)'s candidate nucleus."""
    key = mix(i, j, salt)
    x = (i + 0.5 + 0.95 * ((key & 0xFFFF) / 65536.0 - 0.5)) * spacing
    y = (j + 0.5 + 0.95 * ((key >> 16) / 65536.0 - 0.5)) * spacing
    return x, y, key


@_compile
def paint_nuclei(kind, kinds, room, h, e, x0, y0, scale, angle, salt):
    """Nuclei of one kind: a jittered grid, thinned where two come too close, kept where their centre has room."""
    spacing, chance, apart = NUCLEI[kind]
    if chance == 0.0:
        return
    own = salt + 200 + 7 * kind
    rows, columns = kinds.shape
    least = (apart * spacing) ** 2
    for j in range(math.floor(y0 * scale / spacing) - 1, math.floor((y0 + rows) * scale / spacing) + 2):
        for i in range(math.floor(x0 * scale / spacing) - 1, math.floor((x0 + columns) * scale / spacing) + 2):
            x, y, key = candidate(i, j, spacing, own)
            px, py = math.floor(x / scale) - x0, math.floor(y / scale) - y0
            if px < 0 or py < 0 or px >= columns or py >= rows:
                continue
            if kinds[py, px] != kind or room[py, px] == 0:
                continue
            other = mix(i, j, own + 1)
            crowd = 1.0
            if kind in (STROMA, NECROSIS):
                crowd = 2.0 * noise(x / 210.0, y / 210.0, salt + 199)
            if kind == STROMA:
                crowd += 1.4 * ramp(noise(x / 240.0, y / 240.0, salt + 407), 0.62, 0.74)
            if (other & 0xFFFF) / 65536.0 > chance * crowd:
                continue
            crowded = False
            for dj in range(-1, 2):
                for di in range(-1, 2):
                    if di == 0 and dj == 0:
                        continue
                    nx, ny, rival = candidate(i + di, j + dj, spacing, own)
                    if rival > key and (nx - x) ** 2 + (ny - y) ** 2 < least:
                        crowded = True
            if crowded:
                continue
            what = cell_type(kind, x, y, (other >> 16) / 65536.0, salt)
            if what < 0:
                continue
            turn = 6.2831853 * unit(i, j, own + 2)
            if kind == ADIPOSE:
                _, here, _ = fat_cells(x, y, salt)
                _, right, _ = fat_cells(x + 2.0, y, salt)
                _, below, _ = fat_cells(x, y + 2.0, salt)
                turn = math.atan2(below - here, right - here) + 1.5707963
            elif CELL_TYPES[what, 8] > 0.0:
                way, bend = (angle + 0.9, 0.42) if kind == MUSCLE else (angle, 1.0)
                offset = salt + 20 if kind == MUSCLE else salt + 10 if kind == STROMA else salt + 73
                here, _ = fibre_coordinates(x, y, way, bend, offset)
                right, _ = fibre_coordinates(x + 4.0, y, way, bend, offset)
                below, _ = fibre_coordinates(x, y + 4.0, way, bend, offset)
                turn = math.atan2(below - here, right - here) + 1.5707963 + 0.3 * (turn / 6.2831853 - 0.5)
            paint_nucleus(h, e, x, y, x0, y0, scale, what, turn, mix(i, j, own + 3), salt)


@_compile
def paint_vessels(kinds, room, h, e, red, x0, y0, scale, salt):
    """Blood vessels of stroma, muscle and fat: endothelium and a muscular wall around red cells or an empty lumen."""
    spacing = 620.0
    rows, columns = kinds.shape
    for j in range(math.floor(y0 * scale / spacing) - 1, math.floor((y0 + rows) * scale / spacing) + 2):
        for i in range(math.floor(x0 * scale / spacing) - 1, math.floor((x0 + columns) * scale / spacing) + 2):
            x, y, key = candidate(i, j, spacing, salt + 300)
            if (key >> 3 & 0xFF) > 110:
                continue
            lumen = 7.0 + 38.0 * ((key >> 11 & 0xFF) / 255.0) ** 3
            wall = (2.5 + 0.35 * lumen) * (0.5 + (key >> 19 & 0xFF) / 255.0)
            squeeze = 1.0 + 0.9 * ((key >> 23 & 0xFF) / 255.0)
            turn = (key & 0xFF) / 81.0
            ca, sa = math.cos(turn), math.sin(turn)
            full = (key >> 5 & 0x3) != 0
            reach = (lumen + wall) * squeeze + 6.0
            top, bottom = max(0, int((y - reach) / scale) - y0), min(rows - 1, int((y + reach) / scale) - y0)
            left, right = max(0, int((x - reach) / scale) - x0), min(columns - 1, int((x + reach) / scale) - x0)
            for py in range(top, bottom + 1):
                for px in range(left, right + 1):
                    kind = kinds[py, px]
                    if kind != STROMA and kind != MUSCLE and kind != ADIPOSE:
                        continue
                    wx, wy = (x0 + px + 0.5) * scale, (y0 + py + 0.5) * scale
                    u, v = (wx - x) * ca + (wy - y) * sa, (wy - y) * ca - (wx - x) * sa
                    u /= squeeze
                    r = math.sqrt(u * u + v * v) + 0.35 * lumen * (noise(wx / 23.0, wy / 23.0, salt + 301) - 0.5)
                    if r > lumen + wall + 2.0:
                        continue
                    room[py, px] = 0
                    if r < lumen:
                        ph, pe, pr = 0.01, 0.02, 0.0
                        if full:
                            ph, pe, pr = red_cells(wx, wy, salt + 302, 0.85)
                        h[py, px], e[py, px], red[py, px] = ph, pe, pr
                        continue
                    blend = 1.0 - ramp(r, lumen + wall, lumen + wall + 2.0)
                    ring = noise((r - lumen) / 2.6, 6.0 * math.atan2(v, u), salt + 303)
                    h[py, px] += blend * (0.12 + 0.05 * ring - h[py, px])
                    e[py, px] += blend * (0.40 + 0.20 * ring - e[py, px])
                    # Endothelial nuclei bulge along the lumen; smooth muscle nuclei lie in the wall.
                    pitch = 17.0
                    s = math.atan2(v, u) * (lumen + 2.0)
                    for layer in range(1 + int(wall / 7.0)):
                        q = s / pitch + 0.37 * layer
                        cell = math.floor(q)
                        n = mix(int(cell), layer, key)
                        if (n & 0xFF) > 165:
                            continue
                        along = (q - cell - 0.5) * pitch + 4.0 * ((n >> 8 & 0xFF) / 255.0 - 0.5)
                        out = r - lumen - 1.4 - 6.6 * layer
                        inside = (along / 5.6) ** 2 + (out / 1.9) ** 2
                        soft = 1.0 - ramp(inside, 0.7, 1.3)
                        if soft > 0.0:
                            h[py, px] += soft * ((1.1 if layer == 0 else 0.85) - h[py, px])


# ------------------------------------------------------------------------------------------------ a rectangle


@_compile
def densities(x0, y0, width, height, scale, labels, pure, origin_x, origin_y, angle, salt):
    """The three density fields of a rectangle, float32 (3, height, width) without blur.

    x0, y0:             corner of the rectangle, px
    scale:              world px per px (mpp / 0.5)
    origin_x, origin_y: corner of the region map, world px
    """
    fields = np.zeros((3, height, width), np.float32)
    h, e, red = fields[0], fields[1], fields[2]
    kinds = np.zeros((height, width), np.uint8)
    room = np.zeros((height, width), np.uint8)
    present = np.zeros(10, np.bool_)
    for py in range(height):
        y = (y0 + py + 0.5) * scale
        for px in range(width):
            x = (x0 + px + 0.5) * scale
            kind, beyond, lead = kind_at(x - origin_x, y - origin_y, labels, pure, salt)
            if kind == GLASS:
                continue
            present[kind] = True
            kinds[py, px] = kind
            a, b, c, free = tissue(kind, x, y, angle, salt)
            if lead < 0.6 and beyond != kind:
                a, b, c, free = border(a, b, c, free, kind, beyond, lead, x, y, angle, salt)
            h[py, px], e[py, px], red[py, px], room[py, px] = a, b, c, free
    if present[STROMA] or present[MUSCLE] or present[ADIPOSE]:
        paint_vessels(kinds, room, h, e, red, x0, y0, scale, salt)
    for kind in range(1, 10):
        if present[kind]:
            paint_nuclei(kind, kinds, room, h, e, x0, y0, scale, angle, salt)
    # Sections are not equally thick, nor equally stained, everywhere.
    for py in range(height):
        y = (y0 + py + 0.5) * scale
        for px in range(width):
            if kinds[py, px] != GLASS:
                x = (x0 + px + 0.5) * scale
                thick = 0.86 + 0.28 * noise(x / 700.0, y / 700.0, salt + 400)
                thick *= 0.88 + 0.24 * noise(x / 1.5, y / 1.5, salt + 402)
                h[py, px] *= thick * (0.9 + 0.2 * noise(x / 2600.0, y / 2600.0, salt + 403))
                e[py, px] *= thick * (0.9 + 0.2 * noise(x / 1900.0, y / 1900.0, salt + 401))
    return fields


@_compile
def blur(field, out, k0, k1, k2):
    """Symmetric five-tap blur of one field, without the two outermost px (left at 0)."""
    rows, columns = field.shape
    half = np.zeros_like(field)
    for y in range(rows):
        for x in range(2, columns - 2):
            half[y, x] = (
                k0 * field[y, x] + k1 * (field[y, x - 1] + field[y, x + 1]) + k2 * (field[y, x - 2] + field[y, x + 2])
            )
    for y in range(2, rows - 2):
        for x in range(2, columns - 2):
            out[y, x] = (
                k0 * half[y, x] + k1 * (half[y - 1, x] + half[y + 1, x]) + k2 * (half[y - 2, x] + half[y + 2, x])
            )


@_compile
def transmit(fields, x0, y0, margin, vectors, white, grain, table, salt, out):
    """Beer-Lambert and the sensor: light through the densities, with each pixel's noise; fills uint8 (h, w, 3)."""
    rows, columns = out.shape[0], out.shape[1]
    steps = (LUT_SIZE - 1) / LUT_MAX
    for py in range(rows):
        for px in range(columns):
            h = fields[0, py + margin, px + margin]
            e = fields[1, py + margin, px + margin]
            red = fields[2, py + margin, px + margin]
            bits = mix(x0 + px, y0 + py, salt + 500)
            shared = ((bits & 0xFF) + (bits >> 8 & 0xFF) + (bits >> 16 & 0xFF) + (bits >> 24) - 510) * (grain / 148.0)
            bits = mix(x0 + px, y0 + py, salt + 501)
            for c in range(3):
                density = max(0.0, h * vectors[0, c] + e * vectors[1, c] + red * vectors[2, c])
                light = white[c] * table[min(LUT_SIZE - 1, int(density * steps))]
                value = light + shared + ((bits >> (8 * c) & 0xFF) - 127.5) * (grain / 148.0)
                out[py, px, c] = int(min(255.0, max(0.0, value + 0.5)))


@_compile
def glass(x0, y0, white, grain, salt, out):
    """Bare glass: the lamp's colour and the sensor's noise, as `transmit` gives for density 0."""
    for py in range(out.shape[0]):
        for px in range(out.shape[1]):
            bits = mix(x0 + px, y0 + py, salt + 500)
            shared = ((bits & 0xFF) + (bits >> 8 & 0xFF) + (bits >> 16 & 0xFF) + (bits >> 24) - 510) * (grain / 148.0)
            bits = mix(x0 + px, y0 + py, salt + 501)
            for c in range(3):
                value = white[c] + shared + ((bits >> (8 * c) & 0xFF) - 127.5) * (grain / 148.0)
                out[py, px, c] = int(min(255.0, max(0.0, value + 0.5)))
