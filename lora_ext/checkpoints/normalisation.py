"""``lora-ext normalise``: folds the scaling of an adapter on disk into its factors."""

from __future__ import annotations

import os
from pathlib import Path

from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.normalising import normalised
from lora_ext.files.writing import check_new, new_directory


def normalise(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes the adapter in ``adapter`` to the new directory ``out`` as ``save_adapter(normalise=True)`` saves it.

    Raises:
        ValueError: a file is corrupted, the adapter is not LoRA, or a factor times its scaling is too large for its
            dtype.
        FileNotFoundError, FileExistsError, OSError: as :func:`~lora_ext.checkpoints.merge`.
    """
    out = Path(out).absolute()
    file = normalised(AdapterFile.open(adapter, caller="normalise"), caller="normalise")
    check_new(out, "normalise")
    with new_directory(out, "normalise") as staging:
        file.write(staging)
