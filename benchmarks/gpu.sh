#!/usr/bin/env bash
# make gpu: benchmarks/gpu.py, with its options, on any machine that has torch, torchvision and a CUDA device.
# If nothing can be installed there, put wheels of the missing packages into wheels/ (pycocotools, albumentations, albucore,
# simsimd, stringzilla, omegaconf, pydantic, pydantic-core, ...): they are unpacked into a temporary folder, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
if compgen -G 'wheels/*.whl' > /dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" benchmarks/gpu.py "$@"
