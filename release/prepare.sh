#!/usr/bin/env bash
# What `make wheel` asks of a Debian or Ubuntu: Python with venv, make, binutils, and GCC 12, the oldest that compiles the
# kernels. Needs root.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends ca-certificates git make binutils g++-12 python3 python3-dev python3-venv
