#!/bin/sh
# SPDX-License-Identifier: MIT
# Runs a compilation and keeps what ptxas says of its kernels beside the object file, OBJECT.ptxas,
# which tests/repo/test_ptxas_budget.py reads. All else that the compiler says is passed on.
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" 2> "$object.ptxas"
status=$?
if [ $status -ne 0 ]; then
  cat "$object.ptxas" >&2
  rm "$object.ptxas"
else
  grep -vE '^ptxas info|^    [0-9]+ bytes stack frame' "$object.ptxas" >&2
fi
exit $status
