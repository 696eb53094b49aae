"""Run by `accelerate launch`: writes each rank's environment. It imports no library, so that a launch takes seconds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    (Path(sys.argv[1]) / f"place-{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
