"""A picture of what the artifact says: some images of each test set, framed by verdict."""

from pathlib import Path

from PIL import Image, ImageDraw

from grood_edge.images import load_image
from grood_edge.runtime.score import ScoreRow

__all__ = ["draw_overview"]

TILES = 14
TILE, GAP, TOP = 64, 10, 26
KNOWN, OOD = (40, 140, 70), (200, 50, 40)


def draw_overview(sets: dict[str, list[ScoreRow]], path: Path) -> None:
    """Write a PNG: one line a test set, each image with class and p-value, framed green (known) or red (OOD)."""
    line = TOP + TILE + 30
    picture = Image.new("RGB", (GAP + TILES * (TILE + GAP), 34 + line * len(sets)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, 8), "green: known    red: out of distribution    below: class and p_value (small = OOD)", "black")
    for index, (name, rows) in enumerate(sets.items()):
        top = 34 + index * line
        draw.text((GAP, top + 6), name, "black")
        step = max(1, len(rows) // TILES)
        for column, row in enumerate(rows[::step][:TILES]):
            left = GAP + column * (TILE + GAP)
            frame = load_image(Path(row.path))
            tile = Image.fromarray(frame[..., 0]).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            colour = OOD if row.is_ood else KNOWN
            draw.rectangle((left - 4, top + TOP - 4, left + TILE + 3, top + TOP + TILE + 3), fill=colour)
            picture.paste(tile, (left, top + TOP))
            draw.text((left, top + TOP + TILE + 6), f"{row.class_name}  {row.p_value:.3f}", colour)
    picture.save(path)
