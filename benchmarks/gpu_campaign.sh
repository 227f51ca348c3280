#!/usr/bin/env bash
# Test and measure seqmill on a GPU, in one call of at most ten minutes; docs/how-to/gpu.md says what comes out.
#
#   benchmarks/gpu_campaign.sh       tests/gpu, then the table
#   benchmarks/gpu_campaign.sh 2     lack of memory, leases, eight workers, equal bits, a kill and a resume
#
# It needs Python with torch 2.11 or later, and installs only wheels that are in .whl/. Results go to OUT. A call with
# the same OUT goes on where the one before stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
limit=${CAMPAIGN_SECONDS:-585}
python=${PYTHON:-python3}
site=${TMPDIR:-/tmp}/gpu-campaign-site
mkdir -p "$out"
if compgen -G ".whl/*.whl" >/dev/null && [ ! -d "$site" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl || echo "the wheels in .whl/ could not be installed"
fi
export PYTHONPATH="$PWD/benchmarks:$PWD/scripts:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}:$site"
"$python" benchmarks/gpu_missing.py || exit 1
case ${1:-1} in
1)
    "$python" benchmarks/gpu_tests.py --output "$out/gpu-tests" --seconds $((limit * 2 / 5))
    "$python" benchmarks/gpu.py --output "$out/gpu" --seconds $((limit - SECONDS))
    ;;
2) "$python" benchmarks/gpu_hard.py --output "$out/gpu-hard" --seconds $((limit - SECONDS)) ;;
*) echo "usage: $0 [1|2]" >&2 && exit 2 ;;
esac
