"""Stands in for tools/train.py: does what plan.json lists for the gamma of the config, one action per start."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

folder, plan = Path(sys.argv[1]).parent, Path(__file__).with_name("plan.json")
gamma = re.search(r"gamma: (\S+)", (folder / "config.yaml").read_text())[1]
with (folder / "starts").open("a") as file:
    file.write("x")
actions = json.loads(plan.read_text()).get(gamma, ["finish"])
action = actions[min((folder / "starts").stat().st_size, len(actions)) - 1]
print("fake run", action, flush=True)
if action == "short":
    time.sleep(1)
if action in ("finish", "short"):
    metrics = {"AP": float(gamma) / 10, "per_class": {}}
    (folder / "eval.json").write_text(json.dumps([{"step": 6, **metrics}]))
elif action == "error":
    print("error: the disk is on fire")
    sys.exit(1)
elif action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif action == "diverge":
    (folder / "nonfinite_step_4.json").write_text(json.dumps({"step": 4, "image_ids": []}))
    sys.exit(1)
elif action == "busy":
    sys.exit(75)
elif action == "busy under torchrun":
    print("error: runs/a: another process is training here; wait for it")
    sys.exit(1)
elif action == "half":
    (folder / "eval.json").write_text("[]")
    sys.exit(0)
elif action == "late":
    (folder / "eval.json").write_text(json.dumps([{"step": 6, "AP": 0.5, "per_class": {}}]))
    os.kill(os.getpid(), signal.SIGKILL)
elif action == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
elif action == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(60)
