"""The peers' own environments, made by pip with the versions measured, and which interpreter runs a side.

transformers.Trainer and peft run in ours. TRL gets ours and itself. LLaMA-Factory brings versions of its own, torch
among them, so what it measures is another stack.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
LISTED = ("-c", str(CONSTRAINTS))
NEEDED = {
    "trl": [*LISTED, "torch", "transformers", "peft", "trl==1.16.0"],
    "llamafactory": ["llamafactory==0.9.5", "torch==2.11.0", "torchaudio==2.11.0"],
}


def make(folder: Path) -> None:
    """Each that is not there yet; a failure is told and leaves the others."""
    for name, words in NEEDED.items():
        place = folder / name
        if (place / "made").exists():
            continue
        venv.create(place, with_pip=True, clear=True)
        done = subprocess.run([place / "bin" / "python", "-m", "pip", "install", *words], check=False)
        if done.returncode == 0:
            (place / "made").touch()
        print(f"{name}: {'made' if done.returncode == 0 else 'could not be made'}", file=sys.stderr)


def interpreter(side: str, environments: Path) -> str | None:
    """Who runs a side: this interpreter, or that of the side's own environment if it is there."""
    who = side.partition("-")[0]
    if who not in NEEDED:
        return sys.executable
    own = environments / who
    return str(own / "bin" / "python") if (own / "made").exists() else None
