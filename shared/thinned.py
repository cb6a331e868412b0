"""A small data set cut out of a large one, for runs that only prove that every part works (`PRESET=smoke`).

Embedding the whole library takes longer than everything else in such a run. Whole families are kept or left out, so that what
remains is a data set like any other: look-alikes stay together, every reference resolves, every split has its rows.
"""

from __future__ import annotations

from pathlib import Path

from shared.files import replace_folder, sha256_tree, write_text
from shared.library import ROW_FILES, SPLITS, load_library, named_leaflets, read_rows


def thinned(datasets: Path, share: float, folder: Path) -> Path:
    """A copy of `datasets` below `folder` with about `share` of every split's families; made anew only when something changed.

    Rows stay when every leaflet they refer to stays; of those that refer to none the same share stays. What is wrong with the
    data (unreadable lines, references to nothing) stays, too, to be reported. Returns `datasets` itself for a share of 1.
    """
    if share >= 1:
        return datasets
    step = round(1 / share)
    made = folder / f"datasets-{sha256_tree([datasets, Path(__file__)])[:12]}-{step}"
    if made.is_dir():
        return made
    library = load_library(datasets)
    families = sorted({(leaf.split, leaf.family) for leaf in library})
    kept = {family for split in SPLITS for _, family in [f for f in families if f[0] == split][::step]}
    left_out = {leaf.id for leaf in library if leaf.family not in kept}

    def write(target: Path) -> None:
        for leaf in library:
            if leaf.id not in left_out:
                name = Path("health_library") / f"{leaf.id}.md"
                write_text(target / name, (datasets / name).read_text(encoding="utf-8"))
        for file, kind in ROW_FILES.items():
            rows, bad = read_rows(datasets, file, kind)
            about_leaflets = [row for row in rows if (named := named_leaflets(row)) and not named & left_out]
            others = [row for row in rows if not named_leaflets(row)]
            about_none = [row for split in SPLITS for row in [r for r in others if r.split == split][::step]]
            lines = [row.model_dump_json(by_alias=True) for row in [*about_leaflets, *about_none]] + [row.text for row in bad]
            write_text(target / file, "".join(f"{line}\n" for line in lines))

    replace_folder(made, write)
    return made
