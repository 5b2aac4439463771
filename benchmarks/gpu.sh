#!/usr/bin/env bash
# make gpu: the CUDA tests and benchmarks, on any machine that has torch, torchvision and a CUDA device.
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
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device found: make gpu needs one"'
"$python" -m pytest tests/test_cuda.py tests/losses/test_focal_triton.py tests/test_assign.py
"$python" benchmarks/focal_loss.py --device cuda
"$python" benchmarks/assign.py
"$python" tools/make_shapes.py --output data/shapes640 --size 640 --train 2000 --val 250
"$python" benchmarks/gpu.py "$@"
