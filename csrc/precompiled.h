// What most files of ops, cpu and cuda include of torch. setup.py compiles it once, beside the files that know no
// torch; no file includes it, and each compiles without it. More headers make it slower to load than they save.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>
