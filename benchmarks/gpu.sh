#!/usr/bin/env bash
# Runs everything that needs a GPU: bash benchmarks/gpu.sh [--json FILE] [ARTIFACT.onnx ...]
# Needs no network. PYTHON names another interpreter. Exit code: 0 passed, 1 failed, 3 no GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$here/gpu.py" "$@"
