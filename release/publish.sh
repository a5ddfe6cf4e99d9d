#!/usr/bin/env bash
# release/publish.sh DIST SITE URL: what is published of a folder of wheels: DIST/SHA256SUMS, and SITE, the package index,
# whose links lead to URL. Uploads nothing.
set -euo pipefail
dist=$1 site=$2 url=$3
python=${PYTHON:-python3}
libraries=$(mktemp -d)
trap 'rm -rf "$libraries"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --target "$libraries" packaging
(cd "$dist" && sha256sum -- *.whl *.tar.gz | tee SHA256SUMS)
PYTHONPATH=$libraries "$python" "$(dirname "$0")/index.py" "$dist" "$site" --url "$url"
