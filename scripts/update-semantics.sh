#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the steps in docs/semantics.md again and writes down what the model says.
set -euo pipefail
cd "$(dirname "$0")/.."
swift build --product faultline >&2
faultline=$(swift build --show-bin-path)/faultline
new=$(mktemp)
trap 'rm -f "$new"' EXIT
steps=''
while IFS= read -r line; do
  case $line in
    '```text')
      printf '%s\n' "$line"
      steps=begun
      ;;
    '```')
      printf '%s' "${steps#begun}" | "$faultline" model run -
      printf '%s\n' "$line"
      steps=''
      ;;
    *)
      if [ -z "$steps" ]; then
        printf '%s\n' "$line"
      elif [[ $line == '> '* ]]; then
        steps+=${line#> }$'\n'
      fi
      ;;
  esac
done <docs/semantics.md >"$new"
cat "$new" >docs/semantics.md
