"""Stands in for tools/eval.py --time: fails at the first start in a folder, then writes milliseconds."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1]).parent
assert sys.argv[2:] == ["--checkpoint", str(folder / "last.pt"), "--time", "--end-with-parent"]
if not (folder / "timed").exists():
    (folder / "timed").touch()
    sys.exit("error: out of memory")
(folder / "metrics.json").write_text(json.dumps({"milliseconds": 12.5}))
